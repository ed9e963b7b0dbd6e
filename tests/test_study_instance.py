"""The study of prompts that look at the input, on a tiny model: what is compared, what is reused, what is said."""

import json
import statistics
import types
from pathlib import Path

import pytest
import yaml
from studies.instance_prompts import Study, execute
from studies.instance_prompts.plan import ARMS, COMPARED
from studies.instance_prompts.summary import _mean_of_arms, page_of, verdict

import local
from softprompts.config import parse
from softprompts.errors import ConfigError, DataError
from softprompts.recipes import comparison
from softprompts.recipes.run.prepare import ProgressReporter
from softprompts.training.trainables import TrainableClassifier, TrainablePrompts

TRAINED = [
    "prompt-tuning",
    "prefix",
    "p-tuning",
    "ipt-lookup",
    "ipt-pretrained",
    "ipt-encoder",
    "idpg-s",
    "idpg-m",
    "spt",
]


def study_values(folder: Path) -> dict:
    """Two tasks, all arms and LoRA, with all rows and with few, on a tiny model."""
    split = {"validation_fraction": 0.2, "test_fraction": 0.2}
    tasks = []
    for i, name in enumerate(("alpha", "beta")):
        file = local.colors(folder / f"{name}.csv", rows=60, seed=i)
        tasks.append({"source": str(file), "name": name, "template": "The words: {text}\nThe answer:", "split": split})
    train = {"max_steps": 2, "batch_size": 4}
    small = {"options": {"hidden": 16, "phm": 4, "encoder": "static"}}
    return {
        "model": {"name": str(local.model_directory(folder / "llama")), "dtype": "float32", "threads": 1},
        "prompt": {"num_virtual_tokens": 6},
        "tasks": tasks,
        "own": {
            "idpg-s": {"about": "small", "prompt": {"method": "idpg", **small}, "follow": {"output": 0.1}},
            "idpg-m": {
                "about": "small",
                "prompt": {"method": "idpg", "site": "layers", "mode": "add", **small},
                "learning_rates": [0.2],
            },
            "spt": {"about": "small", "prompt": {"method": "spt-reconstruction", "options": {"bank": 50, "k": 2}}},
        },
        "upper": ["lora"],
        "compare": {
            "training": train,
            "few": train,
            "shots": [None, 2],
            "seeds": [0, 1],
            "learning_rates": [0.1, 0.3],
            "tune_on": ["alpha"],
            "weight_learning_rates": {"lora": [0.01]},
            "weight_targets": ["beta"],
        },
        "pretrain": {
            "task": {**tasks[0], "template": "{text}"},
            "training": {"max_steps": 2, "batch_size": 8, "learning_rate": 0.1},
        },
        "speed": {"steps": 3, "repeats": 2},
        "evaluation": {"resamples": 100},
        "output_dir": str(folder / "out"),
    }


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A study that was carried out."""
    values = study_values(tmp_path_factory.mktemp("instance"))
    return values, execute(parse(values, Study))


def page(values: dict, *parts: str) -> dict:
    return json.loads(Path(values["output_dir"], *parts, "results.json").read_text())


def test_every_arm_has_a_line_at_every_size(done):
    values, results = done
    assert list(COMPARED) == TRAINED
    for size in results["arms"]:
        assert [line["arm"] for line in size["lines"]] == ["no prompt", *TRAINED, "lora"]
        for line in size["lines"][1:]:
            assert set(line["scores"]) == ({"beta"} if line["arm"] == "lora" else {"alpha", "beta"})
    assert [size["size"] for size in results["arms"]] == ["full", "2-shot"]
    assert json.loads(Path(values["output_dir"], "results.json").read_text())["arms"] == json.loads(
        json.dumps(results["arms"])
    )


def test_scores_are_those_of_the_runs_at_the_rate_that_validation_chose(done):
    values, results = done
    chosen = {(one["arm"], one["size"]): one for one in results["rates"]}
    for size, name in ((0, "full"), (1, "2-shot")):
        for arm in TRAINED:
            one = chosen[arm, name]
            assert set(one["tried"]) == ({"0.2"} if arm == "idpg-m" else {"0.1", "0.3"})
            for rate, score in one["tried"].items():
                run = page(values, "tasks", f"alpha-{name}", "rates", arm, f"{arm}-rate{rate}-seed0")
                assert score == run["validation"][-1]["value"]
            assert one["rate"] == max(map(float, one["tried"]), key=lambda r: (one["tried"][f"{r:g}"], -r))
            cells = [f"{arm}-rate{one['rate']:g}-seed{seed}" for seed in (0, 1)]
            each = [
                page(values, "tasks", f"beta-{name}", "seeds", arm, cell)["summary"]["after"]["value"] for cell in cells
            ]
            line = next(line for line in results["arms"][size]["lines"] if line["arm"] == arm)
            assert line["scores"]["beta"]["mean"] == pytest.approx(statistics.fmean(each))
            assert line["scores"]["beta"]["sd"] == pytest.approx(statistics.stdev(each))


def test_arms_train_what_they_say(done):
    values, results = done
    for arm in TRAINED:
        rate = next(one["rate"] for one in results["rates"] if (one["arm"], one["size"]) == (arm, "full"))
        run = page(values, "tasks", "beta-full", "seeds", arm, f"{arm}-rate{rate:g}-seed1")["config"]
        known = parse(values, Study).known[arm]
        for key, value in known.prompt.items():
            found = run["prompt"][key]
            assert found == value or key == "options", (arm, key)
        assert run["training"]["learning_rates"] == pytest.approx(
            {group: share * rate for group, share in known.follow.items()}
        )
        assert run["training"]["learning_rate"] == rate
        assert run["prompt"]["num_virtual_tokens"] == 6
        state = run["prompt"]["init"]["state"]
        assert state == (str(Path(values["output_dir"], "pretrain", arm, "prompt")) if known.pretrain else None)
    for name, seed in (("alpha-2-shot", 1), ("beta-2-shot", 1)):
        rate = next(one["rate"] for one in results["rates"] if (one["arm"], one["size"]) == ("spt", "2-shot"))
        run = page(values, "tasks", name, "seeds", "spt", f"spt-rate{rate:g}-seed{seed}")
        assert run["config"]["tasks"][0]["split"]["shots_seed"] == seed
        assert run["rows"]["train"] == 4


def test_the_arms_that_are_not_asked_for_can_be(tmp_path):
    """Every other arm trains what it says, beside one that is there anyway."""
    more = [name for name in ARMS if name not in COMPARED]
    values = study_values(tmp_path)
    few = {"shots": [2], "seeds": [0], "learning_rates": [0.2], "tune_on": ["alpha"]}
    values |= {"arms": ["prompt-tuning", *more], "upper": [], "speed": None, "tasks": values["tasks"][:1]}
    values["compare"] = {"training": {"max_steps": 2, "batch_size": 4}, "few": {"max_steps": 2, "batch_size": 4}, **few}
    results = execute(parse(values, Study))
    lines = {line["arm"]: line for line in results["arms"][0]["lines"]}
    assert list(lines) == ["no prompt", "prompt-tuning", *more]
    network = 6 * 32 + 128 * 33 + 96 * 129
    residual = 6 * 32 + 800 * 65 + 3 * 32
    sizes = {"prefix-network": network, "p-tuning-v2": 6 * 96, "residual": residual, "low-rank": 5 * (6 + 32)}
    sizes["dept"] = 12 * 32 + (48 + 32) * 7
    assert {name: lines[name]["trainable"] for name in more} == sizes
    for name in more:
        run = page(values, "tasks", "alpha-2-shot", "rates", name, f"{name}-rate0.2-seed0")
        assert run["summary"]["moved"] > 0
        assert run["config"]["training"]["learning_rate"] == 0.2
        for group, share in ARMS[name].follow.items():
            assert run["config"]["training"]["learning_rates"][group] == pytest.approx(0.2 * share)


def test_step_times_are_medians_of_all_but_first_steps(done):
    values, results = done
    assert list(results["speed"]) == [*TRAINED, "lora"]
    for arm, one in results["speed"].items():
        each = [step["seconds"] for turn in (0, 1) for step in page(values, "speed", f"{arm}-{turn}")["curve"][1:]]
        assert len(each) == one["n"] == 4
        assert one["ms"] == pytest.approx(1000 * statistics.median(each))


def test_what_training_moved_is_told(done):
    """Of a table only the rows of words that were read."""
    _, results = done
    trained = {line["arm"]: line["trainable"] for line in results["arms"][0]["lines"]}
    for moved in (results["moved"]["full"], results["moved"]["2-shot"]):
        assert moved["prompt-tuning"] == trained["prompt-tuning"]
        assert moved["ipt-lookup"] < trained["ipt-lookup"] / 2
        assert "lora" not in moved
    cells = {
        size["size"]: table["rows"] for size, table in zip(results["arms"], page_of(results)["tables"], strict=False)
    }
    for size, rows in cells.items():
        assert {row[0]: row[4] for row in rows}["ipt-lookup"] == f"{results['moved'][size]['ipt-lookup']:,.0f}"


def test_what_moved_is_counted_for_each_size():
    def one(moved):
        return comparison.ArmResult(comparison.ArmRun("arm", 0.1, 0), [{"summary": {"moved": moved}}])

    found = {("a", None): [one(10), one(30)], ("a", 16): [one(4)], ("b", None): [one(None), one(50)]}
    filled = types.SimpleNamespace(results=found)
    assert _mean_of_arms(filled, "moved", [None]) == {"arm": 30}
    assert _mean_of_arms(filled, "moved", [16]) == {"arm": 4}
    assert _mean_of_arms(filled, "moved", [None, 16]) == {"arm": 23.5}


def test_nothing_is_done_twice_and_what_changed_is_done_anew(done):
    values, results = done
    said: list[str] = []
    again = execute(parse(values, Study), ProgressReporter(log=said.append))
    assert again["arms"] == results["arms"]
    assert again["speed"] == results["speed"]
    assert not [line for line in said if "steps" in line and "runs" in line]
    said.clear()
    values = {
        **values,
        "pretrain": {**values["pretrain"], "training": {"max_steps": 3, "batch_size": 8, "learning_rate": 0.1}},
    }
    execute(parse(values, Study), ProgressReporter(log=said.append))
    anew = {line.partition(":")[0] for line in said if line.endswith("it runs again")}
    assert anew == {
        "pretraining of ipt-pretrained",
        *(f"step time of ipt-pretrained, turn {turn}" for turn in (1, 2)),
        *(f"alpha {size}, ipt-pretrained, {part}" for size in ("full", "2-shot") for part in ("rates", "seeds")),
        *(f"beta {size}, ipt-pretrained, seeds" for size in ("full", "2-shot")),
    }
    said.clear()
    values = {**values, "pretrain": {**values["pretrain"], "training": results["config"]["pretrain"]["training"]}}
    back = execute(parse(values, Study), ProgressReporter(log=said.append))
    assert not [line for line in said if line.endswith("it runs again") or " steps" in line], (
        "what was finished is kept"
    )
    assert back["arms"] == results["arms"]


def small(values: dict, folder: Path) -> dict:
    """The same study with three arms on one task, one of them taught first, and without timed steps."""
    arms = ["prompt-tuning", "ipt-pretrained", "idpg-m"]
    compare = {**values["compare"], "shots": [2], "learning_rates": [0.1]}
    return {**values, "arms": arms, "upper": [], "speed": None, "compare": compare, "output_dir": str(folder)}


@pytest.mark.parametrize("at", [2, 5])
def test_an_interrupted_study_goes_on_to_the_same_results(done, tmp_path, monkeypatch, at):
    """Cut in the second step of pretraining, and in the first run of the second arm."""
    values, _ = done
    expected = execute(parse(small(values, tmp_path / "whole"), Study))
    pretraining, training, steps = TrainableClassifier.loss, TrainablePrompts.loss, 0

    def cut(loss, trainable, batches):
        nonlocal steps
        steps += 1
        if steps == at:
            raise KeyboardInterrupt
        return loss(trainable, batches)

    monkeypatch.setattr(TrainableClassifier, "loss", lambda *arguments: cut(pretraining, *arguments))
    monkeypatch.setattr(TrainablePrompts, "loss", lambda *arguments: cut(training, *arguments))
    with pytest.raises(KeyboardInterrupt):
        execute(parse(small(values, tmp_path / "out"), Study))
    monkeypatch.undo()
    found = execute(parse(small(values, tmp_path / "out"), Study))
    assert found["arms"] == expected["arms"]
    assert found["curves"] == expected["curves"]


def test_numbers_times_and_scores_stand_in_one_table(done):
    _, results = done
    for table, size in zip(page_of(results)["tables"], results["arms"], strict=False):
        columns = table["columns"]
        assert columns == [
            *("arm", "what it is", "trained numbers", "of the model's", "moved by training", "step, ms"),
            *("step over prompt tuning's", "alpha (accuracy)", "beta (accuracy)", "mean"),
        ]
        assert [row[0] for row in table["rows"]] == ["no prompt", *TRAINED, "lora"]
        for row, line in zip(table["rows"][1:-1], size["lines"][1:], strict=False):
            assert None not in row
            assert row[2] == line["trainable"]
            assert row[columns.index("beta (accuracy)")] == line["scores"]["beta"]
            assert row[5] == f"{results['speed'][row[0]]['ms']:.0f}"
        assert table["rows"][1][6] == "1.00"


def test_the_command_says_how_far_each_arm_came(call_study, done, tmp_path):
    values = small(done[0], tmp_path / "out")
    values |= {"arms": ["prompt-tuning", "idpg-m"], "pretrain": None, "speed": {"steps": 2, "repeats": 1}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(values))
    status, out, err = call_study("instance", "--config", tmp_path / "study.yaml", "--out", tmp_path / "o")
    assert status == 0, err
    results = json.loads((tmp_path / "o/results.json").read_text())
    assert results["claims"]["2-shot"]["words"] in out
    assert f"{results['speed']['idpg-m']['ms']:.0f}" in out
    assert str(tmp_path / "o/report.html") in out
    status, _, err = call_study("instance", "--config", tmp_path / "study.yaml", "--set", "compare.rate=[1]")
    assert status == 1
    assert "unknown key" in err


def test_verdict():
    """A gap is clear where it is larger than both spreads together; only tasks that both have count."""

    def line(arm: str, **scores: tuple[float, float | None]) -> dict:
        return {"arm": arm, "scores": {task: {"mean": mean, "sd": sd} for task, (mean, sd) in scores.items()}}

    lines = [
        line("no prompt", a=(0.1, None), b=(0.1, None)),
        line("prompt-tuning", a=(0.5, 0.02), b=(0.6, 0.01)),
        line("good", a=(0.6, 0.03), b=(0.62, 0.02)),
        line("half", b=(0.5, None)),
    ]
    found = verdict({"size": "full", "lines": lines})
    assert found["over"] == {
        "good": {"over": pytest.approx(0.06), "clear": 1, "of": 2},
        "half": {"over": pytest.approx(-0.1), "clear": 0, "of": 1},
    }
    assert "good +0.060 (1 of 2), half -0.100 (0 of 1)" in found["words"]
    assert verdict({"size": "full", "lines": lines[:2]})["over"] == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ["prompt-tunning"]}, "arms: 'prompt-tunning' is unknown; did you mean 'prompt-tuning'"),
        ({"upper": ["adapter"]}, "upper: 'adapter' is unknown"),
        ({"pretrain": None}, "arm 'ipt-pretrained' begins at what was pretrained; give the section pretrain"),
        ({"prompt": {"num_virtual_tokens": 6, "method": "idpg"}}, "prompt.method is set by each arm"),
        ({"compare": {"shots": [0]}}, "leave 0 out"),
        ({"compare": {"tune_on": ["gamma"]}}, "compare.tune_on: 'gamma' is unknown"),
        ({"compare": {"weight_learning_rates": {"fine-tuning": [1e-3]}}}, "arm 'lora' needs rates"),
        ({"model": {"head": "sequence"}}, "share a language model's head, not 'sequence'"),
        ({"arms": ["prompt-tuning", "prompt-tuning"]}, "arms: .*each value may be listed once"),
        ({"upper": ["lora", "lora"]}, "upper: .*each value may be listed once"),
        ({"compare": {"weight_learning_rates": {"lora": [0.01, 0.01]}}}, "each value may be listed once"),
        ({"own": {"spt": {"learning_rates": [0.1, 0.1]}}}, "each value may be listed once"),
        ({"own": {"lora": {"prompt": {"method": "residual"}}}}, "own: 'lora' is another line of the table"),
        ({"own": {"no prompt": {}}}, "own: 'no prompt' is another line of the table"),
        ({"compare": {"training": {"max_steps": 0}}}, "training.max_steps must be at least 1"),
        (
            {"compare": {"few": {"learning_rate": 0.2}}},
            "compare.few.learning_rate: arms try the rates of compare.learning_rates",
        ),
        (
            {"compare": {"training": {"learning_rates": {"codes": 0.1}}}},
            "compare.training.learning_rates: arms try the rates of compare.learning_rates",
        ),
    ],
)
def test_a_plan_that_cannot_be_is_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        parse({**study_values(tmp_path), **changes}, Study)


def test_own_arms_change_what_they_name(tmp_path):
    """An arm of a known name is that arm with what is set; the stored plan can be given again."""
    own = {"ipt-encoder": {"learning_rates": [0.01]}, "mine": {"about": "of my own", "prompt": {"method": "residual"}}}
    study = parse({**study_values(tmp_path), "own": own}, Study)
    assert study.known["ipt-encoder"] == ARMS["ipt-encoder"].model_copy(update={"learning_rates": (0.01,)})
    assert study.known["mine"] == study.own["mine"]
    assert {name: arm for name, arm in study.known.items() if name not in own} == {
        name: arm for name, arm in ARMS.items() if name not in own
    }
    assert parse(study.model_dump(mode="json"), Study).known == study.known


def test_a_rate_can_be_chosen_whatever_is_evaluated_on_the_way(tmp_path):
    train = {"max_steps": 3, "batch_size": 4, "eval_steps": 5}
    values = {**study_values(tmp_path), "compare": {"training": train, "few": train, "weight_max_steps": [2, 9]}}
    stage = parse(values, Study).compare
    assert [stage.training_for(shots).eval_steps for shots in (None, 16)] == [3, 3]
    assert [stage.training_for(shots, weights=True).eval_steps for shots in (None, 16)] == [2, 5]
    assert stage.training_for(0).eval_steps is None


@pytest.mark.parametrize("first", ["prompt-tuning", "ipt-pretrained"])
def test_every_task_is_read_before_any_training(tmp_path, first):
    values = small(study_values(tmp_path), tmp_path / "out") | {"arms": [first, "idpg-m"]}
    values["tasks"][1]["template"] = "{words}"
    with pytest.raises(DataError, match="no column 'words'"):
        execute(parse(values, Study))
    assert not Path(values["output_dir"]).exists() or not list(Path(values["output_dir"]).rglob("prompt"))


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"prompt": {"method": "idpg", "options": {"hidden": 15, "phm": 4}}}, "15"),
        ({"prompt": {"method": "prefix-tuning"}}, "cannot be used at site 'input'"),
        ({"prompt": {"method": "spt-reconstruction", "options": {"bank": 50, "k": 7}}}, "7"),
    ],
)
def test_an_arm_that_cannot_be_is_refused_before_any_training(tmp_path, own, message):
    values = study_values(tmp_path) | {"arms": ["prompt-tuning", "odd"], "own": {"odd": {"about": "odd", **own}}}
    with pytest.raises(ConfigError, match=message):
        execute(parse(values, Study))
    assert not Path(values["output_dir"], "tasks").exists()
    assert not Path(values["output_dir"], "speed").exists()
