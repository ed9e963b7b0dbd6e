"""The commands that use trained prompts: evaluate, predict, generate."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from softprompts.cli.options import (
    Device,
    Dtype,
    Json,
    Model,
    OtherWeights,
    Prompt,
    Prompts,
    Quantize,
    model_changes,
)
from softprompts.cli.screen import counting, log, progress, quiet, show_json, show_table
from softprompts.config.reference import key_help
from softprompts.errors import ConfigError

MaxNewTokens = Annotated[int | None, typer.Option(min=1, help=key_help("evaluation.max_new_tokens"))]


def evaluate(
    prompts: Prompts,
    data: Annotated[
        str | None, typer.Option(help="Other rows than the prompt's own: a packaged set, file, directory or hub name.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="train, validation or test; other rows without a test split: all.")
    ] = None,
    label: Annotated[str | None, typer.Option(help="The label column of the other rows.")] = None,
    mapping: Annotated[
        str | None, typer.Option("--map", help="What the labels are called there: positive=good,negative=bad.")
    ] = None,
    by: Annotated[str | None, typer.Option(help="rank or generate.")] = None,
    normalize: Annotated[
        bool | None,
        typer.Option(help=f"{key_help('evaluation.normalize')} Default: as in the run."),
    ] = None,
    max_new_tokens: MaxNewTokens = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    allow_other_weights: OtherWeights = False,
    as_json: Json = False,
) -> None:
    """Evaluate a prompt on held-out rows, its own or those of another data set; several prompts vote."""
    from softprompts.recipes.evaluate_prompts import evaluate_prompts

    quiet()
    with progress() as reporter:
        results = evaluate_prompts(
            prompts,
            data=data,
            split=split,
            label=label,
            mapping=_mapping(mapping),
            evaluation={"by": by, "normalize": normalize, "max_new_tokens": max_new_tokens},
            model=model_changes(model, device, dtype, quantize),
            allow_other_weights=allow_other_weights,
            reporter=reporter,
        )
    if as_json:
        show_json(results)
        return
    lines = [
        (metric, f"{s['value']:.3f}", f"{s['low']:.3f} to {s['high']:.3f}", s["n"], s["illegal"])
        for metric, s in results["scores"].items()
    ]
    title = f"{results['task']}, {results['split']} rows"
    show_table(title, ("metric", "value", "95 % interval", "rows", "illegal"), lines)


def _mapping(text: str | None) -> dict[str, str] | None:
    """`a=b,c=d` as a dictionary."""
    if not text:
        return None
    mapping = {}
    for pair in text.split(","):
        label, _, name = map(str.strip, pair.partition("="))
        if not label or not name:
            raise ConfigError(f"--map {text}: write it as label=name,label=name")
        mapping[label] = name
    return mapping


def predict(
    prompt: Prompt,
    text: Annotated[str | None, typer.Argument(help="One text; - or nothing reads lines from standard input.")] = None,
    file: Annotated[Path | None, typer.Option(help="A csv, jsonl or parquet file with the task's columns.")] = None,
    out_file: Annotated[
        Path | None, typer.Option("--out", help="A file for the answers; an interrupted run is continued.")
    ] = None,
    max_new_tokens: MaxNewTokens = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    allow_other_weights: OtherWeights = False,
) -> None:
    """Answer texts with a trained prompt; one JSON line each, in order. Takes little memory, however many there are."""
    from softprompts.data.sources import stream_rows
    from softprompts.recipes.predict import json_line
    from softprompts.recipes.predict import predict as predict_rows

    quiet()
    if file is not None and text is not None:
        raise ConfigError("give either a text or --file, not both")
    one_text = text is not None and text != "-"
    predictions = predict_rows(
        prompt,
        rows=None if file is None else stream_rows(file),
        texts=[text or ""] if one_text else _standard_input(),
        origin="standard input" if file is None else str(file),
        out=out_file,
        max_new_tokens=max_new_tokens,
        model=model_changes(model, device, dtype, quantize),
        allow_other_weights=allow_other_weights,
        log=log,
    )
    with counting(shown=not one_text, out_file=out_file) as count:
        for number, line in predictions:
            if out_file is None:
                print(json_line(line), flush=True)
            count(number)


def _standard_input() -> Iterator[str]:
    """The lines of standard input that hold text."""
    for number, line in enumerate(sys.stdin, 1):
        try:
            line.encode()
        except UnicodeEncodeError:
            raise ConfigError(f"standard input, line {number}: not UTF-8 text; convert it first") from None
        if line.strip():
            yield line.rstrip("\n")


def generate(
    prompt: Prompt,
    text: Annotated[str, typer.Argument(help="The text to continue, exactly as the model reads it.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to write.")] = 64,
    sample: Annotated[bool, typer.Option(help="Sample instead of taking the most probable token.")] = False,
    temperature: Annotated[float, typer.Option(min=0.01, help="With --sample.")] = 1.0,
    beams: Annotated[int, typer.Option(min=1, help="Beams to search with.")] = 1,
    seed: Annotated[int, typer.Option(help="With --sample.")] = 0,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    allow_other_weights: OtherWeights = False,
) -> None:
    """Continue a text behind a trained prompt."""
    from softprompts.recipes.predict import continue_text

    quiet()
    options: dict[str, Any] = {"do_sample": sample, "num_beams": beams, "max_new_tokens": max_new_tokens}
    if sample:
        options["temperature"] = temperature
    changes = model_changes(model, device, dtype, quantize)
    print(
        continue_text(
            prompt, text, seed=seed, model=changes, allow_other_weights=allow_other_weights, log=log, **options
        )
    )
