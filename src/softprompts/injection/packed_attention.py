"""Attention over packed rows, as an implementation that transformers' own switch can choose.

All rows of a batch follow each other in one sequence, without padding, behind the distinct prompts:
`[prompt 1 | ... | prompt U | text 1 | ... | text B]`. Projections, norms and MLPs see that sequence. Only the attention
takes it apart: a prompt attends to itself, a text to its own prompt and itself. Queries that share keys (grouped
queries) are rows of one product, so keys are never repeated.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from softprompts.backbone.kernels import recompute_context, replace_forwards

UNREACHABLE = 1 << 30
"""The position of a key that no query may see: padding."""


class Unpackable(Exception):
    """The model's attention needs something that packed rows do not have; the message says what."""


@dataclass(frozen=True)
class TokenPositions:
    """Where tokens are, counted from the beginning of their text; those of a prompt are negative.

    Attributes:
        positions: [N, K], UNREACHABLE for padding.
        branches: [N, K], 0 for prompt and text, c for the c-th continuation behind the text, which sees the text and
            itself but no other continuation.
    """

    positions: Tensor
    branches: Tensor

    def can_see(self, keys: "TokenPositions", window: int | None) -> Tensor:
        """Which of `keys` [N, K] each of these queries [N, Q] may see: [N, 1, Q, K]."""
        distance = self.positions[:, :, None] - keys.positions[:, None, :]
        same_branch = keys.branches[:, None] == self.branches[:, :, None]
        allowed = (distance >= 0) & ((keys.branches[:, None] == 0) | same_branch)
        if window is not None:
            allowed &= distance < window
        return allowed[:, None]


@dataclass(frozen=True)
class TokenGroup:
    """All prompts, or all texts: N rows of up to K tokens, cut out of the packed sequence and put back.

    Attributes:
        packed_index: [N, K], the place of each token among the packed tokens of the group, 0 for padding.
        padded_index: [tokens], the flat place in [N, K] of each packed token.
        mask: [N, K], false for padding.
        positions: Of the same [N, K] tokens.
        is_full: Whether there is no padding.
    """

    packed_index: Tensor
    padded_index: Tensor
    mask: Tensor
    positions: TokenPositions
    is_full: bool

    def __len__(self) -> int:
        """Number of packed tokens."""
        return len(self.padded_index)

    def pad(self, packed: Tensor) -> Tensor:
        """Packed tokens [tokens, h, d] as [N, K, h, d]; padding repeats the first token (zeros where there is none)."""
        if self.is_full:
            return packed.view(*self.packed_index.shape, *packed.shape[1:])
        if not len(packed):
            return packed.new_zeros(*self.packed_index.shape, *packed.shape[1:])
        return _Pad.apply(packed, self.packed_index, self.padded_index)

    def unpad(self, padded: Tensor) -> Tensor:
        """The way back: [N, K, h, d] as [tokens, h, d]."""
        if self.is_full:
            return padded.flatten(0, 1)
        return _Unpad.apply(padded, self.packed_index, self.padded_index, self.mask)


class _Pad(torch.autograd.Function):
    """Rows by index. Its gradient is a look-up too, not a sum: every packed token is in one place."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, packed_index: Tensor, padded_index: Tensor) -> Tensor:
        ctx.save_for_backward(padded_index)
        return packed.index_select(0, packed_index.flatten()).view(*packed_index.shape, *packed.shape[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (padded_index,) = ctx.saved_tensors
        return gradients[0].flatten(0, 1).index_select(0, padded_index), None, None


class _Unpad(torch.autograd.Function):
    """The inverse of `_Pad`; padding gets no gradient."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, packed_index: Tensor, padded_index: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(packed_index, mask)
        return padded.flatten(0, 1).index_select(0, padded_index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        packed_index, mask = ctx.saved_tensors
        gradient = gradients[0]
        padded = gradient.index_select(0, packed_index.flatten()).view(*packed_index.shape, *gradient.shape[1:])
        return padded.masked_fill_(~mask[..., None, None], 0), None, None, None


@dataclass(frozen=True)
class AttentionMask:
    """Which keys each query may see, `allowed` [N, 1, Q, K], and the same as numbers that are added to scores."""

    allowed: Tensor
    biases: dict[tuple[torch.dtype, int, int], Tensor] = field(default_factory=dict)

    def bias(self, dtype: torch.dtype, kv_heads: int, groups: int) -> Tensor:
        """What is added to scores [N * kv_heads, groups * Q, K]; made once for layers of the same heads."""
        key = (dtype, kv_heads, groups)
        if key not in self.biases:
            # Not minus infinity: a padded query sees nothing, and its softmax must still be a number.
            lowest = torch.finfo(dtype).min / 2
            bias = torch.zeros_like(self.allowed, dtype=dtype).masked_fill_(~self.allowed, lowest)
            rows, _, queries, keys = bias.shape
            bias = bias[:, :, None].expand(rows, kv_heads, groups, queries, keys)
            self.biases[key] = bias.reshape(rows * kv_heads, groups * queries, keys)
        return self.biases[key]


@dataclass
class Packing:
    """One pass over packed rows, as the attention sees it.

    Attributes:
        prompts: The U prompts, which precede the texts in the sequence; None: `prefix_keys_values` replaces them.
        texts: The B texts; None in a pass over prompts alone.
        prompt_index: [B], the prompt of each text.
        prompt_positions: Of the tokens of all U prompts.
        windows: The sliding window of each layer, as the cache knows it; None: the layer sees everything.
        prefix_keys_values: Each layer's keys and values [U, heads, P, head_dim] of prompts that were run before.
        records_prompts: Whether the pass leaves the prompts' keys and values behind.
        prompt_keys_values: What it leaves behind, by layer.
        attended_layers: The layers that this attention served so far.
        query_groups: The tokens of prompts and texts whose queries alone are computed; None: all (`trim_layer`).
        captured_keys_values: The keys and values of all tokens in a layer whose queries are trimmed.
        masks: Attention masks, each made once for all layers that share it.
    """

    prompts: TokenGroup | None
    texts: TokenGroup | None
    prompt_index: Tensor
    prompt_positions: TokenPositions
    windows: tuple[int | None, ...]
    prefix_keys_values: tuple[tuple[Tensor, Tensor], ...] | None = None
    records_prompts: bool = False
    prompt_keys_values: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    attended_layers: list[int] = field(default_factory=list)
    query_groups: tuple[TokenGroup | None, TokenGroup | None] | None = None
    captured_keys_values: tuple[Tensor, Tensor] | None = None
    masks: dict[tuple[str, int | None, bool], AttentionMask] = field(default_factory=dict)

    def mask(self, part: "AttentionPart", window: int | None) -> AttentionMask:
        """The keys that the queries of `part` see through `window`."""
        key = (part.name, window, self.captured_keys_values is not None)
        if key not in self.masks:
            self.masks[key] = AttentionMask(part.queries_of.positions.can_see(part.key_positions, window))
        return self.masks[key]


@dataclass(frozen=True)
class AttentionPart:
    """The attention of all prompts, or of all texts, in one layer.

    Attributes:
        name: prompts or texts.
        queries_of: The tokens that ask.
        queries: [N, Q, heads, head_dim].
        keys: [N, kv_heads, K, head_dim].
        values: As `keys`.
        key_positions: Of the K keys of each row.
    """

    name: str
    queries_of: TokenGroup
    queries: Tensor
    keys: Tensor
    values: Tensor
    key_positions: TokenPositions


class KeysValuesCaptured(Exception):
    """Ends the first of two runs of a layer, once its keys and values are known."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys_values = (keys, values)


_current_packing: ContextVar[Packing | None] = ContextVar("softprompts_packing", default=None)
_captures_keys_values: ContextVar[bool] = ContextVar("softprompts_captures_keys_values", default=False)


@contextlib.contextmanager
def use_packed_attention(model: PreTrainedModel, packing: Packing, kernel: str) -> Iterator[None]:
    """Inside, `model` attends as `packing` says, with `kernel` (a key of ATTENTION_NAMES); then with its own."""
    model_attention = model.config._attn_implementation
    packing_token = _current_packing.set(packing)
    context_token = recompute_context.set(lambda: use_packed_attention(model, packing, kernel))
    model.set_attn_implementation(ATTENTION_NAMES[kernel])
    try:
        yield
    finally:
        model.set_attn_implementation(model_attention)
        recompute_context.reset(context_token)
        _current_packing.reset(packing_token)


@contextlib.contextmanager
def trim_layer(
    layer: nn.Module, packing: Packing, query_groups: tuple[TokenGroup | None, TokenGroup | None], kept_index: Tensor
) -> Iterator[None]:
    """Inside, `layer` computes queries and MLP for some tokens of the packed sequence alone; others come back as zeros.

    Its forward runs twice: over all tokens until their keys and values are known, then over the tokens to keep.

    Args:
        layer: The last layer of the trunk.
        packing: The pass in which it runs.
        query_groups: The tokens to keep, of prompts and of texts; their indices refer to `kept_index`.
        kept_index: [tokens], the same tokens' places in the packed sequence.
    """
    # A checkpointed forward would be ended half-way, so the plain one runs.
    layer_forward = getattr(layer.forward, "plain_forward", layer.forward)

    def forward(*args: Any, **kwargs: Any) -> Any:
        size = (args[0] if args else kwargs["hidden_states"]).shape[1]
        capture_token = _captures_keys_values.set(True)
        try:
            layer_forward(*args, **kwargs)
            raise Unpackable("its last layer has no attention of the usual kind")
        except KeysValuesCaptured as captured:
            packing.captured_keys_values = captured.keys_values
            packing.query_groups = query_groups
        finally:
            _captures_keys_values.reset(capture_token)
        kept_args = [_select_tokens(value, kept_index, size) for value in args]
        kept_kwargs = {name: _select_tokens(value, kept_index, size) for name, value in kwargs.items()}
        try:
            output = layer_forward(*kept_args, **kept_kwargs)
        finally:
            packing.captured_keys_values = None
            packing.query_groups = None
        kept_states = output[0] if isinstance(output, tuple) else output
        states = kept_states.new_zeros(1, size, kept_states.shape[-1]).index_copy(1, kept_index, kept_states)
        return (states, *output[1:]) if isinstance(output, tuple) else states

    with replace_forwards({layer: forward}):
        yield


def _select_tokens(value: Any, kept_index: Tensor, size: int) -> Any:
    """An argument of a layer with the tokens at `kept_index` alone, where it has an entry for each of `size` tokens."""
    if isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == size:
        return value.index_select(1, kept_index.to(value.device))
    if isinstance(value, tuple):
        return tuple(_select_tokens(part, kept_index, size) for part in value)
    return value


def _attention_function(kernel: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, None]]:
    """An attention as transformers calls it, which computes prompts and texts with `kernel`."""

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **other_arguments: Any,
    ) -> tuple[Tensor, None]:
        """Attention of one layer: query [1, heads, M, d], key and value [1, kv_heads, M, d] -> [1, M, heads, d]."""
        packing = _current_packing.get()
        assert packing is not None, "packed attention outside use_packed_attention()"
        layer = _check_layer(module, packing, sliding_window, other_arguments)
        queries = query.transpose(1, 2)[0]  # [M, heads, d]
        keys = key.transpose(1, 2)[0]
        values = value.transpose(1, 2)[0]
        if _captures_keys_values.get():
            raise KeysValuesCaptured(keys, values)
        if packing.captured_keys_values is not None:
            keys, values = packing.captured_keys_values
        packing.attended_layers.append(layer)
        scale = queries.shape[-1] ** -0.5 if scaling is None else scaling
        outputs = []
        for part in _attention_parts(packing, layer, queries, keys, values):
            mask = packing.mask(part, sliding_window)
            outputs.append(part.queries_of.unpad(kernel(part, mask, scale, softcap)))
        return torch.cat(outputs)[None] if len(outputs) > 1 else outputs[0][None], None

    return attend


def _check_layer(module: nn.Module, packing: Packing, window: int | None, other_arguments: dict[str, Any]) -> int:
    """The layer's number; raises Unpackable where its attention needs more, or differs from what its cache says.

    The trial run on a few tokens cannot see it: a long window, or a small share of attention that goes nowhere, would
    pass for rounding.
    """
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise Unpackable("its attention does not know its layer")
    if packing.windows[layer] and window is None:
        raise Unpackable("its attention does not report its window")
    if packing.windows[layer] != window:
        raise Unpackable(f"its attention has a window of {window} tokens and its cache one of {packing.windows[layer]}")
    if not getattr(module, "is_causal", True):
        raise Unpackable("its attention is bidirectional")
    if other_arguments.get("s_aux") is not None:
        raise Unpackable("its attention has sinks")
    return int(layer)


def _attention_parts(
    packing: Packing, layer: int, queries: Tensor, keys: Tensor, values: Tensor
) -> Iterator[AttentionPart]:
    """Yield the attention of the prompts, then of the texts, from a layer's packed tensors [M, heads, head_dim]."""
    prompt_queries_of, text_queries_of = packing.query_groups or (packing.prompts, packing.texts)
    prompt_keys_values: tuple[Tensor, Tensor] | None = None
    if packing.prompts is not None:
        count = len(packing.prompts)
        query_count = 0 if prompt_queries_of is None else len(prompt_queries_of)
        prompt_keys, keys = keys.split([count, len(keys) - count])
        prompt_values, values = values.split([count, len(values) - count])
        prompt_queries, queries = queries.split([query_count, len(queries) - query_count])
        prompt_keys = packing.prompts.pad(prompt_keys).transpose(1, 2)
        prompt_values = packing.prompts.pad(prompt_values).transpose(1, 2)
        prompt_keys_values = (prompt_keys, prompt_values)
        if packing.records_prompts:
            packing.prompt_keys_values[layer] = prompt_keys_values
        if prompt_queries_of is not None:
            yield AttentionPart(
                name="prompts",
                queries_of=prompt_queries_of,
                queries=prompt_queries_of.pad(prompt_queries),
                keys=prompt_keys,
                values=prompt_values,
                key_positions=packing.prompt_positions,
            )
    elif packing.prefix_keys_values is not None:
        prompt_keys_values = packing.prefix_keys_values[layer]
    if packing.texts is None or text_queries_of is None or not len(packing.texts):
        return
    text_keys = packing.texts.pad(keys).transpose(1, 2)
    text_values = packing.texts.pad(values).transpose(1, 2)
    positions = packing.texts.positions
    if prompt_keys_values is not None:
        rows = packing.prompt_index
        text_keys = torch.cat([_expand_to_rows(prompt_keys_values[0], rows), text_keys], 2)
        text_values = torch.cat([_expand_to_rows(prompt_keys_values[1], rows), text_values], 2)
        prompt_positions = packing.prompt_positions
        positions = TokenPositions(
            torch.cat([prompt_positions.positions[rows], positions.positions], 1),
            torch.cat([prompt_positions.branches[rows], positions.branches], 1),
        )
    yield AttentionPart(
        name="texts",
        queries_of=text_queries_of,
        queries=text_queries_of.pad(queries),
        keys=text_keys,
        values=text_values,
        key_positions=positions,
    )


def _expand_to_rows(prompt_keys: Tensor, prompt_index: Tensor) -> Tensor:
    """Keys of prompts [U, heads, P, d] for each row, [B, heads, P, d]; one prompt for all rows is not copied."""
    if len(prompt_keys) == 1:
        return prompt_keys.expand(len(prompt_index), -1, -1, -1)
    return prompt_keys.index_select(0, prompt_index)


def _math_attention(part: AttentionPart, mask: AttentionMask, scale: float, softcap: float | None) -> Tensor:
    """Two batched products around a softmax: [N, Q, heads, head_dim].

    A softmax in half precision is computed in float32 inside and rounded once, as the models' own does.
    """
    rows, queries, heads, head_dim = part.queries.shape
    kv_heads = part.keys.shape[1]
    groups = heads // kv_heads
    grouped_queries = (
        part.queries.view(rows, queries, kv_heads, groups, head_dim)
        .permute(0, 2, 3, 1, 4)
        .reshape(rows * kv_heads, groups * queries, head_dim)
    )
    keys = part.keys.flatten(0, 1).transpose(1, 2)
    values = part.values.flatten(0, 1)
    bias = mask.bias(part.queries.dtype, kv_heads, groups)
    if softcap is None:
        scores = torch.baddbmm(bias, grouped_queries, keys, alpha=scale)
    else:
        scores = bias + softcap * torch.tanh(torch.bmm(grouped_queries, keys) * (scale / softcap))
    output = torch.bmm(scores.softmax(-1), values)
    # Values may be of another size than keys (latent attention).
    output = output.view(rows, kv_heads, groups, queries, -1).permute(0, 3, 1, 2, 4)
    return output.reshape(rows, queries, heads, values.shape[-1])


def _fused_attention(part: AttentionPart, mask: AttentionMask, scale: float, softcap: float | None) -> Tensor:
    """torch's scaled_dot_product_attention, which on accelerators keeps no scores: [N, Q, heads, head_dim]."""
    if softcap is not None:
        raise Unpackable("its attention caps scores, which the fused kernel cannot do")
    # A query that sees nothing is padding; it may see everything.
    allowed = mask.allowed | ~mask.allowed.any(-1, keepdim=True)
    output = functional.scaled_dot_product_attention(
        part.queries.transpose(1, 2),
        part.keys,
        part.values,
        attn_mask=allowed,
        scale=scale,
        enable_gqa=part.keys.shape[1] != part.queries.shape[2],
    )
    return output.transpose(1, 2)


ATTENTION_NAMES = {"math": "softprompts_packed", "fused": "softprompts_packed_fused"}
"""Kernels for packed rows, and the names by which transformers knows them."""

ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAMES["math"], _attention_function(_math_attention))
ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAMES["fused"], _attention_function(_fused_attention))
