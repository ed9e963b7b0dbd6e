"""Keys of earlier releases are refused with their names of today, and read where they are stored."""

import pytest

from softprompts.config import Run, find_old_keys, override, parse, update_old_keys, update_old_options
from softprompts.config.old_keys import OLD_KEYS
from softprompts.errors import ConfigError
from softprompts.recipes.multitask import Plan


def test_an_old_key_is_refused_with_the_new_one_named():
    with pytest.raises(ConfigError) as error:
        parse({"train": {"steps": 5, "batch_size": 4}}, origin="run.yaml")
    assert str(error.value) == (
        "run.yaml: unknown key 'train'; it is called 'training' now; "
        "run.yaml: unknown key 'train.steps'; it is called 'training.max_steps' now"
    )


def test_an_old_key_in_a_new_section_is_refused():
    with pytest.raises(ConfigError, match=r"unknown key 'training\.rate'; it is called 'training.learning_rate' now"):
        parse(override({}, ["training.rate=0.1"]))


@pytest.mark.parametrize(
    ("values", "renames"),
    [
        ({"task": {"verbaliser": {"a": "b"}}}, [("task.verbaliser", "task.verbalizer")]),
        ({"tasks": [{}, {"chat_place": "user"}]}, [("tasks.1.chat_place", "tasks.1.chat_placement")]),
        (
            {"runs": [{"name": "a", "train.rate": 1}]},
            [("runs.0.train", "runs.0.training"), ("runs.0.train.rate", "runs.0.training.learning_rate")],
        ),
        (
            {"prompt": {"method": "idpg", "options": {"normalise": True}}},
            [("prompt.options.normalise", "prompt.options.normalize")],
        ),
        ({"task": {"split": {"train": "a.csv"}}}, []),
        ({"training": {"train": "lora"}}, [("training.train", "training.target")]),
        (
            {"training": {"objectives": {"task": 1, "distil-logits": 0.5}}},
            [("training.objectives.distil-logits", "training.objectives.distill-logits")],
        ),
        (
            {"runs": [{"name": "a", "training.objectives.distil-hidden": 0.5}]},
            [("runs.0.training.objectives.distil-hidden", "runs.0.training.objectives.distill-hidden")],
        ),
    ],
)
def test_the_whole_path_of_an_old_key_is_found(values, renames):
    assert find_old_keys(values) == renames


def test_an_old_objective_is_refused_with_the_new_one_named():
    with pytest.raises(ConfigError) as error:
        parse(override({}, ["training.objectives.distil-hidden=0.5"]))
    assert str(error.value) == (
        "configuration: unknown key 'training.objectives.distil-hidden'; "
        "it is called 'training.objectives.distill-hidden' now"
    )


def test_keys_of_plans_and_their_base_classes_are_found():
    values = {"target": {"rates": [0.1], "train": {"warmup": 3}, "factor_rate": 2}, "out": "x"}
    assert find_old_keys(values, Plan) == [
        ("target.rates", "target.learning_rates"),
        ("target.train", "target.training"),
        ("target.train.warmup", "target.training.warmup_steps"),
        ("target.factor_rate", "target.factor_learning_rate"),
        ("out", "output_dir"),
    ]


def test_a_stored_run_of_an_earlier_release_is_read():
    stored = {
        "model": {"name": "m", "quantise": "int8", "products": "torch"},
        "prompt": {"length": 5, "init": {"kind": "artefact", "path": "p"}},
        "task": {"name": "t", "split": {"train": "a.csv"}, "verbaliser": {"x": "y"}},
        "train": {
            "steps": 3,
            "keep": False,
            "objectives": {"task": 1, "distil-logits": 0.5},
            "distil": {"teachers": {"t": "p"}},
        },
        "evaluate": {"normalise": True},
        "vector": {"sum": "a + b"},
        "out": "runs/t",
    }
    assert update_old_keys(stored) == {
        "model": {"name": "m", "quantize": "int8", "matmul_backend": "torch"},
        "prompt": {"num_virtual_tokens": 5, "init": {"kind": "artifact", "path": "p"}},
        "task": {"name": "t", "split": {"train": "a.csv"}, "verbalizer": {"x": "y"}},
        "training": {
            "max_steps": 3,
            "save_model": False,
            "objectives": {"task": 1, "distill-logits": 0.5},
            "distillation": {"teachers": {"t": "p"}},
        },
        "evaluation": {"normalize": True},
        "vector": {"sum": "a + b"},
        "output_dir": "runs/t",
    }
    assert update_old_options("idpg", {"normalise": False, "hidden": 4}) == {"normalize": False, "hidden": 4}


def test_what_has_todays_keys_stays_as_it_is():
    values = Run().model_dump(mode="json")
    assert update_old_keys(values) == values
    assert find_old_keys(values) == []


def test_no_new_key_is_an_old_one_of_the_same_section():
    for section, names in OLD_KEYS.items():
        assert not set(names) & set(names.values()), section
