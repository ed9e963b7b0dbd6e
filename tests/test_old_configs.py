"""Keys of configurations that were renamed are refused with the new key named; tests/data/configs has all old ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from studies.instance_prompts.plan import Study as InstanceStudy
from studies.task_prompt_vectors.plan import Study as VectorStudy

from softprompts.config import OLD_KEYS, Run, Section, find_old_keys, parse, read, update_old_keys, update_old_options
from softprompts.config.old_keys import section_in
from softprompts.errors import ConfigError
from softprompts.methods.registry import parse_options
from softprompts.recipes.multitask import Plan

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
FILES = (*KINDS, "options")


def said(name: str) -> str:
    """What reading an old configuration says; empty where it is read as it is."""
    try:
        read(CONFIGS / f"{name}.yaml", (), KINDS[name])
    except ConfigError as error:
        return str(error)
    return ""


def written(name: str) -> Any:
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))


def keys_in(value: Any, path: str = "") -> dict[str, str]:
    """The last place of every key inside nested values, by key; option names are no keys of sections."""
    found: dict[str, str] = {}
    if isinstance(value, dict):
        for key, inside in value.items():
            found[str(key)] = f"{path}.{key}".strip(".")
            if key != "options":
                found |= keys_in(inside, found[str(key)])
    elif isinstance(value, list):
        for place, inside in enumerate(value):
            found |= keys_in(inside, f"{path}.{place}")
    return found


OLD: dict[str, dict[str, list[str]]] = json.loads((CONFIGS / "keys.json").read_text(encoding="utf-8"))


def test_the_old_configurations_use_every_old_key_and_option() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(FILES)
    used: set[str] = set()
    for name in KINDS:
        used |= set(keys_in(written(name)))
    every: set[str] = set()
    for keys in OLD["sections"].values():
        every |= set(keys)
    assert every - used == set()
    options: dict[str, set[str]] = {}
    for entry in written("options"):
        options.setdefault(entry["method"], set()).update(entry["options"])
    assert options == {method: set(names) for method, names in OLD["options"].items()}


@pytest.mark.parametrize("name", KINDS)
def test_each_old_key_of_a_configuration_is_refused_with_its_new_name(name: str) -> None:
    """And once the old keys are renamed, no key is unknown; the file with every key has some that exclude others."""
    values, message = written(name), said(name)
    renames = find_old_keys(values, KINDS[name])
    assert bool(message) == bool(renames)
    assert "\n" not in message
    for old, new in renames:
        assert f"unknown key '{old}'; it is called '{new}' now" in message
    assert message.count("unknown key") == len(renames)
    renamed = update_old_keys(values, KINDS[name])
    if name == "run-prompt":
        del renamed["training"]["batch_tokens"]
    parse(renamed, KINDS[name])


def test_each_old_option_of_a_method_is_known_or_refused_with_its_new_name() -> None:
    for entry in written("options"):
        options = update_old_options(entry["method"], entry["options"])
        parse_options(entry["method"], options)
        for old, new in find_old_keys({"prompt": entry}):
            with pytest.raises(ConfigError, match=f"unknown key '{old}'; it is called '{new}' now"):
                parse({"prompt": entry})


def test_every_old_key_is_known_or_renamed() -> None:
    """No key of a section went away without a word about what it is called now."""
    renamed = {"DistilConfig": "DistillationConfig", "EvaluateConfig": "EvaluationConfig"}
    models = sections()
    for title, keys in OLD["sections"].items():
        name = renamed.get(title, title.removeprefix("Instance").removeprefix("Vector") if "Study" in title else title)
        model = models[title if title in models else name]
        names: dict[str, str] = {}
        for base in model.__mro__:
            names = OLD_KEYS.get(base.__name__, {}) | names
        for key in keys:
            assert names.get(key, key) in model.model_fields, (title, key)


def sections() -> dict[str, type[Section]]:
    """Every class of a section inside those that a file holds, by name."""
    found: dict[str, type[Section]] = {}
    left: list[tuple[str, type[Section]]] = [(kind.__name__, kind) for kind in (Run, Plan)]
    left += [("InstanceStudy", InstanceStudy), ("VectorStudy", VectorStudy)]
    while left:
        title, model = left.pop()
        found[title] = model
        for field in model.model_fields.values():
            inside = section_in(field.annotation)
            if inside is not None and inside.__name__ not in found:
                left.append((inside.__name__, inside))
    return found
