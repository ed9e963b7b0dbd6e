"""One pass over all rows without padding, the distinct prompts in front; `packed_attention` takes it apart.

The work of a step is that of U*P + (sum of texts) tokens. Where the prompts are keys and values (site kv, or a prefix
that was computed before), it is that of the texts alone.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softprompts.backbone import Backbone
from softprompts.backbone.cache import window_sizes
from softprompts.injection.layout import check_room
from softprompts.injection.packed_attention import (
    UNREACHABLE,
    Packing,
    TokenGroup,
    TokenPositions,
    Unpackable,
    trim_layer,
    use_packed_attention,
)
from softprompts.injection.sites import Site, inject_at_layers, split_by_layer, split_keys_values
from softprompts.types import Batch, Prompt


@dataclass(frozen=True)
class Prefix:
    """The U distinct prompts of a causal model, computed once and reused for any number of batches.

    Attributes:
        keys_values: Each layer's keys and values [U, heads, P, head_dim]; empty where `cache` holds them.
        mask: [U, P], false where a short prompt is padded.
        last_state: [U, H], the state that scores the first text token; None at site kv, where no prompt token is run.
        cache: transformers' cache of the U prompts, for path `shared`.
    """

    keys_values: tuple[tuple[Tensor, Tensor], ...]
    mask: Tensor
    last_state: Tensor | None
    cache: Any = None

    @property
    def path(self) -> str:
        """The path that continues from here."""
        return "packed" if self.cache is None else "shared"


@dataclass(frozen=True)
class PackedOutput:
    """The states of one packed pass.

    Attributes:
        prompt_states: [U, H], the last state of each prompt; None at site kv.
        text_states: [B, T, H] of texts at the left edge, zero for tokens that were not needed.
        output: The trunk's own output.
        unpack_texts: From any layer's states [1, tokens, H] to those of the texts [B, T, H].
    """

    prompt_states: Tensor | None
    text_states: Tensor
    output: Any
    unpack_texts: Callable[[Tensor], Tensor]


def why_not_packed(backbone: Backbone) -> str | None:
    """None where this model's rows can be packed; else the reason. A trial on a few tokens decides, once a model."""
    if "packed" not in backbone.facts:
        backbone.facts["packed"] = _try_packing(backbone)
    reason: str | None = backbone.facts["packed"]
    return reason


def _try_packing(backbone: Backbone) -> str | None:
    """Run two short rows packed and apart, and remember also whether the last layer can be trimmed."""
    name = type(backbone.model).__name__
    if backbone.no_cache_reason:
        return backbone.no_cache_reason
    if not backbone.model._can_set_attn_implementation() or "position_ids" not in backbone.trunk_arguments:
        return f"{name} uses another kind of attention"
    if len({parameter.device for parameter in backbone.model.parameters()}) > 1:
        return "the model's parts lie on several devices"
    ids = (torch.arange(12, device=backbone.device) * 7 + 3) % backbone.vocab_size
    text_ids = ids[:8].view(2, 4)
    text_mask = torch.ones(2, 4, dtype=torch.bool, device=backbone.device)
    text_mask[1, 2:] = False
    first_prompt = torch.zeros(2, dtype=torch.long, device=backbone.device)
    with torch.no_grad():
        batch = Batch(text_ids, text_mask, first_prompt, inputs_embeds=backbone.embed(text_ids))
        values = backbone.embed(ids[8:])[None].float()
        prompt = Prompt(values, torch.ones_like(values[..., 0], dtype=torch.bool), first_prompt)
        stock_states = []
        for row, length in enumerate((4, 2)):
            text = backbone.embed(text_ids[row, :length])
            embeddings = torch.cat([values[0].to(backbone.dtype), text])[None]
            stock_states.append(backbone.trunk(inputs_embeds=embeddings, use_cache=False).last_hidden_state[0, 4:])
        reason = _why_states_differ(backbone, batch, prompt, torch.cat(stock_states), None)
        if reason is not None:
            return f"{name} {reason}"
        # Where the last layer cannot run for some tokens only, it runs for all.
        is_last_token = text_mask & ~torch.nn.functional.pad(text_mask[:, 1:], (0, 1))
        last_states = torch.stack([states[-1] for states in stock_states])
        reason = _why_states_differ(backbone, batch, prompt, last_states, is_last_token)
        backbone.facts["trimmed"] = reason is None
    return None


def _why_states_differ(
    backbone: Backbone, batch: Batch, prompt: Prompt, stock_states: Tensor, needed_tokens: Tensor | None
) -> str | None:
    """How packed rows fall short of the stock model's states [N, H] of the needed tokens; None where they do not."""
    try:
        text_states = run_packed(backbone, batch, prompt, Site(), needed_tokens=needed_tokens).text_states
    except torch.OutOfMemoryError:
        raise
    except Unpackable as error:
        return f"cannot pack rows: {error}"
    except Exception as error:  # any model's own code runs here; the other paths remain
        return f"fails with packed rows ({type(error).__name__}: {error})"
    packed_states = text_states[batch.attention_mask if needed_tokens is None else needed_tokens]
    distance = (packed_states - stock_states).float().norm() / stock_states.float().norm()
    tolerance = min(20 * torch.finfo(backbone.dtype).eps ** 0.75, 0.15)
    return None if distance < tolerance else "gives other states with packed rows"


def run_packed(
    backbone: Backbone,
    batch: Batch,
    prompt: Prompt,
    site: Site,
    *,
    prefix: Prefix | None = None,
    needed_tokens: Tensor | None = None,
    branches: Tensor | None = None,
) -> PackedOutput:
    """Run the trunk over the texts of `batch` with `prompt` at `site`, all rows in one sequence.

    Args:
        backbone: A causal model.
        batch: Texts at the left edge: attention_mask [B, T] and inputs_embeds [B, T, H].
        prompt: The prompts of the rows.
        site: Where they enter.
        prefix: The prompts, computed before.
        needed_tokens: [B, T], the text tokens whose last states are needed; None: all.
        branches: [B, T], 0 for text, c for the c-th continuation behind it.

    Raises:
        Unpackable: The model's attention cannot do it.
    """
    assert batch.inputs_embeds is not None
    if prefix is None and site.in_cache:
        prefix = packed_prefix(backbone, prompt, site)
    text_group = _group_texts(batch.attention_mask, branches)
    prompt_group = _group_prompts(prompt) if prefix is None else None
    packing = Packing(
        prompts=prompt_group,
        texts=text_group,
        prompt_index=prompt.prompt_index,
        prompt_positions=_prompt_positions(prompt.mask),
        windows=layer_windows(backbone),
        prefix_keys_values=None if prefix is None else prefix.keys_values,
    )
    with _packed_pass(
        backbone,
        packing,
        prompt if prefix is None else None,
        site,
        text_embeddings=batch.inputs_embeds.flatten(0, 1)[text_group.padded_index],
        text_position_ids=_text_position_ids(batch, prompt, branches)[text_group.padded_index],
        needed_tokens=needed_tokens,
    ) as arguments:
        output = backbone.trunk(**arguments)
    if prompt_group is None:
        prompt_tokens = 0
        prompt_states = None if prefix is None else prefix.last_state
    else:
        prompt_tokens = len(prompt_group)
        packed_states = output.last_hidden_state[0][:prompt_tokens]
        prompt_states = packed_states.index_select(0, prompt_group.packed_index[:, -1])

    def unpack_texts(states: Tensor) -> Tensor:
        return text_group.pad(states[0, prompt_tokens:, None])[:, :, 0]

    return PackedOutput(prompt_states, unpack_texts(output.last_hidden_state), output, unpack_texts)


def packed_prefix(backbone: Backbone, prompt: Prompt, site: Site) -> Prefix:
    """The distinct prompts computed once, for any number of packed batches."""
    if site.in_cache:
        return Prefix(tuple(split_keys_values(prompt.values, backbone)), prompt.mask.bool(), None)
    prompt_group = _group_prompts(prompt)
    packing = Packing(
        prompts=prompt_group,
        texts=None,
        prompt_index=prompt.prompt_index,
        prompt_positions=prompt_group.positions,
        windows=layer_windows(backbone),
        records_prompts=True,
    )
    packed_pass = _packed_pass(
        backbone,
        packing,
        prompt,
        site,
        text_embeddings=prompt.values.new_zeros(0, backbone.embedding_size).to(backbone.dtype),
        text_position_ids=prompt.prompt_index.new_zeros(0),
        needed_tokens=None,
    )
    with backbone.with_kernels(), packed_pass as arguments:
        output = backbone.trunk(**arguments)
    keys_values = tuple(packing.prompt_keys_values[layer] for layer in range(len(packing.windows)))
    last_state = output.last_hidden_state[0].index_select(0, prompt_group.packed_index[:, -1])
    return Prefix(keys_values, prompt.mask.bool(), last_state)


def layer_windows(backbone: Backbone) -> tuple[int | None, ...]:
    """The window that each layer looks through; None where it sees everything."""
    return window_sizes(backbone.new_cache())


@contextlib.contextmanager
def _packed_pass(
    backbone: Backbone,
    packing: Packing,
    prompt: Prompt | None,
    site: Site,
    *,
    text_embeddings: Tensor,
    text_position_ids: Tensor,
    needed_tokens: Tensor | None,
) -> Iterator[dict[str, Any]]:
    """Inside, the trunk runs over packed prompts and texts.

    Args:
        backbone: A causal model.
        packing: What its attention sees.
        prompt: The prompts that run in front of the texts; None where a prefix replaces them.
        site: Where they enter.
        text_embeddings: [tokens, H].
        text_position_ids: [tokens].
        needed_tokens: [B, T], the text tokens whose last states are needed; None: all.

    Yields:
        The arguments of the trunk.

    Raises:
        Unpackable: A layer has not attended to the packing.
    """
    inject_prompt: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    embeddings = text_embeddings
    position_ids = text_position_ids
    if prompt is not None:
        assert packing.prompts is not None
        slots = packing.prompts.padded_index
        values = prompt.values
        if site.in_layers:
            values = split_by_layer(values, backbone)[0]
            inject_prompt = _inject_at_packed_layers(backbone, prompt, site, slots, len(text_embeddings))
        embeddings = torch.cat([values.flatten(0, 1)[slots].to(text_embeddings.dtype), text_embeddings])
        prompt_position_ids = (prompt.mask.long().cumsum(1) - 1).flatten()[slots]
        position_ids = torch.cat([prompt_position_ids, text_position_ids])
    attention = use_packed_attention(backbone.model, packing, backbone.kernels.packed_attention)
    with attention, inject_prompt, _trim_last_layer(backbone, packing, needed_tokens):
        yield {"inputs_embeds": embeddings[None], "position_ids": position_ids[None], "use_cache": False}
    layers = len(packing.windows)
    if sorted(packing.attended_layers) != list(range(layers)):
        raise Unpackable(f"{len(packing.attended_layers)} of {layers} layers attend through transformers' switch")


def _inject_at_packed_layers(
    backbone: Backbone, prompt: Prompt, site: Site, slots: Tensor, text_tokens: int
) -> contextlib.AbstractContextManager[None]:
    """`inject_at_layers` for one packed sequence, in which all distinct prompts are one prompt of U*P tokens."""
    sequence_slots = torch.cat([slots, torch.full((text_tokens,), -1, device=slots.device)])[None]
    joined = Prompt(prompt.values.flatten(0, 1)[None], prompt.mask.flatten()[None], slots.new_zeros(1))
    return inject_at_layers(backbone, joined, sequence_slots, site.mode)


@contextlib.contextmanager
def _trim_last_layer(backbone: Backbone, packing: Packing, needed_tokens: Tensor | None) -> Iterator[None]:
    """Inside, the last layer computes only the prompts' last tokens and the needed text tokens [B, T]."""
    can_trim = backbone.kernels.trim_last_layer and backbone.facts.get("trimmed", True)
    texts = packing.texts
    if needed_tokens is None or texts is None or not can_trim or bool(needed_tokens[texts.mask].all()):
        yield
        return
    prompt_ends = None
    kept_index = texts.packed_index.flatten()[_true_indices(needed_tokens)]
    if packing.prompts is not None:
        prompts = packing.prompts
        end_positions = TokenPositions(prompts.positions.positions[:, -1:], prompts.positions.branches[:, -1:])
        prompt_ends = _token_group(torch.ones_like(prompts.mask[:, -1:]), end_positions)
        kept_index = torch.cat([prompts.packed_index[:, -1], kept_index + len(prompts)])
    most_needed = int(needed_tokens.sum(1).max())
    columns = needed_tokens.long().argsort(dim=1, descending=True, stable=True)[:, :most_needed]
    needed_positions = TokenPositions(
        texts.positions.positions.gather(1, columns), texts.positions.branches.gather(1, columns)
    )
    needed_texts = _token_group(needed_tokens.gather(1, columns), needed_positions)
    with trim_layer(backbone.layers[-1], packing, (prompt_ends, needed_texts), kept_index):
        yield


def _true_indices(mask: Tensor) -> Tensor:
    """Flat indices of the true entries of `mask` [N, K], row by row."""
    return mask.flatten().nonzero()[:, 0]


def _token_group(mask: Tensor, positions: TokenPositions) -> TokenGroup:
    """The group of tokens where `mask [N, K]` is true, packed row by row."""
    padded_index = _true_indices(mask)
    packed_index = mask.new_zeros(mask.numel(), dtype=torch.long)
    packed_index[padded_index] = torch.arange(len(padded_index), device=mask.device)
    return TokenGroup(
        packed_index=packed_index.view(mask.shape),
        padded_index=padded_index,
        mask=mask.bool(),
        positions=positions,
        is_full=len(padded_index) == mask.numel(),
    )


def _group_prompts(prompt: Prompt) -> TokenGroup:
    return _token_group(prompt.mask.bool(), _prompt_positions(prompt.mask))


def _prompt_positions(mask: Tensor) -> TokenPositions:
    """Prompt tokens are at -P..-1, whatever their number; mask [U, P]."""
    positions = torch.arange(-mask.shape[1], 0, device=mask.device).expand(mask.shape)
    return TokenPositions(positions.where(mask.bool(), UNREACHABLE), torch.zeros_like(positions))


def _group_texts(mask: Tensor, branches: Tensor | None) -> TokenGroup:
    mask = mask.bool()
    depths = _depths(mask, branches)
    branches = torch.zeros_like(depths) if branches is None else branches
    return _token_group(mask, TokenPositions(depths.where(mask, UNREACHABLE), branches))


def _depths(mask: Tensor, branches: Tensor | None) -> Tensor:
    """How many tokens of its row precede each token [B, T], those of other continuations not counted."""
    columns = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    if branches is None:
        return columns
    text_lengths = (mask & (branches == 0)).sum(1, keepdim=True)
    # The tokens of a continuation are neighbors, so it begins where the number changes.
    begins = torch.nn.functional.pad(branches.diff(dim=1) != 0, (1, 0), value=True)
    branch_starts = columns.where(begins, 0).cummax(1).values
    return columns.where(branches == 0, text_lengths + columns - branch_starts)


def check_branch_room(backbone: Backbone, mask: Tensor, branches: Tensor, prompt: Prompt | None) -> None:
    """As `check_room`, for texts with continuations, which are beside each other and not behind each other."""
    deepest = _depths(mask, branches).where(mask, -1).max(1, keepdim=True).values
    columns = torch.arange(int(deepest.max()) + 1, device=mask.device)
    check_room(backbone, columns <= deepest, prompt)


def _text_position_ids(batch: Batch, prompt: Prompt, branches: Tensor | None) -> Tensor:
    """Positions [B * T] of the text behind the prompt, counted or as the caller gives them."""
    position_ids = batch.position_ids
    if position_ids is None:
        position_ids = _depths(batch.attention_mask.bool(), branches)
    return (position_ids + prompt.lengths[prompt.prompt_index][:, None]).flatten()
