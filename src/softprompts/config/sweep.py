"""Several runs in one configuration: its list `runs`, and the shorthand for seeds and learning rates."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from softprompts.config.parsing import assign, parse
from softprompts.config.schema import ModelConfig, Run
from softprompts.errors import ConfigError

REPLACED_WHOLE = ("options", "limit", "verbalizer", "objectives", "learning_rates", "teachers", "distillation")
"""Keys with a mapping of free keys: a run of the list that gives one replaces it, and does not add to it."""

SHARED = (*(f"model.{name}" for name in ModelConfig.model_fields), "prompt.site", "prompt.mode", "prompt.placement")
"""What runs that train together have in common, because one frozen model reads them in one batch."""

SHORT_NAMES = {"training.learning_rate": "rate"}
"""How a key is called in the name of a run, where that is not the last part of the key."""


def sweep(run: Run) -> dict[str, Run]:
    """The runs of a configuration, by name.

    Args:
        run: A configuration. Each entry of its list `runs` becomes a run that is written to a folder of its
            `output_dir`; without a list, it is a run itself, under the name "".

    Raises:
        ConfigError: Names are no folders or not distinct, keys cannot be set, or the runs cannot share a batch.
    """
    if not run.runs:
        return {"": run}
    runs: dict[str, Run] = {}
    for number, entry in enumerate(run.runs):
        name = _check_name(entry, number, runs)
        changes = {key: value for key, value in entry.items() if key != "name"}
        for key in changes:
            if str(key).split(".")[0] in ("output_dir", "runs"):
                raise ConfigError(f"runs '{name}': '{key}' is set for all of them; write it beside runs")
        values = run.model_dump(mode="json", exclude={"runs"}) | {"output_dir": str(Path(run.output_dir) / name)}
        if len(run.tasks) == 1 and not any(str(key).startswith("tasks") for key in changes):
            values["task"] = values.pop("tasks")[0]
        _merge(values, changes, f"runs '{name}'")
        runs[name] = parse(values, origin=f"runs '{name}'")
    _check_shared(runs)
    return runs


def grid(run: Run, lists: Mapping[str, Iterable[Any]]) -> Run:
    """A configuration with one run for every combination of values, named as in `seed0-rate0.1`.

    Args:
        run: A configuration. Runs that it lists already are combined with all values.
        lists: The values of each key.
    """
    entries: list[dict[str, Any]] = [dict(entry) for entry in run.runs] or [{"name": ""}]
    for key, values in lists.items():
        title = SHORT_NAMES.get(key, key.split(".")[-1])
        combined = []
        for entry in entries:
            for value in values:
                combined.append({**entry, "name": f"{entry['name']}-{title}{value}".strip("-"), key: value})
        entries = combined
    result: Run = parse({**run.model_dump(mode="json"), "runs": entries})
    return result


def _check_shared(runs: Mapping[str, Run]) -> None:
    """Raise ConfigError for runs that cannot share a batch."""
    first = next(iter(runs))
    for name, run in runs.items():
        if run.training.target != "prompt":
            raise ConfigError(
                f"run '{name}' changes weights (target: {run.training.target}), and runs that train together share a "
                f"frozen backbone; start such runs one after the other, each with its own --out, without "
                f"--seeds, --rates and runs"
            )
        for key in SHARED:
            value, expected = _value_at(run, key), _value_at(runs[first], key)
            if value != expected:
                raise ConfigError(
                    f"runs '{first}' and '{name}' differ in {key} ({expected}, {value}); runs that train together "
                    f"share the model and the prompt's site, mode and placement; train these one after the other"
                )
    head = runs[first].model.head
    if len(runs) > 1 and head != "lm":
        raise ConfigError(
            f"head '{head}' is trained with each run, and a batch has one head; train such runs one "
            f"after the other, or use model.head: lm"
        )


def _check_name(entry: Mapping[str, Any], number: int, taken: Iterable[str]) -> str:
    """The name of an entry of the list; raises ConfigError unless it can be the name of a separate folder."""
    name = str(entry.get("name", ""))
    if not name.strip() or name in (".", "..") or "/" in name or "\\" in name:
        raise ConfigError(
            f"runs: entry {number + 1} needs a name that can be a folder, given {entry.get('name')!r}; write it as "
            f"{{name: a, seed: 1}}"
        )
    # Some file systems do not tell small letters from capitals.
    same = [other for other in taken if other.casefold() == name.casefold()]
    if same:
        called = f"'{name}'" if name in same else f"'{same[0]}' and '{name}', which may be one folder"
        raise ConfigError(f"runs: two entries are called {called}; their names must differ")
    return name


def _merge(node: Any, changes: Mapping[str, Any], origin: str) -> None:
    """Set `changes`, nested or with dotted keys, in the values `node` of a run."""
    for key, value in changes.items():
        inside = node.get(key) if isinstance(node, dict) else None
        if isinstance(value, Mapping) and isinstance(inside, dict) and key not in REPLACED_WHOLE:
            _merge(inside, value, origin)
        else:
            assign(node, str(key).split("."), value, f"{key} of {origin}")


def _value_at(run: Run, key: str) -> Any:
    value: Any = run
    for part in key.split("."):
        value = getattr(value, part)
    return value
