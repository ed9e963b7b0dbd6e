"""Arms compared on tasks: validation rows choose the learning rate of each arm, then every seed runs at that rate."""

import statistics
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from softprompts.artifacts.io import read_json
from softprompts.config import Run, Section, TaskConfig, TrainConfig, closest
from softprompts.config.schema import Count, Seed
from softprompts.errors import TrainingError
from softprompts.recipes import stages
from softprompts.recipes.run.results import best_validation
from softprompts.recipes.run.run import ProgressReporter

Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Shots = Annotated[int, Field(ge=0)]

WEIGHTS = {"fine-tuning": "backbone", "lora": "lora"}
"""The arms that do not leave the backbone frozen, the upper lines of a table, and their `training.target`."""

NO_PROMPT = "no prompt"
"""The arm of the stock model."""

ALL_TARGETS = "together"
"""Replaces a task's name in runs on all tasks."""


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
                raise ValueError(f"{name}.max_steps must be at least 1; list 0 in shots to score the untrained start")
        for rates in self.weight_learning_rates.values():
            check_distinct(rates)
        return self

    def training_for(self, shots: int | None, weights: bool = False) -> TrainConfig:
        """How a task is trained; at least an evaluation at the end serves to choose the rate."""
        train = self.training if shots is None else self.few
        if shots == 0:
            return train.model_copy(update={"max_steps": 0, "eval_steps": None, "early_stopping_patience": None})
        steps = train.max_steps
        if weights and self.weight_max_steps is not None:
            steps = self.weight_max_steps[shots is not None]
        return train.model_copy(update={"max_steps": steps, "eval_steps": min(train.eval_steps or steps, steps)})

    def weight_training(self, arm_run: "ArmRun", shots: int | None) -> dict[str, Any]:
        """The section `training` of a run that trains weights of the backbone."""
        train = self.training_for(shots, weights=True).model_dump(mode="json")
        train |= {"target": WEIGHTS[arm_run.arm], "learning_rate": arm_run.rate, "learning_rate_unit": "absolute"}
        return train

    def draw_rows(self, task: TaskConfig, shots: int | None, seed: int) -> TaskConfig:
        """The task with all training rows, or with few of them drawn by `seed`; other rows are the same for all."""
        named = task.model_copy(update={"name": task.title})
        if not shots:
            return named
        few = {"shots": shots, "shots_per": self.shots_per, "shots_seed": seed}
        return named.model_copy(update={"split": task.split.model_copy(update=few)})


def check_known(key: str, names: Iterable[str], known: Collection[str]) -> None:
    """Raise ValueError, with the known names and the closest one, for a name under `key` that is not known."""
    for name in names:
        if name not in known:
            raise ValueError(f"{key}: '{name}' is unknown{closest(name, known)} known: {', '.join(known)}")


def check_distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same values; raises ValueError where two of them are equal."""
    if len(set(values)) != len(values):
        raise ValueError(f"each value may be listed once, given {', '.join(map(str, values))}")
    return values


@dataclass(frozen=True)
class ArmRun:
    """One run of a comparison: an arm at a learning rate with a seed."""

    arm: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.arm}-rate{self.rate:g}-seed{self.seed}"

    @property
    def trains_weights(self) -> bool:
        """Whether it trains weights of the backbone."""
        return self.arm in WEIGHTS


@dataclass(frozen=True)
class ArmResult:
    """A run of a comparison and the results of each of its tasks; none where the run failed."""

    arm_run: ArmRun
    pages: Sequence[Mapping[str, Any]]

    @property
    def validation(self) -> float | None:
        """The best validation score, which is that of the saved weights; None for a run that failed."""
        return best_validation(self.pages[0]["validation"]) if self.pages else None


Results = Mapping[tuple[str, int | None], Sequence[ArmResult]]
"""The runs of each task (or ALL_TARGETS) and size."""

Runner = Callable[[str, int | None, Sequence[ArmRun], str], list[ArmResult]]
"""Does runs on a task (or ALL_TARGETS) at a size, in a folder of the given name."""


@dataclass(frozen=True)
class Comparison:
    """Runs of arms on tasks, and how each learning rate was chosen.

    Attributes:
        stage: How arms are compared.
        run: Does the runs.
        rates: The learning rates that an arm tries, where they are not the stage's.
        results: The runs that are done, by task and size.
        chosen_rates: For each arm and size, the rate that was chosen and the scores that chose it.
    """

    stage: ComparisonStage
    run: Runner
    rates: Mapping[str, Sequence[float]] = field(default_factory=dict)
    results: dict[tuple[str, int | None], list[ArmResult]] = field(default_factory=dict)
    chosen_rates: list[dict[str, Any]] = field(default_factory=list)

    def run_arms(self, shots: int | None, arms: Sequence[str], tasks: Sequence[str]) -> None:
        """Do all runs of `arms` at one size: first every rate with the first seed, then all seeds at the best rate.

        Raises:
            TrainingError: An arm fails at every rate.
        """
        if not arms or not tasks:
            return
        if shots == 0:  # nothing is trained, so there is no rate to choose
            rates = {arm: self._rates(arm)[0] for arm in arms}
            for task in tasks:
                self._add(task, shots, self.run(task, shots, self._seed_runs(rates), "seeds"))
            return
        tune_on = self.stage.tune_on
        tuned_tasks = [task for task in tasks if tune_on is None or task in tune_on] or tasks[:1]
        tried_runs: list[ArmRun] = []
        for arm in arms:
            for rate in self._rates(arm):
                tried_runs.append(ArmRun(arm, rate, self.stage.seeds[0]))
        tried = {task: self.run(task, shots, tried_runs, "rates") for task in tuned_tasks}
        seed_runs = self._seed_runs({arm: self._choose_rate(arm, tried, shots) for arm in arms})
        for task in tasks:
            missing = list(seed_runs)
            results = []
            for result in tried.get(task, ()):
                if result.arm_run in seed_runs:
                    missing.remove(result.arm_run)
                    results.append(result)
            if missing:
                results += self.run(task, shots, missing, "seeds")
            self._add(task, shots, results)

    def _rates(self, arm: str) -> Sequence[float]:
        return self.rates.get(arm) or self.stage.weight_learning_rates.get(arm) or self.stage.learning_rates

    def _seed_runs(self, rates: Mapping[str, float]) -> list[ArmRun]:
        """A run of each arm at its rate with every seed."""
        return [ArmRun(arm, rates[arm], seed) for arm, seed in product(rates, self.stage.seeds)]

    def _add(self, task: str, shots: int | None, results: Sequence[ArmResult]) -> None:
        self.results.setdefault((task, shots), []).extend(results)

    def _choose_rate(self, arm: str, tried: Mapping[str, Sequence[ArmResult]], shots: int | None) -> float:
        """The rate with the best mean validation score over the tasks it was tried on; of equal ones the smaller."""
        failed: set[float] = set()
        scores_of_tasks: dict[float, list[float]] = {}
        for result in chain.from_iterable(tried.values()):
            if result.arm_run.arm != arm:
                continue
            if result.validation is None:
                failed.add(result.arm_run.rate)
            else:
                scores_of_tasks.setdefault(result.arm_run.rate, []).append(result.validation)
        scores = {rate: statistics.fmean(scores_of_tasks[rate]) for rate in scores_of_tasks if rate not in failed}
        if not scores:
            raise TrainingError(f"arm '{arm}', {size_name(shots)}, failed at every rate; give lower ones")
        best = max(scores, key=lambda rate: (scores[rate], -rate))
        by_rate = {f"{rate:g}": score for rate, score in scores.items()}
        self.chosen_rates.append(
            {"arm": arm, "size": size_name(shots), "rate": best, "tried": by_rate, "targets": list(tried)}
        )
        return best


def run_shared_batch(
    title: str, run: Run, arm_runs: Sequence[ArmRun], reporter: ProgressReporter, inputs: Sequence[str] = ()
) -> list[ArmResult]:
    """Do runs that share batches of one frozen backbone.

    Args:
        title: The name of the group for progress.
        run: The configuration, which lists the runs by their names.
        arm_runs: The runs.
        reporter: Shows progress.
        inputs: Directories of the prompts that they start from.

    Returns:
        The results of each run; those that failed have no pages.
    """
    try:
        rows = stages.run_group(title, run, reporter, inputs)["runs"]
    except TrainingError as error:
        reporter.log(f"{title}: {error}")
        return [ArmResult(arm_run, []) for arm_run in arm_runs]
    failed = {row["name"] for row in rows if row["failed"]}
    results = []
    for arm_run in arm_runs:
        file = Path(run.output_dir) / arm_run.name / stages.RESULTS
        results.append(ArmResult(arm_run, [] if arm_run.name in failed else _read_pages(file)))
    return results


def run_single(title: str, run: Run, arm_run: ArmRun, reporter: ProgressReporter) -> ArmResult:
    """Do a run by itself, such as one that trains weights, of which nothing can be shared."""
    try:
        return ArmResult(arm_run, [stages.run_group(title, run, reporter)])
    except TrainingError as error:
        reporter.log(f"{title}: {error}")
        return ArmResult(arm_run, [])


def _read_pages(file: Path) -> list[dict[str, Any]]:
    """The results of each task in a file."""
    page = read_json(file)
    return page.get("tasks", [page])


def size_name(shots: int | None) -> str:
    """The name of a size in folders and tables."""
    return "full" if shots is None else f"{shots}-shot"


# Tables and curves of a comparison


def mean_and_sd(values: Sequence[float]) -> dict[str, Any]:
    """A cell of a table: mean, sample standard deviation and number of `values`."""
    sd = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "sd": sd, "n": len(values)}


def all_pages(results: Results) -> Iterator[tuple[ArmRun, Mapping[str, Any]]]:
    """Yield the results of each task of each run, with the run."""
    for result in chain.from_iterable(results.values()):
        for page in result.pages:
            yield result.arm_run, page


def scores(results: Results, shots: int | None, tasks: Sequence[str], about: Mapping[str, str]) -> dict[str, Any]:
    """The scores of one size.

    Args:
        results: All runs.
        shots: The size.
        tasks: The tasks, in the order of the columns.
        about: What each arm is, in the order of the lines.

    Returns:
        For each arm, its trained numbers and for each task mean and standard deviation over the seeds.
    """
    results_of_size = {key: results_of_task for key, results_of_task in results.items() if key[1] == shots}
    pages: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for arm_run, page in all_pages(results_of_size):
        pages.setdefault(arm_run.arm, {}).setdefault(page["task"], []).append(page)
    # Arms that train weights evaluate a float32 copy, so the stock model's score is that of the other arms.
    stock: dict[str, list[float]] = {}
    metrics: dict[str, str] = {}
    for arm in sorted(pages, key=lambda arm: arm in WEIGHTS):
        for page in chain.from_iterable(pages[arm].values()):
            metrics[page["task"]] = page["summary"]["metric"]
            if page["summary"]["before"]:
                stock.setdefault(page["task"], [page["summary"]["before"]["value"]])
    lines = [_score_line(NO_PROMPT, "the stock model", 0, stock, tasks)]
    for arm in about:
        if arm not in pages:
            continue
        trainable = max(page["summary"]["trainable"] for page in chain.from_iterable(pages[arm].values()))
        values = {}
        for task, pages_of_task in pages[arm].items():
            values[task] = [page["summary"]["after"]["value"] for page in pages_of_task]
        lines.append(_score_line(arm, about[arm], trainable, values, tasks))
    return {"size": size_name(shots), "targets": list(tasks), "metrics": metrics, "lines": lines}


def _score_line(
    arm: str, about: str, trainable: int, values: Mapping[str, Sequence[float]], tasks: Sequence[str]
) -> dict[str, Any]:
    """A line of the table: scores by task, and their mean where it has all of them."""
    cells = {task: mean_and_sd(values[task]) for task in tasks if task in values}
    mean = statistics.fmean(score["mean"] for score in cells.values()) if len(cells) == len(tasks) else None
    return {"arm": arm, "about": about, "trainable": trainable, "scores": cells, "mean": mean}


def curves(results: Results) -> list[dict[str, Any]]:
    """The loss by step, mean over the seeds, of each arm on each task and size."""
    curves_of_tasks = []
    for (task, shots), results_of_task in results.items():
        if task == ALL_TARGETS:
            continue
        curves_of_arms: dict[str, list[Sequence[Mapping[str, Any]]]] = {}
        for result in results_of_task:
            if result.pages:
                curves_of_arms.setdefault(result.arm_run.arm, []).append(result.pages[0]["curve"])
        means = {arm: _mean_curve(curves_of_seeds) for arm, curves_of_seeds in curves_of_arms.items()}
        if means:
            curves_of_tasks.append({"target": task, "size": size_name(shots), "lines": means})
    return curves_of_tasks


def _mean_curve(curves_of_seeds: Sequence[Sequence[Mapping[str, Any]]]) -> list[tuple[int, float]]:
    """The mean loss by step, as far as all curves go."""
    points = []
    for steps in zip(*curves_of_seeds, strict=False):
        points.append((steps[0]["step"], statistics.fmean(step["loss"] for step in steps)))
    return points


def machine(results: Results) -> Mapping[str, Any]:
    """The machine of the first run; empty where there is none."""
    return next((page["machine"] for _, page in all_pages(results)), {})


def failures(results: Results) -> list[str]:
    """A line for each run that failed."""
    lines = []
    for (task, shots), results_of_task in results.items():
        for result in results_of_task:
            if not result.pages:
                lines.append(f"{task} {size_name(shots)}: {result.arm_run.name} failed and is left out")
    return lines


def score_table(
    size: Mapping[str, Any], title: str, extra_columns: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """The result of `scores` as a table of the page.

    Args:
        size: The result of `scores`.
        title: The title; the size is added to it.
        extra_columns: Columns behind the trained numbers, with the cell of each arm.
    """
    extra_columns = extra_columns or {}
    rows = []
    for line in size["lines"]:
        row = [line["arm"], line["about"], line["trainable"]]
        row += [cells.get(line["arm"]) for cells in extra_columns.values()]
        rows.append([*row, *map(line["scores"].get, size["targets"]), line["mean"]])
    tasks = [f"{task} ({size['metrics'].get(task, '')})" for task in size["targets"]]
    columns = ["arm", "what it is", "trained numbers", *extra_columns, *tasks, "mean"]
    return {"title": f"{title}, {size['size']}", "columns": columns, "rows": rows}


def rate_table(chosen_rates: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How each arm's rate was chosen, as a table of the page."""
    rows = []
    for choice in chosen_rates:
        rows.append([choice["arm"], choice["size"], f"{choice['rate']:g}", format_scores(choice["tried"])])
    columns = ["arm", "size", "rate", "validation scores by rate"]
    return {"title": "Rates chosen on validation rows", "columns": columns, "rows": rows}


def format_scores(scores: Mapping[str, float]) -> str:
    """Names with their scores, in one cell of a table."""
    return ", ".join(f"{name} {score:.3f}" for name, score in scores.items())
