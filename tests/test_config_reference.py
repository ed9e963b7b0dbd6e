"""Every key of a configuration is listed with its type, its default and its help."""

import json

import pytest
from studies.instance_prompts import Study as InstanceStudy
from studies.task_prompt_vectors import Study as VectorStudy

from softprompts.config import Run, TrainConfig, parse
from softprompts.config.reference import Key, json_schema, list_keys
from softprompts.errors import ConfigError
from softprompts.methods import METHODS, find
from softprompts.recipes.multitask import Plan

SECTIONS = {"run": Run, "multitask": Plan, "vectors": VectorStudy, "instance": InstanceStudy}


@pytest.mark.parametrize("name", SECTIONS)
def test_every_key_has_a_type_and_help(name):
    for key in list_keys(SECTIONS[name]):
        assert key.help.endswith("."), key
        assert key.type, key
        assert len(key.help.split()) <= 25, key


@pytest.mark.parametrize("name", METHODS)
def test_every_option_of_a_method_has_help(name):
    for key in list_keys(find(name).Config):
        assert key.help, key


def test_the_keys_of_a_run_are_those_that_set_takes():
    keys = {key.path: key for key in list_keys()}
    assert keys["training.max_steps"] == Key("training.max_steps", "integer >= 0", "300", "Training steps.")
    assert keys["model.quantize"].type == "int8 | nf4 | fp4 | null"
    assert keys["model.quantize"].default == "null"
    assert keys["tasks[].separator"].default == '" "'
    assert keys["training.distillation.teachers"].default == ""
    assert keys["prompt.init.start"].type == "as prompt.init"
    fields = {key.split(".")[1] for key in keys if key.startswith("training.")}
    assert fields == set(TrainConfig.model_fields)


def test_a_section_that_comes_again_lists_what_differs():
    keys = {key.path: key for key in list_keys(Plan)}
    assert keys["teachers.training.warmup_steps"].default == "30"
    assert keys["target.few"].type == "as teachers.training"
    assert json.loads(keys["target.few"].default) == {"batch_size": 8, "max_steps": 60, "warmup_steps": 5}
    assert keys["targets"] == Key("targets", "list of as sources[]", "", keys["targets"].help)


def test_the_json_schema_knows_one_task_and_the_options_of_each_method():
    schema = json_schema(Run, {name: find(name).Config for name in ("idpg", "low-rank")})
    assert schema["properties"]["task"]["$ref"] == "#/$defs/TaskConfig"
    assert schema["additionalProperties"] is False
    rules = {
        rule["if"]["properties"]["method"]["const"]: rule["then"] for rule in schema["$defs"]["PromptConfig"]["allOf"]
    }
    assert set(rules) == {"idpg", "low-rank"}
    assert rules["idpg"]["properties"]["options"]["properties"]["kind"]["enum"] == ["auto", "S", "M", "L"]
    assert schema["$defs"]["TrainConfig"]["properties"]["max_steps"]["description"] == "Training steps."


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"task": {"split": {"limit": {"train": 0}}}}, r"tasks.0.split.limit.train: .* equal to 1 \(given: 0\)$"),
        ({"training": {"learning_rates": {"codes": -1}}}, r"training.learning_rates.codes: .* greater than 0"),
        ({"training": {"sampling": {"draw": "all"}, "batch_tokens": 9}}, "draw 'all' draws tasks first"),
        ({"training": {"objectives": {"distill-hidden": 1}}}, "'distill-hidden' compares with teachers; name them in"),
        ({"training": {"distillation": {"teachers": {}}}}, "names teachers that nothing uses"),
        ({"model": {"head": "features"}}, "head 'features' has nothing to train on"),
        ({"model": {"head": "token"}, "tasks": [{"name": "a"}, {"name": "b"}]}, "for one task at a time"),
        ({"prompt": {"site": "kv"}, "task": {"chat": True, "chat_placement": "user"}}, "nothing can come before"),
    ],
)  # fmt: skip
def test_what_a_configuration_alone_shows_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        parse(values)
