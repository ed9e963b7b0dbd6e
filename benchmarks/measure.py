"""Times of contestants that take turns, and ratios of their medians with an interval."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

RESAMPLES = 10_000

Call = Callable[[], object]


@dataclass(frozen=True)
class Ratio:
    """A ratio of medians and its 95 % interval."""

    value: float
    low: float
    high: float


def ratio(above: Sequence[float], below: Sequence[float], resamples: int = RESAMPLES, seed: int = 0) -> Ratio:
    """median(above) / median(below); entry i of both was measured in the same round.

    The interval is the 2.5th to 97.5th percentile over rounds drawn with replacement, both sides of a round together.

    Raises:
        ValueError: The two have different lengths or none.
    """
    if len(above) != len(below) or not above:
        raise ValueError(f"a ratio needs as many times above as below, given {len(above)} and {len(below)}")
    index = np.random.default_rng(seed).integers(len(above), size=(resamples, len(above)))
    drawn = np.median(np.asarray(above)[index], axis=1) / np.median(np.asarray(below)[index], axis=1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Ratio(statistics.median(above) / statistics.median(below), float(low), float(high))


def timed(call: Call, device: str = "cpu") -> float:
    """Seconds that `call` takes, work queued on an accelerator included."""
    wait(device)
    begin = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - begin


def wait(device: str) -> None:
    """Wait until the device has finished its queued work."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def interleave(
    contestants: Mapping[str, Call],
    rounds: int,
    device: str = "cpu",
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, list[float]]:
    """Seconds of each contestant in each of `rounds` rounds.

    All run once a round. The order rotates by one from round to round, and every second round is reversed. Neither a
    slow drift of the machine nor the contestant before favors any of them.

    Raises:
        RuntimeError: A contestant changes torch's number of threads.
    """
    threads = torch.get_num_threads()
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        turn = number % len(names)
        order = names[turn:] + names[:turn]
        for name in reversed(order) if number % 2 else order:
            seconds[name].append(timed(contestants[name], device))
            if torch.get_num_threads() != threads:
                raise RuntimeError(f"{name} changed torch's threads from {threads} to {torch.get_num_threads()}")
        progress(number + 1)
    return seconds


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference over the norm of `expected`."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())
