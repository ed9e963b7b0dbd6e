"""The study of task prompt vectors on a tiny model: what is measured, what is reused, what is said of the claims."""

import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from studies.task_prompt_vectors import Study, execute, few, independence, stages, sums

import local
from softprompts.artifacts import artifact, vectors
from softprompts.config import parse
from softprompts.errors import ConfigError, TrainingError
from softprompts.recipes import coefficient_search as coefficient
from softprompts.recipes.evaluate_prompts import Evaluator
from softprompts.recipes.run import run as job
from softprompts.recipes.run.prepare import ProgressReporter
from softprompts.training import objectives
from softprompts.training.trainables import TrainablePrompts

P = 4
TASKS = ("alpha", "beta", "gamma")


def study_values(folder: Path, model: str = "llama") -> dict:
    """Three tasks from two starts, all pairs, and one unseen target, on a tiny model."""
    tasks = []
    for i, name in enumerate((*TASKS, "delta")):
        file = local.colors(folder / f"{name}.csv", rows=60, seed=i)
        split = {"validation_fraction": 0.2, "test_fraction": 0.2}
        tasks.append({"source": str(file), "name": name, "template": "{text}:", "split": split})
    train = {"max_steps": 4, "batch_size": 4, "learning_rate": 0.3}
    return {
        "model": {"name": str(local.model_directory(folder / model, model)), "dtype": "float32", "threads": 1},
        "prompt": {"num_virtual_tokens": P},
        "tasks": tasks[:3],
        "groups": {"first": ["alpha", "beta"]},
        "vectors": {
            "training": train,
            "starts": [{"kind": "vocabulary", "seed": 0}, {"kind": "random", "seed": 1}],
            "learning_rates": [0.1, 0.3],
            "tune_on": ["alpha"],
        },
        "sums": {"starts": 2, "coefficients": [0, 0.5, 1], "few": {**train, "max_steps": 2}, "shots": 2},
        "few": {
            "targets": [{"target": tasks[3], "sources": ["alpha", "beta"]}],
            "source": {"training": {**train, "sampling": {"draw": "some"}}, "variants": ["mixture"]},
            "target": {
                "few": train,
                "shots": [0, 4],
                "shots_per": "set",
                "seeds": [0, 1],
                "learning_rates": [0.3],
                "arms": ["prompt-tuning", "spot-first", "spot-second", "spot-mixture", "vectors"],
            },
        },
        "evaluation": {"resamples": 100},
        "output_dir": str(folder / "out"),
    }


class Watch:
    """How often training is called, on what, and how many steps the frozen backbone makes of it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.fits: list[tuple[list[str], set[int]]] = []  # the directories of the runs, and their backbones
        self.steps = 0
        train_many, loss = job.train_many, TrainablePrompts.loss

        def trained(trainable, runs):
            self.fits.append(([str(run.directory) for run in runs], {id(trainable.model.backbone)}))
            return train_many(trainable, runs)

        def stepped(*arguments):
            self.steps += 1
            return loss(*arguments)

        patch.setattr(job, "train_many", trained)
        patch.setattr(TrainablePrompts, "loss", stepped)


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A study that was carried out, with what it said and how it was trained."""
    values = study_values(tmp_path_factory.mktemp("study"))
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        watch = Watch(patch)
        results = execute(parse(values, Study), ProgressReporter(log=said.append))
    return values, results, said, watch


@pytest.fixture(scope="module")
def done(watched):
    """The study with what it said."""
    return watched[:3]


def page(values: dict, *parts: str) -> dict:
    return json.loads(Path(values["output_dir"], *parts, "results.json").read_text())


def test_vectors_differ_by_their_start_alone(done):
    """Every start of a task sees the same rows in the same order, at the rate that validation chose."""
    values, results, _ = done
    tried = results["rate"]["tried"]
    assert results["rate"]["rate"] == max((0.1, 0.3), key=lambda rate: (tried[f"{rate:g}"], -rate))
    for rate in ("0.1", "0.3"):
        assert tried[rate] == page(values, "rates", "alpha", f"rate{rate}")["validation"][-1]["value"]
    for task in TASKS:
        runs = [page(values, "vectors", task, f"start{place}") for place in (0, 1)]
        assert [run["config"]["prompt"]["init"]["kind"] for run in runs] == ["vocabulary", "random"]
        configs = [{**run["config"], "output_dir": "", "prompt": ""} for run in runs]
        assert configs[0] == configs[1]
        assert configs[0]["training"]["learning_rate"] == results["rate"]["rate"]


def test_all_starts_of_a_task_train_in_one_batch(watched):
    """One call of the training a task, with every start and one backbone; so do the rates of a task that chooses."""
    values, _, _, watch = watched
    out = Path(values["output_dir"])
    for part, tasks, names in (("vectors", TASKS, ("start0", "start1")), ("rates", ["alpha"], ("rate0.1", "rate0.3"))):
        calls = [where for where, _ in watch.fits if Path(where[0]).parent.parent == out / part]
        assert calls == [[str(out / part / task / name) for name in names] for task in tasks]
    assert all(len(backbones) == 1 for _, backbones in watch.fits)


def test_own_scores_are_those_of_the_trained_prompts(done):
    """The evaluator of the study and the run that trained the prompts agree, row by row."""
    values, results, _ = done
    for task in TASKS:
        found = results["independence"][task]
        trained = [page(values, "vectors", task, f"start{place}")["summary"] for place in (0, 1)]
        assert found["scores"]["own"]["each"] == [run["after"]["value"] for run in trained]
        assert found["stock"] == trained[0]["before"]["value"]
        for place in (0, 1):
            one = artifact.load(Path(values["output_dir"], "vectors", task, f"start{place}", "prompt"))
            ratio = float((one.prompt.double() - one.initial).norm() / one.initial.double().norm())
            assert found["ratios"][place] == pytest.approx(ratio)


def test_conditions():
    """Each prompt of each condition, against the definition."""
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(P, 8, generator=generator) for _ in range(3)]
    tuned = [start + torch.randn(P, 8, generator=generator) for start in starts]
    like = local_artifacts(starts, tuned)
    found = [vectors.task_vector(one, str(i)) for i, one in enumerate(like)]
    made = independence.prompts(found, starts)
    assert {name: len(each) for name, each in made.items()} == {
        "own": 3, "cross": 6, "start": 3, "shuffled": 6, "random": 6, "alone": 3,
    }  # fmt: skip
    taus = [b.double() - a.double() for a, b in zip(starts, tuned, strict=True)]
    crossings = [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]
    for i in range(3):
        assert made["own"][i].equal(tuned[i])
        assert made["start"][i].equal(starts[i])
        assert made["alone"][i].equal(taus[i].float())
    for place, (of, on) in enumerate(crossings):
        assert made["cross"][place].equal((starts[on].double() + taus[of]).float())
        change = {name: made[name][place].double() - starts[on].double() for name in ("shuffled", "random")}
        for each in change.values():
            assert float(each.norm()) == pytest.approx(float(taus[of].norm()), rel=1e-5)
            assert abs(vectors.cosine(each, taus[of])) < 0.6
        numbers = [one.flatten().sort().values for one in (change["shuffled"], taus[of])]
        torch.testing.assert_close(*numbers, atol=1e-6, rtol=1e-5)


def local_artifacts(starts, tuned):
    """Artifacts with these prompts, of one task and backbone."""
    import artifacts

    return [
        artifacts.example(prompt=prompt, initial=start, state={"prompt": prompt}, options={})
        for start, prompt in zip(starts, tuned, strict=True)
    ]


def test_pairs_hold_the_scores_of_an_evaluator(done):
    _, results, _ = done
    assert [one["tasks"] for one in results["pairs"]] == [["alpha", "beta"], ["alpha", "gamma"], ["beta", "gamma"]]
    assert [one["related"] for one in results["pairs"]] == [True, False, False]
    for one in results["pairs"]:
        assert all(coefficient in (0, 0.5, 1) for coefficient in one["coefficients"])
        for task in one["tasks"]:
            own = results["independence"][task]["scores"]["own"]["each"]
            assert one["scores"]["own"][task]["mean"] == pytest.approx(sum(own) / 2)
            assert one["scores"]["sum"][task]["n"] == 2
    first = results["pairs"][0]
    if first["coefficients"] == [0, 0]:
        assert first["scores"]["sum"] == first["scores"]["start"]


def test_sums_are_measured_as_defined(done, monkeypatch, tmp_path):
    """Each kind of prompt, made by hand of the artifacts, with another coefficient from each start.

    The evaluator's score is a number of the prompt: on validation rows how near it is to what is to be chosen.
    """
    values, _, _ = done
    shutil.copytree(Path(values["output_dir"], "vectors"), tmp_path / "vectors")
    pair, grid = ("alpha", "gamma"), (0.5, 1)
    trained = {
        task: [artifact.load(tmp_path / "vectors" / task / f"start{place}" / "prompt") for place in (0, 1)]
        for task in pair
    }
    starts = [one.initial for one in trained["alpha"]]
    changes = [
        sum(trained[task][place].prompt.double() - trained[task][place].initial.double() for task in pair)
        for place in (0, 1)
    ]
    wanted = [start.double() + at * change for start, change, at in zip(starts, changes, grid, strict=True)]
    weights = {task: torch.randn(P, 32, generator=torch.Generator().manual_seed(i)) for i, task in enumerate(pair)}

    def number(task, prompt):
        return float((prompt.double() * weights[task]).sum())

    def scores(evaluator, prompts, rows, *_):
        if rows is evaluator.task.validation:
            return [-min(float((prompt - one).norm()) for one in wanted) for prompt in prompts]
        assert rows is evaluator.task.test
        return [number(evaluator.task.name, prompt) for prompt in prompts]

    monkeypatch.setattr(Evaluator, "scores", scores)
    study = parse({**values, "output_dir": str(tmp_path)}, Study)
    found = stages.measure_pair(stages.StudyResources(study, ProgressReporter()), pair)
    assert found["tasks"] == list(pair)
    assert found["coefficients"] == list(grid)
    for task, other in (pair, pair[::-1]):
        expected = {
            "sum": [number(task, prompt) for prompt in wanted],
            "own": [number(task, one.prompt) for one in trained[task]],
            "other": [number(task, one.prompt) for one in trained[other]],
            "start": [number(task, start) for start in starts],
        }
        for place in (0, 1):
            apart = sorted(each[place] for each in expected.values())
            assert min(b - a for a, b in itertools.pairwise(apart)) > 1e-3
        assert {kind: each[task] for kind, each in found["scores"].items()} == {
            kind: pytest.approx(each, abs=1e-5) for kind, each in expected.items()
        }


def test_sums_are_trained_on_from_where_they_are(done):
    values, results, _ = done
    assert set(results["again"]) == set(TASKS)
    assert set(results["again"]["alpha"]) == {"start", "alpha+beta", "alpha+gamma"}
    out = Path(values["output_dir"])
    trained = artifact.load(out / "again/alpha/alpha+beta-seed1/prompt")
    begun = trained.initial
    parts = [artifact.load(out / f"vectors/{name}/start1/prompt") for name in ("alpha", "beta")]
    assert set(trained.parents) == {one.digest for one in parts}
    assert artifact.load(out / "again/alpha/start-seed1/prompt").parents == ()
    change = sum(one.prompt.double() - one.initial.double() for one in parts)
    torch.testing.assert_close(begun, (parts[0].initial.double() + change).float(), atol=1e-7, rtol=0)


def test_unseen_targets_start_from_their_sources(done):
    """With no rows nothing is trained: the start is evaluated. With few, as many rows as were asked for in all."""
    values, results, _ = done
    zero, four = results["few"]["delta"]["arms"]
    assert (zero["size"], four["size"]) == ("0-shot", "4-shot")
    out = Path(values["output_dir"], "few", "delta")
    first = artifact.load(out / "targets/delta-0-shot/seeds/spot-first-rate0.3-seed0/prompt")
    second = artifact.load(out / "targets/delta-0-shot/seeds/spot-second-rate0.3-seed0/prompt")
    sources = [
        artifact.load(Path(values["output_dir"], "vectors", name, "start0", "prompt")) for name in ("alpha", "beta")
    ]
    assert first.prompt.equal(sources[0].prompt)
    assert second.prompt.equal(sources[1].prompt)
    plain = artifact.load(out / "targets/delta-0-shot/seeds/prompt-tuning-rate0.3-seed1/prompt")
    summed = artifact.load(out / "targets/delta-0-shot/seeds/vectors-rate0.3-seed1/prompt")
    change = sum(one.prompt.double() - one.initial.double() for one in sources)
    torch.testing.assert_close(summed.prompt, (plain.prompt.double() + change).float(), atol=1e-7, rtol=0)
    run = page(values, "few/delta/targets/delta-4-shot/rates/vectors-rate0.3-seed0")
    assert run["rows"]["train"] == run["rows"]["validation"] == 4
    lines = {line["arm"]: line for line in zero["lines"]}
    assert lines["spot-first"]["scores"]["delta"]["sd"] == 0  # the same prompt whatever the seed


def test_a_second_call_measures_nothing(done, monkeypatch):
    values, results, _ = done
    monkeypatch.setattr(job, "run", lambda *_: pytest.fail("runs were done again"))
    monkeypatch.setattr(independence, "measure", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(sums, "measure", lambda *_: pytest.fail("measured again"))
    again = execute(parse(values, Study))
    for key in ("claims", "independence", "pairs", "again", "few", "similarity"):
        assert again[key] == results[key]


def test_other_vectors_are_measured_anew(done, monkeypatch, tmp_path):
    """Measurements belong to prompts: a prompt that was trained again with other numbers is evaluated again."""
    values, _, _ = done
    asked = []
    original = independence.measure
    monkeypatch.setattr(independence, "measure", lambda *given: asked.append(1) or original(*given))
    small = {**values, "sums": None, "few": None, "output_dir": str(tmp_path / "out")}
    execute(parse(small, Study))
    assert len(asked) == 3
    execute(parse(small, Study))
    assert len(asked) == 3
    place = tmp_path / "out/vectors/beta/start1/prompt"
    one = artifact.load(place)
    moved = one.prompt + 0.01
    artifact.save(vectors.to_artifact(vectors.task_vector(one), moved), place)
    execute(parse(small, Study))
    assert len(asked) == 4


class Cut:
    """A screen that is interrupted once, at a training step or at a prompt that was evaluated, under a certain line."""

    def __init__(self, line: str, at: str) -> None:
        self.line, self.at, self.under = line, at, ""

    def screen(self) -> ProgressReporter:
        return ProgressReporter(log=self.say, on_step=self.step, on_eval=self.evaluated)

    def say(self, line: str) -> None:
        if line.endswith((" steps", " crossed", " coefficients")):
            self.under = line

    def step(self, name: str, report: Any) -> None:
        self.reach(f"step {report.step}")

    def evaluated(self, title: str, number: int, of: int) -> None:
        self.reach(f"{title} {number}")

    def reach(self, at: str) -> None:
        if self.under.startswith(self.line) and at == self.at:
            raise KeyboardInterrupt


CUTS = (
    ("rates of alpha:", "step 3"),
    ("vectors of beta:", "step 2"),
    ("independence of gamma:", "gamma cross, prompts 1"),
    ("alpha + gamma:", "gamma, prompts 2"),
    ("beta again", "step 1"),
    ("sources:", "step 2"),
    ("delta 4-shot, seeds", "step 2"),
)


def test_an_interrupted_study_goes_on_to_the_same_results(watched, tmp_path, monkeypatch):
    """Cut in every question, one after the other: in the end it has made each step once, and found the same."""
    before, _, _, whole = watched
    values = {**before, "output_dir": str(tmp_path / "out")}
    watch = Watch(monkeypatch)
    for line, at in CUTS:
        with pytest.raises(KeyboardInterrupt):
            execute(parse(values, Study), Cut(line, at).screen())
        assert not Path(values["output_dir"], "results.json").exists()
    execute(parse(values, Study))
    assert watch.steps == whole.steps
    found, expected = (
        json.loads(Path(out, "results.json").read_text()) for out in (values["output_dir"], before["output_dir"])
    )
    for one in (found, expected):
        for key in ("created", "seconds"):
            del one[key]
        del one["config"]["output_dir"]
    assert found == expected


def test_the_page_says_what_held(done):
    values, results, _ = done
    text = Path(values["output_dir"], "report.html").read_text()
    for claim in results["claims"].values():
        assert claim["words"].split(".")[0].replace("'", "&#39;") in text
    assert "Question 3: few examples of delta" in text
    assert "Cosines of vectors, flat" in text
    assert text.count("<svg") >= 5


def measured(own: float, cross: float, start: float, control: float, alone: float = 0.5) -> dict:
    scores = {"own": own, "cross": cross, "start": start, "shuffled": start, "random": control, "alone": alone}
    return {"scores": {name: [value, value] for name, value in scores.items()}, "ratios": [1.5, None]}


@pytest.mark.parametrize(
    ("one", "holds"),
    [
        (measured(0.9, 0.9, 0.5, 0.5), "holds"),
        (measured(0.9, 0.8, 0.5, 0.5), "holds in part"),
        (measured(0.9, 0.9, 0.5, 0.85), "holds in part"),
        (measured(0.9, 0.6, 0.5, 0.5), "does not hold"),
        (measured(0.9, 0.8, 0.5, 0.85), "does not hold"),
        (measured(0.9, 0.9, 0.5, 0.5, alone=0.9), "cannot be told"),
        (measured(0.9, 0.9, 0.5, 0.5, alone=0.88), "cannot be told"),
        (measured(0.9, 0.8, 0.5, 0.5, alone=0.85), "cannot be told"),
        (measured(0.9, 0.6, 0.5, 0.5, alone=0.9), "does not hold"),
        (measured(0.9, 0.9, 0.5, 0.5, alone=0.65), "holds"),
        (measured(0.5, 0.9, 0.5, 0.5), None),
    ],
)
def test_the_verdict_on_independence(one, holds):
    found = independence.verdict({"a": one})
    assert found["holds"] == holds
    if holds:
        assert f" {holds} on this model" in found["words"]
        assert found["kept"]["cross"] == pytest.approx((one["scores"]["cross"][0] - 0.5) / 0.4)
        assert found["ratio"] == 1.5
        assert "1.5 times as long" in found["words"]


def test_the_verdict_on_independence_is_a_mean_over_tasks_that_gained():
    tasks = {"a": measured(0.9, 0.9, 0.5, 0.5), "b": measured(0.7, 0.6, 0.5, 0.5), "c": measured(0.51, 0.2, 0.5, 0.5)}
    found = independence.verdict(tasks)
    assert found["kept"]["cross"] == pytest.approx((1 + 0.5) / 2)
    assert "mean of 2 tasks" in found["words"]
    for one in tasks.values():
        one["ratios"] = [None, None]
    assert independence.verdict(tasks)["ratio"] is None
    assert "times as long" not in independence.verdict(tasks)["words"]


def pair(gain: float, related: bool = True) -> dict:
    """Two tasks whose own prompts gain 0.4, and a sum that keeps `gain` of it."""
    kinds = {"sum": 0.5 + 0.4 * gain, "own": 0.9, "other": 0.6, "start": 0.5}
    scores = {kind: {"a": [value], "b": [value]} for kind, value in kinds.items()}
    return {"tasks": ["a", "b"], "related": related, "scores": scores}


def test_the_verdict_on_sums():
    assert sums.kept_share(pair(0.7), "sum") == pytest.approx(0.7)
    assert sums.kept_share(pair(0.7), "other") == pytest.approx(0.25)
    assert sums.verdict([pair(1.0), pair(0.95, related=False)], {})["holds"] == "holds"
    mixed = sums.verdict([pair(1.0), pair(0.4), pair(0.3, related=False)], {})
    assert (mixed["holds"], mixed["related"]["whole"], mixed["unrelated"]["whole"]) == ("holds in part", 1, 0)
    assert mixed["related"]["kept"]["sum"] == pytest.approx(0.7)
    assert sums.verdict([pair(0.5)], {})["holds"] == "does not hold"


def test_the_verdict_on_sums_as_starts():
    """How far from the start alone, and how often by more than both spreads."""
    again = {
        "a": {"start": {"mean": 0.5, "sd": 0.1}, "a+b": {"mean": 0.8, "sd": 0.1}, "a+c": {"mean": 0.6, "sd": 0.1}},
        "b": {"start": {"mean": 0.7, "sd": None}, "a+b": {"mean": 0.6, "sd": None}},
    }
    found = sums.verdict([pair(0.5)], again)
    assert found["over_start"] == pytest.approx((0.3 + 0.1 - 0.1) / 3)
    assert "ends +0.100 from the start alone, further above it than both spreads in 1 of 3 cases" in found["words"]
    nothing = {**pair(0.5), "scores": {kind: {"a": [0.5], "b": [0.5]} for kind in ("sum", "own", "other", "start")}}
    assert sums.verdict([nothing], again)["over_start"] == pytest.approx(0.1)
    assert "as_starts" not in sums.verdict([pair(0.5)], {"a": {"start": {"mean": 0.5, "sd": 0.1}}})


def table(size: str, sd: float | None = 0.03, **means: float) -> dict:
    lines = [
        {"arm": arm.replace("_", "-"), "mean": mean, "scores": {"a": {"mean": mean, "sd": sd, "n": 3}}}
        for arm, mean in means.items()
    ]
    return {"size": size, "lines": lines}


def test_the_verdict_on_few_examples():
    """Over the better plain start, at every size but none."""
    tables = [table("0-shot", random=0.1, vectors=0.9), table("10-shot", random=0.5, prompt_tuning=0.6, vectors=0.7)]
    found = few.verdict({"a": {"arms": tables}})
    assert found["over"] == {"vectors": pytest.approx(0.1)}
    assert (found["holds"], found["clear"]) == ("holds", 1)
    close = few.verdict({"a": {"arms": [table("10-shot", 0.06, random=0.5, prompt_tuning=0.6, vectors=0.7)]}})
    assert (close["holds"], close["clear"]) == ("holds", 0)
    assert "by more than both spreads in 0." in close["words"]
    worse = [table("10-shot", prompt_tuning=0.6, vectors=0.5, attempt=0.65)]
    found = few.verdict({"a": {"arms": worse}})
    assert (found["holds"], found["over"]["attempt"]) == ("does not hold", pytest.approx(0.05))
    assert "The best other start, attempt" in found["words"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": {"init": {"kind": "random"}}}, "prompt.init is set by the study itself"),
        ({"groups": {"x": ["alfa"]}}, "groups: 'alfa' is unknown; did you mean 'alpha'"),
        ({"sums": {"starts": 3}}, "sums.starts is 3, and there are 2 starts"),
        ({"sums": {"pairs": [["alpha", "alpha"]], "starts": 2}}, "alpha is paired with itself"),
        (
            {"sums": {"pairs": [["alpha", "beta"], ["beta", "alpha"]], "starts": 2}},
            "a pair of tasks is listed twice",
        ),
        ({"sums": {"coefficients": [float("inf")], "starts": 2}}, "sums.coefficients.0"),
        ({"vectors": {"starts": [{}]}}, "at least 2 items"),
        ({"vectors": {"tune_on": []}}, "vectors.tune_on"),
        ({"vectors": {"starts": [{}, {"seed": 1}, {"seed": 0}]}}, "number 3 is number 1 again, .* give them seeds"),
        (
            {"vectors": {"starts": [{"kind": "zeros"}, {"kind": "zeros", "seed": 1}]}},
            "number 2 is number 1 again, .* leave one out",
        ),
        ({"vectors": {"starts": [{}, {"kind": "labels"}]}}, "kind labels takes each task's own words"),
        ({"model": {"head": "sequence"}}, "need a language model's head"),
    ],
)
def test_what_is_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        parse({**study_values(tmp_path), **changes}, Study)


def test_unseen_targets_are_unseen(tmp_path):
    values = study_values(tmp_path)
    seen = {"targets": [{"target": values["tasks"][0], "sources": ["beta"]}]}
    with pytest.raises(ConfigError, match="alpha is among the tasks, as alpha, so it is not unseen"):
        parse({**values, "few": seen}, Study)
    seen["targets"][0]["target"] = {**values["tasks"][0], "name": "other"}
    with pytest.raises(ConfigError, match="other is among the tasks, as alpha, so it is not unseen"):
        parse({**values, "few": seen}, Study)
    fine = {**values, "tasks": [*values["tasks"], {"source": "trec"}]}
    one = {"target": {"source": "trec-fine"}, "sources": ["beta"]}
    with pytest.raises(ConfigError, match="trec-fine is among the tasks, as trec, so it is not unseen"):
        parse({**fine, "few": {"targets": [one]}}, Study)
    one["target"] = {"source": "movies"}
    with pytest.raises(ConfigError, match="target names must differ"):
        parse({**fine, "few": {"targets": [one, one]}}, Study)


def test_starts_of_zeros_have_no_relative_length(tmp_path):
    """And do not stop the study after it was trained; a start of labels is for one task at a time."""
    values = study_values(tmp_path)
    values["vectors"]["starts"] = [{"kind": "zeros"}, {"kind": "vocabulary"}]
    values |= {"tasks": values["tasks"][:1], "sums": None, "few": None, "groups": {}}
    found = execute(parse(values, Study))["independence"]["alpha"]
    assert found["ratios"][0] is None
    assert found["ratios"][1] > 0
    values["vectors"]["starts"] = [{"kind": "vocabulary"}, {"kind": "labels"}]
    assert len(parse(values, Study).vectors.starts) == 2


@pytest.mark.parametrize(
    ("scores", "rate"),
    [
        ({"alpha": {"0.1": 0.5, "0.3": 0.9, "1": 0.2}, "beta": {"0.1": 0.6, "0.3": None, "1": 0.4}}, 0.1),
        ({"alpha": {"0.1": None, "0.3": 0.9, "1": 0.2}, "beta": {"0.1": 0.6, "0.3": 0.1, "1": 0.9}}, 1),
        ({"alpha": {"0.1": 0.2, "0.3": 0.5, "1": 0.5}, "beta": {"0.1": 0.2, "0.3": 0.5, "1": 0.5}}, 0.3),
        ({"alpha": {"0.1": 0.5, "0.3": None, "1": None}, "beta": {"0.1": None, "0.3": 0.5, "1": None}}, None),
    ],
)
def test_a_rate_that_failed_anywhere_is_not_chosen(tmp_path, monkeypatch, scores, rate):
    """None is a run that failed; of those that are left everywhere the best mean counts, of equal ones the smaller."""
    values = study_values(tmp_path)
    values["vectors"] |= {"learning_rates": [0.1, 0.3, 1], "tune_on": ["alpha", "beta"]}

    def runs(title, run, *_):
        each = scores[Path(run.output_dir).name]
        return {
            "runs": [{"name": f"rate{at}", "failed": "" if score else "not a number"} for at, score in each.items()]
        }

    def read_results(out):
        return {"validation": [{"value": scores[out.parent.name][out.name.removeprefix("rate")]}]}

    monkeypatch.setattr(stages.stages, "run_group", runs)
    monkeypatch.setattr(stages.stages, "read_results", read_results)
    if rate is None:
        message = r"every rate failed on some task; give lower ones in vectors\.learning_rates"
        with pytest.raises(TrainingError, match=message):
            stages._choose_rate(parse(values, Study), ProgressReporter())
        return
    chosen, tried = stages._choose_rate(parse(values, Study), ProgressReporter())
    means = {at: (scores["alpha"][at] + scores["beta"][at]) / 2 for at in ("0.1", "0.3", "1")
             if None not in (scores["alpha"][at], scores["beta"][at])}  # fmt: skip
    assert chosen == rate
    assert tried == {at: pytest.approx(mean) for at, mean in means.items()}


def test_rates_at_which_the_loss_is_no_number(tmp_path, monkeypatch):
    """Left out where another did better; where none did it is an error. Prompts that went far have no loss here."""

    def near(step):
        far = float(step.prompt.values.detach().abs().max()) > 1e3
        return objectives.task(step) * (float("nan") if far else 1.0)

    monkeypatch.setitem(objectives.OBJECTIVES, "near", near)
    values = study_values(tmp_path)
    values["vectors"] |= {
        "learning_rates": [0.1, 1e6],
        "training": {**values["vectors"]["training"], "objectives": {"near": 1.0}},
    }
    rate, tried = stages._choose_rate(parse(values, Study), ProgressReporter())
    assert (rate, list(tried)) == (0.1, ["0.1"])
    values["vectors"] |= {"learning_rates": [1e6, 1e7]}
    with pytest.raises(TrainingError, match="not a number"):
        stages._choose_rate(parse({**values, "output_dir": str(tmp_path / "none")}, Study), ProgressReporter())


@pytest.mark.parametrize("model", ["gpt2", "t5"])
def test_vectors_of_other_models(tmp_path, model):
    """The first question on another kind of model: every condition, with a prompt for each start or ordered pair."""
    values = study_values(tmp_path, model)
    values |= {"tasks": values["tasks"][:2], "sums": None, "few": None}
    values["vectors"] |= {"learning_rates": [0.3]}
    results = execute(parse(values, Study))
    assert set(results["independence"]) == {"alpha", "beta"}
    for task, one in results["independence"].items():
        counts = {name: len(each["each"]) for name, each in one["scores"].items()}
        assert counts == {"own": 2, "cross": 2, "start": 2, "shuffled": 2, "random": 2, "alone": 2}
        trained = [page(values, "vectors", task, f"start{place}")["summary"] for place in (0, 1)]
        assert one["scores"]["own"]["each"] == [run["after"]["value"] for run in trained]
        assert one["stock"] == trained[0]["before"]["value"]
        assert min(one["ratios"]) > 0
    assert list(results["claims"]) == ["independence"]
    assert (results["pairs"], results["again"], results["few"]) == ([], {}, {})


@pytest.mark.assets
def test_all_packaged_text_tasks_can_stand_in_a_study():
    """Those of the page, with the rest as it is by default."""
    text = (Path(__file__).parents[1] / "docs" / "methods" / "task-vectors.md").read_text(encoding="utf-8")
    (block,) = [one for one in re.findall(r"^```yaml\n(.*?)^```", text, re.M | re.S) if "source: trec-fine}" in one]
    study = parse(yaml.safe_load(block), Study)
    assert len(study.titles) == 13
    stages._check(study)


class Poison:
    """Rows that nobody may look at."""

    def __len__(self):
        return 5

    def __getattr__(self, name):
        pytest.fail("test rows were read")

    def __getitem__(self, place):
        pytest.fail("test rows were read")

    def __iter__(self):
        pytest.fail("test rows were read")


def test_a_mean_that_is_no_number_chooses_no_coefficient(monkeypatch):
    """Such as that of a correlation with equal predictions."""
    from types import SimpleNamespace

    nan = float("nan")
    task = SimpleNamespace(name="a", validation=[{}])
    evaluator = SimpleNamespace(task=task, scores=lambda *_: [nan, 0.25, 0.5, nan, 0.25])
    monkeypatch.setattr(coefficient.vectors, "apply", lambda *_: None)
    grid = (0, 0.25, 0.5, 0.75, 1)
    assert coefficient.choose_coefficient([evaluator], None, None, grid, ProgressReporter()).best == 0.5


def test_the_search_never_reads_test_rows(done):
    """With test rows that cannot be read the same coefficient is found."""
    from dataclasses import replace

    values, results, _ = done
    at_hand = stages.StudyResources(parse(values, Study), ProgressReporter())
    evaluators = [at_hand.evaluator(name) for name in ("alpha", "beta")]
    poisoned = [replace(one, task=replace(one.task, test=Poison())) for one in evaluators]
    one, other = (at_hand.vectors(name)[0] for name in ("alpha", "beta"))
    start = one.reference.initial
    found = coefficient.choose_coefficient(poisoned, one + other, start, (0, 0.5, 1), ProgressReporter())
    assert found.best == results["pairs"][0]["coefficients"][0]
    assert found == coefficient.choose_coefficient(evaluators, one + other, start, (0, 0.5, 1), ProgressReporter())
    assert found.means == [pytest.approx((a + b) / 2) for a, b in zip(*found.scores.values(), strict=True)]
    assert found.means[found.grid.index(found.best)] == max(found.means)
