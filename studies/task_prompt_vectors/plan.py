"""The configuration of the study: tasks, starts, pairs, unseen targets."""

from itertools import chain, combinations
from typing import Annotated, Any

from pydantic import Field, model_validator

from softprompts import assets
from softprompts.config import EvaluationConfig, InitConfig, ModelConfig, PromptConfig, Section, TaskConfig, TrainConfig
from softprompts.config.schema import Count, Seed
from softprompts.recipes.comparison import Rate, check_known
from softprompts.recipes.multitask import Plan
from softprompts.recipes.multitask.plan import SourceStage, TargetStage

FEW_ARMS = ("random", "prompt-tuning", "spot-first", "spot-second", "spot-mixture", "attempt", "mpt", "vectors")


class VectorStage(Section):
    """The vectors: each task from each start, where all starts of a task train on the same batches."""

    training: TrainConfig = TrainConfig(max_steps=150, batch_size=8, warmup_steps=15)
    """How the prompts are trained."""

    starts: tuple[InitConfig, ...] = Field(
        default=(*(InitConfig(seed=seed) for seed in range(3)), InitConfig(kind="random", seed=3)), min_length=2
    )
    """The starts."""

    learning_rates: tuple[Rate, ...] = Field(default=(0.03, 0.1, 0.3), min_length=1)
    """Learning rates that are tried; the best on validation rows is taken for all."""

    tune_on: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Tasks on which the learning rate is chosen; null: all."""

    seed: Seed = 0
    """Seed of the order of rows, the same for all."""


class SumStage(Section):
    """Sums of two vectors from the same start: evaluated by themselves, and trained with few rows."""

    pairs: tuple[tuple[str, str], ...] | None = None
    """The pairs of tasks; null: all."""

    starts: Count = 3
    """From how many starts; also the number of seeds of the training with few rows."""

    coefficients: tuple[Annotated[float, Field(allow_inf_nan=False)], ...] = Field(
        default=tuple(round(0.1 * n, 1) for n in range(11)), min_length=1
    )
    """Coefficients of the sum that are tried on validation rows."""

    few: TrainConfig | None = TrainConfig(max_steps=32, batch_size=8, warmup_steps=3)
    """How sums are trained with few rows; null: they are not."""

    shots: Count = 16
    """Rows of each class."""


class Unseen(Section):
    """A task that no vector was trained on."""

    target: TaskConfig
    """The task."""

    sources: tuple[str, ...] = Field(min_length=1)
    """The tasks whose vectors help it."""


class FewStage(Section):
    """Few rows of unseen targets, by the recipe of multitask prompt tuning."""

    targets: tuple[Unseen, ...] = Field(min_length=1)
    """The unseen targets."""

    source: SourceStage = SourceStage(variants=("mpt", "mixture"))
    """The shared prompts."""

    target: TargetStage = TargetStage(shots=(0, 10, 50, 100, 500), shots_per="set", arms=FEW_ARMS)
    """The arms on the targets."""


class Study(Section):
    """The whole study. A question without its section is left out."""

    model: ModelConfig = ModelConfig()
    """The frozen backbone."""

    prompt: PromptConfig = PromptConfig()
    """Length and site of the prompts."""

    tasks: tuple[TaskConfig, ...] = Field(min_length=1)
    """The tasks."""

    groups: dict[str, tuple[str, ...]] = Field(default={})
    """Tasks that are related, by what they have in common."""

    vectors: VectorStage = VectorStage()
    """The vectors of the tasks."""

    sums: SumStage | None = SumStage()
    """Sums of two vectors; null: none."""

    few: FewStage | None = None
    """Few rows of unseen targets; null: none."""

    evaluation: EvaluationConfig = EvaluationConfig()
    """How rows are answered and answers scored."""

    output_dir: str = "runs/vectors"
    """The directory of all stages, results.json and report.html."""

    @property
    def titles(self) -> list[str]:
        """The names of the tasks."""
        return [task.title for task in self.tasks]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The pairs of tasks whose vectors are added."""
        if self.sums is None:
            return []
        return list(self.sums.pairs or combinations(self.titles, 2))

    def related(self, pair: tuple[str, str]) -> bool:
        """Whether two tasks are in one group."""
        return any(set(pair) <= set(group) for group in self.groups.values())

    @model_validator(mode="after")
    def _names(self) -> "Study":
        titles = self.titles
        if len(set(titles)) != len(titles):
            raise ValueError(f"task names must differ, given {', '.join(titles)}; set the name of one")
        if self.model.head != "lm":
            raise ValueError(f"vectors of several tasks need a language model's head, not '{self.model.head}'")
        for key in ("method", "options", "init"):
            if getattr(self.prompt, key) != getattr(PromptConfig(), key):
                raise ValueError(f"prompt.{key} is set by the study itself; leave it out (see vectors.starts)")
        check_known("vectors.tune_on", self.vectors.tune_on or (), titles)
        check_known("groups", chain.from_iterable(self.groups.values()), titles)
        self._check_starts()
        if self.sums is not None:
            if self.sums.starts > len(self.vectors.starts):
                raise ValueError(f"sums.starts is {self.sums.starts}, and there are {len(self.vectors.starts)} starts")
            for pair in self.sums.pairs or ():
                check_known("sums.pairs", pair, titles)
                if pair[0] == pair[1]:
                    raise ValueError(f"sums.pairs: {pair[0]} is paired with itself; a pair has two tasks")
            if len({frozenset(pair) for pair in self.pairs}) != len(self.pairs):
                raise ValueError("sums.pairs: a pair of tasks is listed twice; the order of the two does not count")
        self._check_unseen()
        return self

    def _check_starts(self) -> None:
        """Raise ValueError for equal starts, and for a start that two tasks would not share."""
        seen: list[dict[str, Any]] = []
        for index, init in enumerate(self.vectors.starts):
            drawn = init.kind in ("vocabulary", "random", "labels")
            seed = (self.vectors.seed if init.seed is None else init.seed) if drawn else None
            settings = {**init.model_dump(mode="json"), "seed": seed}
            if settings in seen:
                advice = f"give them seeds, such as {{kind: {init.kind}, seed: {index}}}" if drawn else "leave one out"
                raise ValueError(
                    f"vectors.starts: number {index + 1} is number {seen.index(settings) + 1} again, so a vector would "
                    f"be put on its own start; {advice}"
                )
            if init.kind == "labels" and not init.labels and self.sums is not None:
                raise ValueError(
                    "vectors.starts: kind labels takes each task's own words, so two tasks would not begin at the same "
                    "start; name the words in labels, or leave the sums out (sums: null)"
                )
            seen.append(settings)

    def _check_unseen(self) -> None:
        """Raise ValueError for a target whose rows a vector was trained on, or that is listed twice."""
        targets = self.few.targets if self.few else ()
        if len({unseen.target.title for unseen in targets}) != len(targets):
            raise ValueError("few.targets: target names must differ; set the name of one")
        titles_by_rows = {_rows_key(task): task.title for task in self.tasks}
        for unseen in targets:
            title = unseen.target.title
            check_known(f"few.targets, sources of {title}", unseen.sources, self.titles)
            known = title if title in self.titles else titles_by_rows.get(_rows_key(unseen.target))
            if known is not None:
                raise ValueError(f"few.targets: {title} is among the tasks, as {known}, so it is not unseen")
            self.few_plan(unseen)

    def few_plan(self, unseen: Unseen) -> Plan:
        """The recipe of an unseen target: its sources' vectors from the first start are the teachers."""
        assert self.few is not None
        tasks = {task.title: task for task in self.tasks}
        return Plan(
            model=self.model,
            prompt=self.prompt,
            sources=tuple(tasks[name] for name in unseen.sources),
            targets=(unseen.target,),
            teachers={"trained": {name: prompt_path(self, name, 0) for name in unseen.sources}},  # type: ignore[arg-type]
            source=self.few.source,
            target=self.few.target,
            evaluation=self.evaluation,
            output_dir=f"{self.output_dir}/few/{unseen.target.title}",
        )


def _rows_key(task: TaskConfig) -> Any:
    """A key that is equal for tasks with the same rows, such as trec and trec-fine."""
    asset = assets.ASSETS.get(task.source)
    return task.source if asset is None else (asset.package.name, asset.files)


def prompt_path(study: Study, task: str, start: int) -> str:
    """The directory of the prompt of a task that was trained from a start."""
    return f"{study.output_dir}/vectors/{task}/start{start}/prompt"
