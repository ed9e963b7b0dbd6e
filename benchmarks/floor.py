"""The floor of a step's time: its necessary operations over the rate at which this machine multiplies matrices.

operations = 2 x (matrix parameters of the blocks) x (prompt tokens + text tokens) x 2 (forward, gradient of the input)
+ the head on labeled positions. The operations of attention are listed separately.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

LAYERS_TIMED = 4
"""Layers whose matrices take turns when the rate is measured, so that they leave the caches as in a model."""


@dataclass(frozen=True)
class Dimensions:
    """The dimensions of a decoder whose layers are alike; `matrices` are (out, in) of one layer."""

    layers: int
    matrices: tuple[tuple[int, int], ...]
    hidden: int
    vocabulary: int
    heads: int
    head_width: int

    @property
    def parameters(self) -> int:
        """Matrix parameters of all blocks."""
        return self.layers * sum(rows * columns for rows, columns in self.matrices)


@dataclass(frozen=True)
class Operations:
    """Floating point operations of one step, forward and gradient of the input; `attention` is not in the floor."""

    blocks: int
    head: int
    attention: int

    @property
    def floor(self) -> int:
        """The operations that the floor counts."""
        return self.blocks + self.head


def dimensions(model: Any) -> Dimensions:
    """Read off a stock decoder whose layers are alike and made of linear modules."""
    config = model.config.get_text_config(decoder=True)
    stack = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == config.num_hidden_layers)
    matrices = tuple(tuple(m.weight.shape) for m in stack[0].modules() if isinstance(m, nn.Linear))
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Dimensions(
        layers=config.num_hidden_layers,
        matrices=matrices,  # type: ignore[arg-type]
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        heads=config.num_attention_heads,
        head_width=width,
    )


def operations(size: Dimensions, prompts: Sequence[int], texts: Sequence[int], labeled: int) -> Operations:
    """The operations of one step that computes each distinct prompt and each text once.

    Every text follows the first prompt. A token attends to itself and to the tokens before it: two products forward and
    four backward, of head_width for each pair and head.

    Args:
        size: The dimensions of the decoder.
        prompts: The lengths of the distinct prompts.
        texts: The lengths of the texts.
        labeled: Positions whose logits are computed.
    """
    tokens = sum(prompts) + sum(texts)
    pairs = sum(p * (p + 1) // 2 for p in prompts) + sum(t * prompts[0] + t * (t + 1) // 2 for t in texts)
    return Operations(
        blocks=2 * size.parameters * tokens * 2,
        head=2 * size.hidden * size.vocabulary * labeled * 2,
        attention=2 * pairs * size.heads * size.head_width * 6 * size.layers,
    )


def products(size: Dimensions, tokens: int, dtype: str, device: str) -> tuple[int, dict[str, Callable[[], None]]]:
    """Kernels that multiply the states of `tokens` tokens with the matrices of some layers, forward and backward.

    Each kernel has run once already. `linear` is torch's own. `oneDNN` is the product that torch's compiler takes, and
    `oneDNN, packed` the same with matrices in its own layout, where torch has them.

    Returns:
        The operations of one call, and the kernels by name.
    """
    torch_dtype = getattr(torch, dtype)
    shapes: list[tuple[int, int]] = []
    for rows, columns in size.matrices:
        shapes += [(rows, columns), (columns, rows)]
    inputs = {columns: torch.randn(tokens, columns).to(device, torch_dtype) for _, columns in shapes}
    weights = []
    for _ in range(min(LAYERS_TIMED, size.layers)):
        weights += [torch.randn(shape).to(device, torch_dtype) for shape in shapes]
    count = sum(2 * tokens * weight.numel() for weight in weights)

    def kernel(matrices: Sequence[Tensor], multiply: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], None]:
        pairs = []
        for weight, matrix in zip(weights, matrices, strict=True):
            pairs.append((inputs[weight.shape[1]], matrix))

        def call() -> None:
            with torch.no_grad():
                for states, matrix in pairs:
                    multiply(states, matrix)

        return call

    kernels = {"linear": kernel(weights, functional.linear)}
    kernels["linear"]()
    fused = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    pack = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)

    def onednn(states: Tensor, weight: Tensor) -> Tensor:
        assert fused is not None
        product: Tensor = fused(states, weight, None, "none", [], "")
        return product

    if device == "cpu" and fused is not None:
        candidates = {"oneDNN": lambda: weights}
        if pack is not None:
            candidates["oneDNN, packed"] = lambda: [pack(weight, tokens) for weight in weights]
        for name, matrices in candidates.items():
            try:
                candidate = kernel(matrices(), onednn)
                candidate()
            except (RuntimeError, NotImplementedError):  # a CPU or build of torch without it
                continue
            kernels[name] = candidate
    return count, kernels
