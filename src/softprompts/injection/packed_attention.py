"""Attention over packed rows, as an implementation that transformers' own switch can choose.

All rows of a batch stand behind each other in one sequence, without padding, behind the distinct prompts:
`[prompt 1 | ... | prompt U | text 1 | ... | text B]`. Projections, norms and MLPs see that sequence; only here is it
taken apart again: a prompt attends to itself, a text to its own prompt and itself. Queries that share keys (grouped
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

FAR = 1 << 30
"""The place of a key that nobody may see."""


class Unpackable(Exception):
    """The model's attention needs something that packed rows do not have; the message says what."""


@dataclass(frozen=True)
class Places:
    """Where tokens stand, counted from the beginning of their text; a prompt's are negative.

    at [N, K]: the place, FAR for padding; branch [N, K]: 0 for prompt and text, c for the c-th continuation behind the
    text, which sees the text and itself but no other continuation.
    """

    at: Tensor
    branch: Tensor

    def seen(self, keys: "Places", window: int | None) -> Tensor:
        """Which of `keys` [N, K] each of these queries [N, Q] may see: [N, 1, Q, K]."""
        distance = self.at[:, :, None] - keys.at[:, None, :]
        open_ = (distance >= 0) & ((keys.branch[:, None] == 0) | (keys.branch[:, None] == self.branch[:, :, None]))
        if window is not None:
            open_ &= distance < window
        return open_[:, None]


@dataclass(frozen=True)
class TokenGroup:
    """Rows of equal standing (all prompts, or all texts): how they are cut out of the packed sequence and put back.

    index [N, K] place of each token in the packed part, 0 for padding; inverse [tokens] flat place in [N, K] of each
    packed token; mask [N, K]; places: of the same tokens; full: whether nothing is padding.
    """

    index: Tensor
    inverse: Tensor
    mask: Tensor
    places: Places
    full: bool

    def spread(self, packed: Tensor) -> Tensor:
        """Packed tokens [tokens, h, d] as [N, K, h, d]; padding repeats the first token (zeros where there is none)."""
        if self.full:
            return packed.view(*self.index.shape, *packed.shape[1:])
        if not len(packed):
            return packed.new_zeros(*self.index.shape, *packed.shape[1:])
        return _Spread.apply(packed, self.index, self.inverse)

    def gather(self, padded: Tensor) -> Tensor:
        """The way back: [N, K, h, d] as [tokens, h, d]."""
        if self.full:
            return padded.flatten(0, 1)
        return _Gather.apply(padded, self.index, self.inverse, self.mask)


class _Spread(torch.autograd.Function):
    """Rows by index, whose gradient is a look-up too: every packed token stands in one place."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return packed.index_select(0, index.flatten()).view(*index.shape, *packed.shape[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (inverse,) = ctx.saved_tensors
        return gradients[0].flatten(0, 1).index_select(0, inverse), None, None


class _Gather(torch.autograd.Function):
    """The inverse of `_Spread`; padding gets no gradient."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, index: Tensor, inverse: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(index, mask)
        return padded.flatten(0, 1).index_select(0, inverse)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        index, mask = ctx.saved_tensors
        back = gradients[0].index_select(0, index.flatten()).view(*index.shape, *gradients[0].shape[1:])
        return back.masked_fill_(~mask[..., None, None], 0), None, None, None


@dataclass
class Packing:
    """One pass over packed rows, as the attention sees it.

    prompts: the U prompts where they stand in the sequence (None: their keys and values are given); texts: the B rows,
    None in a pass over prompts alone; row [B]: each text's prompt; prompt_places: of all U prompts; given: each
    layer's keys and values [U, heads, P, d]; sliding: each layer's window, as the cache knows it.
    What a pass leaves behind: `called`, the layers that came here, and with `keep` their prompts' keys and values.
    `asked`: the queries are these groups' tokens alone, and keys and values those `captured` (see `last_layer`).
    """

    prompts: TokenGroup | None
    texts: TokenGroup | None
    row: Tensor
    prompt_places: Places
    sliding: tuple[int | None, ...]
    given: tuple[tuple[Tensor, Tensor], ...] | None = None
    keep: bool = False
    kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    called: list[int] = field(default_factory=list)
    asked: tuple[TokenGroup | None, TokenGroup | None] | None = None
    captured: tuple[Tensor, Tensor] | None = None
    masks: "dict[tuple[str, int | None, bool], Seen]" = field(default_factory=dict)

    def seen(self, which: str, window: int | None, queries: Places, keys: Places) -> "Seen":
        """What these queries see through this window, found once for all layers."""
        key = (which, window, self.captured is not None)
        if key not in self.masks:
            self.masks[key] = Seen(queries.seen(keys, window))
        return self.masks[key]


@dataclass(frozen=True)
class Seen:
    """Which keys each query may see, `allowed` [N, 1, Q, K], and the same in the form that products want."""

    allowed: Tensor
    added: dict[tuple[torch.dtype, int, int], Tensor] = field(default_factory=dict)

    def bias(self, dtype: torch.dtype, heads: int, groups: int) -> Tensor:
        """What is added to scores [N * heads, groups * Q, K]."""
        key = (dtype, heads, groups)  # layers may differ in heads
        if key not in self.added:
            # Not minus infinity: a padded query sees nothing, and must come out as a number.
            low = torch.finfo(dtype).min / 2
            added = torch.zeros_like(self.allowed, dtype=dtype).masked_fill_(~self.allowed, low)
            n, _, q, k = added.shape
            self.added[key] = added[:, :, None].expand(n, heads, groups, q, k).reshape(n * heads, groups * q, k)
        return self.added[key]


class Captured(Exception):
    """Ends the first pass over the last layer once its keys and values are known."""


_current: ContextVar[Packing | None] = ContextVar("softprompts_packing", default=None)
_capturing: ContextVar[bool] = ContextVar("softprompts_capturing", default=False)


@contextlib.contextmanager
def packed_attention(model: PreTrainedModel, packing: Packing, core: str) -> Iterator[None]:
    """Inside, `model` attends as `packing` says, with `core` (a key of CORES); its own attention comes back after."""
    own = model.config._attn_implementation
    token = _current.set(packing)
    again = recompute_context.set(lambda: packed_attention(model, packing, core))
    model.set_attn_implementation(CORES[core])
    try:
        yield
    finally:
        model.set_attn_implementation(own)
        recompute_context.reset(again)
        _current.reset(token)


@contextlib.contextmanager
def last_layer(
    layer: nn.Module, packing: Packing, asked: tuple[TokenGroup | None, TokenGroup | None], keep: Tensor
) -> Iterator[None]:
    """Inside, `layer` computes queries and MLP for the tokens `keep` [K] of the packed sequence alone.

    Its forward runs twice: over all tokens until their keys and values are known, then over those asked for; the
    states of the others come back as zeros. `asked` groups index into `keep`.
    """
    bound = getattr(layer.forward, "plain", layer.forward)  # not one that is computed again: it is ended half-way

    def forward(*args: Any, **kwargs: Any) -> Any:
        size = (args[0] if args else kwargs["hidden_states"]).shape[1]
        capturing = _capturing.set(True)
        try:
            bound(*args, **kwargs)
            raise Unpackable("its last layer has no attention of the usual kind")
        except Captured as found:
            packing.captured, packing.asked = found.args[0], asked
        finally:
            _capturing.reset(capturing)
        try:
            short = bound(*(_cut(a, keep, size) for a in args), **{k: _cut(v, keep, size) for k, v in kwargs.items()})
        finally:
            packing.captured = packing.asked = None
        states = short[0] if isinstance(short, tuple) else short
        whole = states.new_zeros(1, size, states.shape[-1]).index_copy(1, keep, states)
        return (whole, *short[1:]) if isinstance(short, tuple) else whole

    with replace_forwards({layer: forward}):
        yield


def _cut(value: Any, keep: Tensor, size: int) -> Any:
    """Whatever a layer is given, with the tokens `keep` of `size` only."""
    if isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == size:
        return value.index_select(1, keep.to(value.device))
    if isinstance(value, tuple):
        return tuple(_cut(part, keep, size) for part in value)
    return value


def _attention(core: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, None]]:
    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """Attention of one layer: query [1, heads, M, d], key and value [1, kv heads, M, d] -> [1, M, heads, d]."""
        packing = _current.get()
        assert packing is not None, "packed attention outside packed_attention()"
        layer = _check(module, packing, sliding_window, others)
        q, k, v = (t.transpose(1, 2)[0] for t in (query, key, value))  # [M, heads, d]
        if _capturing.get():
            raise Captured((k, v))
        if packing.captured is not None:
            k, v = packing.captured
        packing.called.append(layer)
        scale = q.shape[-1] ** -0.5 if scaling is None else scaling
        out = []
        for which, own, group, keys, values, places in _pieces(packing, layer, q, k, v):
            seen = packing.seen(which, sliding_window, group.places, places)
            out.append(group.gather(core(seen, own, keys, values, scale, softcap)))
        return torch.cat(out)[None] if len(out) > 1 else out[0][None], None

    return attend


def _check(module: nn.Module, packing: Packing, window: int | None, others: dict[str, Any]) -> int:
    """The layer's number; raises Unpackable where its attention wants more, or is not what its cache says.

    Seen on a few tokens, a long window or a small share of attention that goes nowhere would pass for rounding.
    """
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise Unpackable("its attention does not know its layer")
    if packing.sliding[layer] and window is None:
        raise Unpackable("its attention keeps its window to itself")
    if packing.sliding[layer] != window:
        raise Unpackable(f"its attention has a window of {window} tokens and its cache one of {packing.sliding[layer]}")
    if not getattr(module, "is_causal", True):
        raise Unpackable("its attention looks both ways")
    if others.get("s_aux") is not None:
        raise Unpackable("its attention has sinks")
    return int(layer)


def _pieces(packing: Packing, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Iterator[tuple[Any, ...]]:
    """Prompts, then texts: name, queries [N, Q, heads, d] and group, keys, values [N, kv heads, K, d] and places."""
    own = 0 if packing.prompts is None else len(packing.prompts.inverse)
    ask_prompts, ask_texts = packing.asked or (packing.prompts, packing.texts)
    asked = 0 if ask_prompts is None else len(ask_prompts.inverse)
    front: tuple[Tensor, Tensor] | None = None
    if packing.prompts is not None:
        (kp, k), (vp, v) = k.split([own, len(k) - own]), v.split([own, len(v) - own])
        qp, q = q.split([asked, len(q) - asked])
        front = packing.prompts.spread(kp).transpose(1, 2), packing.prompts.spread(vp).transpose(1, 2)
        if packing.keep:
            packing.kept[layer] = front
        if ask_prompts is not None:
            yield "prompt", ask_prompts.spread(qp), ask_prompts, *front, packing.prompt_places
    elif packing.given is not None:
        front = packing.given[layer]
    if packing.texts is None or ask_texts is None or not len(packing.texts.inverse):
        return
    keys, values = packing.texts.spread(k).transpose(1, 2), packing.texts.spread(v).transpose(1, 2)
    places = packing.texts.places
    if front is not None:
        keys, values = (torch.cat([_of_rows(f, packing.row), t], 2) for f, t in zip(front, (keys, values), strict=True))
        own_places = packing.prompt_places
        places = Places(
            torch.cat([own_places.at[packing.row], places.at], 1),
            torch.cat([own_places.branch[packing.row], places.branch], 1),
        )
    yield "text", ask_texts.spread(q), ask_texts, keys, values, places


def _of_rows(front: Tensor, row: Tensor) -> Tensor:
    """A prompt's keys [U, heads, P, d] for each row: [B, heads, P, d]; one prompt for all is not copied."""
    return front.expand(len(row), -1, -1, -1) if len(front) == 1 else front.index_select(0, row)


def _math(seen: Seen, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Two batched products around a softmax; q [N, Q, heads, d], k and v [N, kv heads, K, d] -> [N, Q, heads, d].

    A softmax in half precision is computed in float32 inside and rounded once, as the models' own does.
    """
    n, queries, heads, size = q.shape
    shared = k.shape[1]
    groups = heads // shared
    rows = q.view(n, queries, shared, groups, size).permute(0, 2, 3, 1, 4).reshape(n * shared, groups * queries, size)
    k, v = k.flatten(0, 1), v.flatten(0, 1)
    bias = seen.bias(q.dtype, shared, groups)
    if softcap is None:
        scores = torch.baddbmm(bias, rows, k.transpose(1, 2), alpha=scale)
    else:
        scores = bias + softcap * torch.tanh(torch.bmm(rows, k.transpose(1, 2)) * (scale / softcap))
    out = torch.bmm(scores.softmax(-1), v)
    # Values may be of another size than keys (latent attention).
    return out.view(n, shared, groups, queries, -1).permute(0, 3, 1, 2, 4).reshape(n, queries, heads, v.shape[-1])


def _fused(seen: Seen, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None) -> Tensor:
    """torch's scaled_dot_product_attention, which on accelerators keeps no scores; shapes as for `_math`."""
    if softcap is not None:
        raise Unpackable("its attention caps scores, which the fused kernel cannot do")
    grouped = k.shape[1] != q.shape[2]
    # A query that sees nothing is padding; it may see everything.
    allowed = seen.allowed | ~seen.allowed.any(-1, keepdim=True)
    out = functional.scaled_dot_product_attention(
        q.transpose(1, 2), k, v, attn_mask=allowed, scale=scale, enable_gqa=grouped
    )
    return out.transpose(1, 2)


CORES = {"math": "softprompts_packed", "fused": "softprompts_packed_fused"}
"""Kernels for packed rows, and the names by which transformers knows them."""

ALL_ATTENTION_FUNCTIONS.register(CORES["math"], _attention(_math))
ALL_ATTENTION_FUNCTIONS.register(CORES["fused"], _attention(_fused))
