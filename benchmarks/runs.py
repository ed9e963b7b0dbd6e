"""The measurements. Each is a function of plain values that gives plain values; plan.py says which are run."""

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from benchmarks import floor, fresh, loops, memory, models, workload
from benchmarks.measure import Ratio, interleave, ratio, relative, timed
from benchmarks.ours import Ours
from benchmarks.theirs import Theirs
from benchmarks.workload import Row, Shape, Side

PROBES = 2
"""Timed steps, after one that is not, that decide whether PEFT is also measured with eager attention."""


def progress(text: str) -> None:
    """Say how far a measurement has come."""
    print(f"    {text}", file=sys.stderr, flush=True)


def step(
    model: str,
    device: str,
    dtypes: Sequence[str],
    shape: Sequence[int],
    pairs: int,
    best: bool = True,
    eager: bool = True,
) -> dict[str, Any]:
    """Whole training steps of both sides on one batch, in every dtype, taking turns.

    best: also PEFT's first dtype against our fastest, and ours against the floor; eager: also PEFT with eager attention
    where that is faster.
    """
    size = Shape(*shape)
    sides = _sides(model, device, dtypes, size.prompt)
    stock = sides[f"ours {dtypes[0]}"].backbone.model
    rows = workload.rows(size, _vocabulary(sides[f"ours {dtypes[0]}"]), models.kind(model), models.CLASSES)
    calls = {name: _ready(side, rows) for name, side in sides.items()}
    for call in calls.values():
        call()
    parity = _parities(sides, dtypes)
    progress(f"warmed up, loss differs by {parity[dtypes[0]]['loss']:.1e}")
    probes: dict[str, Any] = {}
    for dtype in dtypes if eager else ():
        probes[dtype], call = _probe_eager(model, device, dtype, size, rows, calls[f"PEFT {dtype}"])
        calls |= {f"PEFT eager {dtype}": call} if probes[dtype]["faster"] == "eager" else {}
    tokens = size.prompt + sum(len(row.ids) for row in rows)
    products = {d: floor.products(floor.dimensions(stock), tokens, d, device) for d in dtypes} if best else {}
    for dtype, (_, ways) in products.items():
        calls |= {f"product {dtype} {way}": go for way, go in ways.items()}
    seconds = interleave(calls, pairs, device, lambda done: progress(f"round {done} of {pairs}"))
    result = {
        "model": model,
        "shape": asdict(size),
        "pairs": pairs,
        "sides": {name: _side(times, rows) for name, times in seconds.items() if not name.startswith("product")},
        "ratios": _ratios(seconds, dtypes, best),
        "parity": parity,
        "paths": {dtype: sides[f"ours {dtype}"].path for dtype in dtypes},
        "kernels": {dtype: sides[f"ours {dtype}"].kernels for dtype in dtypes},
        "attention": probes,
    }
    if best:
        lengths = [len(row.ids) for row in rows]
        needed = floor.operations(floor.dimensions(stock), [size.prompt], lengths, len(rows))
        result["floor"] = {dtype: _floor(dtype, seconds, products[dtype], needed) for dtype in dtypes}
    return result


def grid(
    model: str, device: str, dtype: str, prompt: int, cells: Sequence[Sequence[int]], pairs: int, budget: float
) -> dict[str, Any]:
    """Steps of both sides over many shapes [rows, longest] behind one length of prompt, few pairs each.

    A cell warms up on a quarter of its rows and ends after `pairs`, or when another pair would exceed `budget` seconds;
    it has at least one pair. Texts have half of the longest length to all of it.
    """
    ours, theirs = Ours(model, dtype, device, prompt), Theirs(model, dtype, device, prompt)
    cells_measured: list[dict[str, Any]] = []
    for rows, longest in cells:
        size = Shape(prompt, rows, longest // 2, longest)
        batch = workload.rows(size, _vocabulary(ours), "causal")
        for side in (ours, theirs):
            _ready(side, batch[: max(2, rows // 4)])()
        calls = {"ours": _ready(ours, batch), "PEFT": _ready(theirs, batch)}
        seconds = interleave(calls, 1, device)
        parity = _parity(ours, theirs)
        pair = sum(times[0] for times in seconds.values())
        more = min(pairs, max(1, int(budget / pair))) - 1
        later = interleave(calls, more, device)
        seconds = {name: times + later[name] for name, times in seconds.items()}
        cells_measured.append(
            {
                "shape": asdict(size),
                "pairs": more + 1,
                "sides": {name: _side(times, batch) for name, times in seconds.items()},
                "ratio": asdict(ratio(seconds["PEFT"], seconds["ours"])),
                "parity": parity,
            }
        )
        progress(f"{size}: {cells_measured[-1]['ratio']['value']:.2f} times, {more + 1} pairs")
    return {"model": model, "dtype": dtype, "cells": cells_measured}


def scoring(
    model: str,
    device: str,
    dtype: str,
    prompt: int,
    rows: int,
    lengths: Sequence[int],
    sizes: Sequence[int],
    pairs: int,
    pairs_several: int,
) -> dict[str, Any]:
    """Rows a second when texts are classified by the probability of label words, of one token and of two or three.

    Each side first finds its batch size among `sizes`, PEFT then its attention; tokenizing is timed on both.
    """
    ours = Ours(model, dtype, device, prompt)
    texts = workload.texts(ours.backbone.tokenizer, rows, *lengths)
    ids = workload.start_ids(prompt, _vocabulary(ours))
    ours.start(ids)
    single = ours.candidates(workload.answers(ours.backbone.tokenizer, [1] * 6))
    several = ours.candidates(workload.answers(ours.backbone.tokenizer, [2, 3]))
    tuned = {"ours": _tune(ours, texts, single, sizes, device)}
    by_attention: dict[str, float] = {}
    for attention in (None, "eager"):
        other = Theirs(model, dtype, device, prompt, attention)
        other.start(ids)
        tried = sizes if attention is None else [_fastest(tuned["PEFT"])]
        times = _tune(other, texts, single, tried, device)
        tuned.setdefault("PEFT", times)
        by_attention[other.attention] = min(times.values())
        if min(by_attention, key=by_attention.__getitem__) == other.attention:
            theirs = other
    chosen = {side: _fastest(times) for side, times in tuned.items()}
    sides: dict[str, Side] = {"ours": ours, "PEFT": theirs}
    parts = {
        name: _contest(sides, chosen, texts, labels, rounds, device, name)
        for name, labels, rounds in (("single", single, pairs), ("several", several, pairs_several))
    }
    return {
        "model": model,
        "dtype": dtype,
        "prompt": prompt,
        "rows": rows,
        "lengths": list(lengths),
        "seconds_by_size": {side: {str(size): taken for size, taken in times.items()} for side, times in tuned.items()},
        "seconds_by_attention": by_attention,
        "chosen": chosen,
        "attention": theirs.attention,
        **parts,
    }


def peak(side: str, model: str, device: str, dtype: str, shape: Sequence[int], steps: int = 5) -> dict[str, float]:
    """Memory of `steps` training steps of one side, above the loaded model; this process must have done nothing yet."""
    size = Shape(*shape)
    measured_side: Any = (Ours if side == "ours" else Theirs)(model, dtype, device, size.prompt)
    rows = workload.rows(size, _vocabulary(measured_side), models.kind(model), models.CLASSES)
    measured_side.touch()
    watch = memory.watch(device)
    call = _ready(measured_side, rows)
    for _ in range(steps):
        call()
    return watch()


def peaks(model: str, device: str, dtype: str, shape: Sequence[int], repeats: int, threads: int) -> dict[str, Any]:
    """Peak memory of both sides above the model: medians over fresh processes, which take turns.

    The ratio's interval reaches from the least to the most that any two of them give.
    """
    arguments = {"model": model, "device": device, "dtype": dtype, "shape": shape}
    processes: dict[str, list[dict[str, float]]] = {"ours": [], "PEFT": []}
    for number in range(repeats):
        for side, of_side in processes.items():
            of_side.append(fresh.call("peak", {"side": side, **arguments}, threads))
            progress(f"{side} {number + 1} of {repeats}: {of_side[-1]['above']:.0f} MiB")

    def share(figure: str) -> Ratio:
        ours = [process[figure] for process in processes["ours"]]
        theirs = [process[figure] for process in processes["PEFT"]]
        middle = statistics.median(ours) / statistics.median(theirs)
        return Ratio(middle, min(ours) / max(theirs), max(ours) / min(theirs))

    return {
        "model": model,
        "dtype": dtype,
        "shape": asdict(Shape(*shape)),
        "mib": {
            side: {name: statistics.median(process[name] for process in of_side) for name in of_side[0]}
            for side, of_side in processes.items()
        },
        "processes": processes,
        "ratio": asdict(share("above")),
        "ratio_of_steps": asdict(share("of_steps")),
    }


def exact(model: str, device: str, dtypes: Sequence[str], shape: Sequence[int]) -> dict[str, Any]:
    """How far loss and prompt gradient of one step are from PEFT's in float64, for both sides in every dtype."""
    size = Shape(*shape)
    reference = Theirs(model, "float64", device, size.prompt)
    rows = workload.rows(size, _vocabulary(reference), models.kind(model), models.CLASSES)
    _ready(reference, rows)()
    parities = {}
    for name, side in _sides(model, device, dtypes, size.prompt).items():
        _ready(side, rows)()
        parities[name] = _parity(side, reference)
        progress(f"{name}: gradient differs from float64's by {parities[name]['gradient']:.1e}")
    return {"model": model, "shape": asdict(size), "sides": parities}


def _vocabulary(side: Any) -> int:
    return int(side.backbone.embedding.num_embeddings if isinstance(side, Ours) else side.embedding.num_embeddings)


def _ready(side: Side, rows: Sequence[Row]) -> Callable[[], None]:
    """A step of `side` on `rows`, from a new start of its prompt."""
    prompt = side.prompt if isinstance(side, Ours) else len(side.weight)  # type: ignore[attr-defined]
    side.start(workload.start_ids(prompt, _vocabulary(side)))
    batch = side.prepare(rows)
    return lambda: side.step(batch)


def _sides(model: str, device: str, dtypes: Sequence[str], prompt: int) -> dict[str, Any]:
    """Both sides in every dtype, each with its own model."""
    sides: dict[str, Any] = {}
    for dtype in dtypes:
        ours = Ours(model, dtype, device, prompt)
        sides[f"ours {dtype}"], sides[f"PEFT {dtype}"] = ours, Theirs(model, dtype, device, prompt)
    return sides


def _parities(sides: Mapping[str, Any], dtypes: Sequence[str]) -> dict[str, dict[str, float]]:
    """How far ours is from PEFT's in each dtype; and in the later ones, how far each gradient is from the first's."""
    parities = {dtype: _parity(sides[f"ours {dtype}"], sides[f"PEFT {dtype}"]) for dtype in dtypes}
    exact = sides[f"PEFT {dtypes[0]}"].gradient()
    for dtype in dtypes[1:]:
        parities[dtype]["ours_from_first"] = relative(sides[f"ours {dtype}"].gradient(), exact)
        parities[dtype]["theirs_from_first"] = relative(sides[f"PEFT {dtype}"].gradient(), exact)
    return parities


def _parity(ours: Side, theirs: Side) -> dict[str, float]:
    """How far loss and prompt gradient of the last step are apart, relative to PEFT's."""
    return {
        "loss": abs(ours.loss - theirs.loss) / abs(theirs.loss),
        "gradient": relative(ours.gradient(), theirs.gradient()),
    }


def _probe_eager(
    model: str, device: str, dtype: str, size: Shape, rows: Sequence[Row], default: Callable[[], None]
) -> tuple[dict[str, Any], Callable[[], None]]:
    """Seconds of PEFT's step by attention, and the step with eager attention."""
    side = Theirs(model, dtype, device, size.prompt, "eager")
    call = _ready(side, rows)
    call()
    seconds = interleave({"default": default, "eager": call}, PROBES, device)
    faster = min(seconds, key=lambda name: statistics.median(seconds[name]))
    progress(f"PEFT {dtype}: {faster} attention is the faster one")
    return {"seconds": seconds, "faster": faster}, call


def _side(seconds: Sequence[float], rows: Sequence[Row]) -> dict[str, Any]:
    """A side's times; tokens are those of the texts, which both sides read, not of prompt or padding."""
    median = statistics.median(seconds)
    tokens = sum(len(row.ids) for row in rows)
    return {
        "seconds": list(seconds),
        "median": median,
        "low": min(seconds),
        "high": max(seconds),
        "tokens_per_second": tokens / median,
    }


def _ratios(seconds: Mapping[str, Sequence[float]], dtypes: Sequence[str], best: bool) -> dict[str, Any]:
    ratios: dict[str, Ratio] = {d: ratio(seconds[f"PEFT {d}"], seconds[f"ours {d}"]) for d in dtypes}
    for dtype in dtypes:
        if f"PEFT eager {dtype}" in seconds:
            ratios[f"{dtype}, PEFT eager"] = ratio(seconds[f"PEFT eager {dtype}"], seconds[f"ours {dtype}"])
    result: dict[str, Any] = {name: asdict(value) for name, value in ratios.items()}
    if best:
        fastest = min(dtypes, key=lambda dtype: statistics.median(seconds[f"ours {dtype}"]))
        result["best"] = {
            **asdict(ratio(seconds[f"PEFT {dtypes[0]}"], seconds[f"ours {fastest}"])),
            "ours": fastest,
        }
    return result


def _floor(
    dtype: str,
    seconds: Mapping[str, Sequence[float]],
    products: tuple[int, Mapping[str, Any]],
    needed: floor.Operations,
) -> dict[str, Any]:
    """Our step over the floor; the rate is that of the fastest way, measured in the same rounds."""
    count, ways = products
    rates = {way: count / statistics.median(seconds[f"product {dtype} {way}"]) for way in ways}
    best = max(rates, key=rates.__getitem__)
    # The floor of each round is as fast as that round's products.
    floors = [needed.floor / count * taken for taken in seconds[f"product {dtype} {best}"]]
    return {
        "rates": rates,
        "way": best,
        "operations": asdict(needed),
        "seconds": needed.floor / rates[best],
        "attention_seconds": needed.attention / rates[best],
        "ratio": asdict(ratio(seconds[f"ours {dtype}"], floors)),
    }


def _tune(
    side: Side, texts: Sequence[str], labels: dict[str, list[int]], sizes: Sequence[int], device: str
) -> dict[int, float]:
    """Seconds of one pass over `texts` by batch size, after a small one that is not timed."""
    side.score(texts[: min(sizes)], labels, min(sizes))
    return {size: timed(lambda size=size: side.score(texts, labels, size), device) for size in sizes}  # type: ignore[misc]


def _fastest(seconds: Mapping[int, float]) -> int:
    return min(seconds, key=seconds.__getitem__)


def _contest(
    sides: Mapping[str, Side],
    sizes: Mapping[str, int],
    texts: Sequence[str],
    labels: dict[str, list[int]],
    rounds: int,
    device: str,
    name: str,
) -> dict[str, Any]:
    """Both sides score the same texts in turns; `parity` is the largest difference of two log-probabilities."""
    scores: dict[str, torch.Tensor] = {}

    def scorer(side: str) -> Callable[[], None]:
        def call() -> None:
            scores[side] = sides[side].score(texts, labels, sizes[side])

        return call

    calls = {side: scorer(side) for side in sides}
    seconds = interleave(calls, rounds, device, lambda done: progress(f"{name}: round {done} of {rounds}"))
    return {
        "labels": {word: len(tokens) for word, tokens in labels.items()},
        "pairs": rounds,
        "seconds": seconds,
        "rows_per_second": {side: len(texts) / statistics.median(times) for side, times in seconds.items()},
        "ratio": asdict(ratio(seconds["PEFT"], seconds["ours"])),
        "parity": float((scores["ours"] - scores["PEFT"]).abs().max()),
    }


RUNS: dict[str, Callable[..., dict[str, Any]]] = {
    "step": step,
    "loops": loops.loops,
    "busy": loops.busy,
    "grid": grid,
    "scoring": scoring,
    "peaks": peaks,
    "peak": peak,
    "exact": exact,
}
