"""Our side of the measurements: every call to softprompts is here."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import models
from benchmarks.workload import Row
from softprompts import backbone
from softprompts.backbone import loading
from softprompts.config import EvaluationConfig, PromptConfig
from softprompts.data import EncodedExample, ExampleTokenizer, TaskTemplate, collate
from softprompts.evaluation import evaluate
from softprompts.injection import Site
from softprompts.model import SoftPromptModel, setup
from softprompts.model.initialization import from_ids
from softprompts.training import objectives
from softprompts.training.shared_batch import training_step
from softprompts.types import Batch, PromptInit

RATE = 1e-3


class Ours:
    """softprompts with one prompt of `prompt` tokens; a `workload.Side`."""

    def __init__(self, model: str, dtype: str, device: str, prompt: int) -> None:
        loaded = _load(model, dtype, device)
        choice = setup.autotune(loaded)
        self.backbone, self.kernels = replace(loaded, kernels=choice.kernels), str(choice)
        self.prompt, self.loss, self.path = prompt, float("nan"), ""
        # PEFT puts the prompt of an encoder first, so here it comes first too.
        self.site = Site(placement="first" if models.kind(model) == "sequence" else "auto")
        self.objective = objectives.weigh({"task": 1.0})

    def start(self, ids: Sequence[int]) -> None:
        """See `workload.Side`."""
        values = from_ids(self.backbone, self.site, torch.tensor(ids)).to(self.backbone.device)
        place: Any = self.site.placement
        self.model = SoftPromptModel(self.backbone)
        config = PromptConfig(num_virtual_tokens=self.prompt, placement=place)
        self.model.add_prompt("benchmark", config, init=PromptInit(values))
        self.optimizer = torch.optim.AdamW(self.model.trainable().values(), lr=RATE)

    def prepare(self, rows: Sequence[Row]) -> Batch:
        """See `workload.Side`."""
        return collate([EncodedExample(row.ids, row.labels) for row in rows], 0).to(self.backbone.device)

    def step(self, batch: Batch) -> None:
        """See `workload.Side`."""
        self.optimizer.zero_grad()
        step = training_step(self.model, batch)
        loss = self.objective(step)
        loss.backward()
        self.optimizer.step()
        self.loss, self.path = float(loss.detach()), step.output.path

    def gradient(self) -> Tensor:
        """See `workload.Side`."""
        gradient = self.model.registry.method("benchmark").get_parameter("prompt").grad
        assert gradient is not None
        return gradient.float().cpu()

    def touch(self) -> None:
        """See `workload.Side`."""
        with torch.no_grad():
            self.backbone.model(input_ids=torch.ones(1, 1, dtype=torch.long, device=self.backbone.device))

    def score(self, texts: Sequence[str], labels: dict[str, list[int]], size: int) -> Tensor:
        """See `workload.Side`; the texts are encoded on the way, as a user's file is."""
        rows = [{"text": text} for text in texts]
        config = EvaluationConfig(by="rank", batch_size=size)
        answers = evaluate.answers(
            self.model, rows, prompt="benchmark", encoder=self._encoder(tuple(labels)), config=config
        )
        return torch.tensor([[answer.scores[label] for label in labels] for answer in answers])

    def candidates(self, answers: Sequence[str]) -> dict[str, list[int]]:
        """The tokens of each answer, as both sides score them."""
        return self._encoder(tuple(answers)).candidates()

    def _encoder(self, answers: tuple[str, ...]) -> ExampleTokenizer:
        form = TaskTemplate("benchmark", "{text}", verbalizer={answer: answer for answer in answers})
        room = (self.backbone.max_positions or 4096) - self.prompt
        return ExampleTokenizer(form, self.backbone.tokenizer, "causal", "lm", room)


def _load(model: str, dtype: str, device: str) -> Any:
    if models.is_random(model):
        tokenizer = models.tokenizer(model) if models.kind(model) == "causal" else None
        return backbone.wrap(models.randomly(model, dtype, device), tokenizer, model)
    return loading.load(model, path=models.path(model), dtype=dtype, device=device)
