"""The arms of the recipe: how each adapts to a target, from which start, and what it trains."""

from dataclasses import dataclass
from typing import Literal

Start = Literal[
    "random", "vocabulary", "labels", "prompt", "factors", "first", "second", "nearest", "weighted", "sources",
    "vectors", "none",
]  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """A line of the table.

    Attributes:
        about: What the arm is, in a few words.
        method: The method of the target's prompt, or the weights that are trained.
        start: The start of the prompt. `random`, `vocabulary` and `labels` are kinds of prompt.init. `prompt` is the
            variant's shared prompt, and `factors` the same with the average of the sources' factors. `first` and
            `second` are the prompts of these sources of the plan. `nearest` and `weighted` are the source prompts most
            similar to the target's own (SPoT). `sources` is vocabulary, beside the source prompts that ATTEMPT mixes.
            `vectors` is vocabulary plus the sum of the sources' task prompt vectors.
        variant: The variant of the source stage that the arm starts from.
        all_targets: Whether one run trains on all targets.
        only_if_named: Whether the arm runs only where a plan names it.
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
    """A way to train the shared prompt: with or without teachers, with factors for each source or one prompt."""

    distill: bool
    decompose: bool


VARIANTS: dict[str, Variant] = {
    "mpt": Variant(distill=True, decompose=True),
    "no-distillation": Variant(distill=False, decompose=True),
    "no-decomposition": Variant(distill=True, decompose=False),
    "mixture": Variant(distill=False, decompose=False),
}
