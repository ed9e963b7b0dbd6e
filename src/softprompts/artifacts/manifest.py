"""`softprompts.json`: its keys, what is refused, and what older formats said."""

from pathlib import Path
from typing import Any, Literal

from softprompts.config import Head, Section, parse, update_old_keys
from softprompts.errors import ArtifactError, ConfigError

FORMAT = 3
MANIFEST = "softprompts.json"


class Weights(Section, strict=True):
    """What the manifest says of the fingerprint; the sketch is among the tensors."""

    architecture: dict[str, Any]
    tokenizer: str | None
    dtype: str


class Manifest(Section, strict=True):
    """`softprompts.json`; every key must be there and no other."""

    format_version: int
    version: str
    task: str
    method: str
    options: dict[str, Any]
    fixed: bool  # whether the prompt is one matrix; else the state answers
    shape: list[int]
    site: Literal["input", "decoder", "layers", "kv"]
    mode: Literal["replace", "add"]
    place: Literal["first", "after_start", "suffix", "template"]
    segments: list[int]  # prompt tokens of each, where the prompt stands in several
    family: Literal["causal", "seq2seq", "masked"] | None
    head: Head
    backbone: str
    revision: str | None
    fingerprint: Weights | None
    format: dict[str, Any] | None
    config: dict[str, Any]
    scores: dict[str, Any]
    parents: list[str]
    peft: bool | str  # true, or why PEFT's two files are not written
    digest: str
    sha256: dict[str, str]  # of each tensor file


def check(values: Any, path: Path) -> Manifest:
    """The manifest in the JSON value of the file `path`; raises ArtifactError for what is wrong with it."""
    if not isinstance(values, dict):
        raise ArtifactError(f"{path} must hold an object, found {type(values).__name__}")
    # asked before anything else: what a newer version adds would be reported as a wrong key
    version = values.get("format_version")
    if isinstance(version, int) and version > FORMAT:
        raise ArtifactError(f"{path}: written by a newer softprompts, format {version} > {FORMAT}; upgrade")
    if isinstance(version, int) and version < 1:
        raise ArtifactError(f"{path}: there is no format {version}")
    for key, since, value in (("fixed", 2, True), ("segments", 3, [])):
        if isinstance(version, int) and version < since:
            if key in values:
                raise ArtifactError(f"{path}: unknown key '{key}': format {version} has none")
            values = {**values, key: value}
    if isinstance(values.get("config"), dict):
        values = {**values, "config": update_old_keys(values["config"])}
    try:
        result: Manifest = parse(values, Manifest, str(path))
    except ConfigError as error:
        raise ArtifactError("; ".join(str(error).splitlines())) from None
    if result.segments and (min(result.segments) < 1 or sum(result.segments) != result.shape[0]):
        raise ArtifactError(f"{path}: segments {result.segments} do not sum to the prompt's {result.shape[0]} tokens")
    return result
