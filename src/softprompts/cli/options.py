"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Sets = Annotated[list[str], typer.Option("--set", help="Set one key of the configuration: section.key=value.")]
Model = Annotated[str | None, typer.Option("--model", help="Packaged model, local directory or hub name.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
OtherWeights = Annotated[
    bool, typer.Option("--allow-other-weights", help="Use a prompt on weights that it was not made for.")
]
Prompts = Annotated[list[Path], typer.Argument(help="Directory of a trained prompt; several vote.")]
