"""The commands of arithmetic on trained prompts: `softprompts vector ...` and `softprompts fold`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from softprompts.cli.options import Device, Dtype, Json, Model, Prompt, Quantize, model_changes
from softprompts.cli.screen import out, progress, quiet, show_files, show_json, table_or_lines
from softprompts.errors import ConfigError

app = typer.Typer(
    no_args_is_help=True,
    help="Task prompt vectors: what training added to a prompt, to add, compare and put on other starts.",
)

Sum = Annotated[
    str,
    typer.Argument(
        help="A trained prompt, or a sum such as 'movies + 0.5*tweets - sms'. Write options first and then -- before "
        "a sum that begins with a minus sign."
    ),
]
Sums = Annotated[list[str], typer.Argument(help="Trained prompts, or sums such as 'movies + 0.5*tweets'.")]
Out = Annotated[Path, typer.Option("--out", help="Where the prompt is written.")]
StartOption = Annotated[
    str | None, typer.Option("--start", help="The prompt to add to. Default: the common start of all.")
]
StartOf = Annotated[str | None, typer.Option("--start-of", help="Add to the start of this prompt.")]


def fold(prompt: Prompt, out_dir: Out) -> None:
    """Write a prompt that a method made, such as multitask prompt tuning, as an ordinary one: a single matrix."""
    from softprompts.artifacts import artifact
    from softprompts.model.persistence import plain

    folded = plain(artifact.load(prompt), prompt)
    artifact.save(folded, out_dir)
    length, width = folded.shape
    out.print(f"{out_dir}: {length} vectors of width {width}, as prompt-tuning", markup=False, soft_wrap=True)


@app.command()
def make(
    prompt: Annotated[str, typer.Argument(help="A trained prompt.")],
    out_dir: Out,
    start: Annotated[
        str | None,
        typer.Option("--start", help="The prompt at which training began, if the artifact does not store it."),
    ] = None,
    start_of: Annotated[
        str | None, typer.Option("--start-of", help="Training began at the start of this prompt.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a prompt with where it began, folded to one matrix; --start where the prompt does not say it."""
    from dataclasses import replace

    from softprompts.artifacts import artifact, vectors
    from softprompts.model.persistence import plain

    folded = plain(artifact.load(vectors.locate_prompt(prompt)), prompt)
    chosen = _start(start, start_of)
    if (
        chosen is not None
        and folded.initial is not None
        and not folded.initial.equal(chosen.require_prompt("the start"))
    ):
        raise ConfigError(
            f"{prompt} stores where its training began, and the given start differs; leave --start and "
            f"--start-of out, or add its vector to that start with: softprompts vector apply {prompt} --start PROMPT"
        )
    if chosen is not None:
        vectors.check_start(chosen, vectors.task_vector(replace(folded, initial=chosen.prompt), prompt), "the start")
        folded = replace(folded, initial=chosen.prompt)
    _save(vectors.task_vector(folded, prompt), folded, out_dir, as_json)


@app.command()
def add(
    prompts: Sums, out_dir: Out, start: StartOption = None, start_of: StartOf = None, as_json: Json = False
) -> None:
    """The sum of vectors, added to a start."""
    from softprompts.artifacts.vectors import merging

    _combine(merging.weighted(_read(prompts)), out_dir, start, start_of, as_json)


@app.command()
def sub(
    prompts: Sums, out_dir: Out, start: StartOption = None, start_of: StartOf = None, as_json: Json = False
) -> None:
    """The first vector minus the others, added to a start."""
    from softprompts.artifacts.vectors import merging

    terms = _read(prompts)
    _combine(merging.weighted(terms, [1, *[-1] * (len(terms) - 1)]), out_dir, start, start_of, as_json)


@app.command()
def negate(
    prompt: Sum, out_dir: Out, start: StartOption = None, start_of: StartOf = None, as_json: Json = False
) -> None:
    """Minus a vector, added to a start."""
    _combine(-_read([prompt])[0], out_dir, start, start_of, as_json)


@app.command()
def scale(
    prompt: Sum,
    out_dir: Out,
    by: Annotated[float, typer.Option(help="What the vector is multiplied by.")],
    start: StartOption = None,
    start_of: StartOf = None,
    as_json: Json = False,
) -> None:
    """A multiple of a vector, added to a start."""
    _combine(_read([prompt])[0], out_dir, start, start_of, as_json, by=by)


@app.command()
def average(
    prompts: Sums, out_dir: Out, start: StartOption = None, start_of: StartOf = None, as_json: Json = False
) -> None:
    """The mean of vectors, as over the seeds of a task, added to a start."""
    from softprompts.artifacts.vectors import merging

    _combine(merging.average(_read(prompts)), out_dir, start, start_of, as_json)


@app.command()
def merge(
    prompts: Sums,
    out_dir: Out,
    how: Annotated[str, typer.Option(help="weighted, average, ties, dare or slerp.")],
    weights: Annotated[str | None, typer.Option(help="A weight for each: 1,0.5.")] = None,
    density: Annotated[float, typer.Option(help="ties, dare: the share of the numbers that stays.")] = 0.2,
    t: Annotated[float, typer.Option(help="slerp: how far from the first to the second.")] = 0.5,
    seed: Annotated[int, typer.Option(help="dare: seed of the draws.")] = 0,
    start: StartOption = None,
    start_of: StartOf = None,
    as_json: Json = False,
) -> None:
    """One vector of several as in the literature on merging models, added to a start."""
    from softprompts.artifacts.vectors import merging

    settings = merging.MergeOptions(None if weights is None else _numbers("--weights", weights), density, t, seed)
    terms = _read(prompts)
    _combine(merging.merge(terms, how, settings), out_dir, start, start_of, as_json, terms)


@app.command()
def apply(
    prompt: Sum,
    out_dir: Out,
    start: StartOption = None,
    start_of: StartOf = None,
    by: Annotated[float, typer.Option("--scale", help="What the sum is multiplied by.")] = 1.0,
    as_json: Json = False,
) -> None:
    """A sum, added to a start."""
    _combine(_read([prompt])[0], out_dir, start, start_of, as_json, by=by)


@app.command()
def compare(
    prompts: Sums,
    out_dir: Annotated[Path, typer.Option("--out", help="Where the page with the heatmaps is written.")] = Path(
        "runs/compare"
    ),
    how: Annotated[str, typer.Option(help="The cosine of the table: flat, mean or rows; the page has all.")] = "flat",
    as_json: Json = False,
) -> None:
    """Cosines, lengths and distances of vectors: a table, and a page with heatmaps."""
    from softprompts.artifacts.vectors import measures
    from softprompts.evaluation import page as report

    if how not in measures.COSINES:
        raise ConfigError(f"no cosine '{how}'; possible: {', '.join(measures.COSINES)}")
    if len(set(prompts)) != len(prompts):
        raise ConfigError(f"a comparison takes each prompt once, given {', '.join(prompts)}")
    comparison = measures.compare(dict(zip(prompts, _read(prompts), strict=True)))
    results: dict[str, Any] = {
        "format": 1,
        "title": "Task prompt vectors compared",
        "task": ", ".join(prompts),
        **comparison,
    }
    labels = comparison["labels"]
    lengths = list(zip(labels, comparison["norms"], comparison["ratios"], strict=True))
    distances = [[name, *row] for name, row in zip(labels, comparison["distances"], strict=True)]
    heatmaps = []
    for kind, matrix in comparison["cosines"].items():
        heatmaps.append({"title": f"Cosines of {kind}", "labels": labels, "matrix": matrix})
    page = {
        **results,
        "tables": [
            {"title": "Lengths", "columns": ["vector", "norm", "norm / norm of its start"], "rows": lengths},
            {"title": "Distances", "columns": ["", *labels], "rows": distances},
        ],
        "heatmaps": heatmaps,
    }
    report.write_results(out_dir / "results.json", results)
    report.write_page(out_dir / "report.html", page)
    if as_json:
        show_json(results)
        return
    rows = []
    for (name, norm, ratio), cosines in zip(lengths, comparison["cosines"][f"vectors, {how}"], strict=True):
        shown = "-" if ratio is None else f"{ratio:.3g}"
        rows.append((name, f"{norm:.3g}", shown, *(f"{cosine:.3f}" for cosine in cosines)))
    columns = ("vector", "norm", "norm / start's", *labels)
    table_or_lines(f"cosines ({how}: {measures.COSINES[how]})", columns, rows)
    show_files(results=out_dir / "results.json", report=out_dir / "report.html")


@app.command()
def search(
    prompt: Sum,
    out_dir: Out,
    start: StartOption = None,
    start_of: StartOf = None,
    on: Annotated[list[str], typer.Option("--on", help="Evaluate on the task of this prompt; may be repeated.")] = [],  # noqa: B006
    coefficients: Annotated[str | None, typer.Option(help="What to try: 0,0.5,1. Default: 0, 0.05, ..., 1.")] = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    as_json: Json = False,
) -> None:
    """Choose on validation rows how much of a sum to add, and evaluate that once on test rows."""
    from softprompts.recipes import coefficient_search

    quiet()
    tried = coefficient_search.GRID if coefficients is None else _numbers("--coefficients", coefficients)
    with progress() as reporter:
        results = coefficient_search.search_coefficient(
            prompt,
            out_dir,
            start=_start(start, start_of),
            on=on,
            grid=tried,
            changes=model_changes(model, device, dtype, quantize),
            reporter=reporter,
        )
    if as_json:
        show_json(results)
        return
    rows = []
    for point in results["validation"]:
        scores = (f"{score:.3f}" for score in point["scores"].values())
        rows.append((f"{point['coefficient']:g}", *scores, f"{point['mean']:.3f}"))
    table_or_lines("validation rows", ("coefficient", *results["evaluated"], "mean"), rows)
    for name, scores in results["test"].items():
        for metric, score in scores.items():
            out.print(f"{name}, test rows: {metric} {score['value']:.3f} with coefficient {results['coefficient']:g}")
    show_files(prompt=out_dir / "prompt", results=out_dir / "results.json", report=out_dir / "report.html")


def _read(prompts: list[str]) -> list[Any]:
    from softprompts.artifacts import vectors

    return list(map(vectors.read_expression, prompts))


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(map(float, text.split(",")))
    except ValueError:
        raise ConfigError(f"{option} {text}: write numbers with commas between them, such as 1,0.5") from None


def _start(start: str | None, start_of: str | None) -> Any:
    """The artifact whose prompt is the start; None where no start was given."""
    from dataclasses import replace

    from softprompts.artifacts import artifact, vectors

    if start is not None and start_of is not None:
        raise ConfigError("give either --start or --start-of, not both")
    if start is not None:
        return artifact.load(vectors.locate_prompt(start))
    if start_of is None:
        return None
    source = artifact.load(vectors.locate_prompt(start_of))
    if source.initial is None:
        raise ConfigError(f"{start_of} does not say where its training began; give a start with --start")
    return replace(source, prompt=source.initial)


def _combine(
    total: Any,
    out_dir: Path,
    start: str | None,
    start_of: str | None,
    as_json: bool,
    sources: Any = None,
    by: float = 1,
) -> None:
    """Add `by * total` to a start, and write the prompt that this gives; sources: what a merge made it of."""
    from softprompts.artifacts import vectors
    from softprompts.artifacts.vectors import merging
    from softprompts.recipes.coefficient_search import resolve_start

    # The result of a merge has no start; it takes the common start of its sources.
    initial = resolve_start(merging.weighted(sources) if sources else total, _start(start, start_of))
    _save(total * by, vectors.to_artifact(total, initial, by), out_dir, as_json)


def _save(total: Any, prompt: Any, out_dir: Path, as_json: bool) -> None:
    from softprompts.artifacts import artifact
    from softprompts.artifacts.vectors import measures

    artifact.save(prompt, out_dir)
    ratio = measures.norm_ratio(total.value, prompt.initial)
    facts = {
        "directory": str(out_dir),
        "vector": total.name,
        "norm": measures.norm(total.value),
        "norm_ratio": ratio,
        "parents": list(total.parents),
    }
    if as_json:
        show_json(facts)
        return
    length, width = prompt.shape
    change = "the start is zero" if ratio is None else f"the change is {ratio:.3g} times as long as the start"
    out.print(
        f"{out_dir}: {total.name} on its start, {length} vectors of width {width}; {change}",
        markup=False,
        soft_wrap=True,
    )
