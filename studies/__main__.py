"""`python -m studies NAME --config FILE`: the experiments of papers, on packaged data."""

from collections.abc import Mapping
from typing import Any

import typer

from softprompts.cli import main
from softprompts.cli.screen import out, show_arms
from softprompts.cli.train import PlanParts, plan_command

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Studies shaped like papers, on packaged data.",
)


@app.command()
@plan_command("A YAML file with tasks and unseen targets.")
def vectors() -> PlanParts:
    """Task prompt vectors: do they depend on their start, do sums work, do they help with few examples?"""
    from studies.task_prompt_vectors import Study, execute

    return Study, execute, show_claims


@app.command()
@plan_command("A YAML file with tasks and the methods to compare.")
def instance() -> PlanParts:
    """Prompts that look at the input, and deep prompts, beside prompt tuning: what they gain and what they cost."""
    from studies.instance_prompts import Study, execute

    return Study, execute, show_comparison


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
