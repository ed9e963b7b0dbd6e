"""The benchmarks: their arithmetic on known numbers, and the whole of them on tiny models; never a time."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import floor, measure, memory, models, plan, store, table, targets, workload
from benchmarks.floor import Dimensions

ROOT = Path(__file__).parents[1]

SMOLLM2 = Dimensions(
    layers=30,
    matrices=((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)),
    hidden=576,
    vocabulary=49152,
    heads=9,
    head_width=64,
)


# The floor


def test_the_floor_of_a_known_shape():
    needed = floor.operations(SMOLLM2, prompts=[100], texts=[30] * 16, labeled=16)
    assert SMOLLM2.parameters == 106_168_320
    assert needed.blocks == 4 * 106_168_320 * (100 + 480)
    assert needed.head == 4 * 576 * 49152 * 16
    assert needed.floor == 248_122_441_728
    # 5,050 pairs within the prompt, 16 x (30 x 100 + 465) of the texts; 6 products of 2 x 576 operations in 30 layers
    assert needed.attention == (5_050 + 16 * 3_465) * 12 * 576 * 30


def test_every_distinct_prompt_counts_once():
    one, two = (floor.operations(SMOLLM2, prompts, [10] * 4, 4) for prompts in ([20], [20, 20]))
    assert two.blocks - one.blocks == 4 * SMOLLM2.parameters * 20


def test_dimensions_are_read_off_the_model():
    found = floor.dimensions(models.randomly("tiny", "float32", "cpu"))
    attention, mlp = ((32, 32), (16, 32), (16, 32), (32, 32)), ((48, 32), (48, 32), (32, 48))
    assert found == Dimensions(2, attention + mlp, 32, 96, 4, 8)


def test_products_count_what_they_multiply():
    size = floor.dimensions(models.randomly("tiny", "float32", "cpu"))
    count, ways = floor.products(size, tokens=7, dtype="float32", device="cpu")
    assert count == 2 * 7 * size.parameters * 2  # both layers, forward and backward
    assert "linear" in ways
    for go in ways.values():
        go()


# Ratios


def test_a_ratio_is_one_of_medians():
    found = measure.ratio([5.0, 8.0, 7.0], [2.0, 2.0, 90.0])
    assert found.value == 3.5


def test_rounds_are_drawn_together():
    below = [1.0, 4.0, 2.0, 8.0, 3.0]
    assert measure.ratio([3 * x for x in below], below) == measure.Ratio(3.0, 3.0, 3.0)


def test_the_interval_of_two_rounds_is_known():
    # Drawn again, the median is 1 in a quarter of the cases, 2 in a half, 3 in a quarter.
    assert measure.ratio([1.0, 3.0], [1.0, 1.0]) == measure.Ratio(2.0, 1.0, 3.0)


def test_the_interval_leaves_out_what_is_rare():
    # One slow round of 15 is the median of a draw less than once in a million.
    assert measure.ratio([2.0] * 14 + [50.0], [1.0] * 15) == measure.Ratio(2.0, 2.0, 2.0)


@pytest.mark.parametrize(("above", "below"), [([1.0], [1.0, 2.0]), ([], [])])
def test_a_ratio_needs_pairs(above, below):
    with pytest.raises(ValueError, match="as many times above as below"):
        measure.ratio(above, below)


def test_contestants_take_turns():
    ran: list[str] = []
    calls = {name: lambda name=name: ran.append(name) for name in "abc"}
    seconds = measure.interleave(calls, 4)
    assert "".join(ran) == "abc" + "acb" + "cab" + "cba"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 4, "b": 4, "c": 4}


def test_a_contestant_may_not_change_the_threads():
    before = torch.get_num_threads()
    try:
        with pytest.raises(RuntimeError, match="thief changed torch's threads"):
            measure.interleave({"thief": lambda: torch.set_num_threads(before + 1)}, 1)
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not memory.STATUS.exists(), reason="peak memory of a process is read from Linux")
def test_the_peak_is_above_what_was_there():
    watch = memory.watch("cpu")
    kept = torch.ones(64 * memory.MIB // 4)
    del kept
    found = watch()
    assert 60 <= found["of_steps"] <= 100
    assert found["above"] >= found["of_steps"]


# What is read


def test_rows_have_one_label_and_the_lengths_asked_for():
    shape = workload.Shape(prompt=4, rows=200, shortest=20, longest=40)
    rows = workload.rows(shape, 1000, "causal")
    assert {len(row.ids) for row in rows} == set(range(20, 41))
    assert all(row.labels == [-100] * (len(row.ids) - 1) + row.ids[-1:] for row in rows)
    assert min(min(row.ids) for row in rows) >= 100
    assert rows == workload.rows(shape, 1000, "causal")
    assert rows != workload.rows(shape, 1000, "causal", seed=1)


def test_texts_have_a_token_a_word_and_answers_begin_none_other():
    tokenizer = models.tokenizer("tiny")
    lengths = [len(tokenizer(text)["input_ids"]) for text in workload.texts(tokenizer, 50, 3, 6)]
    assert set(lengths) == {3, 4, 5, 6}
    answers = workload.answers(tokenizer, [1, 2, 3])
    assert [len(answer.split()) for answer in answers] == [1, 2, 3]
    assert len({answer.split()[0] for answer in answers}) == 3


def test_the_plan_covers_the_grid_and_fits_the_time():
    whole = plan.plan(plan.Options())
    cells = {
        (row.arguments["prompt"], *cell, row.arguments["dtype"])
        for row in whole
        if row.group == "grid"
        for cell in row.arguments["cells"]
    }
    assert cells == {
        (p, b, t, d) for p in (20, 100) for b in (8, 16, 32) for t in (32, 128) for d in ("float32", "bfloat16")
    }
    assert {target.measurement for target in targets.TARGETS} <= {row.name for row in whole}
    assert sum(row.minutes for row in whole) <= 40
    with pytest.raises(ValueError, match="unknown rows 'steps'; possible: step, loops"):
        plan.plan(plan.Options(), ("steps",))


# What counts as reached


def results(value, low, high, pairs=15):
    return {"step/p100": {"pairs": pairs, "ratios": {"float32": {"value": value, "low": low, "high": high}}}}


def verdict(target, found):
    return targets._verdict(target, found[target.measurement])


def test_a_goal_is_reached_by_the_unfavorable_end():
    least = targets.Target("speed", "step/p100", ("ratios", "float32"), 4.5)
    assert verdict(least, results(4.7, 4.5, 4.9)).reached
    assert not verdict(least, results(4.7, 4.4, 4.9)).reached
    assert not verdict(least, results(4.7, 4.5, 4.9, pairs=14)).reached
    most = targets.Target("floor", "step/p100", ("ratios", "float32"), 1.7, least=False)
    assert verdict(most, results(1.6, 1.5, 1.7)).reached
    assert not verdict(most, results(1.6, 1.5, 1.8)).reached


def test_a_share_of_the_time_is_the_inverse_of_the_speed():
    target = targets.Target("T5", "step/p100", ("ratios", "float32"), 1.05, least=False, inverse=True)
    found = verdict(target, results(1.0, 0.8, 1.25))
    assert found.ratio == measure.Ratio(1.0, 0.8, 1.25)
    assert not found.reached
    assert verdict(target, results(1.25, 1.0, 2.0)).reached


# Results and pages


def test_tables_stand_between_the_comments_and_nowhere_else(tmp_path):
    page = tmp_path / "speed.md"
    page.write_text((ROOT / "docs" / "speed.md").read_text(encoding="utf-8"), encoding="utf-8")
    before = page.read_text(encoding="utf-8")
    table.into(page, "first")
    table.into(page, "second")
    begin, end = before.index(table.BEGIN), before.index(table.END)
    wanted = before[:begin] + f"{table.BEGIN}\nsecond\n" + before[end:]
    assert page.read_text(encoding="utf-8") == wanted
    page.write_text("no comments", encoding="utf-8")
    with pytest.raises(ValueError, match="put both where the tables belong"):
        table.into(page, "third")


def test_results_of_other_settings_are_not_gone_on_with(tmp_path):
    file = tmp_path / "results.json"
    kept = store.begin(file, plan.settings(plan.Options()), resume=False)
    store.add(file, kept, "a", {"x": 1})
    again = store.begin(file, plan.settings(plan.Options()), resume=True)
    assert again["results"] == {"a": {"x": 1}}
    with pytest.raises(store.StoreError, match="made with pairs 15, now it is 3"):
        store.begin(file, plan.settings(plan.Options(pairs=3)), resume=True)
    assert store.begin(file, plan.settings(plan.Options(pairs=3)), resume=False)["results"] == {}


# All of it, on tiny models


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The file with the results of the quick run, and what was printed."""
    file = tmp_path_factory.mktemp("bench") / "results.json"
    return file, bench("--quick", "--threads", "1", "--out", str(file)).stdout


@pytest.fixture(scope="module")
def measured(quick: tuple[Path, str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(quick[0].read_text(encoding="utf-8"))["results"]
    return found


@pytest.mark.slow
def test_every_measurement_is_there(measured):
    assert list(measured) == [row.name for row in plan.plan(plan.Options(quick=True))]
    step = measured["step/p4"]
    assert {"ours float32", "PEFT float32", "ours bfloat16", "PEFT bfloat16"} <= set(step["sides"])
    assert {"float32", "bfloat16", "best"} <= set(step["ratios"])
    assert {len(side["seconds"]) for side in step["sides"].values()} == {2}
    assert set(step["attention"]) == set(step["floor"]) == {"float32", "bfloat16"}
    assert set(measured["memory/float32"]["mib"]) == {"ours", "PEFT"}
    assert [cell["shape"]["rows"] for cell in measured["grid/float32/p4"]["cells"]] == [2, 4]
    assert sorted(measured["scoring/float32"]["several"]["labels"].values()) == [2, 3]


@pytest.mark.slow
def test_the_floor_is_the_formula_over_the_best_rate(measured):
    step = measured["step/p4"]
    rows = workload.rows(workload.Shape(4, 3, 3, 6), 96, "causal")
    size = floor.dimensions(models.randomly("tiny", "float32", "cpu"))
    needed = floor.operations(size, [4], [len(row.ids) for row in rows], 3)
    for dtype in ("float32", "bfloat16"):
        found = step["floor"][dtype]
        assert found["operations"] == vars(needed)
        assert found["seconds"] == pytest.approx(needed.floor / max(found["rates"].values()))
        assert found["ratio"]["value"] == pytest.approx(step["sides"][f"ours {dtype}"]["median"] / found["seconds"])


@pytest.mark.slow
def test_both_sides_compute_the_same(measured):
    steps = [measured[name] for name in ("step/p4", "shapes/tiny-t5", "shapes/tiny-bert")]
    exact = [step["parity"]["float32"] for step in steps]
    exact += [cell["parity"] for cell in measured["grid/float32/p4"]["cells"]]
    assert all(parity["loss"] < 1e-5 and parity["gradient"] < 1e-4 for parity in exact)
    half = measured["step/p4"]["parity"]["bfloat16"]
    assert half["loss"] < 1e-2
    assert half["ours_from_first"] < 2 * half["theirs_from_first"]
    for name in ("single", "several"):
        assert measured["scoring/float32"][name]["parity"] < 1e-4
        assert measured["scoring/bfloat16"][name]["parity"] < 0.1


@pytest.mark.slow
def test_both_sides_are_near_float64(measured):
    found = measured["parity/float64"]["sides"]
    for side in ("ours", "PEFT"):
        assert found[f"{side} float32"]["loss"] < 1e-5
        assert found[f"{side} float32"]["gradient"] < 1e-4
        assert 1e-4 < found[f"{side} bfloat16"]["gradient"] < 0.1


@pytest.mark.slow
def test_the_prompt_is_shared_where_it_can_be(measured):
    assert set(measured["step/p4"]["paths"].values()) <= {"packed", "shared"}
    assert measured["shapes/tiny-bert"]["paths"]["float32"].startswith("concatenation")


@pytest.mark.slow
def test_tables_say_what_they_are(quick):
    _, printed = quick
    titles = ("Figures to reach", "Training steps", "The floor", "Memory of five steps", "Scoring", "Over shapes")
    assert all(f"**{title}" in printed for title in titles)
    assert "these figures mean nothing" in printed
    assert "too few pairs" in printed


@pytest.mark.slow
def test_resuming_measures_only_what_is_missing(quick, tmp_path):
    stored = json.loads(quick[0].read_text(encoding="utf-8"))
    stored["results"].pop("shapes/tiny-bert")
    kept = dict(stored["results"])
    file = tmp_path / "results.json"
    file.write_text(json.dumps(stored), encoding="utf-8")
    said = bench("--quick", "--threads", "1", "--resume", "--out", str(file)).stderr
    assert "[1/1] shapes/tiny-bert" in said
    found = json.loads(file.read_text(encoding="utf-8"))["results"]
    assert "shapes/tiny-bert" in found
    assert {name: found[name] for name in kept} == kept


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
def test_both_sides_compute_the_same_on_a_gpu(tmp_path):
    file = tmp_path / "results.json"
    bench("--quick", "--threads", "1", "--device", "cuda", "--rows", "step,memory", "--out", str(file))
    found = json.loads(file.read_text(encoding="utf-8"))["results"]
    parity = found["step/p4"]["parity"]["float32"]
    assert parity["loss"] < 1e-5
    assert parity["gradient"] < 1e-3  # products in TF32 or in another order
    assert set(found["step/p4"]["floor"]["float32"]["rates"]) == {"linear"}
    assert found["memory/float32"]["mib"]["ours"]["above"] > 0
