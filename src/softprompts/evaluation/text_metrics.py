"""The metrics that compare strings: exact match, those of SQuAD, ROUGE-L and BLEU.

Each reads predictions [N] (None: an illegal output, never right) and references [N] (a string, or several gold ones; an
empty list stands for the empty answer), and answers with a function of row counts, as metrics.py describes.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Values = Callable[[np.ndarray], np.ndarray]  # row counts [R, N] -> values [R]
Measured = tuple[Values, int, str]  # what a metric has read: its values, rows with an illegal output, a note


def exact_match(predictions: Sequence[Any], references: Sequence[Any]) -> Measured:
    """Take the share of strings equal to a gold one, white space at the ends aside."""
    return _mean_of_rows(_equal(str.strip), predictions, references)


def squad_em(predictions: Sequence[Any], references: Sequence[Any]) -> Measured:
    """Take the share of answers equal to a gold one under SQuAD's normalization (Rajpurkar et al. 2016)."""
    return _mean_of_rows(_equal(_normal), predictions, references)


def squad_f1(predictions: Sequence[Any], references: Sequence[Any]) -> Measured:
    """Average the F1 of words with the nearest gold answer, as the script of SQuAD 2.0 (Rajpurkar et al. 2018)."""

    def best(guess: str, golds: list[str]) -> float:
        words = _normal(guess).split()
        return max(_word_f1(words, _normal(gold).split()) for gold in golds)

    return _mean_of_rows(best, predictions, references)


def rouge_l(predictions: Sequence[Any], references: Sequence[Any]) -> Measured:
    """Average ROUGE-L's F with the nearest gold text, no stemming (Lin 2004, by the package rouge-score)."""
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    values, illegal, _ = _mean_of_rows(
        lambda guess, golds: scorer.score_multi(golds, guess)["rougeL"].fmeasure, predictions, references
    )
    blind = sum(not re.search("[a-z0-9]", " ".join(_golds(reference)).lower()) for reference in references)
    note = f"ROUGE reads only a-z and 0-9: {blind} references hold neither and score 0"
    return values, illegal, note if blind else ""


def bleu(predictions: Sequence[Any], references: Sequence[Any]) -> Measured:
    """Take the corpus BLEU, in 0..1 (Papineni et al. 2002, by sacreBLEU with tokens 13a and smoothing exp)."""
    from sacrebleu.metrics.bleu import BLEU

    scorer = BLEU(force=True)  # force only silences a hint about text that looks tokenized
    pairs = zip(predictions, references, strict=True)
    found = [scorer.corpus_score([guess or ""], [[text] for text in _golds(gold)]) for guess, gold in pairs]
    each = np.array([[*row.counts, *row.totals, row.sys_len, row.ref_len] for row in found], dtype=np.float64)

    def values(counts: np.ndarray) -> np.ndarray:
        corpus = (counts @ each).round().astype(np.int64).tolist()
        scores = [BLEU.compute_bleu(c[:4], c[4:8], c[8], c[9], smooth_method="exp").score for c in corpus]
        return np.minimum(np.array(scores) / 100, 1.0)

    return values, sum(prediction is None for prediction in predictions), ""


def _golds(reference: Any) -> list[str]:
    return [reference] if isinstance(reference, str) else list(reference) or [""]


def _mean_of_rows(
    best: Callable[[str, list[str]], float], predictions: Sequence[Any], references: Sequence[Any]
) -> Measured:
    """Average what `best` gives one string against its gold ones."""
    pairs = zip(predictions, references, strict=True)
    each = np.array([0.0 if guess is None else best(guess, _golds(gold)) for guess, gold in pairs])
    return lambda counts: counts @ each / counts.sum(axis=1), sum(guess is None for guess in predictions), ""


def _normal(text: str) -> str:
    """Lower the case, drop punctuation, articles and surplus space: the script of SQuAD (Rajpurkar et al. 2016)."""
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def _equal(normal: Callable[[str], str]) -> Callable[[str, list[str]], float]:
    return lambda guess, golds: float(normal(guess) in map(normal, golds))


def _word_f1(words: list[str], right: list[str]) -> float:
    shared = sum((Counter(words) & Counter(right)).values())
    # as SQuAD 2.0: an empty answer is right where the gold one is empty
    return 2 * shared / (len(words) + len(right)) if words or right else 1.0
