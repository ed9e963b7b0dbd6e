"""The figures to reach, as rows of data, and whether a run of the benchmarks reached them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.measure import Ratio

PAIRS = 15
"""Interleaved pairs that a time needs to count (memory: three processes)."""


@dataclass(frozen=True)
class Target:
    """A figure, which is reached when the unfavorable end of the interval of its ratio is at least (at most) `value`.

    The results of `measurement` hold the ratio at `path`; inverse: as PEFT's over ours.
    """

    figure: str
    measurement: str
    path: tuple[str, ...]
    value: float
    least: bool = True
    inverse: bool = False


TARGETS = (
    Target("step, float32, P=100: times PEFT's speed", "step/p100", ("ratios", "float32"), 4.5),
    Target("step, bfloat16, P=100: times PEFT's speed", "step/p100", ("ratios", "bfloat16"), 5.0),
    Target("step, PEFT's default (float32) to our best, P=100", "step/p100", ("ratios", "best"), 9.0),
    Target("step, float32, P=20: times PEFT's speed", "step/p20", ("ratios", "float32"), 2.0),
    Target("step, bfloat16, P=20: times PEFT's speed", "step/p20", ("ratios", "bfloat16"), 2.0),
    Target(
        "plain loop over SoftPromptModel, float32: of the command's speed",
        "loops/float32",
        ("ratios", "loop of command"),
        0.9,
    ),
    Target(
        "plain loop over SoftPromptModel, bfloat16: of the command's speed",
        "loops/bfloat16",
        ("ratios", "loop of command"),
        0.9,
    ),
    Target(
        "Trainer over SoftPromptModel, float32: of the command's speed",
        "loops/float32",
        ("ratios", "Trainer of command"),
        0.9,
    ),
    Target(
        "Trainer over SoftPromptModel, float32: times PEFT's speed under Trainer",
        "loops/float32",
        ("ratios", "PEFT Trainer to Trainer"),
        4.5,
    ),
    Target("step beside one busy core: of the quiet step", "busy/passive", ("ratio",), 1.5, least=False),
    Target("memory above the model, float32: of PEFT's", "memory/float32", ("ratio",), 0.4, least=False),
    Target("memory above the model, bfloat16: of PEFT's", "memory/bfloat16", ("ratio",), 0.4, least=False),
    Target("the same without loading, float32", "memory/float32", ("ratio_of_steps",), 0.4, least=False),
    Target("the same without loading, bfloat16", "memory/bfloat16", ("ratio_of_steps",), 0.4, least=False),
    Target("scoring, one token, float32: times PEFT's rows/s", "scoring/float32", ("single", "ratio"), 5.0),
    Target("scoring, one token, bfloat16: times PEFT's rows/s", "scoring/bfloat16", ("single", "ratio"), 5.0),
    Target("step, float32: of the floor", "step/p100", ("floor", "float32", "ratio"), 1.7, least=False),
    Target("step, bfloat16: of the floor", "step/p100", ("floor", "bfloat16", "ratio"), 4.5, least=False),
    Target("T5 base, step: of PEFT's time", "shapes/t5-base", ("ratios", "float32"), 1.05, least=False, inverse=True),
    Target(
        "BERT base, step: of PEFT's time", "shapes/bert-base", ("ratios", "float32"), 1.05, least=False, inverse=True
    ),
)


@dataclass(frozen=True)
class Verdict:
    """A target with its measured ratio, and whether there were `enough` pairs."""

    target: Target
    ratio: Ratio
    enough: bool

    @property
    def reached(self) -> bool:
        """Whether the whole interval is on the right side, and there were enough pairs."""
        ratio, target = self.ratio, self.target
        return self.enough and (ratio.low >= target.value if target.least else ratio.high <= target.value)


def verdicts(results: Mapping[str, Any]) -> list[Verdict]:
    """The verdicts on all targets that were measured."""
    return [_verdict(target, results[target.measurement]) for target in TARGETS if target.measurement in results]


def _verdict(target: Target, result: Mapping[str, Any]) -> Verdict:
    entry: Any = result
    for key in target.path:
        entry = entry[key]
    ratio = Ratio(entry["value"], entry["low"], entry["high"])
    if target.inverse:
        ratio = Ratio(1 / ratio.value, 1 / ratio.high, 1 / ratio.low)
    if "processes" in result:
        return Verdict(target, ratio, len(result["processes"]["ours"]) >= 3)
    pairs = result["pairs"] if "pairs" in result else result[target.path[0]]["pairs"]
    return Verdict(target, ratio, pairs >= PAIRS)
