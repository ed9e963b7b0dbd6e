"""Answers to texts without labels, by one trained prompt; written to a file, they can be continued after a stop."""

import contextlib
import hashlib
import itertools
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic_core import to_jsonable_python

from softprompts.data.templates import require_column
from softprompts.errors import ConfigError
from softprompts.evaluation.evaluate import Answer, answers, evaluation_config
from softprompts.model import SoftPromptModel
from softprompts.model.soft_prompt_model import open_prompts
from softprompts.types import Row


def predict(
    path: str | Path,
    *,
    rows: Iterator[Row] | None = None,
    texts: Iterable[str] = (),
    origin: str = "the rows",
    out: Path | None = None,
    max_new_tokens: int | None = None,
    model: Mapping[str, Any] | None = None,
    allow_other_weights: bool = False,
    log: Callable[[str], None] = lambda line: None,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Answer rows or texts in order, with memory for a few batches only.

    Args:
        path: The directory of the prompt, which is read once.
        rows: Rows with the columns of the task's template; in all but the first, a column may be missing.
        texts: Texts instead, for a template with one column.
        origin: How messages call the rows.
        out: A file for the answers. It is there when all rows are answered. Until then its lines are in a file with
            `.partial` behind the name, which the next call continues if it gets the same rows and settings.
        max_new_tokens: Most tokens of a written answer; None: as in the run that made the prompt.
        model: Keys of the section `model` that differ from that run.
        allow_other_weights: Whether a prompt that was made for other weights only costs a warning.
        log: Receives a line about each step.

    Yields:
        The number of the row, from 1 on, and its answer with the columns of the template. Rows that were answered
        before a stop are left out.

    Raises:
        ArtifactError, BackboneError, AssetError, DataError: The prompt, its model or the rows cannot be opened.
        ConfigError: The prompt holds no task, there are no rows, or the file was begun with other rows or settings.
    """
    opened = _open(path, model, allow_other_weights, log)
    record = opened.registry.records[opened.task]
    if record.task_template is None or record.artifact is None:
        raise ConfigError(f"{path} holds no task (template and label words); use `softprompts generate`")
    columns = record.task_template.columns
    if rows is None:
        if len(columns) > 1:
            raise ConfigError(f"the task reads columns {', '.join(columns)}: give them as a file with --file")
        rows = ({columns[0]: text} for text in texts)
    rows = _with_columns(rows, columns, origin)
    config = evaluation_config(record.artifact, max_new_tokens=max_new_tokens)
    backbone = opened.backbone
    settings = {
        "prompt": prompt_files_digest(Path(path)),
        "model": [backbone.name, str(backbone.dtype), backbone.quantization],
        "evaluation": config.model_dump(mode="json", exclude={"batch_size", "batch_tokens"}),
    }
    unanswered: deque[Row] = deque()
    with answer_file(out, rows, columns, settings) as (done, write):
        if done:
            log(f"{done:,} rows are already answered")
        for answer in answers(opened, _remember(rows, unanswered), prompt=opened.task, config=config):
            done += 1
            line = answer_line(unanswered.popleft(), columns, answer)
            write(line)
            yield done, line


def continue_text(
    path: str | Path,
    text: str,
    *,
    seed: int = 0,
    model: Mapping[str, Any] | None = None,
    allow_other_weights: bool = False,
    log: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> str:
    """Continue a text behind a trained prompt.

    Args:
        path: The directory of the prompt.
        text: The text, exactly as the model reads it.
        seed: Seed of what is sampled.
        model: Keys of the section `model` that differ from the run that made the prompt.
        allow_other_weights: Whether a prompt that was made for other weights only costs a warning.
        log: Receives a line about each step.
        options: Arguments of transformers' `generate`.

    Raises:
        ArtifactError, BackboneError, AssetError: The prompt or its model cannot be opened.
        ConfigError: The prompt enters inside its task's template.
    """
    opened = _open(path, model, allow_other_weights, log)
    backbone = opened.backbone
    if opened.registry.site_of(opened.tasks).placement == "template":
        raise ConfigError(
            f"{path} fills slots of its task's template, and generate continues a plain text; use predict"
        )
    ids = backbone.tokenizer(text, return_tensors="pt")["input_ids"].to(backbone.device)
    torch.manual_seed(seed)
    output = opened.generate(ids, attention_mask=torch.ones_like(ids), **options)
    new = output[0, ids.shape[1] :] if backbone.family.scores_next_token else output[0]
    return str(backbone.tokenizer.decode(new, skip_special_tokens=True))


def answer_line(row: Row, columns: Sequence[str], answer: Answer) -> dict[str, Any]:
    """What is written about a row: its columns, the answer, and the generated text or the scores of the labels."""
    line = {**_cells(row, columns), "answer": answer.value}
    if answer.text is not None:
        line["output"] = answer.text
    if answer.scores:
        line["scores"] = {label: round(score, 4) for label, score in answer.scores.items()}
    return line


@contextlib.contextmanager
def answer_file(
    out: Path | None, rows: Iterator[Row], columns: Sequence[str], settings: Mapping[str, Any]
) -> Iterator[tuple[int, Callable[[Row], None]]]:
    """A file that answers are written to line by line; nothing is written where there is none.

    Args:
        out: The file. Lines go to `out` with `.partial` behind its name, which becomes `out` when all is done. A stop
            leaves it, and the next call continues it.
        rows: The rows to answer; those that the partial file answers are taken off.
        columns: The columns that tell rows apart.
        settings: What the answers depend on, as strict JSON. They are kept beside the partial file.

    Yields:
        The number of rows that are answered already, and a function that writes the next line.

    Raises:
        ConfigError: The partial file was begun with other settings, or answers other rows.
    """
    if out is None:
        yield 0, lambda line: None
        return
    partial, beside = out.with_name(f"{out.name}.partial"), out.with_name(f"{out.name}.partial.json")
    done = 0
    if partial.exists():
        done = _continue_partial(partial, beside, rows, columns, settings)
    else:
        beside.write_text(json.dumps(settings), encoding="utf-8")
    with partial.open("a", encoding="utf-8", newline="\n") as file:

        def write(line: Row) -> None:
            file.write(json_line(line) + "\n")
            file.flush()

        yield done, write
        os.fsync(file.fileno())
    os.replace(partial, out)
    beside.unlink(missing_ok=True)


def json_line(line: Mapping[str, Any]) -> str:
    """One line of JSON; NaN and infinity, which JSON has not, become null."""
    return json.dumps(to_jsonable_python(line, inf_nan_mode="null"), ensure_ascii=False)


def prompt_files_digest(folder: Path) -> str:
    """What tells one saved prompt from another, 64 hex digits: its tensors and what it says about itself."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".json")):
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _open(
    path: str | Path, model: Mapping[str, Any] | None, allow_other_weights: bool, log: Callable[[str], None]
) -> SoftPromptModel:
    opened, warnings = open_prompts([path], changes=model, allow_other_weights=allow_other_weights, log=log)
    for warning in warnings:
        log(f"warning: {warning}")
    return opened


def _with_columns(rows: Iterator[Row], columns: Sequence[str], origin: str) -> Iterator[Row]:
    """The same rows, the first of which must have all `columns`; in others a missing column is empty."""
    first = next(rows, None)
    if first is None:
        raise ConfigError(f"nothing to answer: {origin} was empty")
    for column in columns:
        require_column(column, first, "template", origin)
    return ({**dict.fromkeys(columns), **row} for row in itertools.chain([first], rows))


def _remember(rows: Iterator[Row], unanswered: deque[Row]) -> Iterator[Row]:
    """The same rows, each appended to `unanswered` too."""
    for row in rows:
        unanswered.append(row)
        yield row


def _continue_partial(
    partial: Path, beside: Path, rows: Iterator[Row], columns: Sequence[str], settings: Mapping[str, Any]
) -> int:
    """The number of lines of `partial`, once they are seen to answer the first of `rows`; half a line is cut off."""
    way_out = "; delete it, or give another --out"
    try:
        before = json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = {}
    differs = [key for key in settings if before.get(key) != settings[key]]
    if differs:
        raise ConfigError(f"{partial} was begun with another {', '.join(differs)}{way_out}")
    count = end = 0
    with partial.open("r+b") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            count, end = count + 1, end + len(line)
            row = next(rows, None)
            if row is None or not _answers_row(line, row, columns):
                raise ConfigError(f"{partial}:{count} answers another row than the input has now{way_out}")
        file.truncate(end)
    return count


def _answers_row(line: bytes, row: Row, columns: Sequence[str]) -> bool:
    """Whether a written line is the answer to `row`."""
    try:
        written = json.loads(line)
    except ValueError:
        return False
    expected = json.loads(json_line(_cells(row, columns)))
    return isinstance(written, dict) and _cells(written, columns) == expected


def _cells(row: Mapping[str, Any], columns: Sequence[str]) -> dict[str, Any]:
    """The cells of a row in these columns; None where it has none."""
    return dict(zip(columns, map(row.get, columns), strict=True))
