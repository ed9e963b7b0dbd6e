"""Instance-wise prompt tuning through everything: run, resume, artifact, answers, SoftPromptModel; and pretraining."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

import local
from softprompts import SoftPromptModel, pretrain
from softprompts.artifacts import artifact
from softprompts.config import EvaluationConfig, parse
from softprompts.errors import ArtifactError, ConfigError, TrainingError
from softprompts.evaluation import evaluate
from softprompts.model.soft_prompt_model import open_prompts
from softprompts.recipes.run import run as job

LENGTH = 18
"""Tokens of the longest text, so that prompts reach the words in which texts differ."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and its data."""
    where = tmp_path_factory.mktemp("ipt")
    local.run_values(where)
    return where


@pytest.fixture
def values(folder: Path, tmp_path: Path) -> dict[str, Any]:
    """The configuration of a run."""
    return {
        "model": {"name": str(folder / "llama"), "dtype": "float32", "threads": 1, "attention": "packed"},
        "prompt": {"method": "ipt", "num_virtual_tokens": LENGTH},
        "task": {
            "source": str(folder / "colors.csv"),
            "name": "colors",
            "template": "{text}:",
            "split": {"validation_fraction": 0.2, "test_fraction": 0.2},
        },
        "training": {"max_steps": 6, "batch_size": 8, "learning_rate": 0.5, "save_steps": 2, "eval_steps": 3},
        "evaluation": {"resamples": 100},
        "output_dir": str(tmp_path / "out"),
    }


def options(values: dict[str, Any], **given: Any) -> dict[str, Any]:
    """The same with options of the method."""
    values["prompt"]["options"] = given
    return values


def stopping(at: int) -> job.ProgressReporter:
    """A screen that breaks off after a step."""

    def stop(_: str, report: Any) -> None:
        if report.step == at:
            raise KeyboardInterrupt

    return job.ProgressReporter(on_step=stop)


def test_a_run_and_its_artifact(values: dict[str, Any], tmp_path: Path) -> None:
    """What is trained and what the data moved is told, and the artifact answers as the run did."""
    run = parse(values)
    made = job.prepare(run)
    results = job.run(run)
    table = made.model.registry.method(made.prompts[0]).shared.table.rows
    assert results["summary"]["trainable"] == table.numel()
    size = sum(p.numel() for p in made.model.backbone.model.parameters())
    assert results["summary"]["share"] == pytest.approx(table.numel() / size)
    rows = [made.encoders[0].encode(row).input_ids[:LENGTH] for row in made.tasks[0].train]
    assert results["summary"]["moved"] <= len({token for row in rows for token in row}) * table.shape[1]
    found = artifact.load(tmp_path / "out" / "prompt")
    begin = made.initial_parameters["prompts.colors.shared.table.rows"]
    changed = (found.state["shared.table.rows"] != begin).any(1)
    assert results["summary"]["moved"] == int((found.state["shared.table.rows"] != begin).sum())
    assert set(changed.nonzero()[:, 0].tolist()) <= {token for row in rows for token in row}
    assert 0 < int(changed.sum()) < len(table)
    assert found.prompt is None
    assert torch.equal(found.initial, made.init.prompt)
    assert all(0 < row["rms_ratio"] < 100 for row in results["curve"])
    opened = open_prompts([tmp_path / "out" / "prompt"], config=run.model)[0]
    for config in (EvaluationConfig(), EvaluationConfig(by="generate", max_new_tokens=3)):
        trained = job.prepare(run)
        trained.model.registry.method(trained.prompts[0]).load_state_dict(found.state)
        rows, encoder = made.tasks[0].test, made.encoders[0]
        ours = list(evaluate.answers(opened, rows, prompt=opened.task, encoder=encoder, config=config))
        theirs = list(evaluate.answers(trained.model, rows, prompt=trained.prompt(0), encoder=encoder, config=config))
        assert [one.text for one in ours] == [one.text for one in theirs]
        for one, other in zip(ours, theirs, strict=True):
            assert one.scores == pytest.approx(other.scores, abs=1e-5)
    assert found.scores["accuracy"]["value"] == results["summary"]["after"]["value"]


def test_it_goes_on_bit_for_bit(values: dict[str, Any], tmp_path: Path) -> None:
    """With dropout: each step draws from a random stream of its own."""
    options(values, strategy="mlp", table="low-rank", rank=4)
    job.run(parse(values))
    cut = parse({**values, "output_dir": str(tmp_path / "cut")})
    with pytest.raises(KeyboardInterrupt):
        job.run(cut, stopping(3))
    job.run(cut)
    one, two = (artifact.load(tmp_path / name / "prompt") for name in ("out", "cut"))
    assert one.digest == two.digest
    assert all(torch.equal(one.state[key], two.state[key]) for key in one.state)


def test_tasks_share_the_table_and_may_have_bases(values: dict[str, Any], tmp_path: Path) -> None:
    task = options(values, base="start", table="hashed", rows=50).pop("task")
    values["tasks"] = [{**task, "name": "one"}, {**task, "name": "two", "template": "{text}?"}]
    run = parse(values)
    results = job.run(run)
    assert results["tasks"][0]["summary"]["trainable"] == LENGTH * 32 + 50 * 32 // 2
    one, two = (artifact.load(tmp_path / "out" / "prompt" / name) for name in ("one", "two"))
    assert sorted(one.state) == ["prompt", "shared.table.rows"]
    assert torch.equal(one.state["shared.table.rows"], two.state["shared.table.rows"])
    assert not torch.equal(one.state["prompt"], two.state["prompt"])
    for name, page in zip(("one", "two"), results["tasks"], strict=True):
        opened = open_prompts([tmp_path / "out" / "prompt" / name], config=run.model)[0]
        found = evaluate.evaluate(opened, job.prepare(run).tasks[0].test, prompt=opened.task, config=run.evaluation)
        assert found.headline.value == page["summary"]["after"]["value"]


@pytest.mark.parametrize("given", [{"strategy": "rnn"}, {"base": "start"}], ids=str)
def test_a_model_with_named_prompts(values: dict[str, Any], tmp_path: Path, given: dict[str, Any]) -> None:
    """Mixed rows equal rows alone, what is saved comes back, more tasks share, and embeddings alone are refused."""
    options(values, **given)
    path = values["model"]["name"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, padding_side="left")
    stock = transformers.AutoModelForCausalLM.from_pretrained(path)
    model = SoftPromptModel(stock, tokenizer=tokenizer)
    torch.manual_seed(3)
    model.add_task("own", parse({"prompt": values["prompt"]}).prompt)
    model.add_task("plain", parse({"prompt": {"num_virtual_tokens": 3}}).prompt)
    for seed, parameter in enumerate(model.prompts.parameters()):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    texts = ["the thing 3 is red", "the thing is blue and more than that", "red", "the green thing"]
    tasks = ["own", "plain", "own", "plain"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    model.save_pretrained(tmp_path / "saved")
    again = SoftPromptModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(path), tmp_path / "saved")
    with torch.no_grad():
        together = model(**batch, tasks=tasks).logits
        for i, (text, task) in enumerate(zip(texts, tasks, strict=True)):
            alone = model(**tokenizer([text], return_tensors="pt"), tasks=task).logits[0]
            torch.testing.assert_close(together[i, -len(alone) :], alone, atol=1e-5, rtol=1e-5)
        assert torch.equal(again(**batch, tasks=tasks).logits, together)
    with pytest.raises(ValueError, match="the text was given as embeddings"):
        model(inputs_embeds=stock.get_input_embeddings()(batch["input_ids"]), tasks="own")
    model.task = "own"
    model.add_task("other")
    shared = [key for key in model.state_dict() if key.endswith("table.rows")]
    assert len(shared) == 1, "a table is shared by all tasks"


def test_a_model_drops_in_training_mode_only(values: dict[str, Any]) -> None:
    """A new model is in the mode that a stock one comes in; prompts that are added have the model's mode."""
    path = values["model"]["name"]
    model = SoftPromptModel(transformers.AutoModelForCausalLM.from_pretrained(path))
    config = parse({"prompt": {**values["prompt"], "init": {"kind": "random"}, "options": {"strategy": "mlp"}}}).prompt
    model.add_task("own", config)
    text = torch.tensor([[5, 6, 7, 8]])

    def same() -> bool:
        with torch.no_grad():
            return torch.equal(model(text).logits, model(text).logits)

    assert same()
    model.train()
    assert not same()
    assert not model.model.training
    model.add_task("more", config)
    model.task = "more"
    assert not same()
    model.eval()
    assert same()


# Pretraining


def topics(values: dict[str, Any], out: Path, **given: Any) -> dict[str, Any]:
    """The configuration of a pretraining."""
    train = {
        "max_steps": 60,
        "batch_size": 16,
        "learning_rate": 0.3,
        "head_learning_rate": 0.05,
        "eval_steps": 20,
        "save_steps": 7,
    }
    return options({**values, "output_dir": str(out), "training": train, "prompt": dict(values["prompt"])}, **given)


@pytest.mark.parametrize(
    "given", [{}, {"strategy": "cnn", "table": "low-rank"}, {"strategy": "rnn"}, {"strategy": "mlp"}], ids=str
)
def test_pretraining_is_where_a_run_begins(values: dict[str, Any], tmp_path: Path, given: dict[str, Any]) -> None:
    """Table and encoder change, topics are told apart, and `init.state` begins with both."""
    run = parse(topics(values, tmp_path / "topics", **given))
    prepared = job.prepare(run)
    before = prepared.model.registry.method(prepared.prompts[0]).state_dict()
    results = pretrain(run)
    assert json.loads((tmp_path / "topics" / "results.json").read_text())["scores"] == results["scores"]
    assert (tmp_path / "topics" / "report.html").is_file()
    assert results["summary"]["after"]["value"] > max(0.9, results["majority"])
    assert [one["step"] for one in results["validation"]] == [20, 40, 60]
    found = artifact.load(tmp_path / "topics" / "prompt")
    # of mlp f is a mean, and what stands behind f is never pretrained
    parts = ("shared.table.",) if given in ({}, {"strategy": "mlp"}) else ("shared.table.", "shared.encoder.")
    assert set(found.state) == {name for name in before if name.startswith(parts)}
    assert all(not torch.equal(value, before[name]) for name, value in found.state.items())
    assert results["summary"]["trainable"] == sum(value.numel() for value in found.state.values())
    assert results["summary"]["moved"] < results["summary"]["trainable"]
    values["prompt"]["init"] = {"state": str(tmp_path / "topics" / "prompt")}
    begun = job.prepare(parse(options(values, **given)))
    for name, value in begun.model.registry.method(begun.prompts[0]).state_dict().items():
        assert torch.equal(value, found.state.get(name, before[name])), name
    results = job.run(parse(values))
    assert results["summary"]["steps"] == 6


def test_pretraining_goes_on_bit_for_bit(values: dict[str, Any], tmp_path: Path) -> None:
    pretrain(parse(topics(values, tmp_path / "whole")))
    cut = parse(topics(values, tmp_path / "cut"))
    with pytest.raises(KeyboardInterrupt):
        pretrain(cut, stopping(33))
    assert not (tmp_path / "cut" / "results.json").exists()
    results = pretrain(cut)
    assert [step["step"] for step in results["curve"]] == list(range(1, 61))
    one, two = (artifact.load(tmp_path / name / "prompt") for name in ("whole", "cut"))
    assert all(torch.equal(one.state[key], two.state[key]) for key in one.state)
    with pytest.raises(TrainingError, match=r"belongs to a run with other settings .*rate was 0.3, is now 0.2"):
        pretrain(cut.model_copy(update={"training": cut.training.model_copy(update={"learning_rate": 0.2})}))


def test_what_is_found_wrong_before_and_after(values: dict[str, Any], tmp_path: Path) -> None:
    """A place that cannot be written to before any step, and, opened, that a table alone answers nothing."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write into .*file/out: .*choose another directory with --out"):
        pretrain(parse(topics(values, tmp_path / "file" / "out")), stopping(0))
    run = parse(topics(values, tmp_path / "topics", base="start"))
    pretrain(run.model_copy(update={"training": run.training.model_copy(update={"max_steps": 2, "eval_steps": None})}))
    with pytest.raises(
        ArtifactError, match="holds what pretraining taught method ipt and answers no task; train a run"
    ):
        open_prompts([tmp_path / "topics" / "prompt"], config=run.model)[0]


def test_a_run_does_not_go_on_from_another_pretraining(values: dict[str, Any], tmp_path: Path) -> None:
    """Pretrained anew under its old name it is another start."""
    for seed in (0, 1):
        run = parse({**topics(values, tmp_path / f"topics{seed}"), "seed": seed})
        short = run.training.model_copy(update={"max_steps": 2, "eval_steps": None})
        pretrain(run.model_copy(update={"training": short}))
    values["prompt"]["init"] = {"state": str(tmp_path / "state")}
    (tmp_path / "topics0" / "prompt").rename(tmp_path / "state")
    job.run(parse(values))
    for _ in range(8):  # the same state is the same start however often it is read
        job.run(parse(values))
    (tmp_path / "state").rename(tmp_path / "old")
    (tmp_path / "topics1" / "prompt").rename(tmp_path / "state")
    with pytest.raises(TrainingError, match=r"belongs to a run with other settings .*start was"):
        job.run(parse(values))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": {"method": "prompt-tuning"}}, "method prompt-tuning has nothing to pretrain; possible: ipt"),
        (
            {"model": {"name": "x", "head": "sequence"}},
            "pretraining adds its own classifier; leave model.head at lm",
        ),
        (
            {"training": {"early_stopping_patience": 2, "eval_steps": 1}},
            "training.early_stopping_patience means nothing in pretraining; possible: max_steps,",
        ),
        ({"runs": [{"name": "a"}]}, "pretraining takes one task and no list of runs"),
    ],
)
def test_what_pretraining_refuses(values: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pretrain(parse({**values, **changes}))


def test_the_commands(values: dict[str, Any], call: Any, tmp_path: Path) -> None:
    """Pretrain, train from it, answer; what was pretrained alone makes no prompts."""
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(topics(values, tmp_path / "topics", strategy="cnn")))
    status, _, err = call("pretrain", "--config", file, "--set", "training.max_steps=20")
    assert status == 0, err
    assert "training 20/20 loss" in err
    file.write_text(yaml.safe_dump(options(values, strategy="cnn")))
    prompt = tmp_path / "topics" / "prompt"
    status, out, err = call("train", "--config", file, "--set", f"prompt.init.state={prompt}")
    assert status == 0, err
    assert "changed)" in out
    status, out, err = call("predict", tmp_path / "out" / "prompt", "the thing is red")
    assert (status, json.loads(out)["answer"] in ("warm", "cold")) == (0, True), err
    with pytest.raises(ArtifactError, match="what pretraining taught method ipt and answers no task"):
        open_prompts([prompt], config=parse(values).model)[0]
