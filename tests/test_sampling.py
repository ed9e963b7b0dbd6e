"""Task sampling: what a batch draws, counted over many batches against the distributions it promises."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from softprompts.config import SamplingConfig
from softprompts.data import EncodedExample, TaskBatches
from softprompts.data.sampling import mixing_weights

SIZES = (40, 400, 7, 90)


def rows(sizes=SIZES):
    return [EncodedExample([task, number], task_id=task) for task, size in enumerate(sizes) for number in range(size)]


def batches(count, size=12, sizes=SIZES, seed=0, **sampling):
    sampler = TaskBatches(rows(sizes), size, seed, SamplingConfig(**{"draw": "some", **sampling}))
    return [sampler.at(i) for i in range(count)]


def test_the_number_of_tasks_is_uniform_from_two_to_all():
    counts = Counter(len({row.task_id for row in batch}) for batch in batches(6000))
    assert sorted(counts) == [2, 3, 4]
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3


@pytest.mark.parametrize("mixing", ["proportional", "capped", "log", "equal"])
def test_first_tasks_are_drawn_by_their_weights(mixing):
    """With rows for one task only, which task it is follows the weights."""
    counts = Counter(batch[0].task_id for batch in batches(6000, size=1, mixing=mixing, cap=60))
    raw = {
        "proportional": SIZES,
        "capped": [min(size, 60) for size in SIZES],
        "log": np.log(SIZES),
        "equal": [1] * len(SIZES),
    }[mixing]
    expected = 6000 * np.array(raw) / np.sum(raw)
    assert stats.chisquare([counts[i] for i in range(len(SIZES))], expected).pvalue > 1e-3


def test_a_batch_is_full_and_split_evenly():
    for batch in batches(500, size=13):
        counts = Counter(row.task_id for row in batch)
        assert len(batch) == 13
        assert max(counts.values()) - min(counts.values()) <= 1


def test_rows_left_over_go_to_any_task():
    """Of 13 rows for two tasks, the seventh goes to either of them alike, whichever was drawn first."""
    more = Counter(
        Counter(row.task_id for row in batch).most_common(1)[0][0] for batch in batches(3000, size=13, sizes=(50, 50))
    )
    assert stats.chisquare([more[0], more[1]]).pvalue > 1e-3


def test_each_task_gives_all_its_rows_before_any_twice():
    seen = Counter(row.input_ids[1] for batch in batches(300, size=8) for row in batch if row.task_id == 0)
    assert len(seen) == 40
    assert max(seen.values()) - min(seen.values()) <= 1
    orders = [row.input_ids[1] for batch in batches(300, size=8) for row in batch if row.task_id == 0]
    assert orders[:40] != orders[40:80]
    assert sorted(orders[:40]) == sorted(orders[40:80]) == list(range(40))


def test_every_batch_has_every_task_where_all_are_drawn():
    assert all({row.task_id for row in batch} == {0, 1, 2, 3} for batch in batches(50, draw="all"))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=8), st.integers(1, 9), st.integers(0, 5))
def test_a_batch_depends_on_nothing_but_its_number(numbers, size, seed):
    """Whatever was asked before, as after a resume: the same rows for the same number."""
    straight = batches(61, size, seed=seed)
    jumping = TaskBatches(rows(), size, seed, SamplingConfig(draw="some"))
    for number in numbers:
        assert [row.input_ids for row in jumping.at(number)] == [row.input_ids for row in straight[number]]


def test_seeds_differ_and_one_task_is_enough():
    assert [r.input_ids for r in batches(1, seed=1)[0]] != [r.input_ids for r in batches(1, seed=2)[0]]
    assert len(batches(3, size=5, sizes=(3,))[2]) == 5


def test_weights_sum_to_one_and_a_single_row_counts_in_logarithms():
    for mixing in ("proportional", "capped", "log", "equal"):
        weights = mixing_weights([1, 10, 2**19], SamplingConfig(mixing=mixing))
        assert sum(weights) == pytest.approx(1)
        assert all(weight > 0 for weight in weights)
    assert mixing_weights([2**18, 2**19], SamplingConfig(mixing="capped")) == [0.5, 0.5]
