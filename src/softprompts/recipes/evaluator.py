"""The evaluation of trained prompts on a task's rows by one frozen backbone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from softprompts.backbone import Backbone
from softprompts.config import EvaluationConfig, PromptConfig, TaskConfig
from softprompts.data import ExampleTokenizer, Row, Task, load_task, resolve_placement
from softprompts.errors import BackboneError
from softprompts.evaluation import evaluate, metrics
from softprompts.evaluation.evaluate import Evaluation
from softprompts.injection import Site
from softprompts.model import SoftPromptModel
from softprompts.model.setup import example_tokenizer
from softprompts.types import PromptInit

OnEval = Callable[[str, int, int], None]
"""Called with a title, the number of prompts that are evaluated, and the number of all."""


@dataclass(frozen=True)
class Evaluator:
    """A task and the frozen backbone that answers its rows, with prompts of `length` tokens at `site`."""

    backbone: Backbone
    site: Site
    length: int
    task: Task
    encoder: ExampleTokenizer
    config: EvaluationConfig

    def evaluate(self, prompt: Tensor | None, rows: Sequence[Row]) -> Evaluation:
        """Answer `rows` behind a prompt and score the answers.

        Args:
            prompt: The prompt [P, D]; None: the stock model answers.
            rows: Rows of the task.
        """
        model = SoftPromptModel(self.backbone)
        name = None
        if prompt is not None:
            name = self.task.name
            site = {"site": self.site.name, "mode": self.site.mode, "placement": self.site.placement}
            config = PromptConfig.model_validate({"num_virtual_tokens": self.length, **site})
            model.add_prompt(name, config, init=PromptInit(prompt))
        return evaluate.evaluate(model, rows, prompt=name, encoder=self.encoder, config=self.config)

    def scores(self, prompts: Sequence[Tensor], rows: Sequence[Row], title: str, on_eval: OnEval) -> list[float]:
        """The headline score of each of `prompts` [P, D] on `rows`."""
        scores: list[float] = []
        for prompt in prompts:
            scores.append(self.evaluate(prompt, rows).headline.value)
            on_eval(f"{title}, prompts", len(scores), len(prompts))
        return scores

    @property
    def metric(self) -> str:
        """The name of the headline score."""
        names = self.task.template.metrics or metrics.default_metrics(self.task.template.kind)
        return names[0]


def load_evaluator(
    backbone: Backbone, site: Site, length: int, config: TaskConfig, evaluation: EvaluationConfig
) -> Evaluator:
    """Load the rows of a task and prepare their evaluation.

    Args:
        backbone: The frozen language model.
        site: Where prompts enter.
        length: The number of prompt tokens.
        config: The task.
        evaluation: How rows are answered and answers scored.

    Raises:
        DataError: The rows cannot be read.
        BackboneError: The backbone has a classification head.
    """
    if backbone.head != "lm":
        raise BackboneError(
            f"prompts are evaluated by the words of a language model, and this model has head '{backbone.head}'"
        )
    task = load_task(config)
    site = replace(site, placement=resolve_placement(site.placement, [task.template]))
    encoder = example_tokenizer(backbone, task.template, length, place=site.placement)
    return Evaluator(backbone, site, length, task, encoder, evaluation)
