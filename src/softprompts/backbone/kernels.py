"""How the frozen model's own modules are run: matrix products, compiled parts, recomputation.

Everything here is swapped inside a context manager and is back afterwards; no module is replaced and no weight touched.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from softprompts.errors import BackboneError

Forward = Callable[..., Any]


@dataclass(frozen=True)
class Kernels:
    """What the frozen model is run with; every choice gives the same numbers up to rounding.

    rows: "packed" (one pass over all rows without padding) where the model can, else "shared" (through its cache);
    core: the attention of packed rows, "math" or "fused"; attention: transformers' own implementation on the other
    paths (None: as the model was loaded); products: "torch" or "onednn"; compiled: norms and MLPs through
    torch.compile; trim: the last layer computes only what is asked for; checkpoint: layers are computed again in the
    backward pass instead of kept.
    """

    path: str = "packed"
    packed_attention: str = "math"
    attn_implementation: str | None = None
    matmul_backend: str = "torch"
    compiled: bool = False
    trim_last_layer: bool = True
    gradient_checkpointing: bool = False


ContextFactory = Callable[[], contextlib.AbstractContextManager[None]]

recompute_context: ContextVar[ContextFactory] = ContextVar("softprompts_scene", default=contextlib.nullcontext)
"""What has to be set up again before a layer is computed a second time, in the backward pass."""


@contextlib.contextmanager
def use_kernels(model: Any, kernels: Kernels, known: dict[str, Any]) -> Iterator[None]:
    """Inside, `model` runs with `kernels`; `known` keeps what was compiled. May be entered again inside.

    Raises BackboneError for a model whose layers cannot be computed again, where that is asked for.
    """
    swaps: dict[nn.Module, Forward] = {}
    if kernels.matmul_backend == "onednn":
        swaps |= {module: functools.partial(_product, module) for module in frozen_linears(model)}
    if kernels.compiled:
        if "compiled" not in known:
            known["compiled"] = compile_parts(model, kernels)
        swaps |= known["compiled"]
    if kernels.gradient_checkpointing and torch.is_grad_enabled():
        own = [layer for layer in _layers(model) if not isinstance(layer.__dict__.get("forward"), CheckpointedForward)]
        swaps |= {layer: CheckpointedForward(layer, swaps) for layer in own}
    with replace_forwards(swaps), _attention(model, kernels.attn_implementation):
        yield


@contextlib.contextmanager
def replace_forwards(forwards: dict[nn.Module, Forward]) -> Iterator[None]:
    """Inside, each module computes with the given function; its own forward is back afterwards."""
    before = {module: module.__dict__.get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, own in before.items():
            if own is None:
                del module.forward
            else:
                module.forward = own


@contextlib.contextmanager
def _attention(model: Any, name: str | None) -> Iterator[None]:
    own = model.config._attn_implementation
    if name in (None, own):
        yield
        return
    again = recompute_context.set(lambda: _attention(model, name))
    try:
        model.set_attn_implementation(name)
        yield
    finally:
        model.set_attn_implementation(own)
        recompute_context.reset(again)


def frozen_linears(model: nn.Module) -> list[nn.Module]:
    """The modules of `model` that are plain matrix products of frozen float weights on the CPU."""
    return [
        module
        for module in model.modules()
        if type(module) in (nn.Linear, Conv1D)
        and type(module.weight) is nn.Parameter
        and module.weight.is_cpu
        and module.weight.dtype in (torch.float32, torch.bfloat16)
        and not module.weight.requires_grad
        and "forward" not in module.__dict__
    ]


def _product(module: Any, x: Tensor) -> Tensor:
    """The forward of a linear layer, x [..., in] -> [..., out]."""
    weight = module.weight.t() if type(module) is Conv1D else module.weight
    if x.numel() == 0 or x.dtype != weight.dtype:
        return functional.linear(x, weight, module.bias)
    return _OneDNN.apply(x, weight, module.bias)


class _OneDNN(torch.autograd.Function):
    """A product with frozen weights by oneDNN, which knows instructions that the BLAS torch was built with may not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        back = torch.ops.mkldnn._linear_pointwise(gradients[0].contiguous(), weight.t(), None, "none", [], "")
        return back, None, None


def compile_parts(model: nn.Module, kernels: Kernels) -> dict[nn.Module, Forward]:
    """Norms, and MLPs where torch does their products, as compiled functions for any number of tokens.

    Nothing is compiled yet: that happens when they are first called, once for all layers, and torch keeps the result
    on disk for the next process.
    """
    found: dict[nn.Module, Forward] = {}
    for layer in _layers(model):
        for part in layer.children():
            is_norm = not any(part.children()) and not isinstance(part, nn.Linear | Conv1D | nn.Dropout)
            is_mlp = any(part.children()) and not any(hasattr(m, "layer_idx") for m in part.modules())
            if any(True for _ in part.parameters()) and (is_norm or (is_mlp and kernels.matmul_backend == "torch")):
                found[part] = torch.compile(part.forward, dynamic=True)
    return found


def _layers(model: nn.Module) -> list[nn.Module]:
    found: list[nn.Module] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not found:
        raise BackboneError(
            f"{type(model).__name__} has no layers that transformers would compute again: gradient checkpointing and "
            f"compiled parts are not possible for it; leave them off"
        )
    return found


class CheckpointedForward:
    """A layer's forward that keeps nothing for the backward pass and is computed again there.

    A layer that reads and extends a cache gets its keys and values as inputs and hands the new ones out, and works on a
    cache of its own both times; else the second computation would find what the first one had added.
    """

    def __init__(self, layer: nn.Module, swaps: dict[nn.Module, Forward]) -> None:
        self.plain: Forward = layer.forward
        self.inside = {module: swaps[module] for module in layer.modules() if module in swaps}
        self.name = type(layer).__name__
        numbers = [m.layer_idx for m in layer.modules() if getattr(m, "layer_idx", None) is not None]
        self.number = numbers[0] if numbers else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer would return."""
        enter = recompute_context.get()
        cache = next((v for v in (*args, *kwargs.values()) if isinstance(v, Cache)), None)
        if cache is None:

            def run(*args: Any, **kwargs: Any) -> Any:
                with replace_forwards(self.inside), enter():
                    return self.plain(*args, **kwargs)

            return checkpoint(run, *args, use_reentrant=False, **kwargs)
        if self.number is None or isinstance(cache, EncoderDecoderCache):
            raise BackboneError(
                f"{self.name} writes into a cache that cannot be handed to it twice: gradient checkpointing is not "
                f"possible here; leave it off, or use site 'input'"
            )
        return self._with_cache(cache, enter, args, kwargs)

    def _with_cache(self, cache: Any, enter: ContextFactory, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        number = self.number
        own = cache.layers[number]
        empty = own.keys is None

        def run(keys: Tensor | None, values: Tensor | None, *args: Any, **kwargs: Any) -> Any:
            fresh, part = copy.copy(cache), copy.copy(own)
            if not empty:
                part.keys, part.values = keys, values
            fresh.layers = [part if i == number else other for i, other in enumerate(cache.layers)]
            moved = (
                [fresh if a is cache else a for a in args],
                {k: fresh if v is cache else v for k, v in kwargs.items()},
            )
            with replace_forwards(self.inside), enter():
                out = self.plain(*moved[0], **moved[1])
            filled.append(part)
            return out, part.keys, part.values

        filled: list[Any] = []
        out, keys, values = checkpoint(run, own.keys, own.values, *args, use_reentrant=False, **kwargs)
        part = filled[0]
        part.keys, part.values = keys, values
        cache.layers[number] = part
        return out
