"""A copy of a backbone whose weights are trained: all of them, or LoRA's updates. It is the upper line of a comparison.

The backbone itself stays frozen and as it was. The copy is in float32, has no prompt, and runs with the stock model's
own modules, because the kernels for prompts give weights no gradient.

LoRA: Hu et al. 2021, https://arxiv.org/abs/2106.09685, by the package `peft`, which only this module imports.
"""

import copy
import secrets
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from softprompts.backbone import Backbone, freeze
from softprompts.backbone.kernels import Kernels
from softprompts.config import LoraConfig, TrainConfig, closest
from softprompts.errors import BackboneError, ConfigError

MARKERS = {"lora": "adapter_config.json", "model": "config.json"}
"""The folders in which a run keeps weights, and the file that marks each."""

TASK_TYPES = {
    "sequence": "SEQ_CLS",
    "token": "TOKEN_CLS",
    "span": "QUESTION_ANS",
    "causal": "CAUSAL_LM",
    "seq2seq": "SEQ_2_SEQ_LM",
}
"""PEFT's names of heads and of families."""


@dataclass(frozen=True)
class BackboneWeights:
    """A copy of a backbone, and its trained weights.

    Attributes:
        backbone: The copy, with the stock model's own modules.
        trained: The trained parameters by their names in the copy.
        heads: The modules of the copy that make up a classification head.
        adapter: PEFT's model around the copy, for LoRA.
    """

    backbone: Backbone
    trained: dict[str, nn.Parameter]
    heads: tuple[str, ...] = ()
    adapter: Any = None

    @property
    def count(self) -> int:
        """The number of trained numbers."""
        return sum(map(torch.numel, self.trained.values()))

    def with_kernels(self, kernels: Kernels) -> Backbone:
        """The same weights with faster kernels for evaluation, which are equal up to rounding."""
        return replace(self.backbone, kernels=kernels, facts={})


def check_installed(config: TrainConfig) -> None:
    """Raise ConfigError where `config` asks for LoRA and PEFT is not installed."""
    if config.target == "lora":
        _import_peft()


def check_trainable(backbone: Backbone) -> None:
    """Raise BackboneError for a backbone whose weights cannot be trained."""
    name = backbone.name or type(backbone.model).__name__
    attention = str(backbone.model.config._attn_implementation)
    if backbone.quantization:
        raise BackboneError(
            f"{name} is quantized ({backbone.quantization}), and rounded weights cannot be trained; load it without, "
            f"or train a prompt"
        )
    device_map = getattr(backbone.model, "hf_device_map", None) or {}
    if len(set(device_map.values())) > 1 or any(hasattr(module, "_hf_hook") for module in backbone.model.modules()):
        raise BackboneError(
            f"{name} is spread over devices (device_map), and its weights are trained on one; load it with a device"
        )
    if "flash" in attention:
        raise BackboneError(
            f"attention '{attention}' supports half precision only, and weights are trained in float32; use sdpa, or "
            f"leave model.attention out"
        )


def copy_backbone(backbone: Backbone, config: TrainConfig, seed: int = 0) -> BackboneWeights:
    """Copy a backbone so that its weights, or LoRA's updates of them, can be trained.

    Args:
        backbone: The backbone, which stays as it is.
        config: What to train: `backbone` or `lora`.
        seed: The seed of LoRA's matrices.

    Returns:
        The copy in float32 (float64 where the backbone is), which answers as the backbone does.

    Raises:
        BackboneError: The weights of the backbone cannot be trained.
        ConfigError: LoRA's targets do not exist in the backbone, or PEFT is not installed.
    """
    check_installed(config)
    check_trainable(backbone)
    model = copy.deepcopy(backbone.model)
    model.to(torch.promote_types(backbone.dtype, torch.float32))  # type: ignore[arg-type]
    kernels = Kernels(path="shared", gradient_checkpointing=backbone.kernels.gradient_checkpointing)
    copied = replace(backbone, model=model, kernels=kernels, facts={})
    heads = tuple(dict.fromkeys(name.split(".")[0] for name in copied.head_names))
    adapter = None
    if config.target == "lora":
        adapter = _add_lora(copied, config.lora, heads, seed)
    else:
        model.requires_grad_(True)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    freeze(model)
    return BackboneWeights(copied, trained, heads, adapter)


def weights_directory(config: TrainConfig, output_dir: str | Path) -> Path | None:
    """The directory in which a run keeps its weights: `lora`, or `model` where asked for; else None.

    Raises:
        ConfigError: Something else has that name.
    """
    name = "lora" if config.target == "lora" else "model" if config.save_model else None
    if name is None:
        return None
    directory = Path(output_dir) / name
    if directory.exists() and not (directory / MARKERS[name]).is_file():
        raise ConfigError(
            f"{directory} exists and was not written by softprompts; choose another directory with --out, or "
            f"move it away"
        )
    return directory


def save(weights: BackboneWeights, directory: str | Path) -> None:
    """Write LoRA's adapter as PEFT does, or the whole model with its tokenizer.

    The files are written under another name, which is changed when they are complete; an older directory is replaced.
    """
    target, backbone = Path(directory), weights.backbone
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        if weights.adapter is not None:
            weights.adapter.save_pretrained(temporary, save_embedding_layers=False)
        else:
            backbone.model.save_pretrained(temporary)
            if backbone.tokenizer is not None:
                backbone.tokenizer.save_pretrained(temporary)
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _import_peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ConfigError(
            "target: lora needs the package peft; install it with `pip install 'softprompts[lora]'`, or train the "
            "whole backbone (training.target: backbone)"
        ) from None
    return peft


def _add_lora(backbone: Backbone, config: LoraConfig, heads: Sequence[str], seed: int) -> Any:
    """Put LoRA's matrices into the layers of the backbone's model, and return PEFT's model around it."""
    peft, model = _import_peft(), backbone.model
    usual_targets = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    targets: Any = list(config.targets) if isinstance(config.targets, tuple) else config.targets
    if targets is None and model.config.model_type not in usual_targets:
        targets = "all-linear"
    options = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=targets,
        # Conv1D stores its weight transposed, and PEFT asks whether it does.
        fan_in_fan_out=any(type(module) is Conv1D for module in model.modules()),
        modules_to_save=list(heads) or None,
        task_type=TASK_TYPES.get(backbone.head, TASK_TYPES.get(backbone.family.name)),
        revision=backbone.revision,
    )
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            # PEFT reads an attribute that transformers deprecates.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            torch.manual_seed(seed)
            adapter = peft.get_peft_model(model, options)
    except ValueError as error:
        raise _target_error(model, config, error) from None
    adapter.peft_config["default"].base_model_name_or_path = backbone.name
    return adapter


def _target_error(model: nn.Module, config: LoraConfig, error: ValueError) -> ConfigError:
    """The error for PEFT's refusal, with the modules that LoRA can update where a target is none of them."""
    linear = [name for name, module in model.named_modules() if type(module) in (nn.Linear, Conv1D)]
    names = list(dict.fromkeys(name.rpartition(".")[2] for name in linear))
    targets = config.targets or ()
    text = targets if isinstance(targets, str) else ", ".join(targets)
    wrong = [targets] if isinstance(targets, str) else [name for name in targets if name not in names]
    if not wrong:
        return ConfigError(f"training.lora: {' '.join(str(error).split())}")
    return ConfigError(
        f"training.lora.targets: {text} cannot be updated in {type(model).__name__}{closest(wrong[0], names)} "
        f"possible: {', '.join(names)}, all-linear"
    )
