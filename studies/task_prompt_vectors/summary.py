"""What the study leaves to read: tables, heatmaps, curves over shots, and in plain words which claims held."""

import itertools
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from statistics import fmean
from typing import Any

import torch

from softprompts.artifacts import vectors
from softprompts.artifacts.vectors import Vector
from softprompts.evaluation.plots import LINE_COLORS
from softprompts.recipes.comparison import NO_PROMPT, mean_and_sd
from softprompts.recipes.run.results import versions
from studies.task_prompt_vectors import few as few_examples
from studies.task_prompt_vectors import independence, sums
from studies.task_prompt_vectors.plan import Study


def summarize(
    study: Study,
    chosen: Mapping[str, Any],
    found: Mapping[str, Sequence[Vector]],
    measured: Mapping[str, Mapping[str, Any]],
    pairs: Sequence[Mapping[str, Any]],
    again: Mapping[str, Sequence[Mapping[str, Any]]],
    few: Mapping[str, Mapping[str, Any]],
    seconds: float,
) -> dict[str, Any]:
    """The content of results.json; each argument is what a question's parts found."""
    claims = {"independence": independence.verdict(measured)}
    if pairs:
        claims["sums"] = sums.verdict(pairs, {title: _again(rows) for title, rows in again.items()})
    if few:
        claims["few"] = few_examples.verdict(few)
    return {
        "format": 1,
        "title": f"Task prompt vectors with {study.model.name}",
        "task": ", ".join(study.titles),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "claims": claims,
        "rate": dict(chosen),
        "independence": {
            title: {
                **one,
                "scores": {name: {**mean_and_sd(each), "each": each} for name, each in one["scores"].items()},
            }
            for title, one in measured.items()
        },
        "pairs": [_pair(one) for one in pairs],
        "again": {title: _again(rows) for title, rows in again.items()},
        "few": {title: {key: results[key] for key in ("arms", "rates")} for title, results in few.items()},
        "similarity": _similarity(found),
        "config": study.model_dump(mode="json"),
        "versions": versions(),
        "warnings": [
            *(line for title, results in few.items() for line in results["warnings"]),
            *(f"{title}: {row['name']} failed: {row['failed']}"
              for title, rows in again.items() for row in rows if row["failed"]),
        ],
    }  # fmt: skip


def _pair(one: Mapping[str, Any]) -> dict[str, Any]:
    scores = {
        kind: {task: mean_and_sd(values) for task, values in each.items()} for kind, each in one["scores"].items()
    }
    return {**one, "scores": scores, "kept": {kind: sums.kept_share(one, kind) for kind in ("sum", "other")}}


def _again(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The scores of runs that began at a sum, or at the starts alone, over the seeds."""
    values: dict[str, list[float]] = {}
    for row in rows:
        if row["after"]:
            values.setdefault(row["name"].rpartition("-seed")[0], []).append(row["after"]["value"])
    return {name: mean_and_sd(found) for name, found in values.items()}


def _similarity(found: Mapping[str, Sequence[Vector]]) -> dict[str, Any]:
    """Cosines of all vectors with each other and of all prompts; and their means: same task across starts, across tasks
    from the same start, and across both."""
    labels = [(title, place) for title, own in found.items() for place in range(len(own))]
    every = [one for own in found.values() for one in own]
    prompts = [one.reference.require_prompt(one.name) for one in every]
    matrices = {f"vectors, {how}": vectors.cosines([one.value for one in every], how) for how in vectors.COSINES}
    matrices["prompts, flat"] = vectors.cosines(prompts)
    kinds = {
        "same task, other start": [(i, j) for i, j in _places(labels) if labels[i][0] == labels[j][0]],
        "other task, same start": [(i, j) for i, j in _places(labels) if labels[i][1] == labels[j][1]],
        "other task, other start": [
            (i, j) for i, j in _places(labels) if labels[i][0] != labels[j][0] and labels[i][1] != labels[j][1]
        ],
    }
    means = {
        kind: {
            name: float(torch.stack([matrix[place] for place in places]).mean()) for name, matrix in matrices.items()
        }
        for kind, places in kinds.items()
        if places
    }
    names = [f"{title} {place}" for title, place in labels]
    return {"labels": names, "matrices": {name: matrix.tolist() for name, matrix in matrices.items()}, "means": means}


def _places(labels: Sequence[Any]) -> list[tuple[int, int]]:
    return list(itertools.combinations(range(len(labels)), 2))


def page_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """The results with the tables and pictures of their page."""
    return {
        **{key: value for key, value in results.items() if key not in ("independence", "similarity")},
        "tables": [
            {
                "title": "What held on this model",
                "columns": ["claim", "verdict", "in words"],
                "rows": [[_CLAIMS[name], one["holds"], one["words"]] for name, one in results["claims"].items()],
            },
            *_independence_tables(results),
            *_sum_tables(results),
            *_few_tables(results),
        ],
        "heatmaps": [
            {"title": f"Cosines of {name}", "labels": results["similarity"]["labels"], "matrix": matrix}
            for name, matrix in results["similarity"]["matrices"].items()
        ],
        "plots": [_curve(title, one["arms"]) for title, one in results["few"].items()],
    }


_CLAIMS = {
    "independence": "vectors do not depend on their start",
    "sums": "a sum serves both of its tasks",
    "few": "sums are good starts for few examples",
}


def _independence_tables(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    measured = results["independence"]
    conditions = independence.CONDITIONS
    rows = [
        [
            f"{title} ({one['metric']})",
            one["stock"],
            *(one["scores"][name] for name in conditions),
            _mean([ratio for ratio in one["ratios"] if ratio is not None]),
            one["dead"],
        ]
        for title, one in measured.items()
    ]
    scores = {
        "title": "Question 1: vectors on other starts (test rows)",
        "columns": ["task", "no prompt", *conditions, "norm(vector) / norm(start)", "rows without a gradient"],
        "rows": rows,
    }
    means = results["similarity"]["means"]
    kinds = list(results["similarity"]["matrices"])
    rows = [[kind, *(means[kind][name] for name in kinds)] for kind in means]
    about = [[name, text] for name, text in conditions.items()]
    return [
        scores,
        {"title": "What the columns are", "columns": ["condition", "what it is"], "rows": about},
        {"title": "Mean cosines", "columns": ["", *kinds], "rows": rows},
    ]


def _sum_tables(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    tables, kinds = [], ("start", "other", "own", "sum")
    rows = [
        [
            " + ".join(one["tasks"]),
            "related" if one["related"] else "",
            ", ".join(f"{value:g}" for value in one["coefficients"]),
            *(one["scores"][kind][task] for task in one["tasks"] for kind in kinds),
            *(one["kept"][kind] for kind in ("sum", "other")),
        ]
        for one in results["pairs"]
    ]
    columns = ["pair", "", "coefficients", *(f"{which}: {kind}" for which in ("first", "second") for kind in kinds)]
    columns += ["kept by the sum", "kept by the other's prompt"]
    if rows:
        tables.append({"title": "Question 2: sums, as they are (test rows)", "columns": columns, "rows": rows})
    names = list(dict.fromkeys(name for one in results["again"].values() for name in one))
    rows = [[title, *(one.get(name) for name in names)] for title, one in results["again"].items()]
    if rows:
        title = "Question 2: sums as starts, few rows of one of their tasks"
        tables.append({"title": title, "columns": ["task", *names], "rows": rows})
    return tables


def _few_tables(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A table for each unseen target: arms by the number of examples."""
    tables = []
    for title, one in results["few"].items():
        arms = list(dict.fromkeys(line["arm"] for table in one["arms"] for line in table["lines"]))
        cells = {
            (line["arm"], table["size"]): line["scores"].get(title) for table in one["arms"] for line in table["lines"]
        }
        sizes = [table["size"] for table in one["arms"]]
        metric = one["arms"][0]["metrics"].get(title, "")
        rows = [[arm, *(cells.get((arm, size)) for size in sizes)] for arm in arms]
        columns = ["start", *sizes]
        tables.append({"title": f"Question 3: few examples of {title} ({metric})", "columns": columns, "rows": rows})
    return tables


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _curve(title: str, tables: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean scores over the number of examples, a line for each start."""
    points: dict[str, list[tuple[float, float]]] = {}
    for table in tables:
        size = table["size"].partition("-")[0]
        for line in table["lines"] if size.isdigit() else ():
            if line["mean"] is not None and line["arm"] != NO_PROMPT:
                points.setdefault(line["arm"], []).append((float(size), line["mean"]))
    lines = [
        {"name": arm, "points": sorted(each), "dots": True, "look": list(LINE_COLORS)[at % len(LINE_COLORS)]}
        for at, (arm, each) in enumerate(points.items())
    ]
    return {"title": f"{title}: score by examples", "axis": "examples", "lines": lines}
