"""A backbone loaded and made ready: by its name, on its device, with the kernels that are fastest here.

Kernels are measured once and remembered in the cache. A choice changes results by rounding only, but a run must be
repeatable to the bit: so the cache keeps what was measured, and a run stores what it was made with.
"""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from softprompts import assets, injection
from softprompts.artifacts.io import read_json, write_json
from softprompts.assets import cache_dir
from softprompts.backbone import SEQ2SEQ, Backbone, devices, loading
from softprompts.backbone.devices import chip_name, synchronize
from softprompts.backbone.kernels import Kernels, frozen_linears, use_kernels
from softprompts.config import ModelConfig, closest
from softprompts.data import ExampleTokenizer, TaskTemplate, classes
from softprompts.data.templates import slot_sizes, split_slots
from softprompts.errors import ArtifactError, BackboneError
from softprompts.injection import Site
from softprompts.types import IGNORE, Batch, Prompt

WORTH = 5_000_000
"""Parameters from which measuring pays; smaller models take the defaults."""

BETTER = 0.95
"""A kernel is preferred to the one before it in the list when it takes at most this share of its time."""

PACKED = {"packed": "math", "packed-fused": "fused"}
"""What a user may ask for as `attention` besides transformers' own, and its core."""

BUDGET = 20.0
"""Seconds after which no further candidate is begun: where steps take that long, the first in the list is kept."""

SHAPE = (8, 24, 20)  # rows, tokens a row, prompt tokens of the step that is measured

UNBOUNDED = 1_000_000
"""Room for models with relative positions, which nothing bounds."""


def no_log(line: str) -> None:
    """Show nothing."""


def load_backbone(config: ModelConfig, *, labels: int | None = None, log: Callable[[str], None] = no_log) -> Backbone:
    """The backbone that `config` names, fetched first where it is a packaged one, with the fastest kernels.

    Args:
        config: The model, its number format, device and kernels.
        labels: Classes of the head; None: as the model has them.
        log: Is told what is done.

    Raises:
        AssetError: It cannot be fetched.
        BackboneError: It cannot be loaded.
    """
    devices.choose_threads(config.threads)
    _check_model_name(config.name)
    _check_attention(config.attention)
    path = assets.fetch(config.name, log) if assets.is_asset(config.name) else None
    log(f"loading {config.name}")
    try:
        loaded = loading.load(
            config.name,
            path=path,
            revision=config.revision,
            head=config.head,
            dtype=config.dtype,
            device=config.device,
            attention=None if config.attention in PACKED else config.attention,
            labels=labels,
            quantize=config.quantize,
            device_map=config.device_map,
        )
    except ImportError as error:
        if config.attention is None:
            raise
        raise BackboneError(
            f"attention '{config.attention}' cannot be used here: {error} Leave model.attention out, or use sdpa"
        ) from None
    return _with_kernels(loaded, config, log)


def _with_kernels(loaded: Backbone, config: ModelConfig, log: Callable[[str], None]) -> Backbone:
    """The backbone with the kernels that `config` asks for, and for the rest the fastest here."""
    if config.torch_compile:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(assets.cache_dir() / "compiled"))
    choice = autotune(
        loaded, attention=config.attention, products=config.matmul_backend, compiled=config.torch_compile, say=log
    )
    ready = replace(loaded, kernels=replace(choice.kernels, gradient_checkpointing=config.gradient_checkpointing))
    log(str(choice))
    if config.torch_compile:
        log(f"compiled in {first_step(ready):.0f} s; the next process finds most of it done")
    return ready


def _check_model_name(name: str) -> None:
    """Raise BackboneError for a name that is nearly a packaged one, and for a directory that is not there."""
    models = [asset.name for asset in assets.ASSETS.values() if asset.kind == "model"]
    if name in models or Path(name).exists():
        return
    if name.startswith((".", "/", "~")):
        raise BackboneError(f"no model directory {name}; say where it is now (--model DIRECTORY)")
    if "/" not in name and closest(name, models) != ";":
        raise BackboneError(
            f"no model '{name}'{closest(name, models)} packaged: {', '.join(models)} (`softprompts assets list`); or "
            f"give a local directory, or a hub name such as owner/model"
        )


def _check_attention(name: str | None) -> None:
    """Raise BackboneError for an attention that neither we nor transformers have; names with a slash are its own."""
    known = [*PACKED, "eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
    if name is not None and name not in known and "/" not in name:
        plain = [one for one in known if "|" not in one]
        raise BackboneError(
            f"no attention '{name}'{closest(name, known)} possible: {', '.join(plain)}; or leave it out"
        )


def example_tokenizer(
    backbone: Backbone, template: TaskTemplate, length: int, task: int = 0, place: str = "auto"
) -> ExampleTokenizer:
    """What turns rows of a task into tokens for this backbone, with room for a prompt of `length` tokens.

    Args:
        backbone: The backbone.
        template: How a row is put into words.
        length: The number of prompt tokens.
        task: The number of the task, which its rows bear.
        place: As of the site; `template` makes slots of the `<prompt>` in the templates, without a prompt of none.
    """
    room = UNBOUNDED if backbone.max_positions is None else backbone.max_positions - length
    slots: tuple[int, ...] = ()
    if place == "template":
        count = sum(len(split_slots(part)[1]) for part in template.templates)
        slots = slot_sizes(template.templates, length, template.name) if length else (0,) * count
    family: Any = backbone.family.name
    head: Any = backbone.head
    return ExampleTokenizer(template, backbone.tokenizer, family, head, room, task, slots)


def head_size(head: str, template: TaskTemplate) -> int | None:
    """Rows of a classification head for tasks like this one; None where the head or the task has no classes."""
    if head == "sequence" and template.kind == "regression":
        return 1
    return len(classes(template)) or None if head in ("sequence", "token") else None


@dataclass(frozen=True)
class TunedKernels:
    """The kernels, and the seconds that each candidate took (empty where nothing had to be measured)."""

    kernels: Kernels
    seconds: Mapping[str, float]

    def __str__(self) -> str:
        kernels = self.kernels
        attention = (
            f"packed ({kernels.packed_attention})"
            if kernels.path == "packed"
            else kernels.attn_implementation or "the model's own"
        )
        compiled = ", norms and MLPs: compiled" if kernels.compiled else ""
        return f"attention: {attention}, matmul: {kernels.matmul_backend}{compiled}"


def autotune(
    backbone: Backbone,
    *,
    attention: str | None = None,
    products: str = "auto",
    compiled: bool = False,
    say: Callable[[str], None] | None = None,
) -> TunedKernels:
    """The kernels for `backbone` on its device: as asked for, and what is left open by the remembered measurement.

    attention: "packed", "packed-fused", or the implementation of transformers that the model was loaded with; say: is
    told when a measurement begins.
    Raises BackboneError when rows are to be packed and cannot be.
    """
    if attention in PACKED:
        _check_packable(backbone, attention)
    packs = backbone.family.scores_next_token and injection.why_not_packed(backbone) is None
    usual = Kernels() if packs else Kernels(path="shared")
    asked: dict[str, Any] = {"compiled": compiled}
    if products != "auto":
        asked["matmul_backend"] = products
    if attention is not None:
        packed = {"path": "packed", "packed_attention": PACKED.get(attention)}
        asked |= packed if attention in PACKED else {"path": "shared"}
    open_ = [
        name for name, value in (("attention", attention), ("matmul_backend", products)) if value in (None, "auto")
    ]
    size = sum(parameter.numel() for parameter in backbone.model.parameters())
    if not open_ or size < WORTH:
        return TunedKernels(replace(usual, **asked), {})
    found = _remembered(backbone, say or (lambda line: None))
    kept = {k: v for k, v in found["kernels"].items() if k not in asked}
    return TunedKernels(replace(usual, **{**kept, **asked}), found["seconds"])


def _check_packable(backbone: Backbone, attention: str) -> None:
    tried = replace(backbone, kernels=Kernels(packed_attention=PACKED[attention]), facts={})
    if backbone.family.scores_next_token:
        reason = injection.why_not_packed(tried)
    else:
        reason = "an encoder's prompt sees the text"
    if reason is not None:
        raise BackboneError(f"attention '{attention}' is not possible: {reason}; leave model.attention out")


def _remembered(backbone: Backbone, say: Callable[[str], None]) -> dict[str, Any]:
    """The measurement for models of this shape, on this device with these versions; made if it is not there."""
    file = cache_dir() / "autotune.json"
    try:
        known = read_json(file) if file.is_file() else {}
    except ArtifactError:
        known = {}  # a damaged file only costs the measurement
    known = known if isinstance(known, dict) else {}
    key = _key(backbone)
    entry = known.get(key)
    fields = set(asdict(Kernels()))  # an entry of an earlier release has other names
    if not isinstance(entry, dict) or not {"kernels", "seconds"} <= entry.keys() or set(entry["kernels"]) != fields:
        say("measuring which kernels are fastest here, once for this model and machine")
        kernels, seconds = measure(backbone)
        entry = {"kernels": asdict(kernels), "seconds": seconds}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {**known, key: entry})
    return entry


def _key(backbone: Backbone) -> str:
    config, device = backbone.config, backbone.device
    shape = [getattr(config, name, None) for name in ("hidden_size", "num_hidden_layers", "vocab_size")]
    facts = [type(backbone.model).__name__, *shape, str(backbone.dtype), chip_name(device), torch.get_num_threads()]
    return " ".join(map(str, [*facts, torch.__version__, transformers.__version__]))


def measure(backbone: Backbone) -> tuple[Kernels, dict[str, float]]:
    """The fastest kernels for a training step of ordinary size, and the seconds of each candidate."""
    products, seconds = _fastest(backbone, _products(backbone), _one_product, 9)
    chosen, steps = _fastest(backbone, _attentions(backbone, products), _one_step, 4)
    return chosen, {**seconds, **steps}


def first_step(backbone: Backbone) -> float:
    """Seconds of a step with the backbone's own kernels, in which whatever is to be compiled is."""
    return _clock(backbone, backbone.kernels, _one_step)


def _fastest(
    backbone: Backbone,
    candidates: Mapping[str, Kernels],
    once: Callable[[Backbone, Kernels], None],
    rounds: int,
) -> tuple[Kernels, dict[str, float]]:
    """The best of the candidates and the shortest time of each; they take turns, so that a busy moment hits all."""
    seconds, began = dict.fromkeys(candidates, float("inf")), time.perf_counter()
    for turn in range(rounds if len(candidates) > 1 else 0):
        for name in list(seconds):
            if time.perf_counter() - began > BUDGET:
                break
            try:
                taken = _clock(backbone, candidates[name], once)
            except (RuntimeError, ValueError, ImportError, injection.Unpackable):
                del seconds[name]  # a kernel that does not run here is no candidate
                continue
            # The first turn warms up; it counts only where there is no other.
            seconds[name] = round(taken, 6) if turn < 2 else min(seconds[name], round(taken, 6))
    seconds = {name: taken for name, taken in seconds.items() if taken < float("inf")}
    best = next(iter(seconds), next(iter(candidates)))
    for name in seconds:
        if seconds[name] < BETTER * seconds[best]:
            best = name
    return candidates[best], seconds if len(candidates) > 1 else {}


def _clock(backbone: Backbone, kernels: Kernels, once: Callable[[Backbone, Kernels], None]) -> float:
    began = time.perf_counter()
    once(backbone, kernels)
    synchronize(backbone.device)
    return time.perf_counter() - began


def _products(backbone: Backbone) -> dict[str, Kernels]:
    found = {"torch products": Kernels()}
    if frozen_linears(backbone.model) and torch.backends.mkldnn.is_available():
        found["onednn products"] = Kernels(matmul_backend="onednn")
    return found


def _attentions(backbone: Backbone, kernels: Kernels) -> dict[str, Kernels]:
    found: dict[str, Kernels] = {}
    if backbone.family.scores_next_token and injection.why_not_packed(backbone) is None:
        found |= {name: replace(kernels, packed_attention=core) for name, core in PACKED.items()}
    own = backbone.model.config._attn_implementation
    found[own] = replace(kernels, path="shared", attn_implementation=own)
    if backbone.model._can_set_attn_implementation():
        names = [name for name in ("eager", "sdpa") if name != own]
        found |= {name: replace(kernels, path="shared", attn_implementation=name) for name in names}
    return found


def _one_product(backbone: Backbone, kernels: Kernels) -> None:
    """The widest product, forward and back, with as many tokens as an ordinary step has."""
    products: list[Any] = frozen_linears(backbone.model)
    widest = max(products, key=lambda m: m.weight.numel() if m.weight.shape[0] < 20_000 else 0)
    width = widest.nx if hasattr(widest, "nx") else widest.in_features
    x = torch.randn(512, width, dtype=widest.weight.dtype, requires_grad=True)
    with use_kernels(backbone.model, kernels, backbone.facts):
        widest(x).sum().backward()


def _one_step(backbone: Backbone, kernels: Kernels) -> None:
    """A training step with these kernels."""
    rows, length, slots = SHAPE
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(0, backbone.vocab_size, (rows, length), generator=random).to(backbone.device)
    start = backbone.embed(ids[0, torch.arange(slots, device=ids.device) % length]).float()
    labels = ids.masked_fill(torch.arange(length, device=ids.device) < length - 1, IGNORE)
    batch = Batch(ids, torch.ones_like(ids), torch.zeros_like(ids[:, 0]), labels)
    if backbone.family is SEQ2SEQ:
        batch = replace(batch, labels=ids[:, :4])
    if backbone.head != "lm":
        batch = replace(batch, labels=None)
    values = start[None].clone().requires_grad_()
    prompt = Prompt(values, torch.ones(1, slots, dtype=torch.bool, device=ids.device), batch.task_ids)
    tried = replace(backbone, kernels=kernels)
    output = injection.score(tried, batch, prompt, Site(), return_hidden_states=batch.labels is None)
    if output.labels is not None and output.logits is not None:
        functional.cross_entropy(output.logits.float(), output.labels).backward()
    elif output.hidden_states is not None:
        output.hidden_states.float().square().mean().backward()
