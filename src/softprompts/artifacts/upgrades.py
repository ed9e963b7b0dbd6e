"""Reads artifacts of formats 1 to 3 as format 4: tables of old names, and one function for each step.

An artifact keeps its identity when it is upgraded, because its digest is computed over the names of format 3.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from softprompts.config import OLD_KEYS, update_old_keys, update_old_options
from softprompts.config.old_keys import rename
from softprompts.errors import ArtifactError

FORMAT = 4
"""The format that is written."""

OLD_MANIFEST_KEYS: Mapping[str, str] = MappingProxyType(
    {"fixed": "plain_prompt", "place": "placement", "format": "template"}
)
"""Key of the manifest in format 3 -> key in format 4."""

OLD_TENSORS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "prompt-tuning": {"prompts.0": "prompt"},
        "multitask-prompt-tuning": {"shared": "shared.prompt", "columns.0": "columns", "rows.0": "rows"},
        "attempt": {
            "prompts.0": "prompt",
            "sources": "shared.sources",
            "down": "shared.down",
            "up": "shared.up",
            "norm": "shared.norm",
        },
        "ipt": {
            "prompts.0": "prompt",
            "table": "shared.table",
            "encoder": "shared.encoder",
            "linear": "shared.linear",
        },
        "idpg": {
            "bias.0": "bias",
            "up.0": "up",
            "down.0": "down",
            "hidden.0": "hidden",
            "rules.0": "rules",
            "down_rules.0": "rules_down",
            "up_rules.0": "rules_up",
        },
        "prefix-tuning": {"prompts.0": "prompt", "networks.0": "network"},
        "p-tuning-v2": {"prompts.0": "prompt", "networks.0": "network"},
        "p-tuning": {"networks.0": "network", "outputs.0": "output"},
        "residual": {"prompts.0": "prompt", "scales.0": "scale", "shifts.0": "shift", "networks.0": "network"},
        "low-rank": {"columns.0": "columns", "rows.0": "rows"},
        "dept": {"prompts.0": "prompt", "columns.0": "columns", "rows.0": "rows"},
        "spt-reconstruction": {"soft": "shared.soft", "sources": "shared.sources"},
    }
)
"""Method -> beginning of a tensor's name in format 3 -> beginning in format 4; the rest of the name stays.

In format 3 a method held a list with one entry for each task, and an artifact the first entry.
"""


def upgrade_manifest(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The manifest with the keys of format 4, and its run's configuration with those of today.

    Its `format_version` stays that of the file.

    Args:
        values: The JSON object of the file, with a `format_version` from 1 to 4; nothing else of it is checked yet.
        path: The file, for messages.

    Raises:
        ArtifactError: The object has a key that its format does not know.
    """
    version: int = values["format_version"]
    upgraded = dict(values)
    for step in range(version, FORMAT):
        upgraded = _STEPS[step](upgraded, f"format {version} has none", path)
    if isinstance(upgraded.get("config"), Mapping):  # it records a run, so its names change without a new format
        upgraded["config"] = update_old_keys(upgraded["config"])
    return upgraded


def upgrade_state(method: str, state: Mapping[str, Tensor], version: int) -> dict[str, Tensor]:
    """The tensors of a method, read from an artifact of format `version`, under the names of format 4."""
    if version >= FORMAT:
        return dict(state)
    return {_replace_beginning(name, OLD_TENSORS.get(method, {})): value for name, value in state.items()}


def old_state_name(method: str, name: str) -> str:
    """The name in format 3 of a tensor of the method, for the digest."""
    return _replace_beginning(name, {new: old for old, new in OLD_TENSORS.get(method, {}).items()})


def _to_format_2(values: dict[str, Any], complaint: str, path: Path) -> dict[str, Any]:
    """Format 1 always had a plain prompt."""
    _refuse_keys(["fixed"], values, complaint, path)
    return {**values, "fixed": True}


def _to_format_3(values: dict[str, Any], complaint: str, path: Path) -> dict[str, Any]:
    """Before format 3 a prompt was never cut into segments."""
    _refuse_keys(["segments"], values, complaint, path)
    return {**values, "segments": []}


def _to_format_4(values: dict[str, Any], complaint: str, path: Path) -> dict[str, Any]:
    """Format 4 renamed keys of the manifest, of the template and of methods' options."""
    _refuse_keys(OLD_MANIFEST_KEYS.values(), values, complaint, path)
    renamed = rename(values, OLD_MANIFEST_KEYS)
    template = renamed.get("template")
    if isinstance(template, Mapping):
        _refuse_keys(OLD_KEYS["TaskTemplate"].values(), template, complaint, path)
        renamed["template"] = rename(template, OLD_KEYS["TaskTemplate"])
    if isinstance(renamed.get("options"), Mapping):
        renamed["options"] = update_old_options(str(renamed.get("method")), renamed["options"])
    return renamed


_STEPS: dict[int, Callable[[dict[str, Any], str, Path], dict[str, Any]]] = {
    1: _to_format_2,
    2: _to_format_3,
    3: _to_format_4,
}
"""Format -> the step from it to the next one."""


def _refuse_keys(keys: Iterable[str], values: Mapping[str, Any], complaint: str, path: Path) -> None:
    """Raise ArtifactError where `values` have one of `keys`, which only a newer format has."""
    for key in keys:
        if key in values:
            raise ArtifactError(f"{path}: unknown key '{key}': {complaint}")


def _replace_beginning(name: str, beginnings: Mapping[str, str]) -> str:
    """The dotted name with its beginning replaced, where `beginnings` has it."""
    for old, new in beginnings.items():
        if name == old or name.startswith(f"{old}."):
            return new + name.removeprefix(old)
    return name
