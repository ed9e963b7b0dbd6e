"""The results of the study: tables, heatmaps, curves over shots, and which claims hold."""

import itertools
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from softprompts.artifacts import vectors
from softprompts.artifacts.vectors import Vector
from softprompts.evaluation.plots import LINE_COLORS
from softprompts.recipes.comparison import NO_PROMPT, mean_and_sd
from softprompts.recipes.run.results import versions
from studies.task_prompt_vectors import few as few_examples
from studies.task_prompt_vectors import independence, sums
from studies.task_prompt_vectors.plan import Study

CLAIMS = {
    "independence": "vectors do not depend on their start",
    "sums": "a sum serves both of its tasks",
    "few": "sums are good starts for few examples",
}


def summarize(
    study: Study,
    *,
    chosen_rate: Mapping[str, Any],
    task_vectors: Mapping[str, Sequence[Vector]],
    measurements: Mapping[str, Mapping[str, Any]],
    pairs: Sequence[Mapping[str, Any]],
    again: Mapping[str, Sequence[Mapping[str, Any]]],
    few: Mapping[str, Mapping[str, Any]],
    seconds: float,
) -> dict[str, Any]:
    """The content of results.json.

    Args:
        study: The study.
        chosen_rate: The learning rate, and the scores that chose it.
        task_vectors: The vectors of each task, one from each start.
        measurements: The measurements of question 1, by task.
        pairs: The measurements of question 2, by pair.
        again: The runs with few rows from sums and from their starts, by task.
        few: The results of question 3, by target.
        seconds: The duration of the whole study.
    """
    few_row_scores = {title: _scores_of_starts(rows) for title, rows in again.items()}
    claims = {"independence": independence.verdict(measurements)}
    if pairs:
        claims["sums"] = sums.verdict(pairs, few_row_scores)
    if few:
        claims["few"] = few_examples.verdict(few)
    warnings: list[str] = []
    for results in few.values():
        warnings += results["warnings"]
    for title, rows in again.items():
        warnings += [f"{title}: {row['name']} failed: {row['failed']}" for row in rows if row["failed"]]
    return {
        "format": 1,
        "title": f"Task prompt vectors with {study.model.name}",
        "task": ", ".join(study.titles),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "claims": claims,
        "rate": dict(chosen_rate),
        "independence": {title: _condition_scores(measurement) for title, measurement in measurements.items()},
        "pairs": [_pair_scores(pair) for pair in pairs],
        "again": few_row_scores,
        "few": {title: {key: results[key] for key in ("arms", "rates")} for title, results in few.items()},
        "similarity": _similarity(task_vectors),
        "config": study.model_dump(mode="json"),
        "versions": versions(),
        "warnings": warnings,
    }


def _condition_scores(measurement: Mapping[str, Any]) -> dict[str, Any]:
    """A task's measurement with mean and standard deviation of each condition beside the single scores."""
    scores = {name: {**mean_and_sd(values), "each": values} for name, values in measurement["scores"].items()}
    return {**measurement, "scores": scores}


def _pair_scores(pair: Mapping[str, Any]) -> dict[str, Any]:
    """A pair's measurement with means and standard deviations, and the shares that its prompts keep."""
    scores = {}
    for kind, values_of_tasks in pair["scores"].items():
        scores[kind] = {task: mean_and_sd(values) for task, values in values_of_tasks.items()}
    shares = {kind: sums.kept_share(pair, kind) for kind in ("sum", "other")}
    return {**pair, "scores": scores, "kept": shares}


def _scores_of_starts(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds of runs from sums, and from the starts alone."""
    values: dict[str, list[float]] = {}
    for row in rows:
        if row["after"]:
            values.setdefault(row["name"].rpartition("-seed")[0], []).append(row["after"]["value"])
    return {name: mean_and_sd(values_of_seeds) for name, values_of_seeds in values.items()}


def _similarity(task_vectors: Mapping[str, Sequence[Vector]]) -> dict[str, Any]:
    """Cosines of all vectors with each other and of all prompts, and their means.

    The means are of pairs of the same task from two starts, of two tasks from the same start, and of neither.
    """
    labels: list[tuple[str, int]] = []
    for title, vectors_of_task in task_vectors.items():
        labels += [(title, start) for start in range(len(vectors_of_task))]
    every_vector = list(itertools.chain.from_iterable(task_vectors.values()))
    values = [vector.value for vector in every_vector]
    prompts = [vector.reference.require_prompt(vector.name) for vector in every_vector]
    matrices = {f"vectors, {how}": vectors.cosines(values, how) for how in vectors.COSINES}
    matrices["prompts, flat"] = vectors.cosines(prompts)
    positions: dict[str, list[tuple[int, int]]] = {
        "same task, other start": [],
        "other task, same start": [],
        "other task, other start": [],
    }
    for i, j in itertools.combinations(range(len(labels)), 2):
        task = "same task" if labels[i][0] == labels[j][0] else "other task"
        start = "same start" if labels[i][1] == labels[j][1] else "other start"
        positions[f"{task}, {start}"].append((i, j))
    means = {}
    for kind, positions_of_kind in positions.items():
        if positions_of_kind:
            means[kind] = {name: _mean_at(matrix, positions_of_kind) for name, matrix in matrices.items()}
    names = [f"{title} {start}" for title, start in labels]
    return {"labels": names, "matrices": {name: matrix.tolist() for name, matrix in matrices.items()}, "means": means}


def _mean_at(matrix: Tensor, positions: Sequence[tuple[int, int]]) -> float:
    return float(torch.stack([matrix[position] for position in positions]).mean())


def page_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """The results with the tables and plots of their page."""
    similarity = results["similarity"]
    heatmaps = []
    for name, matrix in similarity["matrices"].items():
        heatmaps.append({"title": f"Cosines of {name}", "labels": similarity["labels"], "matrix": matrix})
    tables = [_claim_table(results["claims"]), *_independence_tables(results), *_sum_tables(results)]
    tables += [_few_table(target, few["arms"]) for target, few in results["few"].items()]
    plots = [_few_plot(target, few["arms"]) for target, few in results["few"].items()]
    content = {key: value for key, value in results.items() if key not in ("independence", "similarity")}
    return {**content, "tables": tables, "heatmaps": heatmaps, "plots": plots}


def _claim_table(claims: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    rows = [[CLAIMS[name], claim["holds"], claim["words"]] for name, claim in claims.items()]
    return {"title": "What held on this model", "columns": ["claim", "verdict", "in words"], "rows": rows}


def _independence_tables(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    conditions = independence.CONDITIONS
    score_rows = []
    for title, measurement in results["independence"].items():
        ratios = [ratio for ratio in measurement["ratios"] if ratio is not None]
        scores = [measurement["scores"][name] for name in conditions]
        row = [f"{title} ({measurement['metric']})", measurement["stock"], *scores]
        score_rows.append([*row, fmean(ratios) if ratios else None, measurement["dead"]])
    means = results["similarity"]["means"]
    matrices = list(results["similarity"]["matrices"])
    return [
        {
            "title": "Question 1: vectors on other starts (test rows)",
            "columns": ["task", "no prompt", *conditions, "norm(vector) / norm(start)", "rows without a gradient"],
            "rows": score_rows,
        },
        {
            "title": "What the columns are",
            "columns": ["condition", "what it is"],
            "rows": [[name, about] for name, about in conditions.items()],
        },
        {
            "title": "Mean cosines",
            "columns": ["", *matrices],
            "rows": [[kind, *(means[kind][name] for name in matrices)] for kind in means],
        },
    ]


def _sum_tables(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    tables = []
    if results["pairs"]:
        tables.append(_pair_table(results["pairs"]))
    again = results["again"]
    names = list(dict.fromkeys(itertools.chain.from_iterable(again.values())))
    rows = [[title, *map(scores.get, names)] for title, scores in again.items()]
    if rows:
        title = "Question 2: sums as starts, few rows of one of their tasks"
        tables.append({"title": title, "columns": ["task", *names], "rows": rows})
    return tables


def _pair_table(pairs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    kinds = ("start", "other", "own", "sum")
    rows = []
    for pair in pairs:
        row = [" + ".join(pair["tasks"]), "related" if pair["related"] else ""]
        row.append(", ".join(f"{value:g}" for value in pair["coefficients"]))
        for task in pair["tasks"]:
            row += [pair["scores"][kind][task] for kind in kinds]
        rows.append([*row, pair["kept"]["sum"], pair["kept"]["other"]])
    columns = ["pair", "", "coefficients"]
    for position in ("first", "second"):
        columns += [f"{position}: {kind}" for kind in kinds]
    columns += ["kept by the sum", "kept by the other's prompt"]
    return {"title": "Question 2: sums, as they are (test rows)", "columns": columns, "rows": rows}


def _few_table(target: str, sizes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The scores of an unseen target: arms by the number of examples."""
    cells: dict[str, dict[str, Any]] = {}
    for size in sizes:
        for line in size["lines"]:
            cells.setdefault(line["arm"], {})[size["size"]] = line["scores"].get(target)
    names = [size["size"] for size in sizes]
    metric = sizes[0]["metrics"].get(target, "")
    rows = [[arm, *map(cells_of_arm.get, names)] for arm, cells_of_arm in cells.items()]
    title = f"Question 3: few examples of {target} ({metric})"
    return {"title": title, "columns": ["start", *names], "rows": rows}


def _few_plot(target: str, sizes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean scores over the number of examples, a line for each start."""
    points: dict[str, list[tuple[float, float]]] = {}
    for size in sizes:
        examples = size["size"].partition("-")[0]
        if not examples.isdigit():
            continue
        for line in size["lines"]:
            if line["mean"] is not None and line["arm"] != NO_PROMPT:
                points.setdefault(line["arm"], []).append((float(examples), line["mean"]))
    lines = []
    for (arm, points_of_arm), look in zip(points.items(), itertools.cycle(LINE_COLORS), strict=False):
        lines.append({"name": arm, "points": sorted(points_of_arm), "dots": True, "look": look})
    return {"title": f"{target}: score by examples", "axis": "examples", "lines": lines}
