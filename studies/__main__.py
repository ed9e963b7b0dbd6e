"""`python -m studies NAME --config FILE`: the experiments of papers, on packaged data."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from softprompts.cli import main
from softprompts.cli.options import Device, Dtype, Json, Model, OutDirectory, Quantize, Sets, model_changes
from softprompts.cli.screen import out, show_arms
from softprompts.cli.train import carry_out, read_plan

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Studies shaped like papers, on packaged data.",
)


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

    plan = read_plan(config, Study, out_dir, model_changes(model, device, dtype, quantize), sets)
    carry_out(plan, execute, show_claims, as_json)


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

    plan = read_plan(config, Study, out_dir, model_changes(model, device, dtype, quantize), sets)
    carry_out(plan, execute, show_comparison, as_json)


def show_claims(results: Mapping[str, Any]) -> None:
    """What a study says of a paper's claims."""
    for claim in results["claims"].values():
        out.print(claim["words"], markup=False, soft_wrap=True)


def show_comparison(results: Mapping[str, Any]) -> None:
    """The arms of a study on its tasks with their step times, then how far each is from prompt tuning."""
    times = {arm: f"{speed['ms']:.0f}" for arm, speed in results["speed"].items()}
    show_arms(results, {"step, ms": times} if times else None)
    show_claims(results)


if __name__ == "__main__":
    main(app)
