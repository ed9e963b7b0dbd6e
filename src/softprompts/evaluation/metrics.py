"""Metrics with bootstrap intervals, the confusion matrix, and the majority vote of a prompt ensemble.

A metric reads the rows once and answers with a function of row counts: counts [R, N] say how often each of N rows
stands in each of R resamples, and R values come back. The plain value is the one for a row of ones, so value and
interval cannot disagree about the formula, and a thousand resamples are a few matrix products. A prediction of `None`
is an illegal output (a generated string that is no label, no number): never right, and counted. Values are fractions.
"""

from __future__ import annotations

import difflib
import math
import reprlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np

from softprompts.evaluation.text_metrics import Measured, Values, bleu, exact_match, rouge_l, squad_em, squad_f1

KINDS = {  # the task kinds with their default metrics, the headline first
    "label": ("accuracy", "f1-macro"),
    "multilabel": ("f1-micro", "f1-macro", "accuracy"),
    "regression": ("pearson", "spearman"),
    "tagging": ("accuracy", "f1-macro"),
    "span": ("squad-f1", "squad-em"),
    "generation": ("rouge-l", "bleu", "exact-match"),
}
_LABELS = ("label", "multilabel", "tagging")
_TEXT = ("label", "span", "generation")
_DRAWS_AT_ONCE = 2_000_000  # one chunk of counts is 16 MB
_DRAWS = 200_000_000  # beyond this fewer resamples are drawn, but never below 100: a few seconds for labels


@dataclass(frozen=True)
class Score:
    """A metric's value over `n` rows with its 95 % interval; `illegal` of the rows hold an output that was no answer.

    An undefined value (a correlation with a constant) is nan and `note` says why; so are bounds not asked for.
    """

    value: float
    low: float
    high: float
    n: int
    illegal: int
    note: str = ""


@dataclass(frozen=True)
class ClassScore:
    """Precision, recall and F1 of one label, each in 0..1 (0 where undefined); `support` counts it among the gold."""

    label: Any
    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True)
class Rows:
    """What a metric looks at: N predictions and references, the task kind where it is known, and f1's label."""

    predictions: Sequence[Any]
    references: Sequence[Any]
    kind: str | None = None
    positive: Any = None

    def __post_init__(self) -> None:
        n, missing = len(self.references), [row for row, gold in enumerate(self.references) if gold is None]
        if n != len(self.predictions):
            raise ValueError(f"{len(self.predictions)} predictions for {n} references; give one for each row")
        if n == 0:
            raise ValueError("no rows to score: predictions and references are empty")
        if missing:
            raise ValueError(f"reference {missing[0]} is None; only a prediction may be missing")


@dataclass(frozen=True)
class Metric:
    """One row of the table: what the figure says, the task kinds it is for, its reader, and its bounds."""

    about: str
    kinds: tuple[str, ...]
    measure: Callable[[Rows], Measured]
    low: float = 0.0
    high: float = 1.0


def score(
    name: str,
    predictions: Sequence[Any],
    references: Sequence[Any],
    *,
    resamples: int = 1000,
    seed: int = 0,
    positive: Hashable | None = None,
    kind: str | None = None,
) -> Score:
    """Score predictions [N] against references [N], with the 95 % percentile bootstrap interval over rows.

    A row is a label, a number, or a string (its reference may then be several gold strings; an empty list stands for
    the empty answer). A set is a row's labels; a list is its labels or its tags in order, so lists need
    `kind="multilabel"` or `kind="tagging"`. Tags that are missing at the end of a row are illegal; a row with too many
    is illegal as a whole. `positive` is the label `f1` is about. The interval is widened to hold the value where the
    percentiles miss it, and has no width where all rows agree. `resamples=0` draws none; beyond 200 000 rows fewer are
    drawn, never below 100. Raises ValueError for an unknown metric or kind, no rows, lengths that differ, a missing
    reference, and predictions of a type that can never equal the references'.
    Source: Efron and Tibshirani 1993, chapter 13.
    """
    metric = METRICS.get(name)
    if metric is None:
        near = [f"did you mean {match!r}? " for match in difflib.get_close_matches(name, METRICS, 1)]
        raise ValueError(f"no metric {name!r}; {''.join(near)}metrics: {', '.join(METRICS)}")
    rows = Rows(predictions, references, kind, positive)
    kind = "multilabel" if kind is None and isinstance(references[0], Set) else kind
    if kind is not None and kind not in metric.kinds:
        raise ValueError(f"{name} does not measure tasks of kind {kind!r}, only {', '.join(metric.kinds)}")
    values, illegal, note = metric.measure(rows)
    value = float(values(np.ones((1, len(references))))[0])
    low, high = _interval(values, len(references), resamples, seed, value)
    return Score(value, low, high, len(references), illegal, note or ("undefined here" if math.isnan(value) else ""))


def default_metrics(kind: str) -> tuple[str, ...]:
    """Name the metrics of a task kind, the headline first; raises ValueError for an unknown kind."""
    if kind not in KINDS:
        raise ValueError(f"no task kind {kind!r}; kinds: {', '.join(KINDS)}")
    return KINDS[kind]


def confusion(predictions: Sequence[Any], references: Sequence[Any], labels: Sequence[Hashable]) -> np.ndarray:
    """Count [K, K + 1] how often gold label i (row) was answered with label j (column); the last column is illegal.

    Rows of tags are flattened. A prediction outside `labels` counts as illegal; a reference outside raises ValueError.
    """
    rows = Rows(predictions, references)
    place = {label: index for index, label in enumerate(labels)}
    matrix = np.zeros((len(place), len(place) + 1), dtype=np.int64)
    kind = "tagging" if isinstance(references[0], (list, tuple, np.ndarray)) else "label"
    for guesses, golds, _ in _items(rows, kind):
        for guess, gold in zip(guesses, golds, strict=True):
            if gold not in place:
                raise ValueError(f"reference {gold!r} is none of the labels {reprlib.repr(list(labels))}")
            matrix[place[gold], place.get(guess, len(place))] += 1
    return matrix


def per_class(
    predictions: Sequence[Any], references: Sequence[Any], labels: Sequence[Hashable], *, kind: str | None = None
) -> list[ClassScore]:
    """Score each of `labels`, in their order; rows and `kind` as in `score`."""
    tally = _tally(Rows(predictions, references, kind))
    place = {label: index for index, label in enumerate(tally.classes)}
    scores = []
    for label in labels:
        at = [place[label]] if label in place else []
        gold, guess, hit = (float(matrix[:, at].sum()) for matrix in (tally.gold, tally.guess, tally.hit))
        precision, recall, f1 = (2 * hit / below if below else 0.0 for below in (2 * guess, 2 * gold, gold + guess))
        scores.append(ClassScore(label, precision, recall, f1, int(gold)))
    return scores


def vote(strings: Sequence[str | None]) -> str | None:
    """Elect one answer from those of several prompts, given in the order of the prompts.

    The most frequent string wins; of those that tie, the one of the prompt that comes first. `None` (an illegal output)
    is elected only where there is nothing else. Raises ValueError for no votes.
    Source: Lester et al. 2021, section 6 (majority vote; the paper leaves ties open).
    """
    if not strings:
        raise ValueError("no votes: give the answers of at least one prompt")
    counts = Counter(answer for answer in strings if answer is not None)
    most = max(counts.values(), default=0)
    return next((answer for answer in strings if answer is not None and counts[answer] == most), None)


def _interval(values: Values, n: int, resamples: int, seed: int, value: float) -> tuple[float, float]:
    resamples = min(resamples, max(100, _DRAWS // n))
    if resamples < 1 or math.isnan(value):
        return math.nan, math.nan
    draw = np.random.default_rng(seed)
    step = max(1, _DRAWS_AT_ONCE // n)
    parts = []
    for size in [step] * (resamples // step) + [resamples % step]:
        cells = draw.integers(0, n, (size, n)) + n * np.arange(size)[:, None]
        parts.append(values(np.bincount(cells.ravel(), minlength=size * n).reshape(size, n).astype(np.float64)))
    drawn = np.concatenate(parts)
    if np.isnan(drawn).all():
        return math.nan, math.nan
    low, high = np.nanpercentile(drawn, [2.5, 97.5])  # a resample may be undefined where the whole is not
    return min(float(low), value), max(float(high), value)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Divide, nan where nothing stands below."""
    return np.divide(above, below, out=np.full(np.broadcast(above, below).shape, np.nan), where=below != 0)


@dataclass(frozen=True)
class _Tally:
    """Sparse counts [N, K + 1] of gold, predicted and rightly predicted labels; the last column is illegal."""

    kind: str
    classes: list[Any]
    gold: Any
    guess: Any
    hit: Any
    illegal: int


def _items(rows: Rows, kind: str) -> Iterator[tuple[list[Any], list[Any], list[Any]]]:
    """Yield each row as what was predicted (None: illegal), what is gold, and what was rightly predicted."""
    for row, (guess, gold) in enumerate(zip(rows.predictions, rows.references, strict=True)):
        if kind == "label":
            yield [guess], [gold], [gold] if guess == gold else []
        elif isinstance(guess, str) or isinstance(gold, str):
            raise ValueError(f"row {row} is one string where {kind} needs a list or a set: {guess!r}, {gold!r}")
        elif kind == "multilabel":
            found = {None} if guess is None else set(guess)
            yield list(found), list(set(gold)), list(found & set(gold))
        else:
            tags = [] if guess is None or len(guess) > len(gold) else list(guess)
            tags += [None] * (len(gold) - len(tags))
            yield tags, list(gold), [right for tag, right in zip(tags, gold, strict=True) if tag == right]


def _tally(rows: Rows) -> _Tally:
    from scipy import sparse

    kind = rows.kind or ("multilabel" if isinstance(rows.references[0], Set) else "label")
    if rows.kind is None and isinstance(rows.references[0], (list, tuple, np.ndarray)):
        raise ValueError("a list may hold tags in order or labels; say kind='tagging' or kind='multilabel'")
    items = list(_items(rows, kind))
    golds = {label for _, gold, _ in items for label in gold}
    guesses = {label for guess, _, _ in items for label in guess if label is not None}
    if None in golds:
        raise ValueError("a reference holds the label None; only a prediction may be missing")
    if golds and guesses and {isinstance(x, str) for x in golds}.isdisjoint({isinstance(x, str) for x in guesses}):
        raise ValueError(f"predictions {reprlib.repr(guesses)} can never equal references {reprlib.repr(golds)}")
    classes = sorted(golds | guesses, key=lambda label: (isinstance(label, str), label))
    place = {label: index for index, label in enumerate(classes)} | {None: len(classes)}

    def counts(part: int) -> Any:
        cells = [(row, place[label]) for row, item in enumerate(items) for label in item[part]]
        places = np.array(cells, dtype=np.int64).reshape(-1, 2).T
        return sparse.csr_array((np.ones(len(cells)), (places[0], places[1])), shape=(len(items), len(classes) + 1))

    return _Tally(kind, classes, counts(1), counts(0), counts(2), sum(None in guess for guess, _, _ in items))


def _accuracy(rows: Rows) -> Measured:
    tally = _tally(rows)
    gold, guess, hit = (matrix.sum(axis=1) for matrix in (tally.gold, tally.guess, tally.hit))
    if tally.kind == "multilabel":
        gold, hit = np.ones(len(gold)), ((hit == gold) & (hit == guess)).astype(np.float64)
    return lambda counts: _ratio(counts @ hit, counts @ gold), tally.illegal, ""


def _f1(rows: Rows) -> Measured:
    tally, positive = _tally(rows), rows.positive
    if positive is None:
        raise ValueError(f"f1 needs the positive label: positive=..., one of {reprlib.repr(tally.classes)}")
    at = [index for index, label in enumerate(tally.classes) if label == positive]
    note = f"positive label {positive!r} neither gold nor predicted; labels here: {reprlib.repr(tally.classes)}"
    parts = [matrix[:, at] for matrix in (tally.gold, tally.guess, tally.hit)]
    return lambda counts: _f1_micro(*(counts @ part for part in parts)), tally.illegal, "" if at else note


def _of_labels(statistic: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]) -> Callable[[Rows], Measured]:
    """Make a metric of how often each label is gold, predicted, and rightly predicted: [R, K + 1] each."""

    def measure(rows: Rows) -> Measured:
        t = _tally(rows)
        return lambda counts: statistic(counts @ t.gold, counts @ t.guess, counts @ t.hit), t.illegal, ""

    return measure


def _f1_macro(gold: np.ndarray, guess: np.ndarray, hit: np.ndarray) -> np.ndarray:
    both = (gold + guess)[:, :-1]
    present = both > 0  # the mean is over the classes gold or predicted in these rows; the illegal output is no class
    return _ratio(_ratio(2 * hit[:, :-1], both).sum(axis=1, where=present), present.sum(axis=1))


def _f1_micro(gold: np.ndarray, guess: np.ndarray, hit: np.ndarray) -> np.ndarray:
    return _ratio(2 * hit.sum(axis=1), (gold + guess).sum(axis=1))


def _matthews(gold: np.ndarray, guess: np.ndarray, hit: np.ndarray) -> np.ndarray:
    total = gold.sum(axis=1)
    above = hit.sum(axis=1) * total - (gold * guess).sum(axis=1)
    below = np.sqrt((total**2 - (gold**2).sum(axis=1)) * (total**2 - (guess**2).sum(axis=1)))
    return np.nan_to_num(_ratio(above, below))  # 0 where one side is constant, by convention, as in scikit-learn


def _correlation(ranked: bool) -> Callable[[Rows], Measured]:
    """Make Pearson's correlation, or Spearman's: Pearson's of the ranks that the numbers have in each resample."""

    def measure(rows: Rows) -> Measured:
        gold = np.array([float(reference) for reference in rows.references])
        if not np.isfinite(gold).all():
            raise ValueError(f"reference {int(np.argmin(np.isfinite(gold)))} is no finite number")
        guess = np.array([math.nan if prediction is None else float(prediction) for prediction in rows.predictions])
        illegal = ~np.isfinite(guess)
        guess[illegal] = gold.mean()
        sides = {"references": gold, "predictions": guess}
        flat = [f"the {name} are all {side[0]:g}" for name, side in sides.items() if (side == side[0]).all()]
        x, y = map(_ranks if ranked else _fixed, sides.values())

        def values(counts: np.ndarray) -> np.ndarray:
            total = counts.sum(axis=1, keepdims=True)
            a, b = (side - (counts * side).sum(axis=1, keepdims=True) / total for side in (x(counts), y(counts)))
            spread = np.sqrt((counts * a * a).sum(axis=1) * (counts * b * b).sum(axis=1))
            spread[spread < 1e-14 * total[:, 0]] = 0.0  # only the rounding error of a resample that is constant
            return np.clip(_ratio((counts * a * b).sum(axis=1), spread), -1.0, 1.0)

        return values, int(illegal.sum()), "undefined: " + " and ".join(flat) if flat else ""

    return measure


def _fixed(numbers: np.ndarray) -> Values:
    return lambda counts: numbers / (np.abs(numbers).max() or 1.0)  # at most 1: no square overflows or vanishes


def _ranks(numbers: np.ndarray) -> Values:
    """Rank the numbers in every resample, scaled to about 0..1; ties share their middle rank."""
    _, groups = np.unique(numbers, return_inverse=True)
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))

    def ranks(counts: np.ndarray) -> np.ndarray:
        size = np.add.reduceat(counts[:, order], starts, axis=1)
        return ((np.cumsum(size, axis=1) - size / 2 + 0.5) / len(numbers))[:, groups]

    return ranks


def _of_text(measure: Callable[[Sequence[Any], Sequence[Any]], Measured]) -> Callable[[Rows], Measured]:
    return lambda rows: measure(rows.predictions, rows.references)


METRICS: dict[str, Metric] = {
    "accuracy": Metric("share of rows (for tagging: tags) that are right; a set only as a whole", _LABELS, _accuracy),
    "f1": Metric("F1 of the positive label", _LABELS, _f1),
    "f1-macro": Metric("mean F1 over the classes that are gold or predicted", _LABELS, _of_labels(_f1_macro)),
    "f1-micro": Metric("F1 over all labels; an illegal output is one wrong label", _LABELS, _of_labels(_f1_micro)),
    "matthews": Metric("Matthews correlation of any classes", ("label", "tagging"), _of_labels(_matthews), -1.0),
    "pearson": Metric("linear correlation; illegal: the gold mean", ("regression",), _correlation(False), -1.0),
    "spearman": Metric("rank correlation; illegal: the gold mean", ("regression",), _correlation(True), -1.0),
    "squad-em": Metric("share of answers equal to a gold one, SQuAD-normalized", _TEXT, _of_text(squad_em)),
    "squad-f1": Metric("mean word F1 with the nearest gold answer, SQuAD-normalized", _TEXT, _of_text(squad_f1)),
    "rouge-l": Metric("mean ROUGE-L F with the nearest gold text, no stemming", _TEXT, _of_text(rouge_l)),
    "bleu": Metric("sacreBLEU's corpus BLEU (13a, exp) divided by 100", _TEXT, _of_text(bleu)),
    "exact-match": Metric("share of strings equal to a gold one, stripped", _TEXT, _of_text(exact_match)),
}
