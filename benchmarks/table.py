"""Results as Markdown tables: on the terminal, and between two comments of a page."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.plan import WAITING
from benchmarks.targets import verdicts

BEGIN, END = "<!-- speed -->", "<!-- /speed -->"


def page(stored: Mapping[str, Any]) -> str:
    """All tables of the results of `store.read`, in Markdown; measurements that are missing are left out."""
    results = stored["results"]
    parts = [_machine(stored), _targets(results), _steps(results, "step/"), _loops(results), _busy(results)]
    parts += [_floor(results)]
    parts += [_memory(results), _scoring(results), _grid(results), _steps(results, "shapes/"), _exact(results)]
    return "\n\n".join(part for part in parts if part)


def into(file: Path, text: str) -> None:
    """Put `text` between the two comments of the page `file`.

    Raises ValueError when the page does not have both, in order.
    """
    whole = file.read_text(encoding="utf-8")
    before, begin, rest = whole.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{file} has no {BEGIN} followed by {END}; put both where the tables belong")
    file.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [" | ".join(row) for row in rows]
    if not lines:
        return ""
    head = [" | ".join(columns), " | ".join("---" for _ in columns)]
    return "\n".join([f"**{title}**", "", *(f"| {line} |" for line in [*head, *lines])])


def _machine(stored: Mapping[str, Any]) -> str:
    facts, settings = stored["machine"], stored["settings"]
    native = [name for name, supported in facts["bfloat16"].items() if supported]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    loads = [r["load"] for r in stored["results"].values() if r.get("load") is not None]
    busy = f"; load average before each measurement {min(loads):.1f} to {max(loads):.1f}" if loads else ""
    commits = sorted({r["commit"] for r in stored["results"].values() if r.get("commit")})
    device = facts["accelerator"] if settings["device"] != "cpu" else facts["cpu"]
    return (
        f"Measured on {device}, {facts['cores']} cores, {settings['threads']} threads, bfloat16 in hardware: "
        f"{', '.join(native) or 'no'}{busy}. {versions}"
        f"{', commit ' if commits else ''}{', '.join(commits)}."
        + (" A smoke test on tiny random models: these figures mean nothing." if settings["quick"] else "")
    )


def _targets(results: Mapping[str, Any]) -> str:
    rows = [
        (
            verdict.target.figure,
            f"{'at least' if verdict.target.least else 'at most'} {verdict.target.value:g}",
            _interval(vars(verdict.ratio)),
            "yes" if verdict.reached else "no" if verdict.enough else "too few pairs",
        )
        for verdict in verdicts(results)
    ]
    return _table("Figures to reach", ("figure", "goal", "measured (95 % interval)", "reached"), rows)


def _steps(results: Mapping[str, Any], prefix: str) -> str:
    rows = []
    for name, result in _of(results, prefix):
        for side, times in result["sides"].items():
            ours, _, dtype = side.rpartition(" ")
            key = f"{dtype}, PEFT eager" if ours == "PEFT eager" else dtype
            ratio = "" if ours == "ours" else _interval(result["ratios"][key])
            rows.append(
                (
                    f"{result['model']}, {_shape(result['shape'])}",
                    _side(ours),
                    dtype,
                    f"{times['median']:.3f} ({times['low']:.3f} to {times['high']:.3f})",
                    f"{times['tokens_per_second']:,.0f}",
                    ratio,
                    _parity(result["parity"][dtype]) if ours == "PEFT" else "",
                )
            )
        for dtype, kernels in result["kernels"].items():
            rows.append((f"{name}, {dtype}: {kernels}", "", "", "", "", "", ""))
        if best := result["ratios"].get("best"):
            label = f"{name}: PEFT float32 to ours {best['ours']}"
            rows.append((label, "", "", "", "", _interval(best), ""))
    title = "Training steps" if prefix == "step/" else "Where nothing can be shared: encoders see their prompt"
    columns = (
        "what",
        "side",
        "dtype",
        "seconds a step (range)",
        "text tokens/s",
        "we are times faster",
        "loss, gradient differ",
    )
    return _table(title, columns, rows)


def _loops(results: Mapping[str, Any]) -> str:
    rows = []
    for _, result in _of(results, "loops/"):
        ratios = result["ratios"]
        notes = {
            "loop": f"{_interval(ratios['loop of command'])} of the command's speed",
            "Trainer": f"{_interval(ratios['Trainer of command'])} of the command's speed",
            "PEFT loop": f"ours is {_interval(ratios['PEFT loop to loop'])} times faster",
            "PEFT Trainer": f"ours is {_interval(ratios['PEFT Trainer to Trainer'])} times faster",
        }
        for name, seconds in result["medians"].items():
            workload = f"{result['model']}, {_shape(result['shape'])}"
            rows.append((workload, result["dtype"], name, f"{seconds:.3f}", notes.get(name, "")))
    columns = ("what", "dtype", "written as", "seconds a step", "compared")
    return _table("A plain loop and Trainer, in one run with the command's path", columns, rows)


def _busy(results: Mapping[str, Any]) -> str:
    rows = []
    for name, result in _of(results, "busy/"):
        medians = result["medians"]
        environment = WAITING[name.partition("/")[2]]
        settings = " ".join(f"{key}={value}" for key, value in environment.items())
        rows.append((settings, f"{medians['quiet']:.3f}", f"{medians['busy']:.3f}", _interval(result["ratio"])))
    columns = ("environment", "quiet step, seconds", "beside one busy core", "times the quiet step")
    return _table("One busy neighbor", columns, rows)


def _floor(results: Mapping[str, Any]) -> str:
    rows = []
    for _, result in _of(results, "step/"):
        for dtype, floor in result.get("floor", {}).items():
            rates = ", ".join(f"{way} {rate / 1e12:.2f}" for way, rate in floor["rates"].items())
            rows.append(
                (
                    _shape(result["shape"]),
                    dtype,
                    rates,
                    f"{(floor['operations']['blocks'] + floor['operations']['head']) / 1e9:,.0f}",
                    f"{floor['seconds']:.3f} ({floor['way']})",
                    f"{floor['operations']['attention'] / 1e9:,.0f}, {floor['attention_seconds']:.3f}",
                    _interval(floor["ratio"]),
                )
            )
    columns = ("shape", "dtype", "matrix products, TFLOP/s", "GFLOP a step", "floor, seconds")
    return _table("The floor", (*columns, "attention apart: GFLOP, seconds", "our step is times the floor"), rows)


def _memory(results: Mapping[str, Any]) -> str:
    rows = []
    for _, result in _of(results, "memory/"):
        for side, mib in result["mib"].items():
            ratios = [_interval(result[key]) if side == "ours" else "" for key in ("ratio", "ratio_of_steps")]
            row = (_shape(result["shape"]), _side(side), result["dtype"], f"{mib['above']:,.0f}")
            rows.append((*row, f"{mib['of_steps']:,.0f}", f"{mib['before']:,.0f}", *ratios))
    columns = (
        "shape",
        "side",
        "dtype",
        "peak above the model, MiB",
        "the same without loading",
        "process with the model, MiB",
    )
    return _table("Memory of five steps", (*columns, "of PEFT's (least to most)", "without loading"), rows)


def _scoring(results: Mapping[str, Any]) -> str:
    rows = []
    for _, result in _of(results, "scoring/"):
        for name in ("single", "several"):
            part = result[name]
            counts = sorted(part["labels"].values())
            tokens = str(counts[0]) if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]}"
            rates, chosen = part["rows_per_second"], result["chosen"]
            rows.append(
                (
                    f"{len(counts)} labels of {tokens} token{'' if tokens == '1' else 's'}",
                    result["dtype"],
                    f"{rates['ours']:.1f} ({chosen['ours']})",
                    f"{rates['PEFT']:.1f} ({chosen['PEFT']}, {result['attention']})",
                    str(part["pairs"]),
                    _interval(part["ratio"]),
                    f"{part['parity']:.1e}",
                )
            )
    columns = ("answers", "dtype", "our rows/s (batch)", "PEFT's rows/s (batch, attention)", "pairs")
    return _table("Scoring", (*columns, "we are times faster", "log-probabilities differ"), rows)


def _grid(results: Mapping[str, Any]) -> str:
    rows = []
    for _, result in _of(results, "grid/"):
        for cell in result["cells"]:
            ours, theirs = cell["sides"]["ours"], cell["sides"]["PEFT"]
            rows.append(
                (
                    _shape(cell["shape"]),
                    result["dtype"],
                    f"{ours['median']:.3f}",
                    f"{theirs['median']:.3f}",
                    f"{ours['tokens_per_second']:,.0f}",
                    f"{theirs['tokens_per_second']:,.0f}",
                    f"{cell['ratio']['value']:.2f} ({_spread(ours, theirs)})",
                    str(cell["pairs"]),
                    _parity(cell["parity"]),
                )
            )
    columns = ("shape", "dtype", "our step, s", "PEFT's step, s", "our text tokens/s", "PEFT's text tokens/s")
    more = ("we are times faster (range)", "pairs", "loss, gradient differ")
    return _table("Over shapes, few pairs each", (*columns, *more), rows)


def _exact(results: Mapping[str, Any]) -> str:
    rows = []
    for _, result in _of(results, "parity/"):
        for name, parity in result["sides"].items():
            side, _, dtype = name.rpartition(" ")
            rows.append(
                (_shape(result["shape"]), _side(side), dtype, f"{parity['loss']:.1e}", f"{parity['gradient']:.1e}")
            )
    columns = ("shape", "side", "dtype", "loss", "prompt gradient")
    return _table("How far one step is from the same in float64", columns, rows)


def _of(results: Mapping[str, Any], prefix: str) -> list[tuple[str, Any]]:
    return [(name, result) for name, result in results.items() if name.startswith(prefix)]


def _side(name: str) -> str:
    return "softprompts" if name == "ours" else name


def _shape(shape: Mapping[str, int]) -> str:
    return f"P={shape['prompt']} B={shape['rows']} T={shape['shortest']}-{shape['longest']}"


def _parity(parity: Mapping[str, float]) -> str:
    text = f"{parity['loss']:.1e}, {parity['gradient']:.1e}"
    if "ours_from_first" not in parity:
        return text
    return f"{text}; from float32: ours {parity['ours_from_first']:.1e}, PEFT's {parity['theirs_from_first']:.1e}"


def _spread(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    ratios = [b / a for a, b in zip(ours["seconds"], theirs["seconds"], strict=True)]
    return f"{min(ratios):.2f} to {max(ratios):.2f}" if len(ratios) > 1 else "one pair"


def _interval(ratio: Mapping[str, Any]) -> str:
    return f"{ratio['value']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
