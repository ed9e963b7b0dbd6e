"""The commands of more than a run: the recipes `softprompts multitask` and `pretrain`, and `softprompts study ...`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from softprompts.cli.options import Device, Dtype, Json, Model, Quantize, Sets, on_machine
from softprompts.cli.screen import (
    progress,
    quiet,
    say,
    show,
    show_arms,
    show_claims,
    show_comparison,
    show_files,
    show_json,
)
from softprompts.config import Run, Section
from softprompts.config import read as read_config

app = typer.Typer(no_args_is_help=True, help="Studies shaped like papers, on packaged data.")

OutDirectory = Annotated[Path | None, typer.Option("--out", help="Where everything is written.")]


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

    plan = _read(config, Plan, out_dir, model, on_machine(device, dtype, quantize), sets)
    _carry_out(plan, execute, show_arms, as_json)


def pretrain(
    config: Annotated[Path, typer.Option("--config", help="A YAML file as for `train`, its task one of classes.")],
    out_dir: OutDirectory = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    sets: Sets = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Teach what reads the text in a method, such as ipt's table, to tell topics apart; a run starts from it."""
    from softprompts.recipes.pretrain import execute

    run = _read(config, Run, out_dir, model, on_machine(device, dtype, quantize), sets)
    _carry_out(run, execute, show, as_json)


@app.command()
def vectors(
    config: Annotated[Path, typer.Option("--config", help="A YAML file with tasks and unseen targets.")],
    out_dir: OutDirectory = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    sets: Sets = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Task prompt vectors: do they depend on their start, do sums work, do they help with few examples?"""
    from studies.task_prompt_vectors import Study, execute

    plan = _read(config, Study, out_dir, model, on_machine(device, dtype, quantize), sets)
    _carry_out(plan, execute, show_claims, as_json)


@app.command()
def instance(
    config: Annotated[Path, typer.Option("--config", help="A YAML file with tasks and the methods to compare.")],
    out_dir: OutDirectory = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    sets: Sets = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Prompts that look at the input, and deep prompts, beside prompt tuning: what they gain and what they cost."""
    from studies.instance_prompts import Study, execute

    plan = _read(config, Study, out_dir, model, on_machine(device, dtype, quantize), sets)
    _carry_out(plan, execute, show_comparison, as_json)


def _read(
    config: Path,
    kind: type[Section],
    out_dir: Path | None,
    model: str | None,
    machine: dict[str, Any],
    sets: list[str],
) -> Any:
    """The plan in a file, with what the command line changes."""
    given = [("output_dir", None if out_dir is None else str(out_dir)), ("model.name", model)]
    changes = [f"{key}={json.dumps(value)}" for key, value in given if value is not None]
    changes += [f"model.{key}={json.dumps(value)}" for key, value in machine.items()]
    return read_config(config, [*changes, *sets], kind)


def _carry_out(
    plan: Any, execute: Callable[..., dict[str, Any]], present: Callable[[dict[str, Any]], None], as_json: bool
) -> None:
    quiet()
    try:
        with progress() as screen:
            results = execute(plan, screen)
    except KeyboardInterrupt:
        where = Path(plan.output_dir)
        kept = where.is_dir() and any(where.iterdir())
        told = (
            f"what is done is kept in {plan.output_dir}: the same command goes on from there"
            if kept
            else "nothing was done yet"
        )
        say(f"interrupted; {told}")
        raise
    if as_json:
        show_json(results)
        return
    present(results)
    show_files(results=Path(plan.output_dir) / "results.json", report=Path(plan.output_dir) / "report.html")
