"""One pass over all rows without padding, the distinct prompts in front; see attention.py for how it is taken apart.

The work of a step is that of U*P + (sum of texts) tokens. Prompts may also be given as keys and values (site kv, or a
prefix that was computed before); then it is that of the texts alone.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer

from softprompts.backbone import Backbone
from softprompts.injection.encoder_decoder import check_room
from softprompts.injection.packed_attention import (
    FAR,
    Packing,
    Places,
    TokenGroup,
    Unpackable,
    last_layer,
    packed_attention,
)
from softprompts.injection.sites import Site, inject_at_layers, split_by_layer, split_keys_values
from softprompts.types import Batch, Prompt


@dataclass(frozen=True)
class Prefix:
    """The U distinct prompts of a causal model, read once: each layer's keys and values [U, heads, P, d].

    last [U, H]: the state that scores the first text token; None at site kv, where no prompt token is read;
    cache: for path "shared" transformers' cache of the U prompts, in which case there are no `layers`.
    """

    keys_values: tuple[tuple[Tensor, Tensor], ...]
    mask: Tensor
    last_state: Tensor | None
    cache: Any = None

    @property
    def path(self) -> str:
        """The path that goes on from here."""
        return "packed" if self.cache is None else "shared"


@dataclass(frozen=True)
class Packed:
    """States of one pass: prompts' last [U, H] (None at site kv) and texts [B, T, H], zero where not asked for.

    spread: from a layer's states [1, tokens, H] to its texts' [B, T, H].
    """

    last: Tensor | None
    texts: Tensor | None
    output: Any
    spread: Callable[[Tensor], Tensor]


def why_not_packed(backbone: Backbone) -> str | None:
    """None where this model's rows can be packed; else the reason. Found out once, by trying it on a few tokens."""
    if "packed" not in backbone.facts:
        backbone.facts["packed"] = _find_out(backbone)
    found: str | None = backbone.facts["packed"]
    return found


def _find_out(backbone: Backbone) -> str | None:
    name = type(backbone.model).__name__
    if backbone.no_cache_reason:
        return backbone.no_cache_reason
    if not backbone.model._can_set_attn_implementation() or "position_ids" not in backbone.trunk_arguments:
        return f"{name} has an attention of its own kind"
    if len({parameter.device for parameter in backbone.model.parameters()}) > 1:
        return "the model's parts lie on several devices"
    ids = (torch.arange(12, device=backbone.device) * 7 + 3) % backbone.vocab_size
    mask = torch.ones(2, 4, dtype=torch.long, device=backbone.device)
    mask[1, 2:] = 0
    with torch.no_grad():
        values = backbone.embed(ids[8:])[None].float()
        batch = Batch(ids[:8].view(2, 4), mask.bool(), mask[:, 0], inputs_embeds=backbone.embed(ids[:8].view(2, 4)))
        prompt = Prompt(values, mask[:1].bool() | True, torch.zeros_like(mask[:, 0]))
        stock = []
        for i, length in enumerate((4, 2)):
            row = torch.cat([prompt.values[0].to(backbone.dtype), backbone.embed(batch.input_ids[i, :length])])
            stock.append(backbone.trunk(inputs_embeds=row[None], use_cache=False).last_hidden_state[0, 4:])
        reason = _differs(backbone, batch, prompt, torch.cat(stock), None)
        if reason is not None:
            return f"{name} {reason}"
        # Where the last layer cannot be run for some tokens only, it is run for all.
        ends = batch.attention_mask & ~torch.nn.functional.pad(batch.attention_mask[:, 1:], (0, 1))
        short = _differs(backbone, batch, prompt, torch.stack([states[-1] for states in stock]), ends)
        backbone.facts["trimmed"] = short is None
    return None


def _differs(backbone: Backbone, batch: Batch, prompt: Prompt, stock: Tensor, wanted: Tensor | None) -> str | None:
    """How packed rows fall short of the stock model's states of the wanted tokens [N, H]; None where they do not."""
    try:
        texts = run_packed(backbone, batch, prompt, Site(), wanted=wanted).texts
    except torch.OutOfMemoryError:
        raise
    except Unpackable as error:
        return f"cannot pack rows: {error}"
    except Exception as error:  # whatever a model of its own kind makes of it: the other paths are there
        return f"fails with packed rows ({type(error).__name__}: {error})"
    assert texts is not None
    found = texts[batch.attention_mask if wanted is None else wanted]
    far = (found - stock).float().norm() / stock.float().norm()
    return (
        None if far < min(20 * torch.finfo(backbone.dtype).eps ** 0.75, 0.15) else "gives other states with packed rows"
    )


def run_packed(
    backbone: Backbone,
    batch: Batch,
    prompt: Prompt,
    site: Site,
    *,
    prefix: Prefix | None = None,
    wanted: Tensor | None = None,
    branch: Tensor | None = None,
) -> Packed:
    """Run the trunk over `batch` (packed to the right: mask [B, T], embeds) with `prompt` at `site`.

    prefix: the prompts, read before; wanted [B, T]: the text tokens whose last states are needed (None: all);
    branch [B, T]: 0 for text, c for the c-th continuation behind it (see Places).
    Raises Unpackable where the model's attention cannot do it.
    """
    assert batch.inputs_embeds is not None
    if prefix is None and site.name == "kv":
        layers = tuple((k, v) for k, v in split_keys_values(prompt.values, backbone))
        prefix = Prefix(layers, prompt.mask.bool(), None)
    inside = prompt if prefix is None else None
    texts = _texts(batch.attention_mask, branch)
    front = None if inside is None else _prompts(inside)
    packing = Packing(
        front,
        texts,
        prompt.prompt_index,
        _prompt_places(prompt.mask),
        sliding(backbone),
        given=None if prefix is None else prefix.keys_values,
    )
    text = batch.inputs_embeds.flatten(0, 1)[texts.inverse]
    ids = _positions(batch, prompt, branch)[texts.inverse]
    output = _pass(backbone, packing, inside, site, text, ids, wanted)
    states = output.last_hidden_state[0]
    own = 0 if front is None else len(front.inverse)
    last = prefix.last_state if prefix is not None else None
    if front is not None:
        last = states[:own].index_select(0, front.index[:, -1])

    def spread(states: Tensor) -> Tensor:
        return texts.spread(states[0, own:, None])[:, :, 0]

    return Packed(last, spread(output.last_hidden_state), output, spread)


def packed_prefix(backbone: Backbone, prompt: Prompt, site: Site) -> Prefix:
    """The prompts of `prompt` read once, to be reused for any number of texts."""
    if site.name == "kv":
        return Prefix(tuple(split_keys_values(prompt.values, backbone)), prompt.mask.bool(), None)
    front = _prompts(prompt)
    packing = Packing(front, None, prompt.prompt_index, _prompt_places(prompt.mask), sliding(backbone), keep=True)
    text = prompt.values.new_zeros(0, backbone.embedding_size).to(backbone.dtype)
    with backbone.with_kernels():
        output = _pass(backbone, packing, prompt, site, text, prompt.prompt_index.new_zeros(0), None)
    layers = tuple(packing.kept[i] for i in range(len(packing.sliding)))
    return Prefix(layers, prompt.mask.bool(), output.last_hidden_state[0].index_select(0, front.index[:, -1]))


def sliding(backbone: Backbone) -> tuple[int | None, ...]:
    """The window that each layer looks through; None where it sees everything."""
    layers = backbone.new_cache().layers
    return tuple(layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None for layer in layers)


def _pass(
    backbone: Backbone,
    packing: Packing,
    prompt: Prompt | None,
    site: Site,
    text: Tensor,
    ids: Tensor,
    wanted: Tensor | None,
) -> Any:
    """The trunk's output over packed prompts and `text [tokens, H]`, whose positions are `ids [tokens]`."""
    deep: Any = contextlib.nullcontext()
    embeds, positions = text, ids
    if prompt is not None:
        assert packing.prompts is not None
        chosen = packing.prompts.inverse
        values = prompt.values
        if site.name == "layers":
            values = split_by_layer(values, backbone)[0]
            slots = torch.cat([chosen, torch.full((len(text),), -1, device=chosen.device)])[None]
            one = Prompt(prompt.values.flatten(0, 1)[None], prompt.mask.flatten()[None], chosen.new_zeros(1))
            deep = inject_at_layers(backbone, one, slots, site.mode)
        embeds = torch.cat([values.flatten(0, 1)[chosen].to(text.dtype), text])
        own = (prompt.mask.long().cumsum(1) - 1).flatten()[chosen]
        positions = torch.cat([own, ids])
    with (
        packed_attention(backbone.model, packing, backbone.kernels.packed_attention),
        deep,
        _trim(backbone, packing, wanted),
    ):
        output = backbone.trunk(inputs_embeds=embeds[None], position_ids=positions[None], use_cache=False)
    if sorted(packing.called) != list(range(len(packing.sliding))):
        raise Unpackable(f"{len(packing.called)} of {len(packing.sliding)} layers attend through transformers' switch")
    return output


@contextlib.contextmanager
def _trim(backbone: Backbone, packing: Packing, wanted: Tensor | None) -> Iterator[None]:
    """Inside, the last layer computes only the prompts' last tokens and the wanted text tokens [B, T]."""
    trim = wanted is not None and backbone.kernels.trim_last_layer and backbone.facts.get("trimmed", True)
    if wanted is None or packing.texts is None or not trim or bool(wanted[packing.texts.mask].all()):
        yield
        return
    front, texts = packing.prompts, packing.texts
    ends, own = None, 0
    keep = texts.index.flatten()[_flat(wanted)]
    if front is not None:
        own = len(front.inverse)
        last = front.places
        ends = _token_group(torch.ones_like(front.mask[:, -1:]), Places(last.at[:, -1:], last.branch[:, -1:]))
        keep = torch.cat([front.index[:, -1], keep + own])
    columns = wanted.long().argsort(dim=1, descending=True, stable=True)[:, : int(wanted.sum(1).max())]
    chosen = Places(texts.places.at.gather(1, columns), texts.places.branch.gather(1, columns))
    asked = _token_group(wanted.gather(1, columns), chosen)
    with last_layer(backbone.layers[-1], packing, (ends, asked), keep):
        yield


def _flat(mask: Tensor) -> Tensor:
    """Flat places of the true entries of `mask` [N, K], row by row."""
    return mask.flatten().nonzero()[:, 0]


def _token_group(mask: Tensor, places: Places) -> TokenGroup:
    """The group of tokens where `mask [N, K]` is true, packed row by row."""
    inverse = _flat(mask)
    index = mask.new_zeros(mask.numel(), dtype=torch.long)
    index[inverse] = torch.arange(len(inverse), device=mask.device)
    return TokenGroup(index.view(mask.shape), inverse, mask.bool(), places, len(inverse) == mask.numel())


def _prompt_places(mask: Tensor) -> Places:
    """Prompt tokens stand at -P..-1, whatever their number; mask [U, P]."""
    at = torch.arange(-mask.shape[1], 0, device=mask.device).expand(mask.shape)
    return Places(at.where(mask.bool(), FAR), torch.zeros_like(at))


def _prompts(prompt: Prompt) -> TokenGroup:
    return _token_group(prompt.mask.bool(), _prompt_places(prompt.mask))


def _texts(mask: Tensor, branch: Tensor | None) -> TokenGroup:
    mask = mask.bool()
    at = _depth(mask, branch)
    return _token_group(mask, Places(at.where(mask, FAR), torch.zeros_like(at) if branch is None else branch))


def _depth(mask: Tensor, branch: Tensor | None) -> Tensor:
    """How many tokens of its row stand before each token [B, T], those of other continuations not counted."""
    at = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    if branch is None:
        return at
    length = (mask & (branch == 0)).sum(1, keepdim=True)
    # A continuation's tokens stand together, so it begins where the number changes.
    begins = torch.nn.functional.pad(branch.diff(dim=1) != 0, (1, 0), value=True)
    return at.where(branch == 0, length + at - at.where(begins, 0).cummax(1).values)


def check_depth(backbone: Backbone, mask: Tensor, branch: Tensor, prompt: Prompt | None) -> None:
    """As `check_room`, for texts with continuations: these stand beside each other, not behind each other."""
    deepest = _depth(mask, branch).where(mask, -1).max(1, keepdim=True).values
    columns = torch.arange(int(deepest.max()) + 1, device=mask.device)
    check_room(backbone, columns <= deepest, prompt)


def _positions(batch: Batch, prompt: Prompt, branch: Tensor | None) -> Tensor:
    """Positions [B * T] of the text: behind the prompt, counted or as the caller gives them."""
    own = _depth(batch.attention_mask.bool(), branch) if batch.position_ids is None else batch.position_ids
    return (own + prompt.lengths[prompt.prompt_index][:, None]).flatten()
