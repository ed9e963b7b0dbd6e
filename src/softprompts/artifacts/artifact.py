"""A trained prompt on disk: save, load, inspect.

The format is specified in docs/artifact.md. safetensors and JSON only: nothing is unpickled, nothing is executed.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softprompts.artifacts import collection, peft_files
from softprompts.artifacts import manifest as manifests
from softprompts.artifacts.fingerprint import BANDS as BANDS
from softprompts.artifacts.fingerprint import check_fingerprint as check_fingerprint
from softprompts.artifacts.fingerprint import rms
from softprompts.artifacts.fingerprint import sketch_distance as sketch_distance
from softprompts.artifacts.io import dump, number, pack, plain, read_bytes, replace_directory, unpack
from softprompts.artifacts.io import read_json as read_json
from softprompts.artifacts.io import read_tensors as read_tensors
from softprompts.artifacts.io import write_json as write_json
from softprompts.artifacts.io import write_tensors as write_tensors
from softprompts.artifacts.manifest import MANIFEST as MANIFEST
from softprompts.artifacts.manifest import Manifest
from softprompts.errors import ArtifactError
from softprompts.types import SOURCES, START, Fingerprint

TENSORS = "softprompts.safetensors"
CARD = "README.md"
_FILES = (MANIFEST, TENSORS, CARD, peft_files.CONFIG, peft_files.TENSORS)
_MARKS = (MANIFEST, peft_files.CONFIG)


@dataclass(frozen=True, eq=False)
class Artifact:
    """One trained prompt and what is needed to use it, to train on from it and to know where it came from.

    prompt [P, D] and initial [P, D] are float32: the folded prompt (None where the method has no plain one;
    then `state` is what answers), and where training began (None: PEFT does not say). `state` holds all of the method
    under its own names; `heads` a per-task copy of a classification head, keyed as in the model's state_dict. family
    None and backbone "" mean that PEFT's files do not say. `format` is the task's data format, `options` the method's,
    `config` the run's; all are JSON, so tuples load as lists. segments: prompt tokens of each segment, where the prompt
    stands in several of the template's slots.
    """

    task: str
    prompt: Tensor | None
    initial: Tensor | None
    method: str
    options: dict[str, Any]
    state: dict[str, Tensor]
    heads: dict[str, Tensor]
    site: str
    mode: str
    place: str
    family: str | None
    head: str
    backbone: str
    revision: str | None
    fingerprint: Fingerprint | None
    format: dict[str, Any] | None
    config: dict[str, Any]
    scores: dict[str, Any]
    parents: tuple[str, ...]
    version: str
    segments: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """(P, D) of the prompt, or of each that the method makes."""
        held = self.initial if self.prompt is None else self.prompt
        return () if held is None else tuple(held.shape)

    @property
    def digest(self) -> str:
        """The artifact's identity, 64 hex digits: prompt bits, site, mode, place and the backbone's architecture.

        Where there is no one prompt: the bits of the state, and the method and its options, instead of the prompt's.
        """
        keys = ("site", "mode", "place", "segments") if self.segments else ("site", "mode", "place")
        facts: dict[str, Any] = {key: getattr(self, key) for key in keys}
        facts["shape"] = list(self.shape)
        facts["architecture"] = self.fingerprint.architecture if self.fingerprint else None
        held = [self.state[name] for name in sorted(self.state)] if self.prompt is None else [self.prompt]
        if self.prompt is None:
            kinds = {name: [str(value.dtype), list(value.shape)] for name, value in self.state.items()}
            facts |= {"method": self.method, "options": self.options, "state": kinds}
        done = hashlib.sha256(json.dumps(plain(facts, "digest"), sort_keys=True).encode() + b"\0")
        for value in held:
            done.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return done.hexdigest()

    @property
    def sum(self) -> str | None:
        """What was added to its start, where it was made by arithmetic on trained prompts and not by training."""
        made = self.config.get("vector")
        return str(made["sum"]) if isinstance(made, Mapping) and "sum" in made else None

    def settings(self, section: str) -> dict[str, Any]:
        """A section of the run that made the artifact, as it was resolved; empty where nothing usable is stored."""
        stored = self.config.get(section)
        return dict(stored) if isinstance(stored, Mapping) else {}

    def matrix(self, origin: str | Path) -> Tensor:
        """The prompt [P, D]; raises ArtifactError that names `origin` where the method has no plain one."""
        if self.prompt is None:
            raise ArtifactError(
                f"{origin} holds no plain prompt: {self.method} makes one from each text, or changes the text too; "
                f"give the artifact of a method that puts one matrix before every text, such as prompt-tuning"
            )
        return self.prompt


_COPIED = tuple(key for key in Manifest.model_fields if key in {field.name for field in fields(Artifact)})


def save(artifact: Artifact, directory: str | Path) -> Path:
    """Writes the artifact and returns its directory; an artifact already there is replaced once the new one is whole.

    Other files of that directory stay. PEFT's two files are written where PEFT can reproduce the prompt.
    Raises ArtifactError for an artifact that would not load again, for a directory that holds something else, and for
    a disk that does not take it: what was there before is then still there.
    """
    collection.refuse(Path(directory))
    replace_directory(Path(directory), _contents(artifact, Path(directory)), _FILES, _MARKS)
    return Path(directory)


def load(directory: str | Path, task: int | str | None = None) -> Artifact:
    """The artifact in a directory written by `save` or by PEFT (prompt tuning, multitask prompt tuning).

    task: which one, by name or place, of a directory that holds several.
    Raises ArtifactError with one line for whatever is wrong with it.
    """
    path, task = collection.find(Path(directory), task)
    if (path / MANIFEST).is_file():
        found = _load_own(path)
        if task not in (None, 0, found.task):
            raise ArtifactError(f"{path} holds one prompt, '{found.task}', and none called '{task}'")
        return found
    if (path / TENSORS).is_file():
        raise ArtifactError(f"{path}: {TENSORS} is there but {MANIFEST} is missing; copy the whole directory")
    if (path / peft_files.CONFIG).is_file():
        return _load_peft(path, task)
    raise ArtifactError(f"{path} is not an artifact: it holds neither {MANIFEST} nor {peft_files.CONFIG}")


def inspect(directory: str | Path) -> dict[str, Any]:
    """Facts about an artifact for people, as JSON; rms are per number of the prompt, `distance` that of its change."""
    artifact, path = load(directory), Path(directory)
    prompt, start = artifact.prompt, artifact.initial
    state = artifact.state or ({} if prompt is None else {"prompt": prompt})
    fixed = (START,) if artifact.options.get("trained") else (START, SOURCES)  # a memory's rows may learn
    trained = [value for key, value in state.items() if key.split(".")[-1] not in fixed]
    files = {entry.name: entry.stat().st_size for entry in sorted(path.iterdir()) if entry.name in _FILES}
    return {
        "directory": str(path),
        "origin": "softprompts" if MANIFEST in files else "peft",
        **{key: getattr(artifact, key) for key in _COPIED if key not in ("fingerprint", "parents", "config")},
        "fixed": prompt is not None,
        "length": artifact.shape[0],
        "width": artifact.shape[1],
        "parameters": sum(value.numel() for value in (*trained, *artifact.heads.values())),
        "heads": {key: list(value.shape) for key, value in artifact.heads.items()},
        "rms": None if prompt is None else rms(prompt),
        "rms_initial": None if start is None else rms(start),
        "distance": None if prompt is None or start is None else rms(prompt.double() - start.double()),
        "fingerprint": _weights(artifact.fingerprint),
        "peft": _obstacle(artifact) or True,
        "parents": list(artifact.parents),
        "segments": list(artifact.segments),
        "sum": artifact.sum,
        "digest": artifact.digest,
        "bytes": sum(files.values()),
        "files": files,
    }


def _contents(artifact: Artifact, path: Path) -> dict[str, bytes]:
    """Every file of the directory, made and checked before the disk is touched."""
    _check(artifact, path)
    obstacle = _obstacle(artifact)
    weights = artifact.fingerprint
    packed = {TENSORS: pack(_tensors(artifact), {"format": "pt"}, path / TENSORS)}
    if obstacle is None:
        stored = peft_files.tensors(artifact.matrix(path), artifact.heads)
        packed[peft_files.TENSORS] = pack(stored, {"format": "pt"}, path / peft_files.TENSORS)
    manifest = {
        **{key: getattr(artifact, key) for key in _COPIED},
        "format_version": manifests.FORMAT,
        "fixed": artifact.prompt is not None,
        "shape": list(artifact.shape),
        "fingerprint": _weights(weights),
        "scores": _null_nonfinite(artifact.scores),
        "peft": obstacle or True,
        "digest": artifact.digest,
        "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in packed.items()},
    }
    manifest = {key: plain(manifest[key], f"{path / MANIFEST}: {key}") for key in Manifest.model_fields}
    manifests.check(manifest, path / MANIFEST)
    files = {**packed, MANIFEST: dump(manifest, path / MANIFEST), CARD: _card(artifact, obstacle).encode()}
    if obstacle is None:
        shape = (artifact.shape[0], artifact.shape[1])
        backbone, facts = (artifact.backbone, artifact.revision), weights.architecture if weights else {}
        config = peft_files.config(shape, artifact.family, artifact.head, artifact.heads, *backbone, facts)
        files[peft_files.CONFIG] = dump(config, path / peft_files.CONFIG)
    return files


def _check(artifact: Artifact, path: Path) -> None:
    """What must hold of the tensors of every artifact, on the way in and on the way out."""
    shape = artifact.shape
    if artifact.prompt is None and (artifact.initial is None or not artifact.state):
        lacks = "state" if artifact.initial is not None else "initial prompt"
        raise ArtifactError(f"{path}: without a prompt the method's state answers from its initial prompt; no {lacks}")
    if len(shape) != 2 or 0 in shape:
        raise ArtifactError(f"{path}: the prompt must be [P, D], found {list(shape)}")
    for name, value in (("prompt", artifact.prompt), ("initial", artifact.initial)):
        if value is not None and (value.dtype != torch.float32 or tuple(value.shape) != shape):
            found = f"{value.dtype} {list(value.shape)}".removeprefix("torch.")
            raise ArtifactError(f"{path}: {name} must be float32 {list(shape)}, found {found}")
    for name, value in (("prompt", artifact.prompt), ("initial", artifact.initial), *artifact.heads.items()):
        if value is not None and (bad := int((~torch.isfinite(value)).sum())):
            raise ArtifactError(f"{path}: {name} has NaN or Inf in {bad} of {value.numel()} numbers")
    if artifact.fingerprint and artifact.fingerprint.sketch.dtype != torch.float32:
        raise ArtifactError(f"{path}: sketch must be float32, found {artifact.fingerprint.sketch.dtype}")


def _tensors(artifact: Artifact) -> dict[str, Tensor]:
    sketch = artifact.fingerprint.sketch if artifact.fingerprint else None
    single = {"prompt": artifact.prompt, "initial": artifact.initial, "sketch": sketch}
    return {
        **{key: value for key, value in single.items() if value is not None},
        **{f"state.{key}": value for key, value in artifact.state.items()},
        **{f"head.{key}": value for key, value in artifact.heads.items()},
    }


def _load_own(path: Path) -> Artifact:
    values = read_json(path / MANIFEST)
    manifest = manifests.check(values, path / MANIFEST)
    data = read_bytes(path / TENSORS)
    tensors, _ = unpack(data, path / TENSORS)
    known = {"initial"} | ({"prompt"} if manifest.fixed else set()) | ({"sketch"} if manifest.fingerprint else set())
    strange = sorted(key for key in tensors if key not in known and not key.startswith(("state.", "head.")))
    missing = sorted(known - ({"initial"} if manifest.fixed else set()) - set(tensors))
    if strange or missing:
        found = "; ".join([*(f"unknown tensor '{key}'" for key in strange), *(f"no tensor '{key}'" for key in missing)])
        raise ArtifactError(f"{path / TENSORS}: {found}")
    held = "prompt" if manifest.fixed else "initial"
    if (stored := list(tensors[held].shape)) != manifest.shape:
        what = "the prompt" if manifest.fixed else "the initial prompt"
        raise ArtifactError(f"{path / TENSORS}: {what} is {stored}, but {MANIFEST} says {manifest.shape}")
    weights = manifest.fingerprint
    artifact = Artifact(
        **{key: getattr(manifest, key) for key in _COPIED if key not in ("fingerprint", "parents", "segments")},
        prompt=tensors.get("prompt"),
        initial=tensors.get("initial"),
        state={key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")},
        heads={key.removeprefix("head."): value for key, value in tensors.items() if key.startswith("head.")},
        fingerprint=Fingerprint(sketch=tensors["sketch"], **weights.model_dump()) if weights else None,
        parents=tuple(manifest.parents),
        segments=tuple(manifest.segments),
    )
    _check(artifact, path / TENSORS)
    _check_sums(artifact, manifest, path, data)
    return artifact


def _check_sums(artifact: Artifact, manifest: Manifest, path: Path, data: bytes) -> None:
    """Files of two artifacts mixed in one directory, or edited, would load without a word."""
    if hashlib.sha256(data).hexdigest() != manifest.sha256.get(TENSORS):
        raise ArtifactError(f"{path / TENSORS} is not the file that {MANIFEST} was written with: its sha256 differs")
    if artifact.digest != manifest.digest:
        raise ArtifactError(f"{path / MANIFEST}: the digest is not that of the prompt: one of them was edited")
    theirs = path / peft_files.TENSORS
    if theirs.is_file() and hashlib.sha256(read_bytes(theirs)).hexdigest() != manifest.sha256.get(theirs.name):
        raise ArtifactError(
            f"{theirs} was not written by softprompts: PEFT saved here later; delete {MANIFEST} and {TENSORS} to load "
            f"PEFT's prompt, or {peft_files.CONFIG} and {theirs.name} to load ours"
        )


def read_peft(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """PEFT's two files in a directory; raises ArtifactError for a pickle, which is not opened, and for no object."""
    if not isinstance(values := read_json(path / peft_files.CONFIG), dict):
        raise ArtifactError(f"{path / peft_files.CONFIG} must hold an object, found {type(values).__name__}")
    if not (path / peft_files.TENSORS).is_file() and (path / peft_files.PICKLE).is_file():
        raise ArtifactError(
            f"{path / peft_files.PICKLE} is a pickle, which can execute code when read, and is not opened; convert it "
            "where you trust it: load it in PEFT and call save_pretrained(directory, safe_serialization=True)"
        )
    return values, read_tensors(path / peft_files.TENSORS)[0]


def _load_peft(path: Path, task: int | str | None) -> Artifact:
    values, tensors = read_peft(path)
    try:
        adapter = peft_files.read(values, tensors, task)
    except ValueError as error:
        raise ArtifactError(f"{path / peft_files.CONFIG}: {error}") from None
    artifact = Artifact(
        task=adapter.task or path.resolve().name,
        prompt=adapter.prompt.to(torch.float32, copy=True),
        initial=None,
        method=adapter.method,
        options=dict(adapter.options),
        state=dict(adapter.state),
        heads=adapter.heads,
        site="input",
        mode="replace",
        place="first",
        family=adapter.family,
        head=adapter.head,
        backbone=adapter.backbone,
        revision=adapter.revision,
        fingerprint=None,
        format=None,
        config={"peft": values},
        scores={},
        parents=(),
        version=f"peft {values.get('peft_version') or 'unknown'}",
    )
    _check(artifact, path / peft_files.TENSORS)
    return artifact


def _weights(fingerprint: Fingerprint | None) -> dict[str, Any] | None:
    if fingerprint is None:
        return None
    return {key: getattr(fingerprint, key) for key in ("architecture", "tokenizer", "dtype")}


def _obstacle(artifact: Artifact) -> str | None:
    if artifact.prompt is None:
        return f"method {artifact.method}: it has no plain prompt, and PEFT stores one matrix"
    facts = (artifact.site, artifact.place, artifact.family, artifact.head, artifact.heads, artifact.format)
    return peft_files.obstacle(*facts)


def _card(artifact: Artifact, obstacle: str | None) -> str:
    """The model card; it says nothing that the files beside it do not."""
    length, width = artifact.shape
    task, backbone = " ".join(artifact.task.split()), artifact.backbone or "an unnamed model"
    base = [f"base_model: {backbone}"] if re.fullmatch(r"[\w.-]+/[\w.-]+", backbone) else []
    head = [
        "---",
        *base,
        f"library_name: {'softprompts' if obstacle else 'peft'}",
        "tags: [soft-prompt, softprompts]",
        "---",
    ]
    revision = f" at revision `{artifact.revision}`" if artifact.revision else ""
    how = f"trained with {artifact.method}"
    if artifact.sum is not None:
        how = f"made of trained prompts: `{' '.join(artifact.sum.split())}` added to its start"
    parts = f" in segments of {', '.join(map(str, artifact.segments))} tokens" if artifact.segments else ""
    about = [
        f"# Soft prompt: {task}",
        f"A prompt of {length} vectors of width {width} for the frozen `{backbone}`{revision}, {how}. "
        f"It enters at site `{artifact.site}`, place `{artifact.place}`{parts}.",
        "It is of use with exactly these weights only.",
    ]
    if artifact.prompt is None:
        about.append(
            "There is no plain prompt, the method answers each text: `SoftPromptModel.from_pretrained(model, "
            '"path/to/this/directory")`, or `softprompts predict path/to/this/directory TEXT`.'
        )
    else:
        load = 'prompt = artifact.load("path/to/this/directory").prompt'
        about.append(f"```python\nfrom softprompts import artifact\n\n{load}\n```")
    if obstacle:
        about.append(f"PEFT cannot load it ({obstacle}).")
    else:
        about.append('PEFT loads this directory too: `PeftModel.from_pretrained(model, "path/to/this/directory")`.')
    scores = [f"| {name} | {value} |" for name, value in _leaves(plain(_null_nonfinite(artifact.scores), "scores"))]
    table = ["\n".join(["| score | value |", "|---|---|", *scores])] if scores else []
    return "\n".join(head) + "\n\n" + "\n\n".join(about + table) + "\n"


def _leaves(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Scores by dotted name, as cells of a Markdown table; lists and what is not known are left to the manifest."""
    if isinstance(value, Mapping):
        return [leaf for key, part in value.items() for leaf in _leaves(part, f"{name}.{key}" if name else key)]
    if not isinstance(value, int | float | str):
        return []
    texts = (name, f"{value:.6g}" if isinstance(value, float) else str(value))
    key, cell = (" ".join(text.split()).replace("|", "\\|") for text in texts)
    return [(key, cell)]


def _null_nonfinite(value: Any) -> Any:
    """A score that is no number must not cost the user the prompt: it is stored as null."""
    if isinstance(value, Mapping):
        return {key: _null_nonfinite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_null_nonfinite(part) for part in value]
    value = number(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
