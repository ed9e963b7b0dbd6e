"""Loading a frozen model and its tokenizer; the only user of the Auto classes."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module

from softprompts.backbone.devices import choose_device, choose_dtype, return_memory
from softprompts.backbone.families import family_of_config
from softprompts.backbone.model import Backbone, freeze, wrap
from softprompts.backbone.quantization import quantize as quantize_model
from softprompts.errors import BackboneError


def load(
    name: str,
    *,
    path: str | Path | None = None,
    revision: str | None = None,
    head: str = "lm",
    dtype: str = "auto",
    device: str = "auto",
    attention: str | None = None,
    labels: int | None = None,
    quantize: str | None = None,
    device_map: str | Mapping[str, str | int] | None = None,
) -> Backbone:
    """The model and tokenizer at `path`, frozen.

    A head that the checkpoint does not hold starts from a fixed seed, so that a run is repeatable; a language model
    must be whole.

    Args:
        name: A packaged name or hub name, which messages use.
        path: A directory or hub name to load from; None: `name`.
        revision: Branch, tag or commit on the hub.
        head: Which Auto class: lm, sequence, token, span or features.
        dtype: A torch dtype by name; auto: bfloat16 where the device multiplies it, else float32.
        device: A device by name; auto: the first accelerator, else the CPU.
        attention: The attention implementation of transformers; None: the model's own choice.
        labels: Number of classes of a classification head.
        quantize: int8, nf4 or fp4 for the matrices inside the layers; `dtype` is then that of everything else.
        device_map: auto, or a device for each part of the model, as transformers takes it; instead of `device`.

    Raises:
        BackboneError: Nothing, or not a whole language model, can be loaded from there, or the device is not here.
    """
    target = choose_device(device) if device_map is None else _first_device(device_map, device, quantize)
    source = str(path or name)
    options: dict[str, Any] = {"dtype": choose_dtype(dtype, target)}
    if attention is not None:
        options["attn_implementation"] = attention
    if device_map is not None:
        options["device_map"] = device_map if isinstance(device_map, str) else dict(device_map)
    try:
        config = transformers.AutoConfig.from_pretrained(source, revision=revision)
        if labels is not None:
            config.num_labels = labels
        auto_class = getattr(transformers, family_of_config(config).auto_classes[head])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, loading_info = auto_class.from_pretrained(
                source, config=config, revision=revision, use_safetensors=True, output_loading_info=True, **options
            )
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise BackboneError(
            f"cannot load '{source}': {' '.join(str(error).split())[:300]} Give a packaged model "
            f"(`softprompts assets list`), a local directory with config.json, model.safetensors and a tokenizer, "
            f"or a hub name that can be reached."
        ) from None
    if head == "lm":
        _check_whole(source, model, loading_info["missing_keys"])
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if device_map is not None:
        backbone = wrap(model, tokenizer, name, revision)
        is_dispatched = any(hasattr(module, "_hf_hook") for module in model.modules())
        return align_part_devices(backbone) if is_dispatched else backbone
    if quantize is not None:
        quantize_model(freeze(model), quantize, target)
        for parameter in model.parameters():
            # Tensors that map the file keep the whole file in memory.
            parameter.data = parameter.data.clone()
        return_memory()
    return wrap(model.to(target), tokenizer, name, revision)


def _check_whole(source: str, model: Any, missing_keys: Iterable[str]) -> None:
    """Raise BackboneError where the checkpoint at `source` lacks weights of `model`, which are then drawn at random."""
    names = sorted(set(missing_keys).intersection(dict(model.named_parameters())))
    if names:
        raise BackboneError(
            f"'{source}' holds no complete language model: {', '.join(names[:3])}{' ...' * (len(names) > 3)} would be "
            f"random; set model.head to sequence, token, span or features, or choose a language model"
        )


def align_part_devices(backbone: Backbone) -> Backbone:
    """The same backbone, whose parts answer on the device of their input.

    transformers does that for the whole model only, but prompts enter, and states are read, at its parts.
    """
    parts = {id(part): part for part in (backbone.encoder, backbone.decoder, backbone.trunk)}
    skipped_arguments = getattr(backbone.model, "_skip_keys_device_placement", None)
    for part in parts.values():
        if part is not backbone.model:
            hook = AlignDevicesHook(io_same_device=True, skip_keys=skipped_arguments)
            add_hook_to_module(part, hook, append=True)
    return backbone


def load_tokenizer(name: str, options: Mapping[str, Any]) -> Any:
    """The tokenizer at `name`, a directory or hub name; raises BackboneError when there is none."""
    tokenizers: Any = transformers.AutoTokenizer
    try:
        return tokenizers.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise BackboneError(
            f"no tokenizer at '{name}': {' '.join(str(error).split())[:200]} Give a local directory or a hub name that "
            f"can be reached."
        ) from None


def _first_device(device_map: str | Mapping[str, str | int], device: str, quantize: str | None) -> torch.device:
    """The first device of a map; raises BackboneError where the map does not fit the rest or names no device."""
    if device != "auto":
        raise BackboneError(f"device '{device}' and a device_map cannot both be given; leave one of them out")
    if quantize is not None:
        raise BackboneError(
            f"a model is quantized ({quantize}) for one device, not for a device_map; leave one of them out, or load "
            f"it with transformers' own quantization and wrap it"
        )
    names = [] if isinstance(device_map, str) else [name for name in device_map.values() if name != "disk"]
    devices = list(map(choose_device, names))  # all of them, so that each is checked
    return devices[0] if devices else choose_device("auto")
