"""The floor: operations that a step cannot do without, over the rate at which this machine multiplies matrices.

operations = 2 x (matrix parameters of the blocks) x (prompt tokens + text tokens) x 2 (forward, gradient of the input)
+ the head on labeled positions. What attention needs is listed apart.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

LAYERS_TIMED = 4
"""Layers whose matrices take turns when the rate is measured: as in a model, they do not stay in the caches."""


@dataclass(frozen=True)
class Dimensions:
    """What the floor needs to know of a decoder: `matrices` are (out, in) of one layer, all layers being alike."""

    layers: int
    matrices: tuple[tuple[int, int], ...]
    hidden: int
    vocabulary: int
    heads: int
    head_width: int

    @property
    def parameters(self) -> int:
        """Matrix parameters of all blocks."""
        return self.layers * sum(out * into for out, into in self.matrices)


@dataclass(frozen=True)
class Operations:
    """Floating point operations of one step, forward and gradient of the input; `attention` is not in the floor."""

    blocks: int
    head: int
    attention: int

    @property
    def floor(self) -> int:
        """What the floor counts."""
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
    """What one step needs when each of the distinct `prompts` (lengths) and each of the `texts` (lengths) is read once.

    `labeled` positions reach the vocabulary. Every text is taken to stand behind the first prompt. Attention looks at
    what precedes a token and at itself: two products forward, four backward, of head_width for each pair and head.
    """
    tokens = sum(prompts) + sum(texts)
    pairs = sum(p * (p + 1) // 2 for p in prompts) + sum(t * prompts[0] + t * (t + 1) // 2 for t in texts)
    return Operations(
        blocks=2 * size.parameters * tokens * 2,
        head=2 * size.hidden * size.vocabulary * labeled * 2,
        attention=2 * pairs * size.heads * size.head_width * 6 * size.layers,
    )


def products(size: Dimensions, tokens: int, dtype: str, device: str) -> tuple[int, dict[str, Callable[[], None]]]:
    """Ways of multiplying `tokens` rows with some layers' matrices, forward and backward, and the operations of one go.

    Each has run once already. linear: torch's own; oneDNN: the product that torch's compiler would take, and packed:
    with the matrices laid out for it beforehand, where torch has them.
    """
    kind = getattr(torch, dtype)
    both = [shape for out, into in size.matrices for shape in ((out, into), (into, out))]
    inputs = {into: torch.randn(tokens, into).to(device, kind) for _, into in both}
    weights = [torch.randn(shape).to(device, kind) for _ in range(min(LAYERS_TIMED, size.layers)) for shape in both]
    count = sum(2 * tokens * weight.numel() for weight in weights)

    def over(chosen: Sequence[Tensor], multiply: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], None]:
        turns = [(inputs[plain.shape[1]], weight) for plain, weight in zip(weights, chosen, strict=True)]

        def go() -> None:
            with torch.no_grad():
                for states, weight in turns:
                    multiply(states, weight)

        return go

    ways = {"linear": over(weights, functional.linear)}
    ways["linear"]()
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
        for name, laid_out in candidates.items():
            try:
                way = over(laid_out(), onednn)
                way()
            except (RuntimeError, NotImplementedError):  # a CPU or build of torch without it
                continue
            ways[name] = way
    return count, ways
