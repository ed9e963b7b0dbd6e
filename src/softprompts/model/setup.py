"""A backbone loaded and made ready: by its name, on its device, with the kernels that are fastest here.

Kernels are measured once and remembered in the cache. A choice changes results by rounding only, but a run must be
repeatable to the bit: so the cache keeps what was measured, and a run stores what it was made with.
"""

import logging
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
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

MARGIN = 0.95
"""A challenger wins when it takes at most this share of the time of the candidate before it."""

PACKED = {"packed": "math", "packed-fused": "fused"}
"""What a user may ask for as `attention` besides transformers' own, and its core."""

BUDGET = 20.0
"""Seconds after which no further candidate is begun: where steps take that long, the first in the list is kept."""

SHAPE = (8, 24, 20)  # rows, tokens a row, prompt tokens of the step that is measured

UNBOUNDED = 1_000_000
"""Room for models with relative positions, which nothing bounds."""


def no_log(line: str) -> None:
    """Show nothing."""


def log_to_logger(line: str) -> None:
    """Show a line through Python's logging, for callers without a screen."""
    logging.getLogger("softprompts").warning("%s (autotune=False skips this)", line)


def load_backbone(
    config: ModelConfig,
    *,
    labels: int | None = None,
    autotuned: bool = True,
    retune: bool = False,
    log: Callable[[str], None] = no_log,
) -> Backbone:
    """The backbone that `config` names, fetched first where it is a packaged one, with the fastest kernels.

    Args:
        config: The model, its number format, device and kernels.
        labels: Classes of the head; None: as the model has them.
        autotuned: Whether the kernels that `config` leaves open are measured; if not, the defaults are taken.
        retune: Whether to measure the kernels again.
        log: Receives a line about each step.

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
    return _with_kernels(loaded, config, autotuned, retune, log)


def _with_kernels(
    loaded: Backbone, config: ModelConfig, autotuned: bool, retune: bool, log: Callable[[str], None]
) -> Backbone:
    """The backbone with the kernels that `config` asks for, and for the rest the fastest here, or the defaults."""
    if config.torch_compile:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(assets.cache_dir() / "compiled"))
    choice = autotune(
        loaded,
        attention=config.attention,
        matmul_backend=config.matmul_backend,
        torch_compile=config.torch_compile,
        measured=autotuned,
        retune=retune,
        log=log,
    )
    ready = replace(loaded, kernels=replace(choice.kernels, gradient_checkpointing=config.gradient_checkpointing))
    log(str(choice))
    if config.torch_compile:
        log(f"compiled in {first_step(ready):.0f} s; the next process reuses most of it")
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
        plain = [implementation for implementation in known if "|" not in implementation]
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
        task: The number of the task, which its rows have.
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
        parts = [f"attention: {attention}", f"matmul: {kernels.matmul_backend}"]
        if kernels.compiled:
            parts.append("norms and MLPs compiled")
        return ", ".join(parts)


def autotune(
    backbone: Backbone,
    *,
    attention: str | None = None,
    matmul_backend: str = "auto",
    torch_compile: bool = False,
    measured: bool = True,
    retune: bool = False,
    log: Callable[[str], None] = no_log,
) -> TunedKernels:
    """The kernels for `backbone` on its device: the requested ones, and for the rest the fastest.

    The measurement is cached per model shape, device, dtype, threads and versions. A choice changes results by rounding
    only.

    Args:
        backbone: The backbone; small models take the defaults without a measurement.
        attention: "packed", "packed-fused", or the implementation of transformers that the model was loaded with; None
            leaves it open.
        matmul_backend: "torch", "onednn", or "auto", which leaves it open.
        torch_compile: Whether norms and MLPs are compiled.
        measured: Whether what is left open is measured; if not, it has its default.
        retune: Whether to measure again.
        log: Gets a line before a measurement.

    Raises:
        BackboneError: Rows are to be packed and cannot be.
    """
    if attention in PACKED:
        _check_packable(backbone, attention)
    packs = backbone.family.scores_next_token and injection.why_not_packed(backbone) is None
    default = Kernels() if packs else Kernels(path="shared")
    requested: dict[str, Any] = {"compiled": torch_compile}
    if matmul_backend != "auto":
        requested["matmul_backend"] = matmul_backend
    if attention in PACKED:
        requested |= {"path": "packed", "packed_attention": PACKED[attention]}
    elif attention is not None:
        requested["path"] = "shared"
    size = sum(map(torch.numel, backbone.model.parameters()))
    if not measured or (attention is not None and matmul_backend != "auto") or size < WORTH:
        return TunedKernels(replace(default, **requested), {})
    entry = _cached_measurement(backbone, retune, log)
    return TunedKernels(replace(default, **{**entry["kernels"], **requested}), entry["seconds"])


def _check_packable(backbone: Backbone, attention: str) -> None:
    tried = replace(backbone, kernels=Kernels(packed_attention=PACKED[attention]), facts={})
    reason = (
        injection.why_not_packed(tried) if backbone.family.scores_next_token else "an encoder's prompt sees the text"
    )
    if reason is not None:
        raise BackboneError(f"attention '{attention}' is not possible: {reason}; leave model.attention out")


def _cached_measurement(backbone: Backbone, retune: bool, log: Callable[[str], None]) -> dict[str, Any]:
    """The cache's entry for models of this shape, on this device with these versions; measured if it is missing."""
    file = cache_dir() / "autotune.json"
    try:
        measurements = read_json(file) if file.is_file() else {}
    except ArtifactError:
        measurements = {}  # a damaged file only costs the measurement
    if not isinstance(measurements, dict):
        measurements = {}
    key = _key(backbone)
    entry = measurements.get(key)
    fields = set(asdict(Kernels()))  # an entry of an earlier release has other names
    complete = isinstance(entry, dict) and {"kernels", "seconds"} <= entry.keys() and set(entry["kernels"]) == fields
    if retune or not complete:
        log("measuring which kernels are fastest here, once for this model and machine")
        kernels, seconds = measure(backbone)
        entry = {"kernels": asdict(kernels), "seconds": seconds}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {**measurements, key: entry})
    assert entry is not None
    return entry


def _key(backbone: Backbone) -> str:
    config, device = backbone.config, backbone.device
    shape = [getattr(config, name, None) for name in ("hidden_size", "num_hidden_layers", "vocab_size")]
    facts = [type(backbone.model).__name__, *shape, str(backbone.dtype), chip_name(device), torch.get_num_threads()]
    return " ".join(map(str, [*facts, torch.__version__, transformers.__version__]))


def measure(backbone: Backbone) -> tuple[Kernels, dict[str, float]]:
    """The fastest kernels for a training step of ordinary size, and the shortest time of each candidate in seconds."""
    kernels, matmul_seconds = _fastest(backbone, _matmul_candidates(backbone), _one_product, 9)
    kernels, step_seconds = _fastest(backbone, _attention_candidates(backbone, kernels), _one_step, 5)
    return kernels, {**matmul_seconds, **step_seconds}


def first_step(backbone: Backbone) -> float:
    """Seconds of a step with the backbone's own kernels, which compiles whatever is to be compiled."""
    return _clock(backbone, backbone.kernels, _one_step)


def _fastest(
    backbone: Backbone,
    candidates: Mapping[str, Kernels],
    workload: Callable[[Backbone, Kernels], None],
    rounds: int,
) -> tuple[Kernels, dict[str, float]]:
    """The fastest candidate, and the shortest time of each in seconds.

    The candidates take turns, so that a busy moment slows all of them. The first round only warms up.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    began = time.perf_counter()
    for _ in range(rounds if len(candidates) > 1 else 0):
        for name in list(times):
            if time.perf_counter() - began > BUDGET:
                break
            try:
                times[name].append(_clock(backbone, candidates[name], workload))
            except (RuntimeError, ValueError, ImportError, injection.Unpackable):
                del times[name]  # a kernel that does not run here is no candidate
    warm_times = {}
    for name, seconds in times.items():
        if seconds:
            warm_times[name] = seconds[1:] or seconds
    best = fastest_of(warm_times) or next(iter(candidates))
    return candidates[best], {name: round(min(seconds), 6) for name, seconds in warm_times.items()}


def fastest_of(times: Mapping[str, Sequence[float]]) -> str | None:
    """The name of the winner of interleaved times; None without candidates.

    A challenger replaces the candidate before it only by a margin: both its shortest time and the median of its ratios
    in the common rounds must be at most `MARGIN`. So neither one lucky round nor one noisy minute decides.

    Args:
        times: The seconds of each candidate, one per round, the preferred candidate first.
    """
    best: str | None = None
    for name, seconds in times.items():
        if best is None:
            best = name
            continue
        ratios = [challenger / incumbent for challenger, incumbent in zip(seconds, times[best], strict=False)]
        if statistics.median(ratios) <= MARGIN and min(seconds) <= MARGIN * min(times[best]):
            best = name
    return best


def _clock(backbone: Backbone, kernels: Kernels, workload: Callable[[Backbone, Kernels], None]) -> float:
    began = time.perf_counter()
    workload(backbone, kernels)
    synchronize(backbone.device)
    return time.perf_counter() - began


def _matmul_candidates(backbone: Backbone) -> dict[str, Kernels]:
    candidates = {"matmul: torch": Kernels()}
    if frozen_linears(backbone.model) and torch.backends.mkldnn.is_available():
        candidates["matmul: onednn"] = Kernels(matmul_backend="onednn")
    return candidates


def _attention_candidates(backbone: Backbone, kernels: Kernels) -> dict[str, Kernels]:
    candidates: dict[str, Kernels] = {}
    if backbone.family.scores_next_token and injection.why_not_packed(backbone) is None:
        candidates |= {name: replace(kernels, packed_attention=core) for name, core in PACKED.items()}
    implementation = backbone.model.config._attn_implementation
    candidates[implementation] = replace(kernels, path="shared", attn_implementation=implementation)
    if backbone.model._can_set_attn_implementation():
        for name in ("eager", "sdpa"):
            if name != implementation:
                candidates[name] = replace(kernels, path="shared", attn_implementation=name)
    return candidates


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
