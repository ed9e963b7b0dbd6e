"""Keys of configurations that were renamed are refused with the new key named; tests/data/configs has all old ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from studies.instance_prompts.plan import Study as InstanceStudy
from studies.task_prompt_vectors.plan import Study as VectorStudy

from softprompts.config import Run, Section, read
from softprompts.errors import ConfigError
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

RENAMED = {
    "quantise": "quantize",
    "optimiser": "optimizer",
    "verbaliser": "verbalizer",
    "normalise": "normalize",
}
"""Old keys of sections, and what they are called now."""


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
def test_an_old_configuration_is_read_or_its_old_keys_are_refused_with_the_new_ones(name: str) -> None:
    places, message = keys_in(written(name)), said(name)
    assert "\n" not in message
    old = set(places) & set(RENAMED)
    assert bool(message) == bool(old)
    for key in old:
        assert f"unknown key '{places[key]}'; did you mean '{RENAMED[key]}'?" in message


def test_every_old_key_is_known_or_renamed() -> None:
    """No key of a section went away without a word about what it is called now."""
    refused = " ".join(said(name) for name in KINDS)
    for name in KINDS:
        for key, place in keys_in(written(name)).items():
            assert (f"unknown key '{place}'" in refused) == (key in RENAMED), place
