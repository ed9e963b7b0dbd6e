"""Frozen matrices in fewer bits: the products inside the layers, with exact gradients for what goes through them.

Only the weights are rounded. Embeddings, norms, heads and everything else outside the stacks of layers stay as they
are, so tied heads stay tied. A product dequantizes its weights into the model's dtype, a chunk at a time, forward and
backward, so that its gradient is that of a float model with the rounded weights.

int8 is ours: symmetric, one scale an output. nf4 and fp4 (Dettmers et al. 2023, QLoRA, https://arxiv.org/abs/2305.14314)
are those of bitsandbytes, whose kernels pack and unpack them.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from softprompts.errors import BackboneError

QUANTIZATION_KINDS = ("int8", "nf4", "fp4")
BLOCK_SIZE = 64
"""Weights that share a scale in nf4 and fp4."""

WEIGHTS_PER_CHUNK = 2**21
"""Weights dequantized at a time: the copy stays within a few megabytes, and within the processor's cache."""

MAX_ROWS_OF_INT8_KERNEL = 4
"""Rows up to which torch's own int8 kernel is faster on the CPU than dequantized weights (bfloat16 only)."""


def quantize(model: nn.Module, kind: str, device: torch.device | None = None) -> int:
    """Replace the matrix products in the layers of `model` by quantized ones, and return how many there are.

    Args:
        model: The model, which is changed in place.
        kind: One of QUANTIZATION_KINDS.
        device: The device of the quantized weights; None: that of the weights.

    Raises:
        BackboneError: The kind is unknown, it needs bitsandbytes and that is missing, or there is no such product.
    """
    if kind not in QUANTIZATION_KINDS:
        raise BackboneError(f"quantization '{kind}' is unknown; possible: {', '.join(QUANTIZATION_KINDS)}")
    if kind != "int8":
        _bitsandbytes()
    linears = quantizable_linears(model)
    if not linears:
        raise BackboneError(
            f"{type(model).__name__} has no matrix products in a stack of layers that could be quantized; leave "
            f"model.quantize out"
        )
    for path, linear in linears.items():
        parent_path, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent_path), name, quantize_linear(linear, kind, device))
    return len(linears)


def quantizable_linears(model: nn.Module) -> dict[str, nn.Module]:
    """The plain matrix products inside stacks of layers, by name."""
    stacks = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    linears = {}
    for name, module in model.named_modules():
        if type(module) in (nn.Linear, Conv1D, FalconLinear) and name.startswith(stacks):
            linears[name] = module
    return linears


def quantize_linear(linear: Any, kind: str, device: torch.device | None = None) -> nn.Module:
    """A plain matrix product, quantized; arguments as for `quantize`."""
    weight = linear.weight.detach().to(device or linear.weight.device)
    weight = weight.t().contiguous() if type(linear) is Conv1D else weight
    bias = None if linear.bias is None else linear.bias.detach().to(weight.device)
    return Int8Linear(weight, bias) if kind == "int8" else FourBitLinear(weight, bias, kind)


def quantization_kind(model: nn.Module) -> str | None:
    """How the weights of `model` are quantized, by us or by transformers; None where they are not."""
    for module in model.modules():
        if isinstance(module, Int8Linear | FourBitLinear):
            return module.kind
        if type(module).__module__.startswith("bitsandbytes."):
            return str(getattr(getattr(module, "weight", None), "quant_type", "llm.int8"))
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is None:
        return None
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    return str(getattr(method, "value", method))


class Int8Linear(nn.Module):
    """A frozen product whose weight [out, in] is int8 with one scale [out] for each output."""

    kind = "int8"
    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        # The scale is rounded to the model's dtype first, so that what is computed with is what was rounded to.
        scale = (weight.float().abs().amax(1) / 127).to(weight.dtype)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        codes = (weight.float() / scale.float()[:, None]).round().clamp(-127, 127)
        self.register_buffer("weight", codes.to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        if (
            x.numel() <= MAX_ROWS_OF_INT8_KERNEL * self.in_features
            and x.dtype == self.scale.dtype == torch.bfloat16
            and _may_use_int8_kernel(x)
        ):
            product = torch._weight_int8pack_mm(x.reshape(-1, self.in_features), self.weight, self.scale)
            product = product.view(*x.shape[:-1], self.out_features)
        else:
            product = _FrozenProduct.apply(x, self._dequantize_part, self.out_features, self.in_features)
        return product if self.bias is None else product + self.bias

    def _dequantize_part(self, rows: slice, columns: slice, dtype: torch.dtype) -> Tensor:
        # The scale goes to the weights, not to the product, which in float16 could be too large for the format.
        return self.weight[rows, columns].to(dtype).mul_(self.scale[rows, None])

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] that this product computes with."""
        return self._dequantize_part(slice(None), slice(None), dtype)


class FourBitLinear(nn.Module):
    """A frozen product whose weight is packed in nf4 or fp4, with a scale for every BLOCK_SIZE weights of a row."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.out_features, self.in_features = weight.shape
        packed, state = _bitsandbytes().quantize_4bit(weight.contiguous(), blocksize=BLOCK_SIZE, quant_type=kind)
        # As int8, which T5 knows: it casts its states to any other dtype that it finds in a weight.
        self.register_buffer("weight", packed.view(torch.int8))
        self.register_buffer("scale", state.absmax)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        product: Tensor = _FrozenProduct.apply(x, self._dequantize_part, self.out_features, self.in_features, False)
        return product if self.bias is None else product + self.bias

    def _dequantize_part(self, rows: slice, columns: slice, dtype: torch.dtype) -> Tensor:
        return self.dequantize(dtype)  # blocks run on from row to row, so a part needs the whole

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] that this product computes with."""
        bitsandbytes = _bitsandbytes()
        state = bitsandbytes.QuantState(
            absmax=self.scale.float(),
            shape=torch.Size((self.out_features, self.in_features)),
            dtype=dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32,
            blocksize=BLOCK_SIZE,
            quant_type=self.kind,
        )
        weight: Tensor = bitsandbytes.dequantize_4bit(self.weight.view(torch.uint8), state)
        return weight.to(dtype)


class _FrozenProduct(torch.autograd.Function):
    """x [..., in] times a frozen weight [out, in] that is dequantized in chunks when it is needed, and not stored."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dequantize_part: Callable[[slice, slice, torch.dtype], Tensor],
        out_features: int,
        in_features: int,
        in_chunks: bool = True,
    ) -> Tensor:
        ctx.dequantize_part = dequantize_part
        ctx.out_features = out_features
        ctx.in_features = in_features
        ctx.in_chunks = in_chunks
        products = []
        for rows in _chunk_slices(out_features, in_features, in_chunks):
            products.append(functional.linear(x, dequantize_part(rows, slice(None), x.dtype)))
        return _concatenate(products)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        gradient = gradients[0]
        products = []
        for columns in _chunk_slices(ctx.in_features, ctx.out_features, ctx.in_chunks):
            products.append(gradient @ ctx.dequantize_part(slice(None), columns, gradient.dtype))
        return _concatenate(products), None, None, None, None


def _chunk_slices(length: int, width: int, in_chunks: bool) -> list[slice]:
    """Slices of `length` rows of `width` weights, WEIGHTS_PER_CHUNK at most in each."""
    step = max(1, WEIGHTS_PER_CHUNK // width) if in_chunks else length
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _concatenate(products: list[Tensor]) -> Tensor:
    return products[0] if len(products) == 1 else torch.cat(products, -1)


def _may_use_int8_kernel(x: Tensor) -> bool:
    """Whether torch's int8 kernel may take `x`: it has no gradient and is on the CPU."""
    return x.device.type == "cpu" and not (torch.is_grad_enabled() and x.requires_grad)


def _bitsandbytes() -> Any:
    """The functions of bitsandbytes; raises BackboneError where it is not installed."""
    # Its CPU part says on import that it would rather have a kernel from the hub, which nothing here would use.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        from bitsandbytes import functional as functions
    except ImportError:
        raise BackboneError(
            "nf4 and fp4 need the package bitsandbytes; install it with `pip install 'softprompts[quantize]'`, or use "
            "int8"
        ) from None
    return functions
