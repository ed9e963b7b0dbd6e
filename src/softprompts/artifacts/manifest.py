"""`softprompts.json`: its keys, and what is refused."""

from pathlib import Path
from typing import Any, Literal

from softprompts.artifacts.upgrades import FORMAT, upgrade_manifest
from softprompts.config import Head, Section, parse
from softprompts.errors import ArtifactError, ConfigError

MANIFEST = "softprompts.json"


class FingerprintFacts(Section, strict=True):
    """The fingerprint without its sketch, which is stored among the tensors."""

    architecture: dict[str, Any]
    tokenizer: str | None
    dtype: str


class Manifest(Section, strict=True):
    """The JSON object of `softprompts.json`. Every key is required, and no other is allowed."""

    format_version: int
    version: str
    task: str
    method: str
    options: dict[str, Any]

    plain_prompt: bool
    """Whether the prompt is one matrix, the same for every text. If not, the method answers from its state."""

    shape: list[int]
    site: Literal["input", "decoder", "layers", "kv"]
    mode: Literal["replace", "add"]
    placement: Literal["first", "after_start", "suffix", "template"]

    segments: list[int]
    """The prompt tokens of each slot of the template, where it has several."""

    family: Literal["causal", "seq2seq", "masked"] | None
    head: Head
    backbone: str
    revision: str | None
    fingerprint: FingerprintFacts | None
    template: dict[str, Any] | None
    config: dict[str, Any]
    scores: dict[str, Any]
    parents: list[str]

    peft: bool | str
    """True, or why PEFT's two files are missing."""

    digest: str

    sha256: dict[str, str]
    """The sha256 of each tensor file, by the file's name."""


def parse_manifest(values: Any, path: Path) -> Manifest:
    """The manifest in the JSON value of a file, with the keys of format 4. `format_version` stays that of the file.

    Args:
        values: The JSON value.
        path: The file, for messages.

    Raises:
        ArtifactError: The value is not a manifest, or a newer version of the library wrote it.
    """
    if not isinstance(values, dict):
        raise ArtifactError(f"{path} must hold an object, found {type(values).__name__}")
    version = values.get("format_version")
    if type(version) is int:
        # The version comes first, because the new keys of a newer format would be reported as wrong ones.
        if version > FORMAT:
            raise ArtifactError(f"{path}: written by a newer softprompts, format {version} > {FORMAT}; upgrade")
        if version < 1:
            raise ArtifactError(f"{path}: there is no format {version}")
        values = upgrade_manifest(values, path)
    try:
        manifest: Manifest = parse(values, Manifest, str(path))
    except ConfigError as error:
        raise ArtifactError("; ".join(str(error).splitlines())) from None
    segments = manifest.segments
    if segments and (min(segments) < 1 or sum(segments) != manifest.shape[0]):
        raise ArtifactError(f"{path}: segments {segments} do not sum to the prompt's {manifest.shape[0]} tokens")
    return manifest
