"""The commands `softprompts vector ...` and `python -m studies vectors`, as a user meets them."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

import local
from softprompts import search_coefficient
from softprompts.artifacts import artifact, vectors
from softprompts.config import parse
from softprompts.recipes.evaluate_prompts import Evaluator
from softprompts.recipes.run import run as job
from test_study_vectors import study_values

P = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two tasks trained from the same start, and one of them from another; the folder holds `runs`."""
    where = tmp_path_factory.mktemp("vectors")
    model = local.model_directory(where / "llama")
    for name, seed, out in (("alpha", 0, "alpha"), ("beta", 0, "beta"), ("alpha", 1, "other")):
        rows = local.colors(where / f"{name}.csv", rows=40, seed=len(name))
        run = {
            "model": {"name": str(model), "dtype": "float32", "threads": 1},
            "prompt": {"num_virtual_tokens": P, "init": {"seed": seed}},
            "task": {
                "source": str(rows),
                "name": name,
                "template": "{text}:",
                "split": {"validation_fraction": 0.2, "test_fraction": 0.2, "seed": len(name)},
            },
            "training": {"max_steps": 3, "batch_size": 4, "learning_rate": 0.3},
            "evaluation": {"resamples": 100},
            "output_dir": str(where / "runs" / out),
        }
        job.run(parse(run))
    return where


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


def load(name: str) -> artifact.Artifact:
    return artifact.load(Path("runs") / name / "prompt")


def tau(name: str) -> torch.Tensor:
    one = load(name)
    return one.prompt.double() - one.initial.double()


def refused(result, *words):
    status, _, err = result
    assert status == 1
    assert "Traceback" not in err
    for word in words:
        assert word in err, err


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["add", "alpha", "beta"], lambda: tau("alpha") + tau("beta")),
        (["sub", "alpha", "beta"], lambda: tau("alpha") - tau("beta")),
        (["negate", "alpha"], lambda: -tau("alpha")),
        (["scale", "alpha", "--by", "0.25"], lambda: tau("alpha") * 0.25),
        (["average", "alpha", "beta"], lambda: (tau("alpha") + tau("beta")) / 2),
        (["apply", "alpha - 0.5*beta", "--scale", "2"], lambda: 2 * tau("alpha") - tau("beta")),
        (["merge", "alpha", "beta", "--how", "weighted", "--weights", "1,0.5"], lambda: tau("alpha") + tau("beta") / 2),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_arithmetic(call, here, tmp_path, command, expected):
    """What is written is the common start plus what the command says, with its parents."""
    status, out, err = call("vector", *command, "--out", tmp_path / "made")
    assert status == 0, err
    assert str(tmp_path / "made") in out
    made = artifact.load(tmp_path / "made")
    start = load("alpha").initial
    assert made.initial.equal(start)
    torch.testing.assert_close(made.prompt, (start.double() + expected()).float(), atol=1e-7, rtol=1e-6)
    names = {word for word in ("alpha", "beta") if any(word in part for part in command)}
    assert set(made.parents) == {load(name).digest for name in names}
    parts = json.loads((tmp_path / "made" / "softprompts.json").read_text())["config"]["vector"]["parts"]
    assert {part["name"] for part in parts} == names
    total = sum(part["coefficient"] * tau(part["name"]) for part in parts)
    torch.testing.assert_close(total, expected())
    facts = artifact.inspect(tmp_path / "made")
    assert all(name in facts["sum"] for name in names)
    assert f"made of trained prompts: `{facts['sum']}`" in (tmp_path / "made" / "README.md").read_text()


@pytest.mark.parametrize("command", [["scale", "alpha", "--by", "0"], ["apply", "alpha + beta", "--scale", "0"]])
def test_nothing_of_a_vector_is_its_start(call, here, tmp_path, command):
    status, out, err = call("vector", *command, "--out", tmp_path / "made")
    assert status == 0, err
    assert "the change is 0 times as long as the start" in out
    made = artifact.load(tmp_path / "made")
    assert made.prompt.equal(load("alpha").initial)
    assert load("alpha").digest in made.parents


def test_a_sum_is_evaluated_where_its_tasks_answer_alike(call, here, tmp_path):
    """A multiple of a vector answers as its run did; a sum of tasks with the same words needs rows, others cannot."""
    assert call("vector", "scale", "alpha", "--by", "1", "--out", tmp_path / "one")[0] == 0
    status, out, err = call("evaluate", tmp_path / "one", "--json")
    assert status == 0, err
    assert json.loads(out)["scores"]["accuracy"]["value"] == load("alpha").scores["accuracy"]["value"]
    assert call("vector", "add", "alpha", "beta", "--out", tmp_path / "two")[0] == 0
    refused(call("evaluate", tmp_path / "two"), "does not name the data it was trained on; give --data")
    status, out, err = call("evaluate", tmp_path / "two", "--data", here / "beta.csv", "--json")
    assert status == 0, err
    assert json.loads(out)["scores"]["accuracy"]["n"] == 40
    one = load("alpha")
    artifact.save(replace(one, template={**one.template, "template": "{text}?"}), tmp_path / "asked")
    assert call("vector", "add", tmp_path / "asked", "beta", "--out", tmp_path / "both")[0] == 0
    refused(call("evaluate", tmp_path / "both"), "holds no task")


@pytest.mark.parametrize("how", ["average", "ties", "dare", "slerp"])
def test_merges_take_the_start_of_what_they_merge(call, here, tmp_path, how):
    found = []
    for order in (("alpha", "beta"), ("beta", "alpha")):
        out = tmp_path / "-".join(order)
        status, _, err = call("vector", "merge", *order, "--how", how, "--out", out)
        assert status == 0, err
        found.append(artifact.load(out))
    assert found[0].initial.equal(load("alpha").initial)
    assert found[0].digest == found[1].digest
    assert not found[0].prompt.equal(found[0].initial)


def test_another_start(call, here, tmp_path):
    """--start adds to a prompt, --start-of to where it began."""
    for option, start in (("--start", load("other").prompt), ("--start-of", load("other").initial)):
        status, _, err = call("vector", "apply", "alpha", option, "other", "--out", tmp_path / option)
        assert status == 0, err
        made = artifact.load(tmp_path / option)
        assert made.initial.equal(start)
        torch.testing.assert_close(made.prompt, (start.double() + tau("alpha")).float(), atol=0, rtol=0)
    refused(
        call("vector", "add", "alpha", "other", "--out", tmp_path / "no"),
        "did not all begin at the same start",
        "--start-of",
    )
    both = call("vector", "add", "alpha", "other", "--start", "beta", "--start-of", "beta", "--out", tmp_path / "no")
    refused(both, "either --start or --start-of")


def test_make_tells_where_a_prompt_began(call, here, tmp_path):
    one = load("alpha")
    silent = tmp_path / "silent"
    artifact.save(replace(one, initial=None), silent)
    refused(
        call("vector", "negate", silent, "--out", tmp_path / "x"), "does not store where its training began", "--start"
    )
    began = tmp_path / "began"
    artifact.save(replace(one, prompt=one.initial, state={"prompt": one.initial}), began)
    status, _, err = call("vector", "make", silent, "--start", began, "--out", tmp_path / "made")
    assert status == 0, err
    made = artifact.load(tmp_path / "made")
    assert made.initial.equal(one.initial)
    assert made.prompt.equal(one.prompt)
    assert made.scores == one.scores
    wrong = call("vector", "make", "alpha", "--start", "other", "--out", tmp_path / "wrong")
    refused(wrong, "alpha stores where its training began", "softprompts vector apply alpha --start PROMPT")
    assert call("vector", "make", "alpha", "--start-of", "alpha", "--out", tmp_path / "same")[0] == 0


def test_a_sum_that_begins_with_a_minus_sign(call, here, tmp_path):
    status, _, err = call("vector", "apply", "--out", tmp_path / "made", "--", "-alpha + 0.5*beta")
    assert status == 0, err
    found = artifact.load(tmp_path / "made")
    expected = found.initial.double() - tau("alpha") + 0.5 * tau("beta")
    torch.testing.assert_close(found.prompt, expected.float(), atol=1e-7, rtol=1e-6)
    assert call("vector", "apply", "--help")[1].count("--") > 3


def test_compare_prints_a_table_and_writes_heatmaps(call, here, tmp_path):
    status, out, err = call("vector", "compare", "alpha", "beta", "other", "--out", tmp_path / "c")
    assert status == 0, err
    a, b = tau("alpha").flatten(), tau("beta").flatten()
    cosine = float(a @ b / a.norm() / b.norm())
    line = next(line for line in out.splitlines() if line.startswith("alpha "))
    ratio = float(a.norm() / load("alpha").initial.double().norm())
    assert line.split() == [
        "alpha",
        f"{float(a.norm()):.3g}",
        f"{ratio:.3g}",
        "1.000",
        f"{cosine:.3f}",
        line.split()[-1],
    ]
    results = json.loads((tmp_path / "c/results.json").read_text())
    assert results["cosines"]["vectors, flat"][0][1] == pytest.approx(cosine)
    assert results["distances"][0][1] == pytest.approx(float((a - b).norm()))
    text = (tmp_path / "c/report.html").read_text()
    assert len(re.findall("<svg", text)) == 4
    assert "Cosines of vectors, rows" in text
    assert json.loads(call("vector", "compare", "alpha", "beta", "--how", "mean", "--json", "--out", tmp_path / "c")[1])
    refused(call("vector", "compare", "alpha", "alpha", "--out", tmp_path / "c"), "a comparison takes each prompt once")
    refused(call("vector", "compare", "alpha", "beta", "--how", "row", "--out", tmp_path / "c"), "flat, mean, rows")


def test_search_writes_the_prompt_of_the_best_coefficient(call, here, tmp_path):
    status, out, err = call("vector", "search", "alpha + beta", "--coefficients", "0,0.5,1", "--out", tmp_path / "s")
    assert status == 0, err
    found = json.loads((tmp_path / "s/results.json").read_text())
    means = {one["coefficient"]: one["mean"] for one in found["validation"]}
    assert found["coefficient"] == max(means, key=lambda at: (means[at], -at))
    made = artifact.load(tmp_path / "s/prompt")
    total = vectors.read_expression("alpha + beta")
    assert made.prompt.equal(vectors.apply(total, load("alpha").initial, found["coefficient"]))
    assert set(found["test"]) == {"alpha", "beta"}
    assert f"with coefficient {found['coefficient']:g}" in out
    assert "score by coefficient" in (tmp_path / "s/report.html").read_text().lower()
    results = search_coefficient("alpha + beta", tmp_path / "python", grid=(0, 0.5, 1))
    assert (results["coefficient"], results["test"]) == (found["coefficient"], found["test"])
    # on another task's rows only
    status, _, err = call("vector", "search", "alpha", "--on", "beta", "--coefficients", "1", "--out", tmp_path / "t")
    assert status == 0, err
    found = json.loads((tmp_path / "t/results.json").read_text())
    assert list(found["test"]) == ["beta"]
    assert found["coefficient"] == 1


def test_search_reads_test_rows_once_and_last(call, here, tmp_path, monkeypatch):
    """The default grid on validation rows, a task after the other; then each task's test rows, with what was chosen."""
    read = []
    original = Evaluator.evaluate

    def watched(evaluator, prompt, rows):
        (role,) = [role for role in ("train", "validation", "test") if rows is getattr(evaluator.task, role)]
        read.append((evaluator.task.name, role, prompt))
        return original(evaluator, prompt, rows)

    monkeypatch.setattr(Evaluator, "evaluate", watched)
    status, _, err = call("vector", "search", "alpha + beta", "--out", tmp_path / "s")
    assert status == 0, err
    grid = [step / 20 for step in range(21)]
    found = json.loads((tmp_path / "s/results.json").read_text())
    assert [one["coefficient"] for one in found["validation"]] == grid
    expected = [*[("alpha", "validation")] * 21, *[("beta", "validation")] * 21, ("alpha", "test"), ("beta", "test")]
    assert [(task, role) for task, role, _ in read] == expected
    start, change = load("alpha").initial, tau("alpha") + tau("beta")
    wanted = [start.double() + at * change for at in [*grid, *grid, found["coefficient"], found["coefficient"]]]
    for (_, _, prompt), one in zip(read, wanted, strict=True):
        torch.testing.assert_close(prompt, one.float(), atol=1e-7, rtol=1e-6)


def test_a_search_without_test_rows_says_so(call, here, tmp_path):
    one = load("alpha")
    config = json.loads(json.dumps(one.config))
    config["task"]["split"]["test_fraction"] = 0
    artifact.save(replace(one, config=config), tmp_path / "untested")
    status, _, err = call("vector", "search", tmp_path / "untested", "--coefficients", "0,1", "--out", tmp_path / "s")
    assert status == 0, err
    assert "alpha has no test rows" in err
    results = json.loads((tmp_path / "s" / "results.json").read_text())
    assert results["test"] == {}
    assert "alpha has no test rows" in results["warnings"][0]


def test_the_search_of_a_single_vector_scores_it_as_its_run_did(call, here, tmp_path):
    """With coefficient 1 the trained prompt, with the scores of its run."""
    status, _, err = call("vector", "search", "alpha", "--coefficients", "1", "--out", tmp_path / "s")
    assert status == 0, err
    found = json.loads((tmp_path / "s/results.json").read_text())
    run = json.loads(Path("runs/alpha/results.json").read_text())
    assert found["test"]["alpha"] == run["scores"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["add", "alfa", "beta"], ["no trained prompt 'alfa'", "runs/alfa/prompt"]),
        (["add", "alpha-beta"], ["write spaces around + and -", "alpha - beta"]),
        (["apply", "alpha beta"], ["after 'alpha' there should be `+` or `-`, found 'beta'"]),
        (["merge", "alpha", "--how", "tie"], ["no merge 'tie'", "ties"]),
        (["merge", "alpha", "beta", "--how", "ties", "--weights", "1;2"], ["write numbers with commas"]),
        (["merge", "alpha", "--how", "slerp"], ["slerp needs two vectors"]),
        (["search", "alpha", "--coefficients", "a"], ["write numbers with commas"]),
        (["scale", "alpha", "--by", "nan"], ["give a finite number"]),
        (["apply", "alpha - alpha"], ["the sum is zero", "--start PROMPT"]),
    ],
    ids=lambda value: " ".join(value[:3]) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_said(call, here, tmp_path, arguments, words):
    refused(call("vector", *arguments, "--out", tmp_path / "x"), *words)
    assert not (tmp_path / "x").exists()


def test_other_lengths_are_refused_by_name(call, here, tmp_path):
    one = load("alpha")
    artifact.save(replace(one, prompt=one.prompt[:2], initial=one.initial[:2], state={}), tmp_path / "short")
    refused(
        call("vector", "add", "alpha", tmp_path / "short", "--out", tmp_path / "x"),
        "alpha",
        "shape is [4, 32] and [2, 32]",
    )


def test_the_study_says_what_held(call_study, tmp_path):
    values = {**study_values(tmp_path), "sums": None, "few": None}
    values["vectors"] = {**values["vectors"], "learning_rates": [0.3], "tune_on": None}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(values))
    status, out, err = call_study("vectors", "--config", tmp_path / "study.yaml", "--out", tmp_path / "o")
    assert status == 0, err
    results = json.loads((tmp_path / "o/results.json").read_text())
    assert results["claims"]["independence"]["words"] in out
    assert str(tmp_path / "o/report.html") in out
    refused(
        call_study("vectors", "--config", tmp_path / "study.yaml", "--set", "vector.rates=[1]"),
        "unknown key",
        "vectors",
    )
