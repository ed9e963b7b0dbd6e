"""The names that tensors of methods had in artifacts of formats 1 to 3, when a method held a list for all its tasks."""

from collections.abc import Mapping

from torch import Tensor

OLD_NAMES: dict[str, dict[str, str]] = {
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
"""Method -> beginning of the old name -> beginning of the new one; what follows is the same."""


def rename_old_state(method: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a method under today's names; tensors that have these already stay as they are.

    Args:
        method: The method's name.
        state: The tensors of one task, by name.
    """
    names = OLD_NAMES.get(method, {})
    renamed = {}
    for name, value in state.items():
        old = next((old for old in names if name == old or name.startswith(f"{old}.")), None)
        if old is not None and not name.startswith("shared."):
            name = names[old] + name.removeprefix(old)
        renamed[name] = value
    return renamed
