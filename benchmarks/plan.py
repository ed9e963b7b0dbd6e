"""Which measurements there are, as rows of data, and how long each takes."""

from dataclasses import asdict, dataclass, field
from typing import Any

GROUPS = ("step", "loops", "busy", "memory", "scoring", "grid", "shapes", "parity")
DTYPES = ("float32", "bfloat16")
SIZES = (8, 16, 32, 64)
WAITING: dict[str, dict[str, str]] = {
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "brief-spin": {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "20000"},
    "active": {"OMP_WAIT_POLICY": "ACTIVE"},
}
"""How threads wait for each other: asleep, as the command sets it; spinning for some microseconds first; spinning."""


@dataclass(frozen=True)
class Options:
    """What a run of the benchmarks was asked for; results measurements with others cannot be resumed."""

    quick: bool = False
    pairs: int = 15
    threads: int = 2
    device: str = "cpu"
    model: str = "smollm2-135m"


@dataclass(frozen=True)
class Measurement:
    """`runs.<run>(**arguments)`, kept under `name`; `minutes` is what it took on two cores without AMX."""

    name: str
    group: str
    run: str
    arguments: dict[str, Any]
    minutes: float
    environment: dict[str, str] = field(default_factory=dict)  # of its process


def plan(options: Options, groups: tuple[str, ...] = GROUPS) -> list[Measurement]:
    """The measurements of `groups`, the headline first.

    Raises ValueError for an unknown group.
    """
    unknown = [group for group in groups if group not in GROUPS]
    if unknown:
        raise ValueError(f"unknown rows '{unknown[0]}'; possible: {', '.join(GROUPS)}")
    measurements = _quick(options) if options.quick else _whole(options)
    return [row for row in measurements if row.group in groups]


def _whole(options: Options) -> list[Measurement]:
    base = {"model": options.model, "device": options.device}
    step = {**base, "dtypes": DTYPES, "pairs": options.pairs}
    headline = (100, 16, 20, 40)
    measurements = [
        Measurement("step/p100", "step", "step", {**step, "shape": headline}, 6.5),
        Measurement("step/p20", "step", "step", {**step, "shape": (20, 16, 8, 64), "eager": False}, 2.5),
    ]
    for dtype, minutes in zip(DTYPES, (4.2, 2.2), strict=True):
        arguments = {**base, "dtype": dtype, "shape": headline, "pairs": options.pairs}
        measurements.append(Measurement(f"loops/{dtype}", "loops", "loops", arguments, minutes))
    for waiting, environment in WAITING.items():
        is_default = waiting == "passive"  # the only one with a goal; the others show the trend
        arguments = {**base, "dtype": "float32", "shape": headline}
        arguments["pairs"] = options.pairs if is_default else min(options.pairs, 5)
        minutes = 0.7 if is_default else 0.3
        measurements.append(Measurement(f"busy/{waiting}", "busy", "busy", arguments, minutes, environment))
    for dtype, minutes in zip(DTYPES, (2.9, 1.8), strict=True):
        arguments = {**base, "dtype": dtype, "shape": headline, "repeats": 3, "threads": options.threads}
        measurements.append(Measurement(f"memory/{dtype}", "memory", "peaks", arguments, minutes))
    for dtype, minutes in zip(DTYPES, (5.6, 2.5), strict=True):
        arguments = {"prompt": 100, "rows": 64, "lengths": (20, 40), "sizes": SIZES, "pairs": options.pairs}
        arguments |= {**base, "dtype": dtype, "pairs_several": 5}
        measurements.append(Measurement(f"scoring/{dtype}", "scoring", "scoring", arguments, minutes))
    # The cells with the most work come last: 32 rows of up to 128 tokens.
    cells = [(rows, longest) for longest in (32, 128) for rows in (8, 16, 32)]
    for dtype, dearer in zip(DTYPES, (1.0, 0.7), strict=True):
        for prompt, minutes in ((20, 1.7), (100, 2.3)):
            arguments = {**base, "dtype": dtype, "prompt": prompt, "cells": cells, "pairs": 3, "budget": 16.0}
            measurements.append(Measurement(f"grid/{dtype}/p{prompt}", "grid", "grid", arguments, minutes * dearer))
    for shape in ("t5-base", "bert-base"):
        arguments = {"model": shape, "device": options.device, "dtypes": ("float32",), "pairs": options.pairs}
        arguments |= {"shape": (100, 8, 20, 40), "best": False, "eager": False}
        measurements.append(Measurement(f"shapes/{shape}", "shapes", "step", arguments, 1.4))
    arguments = {**base, "dtypes": DTYPES, "shape": (100, 8, 20, 40)}
    measurements.append(Measurement("parity/float64", "parity", "exact", arguments, 0.8))
    return measurements


def _quick(options: Options) -> list[Measurement]:
    """The same measurements on tiny random models: whether all works, in seconds."""
    base = {"model": "tiny", "device": options.device}
    small, pairs = (4, 3, 3, 6), 2
    step = {"device": options.device, "pairs": pairs, "shape": small}
    scoring = {"prompt": 4, "rows": 6, "lengths": (3, 6), "sizes": (2, 4), "pairs": pairs, "pairs_several": pairs}
    grid = {"prompt": 4, "cells": [(2, 4), (4, 8)], "pairs": pairs, "budget": 1.0}
    peaks = {"shape": small, "repeats": 1, "threads": options.threads}
    measurements = [Measurement("step/p4", "step", "step", {**step, "model": "tiny", "dtypes": DTYPES}, 0.1)]
    arguments = {**base, "dtype": "float32", "shape": small, "pairs": pairs}
    measurements.append(Measurement("loops/float32", "loops", "loops", arguments, 0.1))
    measurements.append(Measurement("busy/passive", "busy", "busy", arguments, 0.1))
    measurements.append(Measurement("memory/float32", "memory", "peaks", {**base, **peaks, "dtype": "float32"}, 0.4))
    for dtype in DTYPES:
        measurements.append(
            Measurement(f"scoring/{dtype}", "scoring", "scoring", {**base, **scoring, "dtype": dtype}, 0.1)
        )
        measurements.append(Measurement(f"grid/{dtype}/p4", "grid", "grid", {**base, **grid, "dtype": dtype}, 0.1))
    for shape in ("tiny-t5", "tiny-bert"):
        arguments = {**step, "model": shape, "dtypes": ("float32",), "best": False, "eager": False}
        measurements.append(Measurement(f"shapes/{shape}", "shapes", "step", arguments, 0.1))
    arguments = {**base, "dtypes": DTYPES, "shape": small}
    measurements.append(Measurement("parity/float64", "parity", "exact", arguments, 0.1))
    return measurements


def settings(options: Options) -> dict[str, Any]:
    """The options as JSON values."""
    return asdict(options)
