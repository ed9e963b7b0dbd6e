"""Which rows make a batch: orders of a run that are pure functions of their arguments."""

from collections.abc import Sequence

import numpy as np

from softprompts.config import SamplingConfig
from softprompts.data.encoding import EncodedExample
from softprompts.errors import ConfigError

POOL_BATCHES = 50
"""Batches that are sorted by length together: enough to pad little, few enough that an epoch stays random."""


def training_order(
    lengths: Sequence[int], batch_size: int, seed: int, epoch: int, tokens: int | None = None
) -> list[list[int]]:
    """The batches of one epoch: every row once, rows of similar length together, in random order.

    Rows are shuffled, cut into pools of `POOL_BATCHES` batches, sorted by length within a pool and cut into batches,
    which are shuffled. The last, smaller batch is part of the epoch. A resumed run rebuilds the same order.

    Args:
        lengths: The number of tokens of each row.
        batch_size: The most rows in a batch.
        seed: The seed of the run.
        epoch: The number of the epoch.
        tokens: The most tokens in a batch, with padding to its longest row; a longer row is a batch by itself.

    Returns:
        The row indices of each batch.

    Raises:
        ConfigError: `batch_size` or `tokens` is below 1.
    """
    random = np.random.default_rng([seed, epoch])
    shuffled = random.permutation(len(lengths)).tolist()
    pool_size = POOL_BATCHES * batch_size
    indices: list[int] = []
    for start in range(0, len(shuffled), max(1, pool_size)):
        indices += sorted(shuffled[start : start + pool_size], key=lengths.__getitem__)
    batches = _cut_batches(indices, lengths, batch_size, tokens)
    return [batches[index] for index in random.permutation(len(batches)).tolist()]


def evaluation_order(lengths: Sequence[int], batch_size: int, tokens: int | None = None) -> list[list[int]]:
    """Batches of row indices sorted by length, the longest first so that too little memory shows at once.

    Args:
        lengths: The number of tokens of each row.
        batch_size: The most rows in a batch.
        tokens: The most tokens in a batch, with padding to its longest row; a longer row is a batch by itself.

    Returns:
        The row indices of each batch.

    Raises:
        ConfigError: `batch_size` or `tokens` is below 1.
    """
    indices = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return _cut_batches(indices, lengths, batch_size, tokens)


def _cut_batches(
    indices: Sequence[int], lengths: Sequence[int], batch_size: int, tokens: int | None
) -> list[list[int]]:
    for name, limit in (("batch_size", batch_size), ("tokens", tokens)):
        if limit is not None and limit < 1:
            raise ConfigError(f"{name} must be at least 1, given {limit}")
    batches: list[list[int]] = []
    longest = 0
    for index in indices:
        longest = max(longest, lengths[index])
        is_full = not batches or len(batches[-1]) == batch_size
        if is_full or (tokens is not None and longest * (len(batches[-1]) + 1) > tokens):
            batches.append([])
            longest = lengths[index]
        batches[-1].append(index)
    return batches


class ExampleBatches:
    """The rows of every micro-batch of a run, as a pure function of its number; each epoch is a `training_order`."""

    def __init__(self, rows: Sequence[EncodedExample], size: int, seed: int, tokens: int | None = None) -> None:
        """Prepare the batches.

        Args:
            rows: The rows.
            size: The most rows in a batch.
            seed: The seed of the run.
            tokens: The most tokens in a batch, padding included.
        """
        self.rows = rows
        self.size = size
        self.seed = seed
        self.tokens = tokens
        self.lengths = [len(row.input_ids) for row in rows]
        self._begin_epoch(0, 0)

    def at(self, number: int) -> list[EncodedExample]:
        """The rows of micro-batch `number`, counted from 0 over all epochs."""
        if number < self.first:
            self._begin_epoch(0, 0)
        # Epochs differ in their number of batches where `tokens` limits these, so they are counted one by one.
        while number >= self.first + len(self.batches):
            self._begin_epoch(self.epoch + 1, self.first + len(self.batches))
        return [self.rows[index] for index in self.batches[number - self.first]]

    def _begin_epoch(self, epoch: int, first: int) -> None:
        """Order the rows of an epoch; `first` is the number of its first batch."""
        self.epoch = epoch
        self.first = first
        self.batches = training_order(self.lengths, self.size, self.seed, epoch, self.tokens)


class TaskBatches:
    """Stochastic task sampling: batches that draw their tasks first, then rows of each.

    A batch draws its number of tasks (`some`: uniformly from 2 to all; `all`: all of them), but at most its number of
    rows. It draws that many different tasks by their mixing weights, and divides its rows evenly among them; left-over
    rows go to different tasks at random. Each task gives its rows in shuffled order, all of them once before any twice.
    The rows of a batch are a pure function of its number, the seed and `sampling`.

    Source: Wang et al. 2023, Multitask Prompt Tuning, section 3.2.
    """

    def __init__(self, rows: Sequence[EncodedExample], size: int, seed: int, sampling: SamplingConfig) -> None:
        """Prepare the batches.

        Args:
            rows: The rows of all tasks.
            size: The rows in a batch.
            seed: The seed of the run.
            sampling: How batches draw their tasks.
        """
        self.size = size
        self.seed = seed
        self.sampling = sampling
        rows_of_task: dict[int, list[EncodedExample]] = {}
        for row in rows:
            rows_of_task.setdefault(row.task_id, []).append(row)
        self.tasks = sorted(rows_of_task)
        self.rows = [rows_of_task[task_id] for task_id in self.tasks]
        self.weights = mixing_weights(list(map(len, self.rows)), sampling)
        self.epoch_orders: dict[int, tuple[int, list[int]]] = {}
        self._restart()

    def at(self, number: int) -> list[EncodedExample]:
        """The rows of micro-batch `number`, counted from 0; the rows of a task follow each other."""
        if number < self.next_number:
            self._restart()
        while self.next_number < number:
            self._advance(self.shares(self.next_number))
        shares = self.shares(number)
        rows: list[EncodedExample] = []
        for task, count in shares.items():
            rows += [self._row(task, self.rows_taken[task] + i) for i in range(count)]
        self._advance(shares)
        return rows

    def shares(self, number: int) -> dict[int, int]:
        """The number of rows of each task in micro-batch `number`; a task is its index in `tasks`."""
        random = np.random.default_rng([self.seed, 1, number])
        tasks = len(self.tasks)
        count = tasks if self.sampling.draw == "all" or tasks == 1 else int(random.integers(2, tasks + 1))
        count = min(count, self.size)
        drawn_tasks = random.choice(tasks, count, replace=False, p=self.weights).tolist()
        with_one_more = set(random.choice(count, self.size % count, replace=False).tolist())
        return {task: self.size // count + (index in with_one_more) for index, task in enumerate(drawn_tasks)}

    def _restart(self) -> None:
        self.next_number = 0
        self.rows_taken = [0] * len(self.tasks)

    def _advance(self, shares: dict[int, int]) -> None:
        for task, count in shares.items():
            self.rows_taken[task] += count
        self.next_number += 1

    def _row(self, task: int, number: int) -> EncodedExample:
        """Row `number` of a task, counted over all its epochs."""
        epoch, index = divmod(number, len(self.rows[task]))
        if self.epoch_orders.get(task, (-1, []))[0] != epoch:
            random = np.random.default_rng([self.seed, 2, task, epoch])
            self.epoch_orders[task] = epoch, random.permutation(len(self.rows[task])).tolist()
        return self.rows[task][self.epoch_orders[task][1][index]]


def mixing_weights(sizes: Sequence[int], sampling: SamplingConfig) -> list[float]:
    """The probability of each task.

    Args:
        sizes: The number of rows of each task.
        sampling: Its `mixing` is proportional, capped (at `cap` rows), log, or equal.

    Returns:
        Weights that sum to one.
    """
    rule = {
        "proportional": float,
        "capped": lambda size: float(min(size, sampling.cap)),
        "log": lambda size: float(np.log(size)) if size > 1 else float(np.log(2)) / 2,
        "equal": lambda size: 1.0,
    }[sampling.mixing]
    shares = [rule(size) for size in sizes]
    return [share / sum(shares) for share in shares]
