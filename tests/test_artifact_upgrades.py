"""Artifacts of formats 1 to 3 are read under the names of format 4, and keep their digests."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from artifacts import edit, example, refused, write_as_format
from softprompts.artifacts import artifact
from softprompts.artifacts.upgrades import OLD_TENSORS, old_state_name, upgrade_manifest, upgrade_state

DATA = Path(__file__).parent / "data" / "artifacts"
OLD = sorted(path.parent for path in DATA.glob("format*/**/softprompts.json"))


def old_state(directory: Path) -> dict[str, Any]:
    """The method's tensors in an old artifact, under the names of the file."""
    tensors = load_file(directory / "softprompts.safetensors")
    return {name.removeprefix("state."): value for name, value in tensors.items() if name.startswith("state.")}


def test_each_step_adds_or_renames_the_keys_of_its_format() -> None:
    values = {
        "format_version": 1,
        "method": "idpg",
        "options": {"normalise": True, "hidden": 4},
        "place": "first",
        "format": {"name": "t", "verbaliser": {"a": "b"}, "chat_place": "user"},
        "config": {"train": {"rate": 0.5}, "vector": {"sum": "a + b"}},
    }
    assert upgrade_manifest(values, Path("x")) == {
        "format_version": 1,
        "method": "idpg",
        "options": {"normalize": True, "hidden": 4},
        "placement": "first",
        "template": {"name": "t", "verbalizer": {"a": "b"}, "chat_placement": "user"},
        "config": {"training": {"learning_rate": 0.5}, "vector": {"sum": "a + b"}},
        "plain_prompt": True,
        "segments": [],
    }


@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_an_artifact_whose_run_has_old_objectives_loads_with_the_names_of_today(tmp_path: Path, version: int) -> None:
    """Format 4 wrote `distil-logits` until the objectives got their American names."""
    weights = {"task": 1.0, "distil-logits": 0.9, "distil-hidden": 0.5}
    manifest = artifact.save(example(), tmp_path / "x") / "softprompts.json"
    if version < 4:
        write_as_format(manifest, version)
    edit(manifest, config={"training" if version == 4 else "train": {"objectives": weights}})
    objectives = {"task": 1.0, "distill-logits": 0.9, "distill-hidden": 0.5}
    assert artifact.load(tmp_path / "x").config == {"training": {"objectives": objectives}}
    again = artifact.save(artifact.load(tmp_path / "x"), tmp_path / "again") / "softprompts.json"
    assert json.loads(again.read_text())["config"]["training"]["objectives"] == objectives


def test_names_of_tensors_change_at_their_beginning_only() -> None:
    values = {name: torch.ones(1) for name in ("prompts.0", "up.weight", "upper.weight", "sources", "prompts.1")}
    upgraded = upgrade_state("attempt", values, 3)
    assert sorted(upgraded) == ["prompt", "prompts.1", "shared.sources", "shared.up.weight", "upper.weight"]
    assert sorted(upgrade_state("attempt", upgraded, 4)) == sorted(upgraded)
    assert sorted(upgrade_state("no-such-method", values, 3)) == sorted(values)


@pytest.mark.parametrize("directory", OLD, ids=[str(path.relative_to(DATA)) for path in OLD])
def test_the_digest_uses_the_names_that_an_old_artifact_was_saved_with(directory: Path) -> None:
    values, state = json.loads((directory / "softprompts.json").read_text()), old_state(directory)
    upgraded = upgrade_state(values["method"], state, values["format_version"])
    assert len(upgraded) == len(state)
    assert [old_state_name(values["method"], name) for name in upgraded] == list(state)
    assert artifact.load(directory).digest == values["digest"]


@pytest.mark.parametrize("method", OLD_TENSORS)
def test_new_names_of_tensors_are_different(method: str) -> None:
    assert len(set(OLD_TENSORS[method].values())) == len(OLD_TENSORS[method])


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"template": None}, "template"),
        ({"placement": "first"}, "placement"),
        ({"plain_prompt": True}, "plain_prompt"),
        ({"format": {"template": "{text}", "verbalizer": {}}}, "verbalizer"),
    ],
)
def test_an_old_format_with_a_key_of_the_new_one_is_refused(
    tmp_path: Path, version: int, changes: dict[str, Any], key: str
) -> None:
    manifest = artifact.save(example(), tmp_path / "x") / "softprompts.json"
    write_as_format(manifest, version)
    edit(manifest, **changes)
    assert f"unknown key '{key}': format {version} has none" in refused(tmp_path / "x")


def test_what_is_saved_again_has_the_names_of_format_4(tmp_path: Path) -> None:
    directory = artifact.save(artifact.load(DATA / "format3" / "idpg" / "prompt"), tmp_path / "x")
    values = json.loads((directory / "softprompts.json").read_text())
    assert values["format_version"] == 4
    assert not {"fixed", "place", "format"} & set(values)
    assert "normalize" in values["options"]
    assert "verbalizer" in values["template"]
    assert {"training", "evaluation"} <= set(values["config"])
    names = [name for name in load_file(directory / "softprompts.safetensors") if name.startswith("state.")]
    assert names
    assert not any(name.startswith(("state.up.0", "state.bias.0")) for name in names)
