"""The commands that train: quickstart, train, and the recipes multitask and pretrain."""

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from softprompts.cli.options import Device, Dtype, Json, Model, OutDirectory, Quantize, Sets, model_changes
from softprompts.cli.screen import log, out, progress, quiet, show, show_arms, show_files, show_json, show_runs
from softprompts.config import Run, Section, TaskConfig, override, parse, read
from softprompts.config.reference import key_help
from softprompts.config.sweep import grid
from softprompts.errors import ConfigError, TrainingError

QUICKSTART: dict[str, Any] = {
    "model": {"name": "smollm2-135m"},
    "prompt": {"num_virtual_tokens": 20, "init": {"kind": "labels"}},
    "task": {"source": "trec"},
    "training": {"max_steps": 500, "batch_size": 16, "learning_rate": 0.1, "warmup_steps": 30},
    "output_dir": "runs/quickstart",
}
"""The run of `softprompts quickstart`."""

PlanParts = tuple[type[Section], Callable[..., dict[str, Any]], Callable[[dict[str, Any]], None]]
"""The class of a plan, the function that carries it out, and the function that shows its results."""


def quickstart(
    out_dir: Annotated[Path, typer.Option("--out", help="Where everything is written.")] = Path("runs/quickstart"),
    device: Device = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    sets: Sets = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Teach the packaged model to classify questions, in a few minutes."""
    model = QUICKSTART["model"] | model_changes(None, device, dtype, quantize)
    run = parse(override({**QUICKSTART, "model": model, "output_dir": str(out_dir)}, sets))
    from softprompts.recipes.run import run as recipe

    with reporting(functools.partial(_run_leftovers, run)) as reporter:
        results = recipe.run(run, reporter)
    _show_results(run, results, as_json)


def train(
    config: Annotated[Path | None, typer.Option("--config", help="A YAML file; the options below change it.")] = None,
    model: Model = None,
    data: Annotated[str | None, typer.Option(help=key_help("tasks.source"))] = None,
    text: Annotated[str | None, typer.Option(help="Template, such as 'Review: {text}', or one column's name.")] = None,
    label: Annotated[str | None, typer.Option(help=key_help("tasks.label"))] = None,
    length: Annotated[int | None, typer.Option(help=key_help("prompt.num_virtual_tokens"))] = None,
    steps: Annotated[int | None, typer.Option(help=key_help("training.max_steps"))] = None,
    rate: Annotated[float | None, typer.Option(help=key_help("training.learning_rate"))] = None,
    seed: Annotated[int | None, typer.Option(help=key_help("seed"))] = None,
    rates: Annotated[str | None, typer.Option(help="Several learning rates, trained together: 0.05,0.1")] = None,
    seeds: Annotated[str | None, typer.Option(help="Several seeds, trained together: 0,1,2")] = None,
    out_dir: OutDirectory = None,
    device: Device = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    sets: Sets = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Train a prompt, evaluate it before and after, and write prompt, results.json and report.html.

    With --set training.target=lora or training.target=backbone weights are trained instead, to compare with.
    """
    options: list[tuple[str, Any]] = [
        ("task.source", data),
        ("task.template", None if text is None else text if "{" in text else f"{{{text}}}"),
        ("task.label", label),
        ("prompt.num_virtual_tokens", length),
        ("training.max_steps", steps),
        ("training.learning_rate", rate),
        ("seed", seed),
        ("output_dir", None if out_dir is None else str(out_dir)),
    ]
    changes = [*_overrides(options), *_model_overrides(model_changes(model, device, dtype, quantize)), *sets]
    if config is None:
        if data is None:
            raise ConfigError("nothing to train on: give --data, or a configuration with --config")
        run = parse(override({"output_dir": f"runs/{TaskConfig(source=data).title}"}, changes))
    else:
        run = read(config, changes)
    lists = {
        "seed": _listed("--seeds", seeds, seed, int),
        "training.learning_rate": _listed("--rates", rates, rate, float),
    }
    given_lists = {key: values for key, values in lists.items() if values}
    if given_lists:
        run = grid(run, given_lists)
    from softprompts.recipes.run import run as recipe

    with reporting(functools.partial(_run_leftovers, run)) as reporter:
        results = recipe.run(run, reporter)
    _show_results(run, results, as_json)


def plan_command(config_help: str) -> Callable[[Callable[[], PlanParts]], Callable[..., None]]:
    """A decorator that makes a command which carries out a plan: of a recipe, or of a study.

    The decorated function gives the parts of the plan. The command has its name and its docstring.

    Args:
        config_help: The help of the option `--config`.
    """

    def decorate(load_parts: Callable[[], PlanParts]) -> Callable[..., None]:
        def command(
            config: Annotated[Path, typer.Option("--config", help=config_help)],
            out_dir: OutDirectory = None,
            model: Model = None,
            device: Device = None,
            dtype: Dtype = None,
            quantize: Quantize = None,
            sets: Sets = [],  # noqa: B006
            as_json: Json = False,
        ) -> None:
            plan_class, execute, show_plan = load_parts()
            options = [("output_dir", None if out_dir is None else str(out_dir))]
            model_overrides = _model_overrides(model_changes(model, device, dtype, quantize))
            plan = read(config, [*_overrides(options), *model_overrides, *sets], plan_class)
            directory = Path(plan.output_dir)
            with reporting(functools.partial(_plan_leftovers, directory)) as reporter:
                results = execute(plan, reporter)
            if as_json:
                show_json(results)
                return
            show_plan(results)
            show_files(results=directory / "results.json", report=directory / "report.html")

        command.__name__ = load_parts.__name__
        command.__doc__ = load_parts.__doc__
        return command

    return decorate


@plan_command("A YAML file with sources and targets.")
def multitask() -> PlanParts:
    """Teach sources, train a prompt that they share, adapt it to targets, and compare with other ways to start."""
    from softprompts.recipes.multitask.plan import Plan
    from softprompts.recipes.multitask.stages import execute

    return Plan, execute, show_arms


@plan_command("A YAML file as for `train`; its task must have classes.")
def pretrain() -> PlanParts:
    """Teach what reads the text in a method, such as ipt's table, to tell topics apart; a run starts from it."""
    from softprompts.recipes.pretrain import pretrain as pretrain_run

    return Run, pretrain_run, show


@contextmanager
def reporting(describe_leftovers: Callable[[], str]) -> Iterator[Any]:
    """Give a ProgressReporter, and say after an interruption what is on disk.

    Args:
        describe_leftovers: Says after an interruption what is on disk.
    """
    quiet()
    try:
        with progress() as reporter:
            yield reporter
    except KeyboardInterrupt:
        log(f"interrupted; {describe_leftovers()}")
        raise


def _run_leftovers(run: Run) -> str:
    """What an interrupted run has left, and what the same command does with it."""
    from softprompts.training.checkpoint import CHECKPOINT

    directory = Path(run.output_dir)
    if run.training.target != "prompt":
        return "weights are saved only when training ends; the same command starts again"
    if any(directory.glob(f"*/{CHECKPOINT}" if run.runs else CHECKPOINT)):
        return f"the checkpoint is in {directory}: the same command continues"
    return "nothing was trained yet"


def _plan_leftovers(directory: Path) -> str:
    """What an interrupted recipe or study has left, and what the same command does with it."""
    if directory.is_dir() and any(directory.iterdir()):
        return f"finished stages are in {directory}: the same command continues"
    return "nothing was done yet"


def _overrides(options: Sequence[tuple[str, Any]]) -> list[str]:
    """Keys with their values as `--set` takes them; those without a value are left out."""
    return [f"{key}={json.dumps(value)}" for key, value in options if value is not None]


def _model_overrides(changes: Mapping[str, Any]) -> list[str]:
    """Keys of the section `model` as `--set` takes them; null is a value."""
    return [f"model.{key}={json.dumps(value)}" for key, value in changes.items()]


def _listed(option: str, text: str | None, single: float | None, kind: type[int] | type[float]) -> list[Any]:
    """The values of an option such as `--seeds 0,1,2`; empty where it was not given."""
    if text is None:
        return []
    if single is not None:
        raise ConfigError(f"give either {option} or {option.removesuffix('s')}, not both")
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        example = "0,1,2" if kind is int else "0.05,0.1"
        raise ConfigError(f"{option} {text}: write numbers with commas between them, such as {example}") from None


def _show_results(run: Run, results: dict[str, Any], as_json: bool) -> None:
    """Show the results of a run in the first of several processes.

    Raises:
        TrainingError: A run of a list failed.
    """
    from softprompts.training.loop import is_main_process

    if not is_main_process():
        return
    if as_json:
        show_json(results)
    else:
        _show_pages(run, results)
    if run.runs and results["warnings"]:
        raise TrainingError("; ".join(results["warnings"]))


def _show_pages(run: Run, results: dict[str, Any]) -> None:
    """Show scores, files and the next commands."""
    directory = Path(run.output_dir)
    if run.runs:
        show_runs(results)
    else:
        for page in results.get("tasks", [results]):
            show(page)
    files: dict[str, Any] = {}
    if run.training.target == "prompt":
        files["prompt"] = directory / "*" / "prompt" if run.runs else directory / "prompt"
    elif run.training.target == "lora":
        files["adapter"] = directory / "lora"
    elif run.training.save_model:
        files["model"] = directory / "model"
    files["results"] = directory / "results.json"
    files["report"] = ", ".join(sorted(str(path) for path in directory.glob("report*.html")))
    show_files(**files)
    if results["next"]:
        out.print("\nnext:")
    for line in results["next"]:
        out.print(f"  {line}", markup=False, soft_wrap=True)
