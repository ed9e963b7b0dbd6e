"""A trained prompt on disk: save, load, inspect.

docs/artifact.md specifies the format. Its files are safetensors and JSON: reading them unpickles and executes nothing.
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
from softprompts.artifacts.fingerprint import rms, tensor_bytes
from softprompts.artifacts.io import (
    add_prefix,
    decode_tensors,
    encode_json,
    encode_tensors,
    read_bytes,
    read_json,
    read_tensors,
    replace_directory,
    take_prefix,
    to_json,
    to_number,
)
from softprompts.artifacts.manifest import MANIFEST as MANIFEST
from softprompts.artifacts.manifest import Manifest, parse_manifest
from softprompts.artifacts.upgrades import FORMAT, old_state_name, upgrade_state
from softprompts.config import original_options
from softprompts.errors import ArtifactError
from softprompts.types import SOURCES, START, Fingerprint

TENSORS = "softprompts.safetensors"
CARD = "README.md"
_FILES = (MANIFEST, TENSORS, CARD, peft_files.CONFIG, peft_files.TENSORS)
_MARKS = (MANIFEST, peft_files.CONFIG)


@dataclass(frozen=True, eq=False)
class Artifact:
    """One trained prompt: what is needed to use it, to train it further and to know where it came from.

    Attributes:
        task: The task's name.
        prompt: The plain prompt, [P, D] float32; None where the method makes one from each text, or changes the text.
        initial: Where training began, [P, D] float32; None where PEFT wrote the artifact.
        method: The method's name.
        options: The method's options, as JSON.
        state: The method's tensors under its own names; without a `prompt` they answer.
        heads: The task's copy of a classification head, keyed as in the model's `state_dict`.
        site: Where the prompt enters: input, decoder, layers or kv.
        mode: At site layers, whether the prompt replaces hidden states or is added to them: replace, add.
        placement: Where in the row the prompt is: first, after_start, suffix or template.
        family: causal, seq2seq or masked; None where PEFT's files do not say.
        head: lm, sequence, token, span or features.
        backbone: The model's name; empty where PEFT's files do not say.
        revision: The model's revision.
        fingerprint: What ties the prompt to the model's weights; None where PEFT wrote the artifact.
        template: The task's `TaskTemplate`, as JSON, whose tuples load as lists.
        config: The configuration of the run, as JSON.
        scores: The results of the run, as JSON.
        parents: Digests of the artifacts from which this one was made.
        version: The library that wrote the artifact.
        segments: The prompt tokens of each slot, where the template has several.
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
    placement: str
    family: str | None
    head: str
    backbone: str
    revision: str | None
    fingerprint: Fingerprint | None
    template: dict[str, Any] | None
    config: dict[str, Any]
    scores: dict[str, Any]
    parents: tuple[str, ...]
    version: str
    segments: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """(P, D) of the prompt, or of each prompt that the method makes."""
        matrix = self.initial if self.prompt is None else self.prompt
        return () if matrix is None else tuple(matrix.shape)

    @property
    def digest(self) -> str:
        """The artifact's identity, 64 hex digits of a sha256.

        It covers the bits of the prompt, its site, mode, placement and segments, and the backbone's architecture.
        Without a plain prompt it covers the bits of the state, the method and its options instead of the prompt's.
        Names are those of format 3, so that an artifact keeps its identity when it is upgraded.
        """
        facts: dict[str, Any] = {
            "site": self.site,
            "mode": self.mode,
            "place": self.placement,
            "shape": list(self.shape),
            "architecture": self.fingerprint.architecture if self.fingerprint else None,
        }
        if self.segments:
            facts["segments"] = self.segments
        if self.prompt is None:
            state = {old_state_name(self.method, name): value for name, value in self.state.items()}
            facts["method"] = self.method
            facts["options"] = original_options(self.method, self.options)
            facts["state"] = {name: [str(value.dtype), list(value.shape)] for name, value in state.items()}
            tensors = [state[name] for name in sorted(state)]
        else:
            tensors = [self.prompt]
        sha256 = hashlib.sha256(json.dumps(to_json(facts, "digest"), sort_keys=True).encode() + b"\0")
        for tensor in tensors:
            sha256.update(tensor_bytes(tensor))
        return sha256.hexdigest()

    @property
    def vector_sum(self) -> str | None:
        """The sum of task vectors that was added to the start; None where the prompt was trained."""
        vector = self.config.get("vector")
        return str(vector["sum"]) if isinstance(vector, Mapping) and "sum" in vector else None

    def settings(self, section: str) -> dict[str, Any]:
        """A section of the run's configuration, as it was resolved; empty where nothing usable is stored."""
        values = self.config.get(section)
        return dict(values) if isinstance(values, Mapping) else {}

    def require_prompt(self, origin: str | Path) -> Tensor:
        """The plain prompt, [P, D].

        Args:
            origin: What the message calls the artifact.

        Raises:
            ArtifactError: The method has no plain prompt.
        """
        if self.prompt is None:
            raise ArtifactError(
                f"{origin} holds no plain prompt: {self.method} makes one from each text, or changes the text too; "
                f"give the artifact of a method that puts one matrix before every text, such as prompt-tuning"
            )
        return self.prompt


_SHARED_KEYS = tuple(key for key in Manifest.model_fields if key in {field.name for field in fields(Artifact)})
"""The keys of the manifest that are attributes of an Artifact too."""


def save(artifact: Artifact, directory: str | Path) -> Path:
    """Write an artifact; one that is there already is replaced once the new one is whole. Other files stay.

    PEFT's two files are written where PEFT can reproduce the prompt.

    Args:
        artifact: The artifact.
        directory: Where it is written.

    Returns:
        The directory.

    Raises:
        ArtifactError: The artifact would not load again, the directory holds something else, or the disk does not take
            the files. The directory is then as it was.
    """
    path = Path(directory)
    collection.refuse_collection(path)
    replace_directory(path, _contents(artifact, path), _FILES, _MARKS)
    return path


def load(directory: str | Path, task: int | str | None = None) -> Artifact:
    """The artifact in a directory that `save` wrote, or PEFT (prompt tuning, multitask prompt tuning).

    Args:
        directory: The directory.
        task: The name or position of the task, where the directory has the prompts of several.

    Raises:
        ArtifactError: Something is wrong with the artifact; one line says what.
    """
    path, task = collection.find_task(Path(directory), task)
    if (path / MANIFEST).is_file():
        artifact = _load_softprompts(path)
        if task not in (None, 0, artifact.task):
            raise ArtifactError(f"{path} holds one prompt, '{artifact.task}', and none called '{task}'")
        return artifact
    if (path / TENSORS).is_file():
        raise ArtifactError(f"{path}: {TENSORS} is there but {MANIFEST} is missing; copy the whole directory")
    if (path / peft_files.CONFIG).is_file():
        return _load_peft(path, task)
    raise ArtifactError(f"{path} is not an artifact: it holds neither {MANIFEST} nor {peft_files.CONFIG}")


def inspect(directory: str | Path) -> dict[str, Any]:
    """Facts about an artifact for people, as JSON.

    `rms`, `rms_initial` and `distance` are root mean squares over the numbers of the prompt, of its start and of their
    difference.
    """
    artifact, path = load(directory), Path(directory)
    prompt, initial = artifact.prompt, artifact.initial
    files = {entry.name: entry.stat().st_size for entry in sorted(path.iterdir()) if entry.name in _FILES}
    distance = None
    if prompt is not None and initial is not None:
        distance = rms(prompt.double() - initial.double())
    return {
        "directory": str(path),
        "origin": "softprompts" if MANIFEST in files else "peft",
        **{key: getattr(artifact, key) for key in _SHARED_KEYS if key not in ("fingerprint", "parents", "config")},
        "plain_prompt": prompt is not None,
        "length": artifact.shape[0],
        "width": artifact.shape[1],
        "parameters": _count_parameters(artifact),
        "heads": {key: list(value.shape) for key, value in artifact.heads.items()},
        "rms": None if prompt is None else rms(prompt),
        "rms_initial": None if initial is None else rms(initial),
        "distance": distance,
        "fingerprint": _fingerprint_facts(artifact.fingerprint),
        "peft": why_not_peft(artifact) or True,
        "parents": list(artifact.parents),
        "segments": list(artifact.segments),
        "sum": artifact.vector_sum,
        "digest": artifact.digest,
        "bytes": sum(files.values()),
        "files": files,
    }


def _count_parameters(artifact: Artifact) -> int:
    """How many numbers of the method and of the head training changed."""
    frozen = {START} if artifact.options.get("trained") else {START, SOURCES}  # a memory's rows may be trained
    state = artifact.state
    if not state and artifact.prompt is not None:
        state = {"prompt": artifact.prompt}
    count = sum(map(torch.numel, artifact.heads.values()))
    for name, value in state.items():
        if name.split(".")[-1] not in frozen:
            count += value.numel()
    return count


def _contents(artifact: Artifact, path: Path) -> dict[str, bytes]:
    """Every file of the directory, made and checked before the disk is touched."""
    _check(artifact, path)
    reason = why_not_peft(artifact)
    tensor_files = {TENSORS: encode_tensors(_tensors(artifact), {"format": "pt"}, path / TENSORS)}
    if reason is None:
        tensors = peft_files.adapter_tensors(artifact.require_prompt(path), artifact.heads)
        tensor_files[peft_files.TENSORS] = encode_tensors(tensors, {"format": "pt"}, path / peft_files.TENSORS)
    values = {
        **{key: getattr(artifact, key) for key in _SHARED_KEYS},
        "format_version": FORMAT,
        "plain_prompt": artifact.prompt is not None,
        "shape": list(artifact.shape),
        "fingerprint": _fingerprint_facts(artifact.fingerprint),
        "scores": _null_nonfinite(artifact.scores),
        "peft": reason or True,
        "digest": artifact.digest,
        "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in tensor_files.items()},
    }
    manifest = {key: to_json(values[key], f"{path / MANIFEST}: {key}") for key in Manifest.model_fields}
    parse_manifest(manifest, path / MANIFEST)
    files = dict(tensor_files)
    files[MANIFEST] = encode_json(manifest, path / MANIFEST)
    files[CARD] = _card(artifact, reason).encode()
    if reason is None:
        files[peft_files.CONFIG] = encode_json(peft_config(artifact), path / peft_files.CONFIG)
    return files


def peft_config(artifact: Artifact) -> dict[str, Any]:
    """The content of PEFT's `adapter_config.json` for an artifact."""
    return peft_files.adapter_config(
        shape=(artifact.shape[0], artifact.shape[1]),
        family=artifact.family,
        head=artifact.head,
        heads=artifact.heads,
        backbone=artifact.backbone,
        revision=artifact.revision,
        architecture=artifact.fingerprint.architecture if artifact.fingerprint else {},
    )


def _check(artifact: Artifact, path: Path) -> None:
    """Check the tensors of an artifact, on the way in and on the way out."""
    shape, prompt, initial = artifact.shape, artifact.prompt, artifact.initial
    if prompt is None and (initial is None or not artifact.state):
        missing = "initial prompt" if initial is None else "state"
        raise ArtifactError(
            f"{path}: without a prompt the method's state answers from its initial prompt; no {missing}"
        )
    if len(shape) != 2 or 0 in shape:
        raise ArtifactError(f"{path}: the prompt must be [P, D], found {list(shape)}")
    matrices = {"prompt": prompt, "initial": initial}
    for name, value in matrices.items():
        if value is not None and (value.dtype != torch.float32 or tuple(value.shape) != shape):
            actual = f"{value.dtype} {list(value.shape)}".removeprefix("torch.")
            raise ArtifactError(f"{path}: {name} must be float32 {list(shape)}, found {actual}")
    for name, value in (*matrices.items(), *artifact.heads.items()):
        if value is not None and (bad := int((~torch.isfinite(value)).sum())):
            raise ArtifactError(f"{path}: {name} has NaN or Inf in {bad} of {value.numel()} numbers")
    if artifact.fingerprint and artifact.fingerprint.sketch.dtype != torch.float32:
        raise ArtifactError(f"{path}: sketch must be float32, found {artifact.fingerprint.sketch.dtype}")


def _tensors(artifact: Artifact) -> dict[str, Tensor]:
    """The tensors of `softprompts.safetensors`."""
    tensors = add_prefix("state.", artifact.state) | add_prefix("head.", artifact.heads)
    if artifact.prompt is not None:
        tensors["prompt"] = artifact.prompt
    if artifact.initial is not None:
        tensors["initial"] = artifact.initial
    if artifact.fingerprint is not None:
        tensors["sketch"] = artifact.fingerprint.sketch
    return tensors


def _load_softprompts(path: Path) -> Artifact:
    manifest = parse_manifest(read_json(path / MANIFEST), path / MANIFEST)
    data = read_bytes(path / TENSORS)
    tensors, _ = decode_tensors(data, path / TENSORS)
    _check_names(tensors, manifest, path)
    fingerprint = None
    if manifest.fingerprint is not None:
        fingerprint = Fingerprint(sketch=tensors["sketch"], **manifest.fingerprint.model_dump())
    converted = ("fingerprint", "parents", "segments")
    artifact = Artifact(
        **{key: getattr(manifest, key) for key in _SHARED_KEYS if key not in converted},
        prompt=tensors.get("prompt"),
        initial=tensors.get("initial"),
        state=upgrade_state(manifest.method, take_prefix("state.", tensors), manifest.format_version),
        heads=take_prefix("head.", tensors),
        fingerprint=fingerprint,
        parents=tuple(manifest.parents),
        segments=tuple(manifest.segments),
    )
    _check(artifact, path / TENSORS)
    _check_sums(artifact, manifest, path, data)
    return artifact


def _check_names(tensors: Mapping[str, Tensor], manifest: Manifest, path: Path) -> None:
    """Raise ArtifactError for unknown and missing tensors, and for a shape that contradicts the manifest."""
    required = {"prompt"} if manifest.plain_prompt else {"initial"}
    if manifest.fingerprint is not None:
        required.add("sketch")
    problems = []
    for name in sorted(tensors):
        if name not in required | {"initial"} and not name.startswith(("state.", "head.")):
            problems.append(f"unknown tensor '{name}'")
    for name in sorted(required - set(tensors)):
        problems.append(f"no tensor '{name}'")
    if problems:
        raise ArtifactError(f"{path / TENSORS}: {'; '.join(problems)}")
    shape = list(tensors["prompt" if manifest.plain_prompt else "initial"].shape)
    if shape != manifest.shape:
        title = "the prompt" if manifest.plain_prompt else "the initial prompt"
        raise ArtifactError(f"{path / TENSORS}: {title} is {shape}, but {MANIFEST} says {manifest.shape}")


def _check_sums(artifact: Artifact, manifest: Manifest, path: Path, data: bytes) -> None:
    """Refuse files that were edited, and files of two artifacts that were mixed in one directory."""
    if hashlib.sha256(data).hexdigest() != manifest.sha256.get(TENSORS):
        raise ArtifactError(f"{path / TENSORS} is not the file that {MANIFEST} was written with: its sha256 differs")
    if artifact.digest != manifest.digest:
        raise ArtifactError(f"{path / MANIFEST}: the digest is not that of the prompt: one of them was edited")
    adapter = path / peft_files.TENSORS
    if adapter.is_file() and hashlib.sha256(read_bytes(adapter)).hexdigest() != manifest.sha256.get(adapter.name):
        raise ArtifactError(
            f"{adapter} was not written by softprompts: PEFT saved here later; delete {MANIFEST} and {TENSORS} to load "
            f"PEFT's prompt, or {peft_files.CONFIG} and {adapter.name} to load ours"
        )


def read_peft_files(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors of PEFT's two files in a directory.

    Raises:
        ArtifactError: The configuration is not a JSON object, the tensors are not safetensors, or PEFT pickled them;
            a pickle is not opened.
    """
    config = read_json(path / peft_files.CONFIG)
    if not isinstance(config, dict):
        raise ArtifactError(f"{path / peft_files.CONFIG} must hold an object, found {type(config).__name__}")
    if not (path / peft_files.TENSORS).is_file() and (path / peft_files.PICKLE).is_file():
        raise ArtifactError(
            f"{path / peft_files.PICKLE} is a pickle, which can execute code when read, and is not opened; convert it "
            "where you trust it: load it in PEFT and call save_pretrained(directory, safe_serialization=True)"
        )
    return config, read_tensors(path / peft_files.TENSORS)[0]


def _load_peft(path: Path, task: int | str | None) -> Artifact:
    config, tensors = read_peft_files(path)
    try:
        adapter = peft_files.read_adapter(config, tensors, task)
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
        placement="first",
        family=adapter.family,
        head=adapter.head,
        backbone=adapter.backbone,
        revision=adapter.revision,
        fingerprint=None,
        template=None,
        config={"peft": config},
        scores={},
        parents=(),
        version=f"peft {config.get('peft_version') or 'unknown'}",
    )
    _check(artifact, path / peft_files.TENSORS)
    return artifact


def _fingerprint_facts(fingerprint: Fingerprint | None) -> dict[str, Any] | None:
    """The fingerprint without its sketch, as JSON."""
    if fingerprint is None:
        return None
    return {key: getattr(fingerprint, key) for key in ("architecture", "tokenizer", "dtype")}


def why_not_peft(artifact: Artifact) -> str | None:
    """Why PEFT cannot load the prompt; None where it can."""
    if artifact.prompt is None:
        return f"method {artifact.method}: it has no plain prompt, and PEFT stores one matrix"
    return peft_files.why_peft_cannot_load(
        site=artifact.site,
        placement=artifact.placement,
        family=artifact.family,
        head=artifact.head,
        heads=artifact.heads,
        template=artifact.template,
    )


def _card(artifact: Artifact, why_not_peft: str | None) -> str:
    """The model card. It says nothing that the other files do not say."""
    length, width = artifact.shape
    backbone = artifact.backbone or "an unnamed model"
    header = ["---"]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", backbone):
        header.append(f"base_model: {backbone}")
    header += [f"library_name: {'softprompts' if why_not_peft else 'peft'}", "tags: [soft-prompt, softprompts]", "---"]
    revision = f" at revision `{artifact.revision}`" if artifact.revision else ""
    origin = f"trained with {artifact.method}"
    if artifact.vector_sum is not None:
        origin = f"made of trained prompts: `{' '.join(artifact.vector_sum.split())}` added to its start"
    segments = f" in segments of {', '.join(map(str, artifact.segments))} tokens" if artifact.segments else ""
    paragraphs = [
        f"# Soft prompt: {' '.join(artifact.task.split())}",
        f"A prompt of {length} vectors of width {width} for the frozen `{backbone}`{revision}, {origin}. "
        f"It enters at site `{artifact.site}`, placement `{artifact.placement}`{segments}.",
        "It works with exactly these weights only.",
    ]
    if artifact.prompt is None:
        paragraphs.append(
            "The method computes a prompt for each text: `SoftPromptModel.from_pretrained(model, "
            '"path/to/this/directory")`, or `softprompts predict path/to/this/directory TEXT`.'
        )
    else:
        load = 'prompt = artifact.load("path/to/this/directory").prompt'
        paragraphs.append(f"```python\nfrom softprompts.artifacts import artifact\n\n{load}\n```")
    if why_not_peft:
        paragraphs.append(f"PEFT cannot load it ({why_not_peft}).")
    else:
        load = 'PeftModel.from_pretrained(model, "path/to/this/directory")'
        paragraphs.append(f"PEFT loads this directory too: `{load}`.")
    scores = [
        f"| {name} | {value} |" for name, value in _score_cells(to_json(_null_nonfinite(artifact.scores), "scores"))
    ]
    if scores:
        paragraphs.append("\n".join(["| score | value |", "|---|---|", *scores]))
    return "\n".join(header) + "\n\n" + "\n\n".join(paragraphs) + "\n"


def _score_cells(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Scores by dotted name, as cells of a Markdown table; lists and nulls are in the manifest only."""
    if isinstance(value, Mapping):
        cells = []
        for key, score in value.items():
            cells += _score_cells(score, f"{name}.{key}" if name else key)
        return cells
    if not isinstance(value, int | float | str):
        return []
    return [(_cell(name), _cell(f"{value:.6g}" if isinstance(value, float) else str(value)))]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _null_nonfinite(value: Any) -> Any:
    """Scores with null for each number that is not finite, so that such a score does not cost the user the prompt."""
    if isinstance(value, Mapping):
        return {key: _null_nonfinite(score) for key, score in value.items()}
    if isinstance(value, list | tuple):
        return list(map(_null_nonfinite, value))
    value = to_number(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
