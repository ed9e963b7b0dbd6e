"""The recipe of multitask prompt tuning on a tiny model: stages, what is reused, what is refused, the page."""

import json
import math
import statistics
from pathlib import Path

import pytest
import torch
import yaml

import local
from softprompts import cli
from softprompts.artifacts import artifact
from softprompts.artifacts.vectors import similarity
from softprompts.config import parse
from softprompts.errors import ArtifactError, BackboneError, ConfigError, DataError, TrainingError
from softprompts.recipes.comparison import ALL_TARGETS, ArmResult, ArmRun, Comparison
from softprompts.recipes.multitask import Plan, execute
from softprompts.recipes.multitask.plan import Origins, select_arms, source_runs, target_run, teacher_runs
from softprompts.recipes.multitask.stages import summarize
from softprompts.recipes.run import run as job
from softprompts.recipes.run.prepare import ProgressReporter
from softprompts.training import backbone_weights, distillation
from softprompts.training.trainables import TrainablePrompts

FROZEN = ["prompt-tuning", "spot-mixture", "spot-weighted", "attempt", "mpt", "mpt-no-decomposition", "mpt-together"]


def plan_values(folder: Path) -> dict:
    """Two sources and two targets on a tiny model, a few steps each."""
    tasks = []
    for i, name in enumerate(("alpha", "beta", "gamma", "delta")):
        file = local.colors(folder / f"{name}.csv", rows=60, seed=i)
        split = {"validation_fraction": 0.2, "test_fraction": 0.2}
        tasks.append({"source": str(file), "name": name, "template": "{text}:", "split": split})
    train = {"max_steps": 4, "batch_size": 4, "learning_rate": 0.3}
    return {
        "model": {"name": str(local.model_directory(folder / "llama")), "dtype": "float32", "threads": 1},
        "prompt": {"num_virtual_tokens": 4},
        "sources": tasks[:2],
        "targets": tasks[2:],
        "teachers": {"training": train},
        "source": {"training": {**train, "sampling": {"draw": "some"}}},
        "target": {
            "training": train,
            "few": train,
            "shots": [None, 2],
            "seeds": [0, 1],
            "learning_rates": [0.1, 0.3],
            "arms": FROZEN,
            "few_arms": ["prompt-tuning", "mpt"],
            "probe_steps": 2,
            "nearest": 2,
        },
        "evaluation": {"resamples": 100},
        "output_dir": str(folder / "out"),
    }


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A plan that was carried out, with what it said."""
    values = plan_values(tmp_path_factory.mktemp("recipe"))
    said: list[str] = []
    results = execute(parse(values, Plan), ProgressReporter(log=said.append))
    return values, results, said


def test_every_arm_has_a_line_with_mean_and_spread(done):
    _, results, _ = done
    full, few = results["arms"]
    assert [line["arm"] for line in full["lines"]] == ["no prompt", *FROZEN]
    assert [line["arm"] for line in few["lines"]] == ["no prompt", "prompt-tuning", "mpt"]
    for line in full["lines"][1:]:
        assert set(line["scores"]) == {"gamma", "delta"}
        assert all(score["n"] == 2 and score["sd"] is not None for score in line["scores"].values())
        assert line["mean"] == pytest.approx(statistics.fmean(s["mean"] for s in line["scores"].values()))
    numbers = {line["arm"]: line["trainable"] for line in full["lines"]}
    assert numbers["prompt-tuning"] == 4 * 32
    assert numbers["mpt"] == 4 * 32 + 4 + 32
    assert numbers["mpt-together"] == (4 * 32 + 2 * (4 + 32)) // 2
    assert numbers["spot-mixture"] == numbers["mpt-no-decomposition"] == numbers["prompt-tuning"]


def test_the_table_holds_the_runs_own_scores(done):
    values, results, _ = done
    out = Path(values["output_dir"])
    rate = next(one["rate"] for one in results["rates"] if (one["arm"], one["size"]) == ("mpt", "full"))
    tried = next(one["tried"] for one in results["rates"] if (one["arm"], one["size"]) == ("mpt", "full"))
    assert rate == max(map(float, tried), key=lambda r: (tried[f"{r:g}"], -r))
    for one in (0.1, 0.3):  # chosen on validation rows, not on test rows
        pages = [
            json.loads((out / f"targets/{target}-full/rates/mpt-rate{one:g}-seed0/results.json").read_text())
            for target in ("gamma", "delta")
        ]
        assert tried[f"{one:g}"] == pytest.approx(statistics.fmean(p["validation"][-1]["value"] for p in pages))
    scores = []
    for part, seed in (("rates", 0), ("seeds", 1)):
        page = json.loads((out / "targets/gamma-full" / part / f"mpt-rate{rate:g}-seed{seed}/results.json").read_text())
        scores.append(page["summary"]["after"]["value"])
    line = next(line for line in results["arms"][0]["lines"] if line["arm"] == "mpt")
    assert line["scores"]["gamma"]["mean"] == pytest.approx(statistics.fmean(scores))
    assert line["scores"]["gamma"]["sd"] == pytest.approx(statistics.stdev(scores))


def page_of(task: str, before: float, after: float, trainable: int = 10) -> dict:
    """What the table takes from a run's results.json."""
    scores = {"before": {"value": before}, "after": {"value": after}, "metric": "accuracy", "trainable": trainable}
    validation = [{"step": 2, "value": 0.7}, {"step": 4, "value": 0.6}]
    return {
        "task": task,
        "summary": scores,
        "validation": validation,
        "curve": [{"step": 1, "loss": after}],
        "machine": {},
    }


def test_lines_are_means_over_seeds_after_training(tmp_path):
    """The stock model's line is that of frozen runs, a failed run counts nowhere, and a mean needs every target."""
    plan = parse(plan_values(tmp_path), Plan)
    found = {
        ("gamma", 2): [
            ArmResult(ArmRun("lora", 1.0, 0), [page_of("gamma", 0.9, 0.99, 7)]),
            ArmResult(ArmRun("prompt-tuning", 0.1, 0), [page_of("gamma", 0.2, 0.5)]),
            ArmResult(ArmRun("prompt-tuning", 0.1, 1), [page_of("gamma", 0.2, 0.7)]),
            ArmResult(ArmRun("prompt-tuning", 0.1, 2), []),
        ],
        ("delta", 2): [ArmResult(ArmRun("prompt-tuning", 0.1, 0), [page_of("delta", 0.3, 0.4)])],
        (ALL_TARGETS, 2): [
            ArmResult(ArmRun("mpt-together", 0.1, 0), [page_of("gamma", 0.2, 0.6), page_of("delta", 0.3, 0.8)]),
        ],
    }
    origins = Origins({}, {}, {})
    filled = Comparison(plan.target, lambda *_: [], results=found)
    similar = {"a": torch.ones(2, 2), "b": -torch.ones(2, 2)}
    results = summarize(plan, filled, {"runs": []}, origins, similar, 1.0)
    lines = {line["arm"]: line for line in results["arms"][1]["lines"]}
    assert lines["no prompt"]["scores"]["gamma"] == {"mean": 0.2, "sd": None, "n": 1}
    gamma = lines["prompt-tuning"]["scores"]["gamma"]
    assert (gamma["mean"], gamma["sd"], gamma["n"]) == (pytest.approx(0.6), pytest.approx(0.02**0.5), 2)
    assert lines["prompt-tuning"]["mean"] == pytest.approx((0.6 + 0.4) / 2)
    assert (lines["lora"]["mean"], lines["lora"]["trainable"]) == (None, 7)
    assert lines["mpt-together"]["mean"] == pytest.approx(0.7)
    assert results["warnings"] == ["gamma 2-shot: prompt-tuning-rate0.1-seed2 failed and is left out"]
    assert results["similarity"]["matrix"] == [pytest.approx([1, -1]), pytest.approx([-1, 1])]
    assert found["gamma", 2][1].validation == 0.7  # the state that is kept is the best one
    assert found["gamma", 2][3].validation is None


def test_a_score_that_is_no_number_chooses_no_rate():
    """NaN of a run of this process, and null where results.json was read."""

    def result(rate, *values):
        validation = [{"step": 2 * place, "value": value} for place, value in enumerate(values)]
        return ArmResult(ArmRun("mpt", rate, 0), [{"validation": validation}])

    nan = float("nan")
    results = [result(0.1, nan, None), result(0.2, nan, 0.25, 0.5), result(0.4, None, 0.25)]
    assert [each.validation for each in results] == [-math.inf, 0.5, 0.25]
    comparison = Comparison(None, lambda *_: [])
    assert comparison._choose_rate("mpt", {"gamma": results}, 2) == 0.2


def test_targets_start_where_their_arm_says(done):
    values, results, _ = done
    out = Path(values["output_dir"])
    sources = [artifact.load(out / "sources/mpt/prompt" / name) for name in ("alpha", "beta")]
    rate = next(one["rate"] for one in results["rates"] if (one["arm"], one["size"]) == ("mpt", "full"))
    columns = torch.stack([one.state["columns"] for one in sources]).mean(0)
    rows = torch.stack([one.state["rows"] for one in sources]).mean(0)
    target = artifact.load(out / f"targets/gamma-full/rates/mpt-rate{rate:g}-seed0/prompt")
    torch.testing.assert_close(target.initial, sources[0].state["shared.prompt"] * (columns @ rows))
    mixture = artifact.load(out / "sources/mixture/prompt/alpha").prompt
    assert mixture.equal(artifact.load(out / "sources/mixture/prompt/beta").prompt)
    rate = next(one["rate"] for one in results["rates"] if (one["arm"], one["size"]) == ("spot-mixture", "full"))
    spot = artifact.load(out / f"targets/gamma-full/rates/spot-mixture-rate{rate:g}-seed0/prompt")
    assert spot.initial.equal(mixture)
    teachers = {name: artifact.load(out / "teachers" / name / "prompt").prompt for name in ("alpha", "beta")}
    probe = artifact.load(out / "probes/gamma-full-seed0/prompt").prompt
    near = similarity.retrieve(probe, teachers, 2)
    rate = next(one["rate"] for one in results["rates"] if (one["arm"], one["size"]) == ("spot-weighted", "full"))
    weighted = artifact.load(out / f"targets/gamma-full/rates/spot-weighted-rate{rate:g}-seed0/prompt")
    expected = similarity.weighted_mean([teachers[name] for name, _, _ in near], [weight for _, weight, _ in near])
    assert weighted.initial.equal(expected)


def test_teachers_read_each_row_once_for_all_variants(done, tmp_path, monkeypatch):
    values, _, _ = done
    calls = []
    original = distillation._compute
    monkeypatch.setattr(distillation, "_compute", lambda *given: calls.append(1) or original(*given))
    run = source_runs(parse({**values, "output_dir": str(tmp_path / "new"), "teachers": trained(values)}, Plan))
    job.run(run)
    assert calls == [1]


def test_a_second_call_trains_nothing(done, monkeypatch):
    values, results, _ = done
    monkeypatch.setattr(job, "run", lambda *_: pytest.fail("a stage was done again"))
    said: list[str] = []
    again = execute(parse(values, Plan), ProgressReporter(log=said.append))
    assert {key: again[key] for key in ("arms", "rates", "similarity", "nearest", "sources")} == {
        key: results[key] for key in ("arms", "rates", "similarity", "nearest", "sources")
    }
    assert sum("already done" in line for line in said) > 5


def trained(values: dict) -> dict:
    """A teacher stage whose teachers are there already."""
    paths = {name: str(Path(values["output_dir"]) / "teachers" / name / "prompt") for name in ("alpha", "beta")}
    return {**values["teachers"], "trained": paths}


def small(values: dict, out: Path, **target: object) -> dict:
    """The same plan with two arms at one size and with teachers that are there."""
    return {
        **values,
        "output_dir": str(out),
        "teachers": trained(values),
        "source": {**values["source"], "variants": ["mixture"]},
        "target": {
            **values["target"],
            "arms": ["prompt-tuning", "spot-mixture"],
            "few_arms": None,
            "shots": [2],
            "seeds": [0],
            "learning_rates": [0.1],
            **target,
        },
    }


def test_a_changed_plan_does_anew_what_changed_and_what_came_from_it(done, tmp_path, monkeypatch):
    """Other steps for targets leave the sources; other sources leave nothing that began at them."""
    values, _, _ = done
    plan = small(values, tmp_path / "out")
    ran: list[str] = []
    original = job.run
    monkeypatch.setattr(job, "run", lambda run, screen: ran.append(Path(run.output_dir).name) or original(run, screen))
    first = execute(parse(plan, Plan))
    assert ran == ["sources", "rates", "rates"]
    ran.clear()
    longer = {**plan, "target": {**plan["target"], "few": {**plan["target"]["few"], "max_steps": 6}}}
    changed = execute(parse(longer, Plan))
    assert ran == ["rates", "rates"]
    assert changed["curves"][0]["lines"]["prompt-tuning"][-1][0] == 6
    ran.clear()
    source = {**plan["source"], "seed": 3}
    other = execute(parse({**plan, "source": source}, Plan))
    assert ran == ["sources", "rates", "rates"]
    prompt = artifact.load(tmp_path / "out/targets/gamma-2-shot/rates/spot-mixture-rate0.1-seed0/prompt")
    assert prompt.initial.equal(artifact.load(tmp_path / "out/sources/mixture/prompt/alpha").prompt)
    assert other["curves"] != first["curves"]


def test_a_stage_that_is_cut_inside_goes_on(done, tmp_path, monkeypatch):
    values, _, _ = done
    plan = small(values, tmp_path / "out")
    expected = execute(parse(small(values, tmp_path / "whole"), Plan))
    original, steps = TrainablePrompts.loss, 0

    def interrupted(*given):
        nonlocal steps
        steps += 1
        if steps == 6:  # the second step of the first target
            raise KeyboardInterrupt
        return original(*given)

    monkeypatch.setattr(TrainablePrompts, "loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        execute(parse(plan, Plan))
    monkeypatch.setattr(TrainablePrompts, "loss", original)
    found = execute(parse(plan, Plan))
    assert found["arms"] == expected["arms"]
    assert found["curves"] == expected["curves"]


def test_rates_that_fail_are_left_out(done, tmp_path):
    """A rate at which the loss is no number costs only its own runs, also where weights are trained."""
    values, _, _ = done
    plan = small(values, tmp_path / "out", learning_rates=[0.1, 1e8], arms=["prompt-tuning", "fine-tuning"])
    plan["target"] |= {"weight_learning_rates": {"fine-tuning": [1e-3, 1e9]}}
    results = execute(parse(plan, Plan))
    rates = {one["arm"]: (one["rate"], list(one["tried"])) for one in results["rates"]}
    assert rates["fine-tuning"] == (1e-3, ["0.001"])
    assert rates["prompt-tuning"][0] == 0.1
    with pytest.raises(TrainingError, match=r"arm 'fine-tuning', 2-shot, failed at every rate"):
        execute(
            parse(
                small(values, tmp_path / "none", arms=["fine-tuning"], weight_learning_rates={"fine-tuning": [1e9]}),
                Plan,
            )
        )


def test_other_arms_run_too(done, tmp_path):
    values, _, _ = done
    arms = ["random", "labels", "spot-nearest", "mpt-no-distillation"]
    plan = small(values, tmp_path / "out", arms=arms)
    plan["source"]["variants"] = ["no-distillation"]
    (few,) = execute(parse(plan, Plan))["arms"]
    assert [line["arm"] for line in few["lines"][1:]] == arms
    teachers = [artifact.load(path).prompt for path in plan["teachers"]["trained"].values()]
    nearest = artifact.load(tmp_path / "out/targets/gamma-2-shot/rates/spot-nearest-rate0.1-seed0/prompt")
    assert any(nearest.initial.equal(teacher) for teacher in teachers)


def test_an_interrupted_plan_goes_on_to_the_same_results(done, tmp_path, monkeypatch):
    values, results, _ = done
    cut = {**values, "output_dir": str(tmp_path / "cut")}
    calls = 0
    original = job.run

    def interrupted(run, screen):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return original(run, screen)

    monkeypatch.setattr(job, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        execute(parse(cut, Plan))
    monkeypatch.setattr(job, "run", original)
    assert execute(parse(cut, Plan))["arms"] == results["arms"]


def test_the_page_shows_tables_curves_and_similarities(done):
    values, _, _ = done
    page = (Path(values["output_dir"]) / "report.html").read_text()
    for words in ("Targets, full", "Targets, 2-shot", "Shared prompts on their sources", "Rates chosen", "± "):
        assert words in page
    assert page.count("<svg") >= 5
    assert "Similarity of the sources" in page
    assert "Loss on gamma, full" in page


def test_the_command(done, tmp_path, capsys):
    values, results, _ = done
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(SystemExit) as stop:
        cli.app(["multitask", "--config", str(file)], standalone_mode=True)
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "targets, full: arm, trainable params, gamma, delta, mean" in shown
    mean = next(line["mean"] for line in results["arms"][0]["lines"] if line["arm"] == "mpt")
    assert f"{mean:.3f}" in next(line for line in shown.splitlines() if line.startswith("mpt  "))


# Weights


def test_the_upper_lines(tmp_path):
    values = plan_values(tmp_path)
    values["source"]["variants"] = []
    values["target"] |= {
        "arms": ["prompt-tuning", "fine-tuning", "lora"],
        "few_arms": None,
        "shots": [2],
        "weight_targets": ["gamma"],
        "weight_learning_rates": {"fine-tuning": [1e-3], "lora": [1e-2]},
    }
    (few,) = execute(parse(values, Plan))["arms"]
    lines = {line["arm"]: line for line in few["lines"]}
    assert set(lines["fine-tuning"]["scores"]) == set(lines["lora"]["scores"]) == {"gamma"}
    assert lines["fine-tuning"]["mean"] is None
    assert lines["fine-tuning"]["trainable"] > lines["lora"]["trainable"] > lines["prompt-tuning"]["trainable"]
    assert lines["lora"]["scores"]["gamma"]["n"] == 2


# What is refused


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda v: v["target"].update(arms=["mpt", "atempt"]),
            "target.arms: 'atempt' is unknown; did you mean 'attempt'",
        ),
        (
            lambda v: v["teachers"].update(trained={"alfa": "x"}),
            "teachers.trained: 'alfa' is unknown; did you mean 'alpha'",
        ),
        (lambda v: v["source"].update(variants=["mpt"]), "arm 'spot-mixture' starts from variant 'mixture'"),
        (
            lambda v: v["source"]["training"].update(objectives={"task": 2.0}),
            "source.training.objectives is set by the recipe",
        ),
        (lambda v: v["sources"].append(v["sources"][0]), "task names must differ, given alpha, beta, alpha"),
        (
            lambda v: v["target"].update(weight_learning_rates={}, arms=["lora"]),
            "arm 'lora' needs rates to choose from",
        ),
        (lambda v: v["target"].update(shots=[0], few_arms=["lora"]), "arm 'lora' needs rows of the target"),
        (lambda v: v["target"].update(shots=[0], few_arms=["spot-nearest"]), "needs rows of the target"),
        (lambda v: v.update(sources=v["sources"][:1]) or v["target"].update(arms=["spot-second"]), "a second source"),
        (lambda v: v.update(sources=[]), "sources"),
        (lambda v: v["target"].update(shots=[16, 16]), "each value may be listed once, given 16, 16"),
        (
            lambda v: v["target"].update(few={"objectives": {"distill-logits": 1.0}}),
            "target.few.objectives is set by the",
        ),
        (lambda v: v["prompt"].update(method="attempt"), "prompt.method is set by the recipe itself"),
        (lambda v: v["target"].update(learning_rates=[0.0]), "greater than 0"),
        (lambda v: v["target"].update(seed=[1]), "unknown key 'target.seed'; did you mean 'seeds'"),
    ],
)
def test_plans_that_cannot_be(tmp_path, change, words):
    values = plan_values(tmp_path)
    change(values)
    with pytest.raises(ConfigError, match=words):
        parse(values, Plan)


def test_teachers_and_files_are_checked_before_any_training(done, tmp_path, monkeypatch):
    values, _, _ = done
    monkeypatch.setattr(job, "run", lambda *_: pytest.fail("trained"))
    given = trained(values)

    def tried(**changes):
        execute(parse({**values, "output_dir": str(tmp_path / "new"), **changes}, Plan))

    with pytest.raises(ArtifactError, match=r"the teacher of alpha, .* has length 4 and the plan wants 6"):
        tried(teachers=given, prompt={"num_virtual_tokens": 6})
    other = {**values["model"], "name": str(local.model_directory(tmp_path / "other", seed=3))}
    with pytest.raises(ArtifactError, match="weights"):
        tried(teachers=given, model=other)
    with pytest.raises(ArtifactError, match="no directory nowhere"):
        tried(teachers={**given, "trained": {**given["trained"], "beta": "nowhere"}})
    with pytest.raises(DataError, match=r"gone\.csv"):
        tried(targets=[{**values["targets"][0], "source": str(tmp_path / "gone.csv")}])
    target = {**values["targets"][0], "split": {"validation_fraction": 0.2, "test_fraction": 0}}
    with pytest.raises(ConfigError, match="target gamma has no test rows"):
        tried(targets=[target])
    with pytest.raises(ConfigError, match="arm 'labels' is not possible for target gamma"):
        tried(prompt={"num_virtual_tokens": 4, "site": "kv"}, target={**values["target"], "arms": ["labels"]})
    with pytest.raises(BackboneError, match="no layer 9"):
        tried(source={**values["source"], "layers": [9]})
    monkeypatch.setattr(
        backbone_weights, "_import_peft", lambda: (_ for _ in ()).throw(ConfigError("pip install softprompts[lora]"))
    )
    with pytest.raises(ConfigError, match=r"softprompts\[lora\]"):
        tried(target={**values["target"], "arms": ["lora"]})
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="one process"):
        tried()


def test_teachers_that_are_there_are_not_trained(done):
    values, _, _ = done
    alpha = {"alpha": str(Path(values["output_dir"]) / "teachers/alpha/prompt")}
    plan = parse({**values, "teachers": {**values["teachers"], "trained": alpha}}, Plan)
    assert [entry["name"] for entry in teacher_runs(plan).runs] == ["beta"]
    taught = source_runs(plan).runs[0]["training.distillation"]
    assert taught["teachers"]["alpha"] == alpha["alpha"]


# Rows of data


def test_what_a_plan_asks_of_each_arm(done):
    values, _, _ = done
    plan = parse(values, Plan)
    assert select_arms(plan, None, weights=False, all_targets=True) == ["mpt-together"]
    assert select_arms(plan, 2, weights=False) == ["prompt-tuning", "mpt"]
    origins = Origins({"alpha": "a", "beta": "b"}, {"mpt": Path("s/mpt")}, {})
    run = target_run(plan, "gamma", 2, origins, [ArmRun("mpt", 0.3, 7)], "rates")
    entry = run.runs[0]
    assert entry["training.learning_rates"] == {"factors": pytest.approx(0.4)}
    assert entry["tasks"][0]["split"] | {"shots": 2, "shots_seed": 7} == entry["tasks"][0]["split"]
    assert run.training.eval_steps == run.training.max_steps
    both = target_run(plan, ALL_TARGETS, 2, origins, [ArmRun("mpt-together", 0.3, 7)], "rates")
    assert (both.training.sampling.draw, both.training.batch_size) == ("all", 8)
