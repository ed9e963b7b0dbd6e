"""Metrics with bootstrap intervals, the confusion matrix, and the majority vote of a prompt ensemble.

scikit-learn computes the values of the label metrics. The bootstrap evaluates a thousand resamples at once: a resample
is a vector of row counts [N], which say how often it contains each row, and the metric of R resamples is a few matrix
products with counts [R, N]. A prediction of `None` is an illegal output (a generated string that is no label or no
number): it is never right, and it is counted. All values are fractions.
"""

from __future__ import annotations

import difflib
import math
import reprlib
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from softprompts.errors import ConfigError, DataError
from softprompts.evaluation import text_metrics
from softprompts.evaluation.text_metrics import MetricOfCounts, TextMetric

KINDS = {  # the task kinds with their default metrics, the headline first
    "label": ("accuracy", "f1-macro"),
    "multilabel": ("f1-micro", "f1-macro", "accuracy"),
    "regression": ("pearson", "spearman"),
    "tagging": ("accuracy", "f1-macro"),
    "span": ("squad-f1", "squad-em"),
    "generation": ("rouge-l", "bleu", "exact-match"),
}
_LABEL_KINDS = ("label", "multilabel", "tagging")
_TEXT_KINDS = ("label", "span", "generation")
_COUNTS_AT_ONCE = 2_000_000  # one chunk of counts has 16 MB
_MAX_COUNTS = 200_000_000  # beyond this fewer resamples are drawn, but never below 100: a few seconds for labels


@dataclass(frozen=True)
class Score:
    """A metric's value over `n` rows with its 95 % interval; `illegal` of the rows hold an output that was no answer.

    An undefined value (a correlation with a constant) is nan and `note` says why. Bounds that were not asked for are
    nan as well.
    """

    value: float
    low: float
    high: float
    n: int
    illegal: int
    note: str = ""


@dataclass(frozen=True)
class ClassScore:
    """Precision, recall and F1 of one label, each in 0..1 (0 where undefined); `support` counts its references."""

    label: Any
    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True)
class Rows:
    """N predictions and references, the task kind where it is known, and the label that the metric f1 is about."""

    predictions: Sequence[Any]
    references: Sequence[Any]
    kind: str | None = None
    positive: Any = None

    def __post_init__(self) -> None:
        if len(self.references) != len(self.predictions):
            raise DataError(
                f"{len(self.predictions)} predictions for {len(self.references)} references; give one for each row"
            )
        if len(self.references) == 0:
            raise DataError("no rows to score: predictions and references are empty")
        for row, reference in enumerate(self.references):
            if reference is None:
                raise DataError(f"reference {row} is None; only a prediction may be missing")


class Measurement(NamedTuple):
    """A metric of some rows: its value, its values over resamples, the rows with an illegal output, and a note."""

    value: float
    of_counts: MetricOfCounts
    illegal: int
    note: str = ""


@dataclass(frozen=True)
class Metric:
    """One row of the table of metrics: what the figure says, the task kinds it is for, its function, and its bounds."""

    about: str
    kinds: tuple[str, ...]
    measure: Callable[[Rows], Measurement]
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
    """Score predictions against references, with the 95 % percentile bootstrap interval over rows.

    A row is a label, a number, or a string. The reference of a string may be several gold strings; an empty list of
    them means the empty answer. A set is a row's labels. A list is its labels or its tags in order, so lists need
    `kind="multilabel"` or `kind="tagging"`. Tags that are missing at the end of a row are illegal. A row with too many
    tags is illegal as a whole. Source of the interval: Efron and Tibshirani 1993, chapter 13. It is widened to contain
    the value where the percentiles miss it, and has no width where all rows agree.

    Args:
        name: A metric, a key of METRICS.
        predictions: What was answered, one entry a row [N]; None is an illegal output.
        references: The right answers [N].
        resamples: Resamples to draw; 0 draws none. Beyond 200,000 rows fewer are drawn, never below 100.
        seed: Seed of the resamples.
        positive: The label that `f1` is about.
        kind: The task kind, a key of KINDS; None: the type of the rows decides.

    Returns:
        The value and its interval.

    Raises:
        ConfigError: The metric or the kind is unknown, or `positive` or `kind` is missing.
        DataError: There are no rows, the lengths differ, a reference is missing, or predictions have a type that can
            never equal that of the references.
    """
    metric = METRICS.get(name)
    if metric is None:
        suggestions = [f"did you mean {match!r}? " for match in difflib.get_close_matches(name, METRICS, 1)]
        raise ConfigError(f"no metric {name!r}; {''.join(suggestions)}metrics: {', '.join(METRICS)}")
    rows = Rows(predictions, references, kind, positive)
    kind = "multilabel" if kind is None and isinstance(references[0], Set) else kind
    if kind is not None and kind not in metric.kinds:
        raise ConfigError(f"{name} does not measure tasks of kind {kind!r}, only {', '.join(metric.kinds)}")
    value, of_counts, illegal, note = metric.measure(rows)
    low, high = _interval(of_counts, len(references), resamples, seed, value)
    return Score(value, low, high, len(references), illegal, note or ("undefined here" if math.isnan(value) else ""))


def plain_scores(scores: Mapping[str, Score]) -> dict[str, dict[str, Any]]:
    """Scores by metric, as results.json has them."""
    return {name: asdict(score_of_metric) for name, score_of_metric in scores.items()}


def class_tables(predictions: Sequence[Any], references: Sequence[Any], labels: Sequence[Hashable]) -> dict[str, Any]:
    """The scores of each label and the confusion matrix, as results.json has them."""
    return {
        "per_class": list(map(asdict, per_class(predictions, references, labels))),
        "confusion": {"labels": list(labels), "matrix": confusion(predictions, references, labels).tolist()},
    }


def default_metrics(kind: str) -> tuple[str, ...]:
    """The metrics of a task kind, the headline first; raises ConfigError for an unknown kind."""
    if kind not in KINDS:
        raise ConfigError(f"no task kind {kind!r}; kinds: {', '.join(KINDS)}")
    return KINDS[kind]


def confusion(predictions: Sequence[Any], references: Sequence[Any], labels: Sequence[Hashable]) -> np.ndarray:
    """Count how often each reference label was answered with each label.

    Args:
        predictions: Labels, or rows of tags, which are flattened [N]; one outside `labels` counts as illegal.
        references: Labels, or rows of tags [N].
        labels: The K labels in the order of the matrix.

    Returns:
        Counts [K, K + 1]: references are rows, predictions are columns, and the last column is illegal.

    Raises:
        DataError: A reference is none of `labels`.
    """
    from sklearn.metrics import confusion_matrix

    rows = Rows(predictions, references)
    codes = _codes(labels)
    kind = "tagging" if isinstance(references[0], (list, tuple, np.ndarray)) else "label"
    predicted_codes: list[int] = []
    reference_codes: list[int] = []
    for predicted, gold in _labels_of_rows(rows, kind):
        for label in gold:
            if label not in codes:
                raise DataError(f"reference {label!r} is none of the labels {reprlib.repr(list(labels))}")
            reference_codes.append(codes[label])
        predicted_codes += [codes.get(label, len(codes)) for label in predicted]
    matrix = confusion_matrix(reference_codes, predicted_codes, labels=range(len(codes) + 1))
    return np.asarray(matrix[:-1], dtype=np.int64)


def per_class(predictions: Sequence[Any], references: Sequence[Any], labels: Sequence[Hashable]) -> list[ClassScore]:
    """Score each of `labels`, in their order; rows as in `score`."""
    from sklearn.metrics import precision_recall_fscore_support

    table = _label_table(Rows(predictions, references), labels)
    codes = [table.codes[label] for label in labels]
    columns = precision_recall_fscore_support(*table.for_sklearn, labels=codes, zero_division=0.0)
    scores = []
    for label, precision, recall, f1, support in zip(labels, *columns, strict=True):
        scores.append(ClassScore(label, float(precision), float(recall), float(f1), int(support)))
    return scores


def majority_vote(answers: Sequence[str | None]) -> str | None:
    """Elect one of the answers of several prompts, given in the order of the prompts.

    The most frequent string wins; of those that tie, the one of the prompt that comes first. `None` (an illegal output)
    is elected only where there is nothing else. Raises DataError for no answers.
    Source: Lester et al. 2021, section 6 (majority vote; the paper leaves ties open).
    """
    if not answers:
        raise DataError("no votes: give the answers of at least one prompt")
    votes = Counter(answer for answer in answers if answer is not None)
    most = max(votes.values(), default=0)
    return next((answer for answer in answers if answer is not None and votes[answer] == most), None)


def _interval(of_counts: MetricOfCounts, n: int, resamples: int, seed: int, value: float) -> tuple[float, float]:
    """The 2.5th and 97.5th percentile of the metric over resamples of `n` rows; nan where there are none."""
    resamples = min(resamples, max(100, _MAX_COUNTS // n))
    if resamples < 1 or math.isnan(value):
        return math.nan, math.nan
    generator = np.random.default_rng(seed)
    chunk = max(1, _COUNTS_AT_ONCE // n)
    chunks = []
    for size in [chunk] * (resamples // chunk) + [resamples % chunk]:
        drawn_rows = generator.integers(0, n, (size, n)) + n * np.arange(size)[:, None]
        counts = np.bincount(drawn_rows.ravel(), minlength=size * n).reshape(size, n)
        chunks.append(of_counts(counts.astype(np.float64)))
    values = np.concatenate(chunks)
    if np.isnan(values).all():
        return math.nan, math.nan
    low, high = np.nanpercentile(values, [2.5, 97.5])  # a resample may be undefined where the whole is not
    return min(float(low), value), max(float(high), value)


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """The ratio, nan where the denominator is 0."""
    quotient = np.full(np.broadcast(numerator, denominator).shape, np.nan)
    return np.divide(numerator, denominator, out=quotient, where=denominator != 0)


@dataclass(frozen=True)
class LabelTable:
    """The labels of all rows as codes 0..K - 1; K is the code of an illegal output.

    Attributes:
        kind: The task kind.
        codes: The code of each label; labels that are no string come first, sorted.
        reference_codes: One entry for each label or tag, in the order of rows [M].
        predicted_codes: The same of the predictions; for multilabel rows, of another length than the references.
        references: How often each row has each label as a reference, sparse [N, K + 1].
        predictions: How often each row has each label as a prediction, sparse [N, K + 1].
        correct: How often each row has each label rightly predicted, sparse [N, K + 1].
        illegal: Rows with an illegal output.
    """

    kind: str
    codes: dict[Any, int]
    reference_codes: np.ndarray
    predicted_codes: np.ndarray
    references: Any
    predictions: Any
    correct: Any
    illegal: int

    @property
    def for_sklearn(self) -> tuple[Any, Any]:
        """References and predictions as scikit-learn takes them: codes, or an indicator matrix for multilabel rows."""
        if self.kind == "multilabel":
            return self.references, self.predictions
        return self.reference_codes, self.predicted_codes


def _labels_of_rows(rows: Rows, kind: str) -> list[tuple[list[Any], list[Any]]]:
    """The predicted labels (None: illegal) and the reference labels of each row; as many tags as the row has."""
    labels: list[tuple[list[Any], list[Any]]] = []
    for row, (prediction, reference) in enumerate(zip(rows.predictions, rows.references, strict=True)):
        if kind == "label":
            labels.append(([prediction], [reference]))
        elif isinstance(prediction, str) or isinstance(reference, str):
            raise DataError(
                f"row {row} is one string where {kind} needs a list or a set: {prediction!r}, {reference!r}"
            )
        elif kind == "multilabel":
            labels.append(([None] if prediction is None else list(set(prediction)), list(set(reference))))
        else:
            tags = [] if prediction is None or len(prediction) > len(reference) else list(prediction)
            tags += [None] * (len(reference) - len(tags))
            labels.append((tags, list(reference)))
    return labels


def _label_table(rows: Rows, more_labels: Sequence[Hashable] = ()) -> LabelTable:
    """Encode the labels of rows.

    Args:
        rows: Rows of labels, sets of labels, or tags.
        more_labels: Labels that get a code even where no row has them.

    Raises:
        ConfigError: Rows are lists and their kind is unknown.
        DataError: A reference holds None, or the types of predictions and references differ.
    """
    kind = rows.kind or ("multilabel" if isinstance(rows.references[0], Set) else "label")
    if rows.kind is None and isinstance(rows.references[0], (list, tuple, np.ndarray)):
        raise ConfigError("a list may hold tags in order or labels; say kind='tagging' or kind='multilabel'")
    labels_of_rows = _labels_of_rows(rows, kind)
    predicted: list[Any] = []
    references: list[Any] = []
    row_of_predicted: list[int] = []
    row_of_reference: list[int] = []
    for row, (predicted_labels, reference_labels) in enumerate(labels_of_rows):
        predicted += predicted_labels
        references += reference_labels
        row_of_predicted += [row] * len(predicted_labels)
        row_of_reference += [row] * len(reference_labels)
    codes = _label_codes(predicted, references, more_labels)
    predicted_codes = np.array([codes.get(label, len(codes)) for label in predicted], dtype=np.int64)
    reference_codes = np.array([codes[label] for label in references], dtype=np.int64)
    predicted_rows = np.array(row_of_predicted, dtype=np.int64)
    reference_rows = np.array(row_of_reference, dtype=np.int64)
    shape = (len(labels_of_rows), len(codes) + 1)
    predicted_table = _sparse_counts(predicted_rows, predicted_codes, shape)
    reference_table = _sparse_counts(reference_rows, reference_codes, shape)
    if kind == "multilabel":
        correct_table = predicted_table.multiply(reference_table).tocsr()
    else:
        right = predicted_codes == reference_codes
        correct_table = _sparse_counts(reference_rows[right], reference_codes[right], shape)
    return LabelTable(
        kind=kind,
        codes=codes,
        reference_codes=reference_codes,
        predicted_codes=predicted_codes,
        references=reference_table,
        predictions=predicted_table,
        correct=correct_table,
        illegal=len(set(predicted_rows[predicted_codes == len(codes)].tolist())),
    )


def _label_codes(predicted: Sequence[Any], references: Sequence[Any], more_labels: Sequence[Any]) -> dict[Any, int]:
    """The code of each label; raises DataError for labels that cannot be compared."""
    reference_labels = set(references)
    predicted_labels = set(predicted) - {None}
    if None in reference_labels:
        raise DataError("a reference holds the label None; only a prediction may be missing")
    reference_types = set(map(_is_string, reference_labels))
    if predicted_labels and reference_labels and reference_types.isdisjoint(map(_is_string, predicted_labels)):
        raise DataError(
            f"predictions {reprlib.repr(predicted_labels)} can never equal references {reprlib.repr(reference_labels)}"
        )
    labels = reference_labels | predicted_labels | set(more_labels)
    return _codes(sorted(labels, key=lambda label: (_is_string(label), label)))


def _codes(labels: Sequence[Any]) -> dict[Any, int]:
    """The place of each label."""
    return dict(zip(labels, range(len(labels)), strict=True))


def _is_string(label: Any) -> bool:
    return isinstance(label, str)


def _sparse_counts(rows: np.ndarray, codes: np.ndarray, shape: tuple[int, int]) -> Any:
    """How often each code [M] occurs in each row [M], as a sparse matrix of `shape`."""
    from scipy import sparse

    return sparse.csr_array((np.ones(len(codes)), (rows, codes)), shape=shape)


def _accuracy(rows: Rows) -> Measurement:
    """The share of right labels or tags; a set of labels is right as a whole."""
    from sklearn.metrics import accuracy_score

    table = _label_table(rows)
    total = table.references.sum(axis=1)
    right = table.correct.sum(axis=1)
    if table.kind == "multilabel":
        right = ((right == total) & (right == table.predictions.sum(axis=1))).astype(np.float64)
        total = np.ones(len(total))
    if not table.codes:  # no row has a label, which scikit-learn refuses
        value = float(right.mean()) if table.kind == "multilabel" else math.nan
    else:
        value = float(accuracy_score(*table.for_sklearn))
    return Measurement(value, lambda counts: _divide(counts @ right, counts @ total), table.illegal)


def _f1(rows: Rows) -> Measurement:
    """F1 of the positive label."""
    table = _label_table(rows)
    if rows.positive is None:
        raise ConfigError(f"f1 needs the positive label: positive=..., one of {reprlib.repr(list(table.codes))}")
    codes = [table.codes[rows.positive]] if rows.positive in table.codes else []
    references = table.references[:, codes]
    predictions = table.predictions[:, codes]
    correct = table.correct[:, codes]
    note = ""
    if not codes:
        labels = reprlib.repr(list(table.codes))
        note = f"positive label {rows.positive!r} neither gold nor predicted; labels here: {labels}"
    return Measurement(
        _f1_score(table, codes, "micro"),
        lambda counts: _f1_micro_of_counts(counts @ references, counts @ predictions, counts @ correct),
        table.illegal,
        note,
    )


def _f1_macro(rows: Rows) -> Measurement:
    """The mean F1 over the classes that are gold or predicted; the illegal output is no class."""
    table = _label_table(rows)
    value = _f1_score(table, list(table.codes.values()), "macro")
    return Measurement(value, _of_label_counts(table, _f1_macro_of_counts), table.illegal)


def _f1_micro(rows: Rows) -> Measurement:
    """F1 over all labels; an illegal output is one wrong label."""
    table = _label_table(rows)
    value = _f1_score(table, [*table.codes.values(), len(table.codes)], "micro")
    return Measurement(value, _of_label_counts(table, _f1_micro_of_counts), table.illegal)


def _f1_score(table: LabelTable, codes: Sequence[int], average: str) -> float:
    """scikit-learn's F1 over the labels with these codes; nan where none of them is gold or predicted."""
    from sklearn.metrics import f1_score

    if not table.references[:, codes].sum() + table.predictions[:, codes].sum():
        return math.nan
    if not table.codes:  # all outputs are illegal and no row has a label
        return 0.0
    return float(f1_score(*table.for_sklearn, labels=codes, average=average, zero_division=0.0))


def _matthews(rows: Rows) -> Measurement:
    """The Matthews correlation of any number of classes; 0 where one side is constant, by convention."""
    from sklearn.metrics import matthews_corrcoef

    table = _label_table(rows)
    # scikit-learn warns where both sides are the same constant.
    constant = len(np.unique(table.reference_codes)) < 2 or len(np.unique(table.predicted_codes)) < 2
    if not len(table.reference_codes):
        value = math.nan
    else:
        value = 0.0 if constant else float(matthews_corrcoef(*table.for_sklearn))
    return Measurement(value, _of_label_counts(table, _matthews_of_counts), table.illegal)


LabelStatistic = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""Turns counts of reference, predicted and correct labels, [R, K + 1] each, into R values."""


def _of_label_counts(table: LabelTable, statistic: LabelStatistic) -> MetricOfCounts:
    """The statistic as a function of row counts."""

    def of_counts(counts: np.ndarray) -> np.ndarray:
        return statistic(counts @ table.references, counts @ table.predictions, counts @ table.correct)

    return of_counts


def _f1_macro_of_counts(references: np.ndarray, predictions: np.ndarray, correct: np.ndarray) -> np.ndarray:
    occurrences = (references + predictions)[:, :-1]
    present = occurrences > 0
    f1 = _divide(2 * correct[:, :-1], occurrences)
    return _divide(f1.sum(axis=1, where=present), present.sum(axis=1))


def _f1_micro_of_counts(references: np.ndarray, predictions: np.ndarray, correct: np.ndarray) -> np.ndarray:
    return _divide(2 * correct.sum(axis=1), (references + predictions).sum(axis=1))


def _matthews_of_counts(references: np.ndarray, predictions: np.ndarray, correct: np.ndarray) -> np.ndarray:
    total = references.sum(axis=1)
    covariance = correct.sum(axis=1) * total - (references * predictions).sum(axis=1)
    reference_variance = total**2 - (references**2).sum(axis=1)
    predicted_variance = total**2 - (predictions**2).sum(axis=1)
    return np.nan_to_num(_divide(covariance, np.sqrt(reference_variance * predicted_variance)))


def _correlation(ranked: bool) -> Callable[[Rows], Measurement]:
    """Pearson's correlation, or Spearman's: Pearson's of the ranks that the numbers have in each resample."""

    def measure(rows: Rows) -> Measurement:
        references = np.array(rows.references, dtype=np.float64)
        if not np.isfinite(references).all():
            raise DataError(f"reference {int(np.argmin(np.isfinite(references)))} is not a finite number")
        predictions = np.array(rows.predictions, dtype=np.float64)  # nan for None
        illegal = ~np.isfinite(predictions)
        predictions[illegal] = references.mean()
        constants = []
        for name, numbers in (("references", references), ("predictions", predictions)):
            if (numbers == numbers[0]).all():
                constants.append(f"the {name} are all {numbers[0]:g}")
        scale = _ranks if ranked else _scaled
        scaled_references = scale(references)
        scaled_predictions = scale(predictions)

        def of_counts(counts: np.ndarray) -> np.ndarray:
            x = _centered(scaled_references(counts), counts)
            y = _centered(scaled_predictions(counts), counts)
            spread = np.sqrt((counts * x * x).sum(axis=1) * (counts * y * y).sum(axis=1))
            spread[spread < 1e-14 * counts.sum(axis=1)] = 0.0  # only the rounding error of a constant resample
            return np.clip(_divide((counts * x * y).sum(axis=1), spread), -1.0, 1.0)

        note = "undefined: " + " and ".join(constants) if constants else ""
        return Measurement(_of_all_rows(of_counts, len(references)), of_counts, int(illegal.sum()), note)

    return measure


def _centered(numbers: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Numbers [R, N] or [N] less their mean in each resample [R, N]."""
    return numbers - (counts * numbers).sum(axis=1, keepdims=True) / counts.sum(axis=1, keepdims=True)


def _scaled(numbers: np.ndarray) -> MetricOfCounts:
    """The numbers [N] over the largest: no square overflows or vanishes."""
    return lambda counts: numbers / (np.abs(numbers).max() or 1.0)


def _ranks(numbers: np.ndarray) -> MetricOfCounts:
    """The ranks of the numbers [N] in every resample, scaled to about 0..1; ties share their middle rank."""
    _, groups = np.unique(numbers, return_inverse=True)
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))

    def ranks(counts: np.ndarray) -> np.ndarray:
        size = np.add.reduceat(counts[:, order], starts, axis=1)
        return ((np.cumsum(size, axis=1) - size / 2 + 0.5) / len(numbers))[:, groups]

    return ranks


def _of_text(metric: TextMetric) -> Callable[[Rows], Measurement]:
    """A metric of strings as one of rows."""

    def measure(rows: Rows) -> Measurement:
        of_counts, note = metric(rows.predictions, rows.references)
        illegal = sum(prediction is None for prediction in rows.predictions)
        return Measurement(_of_all_rows(of_counts, len(rows.references)), of_counts, illegal, note)

    return measure


def _of_all_rows(of_counts: MetricOfCounts, n: int) -> float:
    """The metric of `n` rows, each counted once."""
    return float(of_counts(np.ones((1, n)))[0])


METRICS: dict[str, Metric] = {
    "accuracy": Metric(
        "share of rows (for tagging: tags) that are right; a set only as a whole", _LABEL_KINDS, _accuracy
    ),
    "f1": Metric("F1 of the positive label", _LABEL_KINDS, _f1),
    "f1-macro": Metric("mean F1 over the classes that are gold or predicted", _LABEL_KINDS, _f1_macro),
    "f1-micro": Metric("F1 over all labels; an illegal output is one wrong label", _LABEL_KINDS, _f1_micro),
    "matthews": Metric("Matthews correlation of any classes", ("label", "tagging"), _matthews, low=-1.0),
    "pearson": Metric(
        "linear correlation; illegal: the gold mean", ("regression",), _correlation(ranked=False), low=-1.0
    ),
    "spearman": Metric(
        "rank correlation; illegal: the gold mean", ("regression",), _correlation(ranked=True), low=-1.0
    ),
    "squad-em": Metric(
        "share of answers equal to a gold one, SQuAD-normalized", _TEXT_KINDS, _of_text(text_metrics.squad_em)
    ),
    "squad-f1": Metric(
        "mean word F1 with the nearest gold answer, SQuAD-normalized", _TEXT_KINDS, _of_text(text_metrics.squad_f1)
    ),
    "rouge-l": Metric(
        "mean ROUGE-L F with the nearest gold text, no stemming", _TEXT_KINDS, _of_text(text_metrics.rouge_l)
    ),
    "bleu": Metric("sacreBLEU's corpus BLEU (13a, exp) divided by 100", _TEXT_KINDS, _of_text(text_metrics.bleu)),
    "exact-match": Metric(
        "share of strings equal to a gold one, stripped", _TEXT_KINDS, _of_text(text_metrics.exact_match)
    ),
}
