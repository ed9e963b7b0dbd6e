"""Options that several commands share."""

from pathlib import Path
from typing import Annotated, Any

import typer

from softprompts.config.reference import key_help

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Sets = Annotated[list[str], typer.Option("--set", help="Set one key of the configuration: section.key=value.")]
Model = Annotated[str | None, typer.Option("--model", help=key_help("model.name"))]
Device = Annotated[str | None, typer.Option("--device", help=key_help("model.device"))]
Dtype = Annotated[str | None, typer.Option("--dtype", help=key_help("model.dtype"))]
Quantize = Annotated[
    str | None, typer.Option("--quantize", help=f"int8, nf4, fp4 or none. {key_help('model.quantize')}")
]
OtherWeights = Annotated[
    bool, typer.Option("--allow-other-weights", help="Use a prompt on other weights than those it was trained on.")
]
Prompt = Annotated[Path, typer.Argument(help="Directory of a trained prompt.")]
Prompts = Annotated[list[Path], typer.Argument(help="Directory of a trained prompt; several vote.")]
OutDirectory = Annotated[Path | None, typer.Option("--out", help="Where everything is written.")]


def model_changes(model: str | None, device: str | None, dtype: str | None, quantize: str | None) -> dict[str, Any]:
    """The options that are given of those about the model, as keys of the section `model`."""
    options = {"name": model, "device": device, "dtype": dtype, "quantize": quantize}
    return {key: None if value == "none" else value for key, value in options.items() if value is not None}
