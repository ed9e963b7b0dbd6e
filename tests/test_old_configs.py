"""The configurations in tests/data/configs use every key of their time once, with a value that is not its default.

They show that no key is forgotten when keys are renamed: each old key must then be refused with the new one named. What
depends on the library's API is in the functions on top.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from softprompts import methods
from softprompts.config import Run, Section, read
from softprompts.recipes.multitask import Plan
from softprompts.studies.instance_prompts.plan import Study as InstanceStudy
from softprompts.studies.task_prompt_vectors.plan import Study as VectorStudy

CONFIGS = Path(__file__).parent / "data" / "configs"
KINDS: dict[str, type[Section]] = {
    "run-prompt": Run,
    "run-vector": Run,
    "run-lora": Run,
    "run-backbone": Run,
    "run-device-map": Run,
    "pretrain": Run,
    "multitask": Plan,
    "study-vectors": VectorStudy,
    "study-instance": InstanceStudy,
}

# What the library is called with --------------------------------------------------------------------------------------


def parsed(name: str) -> Section:
    """The configuration of a file; raises ConfigError where a key is not known."""
    section: Section = read(CONFIGS / f"{name}.yaml", (), KINDS[name])
    return section


def changed(section: Section) -> Iterator[tuple[str, str]]:
    """(section class, key) of every key that differs from its default, in the section and those inside it."""
    for key, field in type(section).model_fields.items():
        value = getattr(section, key)
        if field.is_required() or value != field.get_default(call_default_factory=True):
            yield title(type(section)), key
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else (value,)
        for part in parts:
            if isinstance(part, Section):
                yield from changed(part)


def title(kind: type[Section]) -> str:
    """The name of a section's class; both studies call theirs Study."""
    return {InstanceStudy: "InstanceStudy", VectorStudy: "VectorStudy"}.get(kind, kind.__name__)


def keys(kind: type[Section]) -> set[tuple[str, str]]:
    """(section class, key) of every key of a section."""
    return {(title(kind), key) for key in kind.model_fields}


def sections(section: Section) -> Iterator[type[Section]]:
    """The classes of a section and of those inside it."""
    yield type(section)
    for key in type(section).model_fields:
        value = getattr(section, key)
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else (value,)
        for part in parts:
            if isinstance(part, Section):
                yield from sections(part)


def options(entry: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of a method as it reads them, and its defaults."""
    config = methods._configured(entry["method"], entry["options"])
    return dataclasses.asdict(config), dataclasses.asdict(methods.find(entry["method"]).Config())


# Tests ----------------------------------------------------------------------------------------------------------------


def test_every_configuration_has_a_test() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*KINDS, "options"}


@pytest.mark.parametrize("name", KINDS)
def test_a_configuration_of_its_time_is_read(name: str) -> None:
    written = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    section = parsed(name)
    assert set(written) - {"task"} <= set(type(section).model_fields)


def test_together_the_configurations_change_every_key() -> None:
    """Of every section that occurs in them, with the whole run among these."""
    every: set[tuple[str, str]] = set()
    seen: set[tuple[str, str]] = set()
    for name in KINDS:
        section = parsed(name)
        for kind in sections(section):
            every |= keys(kind)
        for owner, key in changed(section):
            seen.add((owner, key))
    assert every - seen == set()
    run = {"Run", "ModelConfig", "PromptConfig", "InitConfig", "TaskConfig", "SplitConfig", "TrainConfig"}
    run |= {"SamplingConfig", "DistilConfig", "LoraConfig", "EvaluateConfig"}
    plan = {"Plan", "TeacherStage", "SourceStage", "TargetStage"}
    vectors = {"VectorStudy", "VectorStage", "SumStage", "FewStage", "Unseen"}
    instance = {"InstanceStudy", "Arm", "ComparisonStage", "PretrainStage", "SpeedStage"}
    assert {owner for owner, _ in every} == run | plan | vectors | instance


def test_together_the_options_of_every_method_are_changed() -> None:
    entries = yaml.safe_load((CONFIGS / "options.yaml").read_text(encoding="utf-8"))
    assert {entry["method"] for entry in entries} == set(methods.METHODS)
    left: dict[str, set[str]] = {}
    for entry in entries:
        given, default = options(entry)
        unchanged = {key for key in default if given[key] == default[key]}
        left[entry["method"]] = left.get(entry["method"], unchanged) & unchanged
    assert left == {name: set() for name in methods.METHODS}
