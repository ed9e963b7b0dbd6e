"""The commands that train: quickstart, train, and the recipes multitask and pretrain."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from softprompts.cli.options import (
    Device,
    Dtype,
    Json,
    Model,
    OutDirectory,
    Quantize,
    Sets,
    key_help,
    model_changes,
)
from softprompts.cli.screen import log, out, progress, quiet, show, show_arms, show_files, show_json, show_runs
from softprompts.config import Run, Section, TaskConfig, override, parse, read
from softprompts.config.sweep import grid
from softprompts.errors import ConfigError

QUICKSTART: dict[str, Any] = {
    "model": {"name": "smollm2-135m"},
    "prompt": {"num_virtual_tokens": 20, "init": {"kind": "labels"}},
    "task": {"source": "trec"},
    "training": {"max_steps": 500, "batch_size": 16, "learning_rate": 0.1, "warmup_steps": 30},
    "output_dir": "runs/quickstart",
}
"""The run of `softprompts quickstart`."""


def quickstart(
    out_dir: Annotated[Path, typer.Option("--out", help="Where everything is written.")] = Path("runs/quickstart"),
    device: Device = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    sets: Sets = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Teach the packaged model to classify questions, in a few minutes."""
    model = QUICKSTART["model"] | model_changes(None, device, dtype, quantize)
    values = override({**QUICKSTART, "model": model, "output_dir": str(out_dir)}, sets)
    _train(parse(values), as_json)


def train(
    config: Annotated[Path | None, typer.Option("--config", help="A YAML file; the options below change it.")] = None,
    model: Model = None,
    data: Annotated[str | None, typer.Option(help=key_help("tasks.source"))] = None,
    text: Annotated[str | None, typer.Option(help="Template, such as 'Review: {text}', or one column's name.")] = None,
    label: Annotated[str | None, typer.Option(help=key_help("tasks.label"))] = None,
    length: Annotated[int | None, typer.Option(help=key_help("prompt.num_virtual_tokens"))] = None,
    steps: Annotated[int | None, typer.Option(help=key_help("training.max_steps"))] = None,
    rate: Annotated[float | None, typer.Option(help=key_help("training.learning_rate"))] = None,
    seed: Annotated[int | None, typer.Option(help=key_help("seed"))] = None,
    rates: Annotated[str | None, typer.Option(help="Several learning rates, trained together: 0.05,0.1")] = None,
    seeds: Annotated[str | None, typer.Option(help="Several seeds, trained together: 0,1,2")] = None,
    out_dir: OutDirectory = None,
    device: Device = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    sets: Sets = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Train a prompt, evaluate it before and after, and write prompt, results.json and report.html.

    With --set training.target=lora or training.target=backbone weights are trained instead, to compare with.
    """
    options: list[tuple[str, Any]] = [
        ("task.source", data),
        ("task.template", None if text is None else text if "{" in text else f"{{{text}}}"),
        ("task.label", label),
        ("prompt.num_virtual_tokens", length),
        ("training.max_steps", steps),
        ("training.learning_rate", rate),
        ("seed", seed),
        ("output_dir", None if out_dir is None else str(out_dir)),
    ]
    changes = [*_overrides(options), *_model_overrides(model_changes(model, device, dtype, quantize)), *sets]
    if config is None:
        if data is None:
            raise ConfigError("nothing to train on: give --data, or a configuration with --config")
        run = parse(override({"output_dir": f"runs/{TaskConfig(source=data).title}"}, changes))
    else:
        run = read(config, changes)
    lists = {
        "seed": _listed("--seeds", seeds, seed, int),
        "training.learning_rate": _listed("--rates", rates, rate, float),
    }
    given_lists = {key: values for key, values in lists.items() if values}
    _train(grid(run, given_lists) if given_lists else run, as_json)


def multitask(
    config: Annotated[Path, typer.Option("--config", help="A YAML file with sources and targets.")],
    out_dir: OutDirectory = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    sets: Sets = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Teach sources, train a prompt that they share, adapt it to targets, and compare with other ways to start."""
    from softprompts.recipes.multitask import Plan, execute

    plan = read_plan(config, Plan, out_dir, model_changes(model, device, dtype, quantize), sets)
    carry_out(plan, execute, show_arms, as_json)


def pretrain(
    config: Annotated[Path, typer.Option("--config", help="A YAML file as for `train`; its task must have classes.")],
    out_dir: OutDirectory = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    sets: Sets = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Teach what reads the text in a method, such as ipt's table, to tell topics apart; a run starts from it."""
    from softprompts.recipes import pretrain as recipe

    run = read_plan(config, Run, out_dir, model_changes(model, device, dtype, quantize), sets)
    carry_out(run, recipe.run, show, as_json)


def read_plan(config: Path, kind: type[Section], out_dir: Path | None, model: dict[str, Any], sets: list[str]) -> Any:
    """The plan of class `kind` in a file, with what the command line changes."""
    options = [("output_dir", None if out_dir is None else str(out_dir))]
    return read(config, [*_overrides(options), *_model_overrides(model), *sets], kind)


def carry_out(
    plan: Any, execute: Callable[..., dict[str, Any]], present: Callable[[dict[str, Any]], None], as_json: bool
) -> None:
    """Run a recipe or a study, show its results, and say after an interruption whether something is kept."""
    quiet()
    directory = Path(plan.output_dir)
    try:
        with progress() as reporter:
            results = execute(plan, reporter)
    except KeyboardInterrupt:
        if directory.is_dir() and any(directory.iterdir()):
            log(f"interrupted; finished stages are in {directory}: the same command continues")
        else:
            log("interrupted; nothing was done yet")
        raise
    if as_json:
        show_json(results)
        return
    present(results)
    show_files(results=directory / "results.json", report=directory / "report.html")


def _overrides(options: Sequence[tuple[str, Any]]) -> list[str]:
    """Keys with their values as `--set` takes them; those without a value are left out."""
    return [f"{key}={json.dumps(value)}" for key, value in options if value is not None]


def _model_overrides(changes: Mapping[str, Any]) -> list[str]:
    """Keys of the section `model` as `--set` takes them; null is a value."""
    return [f"model.{key}={json.dumps(value)}" for key, value in changes.items()]


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


def _train(run: Run, as_json: bool) -> None:
    from softprompts.errors import TrainingError
    from softprompts.recipes.run import run as recipe
    from softprompts.training.checkpoint import CHECKPOINT

    quiet()
    directory = Path(run.output_dir)
    try:
        with progress() as reporter:
            results = recipe.run(run, reporter)
    except KeyboardInterrupt:
        checkpoints = directory.glob(f"*/{CHECKPOINT}" if run.runs else CHECKPOINT)
        if run.training.target != "prompt":
            log("interrupted; weights are saved only when training ends; the same command starts again")
        elif any(checkpoints):
            log(f"interrupted; the checkpoint is in {directory}: the same command continues")
        else:
            log("interrupted; nothing was trained yet")
        raise
    if not recipe.is_main_process():
        return
    if as_json:
        show_json(results)
    else:
        _show_results(run, results)
    if run.runs and results["warnings"]:
        raise TrainingError("; ".join(results["warnings"]))


def _show_results(run: Run, results: dict[str, Any]) -> None:
    directory = Path(run.output_dir)
    if run.runs:
        show_runs(results)
    else:
        for page in results.get("tasks", [results]):
            show(page)
    files: dict[str, Any] = {}
    if run.training.target == "prompt":
        files["prompt"] = directory / "*" / "prompt" if run.runs else directory / "prompt"
    elif run.training.target == "lora":
        files["adapter"] = directory / "lora"
    elif run.training.save_model:
        files["model"] = directory / "model"
    files["results"] = directory / "results.json"
    files["report"] = ", ".join(sorted(str(path) for path in directory.glob("report*.html")))
    show_files(**files)
    if results["next"]:
        out.print("\nnext:")
    for line in results["next"]:
        out.print(f"  {line}", markup=False, soft_wrap=True)
