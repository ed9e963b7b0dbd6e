"""From encoded rows to batches: padding, and orders that are pure functions of their arguments."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from softprompts.data.encode import Encoded
from softprompts.prompt import IGNORE, Batch

POOL = 50
"""Batches that are sorted by length together: enough to pad little, few enough that an epoch stays random."""


def collate(rows: Sequence[Encoded], pad: int) -> Batch:
    """One batch of `rows`, padded on the right to the longest: ids with `pad`, mask with 0, labels with IGNORE.

    Labels per token are padded, to their own longest row where an encoder-decoder has targets; classes and values are
    stacked, and so are spans and multi-hot rows. `place` is given when any row's prompt stands behind text.

    Raises ValueError for no rows, for rows of which only some have labels, and for labels of different kinds.
    """
    if not rows:
        raise ValueError("a batch needs at least one row")
    places = [row.place or 0 for row in rows]
    types = [row.types for row in rows if row.types is not None]
    if types and len(types) != len(rows):
        raise ValueError("some rows of the batch have token types and some have none: they come from two tokenizers")
    return Batch(
        ids=_pad([row.ids for row in rows], pad),
        mask=_pad([[1] * len(row.ids) for row in rows], 0),
        task=torch.tensor([row.task for row in rows]),
        labels=_labels(rows),
        types=_pad(types, 0) if types else None,
        place=torch.tensor(places) if any(places) else None,
    )


def _pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows], dtype=torch.long)


def _labels(rows: Sequence[Encoded]) -> Tensor | None:
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


def order(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of one epoch as row indices: every index once, rows of similar length together, in random order.

    A pure function of its arguments, so that a resumed run rebuilds it. Rows are shuffled, cut into pools of 50
    batches, sorted by length within a pool and cut into batches, which are shuffled; the last, smaller one is kept.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, given {batch_size}")
    random = np.random.default_rng([seed, epoch])
    shuffled = random.permutation(len(lengths)).tolist()
    pool = POOL * batch_size
    sorted_pools = [
        index
        for at in range(0, len(shuffled), pool)
        for index in sorted(shuffled[at : at + pool], key=lengths.__getitem__)
    ]
    batches = [sorted_pools[at : at + batch_size] for at in range(0, len(sorted_pools), batch_size)]
    return [batches[i] for i in random.permutation(len(batches)).tolist()]


def evaluation_order(lengths: Sequence[int], batch_size: int, tokens: int | None = None) -> list[list[int]]:
    """Batches of row indices sorted by length, the longest first so that too little memory shows at once.

    tokens: the most that a batch may have, padding to its longest row counted; a row that is longer is one by itself.
    """
    for name, given in (("batch_size", batch_size), ("tokens", tokens)):
        if given is not None and given < 1:
            raise ValueError(f"{name} must be at least 1, given {given}")
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        full = not batches or len(batches[-1]) == batch_size
        if full or (tokens is not None and lengths[batches[-1][0]] * (len(batches[-1]) + 1) > tokens):
            batches.append([])
        batches[-1].append(index)
    return batches
