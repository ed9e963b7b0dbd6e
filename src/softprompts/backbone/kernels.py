"""How the frozen model's own modules are run: matrix products, fused and compiled parts, recomputation.

Context managers replace the forwards of modules, the attention and the rotation function of transformers' own code, and
put them back. No module is replaced and no weight touched. Other models of the process rotate as before.
"""

import contextlib
import copy
import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from softprompts.backbone.cache import Cache, EncoderDecoderCache
from softprompts.errors import BackboneError

Forward = Callable[..., Any]


@dataclass(frozen=True)
class Kernels:
    """With what the frozen model runs; every choice gives the same numbers up to rounding.

    Attributes:
        path: packed: one pass over all rows without padding, where the model can; shared: through its cache.
        packed_attention: The attention of packed rows: math, fused.
        attn_implementation: transformers' own implementation on the other paths; None: as the model was loaded.
        matmul_backend: torch, onednn.
        fuse_elementwise: Whether RMS norms and rotations in float32 on the CPU run as one operation each, which passes
            over memory half as often.
        compiled: Whether norms and MLPs run through torch.compile.
        trim_last_layer: Whether the last layer of packed rows computes only the tokens that are asked for.
        gradient_checkpointing: Whether the backward pass computes layers again, so that their states are not stored.
    """

    path: str = "packed"
    packed_attention: str = "math"
    attn_implementation: str | None = None
    matmul_backend: str = "torch"
    fuse_elementwise: bool = True
    compiled: bool = False
    trim_last_layer: bool = True
    gradient_checkpointing: bool = False


ContextFactory = Callable[[], contextlib.AbstractContextManager[None]]

recompute_context: ContextVar[ContextFactory] = ContextVar(
    "softprompts_recompute_context", default=contextlib.nullcontext
)
"""The context in which a layer runs now, to be entered again when the backward pass computes it a second time."""


@contextlib.contextmanager
def use_kernels(model: Any, kernels: Kernels, facts: dict[str, Any]) -> Iterator[None]:
    """Inside, `model` runs with `kernels`. Contexts may be nested.

    Args:
        model: The transformers model.
        kernels: With what it runs.
        facts: Where compiled functions are stored for the next time.

    Raises:
        BackboneError: Gradient checkpointing is asked for, and transformers has none for this model.
    """
    forwards: dict[nn.Module, Forward] = {}
    if kernels.matmul_backend == "onednn":
        for linear in frozen_linears(model):
            forwards[linear] = functools.partial(_onednn_linear, linear)
    rotary_modules: list[str] = []
    if kernels.fuse_elementwise:
        if "fused" not in facts:
            facts["fused"] = FusedParts.of(model)
        forwards |= facts["fused"].norms
        rotary_modules = facts["fused"].rotary_modules
    if kernels.compiled:
        if "compiled" not in facts:
            facts["compiled"] = compile_parts(model, kernels)
        forwards |= facts["compiled"]
    if kernels.gradient_checkpointing and torch.is_grad_enabled():
        for layer in _checkpointable_layers(model):
            if not isinstance(layer.__dict__.get("forward"), CheckpointedForward):
                forwards[layer] = CheckpointedForward(layer, forwards, rotary_modules)
    with (
        replace_forwards(forwards),
        _replace_rotations(rotary_modules),
        _use_attention(model, kernels.attn_implementation),
    ):
        yield


@contextlib.contextmanager
def replace_forwards(forwards: dict[nn.Module, Forward]) -> Iterator[None]:
    """Inside, each module computes with the given function; its own forward is back afterwards."""
    instance_forwards = {module: module.__dict__.get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, instance_forward in instance_forwards.items():
            if instance_forward is None:
                del module.forward
            else:
                module.forward = instance_forward


@contextlib.contextmanager
def _use_attention(model: Any, name: str | None) -> Iterator[None]:
    model_attention = model.config._attn_implementation
    if name in (None, model_attention):
        yield
        return
    context_token = recompute_context.set(lambda: _use_attention(model, name))
    try:
        model.set_attn_implementation(name)
        yield
    finally:
        model.set_attn_implementation(model_attention)
        recompute_context.reset(context_token)


def frozen_linears(model: nn.Module) -> list[nn.Module]:
    """The modules of `model` that are plain matrix products of frozen float weights on the CPU."""
    return list(filter(_is_frozen_linear, model.modules()))


def _is_frozen_linear(module: nn.Module) -> bool:
    if type(module) not in (nn.Linear, Conv1D) or "forward" in module.__dict__:
        return False
    weight = module.weight
    return (
        type(weight) is nn.Parameter
        and weight.is_cpu
        and weight.dtype in (torch.float32, torch.bfloat16)
        and not weight.requires_grad
    )


def _onednn_linear(module: Any, x: Tensor) -> Tensor:
    """The forward of a linear layer, x [..., in] -> [..., out]."""
    weight = module.weight.t() if type(module) is Conv1D else module.weight
    if x.numel() == 0 or x.dtype != weight.dtype:
        return functional.linear(x, weight, module.bias)
    return _OneDNNLinear.apply(x, weight, module.bias)


class _OneDNNLinear(torch.autograd.Function):
    """A product with frozen weights by oneDNN, which knows instructions that the BLAS torch was built with may not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        return torch.ops.mkldnn._linear_pointwise(gradient, weight.t(), None, "none", [], ""), None, None


ROTARY = "apply_rotary_pos_emb"
"""The function of transformers' modules that rotates queries and keys by their positions."""


@dataclass(frozen=True)
class FusedParts:
    """The parts of a frozen float32 model on the CPU that run as one operation each.

    Attributes:
        norms: The forward of each RMS norm.
        rotary_modules: The names of the Python modules of the model's attention, whose `ROTARY` is replaced.
    """

    norms: dict[nn.Module, Forward]
    rotary_modules: list[str]

    @classmethod
    def of(cls, model: nn.Module) -> "FusedParts":
        """The parts of `model` that give the fused results on random input, up to rounding."""
        norms: dict[nn.Module, Forward] = {}
        rotary_modules: dict[str, bool] = {}
        for module in model.modules():
            norm = _fused_norm(module)
            if norm is not None:
                norms[module] = norm
            if hasattr(module, "layer_idx"):
                name = inspect.unwrap(type(module).forward).__module__
                if name not in rotary_modules:
                    rotary_modules[name] = _rotates_halves(getattr(sys.modules[name], ROTARY, None))
        return cls(norms, [name for name, rotates_halves in rotary_modules.items() if rotates_halves])


def _fused_norm(module: nn.Module) -> Forward | None:
    """The fused forward of an RMS norm; None for another module, or where its weight is not frozen in float32."""
    weight = module._parameters.get("weight")
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    is_norm = len(module._parameters) == 1 and not module._modules and not module._buffers
    if not is_norm or not isinstance(weight, nn.Parameter) or not isinstance(eps, float) or weight.dim() != 1:
        return None
    if weight.dtype != torch.float32 or not weight.is_cpu or weight.requires_grad or "forward" in module.__dict__:
        return None
    if len(inspect.signature(module.forward).parameters) != 1:  # a gated norm takes the gate too
        return None
    states = torch.randn(3, len(weight), generator=torch.Generator().manual_seed(0))
    try:
        stock_states = module(states)
    except Exception:  # any model's own code runs here; a norm that wants something else keeps its forward
        return None
    if not isinstance(stock_states, Tensor) or stock_states.shape != states.shape:
        return None
    for offset in (0.0, 1.0):  # Gemma stores the scale less one
        scale = weight.detach() + offset if offset else weight.detach()
        if torch.allclose(_RMSNorm.apply(states, scale, eps)[0], stock_states, rtol=1e-5, atol=1e-6):
            return functools.partial(_rms_norm, module, offset, eps)
    return None


def _rms_norm(module: nn.Module, offset: float, eps: float, x: Tensor) -> Tensor:
    """The forward of an RMS norm, x [..., H] -> [..., H]; the stock forward for a trained weight or another type."""
    weight: Any = module.weight
    if weight.requires_grad or x.dtype != weight.dtype or weight.dtype != torch.float32:
        return type(module).forward(module, x)
    scale = weight + offset if offset else weight
    normalized: Tensor = _RMSNorm.apply(x, scale, eps)[0]
    return normalized


class _RMSNorm(torch.autograd.Function):
    """y = x / sqrt(mean(x^2) + eps) * scale over the last dimension, with a frozen scale; also gives 1 / sqrt(...)."""

    @staticmethod
    def forward(x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        inverse_rms = _inverse_rms(x, eps)
        return (x * inverse_rms).mul_(scale), inverse_rms

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
        x, scale, ctx.eps = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, scale, output[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, scale, inverse_rms = ctx.saved_tensors
        scaled = gradients[0] * scale
        if torch.is_grad_enabled():  # somebody differentiates the gradient, so it must be a function of x
            inverse_rms = _inverse_rms(x, ctx.eps)
            factor = (scaled * x).sum(-1, keepdim=True) * inverse_rms.pow(3) / x.shape[-1]
            return scaled * inverse_rms - x * factor, None, None
        factor = (scaled * x).sum(-1, keepdim=True) * inverse_rms.pow(3) / x.shape[-1]
        return scaled.mul_(inverse_rms).addcmul_(x, factor, value=-1), None, None


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last dimension, [..., 1]."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return (norm.square() / x.shape[-1] + eps).rsqrt()


def _rotates_halves(function: Any) -> bool:
    """Whether `function` rotates as Llama does: each pair of numbers half a head apart by its angle."""
    if function is None:
        return False
    random = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(2, 1, 2, 3, 8, generator=random)
    cos, sin = torch.randn(2, 1, 3, 8, generator=random)
    try:
        rotated = function(queries, keys, cos, sin)
    except Exception:  # any model's own code runs here
        return False
    if not isinstance(rotated, tuple) or [getattr(part, "shape", None) for part in rotated] != 2 * [queries.shape]:
        return False
    fused = (_Rotation.apply(queries, cos[:, None], sin[:, None]), _Rotation.apply(keys, cos[:, None], sin[:, None]))
    pairs = zip(rotated, fused, strict=True)
    return all(torch.allclose(stock, ours, rtol=1e-5, atol=1e-6) for stock, ours in pairs)


_fuses_rotations: ContextVar[bool] = ContextVar("softprompts_fuses_rotations", default=False)
_rotation_users: dict[str, int] = {}
_stock_rotations: dict[str, Forward] = {}
_rotation_lock = threading.Lock()


@contextlib.contextmanager
def _replace_rotations(modules: list[str]) -> Iterator[None]:
    """Inside, the attention code of these Python modules rotates with `_Rotation` where it can.

    The first context that any thread enters replaces the function of a module, and the last one that ends puts it back.
    Other threads rotate as before.
    """
    with _rotation_lock:
        for name in modules:
            if not _rotation_users.get(name):
                _stock_rotations[name] = getattr(sys.modules[name], ROTARY)
                setattr(sys.modules[name], ROTARY, functools.partial(_switch_rotation, _stock_rotations[name]))
            _rotation_users[name] = _rotation_users.get(name, 0) + 1
    token = _fuses_rotations.set(_fuses_rotations.get() or bool(modules))
    try:
        yield
    finally:
        _fuses_rotations.reset(token)
        with _rotation_lock:
            for name in modules:
                _rotation_users[name] -= 1
                if not _rotation_users[name]:
                    setattr(sys.modules[name], ROTARY, _stock_rotations.pop(name))


def _switch_rotation(stock: Forward, *args: Any, **kwargs: Any) -> Any:
    """Rotate with `_Rotation` in the contexts that want it, and as the stock code does elsewhere."""
    return _rotate(stock, *args, **kwargs) if _fuses_rotations.get() else stock(*args, **kwargs)


def _rotate(stock: Forward, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
    """Queries and keys [B, heads, M, d] rotated by the angles of their positions; cos and sin [B, M, d].

    The rotation is x * cos + (-x2, x1) * sin, where x1 and x2 are the halves of x (Su et al. 2021, in Llama's order).
    """
    plain = q.dtype == k.dtype == cos.dtype == sin.dtype == torch.float32 and q.is_cpu and not cos.requires_grad
    if not plain or not q.shape[-1] == k.shape[-1] == cos.shape[-1]:
        return stock(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    return _Rotation.apply(q, cos, sin), _Rotation.apply(k, cos, sin)


class _Rotation(torch.autograd.Function):
    """x * cos + (-x2, x1) * sin for the halves x1, x2 of the last dimension; angles get no gradient."""

    @staticmethod
    def forward(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        rotated = x * cos
        rotated[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
        rotated[..., half:].addcmul_(x[..., :half], sin[..., half:])
        return rotated

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        gradient = gradients[0]
        half = gradient.shape[-1] // 2
        turned_back = gradient * cos
        turned_back[..., :half].addcmul_(gradient[..., half:], sin[..., half:])
        turned_back[..., half:].addcmul_(gradient[..., :half], sin[..., :half], value=-1)
        return turned_back, None, None


def compile_parts(model: nn.Module, kernels: Kernels) -> dict[nn.Module, Forward]:
    """Norms, and MLPs where torch does their products, as compiled functions for any number of tokens.

    Nothing is compiled yet: that happens at the first call, once for all layers, and torch stores the result on disk
    for the next process.
    """
    compiled: dict[nn.Module, Forward] = {}
    for layer in _checkpointable_layers(model):
        for part in layer.children():
            has_children = any(part.children())
            has_parameters = next(part.parameters(), None) is not None
            is_norm = not has_children and not isinstance(part, nn.Linear | Conv1D | nn.Dropout)
            is_mlp = has_children and not any(hasattr(module, "layer_idx") for module in part.modules())
            if has_parameters and (is_norm or (is_mlp and kernels.matmul_backend == "torch")):
                compiled[part] = torch.compile(part.forward, dynamic=True)
    return compiled


def _checkpointable_layers(model: nn.Module) -> list[nn.Module]:
    layers: list[nn.Module] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise BackboneError(
            f"{type(model).__name__} has no layers that transformers would compute again: gradient checkpointing and "
            f"compiled parts are not possible for it; leave them off"
        )
    return layers


class CheckpointedForward:
    """A layer's forward that stores nothing for the backward pass and runs again there.

    A layer that reads and extends a cache gets its keys and values as inputs and returns the new ones. It works on a
    separate cache both times: the second run would otherwise find what the first one had added.
    """

    def __init__(self, layer: nn.Module, forwards: dict[nn.Module, Forward], rotary_modules: list[str]) -> None:
        self.plain_forward: Forward = layer.forward
        self.rotary_modules = rotary_modules
        self.part_forwards = {module: forwards[module] for module in layer.modules() if module in forwards}
        self.layer_name = type(layer).__name__
        self.layer_index: int | None = None
        for module in layer.modules():
            if self.layer_index is None:
                self.layer_index = getattr(module, "layer_idx", None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer would return."""
        enter_context = recompute_context.get()
        cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
        if cache is None:

            def run(*args: Any, **kwargs: Any) -> Any:
                with self._with_parts(), enter_context():
                    return self.plain_forward(*args, **kwargs)

            return checkpoint(run, *args, use_reentrant=False, **kwargs)
        if self.layer_index is None or isinstance(cache, EncoderDecoderCache):
            raise BackboneError(
                f"{self.layer_name} writes into a cache that cannot be passed to it twice: gradient checkpointing is "
                f"not possible here; leave it off, or use site 'input'"
            )
        return self._call_with_cache(cache, enter_context, args, kwargs)

    @contextlib.contextmanager
    def _with_parts(self) -> Iterator[None]:
        """Inside, the layer's parts run as in the first run: the backward pass comes after `use_kernels` has ended."""
        with replace_forwards(self.part_forwards), _replace_rotations(self.rotary_modules):
            yield

    def _call_with_cache(
        self, cache: Any, enter_context: ContextFactory, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        cache_layer = cache.layers[self.layer_index]
        is_empty = cache_layer.keys is None
        filled_layers: list[Any] = []

        def run(keys: Tensor | None, values: Tensor | None, *args: Any, **kwargs: Any) -> Any:
            run_layer = copy.copy(cache_layer)
            if not is_empty:
                run_layer.keys = keys
                run_layer.values = values
            run_cache = copy.copy(cache)
            run_cache.layers = list(cache.layers)
            run_cache.layers[self.layer_index] = run_layer
            run_args = [run_cache if value is cache else value for value in args]
            run_kwargs = {name: run_cache if value is cache else value for name, value in kwargs.items()}
            with self._with_parts(), enter_context():
                output = self.plain_forward(*run_args, **run_kwargs)
            filled_layers.append(run_layer)
            return output, run_layer.keys, run_layer.values

        output, keys, values = checkpoint(
            run, cache_layer.keys, cache_layer.values, *args, use_reentrant=False, **kwargs
        )
        filled_layer = filled_layers[0]
        filled_layer.keys = keys
        filled_layer.values = values
        cache.layers[self.layer_index] = filled_layer
        return output
