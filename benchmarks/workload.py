"""The workload: random rows of given lengths as token ids, and random texts for classification, all from seeds."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

IGNORE = -100


@dataclass(frozen=True)
class Shape:
    """A batch of `rows` rows behind a prompt of `prompt` tokens; texts have `shortest` to `longest` tokens."""

    prompt: int
    rows: int
    shortest: int
    longest: int

    def __str__(self) -> str:
        return f"P={self.prompt} B={self.rows} T={self.shortest}-{self.longest}"


@dataclass(frozen=True)
class Row:
    """One row, not padded; `labels` are aligned with `ids` (causal), the target (seq2seq) or a class (sequence).

    A causal row has one label, its last token, which counts as part of the text.
    """

    ids: list[int]
    labels: list[int] | int


class Side(Protocol):
    """The interface of our side and PEFT's; the measurements use nothing else."""

    loss: float

    def start(self, ids: Sequence[int]) -> None:
        """Put the prompt where the words `ids [P]` are, with a new optimizer."""

    def prepare(self, rows: Sequence[Row]) -> Any:
        """`rows` as the batch that `step` takes; not timed on either side."""

    def step(self, batch: Any) -> None:
        """One training step: zero gradients, forward, loss, backward, optimizer step; `loss` holds its loss."""

    def gradient(self) -> Tensor:
        """The prompt's gradient [P, H] of the last step, in float32 on the CPU."""

    def touch(self) -> None:
        """Read one token without a prompt, so that all weights are in memory."""

    def score(self, texts: Sequence[str], labels: dict[str, list[int]], size: int) -> Tensor:
        """Log-probability [R, C] of each label (word -> its tokens) behind each text, `size` rows at a time."""


def rows(shape: Shape, vocabulary: int, kind: str, classes: int = 3, seed: int = 0) -> list[Row]:
    """Rows of random tokens, none of them special; lengths are uniform in the shape's range.

    kind: see `models.kind`; a target has four tokens.
    """
    draw = random.Random(f"{shape} {seed}")
    first = min(100, vocabulary // 4)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(first, vocabulary) for _ in range(count)]

    batch = []
    for _ in range(shape.rows):
        ids = tokens(draw.randint(shape.shortest, shape.longest))
        if kind == "seq2seq":
            batch.append(Row(ids, tokens(4)))
        elif kind == "sequence":
            batch.append(Row(ids, draw.randrange(classes)))
        else:
            batch.append(Row(ids, [IGNORE] * (len(ids) - 1) + ids[-1:]))
    return batch


def start_ids(prompt: int, vocabulary: int, seed: int = 0) -> list[int]:
    """Random words for the prompt to start from."""
    return random.Random(seed).sample(range(min(100, vocabulary // 4), vocabulary), prompt)


def words(tokenizer: Any) -> list[str]:
    """Words that are one token, at the beginning of a text as well as behind a space."""
    known = tokenizer.get_vocab()
    spaced = any(token.startswith("Ġ") for token in known)
    if not spaced:
        return sorted(token for token in known if token.isalnum())
    # Sorted, so that the texts do not depend on the order of a dictionary.
    return sorted(w for w in known if w.isascii() and w.islower() and w.isalpha() and len(w) > 2 and f"Ġ{w}" in known)


def texts(tokenizer: Any, count: int, shortest: int, longest: int, seed: int = 0) -> list[str]:
    """`count` texts of `shortest` to `longest` tokens, one token a word."""
    draw, known = random.Random(seed), words(tokenizer)
    return [" ".join(draw.choices(known, k=draw.randint(shortest, longest))) for _ in range(count)]


def answers(tokenizer: Any, sizes: Sequence[int], seed: int = 1) -> list[str]:
    """An answer of as many words as each of `sizes` says; no answer begins another one."""
    draw, known = random.Random(seed), words(tokenizer)
    picked = iter(draw.sample(known, sum(sizes)))
    return [" ".join(next(picked) for _ in range(size)) for size in sizes]
