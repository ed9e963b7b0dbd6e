"""Sums as people write them: `movies + 0.5*tweets - sms`, with the names of trained prompts."""

import os
import re
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from softprompts.artifacts import collection
from softprompts.artifacts.artifact import load
from softprompts.artifacts.vectors.vector import Vector, task_vector
from softprompts.errors import VectorError

RUNS = "runs"
"""The directory in which `softprompts train` writes by default."""

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


def parse_expression(text: str) -> dict[str, Fraction]:
    """The names in a sum and the coefficient of each, in the order of their first appearance.

    A sum consists of `+`, `-`, a number times a name or a bracket, and brackets. A name is a word or a path, in
    quotation marks where it has spaces, brackets or `*`. Names may have hyphens, so a `+` or `-` between names needs
    spaces around it.

    Raises:
        VectorError: The text is not a sum; the message shows where it stops being one.
    """
    parser = _Parser(text)
    if not parser.tokens:
        raise VectorError(f"'{text}' names no prompt; write a sum such as movies + 0.5*tweets")
    coefficients = parser.parse_sum()
    if parser.position < len(parser.tokens):
        raise parser.error("`+` or `-`")
    return coefficients


def read_expression(text: str) -> Vector:
    """The vector of a sum of trained prompts, whose names `locate_prompt` looks up.

    Raises:
        VectorError: As in `parse_expression` and `locate_prompt`.
        ArtifactError: A prompt cannot be read, or two cannot be combined.
    """
    return evaluate_expression(text, lambda name: task_vector(load(locate_prompt(name)), name))


def evaluate_expression(text: str, find: Callable[[str], Vector]) -> Vector:
    """The vector of a sum.

    Args:
        text: The sum.
        find: Gives the vector of a name.

    Raises:
        VectorError: As in `parse_expression`.
        ArtifactError: Two vectors cannot be combined.
    """
    terms = [find(name) * coefficient for name, coefficient in parse_expression(text).items()]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def locate_prompt(name: str) -> Path:
    """The directory of a trained prompt: `name` itself, `prompt` in it (a run's directory), or that run in `runs`.

    Raises:
        VectorError: There is none, or there are several; the message lists the directories.
    """
    candidates = [Path(name), Path(name) / "prompt", Path(RUNS) / name / "prompt", Path(RUNS) / name]
    candidates = list(dict.fromkeys(candidates))  # an absolute name gives two of them twice
    for candidate in candidates:
        if not os.path.isdir(candidate):  # also false for a name that is too long for the system
            continue
        if collection.is_artifact(candidate):
            return candidate
        index = collection.read_index(candidate)
        if index is not None:
            prompts = ", ".join(str(candidate / task) for task in index.tasks)
            raise VectorError(f"{name} holds {len(index.tasks)} prompts; name one: {prompts}")
    hint = ""
    if re.search(r"[+-]", name) and "/" not in name:
        spaced = re.sub("([+-])", r" \1 ", name)
        hint = f"; if it is a sum, write spaces around + and -: {spaced}"
    raise VectorError(f"no trained prompt '{name}' (looked for {', '.join(map(str, candidates))}){hint}")


class _Token(NamedTuple):
    """A token of a sum: its kind (number, operator, sign, quoted or name), its text and where it begins."""

    kind: str
    text: str
    start: int


def _tokenize(text: str) -> list[_Token]:
    tokens, position = [], 0
    while text[position:].strip():
        match = _TOKEN.match(text, position)
        if match is None:
            raise VectorError(f"'{text}': this cannot be read: {text[position:].strip()}")
        kind = match.lastgroup or ""
        tokens.append(_Token(kind, match[kind], match.start(kind)))
        position = match.end()
    return tokens


class _Parser:
    """Parses a sum from left to right: sum = product {(+|-) product}; product = {number *} (name | (sum))."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = _tokenize(text)
        self.position = 0

    def parse_sum(self) -> dict[str, Fraction]:
        total: dict[str, Fraction] = {}
        sign = self.take("+", "-") or "+"
        while True:
            for name, coefficient in self.parse_product().items():
                signed = -coefficient if sign == "-" else coefficient
                total[name] = total.get(name, Fraction(0)) + signed
            next_sign = self.take("+", "-")
            if next_sign is None:
                return total
            sign = next_sign

    def parse_product(self) -> dict[str, Fraction]:
        factor = Fraction(1)
        while (token := self.current()) and token.kind == "number":
            if abs(Decimal(token.text).adjusted()) > 300:  # its fraction would fill the memory
                raise VectorError(f"'{self.text}': {token.text} is too large or too small a number")
            factor *= Fraction(token.text)
            self.position += 1
            if self.take("*") is None:
                raise self.error("`*` and a name")
        if self.take("("):
            coefficients = self.parse_sum()
            if self.take(")") is None:
                raise self.error("`)`")
            return {name: factor * coefficient for name, coefficient in coefficients.items()}
        token = self.current()
        if token is None or token.kind not in ("name", "quoted"):
            raise self.error("a name, a number or `(`")
        self.position += 1
        return {token.text: factor}

    def current(self) -> _Token | None:
        """The next token; None at the end."""
        return self.tokens[self.position] if self.position < len(self.tokens) else None

    def take(self, *symbols: str) -> str | None:
        """Move past the next token and return it, if it is one of `symbols`."""
        token = self.current()
        if token is None or token.kind not in ("operator", "sign") or token.text not in symbols:
            return None
        self.position += 1
        return token.text

    def error(self, expected: str) -> VectorError:
        """The error that the next token is not what is expected."""
        token = self.current()
        before = self.text if token is None else self.text[: token.start]
        actual = "the end" if token is None else repr(token.text)
        return VectorError(f"'{self.text}': after '{before.strip()}' there should be {expected}, found {actual}")
