"""Arms compared on tasks: each arm's rate is chosen on validation rows, then every seed runs at that rate."""

import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from softprompts.artifacts.io import read_json
from softprompts.config import Run, Section, TaskConfig, TrainConfig, closest
from softprompts.config.schema import Count, Seed
from softprompts.errors import TrainingError
from softprompts.recipes import stages as stage
from softprompts.recipes.run.run import ProgressReporter

Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Shots = Annotated[int, Field(ge=0)]

WEIGHTS = {"fine-tuning": "backbone", "lora": "lora"}
"""The arms that do not leave the backbone frozen, the upper lines of a table, and their `training.target`."""

NO_PROMPT = "no prompt"
"""The line of the stock model."""

ALL_TARGETS = "together"
"""What takes a task's name in the runs of all tasks."""


class ComparisonStage(Section):
    """How arms are compared, with all rows and with few."""

    training: TrainConfig = TrainConfig(max_steps=200, batch_size=8, warmup_steps=10)
    """How an arm is trained with all rows."""

    few: TrainConfig = TrainConfig(max_steps=60, batch_size=8, warmup_steps=5)
    """How an arm is trained with few rows."""

    shots: tuple[Shots | None, ...] = Field(default=(None, 16), min_length=1)
    """Sizes of the training set, in rows per class; null: all rows; 0: the start as it is, untrained."""

    shots_per: Literal["class", "set"] = "class"
    """`set`: `shots` counts all training rows, whatever their classes."""

    seeds: tuple[Seed, ...] = Field(default=(0, 1, 2), min_length=1)
    """Seeds of the start, of the order of rows and of the draw of few rows."""

    learning_rates: tuple[Rate, ...] = Field(default=(0.03, 0.1, 0.3), min_length=1)
    """Learning rates that are tried; the best on validation rows is taken for every seed."""

    weight_learning_rates: dict[str, tuple[Rate, ...]] = Field(
        default={"fine-tuning": (1e-5, 3e-5), "lora": (3e-4, 1e-3)}
    )
    """Learning rates that are tried for the arms that train weights."""

    weight_max_steps: tuple[Count, Count] | None = None
    """Steps of the arms that train weights, with all rows and with few; null: as many as for prompts."""

    tune_on: tuple[str, ...] | None = None
    """Tasks on which learning rates are chosen; null: all."""

    weight_targets: tuple[str, ...] | None = None
    """Tasks on which weights are trained; null: all."""

    @field_validator("shots", "seeds", "learning_rates")
    @classmethod
    def _distinct(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        return check_distinct(values)

    @model_validator(mode="after")
    def _runs(self) -> "ComparisonStage":
        for name, train in (("training", self.training), ("few", self.few)):
            if not train.max_steps:
                raise ValueError(
                    f"{name}.max_steps must be at least 1; what the start does untrained is size 0 in shots"
                )
        for rates in self.weight_learning_rates.values():
            check_distinct(rates)
        return self

    def training_for(self, shots: int | None, weights: bool = False) -> TrainConfig:
        """How a task is trained; at the latest an evaluation at the end serves to choose the rate."""
        train = self.training if shots is None else self.few
        if shots == 0:
            return train.model_copy(update={"max_steps": 0, "eval_steps": None, "early_stopping_patience": None})
        own = self.weight_max_steps if weights else None
        steps = train.max_steps if own is None else own[shots is not None]
        return train.model_copy(update={"max_steps": steps, "eval_steps": min(train.eval_steps or steps, steps)})

    def weight_training(self, cell: "ArmRun", shots: int | None) -> dict[str, Any]:
        """The section `train` of a run that trains weights of the backbone."""
        train = self.training_for(shots, weights=True).model_dump(mode="json")
        return {**train, "target": WEIGHTS[cell.arm], "learning_rate": cell.rate, "learning_rate_unit": "absolute"}

    def draw_rows(self, task: TaskConfig, shots: int | None, seed: int) -> TaskConfig:
        """The task with all rows, or with few of them drawn by `seed`; the rows that judge are the same for all."""
        named = task.model_copy(update={"name": task.title})
        if not shots:
            return named
        few = {"shots": shots, "shots_per": self.shots_per, "shots_seed": seed}
        return named.model_copy(update={"split": task.split.model_copy(update=few)})


def check_known(where: str, given: Iterable[str], possible: Collection[str]) -> None:
    """Raise ValueError, with the names there are and the closest one, for a name that is not among them."""
    for name in given:
        if name not in possible:
            raise ValueError(f"{where}: '{name}' is unknown{closest(name, possible)} known: {', '.join(possible)}")


def check_distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same values; raises ValueError where one stands there twice."""
    if len(set(values)) != len(values):
        raise ValueError(f"every value may stand there once, given {', '.join(map(str, values))}")
    return values


@dataclass(frozen=True)
class ArmRun:
    """One run of the table: an arm at a rate with a seed."""

    arm: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """Its folder."""
        return f"{self.arm}-rate{self.rate:g}-seed{self.seed}"

    @property
    def trains_weights(self) -> bool:
        """Whether it leaves the backbone other than it was."""
        return self.arm in WEIGHTS


@dataclass(frozen=True)
class ArmResult:
    """A run's cell and the page of each of its tasks; none where it failed."""

    arm_run: ArmRun
    pages: Sequence[Mapping[str, Any]]

    @property
    def validation(self) -> float | None:
        """The best validation score, which is that of the weights that are kept; None for a run that failed."""
        if not self.pages:
            return None
        return max(float(point["value"]) for point in self.pages[0]["validation"])


Results = Mapping[tuple[str, int | None], Sequence[ArmResult]]
"""The runs of each task (or TOGETHER) and size."""

Runner = Callable[[str, int | None, Sequence[ArmRun], str], list[ArmResult]]
"""Does the runs of cells on a task (or TOGETHER) at a size, in a folder of that name."""


@dataclass(frozen=True)
class Comparison:
    """Runs of arms on tasks, and how each rate was chosen; `rates` says which an arm tries where the stage does not."""

    stage: ComparisonStage
    run: Runner
    rates: Mapping[str, Sequence[float]] = field(default_factory=dict)
    results: dict[tuple[str, int | None], list[ArmResult]] = field(default_factory=dict)
    chosen_rates: list[dict[str, Any]] = field(default_factory=list)

    def run_arms(self, shots: int | None, arms: Sequence[str], tasks: Sequence[str]) -> None:
        """All runs of `arms` at one size: first the rates, with the first seed, then the other seeds at the best one.

        Raises TrainingError for an arm that fails at every rate.
        """
        if not arms or not tasks:
            return
        if shots == 0:  # nothing is trained, so there is no rate to choose
            for name in tasks:
                cells = [ArmRun(arm, self._tried(arm)[0], seed) for arm in arms for seed in self.stage.seeds]
                self.results.setdefault((name, shots), []).extend(self.run(name, shots, cells, "seeds"))
            return
        tune_on = self.stage.tune_on
        tuned = [name for name in tasks if tune_on is None or name in tune_on] or tasks[:1]
        tried = [ArmRun(arm, rate, self.stage.seeds[0]) for arm in arms for rate in self._tried(arm)]
        first = {name: self.run(name, shots, tried, "rates") for name in tuned}
        best = {arm: self._best(arm, tried, first, shots) for arm in arms}
        for name in tasks:
            done = [one for one in first.get(name, ()) if one.arm_run == best[one.arm_run.arm]]
            cells = [ArmRun(arm, best[arm].rate, seed) for arm in arms for seed in self.stage.seeds]
            rest = [cell for cell in cells if cell not in [one.arm_run for one in done]]
            more = self.run(name, shots, rest, "seeds") if rest else []
            self.results.setdefault((name, shots), []).extend([*done, *more])

    def _tried(self, arm: str) -> Sequence[float]:
        return self.rates.get(arm) or self.stage.weight_learning_rates.get(arm) or self.stage.learning_rates

    def _best(
        self, arm: str, tried: Sequence[ArmRun], runs: Mapping[str, Sequence[ArmResult]], shots: int | None
    ) -> ArmRun:
        """The rate with the best mean validation score over the tasks it was tried on; of equal ones the smaller."""
        scores: dict[ArmRun, float] = {}
        for cell in (cell for cell in tried if cell.arm == arm):
            each = [one.validation for own in runs.values() for one in own if one.arm_run == cell]
            if all(score is not None for score in each):
                scores[cell] = statistics.fmean(score for score in each if score is not None)
        if not scores:
            raise TrainingError(f"arm '{arm}', {size_name(shots)}, failed at every rate; give lower ones")
        best = max(scores, key=lambda cell: (scores[cell], -cell.rate))
        known = {f"{cell.rate:g}": score for cell, score in scores.items()}
        self.chosen_rates.append(
            {"arm": arm, "size": size_name(shots), "rate": best.rate, "tried": known, "targets": list(runs)}
        )
        return best


def run_shared_batch(
    title: str, run: Run, cells: Sequence[ArmRun], screen: ProgressReporter, inputs: Sequence[str] = ()
) -> list[ArmResult]:
    """The runs of `cells` in one frozen batch, as `run` lists them by name; those that failed have no pages.

    inputs: directories with the prompts that they start from.
    """
    try:
        rows = stage.run_group(title, run, screen, inputs)["runs"]
    except TrainingError as error:
        screen.log(f"{title}: {error}")
        return [ArmResult(cell, []) for cell in cells]
    failed = {row["name"] for row in rows if row["failed"]}
    return [
        ArmResult(cell, [] if cell.name in failed else _pages(Path(run.output_dir) / cell.name / "results.json"))
        for cell in cells
    ]


def run_single(title: str, run: Run, cell: ArmRun, screen: ProgressReporter) -> ArmResult:
    """A run by itself, such as one that trains weights, of which nothing can be shared."""
    try:
        return ArmResult(cell, [stage.run_group(title, run, screen)])
    except TrainingError as error:
        screen.log(f"{title}: {error}")
        return ArmResult(cell, [])


def _pages(file: Path) -> list[dict[str, Any]]:
    page = read_json(file)
    return page.get("tasks", [page])


def size_name(shots: int | None) -> str:
    """How a size is called in folders and tables."""
    return "full" if shots is None else f"{shots}-shot"


# What there is to read


def mean_and_sd(values: Sequence[float]) -> dict[str, Any]:
    """A cell of a table: mean, sample standard deviation and number of `values`."""
    sd = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "sd": sd, "n": len(values)}


def scores(found: Results, shots: int | None, tasks: Sequence[str], about: Mapping[str, str]) -> dict[str, Any]:
    """The table of one size: of each arm, in the order of `about`, its numbers and for each task mean and spread."""
    pages: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for (_, size), own in found.items():
        for one in own if size == shots else ():
            for page in one.pages:
                pages.setdefault(one.arm_run.arm, {}).setdefault(page["task"], []).append(page)
    # Weights are judged on a float32 copy: the stock model's line is that of the arms that leave it as it is.
    ordered = sorted(pages, key=lambda arm: arm in WEIGHTS)
    every = [page for arm in ordered for same in pages[arm].values() for page in same]
    stock: dict[str, list[float]] = {}
    for page in every:
        if page["summary"]["before"]:
            stock.setdefault(page["task"], [page["summary"]["before"]["value"]])
    lines = [_line(NO_PROMPT, "the stock model", 0, stock, tasks)]
    for arm in (arm for arm in about if arm in pages):
        trained = max(page["summary"]["trainable"] for same in pages[arm].values() for page in same)
        values = {task: [page["summary"]["after"]["value"] for page in same] for task, same in pages[arm].items()}
        lines.append(_line(arm, about[arm], trained, values, tasks))
    metrics = {page["task"]: page["summary"]["metric"] for page in every}
    return {"size": size_name(shots), "targets": list(tasks), "metrics": metrics, "lines": lines}


def _line(
    arm: str, about: str, trainable: int, values: Mapping[str, Sequence[float]], tasks: Sequence[str]
) -> dict[str, Any]:
    """A line of the table: scores by task, and their mean where it has all of them."""
    cells = {task: mean_and_sd(values[task]) for task in tasks if task in values}
    mean = statistics.fmean(score["mean"] for score in cells.values()) if len(cells) == len(tasks) else None
    return {"arm": arm, "about": about, "trainable": trainable, "scores": cells, "mean": mean}


def curves(found: Results) -> list[dict[str, Any]]:
    """The loss by step, mean over the seeds, of each arm on each task and size."""
    every = []
    for (task, shots), own in found.items():
        lines: dict[str, list[Mapping[str, Any]]] = {}
        for one in own if task != ALL_TARGETS else ():
            if one.pages:
                lines.setdefault(one.arm_run.arm, []).append(one.pages[0])
        means = {
            arm: [
                (steps[0]["step"], statistics.fmean(step["loss"] for step in steps))
                for steps in zip(*(page["curve"] for page in pages), strict=False)
            ]
            for arm, pages in lines.items()
        }
        if means:
            every.append({"target": task, "size": size_name(shots), "lines": means})
    return every


def machine(found: Results) -> Mapping[str, Any]:
    """The machine of the first run; empty where there is none."""
    return next((page["machine"] for own in found.values() for one in own for page in one.pages), {})


def failures(found: Results) -> list[str]:
    """A line for each run that failed."""
    return [
        f"{task} {size_name(shots)}: {one.arm_run.name} failed and is left out"
        for (task, shots), own in found.items()
        for one in own
        if not one.pages
    ]


def score_table(
    one: Mapping[str, Any], title: str, more: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """What `scores` gives as a table of the page; `more` are further columns, with what each arm has there."""
    tasks = [f"{task} ({one['metrics'].get(task, '')})" for task in one["targets"]]
    more = more or {}
    rows = [
        [
            *(line[key] for key in ("arm", "about", "trainable")),
            *(values.get(line["arm"]) for values in more.values()),
            *map(line["scores"].get, one["targets"]),
            line["mean"],
        ]
        for line in one["lines"]
    ]
    columns = ["arm", "what it is", "trained numbers", *more, *tasks, "mean"]
    return {"title": f"{title}, {one['size']}", "columns": columns, "rows": rows}


def rate_table(chosen: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How each arm's rate was chosen, as a table of the page."""
    rows = [[one["arm"], one["size"], f"{one['rate']:g}", format_scores(one["tried"])] for one in chosen]
    columns = ["arm", "size", "rate", "validation scores by rate"]
    return {"title": "Rates chosen on validation rows", "columns": columns, "rows": rows}


def format_scores(values: Mapping[str, float]) -> str:
    """Names with their values, in one cell of a table."""
    return ", ".join(f"{name} {value:.3f}" for name, value in values.items())
