"""What the training loop can train: prompts, the weights of a backbone, a method's features with a classifier."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from accelerate.utils.environment import get_cpu_distributed_information
from torch import Tensor, nn

from softprompts import injection
from softprompts.backbone import Backbone
from softprompts.config import TrainConfig
from softprompts.data.collation import collate
from softprompts.data.encoding import EncodedExample
from softprompts.data.sampling import evaluation_order
from softprompts.errors import ConfigError
from softprompts.injection import Site
from softprompts.methods import PromptMethod
from softprompts.model import SoftPromptModel
from softprompts.training import equivalence
from softprompts.training.backbone_weights import BackboneWeights
from softprompts.training.checkpoint import machine_line
from softprompts.training.distillation import TeacherOutputs
from softprompts.training.optimizer import param_group, prompt_param_groups
from softprompts.training.shared_batch import (
    SharedBatch,
    check_shared_batch,
    label_count,
    pad_token,
    prompt_batch,
)
from softprompts.types import Batch, Objective, Output, Prompt, Step, in_mode


@dataclass(frozen=True)
class RunBatch:
    """The examples of one run in one forward pass.

    Attributes:
        run: The name of the run.
        examples: The examples, at least one of which has a label.
        objective: The loss as a function of a `Step`.
        prompt_seed: The seed of the random stream from which the method draws.
        objective_seed: The seed of the random stream from which the objective draws.
        share: The share of these examples in the labels of the run's step.
    """

    run: str
    examples: Sequence[EncodedExample]
    objective: Objective
    prompt_seed: int = 0
    objective_seed: int = 1
    share: float = 1.0


@dataclass(frozen=True)
class Loss:
    """The loss of a `RunBatch`.

    Attributes:
        value: The mean loss over the labels [], with its graph.
        path: How the prompt was computed.
        measures: The single numbers that the method reports.
    """

    value: Tensor
    path: str = ""
    measures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainableState:
    """Facts for the progress report of a step.

    Attributes:
        machine: Device, dtype, threads and kernels in one line.
        rms_ratio: rms(P) / rms(E); None where no prompt is trained.
    """

    machine: str
    rms_ratio: float | None = None


class Trainable(Protocol):
    """What the loop trains: one run, or several runs that share every batch.

    Attributes:
        device: The device of the losses.
        dtype: The dtype of the losses.
        resumable: Whether the loop copies parameters and optimizer state after every step. It then writes checkpoints,
            and it undoes the last step where a loss is not finite. Whole models are too large for that.
    """

    device: torch.device
    dtype: torch.dtype
    resumable: bool

    def parameters(self, run: str) -> dict[str, nn.Parameter]:
        """The trained parameters of a run by name."""

    def param_groups(self, run: str, config: TrainConfig) -> list[dict[str, Any]]:
        """The parameters of a run as an optimizer's groups, which keep their full learning rate as `rate`."""

    def label_count(self, run: str, example: EncodedExample) -> int:
        """The number of labels of an example that its loss counts."""

    def loss(self, batches: Sequence[RunBatch]) -> list[Loss]:
        """The loss of each run on its batch, in training mode."""

    def state(self, run: str) -> TrainableState:
        """The facts for the progress report of a step that was just made."""

    def check(self, batch: RunBatch) -> str:
        """Compare a batch with the plainest way to compute it, and describe the difference.

        Raises:
            TrainingError: The two differ by more than rounding.
        """


class TrainablePrompts:
    """The prompts of one run, or of several runs that share every batch: prompts of one model.

    The rows of all runs go through the backbone in one pass. Every run has the prompts, batch and output that it would
    have alone.
    """

    resumable = True

    def __init__(
        self,
        model: SoftPromptModel,
        runs: Mapping[str, Sequence[str]],
        teachers: Mapping[str, TeacherOutputs] | None = None,
    ) -> None:
        """Check that the runs can share a batch.

        Args:
            model: The model with the prompts of all runs.
            runs: The prompts of each run by its name, in the order that the task numbers of its examples count.
            teachers: The teachers' outputs for the examples of the runs that have teachers.

        Raises:
            ConfigError: Two runs differ in their site, or one of several trains a classification head.
        """
        check_shared_batch(model, runs)
        self.model = model
        self.runs = {name: tuple(prompts) for name, prompts in runs.items()}
        self.teachers = dict(teachers or {})
        self.device = model.device
        self.dtype = loss_dtype(model.backbone)
        self._batch_rms: dict[str, float] = {}

    def parameters(self, run: str) -> dict[str, nn.Parameter]:
        """See `Trainable`: by the names that they would have in a model of this run alone."""
        return self.model.trainable(self._names_alone(run))

    def param_groups(self, run: str, config: TrainConfig) -> list[dict[str, Any]]:
        """See `Trainable`: the groups of each method of the run, in the order of their first prompts."""
        backbone, registry = self.model.backbone, self.model.registry
        prompts_of_methods: dict[type[PromptMethod], dict[str, str]] = {}
        for prompt, name_alone in self._names_alone(run).items():
            prompts_of_methods.setdefault(type(registry.method(prompt)), {})[prompt] = name_alone
        param_groups = []
        for prompts in prompts_of_methods.values():
            groups = registry.method(next(iter(prompts))).groups
            param_groups += prompt_param_groups(groups, self.model.trainable(prompts), config, backbone.embedding_rms)
        return param_groups

    def label_count(self, run: str, example: EncodedExample) -> int:
        """See `Trainable`."""
        site = self.model.registry.site_of(self.runs[run])
        return label_count(example, self.model.backbone, site)

    def loss(self, batches: Sequence[RunBatch]) -> list[Loss]:
        """See `Trainable`."""
        prompts = [self.runs[batch.run] for batch in batches]
        examples = [batch.examples for batch in batches]
        shared = SharedBatch.of(self.model, prompts, examples, [batch.prompt_seed for batch in batches])
        layers: set[int] = set()
        with_teacher = False
        for batch in batches:
            if batch.run in self.teachers:
                layers.update(self.teachers[batch.run].layer_numbers)
                with_teacher = True
        output = self.model.score(
            shared.batch, prompts=shared.prompt, return_logits=True if with_teacher else None, layers=sorted(layers)
        )
        losses = []
        for index, run_output in enumerate(shared.split(output)):
            batch = batches[index]
            step = self._step(batch, shared.batches[index], shared.prompts[index], run_output)
            torch.manual_seed(batch.objective_seed)
            value = batch.objective(step).to(self.dtype)
            measures = {name: float(number) for name, number in step.prompt.aux.items() if number.dim() == 0}
            losses.append(Loss(value, step.output.path, measures))
            prompt_rows = step.prompt.values.detach()[step.prompt.mask.bool()]
            self._batch_rms[batch.run] = float(prompt_rows.square().mean().sqrt())
        return losses

    def state(self, run: str) -> TrainableState:
        """See `Trainable`; where only a batch says how large the prompts are, those of the last batch count."""
        backbone = self.model.backbone
        rms_ratio = self.model.rms_ratio(self.runs[run])
        if rms_ratio is None:
            rms_ratio = self._batch_rms.get(run, 0.0) / backbone.embedding_rms
        return TrainableState(machine_line(backbone), rms_ratio)

    def check(self, batch: RunBatch) -> str:
        """See `Trainable`: the plainest way is the prompt in front of every row, through the stock kernels."""
        prompts = self.runs[batch.run]
        collated = prompt_batch(self.model, prompts, batch.examples)
        teacher = self.teachers.get(batch.run)
        targets = None if teacher is None else teacher.of(batch.examples, self.device)
        return equivalence.check(self.model, collated, batch.objective, targets, prompts)

    def _names_alone(self, run: str) -> dict[str, str]:
        """The prompts of a run with the names that they would have in a model of this run alone.

        A recipe calls the prompt of a task RUN/TASK where it trains several runs.
        """
        prompts, prefix = self.runs[run], f"{run}/"
        if run and all(prompt.startswith(prefix) for prompt in prompts):
            return {prompt: prompt.removeprefix(prefix) for prompt in prompts}
        return {prompt: prompt for prompt in prompts}

    def _step(self, batch: RunBatch, collated: Batch, prompt: Prompt, output: Output) -> Step:
        """What the objective of a run sees."""
        teacher = self.teachers.get(batch.run)
        if teacher is None:
            return Step(collated, prompt, output)
        # Other runs of the batch may ask for other layers.
        layers = {key: states for key, states in output.layer_states.items() if key in teacher.layers}
        targets = teacher.of(batch.examples, self.device)
        return Step(collated, prompt, replace(output, layer_states=layers), targets)


class TrainableWeights:
    """The weights of a copy of the backbone, or LoRA's updates of them, without a prompt.

    The copy stays in eval mode: nothing is dropped out, so one seed gives the same numbers to the bit on one machine.
    It writes no checkpoints. One process trains it.
    """

    resumable = False

    def __init__(self, weights: BackboneWeights, target: str = "backbone") -> None:
        """Refuse several processes.

        Args:
            weights: The copy of the backbone and its trained weights.
            target: What is trained, for the message: backbone or lora.

        Raises:
            ConfigError: A launcher started several processes.
        """
        if get_cpu_distributed_information().world_size > 1:
            raise ConfigError(
                f"target: {target} runs in one process; start it without a launcher, and accumulate batches "
                f"(training.gradient_accumulation_steps) where memory is short"
            )
        self.weights = weights
        self.backbone = weights.backbone
        self.device = self.backbone.device
        self.dtype = loss_dtype(self.backbone)

    def parameters(self, run: str) -> dict[str, nn.Parameter]:
        """See `Trainable`: by their names in the copy."""
        return self.weights.trained

    def param_groups(self, run: str, config: TrainConfig) -> list[dict[str, Any]]:
        """See `Trainable`: a group for the weights and, where there is one, a group for the head."""
        head: list[nn.Parameter] = []
        body: list[nn.Parameter] = []
        for name, parameter in self.weights.trained.items():
            group = head if name.split(".")[0] in self.weights.heads else body
            group.append(parameter)
        rates = [(body, config.learning_rate), (head, config.head_learning_rate)]
        return [param_group(group, rate, config.weight_decay) for group, rate in rates if group]

    def label_count(self, run: str, example: EncodedExample) -> int:
        """See `Trainable`."""
        return label_count(example, self.backbone, None)

    def loss(self, batches: Sequence[RunBatch]) -> list[Loss]:
        """See `Trainable`."""
        (batch,) = batches
        collated = collate(batch.examples, pad_token(self.backbone)).to(self.device)
        # The loss of large vocabularies is computed in chunks, which give the head's weights no gradient.
        output = injection.score(self.backbone, collated, None, Site(), return_logits=True)
        index = torch.zeros_like(collated.task_ids)
        values = torch.zeros(1, 0, self.backbone.embedding_size, device=self.device)
        no_prompt = Prompt(values, torch.ones(1, 0, dtype=torch.bool, device=self.device), index)
        torch.manual_seed(batch.objective_seed)
        value = batch.objective(Step(collated, no_prompt, output))
        return [Loss(value, output.path)]

    def state(self, run: str) -> TrainableState:
        """See `Trainable`."""
        return TrainableState(machine_line(self.backbone))

    def check(self, batch: RunBatch) -> str:
        """See `Trainable`: without a prompt there is only one way."""
        return ""


class TrainableClassifier:
    """A linear classifier on a method's features of a text, and the parts of the method that make them.

    Jiang et al. 2022 pretrain IPT's table and encoder this way. The backbone only embeds tokens. The labels of the
    examples are class numbers.
    """

    resumable = True

    def __init__(self, model: SoftPromptModel, prompt: str, classes: int, example: EncodedExample, seed: int) -> None:
        """Make a classifier for the features of a prompt's method.

        Args:
            model: The model.
            prompt: The prompt, whose method has `features` and names the `pretrained` parts of itself.
            classes: The number of classes.
            example: Any example; it shows how wide the features are.
            seed: The seed of the classifier's start.
        """
        self.model = model
        self.prompt = prompt
        self.method = model.registry.method(prompt)
        self.device = model.device
        self.dtype = loss_dtype(model.backbone)
        torch.manual_seed(seed)
        with torch.no_grad():
            width = self._features([example]).shape[1]
        self.head = nn.Linear(width, classes).to(self.device)

    def method_parameters(self) -> dict[str, nn.Parameter]:
        """The pretrained parameters of the method by their names in it."""
        pretrained = {}
        for name, parameter in self.model.trainable((self.prompt,)).items():
            part, _, tensor = name.split(".", 2)
            if part == "prompts" and tensor.startswith(self.method.pretrained):
                pretrained[tensor] = parameter
        return pretrained

    def parameters(self, run: str) -> dict[str, nn.Parameter]:
        """See `Trainable`: `prompts.method.*` and, of the classifier, `heads.classifier.*`."""
        parameters = {f"prompts.method.{name}": parameter for name, parameter in self.method_parameters().items()}
        for name, parameter in self.head.named_parameters():
            parameters[f"heads.classifier.{name}"] = parameter
        return parameters

    def param_groups(self, run: str, config: TrainConfig) -> list[dict[str, Any]]:
        """See `Trainable`."""
        return prompt_param_groups(self.method.groups, self.parameters(run), config, self.model.backbone.embedding_rms)

    def label_count(self, run: str, example: EncodedExample) -> int:
        """See `Trainable`: every text has one class."""
        return 1

    def loss(self, batches: Sequence[RunBatch]) -> list[Loss]:
        """See `Trainable`: the cross-entropy of the classes."""
        (batch,) = batches
        torch.manual_seed(batch.prompt_seed)
        with in_mode(self.method, True):
            logits = self.logits(batch.examples)
        labels = torch.tensor([example.labels for example in batch.examples], device=self.device)
        return [Loss(nn.functional.cross_entropy(logits, labels))]

    def state(self, run: str) -> TrainableState:
        """See `Trainable`."""
        return TrainableState(machine_line(self.model.backbone))

    def check(self, batch: RunBatch) -> str:
        """See `Trainable`: no prompt is computed, so there is only one way."""
        return ""

    def logits(self, examples: Sequence[EncodedExample]) -> Tensor:
        """The scores [B, C] of the classes of B texts."""
        logits: Tensor = self.head(self._features(examples))
        return logits

    def predict(self, examples: Sequence[EncodedExample], batch_size: int) -> list[int]:
        """The number of the class with the highest score, for each text."""
        answers = [0] * len(examples)
        with torch.no_grad(), in_mode(self.method, False):
            for indices in evaluation_order([len(example.input_ids) for example in examples], batch_size):
                best = self.logits([examples[index] for index in indices]).argmax(1).tolist()
                for index, answer in zip(indices, best, strict=True):
                    answers[index] = answer
        return answers

    def _features(self, examples: Sequence[EncodedExample]) -> Tensor:
        # The classes are no labels of the language model, so the method may read the whole text.
        batch = replace(prompt_batch(self.model, (self.prompt,), examples), labels=None)
        return self.method.features(self.model.context(batch))


def loss_dtype(backbone: Backbone) -> torch.dtype:
    """The dtype of losses: the backbone's, and float32 where that is less precise."""
    return torch.promote_types(backbone.dtype, torch.float32)
