"""Prompts that are there, judged on a task's rows by one frozen backbone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from softprompts import injection
from softprompts.backbone import Backbone
from softprompts.config import EvaluateConfig, TaskConfig
from softprompts.data import ExampleTokenizer, Row, Task, load, place_of
from softprompts.errors import BackboneError
from softprompts.evaluation import evaluate, metrics
from softprompts.evaluation.evaluate import Evaluation
from softprompts.injection import Site
from softprompts.methods import build
from softprompts.model.learner import Learner
from softprompts.recipes.run.prepare import encoder_for
from softprompts.types import PromptInit

Judged = Callable[[str, int, int], None]
"""Shown on the way: what is judged, how many prompts are done, of how many."""


@dataclass(frozen=True)
class Evaluator:
    """A task's rows beside the backbone, and how answers are judged; prompts are `length` tokens at `site`."""

    backbone: Backbone
    site: Site
    length: int
    task: Task
    encoder: ExampleTokenizer
    config: EvaluateConfig

    def evaluate(self, prompt: Tensor | None, rows: Sequence[Row]) -> Evaluation:
        """Answers to `rows` behind the prompt `[P, D]`, or by the stock model, with their scores."""
        slot = injection.prompt_spec(self.backbone, self.site, (self.task.name,), self.length)
        method = None
        if prompt is not None:
            method = build("prompt-tuning", {}, slot, PromptInit(prompt)).to(self.backbone.device).requires_grad_(False)
        return evaluate.evaluate(Learner(self.backbone, self.site, slot, method), self.encoder, rows, self.config)

    def scores(self, prompts: Sequence[Tensor], rows: Sequence[Row], title: str, judged: Judged) -> list[float]:
        """The headline score of each of `prompts` on `rows`."""
        found = []
        for prompt in prompts:
            found.append(self.evaluate(prompt, rows).headline.value)
            judged(f"{title}, prompts", len(found), len(prompts))
        return found

    @property
    def metric(self) -> str:
        """The name of the headline score."""
        names = self.task.template.metrics or metrics.default_metrics(self.task.template.kind)
        return names[0]


def judge(backbone: Backbone, site: Site, length: int, config: TaskConfig, evaluation: EvaluateConfig) -> Evaluator:
    """The judge of a task, its rows loaded.

    Raises DataError for rows that cannot be read; BackboneError for a backbone with a classification head.
    """
    if backbone.head != "lm":
        raise BackboneError(f"prompts are judged by the words of a language model, not by head '{backbone.head}'")
    task = load(config)
    site = replace(site, place=place_of(site.place, [task.template]))
    encoder = encoder_for(backbone, task.template, length, place=site.place)
    return Evaluator(backbone, site, length, task, encoder, evaluation)
