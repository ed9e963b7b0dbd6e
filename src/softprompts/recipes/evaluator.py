"""Prompts that are there, judged on a task's rows by one frozen backbone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from softprompts.backbone import Backbone
from softprompts.config import EvaluationConfig, PromptConfig, TaskConfig
from softprompts.data import ExampleTokenizer, Row, Task, load, place_of
from softprompts.errors import BackboneError
from softprompts.evaluation import evaluate, metrics
from softprompts.evaluation.evaluate import Evaluation
from softprompts.injection import Site
from softprompts.model import SoftPromptModel
from softprompts.model.setup import example_tokenizer
from softprompts.types import PromptInit

OnEval = Callable[[str, int, int], None]
"""Shown on the way: what is judged, how many prompts are done, of how many."""


@dataclass(frozen=True)
class Evaluator:
    """A task's rows beside the backbone, and how answers are judged; prompts are `length` tokens at `site`."""

    backbone: Backbone
    site: Site
    length: int
    task: Task
    encoder: ExampleTokenizer
    config: EvaluationConfig

    def evaluate(self, prompt: Tensor | None, rows: Sequence[Row]) -> Evaluation:
        """Answers to `rows` behind the prompt `[P, D]`, or by the stock model, with their scores."""
        model, name = SoftPromptModel(self.backbone), None
        if prompt is not None:
            name = self.task.name
            site = {"site": self.site.name, "mode": self.site.mode, "placement": self.site.place}
            config = PromptConfig.model_validate({"num_virtual_tokens": self.length, **site})
            model.add_prompt(name, config, init=PromptInit(prompt))
        return evaluate.evaluate(model, rows, prompt=name, encoder=self.encoder, config=self.config)

    def scores(self, prompts: Sequence[Tensor], rows: Sequence[Row], title: str, judged: OnEval) -> list[float]:
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


def load_evaluator(
    backbone: Backbone, site: Site, length: int, config: TaskConfig, evaluation: EvaluationConfig
) -> Evaluator:
    """The judge of a task, its rows loaded.

    Raises DataError for rows that cannot be read; BackboneError for a backbone with a classification head.
    """
    if backbone.head != "lm":
        raise BackboneError(f"prompts are judged by the words of a language model, not by head '{backbone.head}'")
    task = load(config)
    site = replace(site, place=place_of(site.place, [task.template]))
    encoder = example_tokenizer(backbone, task.template, length, place=site.place)
    return Evaluator(backbone, site, length, task, encoder, evaluation)
