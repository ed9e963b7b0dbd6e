"""ATTEMPT and SPoT through everything: run, resume, artifact, answers, votes, several runs, SoftPromptModel."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

import local
from closeness import assert_close
from prompted import method_of
from softprompts import SoftPromptModel
from softprompts.artifacts import artifact
from softprompts.config import EvaluationConfig, parse
from softprompts.data import collate
from softprompts.errors import ArtifactError, ConfigError, TrainingError
from softprompts.evaluation import evaluate
from softprompts.model.soft_prompt_model import open_prompts
from softprompts.recipes.run import run as job
from softprompts.types import Batch


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, its data and two trained source prompts, `one` and `two`."""
    folder = tmp_path_factory.mktemp("sources")
    values = local.run_values(folder, max_steps=2)
    for seed, name in enumerate(("one", "two")):
        job.run(parse({**values, "seed": seed, "output_dir": str(folder / name)}))
    return folder


@pytest.fixture
def values(sources: Path, tmp_path: Path) -> dict[str, Any]:
    """The configuration of a run of ATTEMPT; the temperature lets texts of a tiny model differ."""
    paths = [str(sources / name / "prompt") for name in ("one", "two")]
    return {
        "model": {"name": str(sources / "llama"), "dtype": "float32", "threads": 1},
        "prompt": {
            "method": "attempt",
            "num_virtual_tokens": 4,
            "init": {"kind": "vocabulary", "sources": paths},
            "options": {"rank": 8, "temperature": 1.0},
        },
        "task": {
            "source": str(sources / "colors.csv"),
            "name": "colors",
            "template": "{text}:",
            "split": {"validation_fraction": 0.2, "test_fraction": 0.2},
        },
        "training": {"max_steps": 6, "batch_size": 8, "learning_rate": 0.5, "save_steps": 2, "eval_steps": 3},
        "evaluation": {"resamples": 100},
        "output_dir": str(tmp_path / "out"),
    }


def two_tasks(values: dict[str, Any]) -> dict[str, Any]:
    """The same for two tasks that differ in their template."""
    task = values.pop("task")
    values["tasks"] = [{**task, "name": "one"}, {**task, "name": "two", "template": "{text}?"}]
    return values


def test_a_run_and_its_artifact(values: dict[str, Any], sources: Path, tmp_path: Path) -> None:
    results = job.run(parse(values))
    assert results["summary"]["trainable"] == 4 * 32 + 2 * 8 * 32 + 2 * 32
    assert "nearest_words" not in results
    assert all(0 < row["rms_ratio"] < 100 for row in results["curve"])
    assert {row["path"] for row in results["curve"]} == {"packed"}
    assert (tmp_path / "out" / "report.html").is_file()
    made = artifact.load(tmp_path / "out" / "prompt")
    start = job.prepare(parse(values)).init
    assert made.prompt is None
    assert torch.equal(made.initial, start.prompt)
    expected = torch.stack([artifact.load(sources / name / "prompt").prompt for name in ("one", "two")])
    assert torch.equal(made.state["shared.sources"], expected)
    assert not torch.equal(made.state["prompt"], made.initial)
    assert made.scores["accuracy"]["value"] == results["summary"]["after"]["value"]


def test_the_artifact_answers_as_the_run_did(values: dict[str, Any], tmp_path: Path) -> None:
    """The sources may be gone: the artifact holds them. Answers by rank and by writing, each text its own prompt."""
    run = parse(values)
    made = job.prepare(run)
    job.run(run)
    opened = open_prompts([tmp_path / "out" / "prompt"], config=run.model)[0]
    rows = list(made.tasks[0].test)
    trained = job.prepare(run)
    method_of(trained).load_state_dict(opened.registry.records[opened.task].artifact.state)
    for config in (EvaluationConfig(), EvaluationConfig(by="generate", max_new_tokens=3)):
        ours = list(evaluate.answers(opened, rows, prompt=opened.task, config=config))
        theirs = list(
            evaluate.answers(trained.model, rows, prompt=trained.prompt(0), encoder=trained.encoders[0], config=config)
        )
        assert [one.text for one in ours] == [one.text for one in theirs]
        for one, other in zip(ours, theirs, strict=True):
            assert one.scores == pytest.approx(other.scores, abs=1e-5)
    # Alone, and ranked by hand from the whole sequence with the prompt that the text has.
    base, encoder = opened.backbone, opened.example_tokenizer(opened.task)
    (found,) = evaluate.answers(opened, rows[:1], prompt=opened.task, encoder=encoder, config=EvaluationConfig())
    ids = encoder.encode(rows[0]).input_ids
    batch = Batch(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long), torch.zeros(1, dtype=torch.long))
    with torch.no_grad():
        prompt = opened.make_prompts(batch).values[0]
        for label, answer in encoder.candidates().items():
            words = base.embed(torch.tensor(ids + answer))
            logits = base.model(inputs_embeds=torch.cat([prompt, words])[None]).logits[0].log_softmax(-1)
            chance = sum(float(logits[len(prompt) + len(ids) - 1 + i, token]) for i, token in enumerate(answer))
            assert found.scores[label] == pytest.approx(chance, abs=2e-5)


def test_it_goes_on_bit_for_bit(values: dict[str, Any], tmp_path: Path) -> None:
    def stop(_: str, report: Any) -> None:
        if report.step == 3:
            raise KeyboardInterrupt

    job.run(parse(values))
    cut = parse({**values, "output_dir": str(tmp_path / "cut")})
    with pytest.raises(KeyboardInterrupt):
        job.run(cut, job.ProgressReporter(on_step=stop))
    job.run(cut)
    one, two = (artifact.load(tmp_path / name / "prompt") for name in ("out", "cut"))
    assert one.digest == two.digest
    assert all(torch.equal(one.state[key], two.state[key]) for key in one.state)
    first = [method_of(job.prepare(parse({**values, "seed": seed}))).shared.up.weight for seed in (0, 0, 1)]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])


def test_it_does_not_go_on_with_other_sources(values: dict[str, Any], sources: Path, tmp_path: Path) -> None:
    """A source that was trained anew under its old name is another one."""
    paths = values["prompt"]["init"]["sources"]
    copy = artifact.save(artifact.load(paths[0]), tmp_path / "copy")
    values["prompt"]["init"]["sources"] = [str(copy), paths[1]]
    job.run(parse(values))
    found = artifact.load(copy)
    artifact.save(dataclasses.replace(found, prompt=found.prompt + 1), copy)
    with pytest.raises(TrainingError, match=r"belongs to a run with other settings .*start was"):
        job.run(parse(values))


def test_two_tasks_share_what_reads_the_text(values: dict[str, Any], tmp_path: Path) -> None:
    """Each task's artifact holds what they share and its own prompt, and answers alone as in the run."""
    run = parse(two_tasks(values))
    results = job.run(run)
    assert results["tasks"][0]["summary"]["trainable"] == 4 * 32 + (2 * 8 * 32 + 2 * 32) // 2
    one, two = (artifact.load(tmp_path / "out" / "prompt" / name) for name in ("one", "two"))
    assert sorted(one.state) == [
        "prompt",
        *(f"shared.{name}" for name in ("down.weight", "norm.bias", "norm.weight", "sources", "up.weight")),
    ]
    assert torch.equal(one.state["shared.up.weight"], two.state["shared.up.weight"])
    assert not torch.equal(one.state["prompt"], two.state["prompt"])
    for name, page in zip(("one", "two"), results["tasks"], strict=True):
        opened = open_prompts([tmp_path / "out" / "prompt" / name], config=run.model)[0]
        rows = job.prepare(run).tasks[0].test
        found = evaluate.evaluate(opened, rows, prompt=opened.task, config=run.evaluation)
        assert found.headline.value == page["summary"]["after"]["value"]


@pytest.mark.parametrize("method", ["prompt-tuning", "attempt"])
def test_a_task_of_several_loads_into_a_model(values: dict[str, Any], tmp_path: Path, method: str) -> None:
    if method == "prompt-tuning":
        values["prompt"] = {"num_virtual_tokens": 4}
    job.run(parse(two_tasks(values)))
    model = SoftPromptModel(transformers.AutoModelForCausalLM.from_pretrained(values["model"]["name"]))
    for name in ("one", "two"):
        model.load_prompt(tmp_path / "out" / "prompt" / name)
        held = artifact.load(tmp_path / "out" / "prompt" / name).state
        assert torch.equal(model.prompts[name].prompt, held["prompt"])


def test_prompts_vote(values: dict[str, Any], tmp_path: Path) -> None:
    """Two of them in one batch, each row twice: what each says is what it says alone."""
    values["runs"] = [{"name": "a", "seed": 0}, {"name": "b", "seed": 1}]
    results = job.run(parse(values))
    folders = [Path(row["directory"]) / "prompt" for row in results["runs"]]
    assert results["next"][-1] == f"softprompts evaluate {folders[0]} {folders[1]}"
    model = parse(values).model
    both = open_prompts(folders, config=model)[0]
    assert not any(part.training for part in both.prompts.modules())
    rows = job.prepare(parse({**values, "runs": []})).tasks[0].test[:4]
    alone = []
    for folder in folders:
        opened = open_prompts([folder], config=model)[0]
        alone.append(list(evaluate.answers(opened, rows, prompt=opened.task, config=EvaluationConfig())))
    encoder = both.example_tokenizer(both.task)
    texts = [dataclasses.replace(encoder.encode(row), task_id=i, labels=None) for row in rows for i in (0, 1)]
    batch = collate(texts, 0)
    prompt = both.make_prompts(batch)
    single = [open_prompts([folder], config=model)[0] for folder in folders]
    for i in range(len(texts)):
        row = batch.rows(torch.tensor([i]))
        expected = single[i % 2].make_prompts(dataclasses.replace(row, task_ids=torch.zeros(1, dtype=torch.long)))
        assert_close(prompt.values[prompt.prompt_index[i]], expected.values[0])
    voted = list(evaluate.answers(both, rows, prompt=both.tasks, config=EvaluationConfig()))
    assert [one.value for one in voted] == [one.value for one in alone[0]], "of two votes the first wins a draw"


def test_runs_of_several_methods_share_their_batches(values: dict[str, Any], tmp_path: Path) -> None:
    """ATTEMPT beside prompt tuning: each is what it is alone, up to rounding."""
    values["training"] |= {"max_steps": 3, "learning_rate": 0.1}
    del values["training"]["eval_steps"]
    plain = {"name": "plain", "prompt": {"method": "prompt-tuning", "options": {}, "init": {"sources": []}}}
    job.run(parse({**values, "runs": [{"name": "mixed"}, plain], "output_dir": str(tmp_path / "all")}))
    job.run(parse({**values, "output_dir": str(tmp_path / "mixed")}))
    prompt = {"num_virtual_tokens": 4, "init": {"kind": "vocabulary"}}
    job.run(parse({**values, "prompt": prompt, "output_dir": str(tmp_path / "plain")}))
    for name in ("mixed", "plain"):
        one, two = (artifact.load(tmp_path / where / "prompt").state for where in (Path("all") / name, Path(name)))
        for key in one:
            torch.testing.assert_close(one[key], two[key], atol=2e-4, rtol=1e-3)


def test_the_command(values: dict[str, Any], call: Any, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    status, _, err = call("train", "--config", tmp_path / "run.yaml")
    assert status == 0, err
    prompt = tmp_path / "out" / "prompt"
    status, out, err = call("evaluate", prompt, "--json")
    assert status == 0, err
    found = json.loads(out)["scores"]["accuracy"]["value"]
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found == saved["summary"]["after"]["value"]
    status, out, err = call("predict", prompt, "the thing is red")
    assert (status, json.loads(out)["answer"] in ("warm", "cold")) == (0, True), err
    status, out, err = call("generate", prompt, "the thing is", "--max-new-tokens", "3", "--beams", "2")
    assert status == 0, err
    status, out, err = call("inspect", prompt, "--json")
    assert json.loads(out)["plain_prompt"] is False
    status, _, err = call("inspect", prompt, "--words")
    assert status == 1
    assert "holds no plain prompt: attempt makes one from each text" in err
    status, out, _ = call("methods", "--json")
    assert "attempt" in json.loads(out)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"init": {"kind": "vocabulary"}}, ConfigError, "method attempt: .*set prompt.init.sources"),
        ({"options": {"rank": -1}}, ConfigError, "prompt.options of method attempt: rank must be"),
        (
            {"num_virtual_tokens": 5},
            ArtifactError,
            r"one/prompt holds a prompt of \[4, 32\] at site input, but the run wants \[5,",
        ),
        ({"site": "kv"}, ArtifactError, "at site input, but the run wants .* at site kv"),
    ],
)
def test_what_does_not_fit_is_said_before_training(
    values: dict[str, Any], changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    values["prompt"] |= changes
    with pytest.raises(error, match=message):
        job.prepare(parse(values))


def test_a_start_from_the_mean(values: dict[str, Any], sources: Path, tmp_path: Path) -> None:
    """SPoT: the weighted mean of two prompts is where prompt tuning begins, and what its artifact remembers."""
    paths = values["prompt"]["init"]["sources"]
    values["prompt"] = {"num_virtual_tokens": 4, "init": {"kind": "mean", "paths": paths, "weights": [3, 1]}}
    job.run(parse(values))
    one, two = (artifact.load(path).prompt.double() for path in paths)
    expected = (0.75 * one + 0.25 * two).float()
    assert torch.equal(artifact.load(tmp_path / "out" / "prompt").initial, expected)


def ours(values: dict[str, Any]) -> SoftPromptModel:
    """A model with ATTEMPT's prompt as it begins, and a plain one."""
    path = values["model"]["name"]
    model = SoftPromptModel(
        transformers.AutoModelForCausalLM.from_pretrained(path),
        tokenizer=transformers.AutoTokenizer.from_pretrained(path),
    )
    torch.manual_seed(3)
    model.add_task("mixed", parse({"prompt": values["prompt"]}).prompt)
    model.add_task("plain", parse({"prompt": {"num_virtual_tokens": 6}}).prompt)
    return model


def test_a_model_with_named_prompts(values: dict[str, Any], tmp_path: Path) -> None:
    """Mixed rows equal rows alone, and what is saved comes back bit for bit."""
    model = ours(values)
    tokenizer = transformers.AutoTokenizer.from_pretrained(values["model"]["name"])
    tokenizer.padding_side = "left"
    texts = ["the thing 3 is red", "the thing is blue and more than that", "red", "the green thing"]
    tasks = ["mixed", "plain", "mixed", "plain"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    front = batch["attention_mask"].cumsum(1) <= 1  # a token of text before what is learned, to ask the sources with
    labels = batch["input_ids"].masked_fill(front, -100)
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch, labels=labels, tasks=tasks).loss.backward()
        optimizer.step()
    assert "prompts.mixed.shared.sources" in model.state_dict()
    with torch.no_grad():
        together = model(**batch, tasks=tasks).logits
        for i, (text, task) in enumerate(zip(texts, tasks, strict=True)):
            row = tokenizer([text], return_tensors="pt")
            alone = model(**row, tasks=task).logits[0]
            torch.testing.assert_close(together[i, -len(alone) :], alone, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path / "saved")
    again = SoftPromptModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(values["model"]["name"]), tmp_path / "saved", tokenizer
    )
    assert again.tasks == model.tasks
    with torch.no_grad():
        assert torch.equal(again(**batch, tasks=tasks).logits, together)
        options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "tasks": tasks}
        assert torch.equal(again.generate(**batch, **options), model.generate(**batch, **options))
    found = artifact.load(tmp_path / "saved" / "mixed")
    again.save_pretrained(tmp_path / "again")
    same = artifact.load(tmp_path / "again" / "mixed")
    assert same.digest == found.digest
    paths = values["prompt"]["init"]["sources"]
    assert same.parents == found.parents == tuple(artifact.load(path).digest for path in paths)
    with torch.no_grad():
        again.prompts["mixed"].shared.up.weight.add_(1)
    again.save_pretrained(tmp_path / "moved")
    assert artifact.load(tmp_path / "moved" / "mixed").parents == (found.digest,)


def test_labels_of_a_model_shape_no_prompt(values: dict[str, Any]) -> None:
    """The loss with labels behind a text is that of the prompt which the text alone has."""
    model = ours(values)
    tokenizer = transformers.AutoTokenizer.from_pretrained(values["model"]["name"])
    text, answer = tokenizer("the thing is red:")["input_ids"], tokenizer(" warm")["input_ids"]
    ids = torch.tensor([text + answer])
    labels = torch.tensor([[-100] * len(text) + answer])
    mixer = model.prompts["mixed"]
    seen: list[torch.Tensor] = []
    mixer.register_forward_hook(lambda _, __, made: seen.append(made.prompt.detach()))
    with torch.no_grad():
        model(input_ids=ids, labels=labels, tasks="mixed")
        model(input_ids=torch.tensor([text]), tasks="mixed")
        model(input_ids=ids, tasks="mixed")
    assert_close(seen[0], seen[1])
    assert not torch.allclose(seen[0], seen[2], atol=1e-4), "the answer would have made a difference"


@pytest.mark.parametrize(
    ("name", "dtype", "template"),
    [
        ("llama", "bfloat16", "{text}:"),
        ("t5", "float32", "{text}:"),
        ("bert", "float32", "{text}: {mask}"),
        ("gpt2", "float32", "{text}:"),
    ],
)
def test_every_family_and_half_precision(tmp_path: Path, name: str, dtype: str, template: str) -> None:
    """Trains, and the artifact scores as the run did."""
    values = local.run_values(tmp_path, name, max_steps=2)
    values["model"]["dtype"] = dtype
    values["task"]["template"] = template
    job.run(parse({**values, "output_dir": str(tmp_path / "source")}))
    values["prompt"] |= {"method": "attempt", "init": {"sources": [str(tmp_path / "source" / "prompt")]}}
    results = job.run(parse(values))
    opened = open_prompts([tmp_path / "out" / "prompt"], config=parse(values).model)[0]
    assert opened.registry.records[opened.task].artifact.state["prompt"].dtype == torch.float32
    rows = job.prepare(parse(values)).tasks[0].test
    found = evaluate.evaluate(opened, rows, prompt=opened.task, config=parse(values).evaluation)
    assert found.headline.value == results["summary"]["after"]["value"]
