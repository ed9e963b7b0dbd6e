"""The commands that use trained prompts: evaluate, predict, generate."""

import itertools
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from softprompts.cli.options import Device, Dtype, Json, Model, OtherWeights, Prompts, Quantize, on_machine
from softprompts.cli.partial import digest, writing
from softprompts.cli.screen import counting, progress, quiet, say, show_json, show_table
from softprompts.config import SplitConfig, TaskConfig, parse
from softprompts.errors import ConfigError


def evaluate(
    prompts: Prompts,
    data: Annotated[str | None, typer.Option(help="Other rows than the prompt's own: set, file or directory.")] = None,
    split: Annotated[
        str | None, typer.Option(help="train, validation or test; other rows without a test split: all.")
    ] = None,
    label: Annotated[str | None, typer.Option(help="The label column of the other rows.")] = None,
    mapping: Annotated[
        str | None, typer.Option("--map", help="What the labels are called there: positive=good,negative=bad.")
    ] = None,
    by: Annotated[str | None, typer.Option(help="rank or generate.")] = None,
    normalize: Annotated[
        bool | None, typer.Option(help="Rank by mean instead of summed log-probability; as in the run unless given.")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens of a written answer.")] = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    allow_other_weights: OtherWeights = False,
    as_json: Json = False,
) -> None:
    """Judge a prompt on held-out rows, its own or those of another data set; several prompts vote."""
    from softprompts.evaluation.evaluate import evaluate as judge
    from softprompts.evaluation.evaluate import evaluation_config

    quiet()
    opened = open_prompts(prompts, model, on_machine(device, dtype, quantize), allow_other_weights)
    record = opened.registry.records[opened.task]
    if record.task_template is None:
        raise ConfigError(f"{prompts[0]} holds no task (template and label words), so its answers cannot be judged")
    renamed = _renamed(mapping)
    name, split, rows = _rows(record, prompts[0], data, split, label, renamed)
    total = len(rows)
    with progress() as screen:
        found = judge(
            opened,
            rows,
            prompt=opened.tasks,
            config=evaluation_config(record.artifact, by=by, normalize=normalize, max_new_tokens=max_new_tokens),
            mapping=renamed,
            progress=lambda done: screen.on_eval(name, done, total),
        )
    scores = {metric: vars(score) for metric, score in found.scores.items()}
    if as_json:
        show_json({"task": name, "split": split, "scores": scores})
        return
    lines = [
        (metric, f"{s['value']:.3f}", f"{s['low']:.3f} to {s['high']:.3f}", s["n"], s["illegal"])
        for metric, s in scores.items()
    ]
    show_table(f"{name}, {split} rows", ("metric", "value", "95 % interval", "rows", "illegal"), lines)


def _rows(
    record: Any, prompt: Path, data: str | None, split: str | None, label: str | None, renamed: dict[str, str] | None
) -> tuple[str, str, Any]:
    """The rows to judge, with the names of their set and split: the prompt's own test rows, or those of `data`."""
    from softprompts.data import load

    own, form = record.artifact.settings("task"), record.task_template
    if data is None and not own:
        raise ConfigError(f"{prompt} does not say which rows it was made for; give --data")
    task: TaskConfig = (
        parse(own, TaskConfig, str(prompt))
        if data is None
        else TaskConfig(
            source=data,
            kind=form.kind,
            template=form.template,
            pair=form.pair,
            label=label or form.label,
            verbalizer=form.verbalizer if renamed is None else None,
            # Nothing is held back: these are not the rows that were trained on.
            split=SplitConfig(validation_fraction=0, test_fraction=0) if split is None else SplitConfig(),
        )
    )
    loaded = load(task)
    known = {"train": loaded.train, "validation": loaded.validation, "test": loaded.test}
    rows = known.get(split) if split else loaded.test or loaded.train
    if not rows:
        there = ", ".join(name for name, part in known.items() if part)
        raise ConfigError(f"{loaded.name} has no rows in split '{split or 'test'}'; possible: {there}")
    return loaded.name, split or ("test" if loaded.test else "all"), rows


def _renamed(mapping: str | None) -> dict[str, str] | None:
    """`a=b,c=d` as a dictionary."""
    if not mapping:
        return None
    pairs = [pair.partition("=") for pair in mapping.split(",")]
    if not all(label.strip() and name.strip() for label, _, name in pairs):
        raise ConfigError(f"--map {mapping}: write it as label=name,label=name")
    return {label.strip(): name.strip() for label, _, name in pairs}


def predict(
    prompt: Annotated[Path, typer.Argument(help="Directory of a trained prompt.")],
    text: Annotated[str | None, typer.Argument(help="One text; - or nothing reads lines from standard input.")] = None,
    file: Annotated[Path | None, typer.Option(help="A csv, jsonl or parquet file with the task's columns.")] = None,
    out_file: Annotated[
        Path | None, typer.Option("--out", help="A file for the answers; an interrupted run goes on where it stopped.")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens of a written answer.")] = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    allow_other_weights: OtherWeights = False,
) -> None:
    """Answer texts with a trained prompt; one JSON line each, in order. Takes little memory, however many there are."""
    from softprompts.data.streams import stream
    from softprompts.evaluation.evaluate import answers, evaluation_config

    quiet()
    if file is not None and text is not None:
        raise ConfigError("give either a text or --file, not both")
    given = None if file is None else stream(file)
    opened = open_prompts([prompt], model, on_machine(device, dtype, quantize), allow_other_weights)
    record = opened.registry.records[opened.task]
    if record.task_template is None:
        raise ConfigError(f"{prompt} holds no task (template and label words); use `softprompts generate`")
    columns = record.task_template.columns
    if file is None and len(columns) > 1:
        raise ConfigError(f"the task reads columns {', '.join(columns)}: give them as a file with --file")
    if given is None:
        given = _lines(columns[0]) if text is None or text == "-" else iter([{columns[0]: text}])
    rows, kept = _asked(given, columns, str(file)), deque[dict[str, Any]]()
    config = evaluation_config(record.artifact, max_new_tokens=max_new_tokens)
    base = opened.backbone
    made_by = {
        "prompt": digest(prompt),
        "model": [base.name, str(base.dtype), base.quantization],
        "evaluation": config.model_dump(mode="json", exclude={"batch_size", "batch_tokens"}),
    }
    shown = file is not None or text is None
    with writing(out_file, rows, columns, made_by) as (done, write), counting(shown, done, out_file) as count:
        for found in answers(opened, _keeping(rows, kept), prompt=opened.task, config=config):
            write(_line(kept.popleft(), columns, found))
            count()


def _line(row: dict[str, Any], columns: Sequence[str], found: Any) -> dict[str, Any]:
    """What is written about a row."""
    line = {**{c: row[c] for c in columns}, "answer": found.value}
    if found.text is not None:
        line["output"] = found.text
    if found.scores:
        line["scores"] = {k: round(v, 4) for k, v in found.scores.items()}
    return line


def _asked(rows: Iterator[dict[str, Any]], columns: Sequence[str], name: str) -> Iterator[dict[str, Any]]:
    """The same rows, the first of which must have all `columns`; in others what is missing is empty."""
    from softprompts.data.templates import need

    first = next(rows, None)
    if first is None:
        raise ConfigError("nothing to answer: standard input was empty")
    for column in columns:
        need(column, first, "template", name)
    return ({**dict.fromkeys(columns), **row} for row in itertools.chain([first], rows))


def _keeping(rows: Iterator[dict[str, Any]], kept: deque[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The same rows, each put into `kept` too, until its answer is written."""
    for row in rows:
        kept.append(row)
        yield row


def _lines(column: str) -> Iterator[dict[str, Any]]:
    """The lines of standard input that hold text, as rows."""
    for number, line in enumerate(sys.stdin, 1):
        try:
            line.encode()
        except UnicodeEncodeError:
            raise ConfigError(f"standard input, line {number}: not UTF-8 text; convert it first") from None
        if line.strip():
            yield {column: line.rstrip("\n")}


def generate(
    prompt: Annotated[Path, typer.Argument(help="Directory of a trained prompt.")],
    text: Annotated[str, typer.Argument(help="The text to continue, exactly as it stands behind the prompt.")],
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
    import torch

    quiet()
    opened = open_prompts([prompt], model, on_machine(device, dtype, quantize), allow_other_weights)
    base = opened.backbone
    if opened.registry.site_of(opened.tasks).place == "template":
        raise ConfigError(
            f"{prompt} stands in slots of its task's template, and generate continues a bare text; use predict"
        )
    ids = base.tokenizer(text, return_tensors="pt")["input_ids"].to(base.device)
    torch.manual_seed(seed)
    options: dict[str, Any] = {"do_sample": sample, "num_beams": beams, "max_new_tokens": max_new_tokens}
    if sample:
        options["temperature"] = temperature
    written = opened.generate(ids, attention_mask=torch.ones_like(ids), **options)
    new = written[0, ids.shape[1] :] if base.family.scores_next_token else written[0]
    print(base.tokenizer.decode(new, skip_special_tokens=True))


def open_prompts(prompts: list[Path], model: str | None, machine: dict[str, Any], allow_other_weights: bool) -> Any:
    """A model with the prompts, loaded as `machine` (keys of the section `model`) and the first prompt's run say."""
    from softprompts.artifacts import artifact
    from softprompts.config import ModelConfig
    from softprompts.model import soft_prompt_model

    first = artifact.load(prompts[0])
    run = first.settings("model")
    kept: dict[str, Any] = {key: run[key] for key in ("attention", "quantize") if key in run}
    if run.get("device_map") == "auto" and "device" not in machine:
        kept["device_map"] = "auto"
    name = model or first.backbone
    if not name:
        raise ConfigError(f"{prompts[0]} does not say which model it is for; give --model")
    values = {"name": name, **kept, **machine}
    if model is None:
        values["revision"] = first.revision
    opened, warnings = soft_prompt_model.open_prompts(
        prompts, config=parse(values, ModelConfig), allow_other_weights=allow_other_weights, log=say
    )
    for warning in warnings:
        say(f"warning: {warning}")
    return opened
