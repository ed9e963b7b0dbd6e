"""Weights instead of a prompt: all of the backbone's, or LoRA's updates of them, as the upper lines of a comparison.

This is the one exception to the frozen backbone, and the backbone itself stays as it was: what is trained is a copy of
it, in float32, without a prompt. The copy runs with the stock model's own modules, as the kernels that prompts are
trained with know no gradients of weights.

LoRA: Hu et al. 2021, https://arxiv.org/abs/2106.09685, by the package `peft`, which is imported here alone.
"""

import copy
import math
import secrets
import shutil
import time
import warnings
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.environment import get_cpu_distributed_information
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from softprompts.backbone import Backbone, freeze
from softprompts.backbone.kernels import Kernels
from softprompts.config import LoraConfig, TrainConfig, closest
from softprompts.data import EncodedExample, ExampleBatches, collate
from softprompts.errors import BackboneError, ConfigError, TrainingError
from softprompts.model import SoftPromptModel
from softprompts.training import objectives
from softprompts.training.checkpoint import Progress, machine_line
from softprompts.training.optimizer import set_rates
from softprompts.training.shared_batch import label_count
from softprompts.types import Batch, Objective, Output, Prompt, Step

MARKS = {"lora": "adapter_config.json", "model": "config.json"}
"""The folders that a run keeps weights in, and the file by which each is known as one."""

KINDS = {"sequence": "SEQ_CLS", "token": "TOKEN_CLS", "span": "QUESTION_ANS"}
"""What PEFT calls the heads."""


@dataclass(frozen=True)
class Weights:
    """A copy of a backbone whose weights are trained, read without a prompt.

    model: the copy, run with the stock model's own modules; trained: the parameters that are trained, by their names
    in the copy; heads: its modules that make up a classification head; adapter: PEFT's model around it, for LoRA.
    """

    model: SoftPromptModel
    trained: dict[str, nn.Parameter]
    heads: tuple[str, ...] = ()
    adapter: Any = None

    @property
    def count(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.trained.values())

    def judged_with(self, kernels: Kernels) -> SoftPromptModel:
        """The same weights to be judged with `kernels`, which are faster and equal up to rounding."""
        return SoftPromptModel(replace(self.model.backbone, kernels=kernels, facts={}))


def check_installed(config: TrainConfig) -> None:
    """Raise ConfigError where `config` asks for LoRA and PEFT is not here."""
    if config.target == "lora":
        _peft()


def copied(backbone: Backbone, config: TrainConfig, seed: int = 0) -> Weights:
    """A copy of `backbone`, in float32 (float64 where it is), that `fit` can train as `config.train` says.

    seed: of the start of LoRA's matrices; at the start the copy answers as the backbone does.
    Raises BackboneError for a backbone whose weights cannot be trained, ConfigError for targets that it does not have
    and where PEFT is missing.
    """
    check_installed(config)
    check_trainable(backbone)
    model = copy.deepcopy(backbone.model)
    model.to(torch.promote_types(backbone.dtype, torch.float32))  # type: ignore[arg-type]
    plain = Kernels(path="shared", gradient_checkpointing=backbone.kernels.gradient_checkpointing)
    own = replace(backbone, model=model, kernels=plain, facts={})
    heads = tuple(dict.fromkeys(name.split(".")[0] for name in own.head_names))
    adapter = None
    if config.target == "lora":
        adapter = _with_lora(own, config.lora, heads, seed)
    else:
        model.requires_grad_(True)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    freeze(model)
    return Weights(SoftPromptModel(own), trained, heads, adapter)


def fit(
    weights: Weights,
    rows: Sequence[EncodedExample],
    config: TrainConfig,
    *,
    pad: int,
    seed: int = 0,
    validate: Callable[[], float] | None = None,
) -> Generator[Progress, None, None]:
    """Train the weights in place on `rows`, one Report a step; afterwards they are the best ones, and frozen again.

    Rows, batches and schedule of each step are those that a prompt would have. The model stays in eval mode: nothing
    is dropped out, so that the same seed gives the same numbers to the bit on one machine. validate: a score (higher is
    better), asked every `config.evaluate_every` steps, that chooses the best weights and stops early. Nothing is
    written.
    Raises TrainingError when the loss stops being a number, and where a batch holds no label; ConfigError when there
    is nothing to train on, and where a launcher started several processes.
    """
    _check_ready(rows, config)
    batches = ExampleBatches(rows, config.batch_size, seed, config.batch_tokens)
    objective, optimizer = objectives.weigh(config.objectives), _optimizer(weights, config)
    best = _Best()
    try:
        for parameter in weights.trained.values():
            parameter.requires_grad_(True)
        for step in range(config.max_steps):
            began = time.perf_counter()
            parts = [
                batches.at(step * config.gradient_accumulation_steps + i)
                for i in range(config.gradient_accumulation_steps)
            ]
            loss, path = _gradients(weights, parts, objective, pad)
            rate = _update(weights, optimizer, config, step, loss)
            score = None
            if validate is not None and config.eval_steps and (step + 1) % config.eval_steps == 0:
                score = validate()
                best = best.after(step + 1, score, weights)
            tokens = sum(len(row.input_ids) for part in parts for row in part)
            machine = machine_line(weights.model.backbone) if step == 0 else ""
            spent = time.perf_counter() - began
            yield Progress(
                step + 1, config.max_steps, loss, rate, None, tokens, spent, score=score, path=path, machine=machine
            )
            if best.patience_spent(step + 1, config):
                break
    finally:
        optimizer.zero_grad(set_to_none=True)
        freeze(weights.model.backbone.model)
    best.put_back(weights)


def kept_at(config: TrainConfig, out: str | Path) -> Path | None:
    """Where a run with `config` keeps its weights: `out/lora`, or `out/model` where asked for; else None.

    Raises ConfigError where something else bears that name.
    """
    name = "lora" if config.target == "lora" else "model" if config.save_model else None
    if name is None:
        return None
    place = Path(out) / name
    if place.exists() and not (place / MARKS[name]).is_file():
        raise ConfigError(f"{place} is there and is none of ours; choose another directory with --out, or move it away")
    return place


def save(weights: Weights, directory: str | Path) -> None:
    """Write LoRA's adapter as PEFT does, or else the whole model with its tokenizer, into `directory`.

    It is written under another name and renamed when complete; an older one in its place is removed.
    """
    target, backbone = Path(directory), weights.model.backbone
    fresh = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        if weights.adapter is not None:
            weights.adapter.save_pretrained(fresh, save_embedding_layers=False)
        else:
            backbone.model.save_pretrained(fresh)
            if backbone.tokenizer is not None:
                backbone.tokenizer.save_pretrained(fresh)
        shutil.rmtree(target, ignore_errors=True)
        fresh.rename(target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


@dataclass(frozen=True)
class _Best:
    """The best validation score so far, its step and the weights then, by name."""

    step: int = 0
    score: float | None = None
    tensors: dict[str, Tensor] | None = None

    def after(self, step: int, score: float, weights: Weights) -> "_Best":
        if self.score is not None and not score > self.score:
            return self
        return _Best(step, score, {name: value.detach().clone() for name, value in weights.trained.items()})

    def patience_spent(self, step: int, config: TrainConfig) -> bool:
        if config.early_stopping_patience is None or config.eval_steps is None or self.score is None:
            return False
        return step - self.step >= config.early_stopping_patience * config.eval_steps

    def put_back(self, weights: Weights) -> None:
        with torch.no_grad():
            for name, value in (self.tensors or {}).items():
                weights.trained[name].copy_(value)


def _peft() -> Any:
    """The package, where it is here."""
    try:
        import peft
    except ImportError:
        raise ConfigError(
            "target: lora needs the package peft; install it with `pip install 'softprompts[lora]'`, or train the "
            "whole backbone (training.target: backbone)"
        ) from None
    return peft


def check_trainable(backbone: Backbone) -> None:
    """Raise BackboneError for a backbone whose weights cannot be trained."""
    name, attention = backbone.name or type(backbone.model).__name__, str(backbone.model.config._attn_implementation)
    if backbone.quantization:
        raise BackboneError(
            f"{name} is quantized ({backbone.quantization}), and rounded weights cannot be trained; load it without, "
            f"or train a prompt"
        )
    places = getattr(backbone.model, "hf_device_map", None) or {}
    if len(set(places.values())) > 1 or any(hasattr(part, "_hf_hook") for part in backbone.model.modules()):
        raise BackboneError(
            f"{name} is spread over devices (device_map), and its weights are trained on one; load it with a device"
        )
    if "flash" in attention:
        raise BackboneError(
            f"attention '{attention}' reads half precision alone, and weights are trained in float32; use sdpa, or "
            f"leave model.attention out"
        )


def _check_ready(rows: Sequence[EncodedExample], config: TrainConfig) -> None:
    """Raise ConfigError where there is nothing to train on, or several processes would."""
    if not rows:
        raise ConfigError("there are no rows to train on; check the task's source and split")
    if get_cpu_distributed_information().world_size > 1:
        raise ConfigError(
            f"target: {config.target} runs in one process; start it without a launcher, and accumulate batches "
            f"(training.gradient_accumulation_steps) where memory is short"
        )


def _with_lora(backbone: Backbone, config: LoraConfig, heads: Sequence[str], seed: int) -> Any:
    """PEFT's model around the backbone's, in whose layers LoRA's matrices now are."""
    peft, model = _peft(), backbone.model
    usual = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    targets: Any = list(config.targets) if isinstance(config.targets, tuple) else config.targets
    if targets is None and model.config.model_type not in usual:
        targets = "all-linear"
    options = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=targets,
        # Conv1D stores its weight the other way round, and PEFT wants to be told.
        fan_in_fan_out=any(type(part) is Conv1D for part in model.modules()),
        modules_to_save=list(heads) or None,
        task_type=KINDS.get(
            backbone.head, {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}.get(backbone.family.name)
        ),
        revision=backbone.revision,
    )
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            # PEFT asks for a name that transformers is about to drop.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            torch.manual_seed(seed)
            adapter = peft.get_peft_model(model, options)
    except ValueError as error:
        raise _wrong_targets(model, config, error) from None
    adapter.peft_config["default"].base_model_name_or_path = backbone.name
    return adapter


def _wrong_targets(model: nn.Module, config: LoraConfig, error: ValueError) -> ConfigError:
    linear = [name for name, part in model.named_modules() if type(part) in (nn.Linear, Conv1D)]
    names = list(dict.fromkeys(name.rpartition(".")[2] for name in linear))
    given = config.targets or ()
    text = given if isinstance(given, str) else ", ".join(given)
    wrong = [name for name in given if name not in names] if not isinstance(given, str) else [given]
    if not wrong:
        return ConfigError(f"training.lora: {' '.join(str(error).split())}")
    return ConfigError(
        f"training.lora.targets: {text} cannot be updated in {type(model).__name__}{closest(wrong[0], names)} "
        f"possible: {', '.join(names)}, all-linear"
    )


def _optimizer(weights: Weights, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with a group for the weights and, where there is one, a group for the head."""
    groups: list[dict[str, Any]] = []
    for of_head, rate in ((False, config.learning_rate), (True, config.head_learning_rate)):
        chosen = [value for name, value in weights.trained.items() if (name.split(".")[0] in weights.heads) == of_head]
        if chosen:
            groups.append({"params": chosen, "lr": rate, "rate": rate})
    return torch.optim.AdamW(groups, weight_decay=config.weight_decay)


def _gradients(
    weights: Weights, parts: Sequence[Sequence[EncodedExample]], objective: Objective, pad: int
) -> tuple[float, str]:
    """Fill the gradients of the mean loss over all labels of `parts`, and give that loss and how it was computed.

    Each part counts with its share of the labels, so accumulation equals one large batch.
    """
    model, loss, path = weights.model, 0.0, ""
    counts = [sum(label_count(row, model.backbone, None) for row in part) for part in parts]
    if not sum(counts):
        raise TrainingError("a batch holds no label to learn from; check the template and the label column")
    for part, count in zip(parts, counts, strict=True):
        if count:
            made = _step(model, collate(part, pad).to(model.device))
            value = objective(made) * (count / sum(counts))
            value.backward()
            loss, path = loss + float(value.detach()), made.output.path
    return loss, path


def _step(model: SoftPromptModel, batch: Batch) -> Step:
    """What the objective looks at; no prompt is one of no tokens."""

    def run(prompt: Prompt | None) -> Output:
        # Labels' scores made in parts, as large vocabularies have them, give the head's weights no gradient.
        with model.no_prompt():
            return model.score(batch, logits=True)

    row = torch.zeros_like(batch.task_ids)
    values = torch.zeros(1, 0, model.backbone.embedding_size, device=row.device)
    none = Prompt(values, torch.ones(1, 0, dtype=torch.bool, device=row.device), row)
    return Step(batch, none, run(None), run)


def _update(weights: Weights, optimizer: torch.optim.AdamW, config: TrainConfig, step: int, loss: float) -> float:
    """Make the optimizer's step number `step`, counted from 0, and give its rate.

    Raises TrainingError where loss or gradient are not numbers.
    """
    norm = float(nn.utils.clip_grad_norm_(list(weights.trained.values()), config.max_grad_norm or math.inf))
    if not math.isfinite(loss + norm):
        raise TrainingError(
            f"the loss of step {step + 1} is not a number, and nothing was written. Try a lower rate "
            f"(training.learning_rate was {config.learning_rate:g} {config.learning_rate_unit}) or gradient clipping "
            "(training.max_grad_norm)"
        )
    rate = set_rates(optimizer, config, step)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return rate
