"""From encoded rows to a padded batch."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from softprompts.data.encoding import EncodedExample
from softprompts.errors import DataError
from softprompts.types import IGNORE, Batch


def collate(rows: Sequence[EncodedExample], pad: int) -> Batch:
    """Pad rows on the right to one batch.

    Args:
        rows: B encoded rows; T is the length of the longest.
        pad: The token that pads `input_ids`. The mask is padded with 0, labels with IGNORE.

    Returns:
        A batch with

        input_ids [B, T], attention_mask [B, T], task_ids [B];
        token_type_ids [B, T] where the tokenizer has them;
        labels: one per token [B, T], one per target token where an encoder-decoder has targets, classes or values [B],
        spans [B, 2], multi-hot rows [B, C];
        prompt_offsets [B] where a row's prompt comes behind text, or [B, S] with segment_lengths [B, S] where the rows
        have slots for it;
        instruction_mask [B, T] where a row says which tokens are its template's; of other rows, all count.

    Raises:
        DataError: There are no rows, only some rows have labels, slots or token types, or labels differ in kind.
    """
    if not rows:
        raise DataError("a batch needs at least one row")
    prompt_offsets, segment_lengths = _collate_offsets(rows)
    token_types = [row.token_type_ids for row in rows if row.token_type_ids is not None]
    if token_types and len(token_types) != len(rows):
        raise DataError("some rows of the batch have token types and some have none: they come from two tokenizers")
    return Batch(
        input_ids=_pad([row.input_ids for row in rows], pad),
        attention_mask=_pad([[1] * len(row.input_ids) for row in rows], 0),
        task_ids=torch.tensor([row.task_id for row in rows]),
        labels=_collate_labels(rows),
        token_type_ids=_pad(token_types, 0) if token_types else None,
        prompt_offsets=prompt_offsets,
        segment_lengths=segment_lengths,
        instruction_mask=_collate_instructions(rows),
    )


def _pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows], dtype=torch.long)


def _collate_instructions(rows: Sequence[EncodedExample]) -> Tensor | None:
    """Batch.instruction_mask."""
    if all(row.instruction_mask is None for row in rows):
        return None
    masks: list[list[int]] = []
    for row in rows:
        masks.append([1] * len(row.input_ids) if row.instruction_mask is None else row.instruction_mask)
    return _pad(masks, 0)


def _collate_offsets(rows: Sequence[EncodedExample]) -> tuple[Tensor | None, Tensor | None]:
    """Batch.prompt_offsets and Batch.segment_lengths.

    A row with fewer segments than others has empty ones at its last offset.
    """
    offsets: list[tuple[int, ...]] = []
    for row in rows:
        offsets.append(row.prompt_offsets if isinstance(row.prompt_offsets, tuple) else (row.prompt_offsets or 0,))
    has_slots = [bool(row.segment_lengths) for row in rows]
    if not any(has_slots):
        starts = [row_offsets[0] for row_offsets in offsets]
        return torch.tensor(starts) if any(itertools.chain.from_iterable(offsets)) else None, None
    if not all(has_slots):
        raise DataError("some rows of the batch have slots for the prompt and some have none: they are of tasks that "
                         "cannot share a batch")  # fmt: skip
    segments = max(map(len, offsets))
    padded = [[*row_offsets, *[row_offsets[-1]] * (segments - len(row_offsets))] for row_offsets in offsets]
    return torch.tensor(padded), _pad([row.segment_lengths for row in rows], 0)


def _collate_labels(rows: Sequence[EncodedExample]) -> Tensor | None:
    """Batch.labels."""
    labels = [row.labels for row in rows if row.labels is not None]
    if not labels:
        return None
    if len(labels) != len(rows):
        raise DataError(f"{len(rows) - len(labels)} of the {len(rows)} rows of the batch have no labels")
    if all(isinstance(label, int) for label in labels):
        return torch.tensor(labels, dtype=torch.long)
    if all(isinstance(label, float) for label in labels):
        return torch.tensor(labels, dtype=torch.float32)
    lists = [label for label in labels if isinstance(label, list)]
    if len(lists) == len(rows):
        are_floats = {isinstance(value, float) for value in itertools.chain.from_iterable(lists)}
        if True not in are_floats:
            return _pad([list(map(int, label)) for label in lists], IGNORE)
        if False not in are_floats and len(set(map(len, lists))) == 1:
            return torch.tensor(lists, dtype=torch.float32)
    raise DataError("the rows of the batch have labels of different kinds: tasks that share a batch must share a head")
