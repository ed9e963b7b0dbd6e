"""From encoded rows to batches: padding, and orders that are pure functions of their arguments."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from softprompts.data.encoding import EncodedExample
from softprompts.types import IGNORE, Batch

POOL = 50
"""Batches that are sorted by length together: enough to pad little, few enough that an epoch stays random."""


def collate(rows: Sequence[EncodedExample], pad: int) -> Batch:
    """One batch of `rows`, padded on the right to the longest: ids with `pad`, mask with 0, labels with IGNORE.

    Labels per token are padded, to their own longest row where an encoder-decoder has targets; classes and values are
    stacked, and so are spans and multi-hot rows. `place` is given when any row's prompt stands behind text, and with
    `segments` when the rows have slots for it; `words` where any row says which are its template's; of rows that do
    not, all count.

    Raises ValueError for no rows, for rows of which only some have labels or slots, and for labels of different kinds.
    """
    if not rows:
        raise ValueError("a batch needs at least one row")
    place, segments = _places(rows)
    types = [row.token_type_ids for row in rows if row.token_type_ids is not None]
    if types and len(types) != len(rows):
        raise ValueError("some rows of the batch have token types and some have none: they come from two tokenizers")
    return Batch(
        input_ids=_pad([row.input_ids for row in rows], pad),
        attention_mask=_pad([[1] * len(row.input_ids) for row in rows], 0),
        task_ids=torch.tensor([row.task_id for row in rows]),
        labels=_labels(rows),
        token_type_ids=_pad(types, 0) if types else None,
        prompt_offsets=place,
        segment_lengths=segments,
        instruction_mask=_words(rows),
    )


def _words(rows: Sequence[EncodedExample]) -> Tensor | None:
    if all(row.instruction_mask is None for row in rows):
        return None
    return _pad([[1] * len(row.input_ids) if row.instruction_mask is None else row.instruction_mask for row in rows], 0)


def _places(rows: Sequence[EncodedExample]) -> tuple[Tensor | None, Tensor | None]:
    """Batch.place and Batch.segments; a row of fewer segments than others has empty ones where its last stands."""
    places = [
        row.prompt_offsets if isinstance(row.prompt_offsets, tuple) else (row.prompt_offsets or 0,) for row in rows
    ]
    slotted = [bool(row.segment_lengths) for row in rows]
    if not any(slotted):
        return torch.tensor([place for place, *_ in places]) if any(map(any, places)) else None, None
    if not all(slotted):
        raise ValueError("some rows of the batch have slots for the prompt and some have none: they are of tasks that "
                         "cannot share a batch")  # fmt: skip
    most = max(map(len, places))
    padded = [[*place, *[place[-1]] * (most - len(place))] for place in places]
    return torch.tensor(padded), _pad([row.segment_lengths for row in rows], 0)


def _pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows], dtype=torch.long)


def _labels(rows: Sequence[EncodedExample]) -> Tensor | None:
    labels = [row.labels for row in rows if row.labels is not None]
    if not labels:
        return None
    if len(labels) != len(rows):
        raise ValueError(f"{len(rows) - len(labels)} of the {len(rows)} rows of the batch have no labels")
    if all(isinstance(label, int) for label in labels):
        return torch.tensor(labels, dtype=torch.long)
    if all(isinstance(label, float) for label in labels):
        return torch.tensor(labels, dtype=torch.float32)
    lists = [label for label in labels if isinstance(label, list)]
    if len(lists) == len(rows):
        if not any(isinstance(value, float) for row in lists for value in row):
            return _pad([[int(value) for value in row] for row in lists], IGNORE)
        if len({len(row) for row in lists}) == 1 and all(isinstance(value, float) for row in lists for value in row):
            return torch.tensor(lists, dtype=torch.float32)
    raise ValueError("the rows of the batch have labels of different kinds: tasks that share a batch must share a head")


def training_order(
    lengths: Sequence[int], batch_size: int, seed: int, epoch: int, tokens: int | None = None
) -> list[list[int]]:
    """The batches of one epoch as row indices: every index once, rows of similar length together, in random order.

    A pure function of its arguments, so that a resumed run rebuilds it. Rows are shuffled, cut into pools of 50
    batches, sorted by length within a pool and cut into batches, which are shuffled; the last, smaller one is kept.
    tokens: as for `evaluation_order`.
    """
    random = np.random.default_rng([seed, epoch])
    shuffled = random.permutation(len(lengths)).tolist()
    pool = POOL * batch_size
    sorted_pools = [
        index
        for at in range(0, len(shuffled), max(1, pool))
        for index in sorted(shuffled[at : at + pool], key=lengths.__getitem__)
    ]
    batches = _cut(sorted_pools, lengths, batch_size, tokens)
    return [batches[i] for i in random.permutation(len(batches)).tolist()]


def evaluation_order(lengths: Sequence[int], batch_size: int, tokens: int | None = None) -> list[list[int]]:
    """Batches of row indices sorted by length, the longest first so that too little memory shows at once.

    tokens: the most that a batch may have, padding to its longest row counted; a row that is longer is one by itself.
    """
    by_length = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return _cut(by_length, lengths, batch_size, tokens)


def _cut(indices: Sequence[int], lengths: Sequence[int], batch_size: int, tokens: int | None) -> list[list[int]]:
    """`indices` in batches of at most so many rows and tokens."""
    for name, given in (("batch_size", batch_size), ("tokens", tokens)):
        if given is not None and given < 1:
            raise ValueError(f"{name} must be at least 1, given {given}")
    batches: list[list[int]] = []
    longest = 0
    for index in indices:
        longest = max(longest, lengths[index])
        full = not batches or len(batches[-1]) == batch_size
        if full or (tokens is not None and longest * (len(batches[-1]) + 1) > tokens):
            batches.append([])
            longest = lengths[index]
        batches[-1].append(index)
    return batches


class ExampleBatches:
    """The rows of every micro-batch of a run, as a pure function of its number; epoch after epoch in `order`."""

    def __init__(self, rows: Sequence[EncodedExample], size: int, seed: int, tokens: int | None = None) -> None:
        self.rows, self.size, self.seed, self.tokens = rows, size, seed, tokens
        self.lengths = [len(row.input_ids) for row in rows]
        self.epoch, self.first, self.batches = 0, 0, self._order(0)

    def at(self, number: int) -> list[EncodedExample]:
        """The rows of micro-batch `number`, counted from 0 over all epochs."""
        if number < self.first:
            self.epoch, self.first, self.batches = 0, 0, self._order(0)
        # How many batches an epoch has depends on its order where they are cut by tokens, so epochs are counted up.
        while number >= self.first + len(self.batches):
            self.first += len(self.batches)
            self.epoch += 1
            self.batches = self._order(self.epoch)
        return [self.rows[i] for i in self.batches[number - self.first]]

    def _order(self, epoch: int) -> list[list[int]]:
        return training_order(self.lengths, self.size, self.seed, epoch, self.tokens)
