"""The ways to adapt to a target, as rows of data: where each starts and what it trains."""

from dataclasses import dataclass
from typing import Literal

Start = Literal[
    "random", "vocabulary", "labels", "prompt", "factors", "first", "second", "nearest", "weighted", "sources",
    "vectors", "none",
]  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """A line of the table.

    method: of the target's prompt, or what of the weights is trained; start: random, vocabulary or labels as in
    prompt.init; prompt, the variant's shared prompt; factors, the same with the average of the sources' factors;
    first and second, the prompt of that source in the plan's list; nearest and weighted, the source prompts most like
    the target's own (SPoT); sources, vocabulary beside the source prompts that are mixed (ATTEMPT); vectors, vocabulary
    plus the sum of the sources' task prompt vectors; variant: of the source stage; together: one run for all targets;
    asked: only where a plan names it.
    """

    about: str
    method: str
    start: Start
    variant: str = ""
    all_targets: bool = False
    only_if_named: bool = False


ARMS: dict[str, Arm] = {
    "random": Arm("prompt tuning from random vectors", "prompt-tuning", "random"),
    "prompt-tuning": Arm("prompt tuning from vocabulary", "prompt-tuning", "vocabulary"),
    "labels": Arm("prompt tuning from class labels", "prompt-tuning", "labels"),
    "spot-mixture": Arm("SPoT, one prompt of all sources", "prompt-tuning", "prompt", "mixture"),
    "spot-first": Arm("SPoT, the first source", "prompt-tuning", "first", only_if_named=True),
    "spot-second": Arm("SPoT, the second source", "prompt-tuning", "second", only_if_named=True),
    "spot-nearest": Arm("SPoT, the nearest source", "prompt-tuning", "nearest"),
    "spot-weighted": Arm("SPoT, the nearest sources weighted", "prompt-tuning", "weighted"),
    "attempt": Arm("ATTEMPT", "attempt", "sources"),
    "vectors": Arm("sum of task prompt vectors", "prompt-tuning", "vectors", only_if_named=True),
    "mpt": Arm("multitask prompt tuning", "multitask-prompt-tuning", "factors", "mpt"),
    "mpt-no-distillation": Arm("without distillation", "multitask-prompt-tuning", "factors", "no-distillation"),
    "mpt-no-decomposition": Arm("without decomposition", "prompt-tuning", "prompt", "no-decomposition"),
    "mpt-together": Arm("one shared prompt for all targets", "multitask-prompt-tuning", "factors", "mpt", True),
    "fine-tuning": Arm("all weights", "backbone", "none"),
    "lora": Arm("low-rank updates of the weights", "lora", "none"),
}


@dataclass(frozen=True)
class Variant:
    """A way to train the shared prompt: with teachers or without, with factors for each source or one prompt."""

    distil: bool
    decompose: bool


VARIANTS: dict[str, Variant] = {
    "mpt": Variant(distil=True, decompose=True),
    "no-distillation": Variant(distil=False, decompose=True),
    "no-decomposition": Variant(distil=True, decompose=False),
    "mixture": Variant(distil=False, decompose=False),
}
