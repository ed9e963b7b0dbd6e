"""The task loss by its formula, and refusals."""

import math

import pytest
import torch

from softprompts.errors import ConfigError, DataError
from softprompts.training import objectives
from softprompts.types import IGNORE, Output, Step


def loss(logits, labels):
    output = Output(torch.tensor(logits), torch.tensor(labels), torch.arange(len(labels)))
    return float(objectives.task(Step(None, None, output)))


def test_classes_count_but_ignored_labels_do_not():
    two = [[0.0, math.log(3.0)], [0.0, math.log(3.0)], [5.0, -5.0]]
    assert loss(two, [0, 1, IGNORE]) == pytest.approx((math.log(4) + math.log(4 / 3)) / 2)


def test_values_and_several_labels():
    assert loss([[1.0], [3.0]], [0.0, 1.0]) == pytest.approx((1 + 4) / 2)
    assert loss([[0.0, 0.0]], [[1.0, 0.0]]) == pytest.approx(math.log(2))


def test_nothing_to_learn_from_is_said():
    with pytest.raises(DataError, match="no label to learn from"):
        loss([[1.0, 2.0]], torch.empty(0, dtype=torch.long).tolist())


def test_objectives_are_weighed_and_unknown_ones_refused():
    step = Step(None, None, Output(torch.tensor([[0.0, 0.0]]), torch.tensor([1]), torch.tensor([0])))
    assert float(objectives.weigh({"task": 0.5})(step)) == pytest.approx(0.5 * math.log(2))
    with pytest.raises(ConfigError, match="did you mean 'task'"):
        objectives.weigh({"tusk": 1.0})
