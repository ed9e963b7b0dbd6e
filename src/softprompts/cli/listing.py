"""The command `softprompts methods`: what can be trained, from which paper, how many numbers, where."""

import inspect as python
from collections.abc import Callable
from typing import Annotated, Any

import typer

from softprompts.cli.options import Json, Model
from softprompts.cli.screen import quiet, show_json, table_or_lines

DEFAULT = "smollm2-135m"
WIDTH, LAYERS, KEYS, VOCABULARY = 576, 30, 2 * 3 * 64, 49152
"""Of the packaged default model: hidden width, layers, numbers of a layer's keys and values, token ids; a test holds
that the model is so. With them its sizes are shown without loading it.
"""

SITES = ("input", "decoder", "layers", "kv")


def methods(
    length: Annotated[int, typer.Option(help="Prompt tokens that trained numbers are counted for.")] = 20,
    model: Model = None,
    as_json: Json = False,
) -> None:
    """The methods that can be trained: paper, trained numbers of one task, sites, what a prompt depends on.

    Numbers are those of the method as it is without options, at the first of its sites that the model has.
    """
    from softprompts.errors import ConfigError
    from softprompts.methods import find, names

    if length < 1:
        raise ConfigError(f"--length must be 1 or more, given {length}")
    slot = _default_slot if model is None else _slots_of(model, length)
    rows = {name: _row(name, find(name), slot, length) for name in names()}
    if as_json:
        show_json(rows)
        return
    columns = ("method", "what it is", "paper", "trained numbers", "sites", "folds to a plain prompt", "sees the text")
    lines = [
        (
            name,
            row["about"],
            row["paper"] or "-",
            f"{row['trained']['numbers']:,} at {row['trained']['site']}" if row["trained"] else row["why"] or "-",
            ", ".join(row["sites"] or ()) or "-",
            _told(row["folds"]),
            _told(row["input_dependent"]),
        )
        for name, row in rows.items()
    ]
    table_or_lines(f"methods, {length} prompt tokens of {model or DEFAULT}", columns, lines)


def _told(answer: bool | None) -> str:
    return {True: "yes", False: "no", None: "-"}[answer]


def _row(name: str, kind: Any, slot: Callable[[str, int], Any], length: int) -> dict[str, Any]:
    """What is known of a method; of what one by third parties does not say, nothing is."""
    trained, why = _trained(name, kind.sites, slot, length)
    return {
        "about": (python.getdoc(kind) or "-").splitlines()[0],
        "paper": kind.paper or None,
        "sites": list(kind.sites),
        "folds": not kind.input_dependent and not kind.changes_text,
        "input_dependent": kind.input_dependent,
        "trained": trained,
        "why": why,
    }


def _trained(
    name: str, sites: tuple[str, ...], slot: Callable[[str, int], Any], length: int
) -> tuple[dict[str, Any] | None, str | None]:
    """How many numbers the method trains for a task, at the first of `sites` that there is; or None and, where the
    method says it, why there are none."""
    import torch

    from softprompts.errors import ConfigError
    from softprompts.methods import build
    from softprompts.types import PromptInit

    why = None
    for site in sites:
        found = slot(site, length)
        if found is None:
            continue
        zeros = torch.zeros(length, found.width)
        for device in ("meta", "cpu"):  # without memory for weights that are only counted, where the method lets us
            try:
                with torch.device(device):
                    made = build(name, {}, found, PromptInit(zeros, zeros[None]))
            except ConfigError as error:
                why = str(error).removeprefix(f"method {name}: ")
                continue
            except Exception:  # what third parties' methods raise, or need besides, cannot be known
                continue
            numbers = sum(p.numel() for p in made.parameters() if p.requires_grad)
            return {"site": site, "numbers": numbers}, None
    return None, why


def _default_slot(site: str, length: int) -> Any:
    """What a method must fill at a site of the packaged default model, None where it has no such site."""
    from softprompts.types import PromptSpec

    parts = {"input": (), "layers": (WIDTH,) * LAYERS, "kv": (KEYS,) * LAYERS}.get(site)
    if parts is None:
        return None
    return PromptSpec(length, sum(parts) or WIDTH, WIDTH, VOCABULARY, parts, {"backbone": WIDTH})


def _slots_of(model: str, length: int) -> Callable[[str, int], Any]:
    """The same for a model by its name, which is loaded; raises BackboneError where it has no room for the prompt."""
    from softprompts import injection
    from softprompts.config import ModelConfig
    from softprompts.errors import BackboneError
    from softprompts.model.setup import load_backbone

    quiet()
    backbone = load_backbone(ModelConfig(name=model, attention="eager", matmul_backend="torch"))
    injection.prompt_spec(backbone, injection.Site(), length)

    def slot(site: str, length: int) -> Any:
        try:
            return injection.prompt_spec(backbone, injection.Site(site), length)
        except BackboneError:
            return None

    return slot
