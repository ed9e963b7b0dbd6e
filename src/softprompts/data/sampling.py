"""Stochastic task sampling: batches that draw their tasks first, then rows of each (Wang et al. 2023, section 3.2)."""

from collections.abc import Sequence

import numpy as np

from softprompts.config import SamplingConfig
from softprompts.data.encoding import EncodedExample


class TaskBatches:
    """The rows of every micro-batch of a run as a pure function of its number, seed and `sampling`.

    A batch draws how many tasks it has (`some`: uniformly from 2 to all; `all`: all of them), at most as many as it has
    rows, then which, each as probable as its mixing weight says and none twice, and splits itself evenly among them;
    rows that are left over go to different tasks drawn at random. Each task gives its rows in shuffled order, all of
    them once before any twice.
    """

    def __init__(self, rows: Sequence[EncodedExample], size: int, seed: int, sampling: SamplingConfig) -> None:
        self.size, self.seed, self.sampling = size, seed, sampling
        self.tasks = sorted({row.task_id for row in rows})
        self.rows = [[row for row in rows if row.task_id == task] for task in self.tasks]
        self.weights = mixing_weights([len(own) for own in self.rows], sampling)
        self.orders: dict[int, tuple[int, list[int]]] = {}
        self.next, self.taken = 0, [0] * len(self.tasks)

    def at(self, number: int) -> list[EncodedExample]:
        """The rows of micro-batch `number`, counted from 0; those of one task stand together."""
        if number < self.next:
            self.next, self.taken = 0, [0] * len(self.tasks)
        while self.next < number:
            self._advance(self.shares(self.next))
        shares = self.shares(number)
        found = [self._row(task, self.taken[task] + i) for task, count in shares.items() for i in range(count)]
        self._advance(shares)
        return found

    def shares(self, number: int) -> dict[int, int]:
        """How many rows micro-batch `number` has of each of its tasks (places in `tasks`)."""
        random = np.random.default_rng([self.seed, 1, number])
        every = len(self.tasks)
        count = every if self.sampling.draw == "all" or every == 1 else int(random.integers(2, every + 1))
        count = min(count, self.size)
        chosen = random.choice(every, count, replace=False, p=self.weights).tolist()
        rest = set(random.choice(count, self.size % count, replace=False).tolist())
        return {task: self.size // count + (place in rest) for place, task in enumerate(chosen)}

    def _advance(self, shares: dict[int, int]) -> None:
        for task, count in shares.items():
            self.taken[task] += count
        self.next += 1

    def _row(self, task: int, place: int) -> EncodedExample:
        epoch, within = divmod(place, len(self.rows[task]))
        if self.orders.get(task, (-1, []))[0] != epoch:
            random = np.random.default_rng([self.seed, 2, task, epoch])
            self.orders[task] = epoch, random.permutation(len(self.rows[task])).tolist()
        return self.rows[task][self.orders[task][1][within]]


def mixing_weights(sizes: Sequence[int], sampling: SamplingConfig) -> list[float]:
    """How probable each task is, from the numbers of its rows; the sum is one."""
    rule = {
        "proportional": float,
        "capped": lambda size: float(min(size, sampling.cap)),
        "log": lambda size: float(np.log(size)) if size > 1 else float(np.log(2)) / 2,
        "equal": lambda size: 1.0,
    }[sampling.mixing]
    found = [rule(size) for size in sizes]
    return [one / sum(found) for one in found]
