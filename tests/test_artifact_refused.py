"""Every way in which an artifact's files can be wrong has a message of one line."""

import dataclasses
import hashlib
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from artifacts import D, P, bits, edit, example, refused
from softprompts.artifacts import artifact as a
from softprompts.artifacts.io import read_tensors, write_tensors
from softprompts.errors import ArtifactError


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return a.save(example(), tmp_path / "prompt")


def test_missing_directory_and_files(saved: Path, tmp_path: Path) -> None:
    assert refused(tmp_path / "none") == f"no directory {tmp_path / 'none'}"
    assert "is a file; give the directory" in refused(saved / "README.md")
    (tmp_path / "empty").mkdir()
    assert "is not an artifact: it holds neither softprompts.json nor adapter_config.json" in refused(
        tmp_path / "empty"
    )
    assert "no directory" in refused(Path("x" * 300))
    (saved / "softprompts.json").rename(tmp_path / "softprompts.json")
    assert "softprompts.json is missing; copy the whole directory" in refused(saved)
    (tmp_path / "softprompts.json").rename(saved / "softprompts.json")
    (saved / "softprompts.safetensors").unlink()
    assert "softprompts.safetensors cannot be read: No such file or directory" in refused(saved)


def test_a_killed_save_is_named(saved: Path) -> None:
    saved.rename(saved.with_name(".prompt.old-1234abcd"))
    assert refused(saved).endswith(
        f"an interrupted save left the artifact in {saved.with_name('.prompt.old-1234abcd')}"
    )


@pytest.mark.parametrize("keep", [0, 5, 8, 100, -1])
def test_cut_tensors(saved: Path, keep: int) -> None:
    path = saved / "softprompts.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "softprompts.safetensors is cut short or is not safetensors" in refused(saved)


@settings(deadline=None, max_examples=60)
@given(position=st.integers(0, 10**6), value=st.integers(0, 255), name=st.sampled_from(sorted(a._FILES[:2])))
def test_a_changed_byte_never_loads_another_prompt(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int, name: str
) -> None:
    made = example()
    directory = a.save(made, tmp_path_factory.mktemp("b") / "x")
    data = bytearray((directory / name).read_bytes())
    data[position % len(data)] = value
    (directory / name).write_bytes(data)
    try:
        loaded = a.load(directory)
    except ArtifactError:
        return
    assert bits(loaded.prompt) == bits(made.prompt)
    assert loaded.digest == made.digest


@pytest.mark.parametrize("name", ["softprompts.safetensors", "adapter_model.safetensors"])
def test_a_pickle_under_another_name_is_not_opened(saved: Path, name: str) -> None:
    if name.startswith("adapter"):
        (saved / "softprompts.json").unlink()
        (saved / "softprompts.safetensors").unlink()

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(saved / "executed"),)

    (saved / name).write_bytes(pickle.dumps(Bomb()))
    assert f"{name} is a pickle under a safetensors name; it was not opened" in refused(saved)
    with zipfile.ZipFile(saved / name, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Bomb()))
    assert f"{name} is a pickle under a safetensors name; it was not opened" in refused(saved)
    assert not (saved / "executed").exists()


def test_a_header_that_begins_like_a_pickle_loads(tmp_path: Path) -> None:
    for filler in range(480, 640):
        write_tensors(tmp_path / "x", {"a": torch.ones(1)}, {"filler": "-" * filler})
        if (tmp_path / "x").read_bytes()[:1] == b"\x80":
            assert read_tensors(tmp_path / "x")[1]["filler"] == "-" * filler
            return
    raise AssertionError("no header length ended in 0x80")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["prompt", "initial", "head.score.weight"])
def test_nan_is_refused_both_ways(tmp_path: Path, number: float, name: str) -> None:
    made = example(heads={"score.weight": torch.ones(2, 4)})
    directory = a.save(made, tmp_path / "x")
    stored = load_file(directory / "softprompts.safetensors")
    stored[name][0, 1] = number
    save_file(stored, directory / "softprompts.safetensors")
    short = name.removeprefix("head.")
    assert f"{short} has NaN or Inf in 1 of {stored[name].numel()} numbers" in refused(directory)
    bad = {"heads": {short: stored[name]}} if name.startswith("head.") else {name: stored[name]}
    with pytest.raises(ArtifactError, match="has NaN or Inf"):
        a.save(dataclasses.replace(made, **bad), directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": None}, "no tensor 'prompt'"),
        ({"sketch": None}, "no tensor 'sketch'"),
        ({"weight": torch.ones(1)}, "unknown tensor 'weight'"),
        ({"prompt": torch.ones(P + 1, D)}, f"the prompt is [{P + 1}, {D}], but softprompts.json says [{P}, {D}]"),
        ({"prompt": torch.ones(P, D).double()}, f"prompt must be float32 [{P}, {D}], found float64 [{P}, {D}]"),
        ({"initial": torch.ones(P, D + 1)}, f"initial must be float32 [{P}, {D}], found float32 [{P}, {D + 1}]"),
        ({"sketch": torch.ones(32, D).half()}, "sketch must be float32"),
        ({"state.weight": torch.ones(1)}, "is not the file that softprompts.json was written with"),
    ],
)
def test_wrong_tensors(saved: Path, changes: dict[str, Tensor | None], message: str) -> None:
    stored = {**load_file(saved / "softprompts.safetensors"), **changes}
    save_file({key: value for key, value in stored.items() if value is not None}, saved / "softprompts.safetensors")
    assert message in refused(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 5, "novelty": 1}, "written by a newer softprompts, format 5 > 4; upgrade"),
        ({"format_version": 0}, "there is no format 0"),
        ({"format_version": "1"}, "format_version: Input should be a valid integer (given: '1')"),
        ({"format_version": ...}, "format_version: Field required"),
        ({"sitte": "input"}, "unknown key 'sitte'; did you mean 'site'?"),
        ({"task": ..., "method": ...}, "task: Field required; "),
        ({"task": 3}, "task: Input should be a valid string (given: 3)"),
        (
            {"site": "inputs"},
            "site: Input should be 'input', 'decoder', 'layers' or 'kv' (given: 'inputs'; did you mean",
        ),
        ({"parents": [1]}, "parents.0: Input should be a valid string"),
        ({"options": None}, "options: Input should be a valid dictionary"),
        ({"fingerprint": {"architecture": {}}}, "fingerprint.tokenizer: Field required"),
        ({"shape": [True, 8]}, "shape.0: Input should be a valid integer"),
        ({"placement": "after_start"}, "the digest is not that of the prompt"),
        ({"plain_prompt": ...}, "plain_prompt: Field required"),
        ({"plain_prompt": False}, "unknown tensor 'prompt'"),
        ({"plain_prompt": "yes"}, "plain_prompt: Input should be a valid boolean"),
    ],
)
def test_wrong_manifest(saved: Path, changes: dict[str, Any], message: str) -> None:
    edit(saved / "softprompts.json", **changes)
    assert message in refused(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"initial": None}, "no tensor 'initial'"),
        ({"prompt": torch.ones(P, D)}, "unknown tensor 'prompt'"),
        ({"initial": torch.ones(P + 1, D)}, f"the initial prompt is [{P + 1}, {D}], but softprompts.json says"),
        ({"state.weight": None}, "without a prompt the method's state answers from its initial prompt; no state"),
        ({"state.weight": torch.zeros(2)}, "is not the file that softprompts.json was written with"),
    ],
)
def test_wrong_tensors_of_a_method_without_a_prompt(
    tmp_path: Path, changes: dict[str, Tensor | None], message: str
) -> None:
    saved = a.save(example(prompt=None, state={"weight": torch.ones(2)}), tmp_path / "x")
    stored = {**load_file(saved / "softprompts.safetensors"), **changes}
    save_file({key: value for key, value in stored.items() if value is not None}, saved / "softprompts.safetensors")
    assert message in refused(saved)


def test_a_changed_state_is_noticed_whatever_its_checksum_says(tmp_path: Path) -> None:
    saved = a.save(example(prompt=None, state={"weight": torch.ones(2)}), tmp_path / "x")
    stored = {**load_file(saved / "softprompts.safetensors"), "state.weight": torch.zeros(2)}
    save_file(stored, saved / "softprompts.safetensors")
    sha = hashlib.sha256((saved / "softprompts.safetensors").read_bytes()).hexdigest()
    edit(saved / "softprompts.json", sha256={"softprompts.safetensors": sha})
    assert "the digest is not that of the prompt" in refused(saved)


@pytest.mark.parametrize("changes", [{"initial": None}, {"state": {}}])
def test_what_could_not_answer_is_not_saved(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match="without a prompt the method's state answers"):
        a.save(example(**{"prompt": None, "state": {"weight": torch.ones(2)}, **changes}), tmp_path / "x")


@pytest.mark.parametrize("name", ["softprompts.json", "adapter_config.json"])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "is not valid JSON"),
        (b"", "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        (b'{"a": NaN}', "is not valid JSON: it has no number NaN"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"1" * 5000, "is not valid JSON"),
        (b"[]", "must hold an object, found list"),
    ],
)
def test_wrong_json(saved: Path, name: str, data: bytes, message: str) -> None:
    if name.startswith("adapter"):
        (saved / "softprompts.json").unlink()
        (saved / "softprompts.safetensors").unlink()
    (saved / name).write_bytes(data)
    assert message in refused(saved)
