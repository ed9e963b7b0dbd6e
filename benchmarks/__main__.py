"""The command line: `python -m benchmarks` measures, `python -m benchmarks table` shows the results."""

import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import fresh
from benchmarks.plan import GROUPS, Measurement, Options, plan, settings

RESULTS = Path("benchmarks/results.json")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, help=__doc__)


@app.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
    quick: Annotated[
        bool, typer.Option(help="Tiny random models, in seconds: checks that all measurements run.")
    ] = False,
    rows: Annotated[str, typer.Option(help="The groups of measurements, with commas between.")] = ",".join(GROUPS),
    pairs: Annotated[int, typer.Option(min=1, help="Interleaved pairs; fewer than 15 reach no goal.")] = 15,
    threads: Annotated[int, typer.Option(min=1, help="Threads of both sides.")] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    model: Annotated[str, typer.Option(help="The causal model: a packaged one or a directory.")] = "smollm2-135m",
    out: Annotated[
        Path | None, typer.Option(help=f"The file of the results; {RESULTS}, quick ones in the temporary folder.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Keep the results in --out and measure the rest.")] = False,
) -> None:
    """Measure, write each result to --out as soon as it is known, and print the tables."""
    if context.invoked_subcommand:
        return
    options = Options(quick, pairs, threads, device, "tiny" if quick else model)
    out = out or (Path(tempfile.gettempdir()) / "softprompts-quick.json" if quick else RESULTS)
    os.environ.update(fresh.environment(threads))  # before torch is loaded
    from benchmarks import store, table

    try:
        chosen = plan(options, tuple(rows.split(",")))
        results = store.begin(out, settings(options), resume)
        missing = [measurement for measurement in chosen if measurement.name not in results["results"]]
        _measure(missing, options, results, out)
    except (ValueError, fresh.FreshError) as error:
        raise SystemExit(f"error: {error}") from None
    print(table.page(results))
    _log(f"written to {out}")


@app.command("table")
def show(
    results: Annotated[Path, typer.Option("--from", help="Results to show.")] = RESULTS,
    page: Annotated[Path | None, typer.Option("--into", help="Put the tables between the comments of a page.")] = None,
) -> None:
    """Show the tables of earlier results, or put them into a page."""
    from benchmarks import store, table

    try:
        text = table.page(store.read(results))
        if page is None:
            print(text)
        else:
            table.into(page, text)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


@app.command(hidden=True)
def one(run: str, arguments: str, file: Path) -> None:
    """Do one measurement for `fresh.call`: `runs.<run>` with JSON arguments; write the result as JSON into a file."""
    from benchmarks.runs import RUNS

    _quiet()
    file.write_text(json.dumps(RUNS[run](**json.loads(arguments))), encoding="utf-8")


def _measure(todo: Sequence[Measurement], options: Options, results: dict[str, Any], out: Path) -> None:
    """Do each measurement in a separate process (quick: all in this one), and log the estimated time left."""
    from benchmarks import store

    total = sum(measurement.minutes for measurement in todo)
    done = 0.0
    begin = time.perf_counter()
    for number, measurement in enumerate(todo, 1):
        spent = (time.perf_counter() - begin) / 60
        left = (total - done) * (spent / done if done else 1.0)
        _log(f"[{number}/{len(todo)}] {measurement.name}: {spent:.1f} minutes so far, about {left:.0f} left")
        conditions = {"load": store.load(), "commit": store.commit()}
        if options.quick:
            import torch

            from benchmarks.runs import RUNS

            _quiet()
            torch.set_num_threads(options.threads)
            result = RUNS[measurement.run](**measurement.arguments)
        else:
            result = fresh.call(measurement.run, measurement.arguments, options.threads, measurement.environment)
        store.add(out, results, measurement.name, {**result, **conditions})
        done += measurement.minutes


def _quiet() -> None:
    """Switch off the progress bars and notes of transformers."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    app()
