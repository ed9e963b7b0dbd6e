"""The metrics that compare strings: exact match, those of SQuAD, ROUGE-L and BLEU.

Each takes predictions [N] (None: an illegal output, never right) and references [N] (a string, or several gold ones; an
empty list means the empty answer), and returns the metric as a function of row counts, with a note.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

MetricOfCounts = Callable[[np.ndarray], np.ndarray]
"""Turns row counts [R, N] of R resamples into the metric's R values."""

TextMetric = Callable[[Sequence[Any], Sequence[Any]], tuple[MetricOfCounts, str]]
"""Turns predictions and references [N] into the metric as a function of row counts, and a note."""


def exact_match(predictions: Sequence[Any], references: Sequence[Any]) -> tuple[MetricOfCounts, str]:
    """The share of strings equal to a gold one, white space at the ends aside."""
    return _mean_of_rows(_equality(str.strip), predictions, references), ""


def squad_em(predictions: Sequence[Any], references: Sequence[Any]) -> tuple[MetricOfCounts, str]:
    """The share of answers equal to a gold one under SQuAD's normalization (Rajpurkar et al. 2016)."""
    return _mean_of_rows(_equality(_normalized), predictions, references), ""


def squad_f1(predictions: Sequence[Any], references: Sequence[Any]) -> tuple[MetricOfCounts, str]:
    """The mean F1 of words with the nearest gold answer, as the script of SQuAD 2.0 (Rajpurkar et al. 2018)."""

    def best_f1(prediction: str, golds: list[str]) -> float:
        words = _normalized(prediction).split()
        return max(_word_f1(words, _normalized(gold).split()) for gold in golds)

    return _mean_of_rows(best_f1, predictions, references), ""


def rouge_l(predictions: Sequence[Any], references: Sequence[Any]) -> tuple[MetricOfCounts, str]:
    """The mean ROUGE-L F with the nearest gold text, no stemming (Lin 2004, by the package rouge-score)."""
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)

    def best_f(prediction: str, golds: list[str]) -> float:
        return float(scorer.score_multi(golds, prediction)["rougeL"].fmeasure)

    unreadable = 0
    for reference in references:
        unreadable += not re.search("[a-z0-9]", " ".join(_golds(reference)).lower())
    note = f"ROUGE reads only a-z and 0-9: {unreadable} references hold neither and score 0"
    return _mean_of_rows(best_f, predictions, references), note if unreadable else ""


def bleu(predictions: Sequence[Any], references: Sequence[Any]) -> tuple[MetricOfCounts, str]:
    """The corpus BLEU, in 0..1 (Papineni et al. 2002, by sacreBLEU with tokens 13a and smoothing exp)."""
    from sacrebleu.metrics.bleu import BLEU

    scorer = BLEU(force=True)  # force only silences a hint about text that looks tokenized
    statistics = []
    for prediction, reference in zip(predictions, references, strict=True):
        row = scorer.corpus_score([prediction or ""], [[gold] for gold in _golds(reference)])
        statistics.append([*row.counts, *row.totals, row.sys_len, row.ref_len])
    statistics_of_rows = np.array(statistics, dtype=np.float64)

    def of_counts(counts: np.ndarray) -> np.ndarray:
        corpora = (counts @ statistics_of_rows).round().astype(np.int64).tolist()
        scores = []
        for corpus in corpora:
            matches, totals, output_length, reference_length = corpus[:4], corpus[4:8], corpus[8], corpus[9]
            bleu_score = BLEU.compute_bleu(matches, totals, output_length, reference_length, smooth_method="exp")
            scores.append(bleu_score.score)
        return np.minimum(np.array(scores) / 100, 1.0)

    return of_counts, ""


def _golds(reference: Any) -> list[str]:
    return [reference] if isinstance(reference, str) else list(reference) or [""]


def _mean_of_rows(
    score: Callable[[str, list[str]], float], predictions: Sequence[Any], references: Sequence[Any]
) -> MetricOfCounts:
    """The mean over rows of the score of a prediction against its gold strings; an illegal output scores 0."""
    scores = []
    for prediction, reference in zip(predictions, references, strict=True):
        scores.append(0.0 if prediction is None else score(prediction, _golds(reference)))
    scores_of_rows = np.array(scores)
    return lambda counts: counts @ scores_of_rows / counts.sum(axis=1)


def _normalized(text: str) -> str:
    """Lower the case, drop punctuation, articles and surplus space: the script of SQuAD (Rajpurkar et al. 2016)."""
    without_punctuation = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", without_punctuation).split())


def _equality(normalize: Callable[[str], str]) -> Callable[[str, list[str]], float]:
    """Whether a string equals one of the gold strings once all are normalized."""
    return lambda prediction, golds: float(normalize(prediction) in map(normalize, golds))


def _word_f1(words: list[str], gold_words: list[str]) -> float:
    shared = sum((Counter(words) & Counter(gold_words)).values())
    # As in SQuAD 2.0, an empty answer is right where the gold one is empty.
    return 2 * shared / (len(words) + len(gold_words)) if words or gold_words else 1.0
