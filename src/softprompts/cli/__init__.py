"""The command `softprompts`, the only part that prints.

Figures and JSON go to standard output, progress and notes to standard error.
"""

import logging
import os
import sys
from typing import Annotated

import typer

from softprompts import __version__
from softprompts.cli.answers import evaluate, generate, predict
from softprompts.cli.listing import assets_app, config, env, inspect, methods
from softprompts.cli.screen import err, out
from softprompts.cli.train import multitask, pretrain, quickstart, train
from softprompts.cli.vectors import app as vector_app
from softprompts.cli.vectors import fold
from softprompts.errors import SoftPromptsError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Train, combine and use soft prompts for frozen transformers.",
)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    if version:
        out.print(f"softprompts {__version__}")
        raise typer.Exit


COMMANDS = (quickstart, train, evaluate, predict, generate, inspect, fold, multitask, pretrain, methods, config, env)
for _command in COMMANDS:
    app.command()(_command)
app.add_typer(vector_app, name="vector")
app.add_typer(assets_app, name="assets")


def main(command: typer.Typer = app) -> None:
    """Run a command; an error of the library or of the system about a file becomes one line and exit status 1."""
    # torch reads it when it is imported. Without it, threads spin at barriers, and one busy neighbor on two cores makes
    # a training step about three times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Where it is installed, it is imported with others and complains about parts that only 4-bit models need.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        command(standalone_mode=True)
    except (SoftPromptsError, OSError) as error:
        err.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(1)
