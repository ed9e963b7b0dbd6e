"""Several runs in one configuration: what is written, what is compared, and what the command says."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

import local
from softprompts.artifacts import artifact
from softprompts.artifacts.io import read_tensors
from softprompts.cli import screen
from softprompts.config import parse, read
from softprompts.config.sweep import grid, sweep
from softprompts.errors import ConfigError
from softprompts.evaluation import evaluate
from softprompts.recipes.run import run as job
from softprompts.training import objectives
from softprompts.training.checkpoint import CHECKPOINT


@pytest.fixture
def values(tmp_path):
    return local.run_values(tmp_path, max_steps=4)


RUNS = [
    {"name": "a", "seed": 1},
    {"name": "b", "seed": 2},
    {"name": "c", "training.learning_rate": 0.1, "prompt": {"num_virtual_tokens": 6}, "task.template": "{text} is"},
]


# What a list of runs means


def test_entries_change_the_run_they_stand_in(values):
    options = {"name": "d", "training": {"objectives": {"other": 0.5}, "warmup_steps": 3}, "task": {"separator": ""}}
    found = sweep(parse({**values, "runs": [*RUNS, options]}))
    assert list(found) == ["a", "b", "c", "d"]
    base = parse(values)
    assert found["a"] == base.model_copy(update={"seed": 1, "output_dir": f"{values['output_dir']}/a"})
    assert (found["c"].training.learning_rate, found["c"].training.max_steps) == (0.1, 4)
    assert (found["c"].prompt.num_virtual_tokens, found["c"].tasks[0].template) == (6, "{text} is")
    assert (found["d"].training.objectives, found["d"].training.warmup_steps) == ({"other": 0.5}, 3)
    assert (found["d"].tasks[0].separator, found["d"].tasks[0].template) == ("", "{text}:")
    assert sweep(base) == {"": base}


def test_lists_are_crossed(values):
    crossed = grid(parse(values), {"seed": [0, 1], "training.learning_rate": [0.05, 1e-5]})
    found = {name: (run.seed, run.training.learning_rate) for name, run in sweep(crossed).items()}
    assert found == {
        "seed0-rate0.05": (0, 0.05),
        "seed0-rate1e-05": (0, 1e-5),
        "seed1-rate0.05": (1, 0.05),
        "seed1-rate1e-05": (1, 1e-5),
    }
    both = grid(parse({**values, "runs": RUNS[1:]}), {"seed": [7]})
    assert {name: run.seed for name, run in sweep(both).items()} == {"b-seed7": 7, "c-seed7": 7}


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        ([{"seed": 1}], r"entry 1 needs a name that can be a folder, given None"),
        ([{"name": "a/b"}], r"needs a name that can be a folder, given 'a/b'"),
        ([{"name": "a"}, {"name": "a"}], r"two entries are called 'a'"),
        (
            [{"name": "a", "training.learning_rat": 1}],
            r"runs 'a': unknown key 'training.learning_rat'; did you mean 'learning_rate'\?",
        ),
        ([{"name": "a", "training": {"learning_rate": "fast"}}], r"runs 'a': training.learning_rate: .*'fast'"),
        ([{"name": "a", "seed.x": 1}], r"seed.x of runs 'a': 'seed' is a value, not a section"),
        ([{"name": "a", "output_dir": "x"}], r"runs 'a': 'output_dir' is set for all of them"),
        ([{"name": "a"}, {"name": "b", "prompt.site": "kv"}], r"'a' and 'b' differ in prompt.site \(input, kv\)"),
        ([{"name": "a"}, {"name": "b", "model.attention": "eager"}], r"differ in model.attention \(None, eager\)"),
        ([{"name": "a", "model.head": "sequence"}, {"name": "b", "model.head": "sequence"}], r"use model.head: lm"),
    ],
)
def test_entries_that_cannot_be(values, runs, words):
    with pytest.raises(ConfigError, match=words):
        job.run(parse({**values, "runs": runs}))


# What is written


def test_every_run_is_written_as_it_would_be_alone(values, tmp_path, monkeypatch):
    without_prompt, original = [], evaluate.evaluate

    def counted(model, *arguments, **options):
        without_prompt.append(options["prompt"] is None)
        return original(model, *arguments, **options)

    monkeypatch.setattr(evaluate, "evaluate", counted)
    results = job.run(parse({**values, "runs": RUNS}))
    assert without_prompt == [
        True,
        True,
        False,
        False,
        False,
    ]  # the stock model once for a and b, and once for c's template
    for name, run in sweep(parse({**values, "runs": RUNS})).items():
        alone = job.run(run.model_copy(update={"output_dir": str(tmp_path / "alone" / name)}))
        here, there = tmp_path / "out" / name, tmp_path / "alone" / name
        assert sorted(p.name for p in here.iterdir()) == sorted(p.name for p in there.iterdir())
        found = json.loads((here / "results.json").read_text())
        assert found["config"]["seed"] == run.seed
        assert [r["loss"] for r in found["curve"]] == pytest.approx([r["loss"] for r in alone["curve"]], rel=1e-5)
        assert found["summary"]["before"]["value"] == alone["summary"]["before"]["value"]
        one, two = artifact.load(here / "prompt"), artifact.load(there / "prompt")
        torch.testing.assert_close(one.prompt, two.prompt, rtol=1e-4, atol=1e-5)
        assert torch.equal(one.initial, two.initial)
        assert one.config["seed"] == run.seed
        assert "runs" not in one.config
    assert json.loads((tmp_path / "out" / "results.json").read_text())["runs"] == results["runs"]


def test_runs_are_compared(values, tmp_path):
    results = job.run(parse({**values, "runs": RUNS}))
    rows = {row["name"]: row for row in results["runs"]}
    assert rows["c"]["differs"] == {
        "prompt.num_virtual_tokens": 6,
        "seed": 0,
        "task.template": "{text} is",
        "training.learning_rate": 0.1,
    }
    for name, row in rows.items():
        own = json.loads((tmp_path / "out" / name / "results.json").read_text())
        assert row["loss"] == own["curve"][-1]["loss"]
        assert row["after"] == own["summary"]["after"]
        assert row["failed"] is None
    (group,) = results["groups"]
    scores = [rows[name]["after"]["value"] for name in ("a", "b")]
    mean = sum(scores) / 2
    assert group["runs"] == ["a", "b"]
    assert (group["n"], group["mean"]) == (2, pytest.approx(mean))
    assert group["sd"] == pytest.approx(sum((s - mean) ** 2 for s in scores) ** 0.5)
    page = (tmp_path / "out" / "report.html").read_text()
    assert re.search(r"<th scope=\"row\">c</th><td>colors</td><td>[^<]*training.learning_rate 0.1", page)
    assert "Over the seeds" in page
    one, two = (str(tmp_path / "out" / name / "prompt") for name in ("a", "b"))
    assert results["next"][-1] == f"softprompts evaluate {one} {two}"
    assert results["next"][0].startswith(f"softprompts predict {one} ")


def test_tasks_of_their_own_train_together(values, tmp_path):
    """Runs may differ in their tasks, also in how many they have."""
    task = values.pop("task")
    other = local.colors(tmp_path / "other.csv", rows=40, seed=5)
    runs = [
        {"name": "one", "task": task},
        {"name": "two", "tasks": [{**task, "name": "x"}, {**task, "name": "y", "source": str(other)}]},
    ]
    results = job.run(parse({**values, "runs": runs}))
    assert [(row["name"], row["task"]) for row in results["runs"]] == [("one", "colors"), ("two", "x"), ("two", "y")]
    assert artifact.load(tmp_path / "out" / "two" / "prompt" / "y").task == "y"


def test_a_run_that_fails_is_named_and_the_others_are_finished(values, call, tmp_path, monkeypatch):
    def poisoned(step):
        poisoned.calls += 1
        return objectives.task(step) * (float("nan") if poisoned.calls > 2 else 1.0)

    poisoned.calls = 0
    monkeypatch.setitem(objectives.OBJECTIVES, "poison", poisoned)
    bad = {"name": "bad", "training.objectives": {"poison": 1.0}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**values, "runs": [*RUNS[:2], bad]}))
    status, out, err = call("train", "--config", tmp_path / "run.yaml")
    assert status == 1
    assert "error: run 'bad' failed: the loss of step 3 is not a number" in err
    assert re.search(r"^bad .* failed$", out, re.M)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [bool(row["failed"]) for row in results["runs"]] == [False, False, True]
    assert results["groups"][0]["runs"] == ["a", "b"]
    assert not (tmp_path / "out" / "bad" / "results.json").exists()
    assert (tmp_path / "out" / "b" / "report.html").is_file()
    assert "failed" in (tmp_path / "out" / "report.html").read_text()


# The command


def test_the_command_takes_lists_of_seeds_and_rates(values, call, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    status, out, err = call("train", "--config", tmp_path / "run.yaml", "--seeds", "0,1", "--rates", "0.1,0.5")
    assert status == 0, err
    names = ["seed0-rate0.1", "seed0-rate0.5", "seed1-rate0.1", "seed1-rate0.5"]
    lines = out.splitlines()
    assert lines[0].endswith("run, what differs, last loss, score (95 % interval)")
    assert [line.split("  ")[0] for line in lines[1:5]] == names
    assert lines[1].split("  ")[1] == "seed 0, training.learning_rate 0.1"
    assert re.fullmatch(r"training.learning_rate 0.1  accuracy 0\.\d{3}  0\.\d{3}  2", lines[6])
    assert err.count("training seed1-rate0.5 4/4 loss") == 1
    assert err.count("evaluating colors before training") == 1
    for name in names:
        assert (tmp_path / "out" / name / "prompt" / "adapter_model.safetensors").is_file()


def test_a_terminal_shows_a_table(capsys, monkeypatch):
    row = {"name": "a", "task": "t", "differs": {"seed": 1}, "loss": 0.5, "metric": "accuracy", "failed": None}
    score = {"value": 0.75, "low": 0.5, "high": 1.0, "illegal": 0}
    group = {"task": "t", "differs": {}, "metric": "accuracy", "mean": 0.5, "sd": 0.25, "n": 2}
    monkeypatch.setattr(screen.out, "_force_terminal", True)
    screen.show_runs({"title": "2 runs", "runs": [{**row, "after": score}], "groups": [group]})
    shown = capsys.readouterr().out
    assert "┃" in shown
    for word in ("what differs", "seed 1", "accuracy 0.750", "0.250"):
        assert word in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--seeds", "0;1"), "--seeds 0;1: write numbers with commas between them, such as 0,1,2"),
        (("--rates", "0.1,x"), "such as 0.05,0.1"),
        (("--seeds", "0,1", "--seed", "3"), "give either --seeds or --seed, not both"),
        (("--seeds", "1,1"), "two entries are called 'seed1'"),
    ],
)
def test_lists_that_cannot_be(values, call, tmp_path, arguments, words):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    status, _, err = call("train", "--config", tmp_path / "run.yaml", *arguments)
    assert status == 1
    assert words in err


def test_interrupted_runs_go_on(values, call, tmp_path, monkeypatch):
    from softprompts.training.trainables import TrainablePrompts

    original = TrainablePrompts.loss

    def interrupted(*arguments):
        interrupted.calls += 1
        if interrupted.calls == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    interrupted.calls = 0
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    whole = job.run(parse({**values, "runs": RUNS[:2], "output_dir": str(tmp_path / "whole")}))
    monkeypatch.setattr(TrainablePrompts, "loss", interrupted)
    command = ("train", "--config", tmp_path / "run.yaml", "--set", f"runs={json.dumps(RUNS[:2])}")
    status, _, err = call(*command)
    assert status == 130
    assert f"the checkpoint is in {tmp_path / 'out'}: the same command continues" in err
    assert not (tmp_path / "out" / "results.json").exists()
    status, _, err = call(*command)
    assert status == 0, err
    assert interrupted.calls == 5
    for name in ("a", "b"):
        one, two = (read_tensors(tmp_path / out / name / CHECKPOINT)[0] for out in ("out", "whole"))
        assert all(torch.equal(one[key], two[key]) for key in two)
    assert [row["loss"] for row in whole["runs"]] == [
        row["loss"] for row in json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    ]


def test_the_example_and_the_page_list_runs_that_can_be():
    root = Path(__file__).parents[1]
    assert list(sweep(read(root / "examples" / "many-prompts.yaml"))) == [
        "words-0",
        "words-1",
        "labels-0",
        "labels-1",
    ]
    (block,) = re.findall(r"^```yaml\n(.*?)^```", (root / "docs" / "many-prompts.md").read_text(), re.M | re.S)
    found = sweep(parse(yaml.safe_load(block)))
    assert (found["long"].prompt.num_virtual_tokens, found["films"].tasks[0].source) == (50, "movies")


def test_names_that_may_be_one_folder_are_refused(values):
    with pytest.raises(ConfigError, match="'a' and 'A', which may be one folder; their names must differ"):
        sweep(parse({**values, "runs": [{"name": "a"}, {"name": "A"}]}))
    with pytest.raises(ConfigError, match="entry 1 needs a name that can be a folder, given ' '"):
        sweep(parse({**values, "runs": [{"name": " "}]}))


def test_next_commands_can_be_pasted_where_a_folder_has_a_space(values, tmp_path):
    values |= {"output_dir": str(tmp_path / "my runs"), "runs": [{"name": "a"}, {"name": "b c", "seed": 1}]}
    lines = [shlex.split(line) for line in job.run(parse(values))["next"]]
    prompts = [str(tmp_path / "my runs" / name / "prompt") for name in ("a", "b c")]
    assert [line[2] for line in lines[:3]] == prompts[:1] * 3
    assert lines[3] == ["softprompts", "evaluate", *prompts]


def test_a_rate_that_the_optimizer_cannot_hold_is_refused(values):
    """Adam's step would not fit a float32, and its error would take the other runs along."""
    runs = [{"name": "a"}, {"name": "b", "training.learning_rate": 1e38, "training.learning_rate_unit": "absolute"}]
    with pytest.raises(
        ConfigError, match=r"runs 'b': training.learning_rate: .* less than or equal to 1000000000 \(given: 1e\+38"
    ):
        sweep(parse({**values, "runs": runs}))


def test_the_largest_rate_that_is_allowed_does_not_break_the_optimizer(values):
    wild = {
        "name": "b",
        "training": {"learning_rate": 1e9, "learning_rate_unit": "absolute", "lr_scheduler_type": "constant"},
    }
    found = job.run(parse({**values, "runs": [{"name": "a"}, wild]}))
    alone = job.run(parse({**values, "output_dir": f"{values['output_dir']}-alone"}))
    assert found["runs"][0]["steps"] == 4
    assert found["runs"][0]["loss"] == pytest.approx(alone["curve"][-1]["loss"], abs=1e-4)
