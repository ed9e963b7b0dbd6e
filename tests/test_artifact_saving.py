"""What would not load is not saved, and a save that fails leaves what was there."""

import contextlib
import errno
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from artifacts import D, P, assert_equal, example
from softprompts.artifacts import artifact as a
from softprompts.artifacts import io
from softprompts.artifacts.io import read_json, read_tensors, write_json, write_tensors
from softprompts.errors import ArtifactError


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return a.save(example(), tmp_path / "prompt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": torch.ones(P)}, "the prompt must be [P, D]"),
        ({"prompt": torch.ones(0, D)}, "the prompt must be [P, D]"),
        ({"prompt": torch.ones(P, D).half()}, "prompt must be float32"),
        ({"initial": torch.ones(1, D)}, "initial must be float32"),
        ({"site": "suffix"}, "site: Input should be 'input', 'decoder', 'layers' or 'kv'"),
        ({"head": "pooled"}, "head: Input should be"),
        ({"task": None}, "task: Input should be a valid string"),
        ({"options": {"path": Path("x")}}, "options.path is a PosixPath; JSON cannot hold it"),
        ({"options": {"a": {1: 2}}}, "options.a: the key 1 is not a string"),
        ({"config": {"x": [0, float("nan")]}}, "config.x.1 is nan; JSON has no such number"),
        ({"task": "\ud800"}, "is not valid Unicode"),
        ({"state": {"x": "text"}}, "safetensors cannot hold these tensors"),
    ],
)
def test_what_would_not_load_is_not_saved(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        a.save(example(**changes), tmp_path / "x")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_only_an_artifact_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtifactError, match="is not empty and is not an artifact; give another directory"):
        a.save(example(), tmp_path / "thesis")
    assert os.listdir(tmp_path / "thesis") == ["thesis.tex"]
    with pytest.raises(ArtifactError, match="is a file; give a directory"):
        a.save(example(), tmp_path / "thesis" / "thesis.tex")
    (tmp_path / "empty").mkdir()
    a.save(example(), tmp_path / "empty")
    a.save(example(), tmp_path / "new" / "deep")


def test_replacing_keeps_the_users_other_files_and_a_link(saved: Path, tmp_path: Path) -> None:
    (saved / ".git").mkdir()
    (saved / ".git" / "HEAD").write_text("ref")
    (saved / "notes.txt").write_text("mine")
    (tmp_path / "link").symlink_to(saved)
    a.save(example(site="kv"), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert a.load(saved).site == "kv"
    assert (saved / "notes.txt").read_text() == "mine"
    assert (saved / ".git" / "HEAD").read_text() == "ref"
    assert not (saved / "adapter_config.json").exists()
    assert sorted(os.listdir(tmp_path)) == ["link", "prompt"]


class Killed(BaseException):
    """Stands for Ctrl-C and the like: no `except Exception` may swallow it."""


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), Killed()])
@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir"])
@pytest.mark.parametrize("count", range(1, 9))
def test_an_interrupted_save_leaves_the_old_or_the_new_artifact(
    saved: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, call: str, count: int
) -> None:
    (saved / "notes.txt").write_text("mine")
    real, left = getattr(os, call), [count]

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise error
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, interrupted)
        with contextlib.suppress(ArtifactError, Killed):
            a.save(example(task="new"), saved)
    assert a.load(saved).task in ("sst2", "new")
    beside = [name for name in os.listdir(saved.parent) if name != "prompt"]
    # after the swap the user's own files may still stand beside it, never lost
    kept = [saved / "notes.txt", *(saved.parent / name / "notes.txt" for name in beside)]
    assert any(path.exists() for path in kept)
    if (saved / "notes.txt").exists():
        assert beside == []


def test_a_full_disk_is_one_line(saved: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, before[1]))
    try:
        with pytest.raises(ArtifactError) as caught:
            a.save(example(task="new"), saved)
        with pytest.raises(ArtifactError) as other:
            write_tensors(saved / "x.safetensors", {"a": torch.zeros(1000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(caught.value) == f"{saved} cannot be written: File too large"
    assert str(other.value) == f"{saved / 'x.safetensors'} cannot be written: File too large"
    assert_equal(example(), a.load(saved))
    assert os.listdir(saved.parent) == ["prompt"]
    assert len(os.listdir(saved)) == 5


def test_a_parent_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot be written: Not a directory"):
        a.save(example(), tmp_path / "file" / "x")
    for write in (lambda path: write_json(path, {}), lambda path: write_tensors(path, {}, {})):
        with pytest.raises(ArtifactError, match="cannot be written: Not a directory"):
            write(tmp_path / "file" / "x")


def test_files_are_readable_by_those_whom_the_umask_lets(saved: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    assert saved.stat().st_mode & 0o777 == 0o777 & ~mask
    assert (saved / "softprompts.safetensors").stat().st_mode & 0o777 == 0o666 & ~mask


def test_interrupted_single_files_leave_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "x.json", {"a": 1})
    write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(2)}, {})

    def killed(*_: Any) -> None:
        raise Killed

    monkeypatch.setattr(io.os, "replace", killed)
    with pytest.raises(Killed):
        write_json(tmp_path / "x.json", {"a": 2})
    with pytest.raises(Killed):
        write_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(2)}, {})
    assert read_json(tmp_path / "x.json") == {"a": 1}
    assert torch.equal(read_tensors(tmp_path / "x.safetensors")[0]["a"], torch.ones(2))
    assert sorted(os.listdir(tmp_path)) == ["x.json", "x.safetensors"]
