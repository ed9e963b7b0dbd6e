"""Sums as people write them: `movies + 0.5*tweets - sms`, with the names of trained prompts."""

import os
import re
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

from softprompts.artifacts import collection
from softprompts.artifacts.artifact import load
from softprompts.artifacts.vectors.vector import Vector, vector
from softprompts.errors import VectorError

RUNS = "runs"
"""Where `softprompts train` writes unless told otherwise."""


_TOKEN = re.compile(
    r"""\s*(?:
        (?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?(?=\s*\*|\s|\)|$))
      | (?P<operator>\*|\(|\)|[+-](?=\s|\(|$))
      | (?P<sign>[+-](?=\S))
      | "(?P<quoted>[^"]+)"
      | (?P<name>[^\s*()"+-][^\s*()"]*)
    )""",
    re.VERBOSE,
)


def terms(text: str) -> dict[str, Fraction]:
    """The names in a sum and what each is multiplied by, in the order they appear.

    `+`, `-`, a number times a name or a bracket, and brackets. A name is a word or a path, in quotation marks where it
    has spaces, brackets or `*` in it; because names have hyphens, a `+` or `-` between names needs spaces around it.
    Raises VectorError that shows the place where it stopped being a sum.
    """
    reader = _Reader(text, _tokens(text))
    if not reader.tokens:
        raise VectorError(f"'{text}' names no prompt; write a sum such as movies + 0.5*tweets")
    found = reader.sum()
    if reader.at < len(reader.tokens):
        raise reader.error("`+` or `-`")
    return found


def read(text: str) -> Vector:
    """The vector that a sum of trained prompts stands for; each name is looked up by `locate`.

    Raises VectorError as `terms` and `locate` do, and ArtifactError where prompts cannot be read or combined.
    """
    return weigh(text, lambda name: vector(load(locate(name)), name))


def weigh(text: str, find: Callable[[str], Vector]) -> Vector:
    """The vector that a sum stands for, where `find` gives the vector of each name."""
    parts = [find(name) * coefficient for name, coefficient in terms(text).items()]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def locate(name: str) -> Path:
    """The directory of the trained prompt called `name`.

    That directory itself, `prompt` in it (a run's directory), or a run of that name in `runs`.
    Raises VectorError that says where it was looked for, or which prompts are there where they are several.
    """
    places = [Path(name), Path(name) / "prompt", Path(RUNS) / name / "prompt", Path(RUNS) / name]
    places = list(dict.fromkeys(places))  # two of them where the name begins at the root
    for place in places:
        if not os.path.isdir(place):  # false too where the name is too long to be one
            continue
        if collection.holds_one(place):
            return place
        order = collection.read(place)
        if order is not None:
            every = ", ".join(str(place / task) for task in order.tasks)
            raise VectorError(f"{name} holds {len(order.tasks)} prompts; name one: {every}")
    hint = ""
    if re.search(r"[+-]", name) and "/" not in name:
        spaced = re.sub("([+-])", r" \1 ", name)
        hint = f"; if it is a sum, write spaces around + and -: {spaced}"
    looked = ", ".join(map(str, places))
    raise VectorError(f"no trained prompt '{name}' (looked for {looked}){hint}")


def _tokens(text: str) -> list[tuple[str, str, int]]:
    """Each token's kind, what it says and where it begins."""
    found, at = [], 0
    while text[at:].strip():
        match = _TOKEN.match(text, at)
        if match is None:
            raise VectorError(f"'{text}': this cannot be read: {text[at:].strip()}")
        kind = match.lastgroup or ""
        found.append((kind, match[kind], match.start(kind)))
        at = match.end()
    return found


class _Reader:
    """A sum read from left to right: sum = product {(+|-) product}; product = {number *} (name | (sum))."""

    def __init__(self, text: str, tokens: list[tuple[str, str, int]]) -> None:
        self.text, self.tokens, self.at = text, tokens, 0

    def error(self, wanted: str) -> VectorError:
        found = f"{self.tokens[self.at][1]!r}" if self.at < len(self.tokens) else "the end"
        before = self.text[: self.tokens[self.at][2]] if self.at < len(self.tokens) else self.text
        return VectorError(f"'{self.text}': after '{before.strip()}' there should be {wanted}, found {found}")

    def take(self, *words: str) -> str | None:
        """The next token, if it is one of `words`."""
        kind, word, _ = self.tokens[self.at] if self.at < len(self.tokens) else ("", "", 0)
        if kind in ("operator", "sign") and word in words:
            self.at += 1
            return word
        return None

    def sum(self) -> dict[str, Fraction]:
        total: dict[str, Fraction] = {}
        sign = self.take("+", "-") or "+"
        while True:
            for name, coefficient in self.product().items():
                by = -coefficient if sign == "-" else coefficient
                total[name] = total.get(name, Fraction(0)) + by
            following = self.take("+", "-")
            if following is None:
                return total
            sign = following

    def product(self) -> dict[str, Fraction]:
        by = Fraction(1)
        while self.at < len(self.tokens) and self.tokens[self.at][0] == "number":
            number = self.tokens[self.at][1]
            if abs(Decimal(number).adjusted()) > 300:  # as a fraction it would fill the memory
                raise VectorError(f"'{self.text}': {number} is too large or too small a number")
            by *= Fraction(number)
            self.at += 1
            if self.take("*") is None:
                raise self.error("`*` and a name")
        if self.take("("):
            inner = self.sum()
            if self.take(")") is None:
                raise self.error("`)`")
            return {name: by * coefficient for name, coefficient in inner.items()}
        if self.at < len(self.tokens) and self.tokens[self.at][0] in ("name", "quoted"):
            name = self.tokens[self.at][1]
            self.at += 1
            return {name: by}
        raise self.error("a name, a number or `(`")
