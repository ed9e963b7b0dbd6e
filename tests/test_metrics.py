"""The metrics against independent references, and what must hold for any rows."""

import math
import random
from itertools import chain

import numpy as np
import pytest
import sklearn.metrics as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score import rouge_scorer
from sacrebleu.metrics.bleu import BLEU
from scipy import stats

from softprompts.errors import ConfigError, DataError, SoftPromptsError
from softprompts.evaluation.metrics import (
    KINDS,
    METRICS,
    ClassScore,
    Rows,
    confusion,
    default_metrics,
    majority_vote,
    per_class,
    score,
)

LABELS = ["ABBR", "DESC", "ENTY", "HUM"]
GUESSES = ["HUM", "DESC", None, "ENTY", "DESC", "HUM", "HUM", "ABBR", None, "DESC"]
GOLDS = ["HUM", "DESC", "DESC", "ENTY", "HUM", "HUM", "ENTY", "ABBR", "ABBR", "DESC"]
TEXTS = ["the cat sat on the mat today", "a dog ran home quickly", None, "nothing like it at all"]
TEXT_GOLDS = [
    ["the cat sat on the mat", "a cat sat there"],
    "a dog ran to its home quickly",
    "some words to be missed",
    ["entirely other text here"],
]
SAMPLES = {
    "label": (GUESSES, GOLDS),
    "multilabel": ([{"a"}, {"a", "b"}, None, set()], [{"a"}, {"b"}, {"c"}, set()]),
    "tagging": ([["O", "B"], ["O", None, "I"], None], [["O", "B"], ["B", "B", "I"], ["O"]]),
    "regression": ([1.0, 2.5, None, 4.0, 3.0], [1.5, 2.0, 3.0, 5.0, 2.5]),
    "span": (["The Eiffel Tower.", "paris", None], [["Eiffel tower"], ["in Paris", "Paris, France"], ["no"]]),
    "generation": (TEXTS, TEXT_GOLDS),
}
CASES = [(name, kind) for name, metric in METRICS.items() for kind in metric.kinds]


def some(name: str, kind: str, **more):
    guesses, golds = SAMPLES[kind]
    positive = {"label": "HUM", "multilabel": "b", "tagging": "B"}.get(kind) if name == "f1" else None
    return score(name, guesses, golds, **{"kind": kind, "positive": positive, "resamples": 200} | more)


# --- values -----------------------------------------------------------------------------------------------------------


def test_label_metrics_equal_scikit_learn():
    filled = [guess or "?" for guess in GUESSES]
    assert score("accuracy", GUESSES, GOLDS).value == pytest.approx(reference.accuracy_score(GOLDS, filled))
    assert score("matthews", GUESSES, GOLDS).value == pytest.approx(reference.matthews_corrcoef(GOLDS, filled))
    macro = reference.f1_score(GOLDS, filled, labels=LABELS, average="macro")  # the illegal output is no class
    assert score("f1-macro", GUESSES, GOLDS).value == pytest.approx(macro)
    micro = reference.f1_score(GOLDS, filled, average="micro")
    assert score("f1-micro", GUESSES, GOLDS).value == pytest.approx(micro) == pytest.approx(0.6)
    one = reference.f1_score([gold == "HUM" for gold in GOLDS], [guess == "HUM" for guess in GUESSES])
    assert score("f1", GUESSES, GOLDS, positive="HUM").value == pytest.approx(one)
    assert score("accuracy", GUESSES, GOLDS).illegal == 2


def test_integer_labels_and_arrays():
    guesses, golds = np.array([0, 1, 2, 2]), np.array([0, 1, 1, 2])
    assert score("accuracy", guesses, golds).value == 0.75
    assert score("f1", guesses, golds, positive=1).value == pytest.approx(2 / 3)


def test_multilabel_equals_scikit_learn():
    golds = [{"a"}, {"a", "b"}, {"c"}, {"b"}, set()]
    guesses = [{"a", "c"}, {"a", "b"}, set(), {"a"}, set()]
    table = [[[label in row for label in "abc"] for row in rows] for rows in (golds, guesses)]
    for average in ("micro", "macro"):
        expected = reference.f1_score(*table, average=average, zero_division=0)
        assert score(f"f1-{average}", guesses, golds).value == pytest.approx(expected)
    assert score("accuracy", guesses, golds).value == reference.accuracy_score(*table) == 0.4
    as_lists = [[sorted(row) for row in rows] for rows in (guesses, golds)]
    assert score("f1-micro", *as_lists, kind="multilabel") == score("f1-micro", guesses, golds)
    assert score("f1-micro", [None], [{"a"}]).value == 0.0


def test_tags_are_counted_one_by_one():
    found = some("accuracy", "tagging")
    assert (found.value, found.n, found.illegal) == (pytest.approx(3 / 6), 3, 2)
    flat_gold, flat = ["O", "B", "B", "B", "I", "O"], ["O", "B", "O", "?", "I", "?"]
    macro = reference.f1_score(flat_gold, flat, labels=["B", "I", "O"], average="macro")
    assert some("f1-macro", "tagging").value == pytest.approx(macro)


def test_generated_tags_may_be_too_few_or_too_many():
    golds = [["O", "B"], ["O", "B"], ["O", "B"]]
    found = score("accuracy", [["O"], ["O", "B", "B"], ["O", "B"]], golds, kind="tagging")
    assert (found.value, found.illegal) == (pytest.approx(3 / 6), 2)


def test_correlations_equal_scipy():
    draw = np.random.default_rng(1)
    golds = draw.integers(0, 6, 80).astype(float)
    guesses = golds + draw.normal(0, 2, 80).round()  # many ties
    assert score("pearson", guesses, golds).value == pytest.approx(stats.pearsonr(guesses, golds).statistic)
    assert score("spearman", guesses, golds).value == pytest.approx(stats.spearmanr(guesses, golds).statistic)
    assert score("pearson", 1e9 + guesses / 1e3, golds * 1e-9).value == pytest.approx(
        stats.pearsonr(guesses, golds).statistic, rel=1e-4
    )


def test_an_illegal_number_is_the_mean_of_the_references():
    for name in ("pearson", "spearman"):
        found = score(name, [1.0, None, 4.0, math.nan], [1, 2, 5, 4])
        assert found.value == score(name, [1.0, 3.0, 4.0, 3.0], [1, 2, 5, 4]).value
        assert found.illegal == 2


def test_squad_by_hand():
    assert some("squad-em", "span").value == pytest.approx(1 / 3)
    assert some("squad-f1", "span").value == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert score("squad-f1", ["the"], [[]]).value == 1.0  # SQuAD 2.0: an article is empty, and so is the answer


def test_rouge_and_bleu_equal_their_packages():
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    rows = [
        max(
            scorer.score(gold, guess or "")["rougeL"].fmeasure
            for gold in ([golds] if isinstance(golds, str) else golds)
        )
        for guess, golds in zip(TEXTS, TEXT_GOLDS, strict=True)
    ]
    assert some("rouge-l", "generation").value == pytest.approx(np.mean(rows))
    golds = [row if isinstance(row, str) else row[0] for row in TEXT_GOLDS]
    corpus = BLEU(force=True).corpus_score([text or "" for text in TEXTS], [golds]).score
    assert corpus > 5
    assert score("bleu", TEXTS, golds).value == pytest.approx(corpus / 100)
    assert "2 references" in score("rouge-l", ["a", "b", "c"], ["ø", "b", "æ"]).note


def test_exact_match_strips_only():
    assert score("exact-match", [" yes", "Yes", None], ["yes ", "yes", "no"]).value == pytest.approx(1 / 3)


def test_confusion_and_classes():
    matrix = confusion(GUESSES, GOLDS, LABELS)
    filled = [guess or "?" for guess in GUESSES]
    assert (matrix == reference.confusion_matrix(GOLDS, filled, labels=[*LABELS, "?"])[:4]).all()
    parts = reference.precision_recall_fscore_support(GOLDS, filled, labels=LABELS)
    for at, found in enumerate(per_class(GUESSES, GOLDS, LABELS)):
        assert (found.precision, found.recall, found.f1, found.support) == pytest.approx([part[at] for part in parts])
    assert confusion([["O", "X"]], [["O", "B"]], ["O", "B"]).tolist() == [[1, 0, 0], [0, 0, 1]]
    assert per_class(["a"], ["a"], ["b"]) == [ClassScore("b", 0.0, 0.0, 0.0, 0)]
    with pytest.raises(DataError, match="none of the labels"):
        confusion(["a"], ["z"], ["a"])


# --- intervals --------------------------------------------------------------------------------------------------------


def test_the_interval_of_accuracy_is_the_binomial_one():
    golds, guesses = ["a"] * 1000, ["a"] * 700 + ["b"] * 300
    found = score("accuracy", guesses, golds, resamples=2000)
    low, high = stats.binom.ppf([0.025, 0.975], 1000, 0.7) / 1000
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.004)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_every_resample_is_the_metric_of_its_rows(name, kind):
    """The values of row counts are those of the rows written out that often: the formula that the interval rests on."""
    guesses, golds = SAMPLES[kind]
    positive = {"label": "HUM", "multilabel": "b", "tagging": "B"}.get(kind)
    draw = np.random.default_rng(7)
    for _ in range(5):
        counts = np.bincount(draw.integers(0, len(golds), len(golds)), minlength=len(golds))
        rows = np.repeat(np.arange(len(golds)), counts)
        written = ([guesses[row] for row in rows], [golds[row] for row in rows])
        if kind == "regression":  # the stand-in for an illegal number is fixed by all rows
            mean = float(np.mean(golds))
            written = ([mean if guess is None else guess for guess in written[0]], written[1])
        measurement = METRICS[name].measure(Rows(guesses, golds, kind, positive))
        alone = score(name, *written, kind=kind, positive=positive, resamples=0).value
        assert measurement.of_counts(counts[None].astype(float))[0] == pytest.approx(alone, nan_ok=True)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_bootstrap_is_seeded(name, kind):
    assert some(name, kind, seed=3) == some(name, kind, seed=3)
    found = some(name, kind)
    assert found.low <= found.value <= found.high
    assert METRICS[name].low <= found.low <= found.high <= METRICS[name].high


def test_another_seed_draws_other_rows():
    guesses, golds = list(np.random.default_rng(0).normal(size=50)), list(np.random.default_rng(1).normal(size=50))
    assert score("pearson", guesses, golds, seed=1).low != score("pearson", guesses, golds, seed=2).low


def test_no_interval_where_none_is_asked_for():
    found = score("accuracy", ["a"], ["a"], resamples=0)
    assert found.value == 1.0
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_many_rows_stay_cheap():
    """Chunks and the cap: the same answer as small, and fewer resamples than asked for."""
    golds = ["a", "b"] * 150_000
    found = score("accuracy", ["a"] * 300_000, golds, resamples=10**9, seed=1)
    assert found.low == pytest.approx(0.5 - 1.96 * math.sqrt(0.25 / 300_000), abs=3e-4)


# --- properties -------------------------------------------------------------------------------------------------------

label_rows = st.lists(st.tuples(st.sampled_from([*LABELS, None]), st.sampled_from(LABELS)), min_size=1, max_size=30)
number_rows = st.lists(st.tuples(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6)), min_size=2, max_size=30)
text_rows = st.lists(
    st.tuples(st.text("ab .", max_size=12) | st.none(), st.text("ab .", max_size=12)), min_size=1, max_size=9
)
LABEL_METRICS = {"accuracy", "f1", "f1-macro", "f1-micro", "matthews"}
ROWS = {"label": label_rows, "regression": number_rows, "span": text_rows, "generation": text_rows}


@pytest.mark.parametrize(("name", "kind"), [case for case in CASES if case[1] in ROWS])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_bounds_order_and_illegal_outputs(name, kind, data):
    pairs = data.draw(ROWS[kind])
    more = {"positive": "HUM", "resamples": 30, "kind": kind}
    found = score(name, *zip(*pairs, strict=True), **more)
    assert found.illegal == sum(guess is None for guess, _ in pairs)
    assert bool(math.isnan(found.value)) <= bool(found.note)  # nan is explained
    mixed = random.Random(0).sample(pairs, len(pairs))
    assert score(name, *zip(*mixed, strict=True), **more).value == pytest.approx(found.value, nan_ok=True, abs=1e-9)
    if not math.isnan(found.low):
        assert METRICS[name].low <= found.low <= found.value <= found.high <= METRICS[name].high


@pytest.mark.parametrize("name", ["accuracy", "f1-macro", "f1-micro", "exact-match", "squad-em", "squad-f1"])
@given(golds=st.lists(st.sampled_from(LABELS), min_size=1, max_size=20))
@settings(max_examples=25, deadline=None)
def test_a_perfect_prediction_is_one(name, golds):
    found = score(name, golds, golds, resamples=20)
    assert (found.value, found.low, found.high) == pytest.approx((1.0, 1.0, 1.0))
    wrong = score(name, [None] * len(golds), golds, resamples=0)
    assert (wrong.value, wrong.illegal) == (0.0, len(golds))


def test_a_perfect_prediction_is_one_elsewhere():
    text = ["the cat sat on the mat", "four words at least"]
    for name in ("rouge-l", "bleu"):
        assert score(name, text, text).value == pytest.approx(1.0)
    for name in ("pearson", "spearman"):
        assert score(name, [1, 2, 7], [1, 2, 7]).value == pytest.approx(1.0)
        assert score(name, [-1, -2, -7], [1, 2, 7]).value == pytest.approx(-1.0)
    assert score("matthews", GOLDS, GOLDS).value == pytest.approx(1.0)


ILLEGAL = "?"
set_rows = st.lists(
    st.tuples(st.none() | st.sets(st.sampled_from(LABELS)), st.sets(st.sampled_from(LABELS))), min_size=1, max_size=20
)
tag_rows = st.lists(
    st.lists(st.tuples(st.sampled_from([*LABELS, None]), st.sampled_from(LABELS)), min_size=1, max_size=6),
    min_size=1,
    max_size=8,
)


def of_all_rows(name, guesses, golds, kind, positive=None):
    """The value of a metric, after a check that a resample with every row once has the same."""
    measurement = METRICS[name].measure(Rows(guesses, golds, kind, positive))
    assert measurement.of_counts(np.ones((1, len(golds))))[0] == pytest.approx(measurement.value, nan_ok=True)
    return measurement.value


def check_flat_labels(values, guesses, golds):
    """Compare the values of label metrics with scikit-learn's on labels with a word for illegal outputs."""
    filled = [guess or ILLEGAL for guess in guesses]
    present = sorted({*golds, *filled} - {ILLEGAL})
    expected = {
        "accuracy": reference.accuracy_score(golds, filled),
        "f1-macro": reference.f1_score(golds, filled, labels=present, average="macro"),
        "f1-micro": reference.f1_score(golds, filled, average="micro"),
        "matthews": reference.matthews_corrcoef(golds, filled) if len({*golds, *filled}) > 1 else 0.0,
        "f1": reference.f1_score([gold == "HUM" for gold in golds], [guess == "HUM" for guess in filled])
        if "HUM" in present
        else math.nan,
    }
    assert values == pytest.approx(expected, nan_ok=True)


@settings(max_examples=60, deadline=None)
@given(rows=label_rows)
def test_label_metrics_equal_scikit_learn_on_any_rows(rows):
    guesses, golds = map(list, zip(*rows, strict=True))
    values = {name: of_all_rows(name, guesses, golds, "label", "HUM") for name in METRICS if name in LABEL_METRICS}
    check_flat_labels(values, guesses, golds)
    filled = [guess or ILLEGAL for guess in guesses]
    every = [*LABELS, ILLEGAL]
    assert (confusion(guesses, golds, LABELS) == reference.confusion_matrix(golds, filled, labels=every)[:-1]).all()
    parts = reference.precision_recall_fscore_support(golds, filled, labels=LABELS, zero_division=0)
    for label_score, *expected in zip(per_class(guesses, golds, LABELS), *parts, strict=True):
        assert [
            label_score.precision,
            label_score.recall,
            label_score.f1,
            label_score.support,
        ] == pytest.approx(expected)


@settings(max_examples=60, deadline=None)
@given(rows=tag_rows)
def test_tag_metrics_equal_scikit_learn_on_any_rows(rows):
    guesses = [[guess for guess, _ in row] for row in rows]
    golds = [[gold for _, gold in row] for row in rows]
    values = {name: of_all_rows(name, guesses, golds, "tagging", "HUM") for name in METRICS if name in LABEL_METRICS}
    check_flat_labels(values, list(chain.from_iterable(guesses)), list(chain.from_iterable(golds)))


@settings(max_examples=60, deadline=None)
@given(rows=set_rows)
def test_multilabel_metrics_equal_scikit_learn_on_any_rows(rows):
    guesses, golds = map(list, zip(*rows, strict=True))
    every = [*LABELS, ILLEGAL]
    filled = [{ILLEGAL} if guess is None else guess for guess in guesses]
    gold_table = [[label in row for label in every] for row in golds]
    guess_table = [[label in row for label in every] for row in filled]
    assert of_all_rows("accuracy", guesses, golds, "multilabel") == reference.accuracy_score(gold_table, guess_table)
    micro = reference.f1_score(gold_table, guess_table, average="micro", zero_division=math.nan)
    assert of_all_rows("f1-micro", guesses, golds, "multilabel") == pytest.approx(micro, nan_ok=True)
    each = reference.f1_score(gold_table, guess_table, average=None, zero_division=math.nan)[:-1]
    macro = np.nanmean(each) if not np.isnan(each).all() else math.nan
    assert of_all_rows("f1-macro", guesses, golds, "multilabel") == pytest.approx(macro, nan_ok=True)
    binary = each[LABELS.index("HUM")]
    assert of_all_rows("f1", guesses, golds, "multilabel", "HUM") == pytest.approx(binary, nan_ok=True)


# --- the vote ---------------------------------------------------------------------------------------------------------


def test_vote_by_hand():
    assert majority_vote(["b", "a", "a"]) == "a"
    assert majority_vote(["b", "a", "a", "b"]) == "b"  # a tie: the first prompt's answer among the tied
    assert majority_vote(["c", "a", "b", "b", "a"]) == "a"
    assert majority_vote([None, None, "a"]) == "a"
    assert majority_vote([None, None]) is None
    with pytest.raises(DataError, match="no votes"):
        majority_vote([])


@given(votes=st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=9))
def test_vote_invariants(votes):
    elected = majority_vote(votes)
    legal = [answer for answer in votes if answer is not None]
    assert majority_vote([*votes, None]) == majority_vote([None, *votes]) == elected
    assert majority_vote(votes + votes) == elected
    assert (elected is None) == (not legal)
    if legal:
        assert all(legal.count(elected) >= legal.count(answer) for answer in legal)
        assert majority_vote([*votes, elected]) == elected
        renamed = {"a": "x", "b": "y", "c": "z", None: None}
        assert majority_vote([renamed[answer] for answer in votes]) == renamed[elected]


# --- errors and the table ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "more", "message"),
    [
        (("accuracy", [], []), {}, "no rows"),
        (("accuracy", ["a"], ["a", "b"]), {}, "1 predictions for 2 references"),
        (("acuracy", ["a"], ["a"]), {}, "did you mean 'accuracy'"),
        (("accuracy", ["a"], [None]), {}, "reference 0 is None"),
        (("accuracy", [0, 1], ["a", "b"]), {}, "can never equal"),
        (("f1", ["a"], ["a"]), {}, "needs the positive label"),
        (("accuracy", [["a"]], [["a"]]), {}, "kind='tagging' or kind='multilabel'"),
        (("accuracy", ["a"], [["a"]]), {"kind": "multilabel"}, "is one string"),
        (("matthews", [{"a"}], [{"a"}]), {}, "does not measure tasks of kind 'multilabel'"),
        (("pearson", [1.0], [math.nan]), {}, "reference 0 is not a finite number"),
        (("bleu", ["a"], ["a"]), {"kind": "regression"}, "does not measure"),
    ],
)
def test_errors_say_what_to_do(arguments, more, message):
    with pytest.raises(SoftPromptsError, match=message):
        score(*arguments, **more)


def test_what_is_undefined_is_nan_and_says_why():
    for name in ("pearson", "spearman"):
        found = score(name, [3.0, 3.0, 3.0], [1.0, 2.0, 3.0])
        assert math.isnan(found.value)
        assert "the predictions are all 3" in found.note
    found = score("f1", ["a"], ["a"], positive="z")
    assert math.isnan(found.value)
    assert "'z' neither gold nor predicted" in found.note


def test_default_metrics_fit_their_kind():
    for kind in KINDS:
        assert all(kind in METRICS[name].kinds for name in default_metrics(kind))
        assert all(some(name, kind).n == len(SAMPLES[kind][0]) for name in default_metrics(kind))
    with pytest.raises(ConfigError, match="no task kind 'labels'"):
        default_metrics("labels")
