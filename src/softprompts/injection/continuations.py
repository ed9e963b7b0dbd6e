"""Log-probabilities of several continuations of each text, from one pass where rows can be packed.

The text is read once. The candidates follow it, each of which sees the text and itself only. Where one candidate
begins with all of another, the shared beginning is read once. The last token of a candidate is only scored, never
read, so candidates of one token cost nothing beyond the text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from softprompts.backbone import CAUSAL, Backbone
from softprompts.errors import BackboneError, ConfigError
from softprompts.injection.forward import TrunkOutput, choose_path, run_trunk
from softprompts.injection.packed import Prefix, why_not_packed
from softprompts.injection.placement import place_prompts
from softprompts.injection.scoring import MAX_LOGITS, apply_head, score
from softprompts.injection.sites import Site, prompt_width
from softprompts.types import IGNORE, Batch, Prompt

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class CandidateTree:
    """Candidates as chains of K tokens that the model reads, and the tokens that it scores behind each of them.

    Attributes:
        token_ids: [K], the tokens to read, chain by chain.
        branches: [K], the number of each token's chain, from 1.
        depths: [K], the place of each token within its chain, from 0.
        scored_ids: [1 + K, M], the tokens that are scored after the text (first row) and after each token to read,
            padded with 0.
        score_indices: Of each candidate, the flat indices of its tokens in `scored_ids`.
    """

    token_ids: Tensor
    branches: Tensor
    depths: Tensor
    scored_ids: Tensor
    score_indices: tuple[tuple[int, ...], ...]


def candidate_tree(candidates: Sequence[Sequence[int]]) -> CandidateTree:
    """Lay `candidates` out as chains. Raises ConfigError for none, and for one without tokens."""
    if not candidates or not all(candidates):
        raise ConfigError(f"candidates must be lists of at least one token, given {[list(c) for c in candidates]}")
    row_after: dict[Tokens, int] = {(): 0}  # the row of scored_ids behind each beginning of a candidate
    tokens: list[int] = []
    branches: list[int] = []
    depths: list[int] = []
    for branch, chain in enumerate(_chains(candidates), 1):
        for depth, token in enumerate(chain):
            tokens.append(token)
            branches.append(branch)
            depths.append(depth)
            row_after.setdefault(chain[: depth + 1], len(tokens))
    scored: list[list[int]] = [[] for _ in range(1 + len(tokens))]
    cells: list[list[tuple[int, int]]] = []
    for candidate in candidates:
        candidate_cells = []
        for depth, token in enumerate(candidate):
            row = row_after[tuple(candidate[:depth])]
            if token not in scored[row]:
                scored[row].append(token)
            candidate_cells.append((row, scored[row].index(token)))
        cells.append(candidate_cells)
    width = max(map(len, scored))
    score_indices = []
    for candidate_cells in cells:
        score_indices.append(tuple(row * width + column for row, column in candidate_cells))
    return CandidateTree(
        token_ids=torch.tensor(tokens, dtype=torch.long),
        branches=torch.tensor(branches, dtype=torch.long),
        depths=torch.tensor(depths, dtype=torch.long),
        scored_ids=torch.tensor([row + [0] * (width - len(row)) for row in scored]),
        score_indices=tuple(score_indices),
    )


def _chains(candidates: Sequence[Sequence[int]]) -> list[Tokens]:
    """The tokens to read, all of each candidate but its last, without those with which another chain begins."""
    beginnings = sorted({tuple(candidate[:-1]) for candidate in candidates})
    chains = []
    for beginning in beginnings:
        continued = any(other != beginning and other[: len(beginning)] == beginning for other in beginnings)
        if beginning and not continued:
            chains.append(beginning)
    return chains


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
    """The log-probability of each of C candidates behind each row's text: [B, C] in float64.

    A token's log-probability is a log-softmax in float32 (float64 in such models); sums over tokens are in float64.
    Where nothing precedes a candidate (an empty text without a prompt, or at site kv), its first token adds nothing.

    Args:
        backbone: A causal language model.
        batch: The texts; their labels are ignored.
        prompt: The prompts of the rows; None: the stock model without one.
        site: Where they enter.
        candidates: Token ids of each candidate.
        path: packed, shared or concatenation; None: the best that is possible.
        prefix: The distinct prompts, computed before.

    Raises:
        ConfigError: There is no candidate, or an empty one.
        BackboneError: The model is another one, prompt and text do not fit its positions, or the path is not possible.
    """
    if backbone.family is not CAUSAL or backbone.head != "lm":
        raise BackboneError(
            f"continuations need a causal language model, not head '{backbone.head}' of a {backbone.family.name} model"
        )
    tree = candidate_tree(candidates)
    batch = replace(batch, labels=None)
    if prompt is None:
        batch = replace(batch, prompt_offsets=None, segment_lengths=None)
        if path is None and backbone.kernels.path == "packed" and why_not_packed(backbone) is None:
            site = Site("kv")
            prompt = _empty_prompt(backbone, batch, site)
    batch = place_prompts(backbone, batch, site, prompt)  # by the text alone, before candidates follow it
    chosen_path, _ = choose_path(backbone, batch, prompt, site, path=path, prefix=prefix)
    with backbone.with_kernels():  # the head too
        if chosen_path == "packed":
            assert prompt is not None
            return _score_together(backbone, batch, prompt, site, tree, path=path, prefix=prefix)
        return _score_apart(backbone, batch, prompt, site, candidates, path=path, prefix=prefix)


def _empty_prompt(backbone: Backbone, batch: Batch, site: Site) -> Prompt:
    """One prompt of no tokens, behind which rows without a prompt can be packed as behind others."""
    prompt_index = torch.zeros(len(batch.input_ids), dtype=torch.long, device=batch.input_ids.device)
    values = torch.zeros(1, 0, prompt_width(backbone, site), device=prompt_index.device)
    return Prompt(values, torch.ones(1, 0, dtype=torch.bool, device=prompt_index.device), prompt_index)


def _score_together(
    backbone: Backbone,
    batch: Batch,
    prompt: Prompt,
    site: Site,
    tree: CandidateTree,
    *,
    path: str | None,
    prefix: Prefix | None,
) -> Tensor:
    """All candidates of all rows [B, C] in one pass of packed rows."""
    columns = batch.input_ids.shape[1]
    rows = len(batch.input_ids)
    if not len(tree.token_ids) and not bool(batch.attention_mask.any()):
        # A pass needs a token: one that nobody looks at.
        unread = torch.zeros(1, dtype=torch.long)
        tree = replace(
            tree, token_ids=unread, branches=unread + 1, depths=unread, scored_ids=tree.scored_ids.repeat(2, 1)
        )
    extended = _append_tokens(backbone, batch, tree.token_ids, tree.depths)
    candidate_branches = tree.branches.to(batch.input_ids.device).expand(rows, -1)
    branches = torch.cat([torch.zeros_like(batch.input_ids), candidate_branches], 1)

    def needed_tokens(token_order: Tensor, mask: Tensor) -> Tensor:
        """The last token of each text and all that follows."""
        text_lengths = ((token_order < columns) & mask).sum(1, keepdim=True)
        aligned_columns = torch.arange(token_order.shape[1], device=token_order.device)
        return mask & (aligned_columns >= text_lengths - 1)

    trunk = run_trunk(
        backbone,
        extended,
        prompt,
        site,
        path=path,
        prefix=prefix,
        needed_tokens=needed_tokens,
        branches=branches,
    )
    text_lengths = batch.attention_mask.bool().sum(1, keepdim=True)
    read_columns = text_lengths + torch.arange(len(tree.token_ids), device=text_lengths.device)
    positions = torch.cat([trunk.end_positions[:, None], trunk.text_positions.gather(1, read_columns)], 1)
    states = trunk.hidden_states.gather(1, positions[..., None].expand(-1, -1, trunk.hidden_states.shape[-1]))
    scored_ids = tree.scored_ids.to(states.device)
    log_probs = _log_probs(backbone, trunk, states.flatten(0, 1), scored_ids.repeat(rows, 1))
    log_probs = log_probs.view(rows, *scored_ids.shape)
    log_probs[:, 0] = log_probs[:, 0].where(_has_context(batch, prompt, site)[:, None], 0)
    flat_log_probs = log_probs.flatten(1)
    return torch.stack([flat_log_probs[:, list(indices)].sum(1) for indices in tree.score_indices], 1)


def _score_apart(
    backbone: Backbone,
    batch: Batch,
    prompt: Prompt | None,
    site: Site,
    candidates: Sequence[Sequence[int]],
    *,
    path: str | None,
    prefix: Prefix | None,
) -> Tensor:
    """All candidates of one token in one pass, each longer one in a separate pass: [B, C]."""
    rows = len(batch.input_ids)
    device = batch.input_ids.device
    log_probs = torch.zeros(rows, len(candidates), dtype=torch.float64, device=device)
    single = [index for index, candidate in enumerate(candidates) if len(candidate) == 1]
    has_context = _has_context(batch, prompt, site)
    if single and bool(has_context.any()):
        no_text = not bool(batch.attention_mask.any())
        # A pass needs a token: one that nobody looks at.
        asked = _append_tokens(backbone, batch, torch.zeros(1, dtype=torch.long)) if no_text else batch
        trunk = run_trunk(backbone, asked, prompt, site, path=path, prefix=prefix)
        end_positions = (trunk.end_positions - int(no_text)).clamp(min=0)
        states = trunk.hidden_states[torch.arange(rows, device=device), end_positions]
        tokens = torch.tensor([candidates[index][0] for index in single], device=states.device)
        single_log_probs = _log_probs(backbone, trunk, states, tokens.expand(rows, -1))
        log_probs[:, single] = single_log_probs.where(has_context[:, None], 0)
    for index, candidate in enumerate(candidates):
        if len(candidate) == 1:
            continue
        extended = _append_tokens(backbone, batch, torch.tensor(candidate))
        labels = extended.input_ids.clone()
        labels[:, : batch.input_ids.shape[1]] = IGNORE
        labeled = replace(extended, labels=labels)
        output = score(backbone, labeled, prompt, site, path=path, prefix=prefix, return_logits=False)
        assert output.nll is not None
        log_probs[:, index] = log_probs[:, index].index_add(0, output.batch_rows, -output.nll.double())
    return log_probs


def _has_context(batch: Batch, prompt: Prompt | None, site: Site) -> Tensor:
    """Whether something precedes each row's candidates, so that their first token has a score: [B]."""
    has_text = batch.attention_mask.bool().any(1)
    if prompt is None or not site.scores_first_token:
        return has_text
    return has_text | (prompt.lengths[prompt.prompt_index] > 0)


def _append_tokens(backbone: Backbone, batch: Batch, tokens: Tensor, depths: Tensor | None = None) -> Batch:
    """`batch` with the same tokens behind each row.

    Args:
        backbone: The model that embeds them.
        batch: The texts.
        tokens: [K], token ids.
        depths: [K], how far each token is behind the end of the text, from 0; None: one after the other.
    """
    text_mask = batch.attention_mask.bool()
    device = text_mask.device
    tokens = tokens.to(batch.input_ids.device).expand(len(batch.input_ids), -1)
    extended = replace(
        batch,
        input_ids=torch.cat([batch.input_ids, tokens], 1),
        attention_mask=torch.cat([text_mask, torch.ones_like(tokens, dtype=torch.bool)], 1),
        token_type_ids=None,
    )
    if batch.inputs_embeds is not None:
        token_embeddings = backbone.embed(tokens).to(batch.inputs_embeds.dtype)
        extended = replace(extended, inputs_embeds=torch.cat([batch.inputs_embeds, token_embeddings], 1))
    if batch.position_ids is not None:
        depths = torch.arange(tokens.shape[1]) if depths is None else depths
        columns = torch.arange(text_mask.shape[1], device=device)
        last_column = columns.where(text_mask, -1).max(1, keepdim=True).values
        last_position = batch.position_ids.gather(1, last_column.clamp(min=0)).where(last_column >= 0, -1)
        token_positions = last_position + 1 + depths.to(device)
        extended = replace(extended, position_ids=torch.cat([batch.position_ids, token_positions], 1))
    return extended


def _log_probs(backbone: Backbone, trunk: TrunkOutput, states: Tensor, tokens: Tensor) -> Tensor:
    """The log-probability of `tokens` [N, M] at `states` [N, H], in float64, some rows of logits at a time."""
    rows_at_once = max(1, MAX_LOGITS // backbone.vocab_size)
    chunks = zip(states.split(rows_at_once), tokens.split(rows_at_once), strict=True)
    return torch.cat([_log_probs_at_once(backbone, trunk, chunk, chunk_tokens) for chunk, chunk_tokens in chunks])


def _log_probs_at_once(backbone: Backbone, trunk: TrunkOutput, states: Tensor, tokens: Tensor) -> Tensor:
    logits = apply_head(backbone, trunk, states[None])[0]
    log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return log_probs.gather(1, tokens.to(logits.device)).double()
