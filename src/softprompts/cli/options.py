"""Options that several commands share."""

from pathlib import Path
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Sets = Annotated[list[str], typer.Option("--set", help="Set one key of the configuration: section.key=value.")]
Model = Annotated[str | None, typer.Option("--model", help="Packaged model, local directory or hub name.")]
Device = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda, cuda:1 or mps.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
Quantize = Annotated[
    str | None, typer.Option("--quantize", help="Frozen weights in fewer bits: int8, nf4, fp4, or none.")
]
OtherWeights = Annotated[
    bool, typer.Option("--allow-other-weights", help="Use a prompt on weights that it was not made for.")
]
Prompts = Annotated[list[Path], typer.Argument(help="Directory of a trained prompt; several vote.")]


def on_machine(device: str | None, dtype: str | None, quantize: str | None) -> dict[str, Any]:
    """What was given of the options that say where and how the model stands, as keys of the section `model`."""
    given = {"device": device, "dtype": dtype, "quantize": quantize}
    return {key: None if value == "none" else value for key, value in given.items() if value is not None}
