"""Several runs in one configuration: its list `runs`, and the shorthand for seeds and rates."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from softprompts.config import ModelConfig, Run, assign, parse
from softprompts.errors import ConfigError

OPEN = ("options", "limit", "verbalizer", "objectives", "learning_rates", "teachers", "distillation")
"""Keys whose value is a mapping of the user's own: a run of several that gives one replaces it whole."""

SHARED = (*(f"model.{name}" for name in ModelConfig.model_fields), "prompt.site", "prompt.mode", "prompt.placement")
"""What runs that train together have in common: they are read by the same frozen model in the same batch."""


SHORT = {"training.learning_rate": "rate"}
"""What a key is called in the name of a run, where that is not the last part of the key."""


def sweep(run: Run) -> dict[str, Run]:
    """The runs that `run` stands for, by name: those of its list `runs`, each written to a folder of `run.output_dir`.

    A run without a list stands for itself, under the name "".
    Raises ConfigError for names that are no folders or not distinct, for keys that cannot be set and for runs that
    cannot share a batch.
    """
    if not run.runs:
        return {"": run}
    found: dict[str, Run] = {}
    for number, entry in enumerate(run.runs):
        name = _variant_name(entry, number, found)
        changes = {key: value for key, value in entry.items() if key != "name"}
        if forbidden := [key for key in changes if str(key).split(".")[0] in ("output_dir", "runs")]:
            raise ConfigError(f"runs '{name}': '{forbidden[0]}' is set for all of them; it stands beside runs")
        values = run.model_dump(mode="json", exclude={"runs"}) | {"output_dir": str(Path(run.output_dir) / name)}
        if len(run.tasks) == 1 and not any(str(key).startswith("tasks") for key in changes):
            values["task"] = values.pop("tasks")[0]
        _merge(values, changes, f"runs '{name}'")
        found[name] = parse(values, origin=f"runs '{name}'")
    first = next(iter(found))
    for name, one in found.items():
        if one.training.target != "prompt":
            raise ConfigError(
                f"run '{name}' changes weights (target: {one.training.target}), and runs that train together share a "
                f"frozen backbone; start such runs one after the other, each with an --out of its own, without "
                f"--seeds, --rates and runs"
            )
        for key in SHARED:
            here, there = _at(one, key), _at(found[first], key)
            if here != there:
                raise ConfigError(
                    f"runs '{first}' and '{name}' differ in {key} ({there}, {here}); runs that train together share "
                    f"the model and the prompt's site, mode and place; train these one after the other"
                )
    head = found[first].model.head
    if len(found) > 1 and head != "lm":
        raise ConfigError(
            f"head '{head}' is trained with each run, and a batch is read with one head; train such runs one "
            f"after the other, or use model.head: lm"
        )
    return found


def grid(run: Run, lists: Mapping[str, Iterable[Any]]) -> Run:
    """`run` with one run for every combination of the values of `lists` (key -> values), named as in seed0-rate0.1.

    Runs that it lists already are combined with all of them.
    """
    entries: list[dict[str, Any]] = [dict(entry) for entry in run.runs] or [{"name": ""}]
    for key, values in lists.items():
        entries = [
            {**entry, "name": f"{entry['name']}-{SHORT.get(key, key.split('.')[-1])}{value}".strip("-"), key: value}
            for entry in entries
            for value in values
        ]
    crossed: Run = parse({**run.model_dump(mode="json"), "runs": entries})
    return crossed


def _variant_name(entry: Mapping[str, Any], number: int, taken: Iterable[str]) -> str:
    name = str(entry.get("name", ""))
    if not name.strip() or name in (".", "..") or "/" in name or "\\" in name:
        raise ConfigError(
            f"runs: entry {number + 1} needs a name that can be a folder, given {entry.get('name')!r}; write it as "
            f"{{name: a, seed: 1}}"
        )
    # Some file systems do not tell small letters from capitals.
    if twin := [other for other in taken if other.casefold() == name.casefold()]:
        called = f"'{name}'" if name in twin else f"'{twin[0]}' and '{name}', which may be one folder"
        raise ConfigError(f"runs: two entries are called {called}; their names must differ")
    return name


def _merge(node: Any, changes: Mapping[str, Any], origin: str) -> None:
    """Set `changes`, nested or with dotted keys, in the values `node` of a run."""
    for key, value in changes.items():
        path = str(key).split(".")
        inside = node.get(key) if isinstance(node, dict) else None
        if isinstance(value, Mapping) and isinstance(inside, dict) and key not in OPEN:
            _merge(inside, value, origin)
        else:
            assign(node, path, value, f"{key} of {origin}")


def _at(run: Run, key: str) -> Any:
    value: Any = run
    for part in key.split("."):
        value = getattr(value, part)
    return value
