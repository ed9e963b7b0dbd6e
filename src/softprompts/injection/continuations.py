"""Log-probabilities of several continuations of each text, from one pass where rows can be packed.

The text is read once. Behind it stand the candidates, each seeing the text and itself only; what two candidates have
in common at their beginning is read once where one of them goes on from it. The last token of a candidate is never
read, only scored, so candidates of one token cost nothing beyond the text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from softprompts.backbone import CAUSAL, Backbone
from softprompts.errors import BackboneError
from softprompts.injection.forward import TrunkOutput, choose_path, run_trunk
from softprompts.injection.packed import Prefix, why_not_packed
from softprompts.injection.placement import place_prompts
from softprompts.injection.scoring import MAX_LOGITS, apply_head, score
from softprompts.injection.sites import Site, prompt_width
from softprompts.types import IGNORE, Batch, Prompt

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class CandidateTree:
    """Candidates as chains of tokens to read, and what is scored where.

    ids, branch [K]: the tokens to read and the number of their chain, from 1; depth [K] of each within its chain;
    scored: what is scored after the text (first) and after each of those K tokens, [1 + K, M] padded with 0;
    parts: of each candidate, the flat places in `scored` of its tokens.
    """

    token_ids: Tensor
    branches: Tensor
    depths: Tensor
    scored_ids: Tensor
    score_indices: tuple[tuple[int, ...], ...]


def candidate_tree(candidates: Sequence[Sequence[int]]) -> CandidateTree:
    """Lay `candidates` out as chains. Raises ValueError for none, and for one without tokens."""
    if not candidates or not all(candidates):
        raise ValueError(f"candidates must be lists of at least one token, given {[list(c) for c in candidates]}")
    begun = {tuple(c[:-1]) for c in candidates}
    # A beginning that another one goes on from is read there.
    chains = [b for b in sorted(begun) if b and not any(o != b and o[: len(b)] == b for o in begun)]
    node: dict[Tokens, int] = {(): 0}
    read_ids: list[tuple[int, int, int]] = []
    for number, chain in enumerate(chains, 1):
        for depth, token in enumerate(chain):
            read_ids.append((token, number, depth))
            node.setdefault(chain[: depth + 1], len(read_ids))
    wanted: list[list[int]] = [[] for _ in range(1 + len(read_ids))]
    places: list[list[tuple[int, int]]] = []
    for candidate in candidates:
        places.append([])
        for i, token in enumerate(candidate):
            at = node[tuple(candidate[:i])]
            if token not in wanted[at]:
                wanted[at].append(token)
            places[-1].append((at, wanted[at].index(token)))
    size = max(map(len, wanted))
    ids, branch, depth = torch.tensor(read_ids, dtype=torch.long).reshape(-1, 3).T
    scored = torch.tensor([[*row, *[0] * (size - len(row))] for row in wanted])
    parts = tuple(tuple(at * size + m for at, m in row) for row in places)
    return CandidateTree(ids, branch, depth, scored, parts)


def score_continuations(
    backbone: Backbone,
    batch: Batch,
    prompt: Prompt | None,
    site: Site,
    candidates: Sequence[Sequence[int]],
    *,
    path: str | None = None,
    prefix: Prefix | None = None,
) -> Tensor:
    """The log-probability of each of `candidates` (token ids) behind each row's text: [B, C] in float64.

    For language models of the causal family. Each token's is a log-softmax in float32 (float64 in such models); they
    are added in float64. Arguments as for `forward`; labels of `batch` are ignored. Where nothing stands before a
    candidate (an empty text without a prompt, or at site kv), its first token has no score and adds nothing.
    Raises ValueError for no candidates or an empty one, BackboneError for other models and as `forward` does.
    """
    if backbone.family is not CAUSAL or backbone.head != "lm":
        raise BackboneError(
            f"continuations need a causal language model, not head '{backbone.head}' of a {backbone.family.name} model"
        )
    tree = candidate_tree(candidates)
    batch = replace(batch, labels=None)
    if prompt is None:
        batch = replace(batch, prompt_offsets=None, segment_lengths=None)
    if prompt is None and path is None and backbone.kernels.path == "packed" and why_not_packed(backbone) is None:
        site, prompt = _nothing(backbone, batch)
    batch = place_prompts(backbone, batch, site, prompt)  # by the text alone, before candidates stand behind it
    chosen, _ = choose_path(backbone, batch, prompt, site, path, prefix)
    with backbone.with_kernels():  # the head too
        if chosen == "packed":
            assert prompt is not None
            return _branched(backbone, batch, prompt, site, tree, path, prefix)
        return _one_by_one(backbone, batch, prompt, site, candidates, path, prefix)


def _nothing(backbone: Backbone, batch: Batch) -> tuple[Site, Prompt]:
    """No prompt as one of no tokens, behind which rows can be packed as behind others."""
    site, row = Site("kv"), torch.zeros(len(batch.input_ids), dtype=torch.long, device=batch.input_ids.device)
    values = torch.zeros(1, 0, prompt_width(backbone, site), device=row.device)
    return site, Prompt(values, torch.ones(1, 0, dtype=torch.bool, device=row.device), row)


def _branched(
    backbone: Backbone,
    batch: Batch,
    prompt: Prompt,
    site: Site,
    tree: CandidateTree,
    path: str | None,
    prefix: Prefix | None,
) -> Tensor:
    """All candidates of all rows in one pass of packed rows."""
    size = batch.input_ids.shape[1]
    if not len(tree.token_ids) and not bool(batch.attention_mask.any()):
        # A pass needs a token: one that nobody looks at.
        one = torch.zeros(1, dtype=torch.long)
        tree = replace(tree, ids=one, branch=one + 1, depth=one, scored=tree.scored_ids.repeat(2, 1))
    whole = _extended(backbone, batch, tree.token_ids, tree.depths)
    chain = tree.branches.to(batch.input_ids.device).expand(len(batch.input_ids), -1)
    branch = torch.cat([torch.zeros_like(batch.input_ids), chain], 1)

    def wanted(order: Tensor, mask: Tensor) -> Tensor:
        texts = ((order < size) & mask).sum(1, keepdim=True)
        columns = torch.arange(order.shape[1], device=order.device)
        return mask & (columns >= texts - 1)

    reading = run_trunk(backbone, whole, prompt, site, path=path, prefix=prefix, wanted=wanted, branch=branch)
    texts = batch.attention_mask.bool().sum(1, keepdim=True)
    columns = texts + torch.arange(len(tree.token_ids), device=texts.device)
    places = torch.cat([reading.end_positions[:, None], reading.text_positions.gather(1, columns)], 1)
    states = reading.hidden_states.gather(1, places[..., None].expand(-1, -1, reading.hidden_states.shape[-1]))
    scored = tree.scored_ids.to(states.device)
    chances = _log_probs(backbone, reading, states.flatten(0, 1), scored.repeat(len(states), 1))
    chances = chances.view(len(states), *scored.shape)
    chances[:, 0] = chances[:, 0].where(_has_context(batch, prompt, site)[:, None], 0)
    flat = chances.flatten(1)
    return torch.stack([flat[:, list(part)].sum(1) for part in tree.score_indices], 1)


def _one_by_one(
    backbone: Backbone,
    batch: Batch,
    prompt: Prompt | None,
    site: Site,
    candidates: Sequence[Sequence[int]],
    path: str | None,
    prefix: Prefix | None,
) -> Tensor:
    """All candidates of one token in one pass, each longer one in a pass of its own."""
    device, count = batch.input_ids.device, len(batch.input_ids)
    found = torch.zeros(count, len(candidates), dtype=torch.float64, device=device)
    single = [i for i, candidate in enumerate(candidates) if len(candidate) == 1]
    preceded = _has_context(batch, prompt, site)
    if single and bool(preceded.any()):
        empty = not bool(batch.attention_mask.any())
        # A pass needs a token: one that nobody looks at.
        asked = _extended(backbone, batch, torch.zeros(1, dtype=torch.long)) if empty else batch
        reading = run_trunk(backbone, asked, prompt, site, path=path, prefix=prefix)
        states = reading.hidden_states[
            torch.arange(count, device=device), (reading.end_positions - int(empty)).clamp(min=0)
        ]
        tokens = torch.tensor([candidates[i][0] for i in single], device=states.device)
        chances = _log_probs(backbone, reading, states, tokens.expand(count, -1))
        found[:, single] = chances.where(preceded[:, None], 0)
    for i, candidate in enumerate(candidates):
        if len(candidate) > 1:
            whole = _extended(backbone, batch, torch.tensor(candidate))
            labels = whole.input_ids.clone()
            labels[:, : batch.input_ids.shape[1]] = IGNORE
            output = score(
                backbone, replace(whole, labels=labels), prompt, site, path=path, prefix=prefix, return_logits=False
            )
            assert output.nll is not None
            found[:, i] = found[:, i].index_add(0, output.batch_rows, -output.nll.double())
    return found


def _has_context(batch: Batch, prompt: Prompt | None, site: Site) -> Tensor:
    """Whether something stands before each row's candidates, so that their first token has a score: [B]."""
    texts = batch.attention_mask.bool().any(1)
    return texts if prompt is None or site.name == "kv" else texts | (prompt.lengths[prompt.prompt_index] > 0)


def _extended(backbone: Backbone, batch: Batch, tokens: Tensor, depth: Tensor | None = None) -> Batch:
    """`batch` with `tokens` [K] behind the columns of each row; depth [K]: how far behind the text, None: counted."""
    tokens = tokens.to(batch.input_ids.device).expand(len(batch.input_ids), -1)
    there = batch.attention_mask.bool()
    whole = replace(
        batch,
        input_ids=torch.cat([batch.input_ids, tokens], 1),
        attention_mask=torch.cat([there, torch.ones_like(tokens, dtype=torch.bool)], 1),
        token_type_ids=None,
    )
    if batch.inputs_embeds is not None:
        whole = replace(
            whole,
            inputs_embeds=torch.cat([batch.inputs_embeds, backbone.embed(tokens).to(batch.inputs_embeds.dtype)], 1),
        )
    if batch.position_ids is not None:
        depth = torch.arange(tokens.shape[1]) if depth is None else depth
        columns = torch.arange(there.shape[1], device=there.device)
        last = columns.where(there, -1).max(1, keepdim=True).values
        before = batch.position_ids.gather(1, last.clamp(min=0)).where(last >= 0, -1)
        whole = replace(whole, position_ids=torch.cat([batch.position_ids, before + 1 + depth.to(there.device)], 1))
    return whole


def _log_probs(backbone: Backbone, reading: TrunkOutput, states: Tensor, tokens: Tensor) -> Tensor:
    """The log-probability of `tokens` [N, M] at `states` [N, H], in float64, some rows of scores at a time."""
    size = max(1, MAX_LOGITS // backbone.vocab_size)
    found = []
    for part, wanted in zip(states.split(size), tokens.split(size), strict=True):
        scores = apply_head(backbone, reading, part[None])[0]
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).log_softmax(-1)
        found.append(scores.gather(1, wanted.to(scores.device)).double())
    return torch.cat(found)
