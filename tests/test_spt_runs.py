"""The reconstructed SPT through everything: which words are the template's, run, resume, artifact, answers, models."""

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import local
from prompted import method_of
from softprompts import SoftPromptModel
from softprompts.artifacts import artifact
from softprompts.config import EvaluationConfig, parse
from softprompts.data import EncodedExample, ExampleTokenizer, TaskTemplate, collate
from softprompts.evaluation import evaluate
from softprompts.injection import Site
from softprompts.model.initialization import from_ids
from softprompts.model.soft_prompt_model import open_prompts
from softprompts.recipes.run import run as job
from softprompts.training import objectives
from softprompts.training.shared_batch import training_step
from softprompts.types import Batch
from tokenizers_tiny import byte_bpe, unigram, wordpiece

QUESTION = TaskTemplate(
    name="questions",
    template="Question: {text}\nType:",
    verbalizer={"HUM": "human", "LOC": "location"},
)
PAIR = TaskTemplate(name="nli", template="Premise: {a}", pair="So: {b} ?", verbalizer={"y": "yes", "n": "no"})
TEXTS = ("Who wrote the play?", "Question: What Type: is it", "", "a warm, funny and human film. " * 4)


def own(encoder: ExampleTokenizer, row: dict[str, str], label: str | None = None) -> tuple[list[int], str]:
    """The ids that are marked as the template's words, and their text without spaces."""
    found = encoder.encode({"label": "HUM", **row}, label)
    assert found.instruction_mask is not None
    assert len(found.instruction_mask) == len(found.input_ids)
    assert not any(found.instruction_mask[found.text_tokens :])
    ids = [token for token, mark in zip(found.input_ids, found.instruction_mask, strict=True) if mark]
    return ids, "".join(encoder.tokenizer.decode(ids).split()).lower()


@pytest.mark.parametrize(
    ("tokenizer", "family"), [(byte_bpe(), "causal"), (byte_bpe(bos=True), "causal"), (unigram(), "seq2seq")]
)
def test_the_templates_words_are_marked(tokenizer: Any, family: Any) -> None:
    """The same tokens whatever the text says, the template's words included, cut or not; no token of an answer."""
    encoder = ExampleTokenizer(QUESTION, tokenizer, family, "lm", 60)
    found = {tuple(own(encoder, {"text": text}, label)[0]) for text in TEXTS[:2] for label in (None, "human")}
    assert len(found) == 1
    for text in TEXTS:
        assert own(encoder, {"text": text})[1] == "question:type:"
    assert encoder.encode({"text": TEXTS[3]}).truncated_tokens > 0


def test_in_masked_models_and_pairs() -> None:
    """The mask token is the answer's, special tokens are the tokenizer's, and each text of a pair has its own words."""
    encoder = ExampleTokenizer(
        replace(QUESTION, template="Question: {text} It is {mask} ."), wordpiece(), "masked", "lm", 60
    )
    assert own(encoder, {"text": TEXTS[0]}, "human")[1] == "question:itis."
    row = {"a": "the king", "b": "So: who"}
    for tokenizer, family in ((wordpiece(), "masked"), (byte_bpe(), "causal")):
        encoder = ExampleTokenizer(replace(PAIR, kind="label", label="label"), tokenizer, family, "sequence", 60)
        assert own(encoder, {**row, "label": "y"})[1] == "premise:so:?"


@pytest.mark.parametrize("place", ["start", "user"])
def test_in_chats(place: Any) -> None:
    """Neither the chat template's words nor the system's."""
    form = replace(QUESTION, chat=True, system="Be short: Type:", chat_placement=place)
    encoder = ExampleTokenizer(form, byte_bpe(chat=True), "causal", "lm", 200)
    assert own(encoder, {"text": TEXTS[0]})[1] == "question:type:"


@pytest.mark.parametrize(
    ("tokenizer", "family"), [(byte_bpe(), "causal"), (unigram(), "seq2seq"), (wordpiece(), "masked")]
)
def test_with_slots(tokenizer: Any, family: Any) -> None:
    """The template's words are the same with slots for the prompt between them; special tokens are none of them."""
    form = replace(QUESTION, template="<prompt:1>Question: <prompt:2>{text} Type:" + " {mask}" * (family == "masked"))
    encoder = ExampleTokenizer(form, tokenizer, family, "lm", 30, segment_lengths=(1, 2))
    for text in TEXTS:
        assert own(encoder, {"text": text}, "human")[1] == "question:type:"
    assert encoder.encode({"text": TEXTS[3]}).truncated_tokens > 0


def test_with_slots_in_chats() -> None:
    """The user's own words, not the same ones of the system, which stand before them in the first turn's piece."""
    form = replace(QUESTION, chat=True, system="The Question: is below", template="Question: <prompt>{text}\nType:")
    encoder = ExampleTokenizer(form, byte_bpe(chat=True), "causal", "lm", 200, segment_lengths=(3,))
    for text in TEXTS[:2]:
        found = encoder.encode({"text": text})
        assert own(encoder, {"text": text})[1] == "question:type:"
        first = found.instruction_mask.index(1)
        assert "below" in encoder.tokenizer.decode(found.input_ids[:first])
    both = replace(form, system="Be <prompt:1> short: Question:")
    encoder = ExampleTokenizer(both, byte_bpe(chat=True), "causal", "lm", 200, segment_lengths=(1, 3))
    assert own(encoder, {"text": TEXTS[0]})[1] == "question:type:"


def test_where_nobody_can_say() -> None:
    """A template without words of its own, and a tokenizer that knows no places."""
    encoder = ExampleTokenizer(replace(QUESTION, template="{text}"), byte_bpe(), "causal", "lm", 60)
    assert encoder.encode({"text": "Who"}).instruction_mask is None

    class Slow(transformers.PreTrainedTokenizerFast):
        is_fast = property(lambda self: False)

    slow = copy.deepcopy(byte_bpe())
    slow.__class__ = Slow
    encoder = ExampleTokenizer(QUESTION, slow, "causal", "lm", 60)
    assert encoder.encode({"text": "Who"}).instruction_mask is None
    assert (
        encoder.encode({"text": "Who"}).input_ids
        == ExampleTokenizer(QUESTION, byte_bpe(), "causal", "lm", 60).encode({"text": "Who"}).input_ids
    )


def test_rows_that_say_beside_rows_that_do_not() -> None:
    one, two = EncodedExample([5, 6, 7], instruction_mask=[1, 0, 1]), EncodedExample([8, 9])
    assert collate([two], 0).instruction_mask is None
    batch = collate([one, two], 0)
    assert batch.instruction_mask.tolist() == [[1, 0, 1], [1, 1, 0]]
    assert batch.rows(torch.tensor([1])).instruction_mask.tolist() == [[1, 1, 0]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and its data."""
    where = tmp_path_factory.mktemp("spt")
    local.run_values(where)
    return where


@pytest.fixture
def values(folder: Path, tmp_path: Path) -> dict[str, Any]:
    """A run on two tasks that differ in their words."""
    task = {
        "source": str(folder / "colors.csv"),
        "verbalizer": {"warm": "warm", "cold": "cold"},
        "split": {"validation_fraction": 0.2, "test_fraction": 0.2},
    }
    return {
        "model": {"name": str(folder / "llama"), "dtype": "float32", "threads": 1},
        "prompt": {
            "method": "spt-reconstruction",
            "num_virtual_tokens": 4,
            "options": {"k": 2, "bank": 40, "population": 200},
        },
        "tasks": [
            {**task, "name": "one", "template": "Say of {text} whether:"},
            {**task, "name": "two", "template": "{text} is? human"},
        ],
        "training": {"max_steps": 4, "batch_size": 8, "learning_rate": 0.3, "save_steps": 1},
        "evaluation": {"resamples": 100},
        "output_dir": str(tmp_path / "out"),
    }


def alone(opened: Any, row: Any, answer: list[int]) -> tuple[Batch, float]:
    """One row by itself, and the log-probability of `answer` behind it, the memory's rows chosen by hand."""
    text, method, bb = (
        opened.example_tokenizer(opened.task).encode(row),
        opened.registry.method(opened.task),
        opened.backbone,
    )
    words = bb.embed(
        torch.tensor([i for i, mark in zip(text.input_ids, text.instruction_mask, strict=True) if mark])[None]
    )[0]
    chosen = (method.memory @ words.mean(0)).argsort(descending=True)[:2]
    prompt = torch.cat([method.shared.soft, method.memory[chosen]])
    full = torch.cat([prompt, bb.embed(torch.tensor([text.input_ids + answer]))[0]])
    with torch.no_grad():
        chances = bb.model(inputs_embeds=full[None]).logits[0].log_softmax(-1)
    begin = len(prompt) + len(text.input_ids) - 1
    return collate([replace(text, task_id=0)], 0), float(sum(chances[begin + i, t] for i, t in enumerate(answer)))


def test_a_run_and_its_artifacts(values: dict[str, Any], tmp_path: Path) -> None:
    """Two tasks share S and the memory; what they retrieve is in the history; each artifact answers alone."""
    run = parse(values)
    results = job.run(run)
    entropy = [row["measures"]["retrieval_entropy"] for row in results["tasks"][0]["curve"]]
    assert len(entropy) == 4
    assert all(math.log(2) - 1e-5 <= value <= math.log(4) + 1e-5 for value in entropy)
    assert max(entropy) > math.log(2) + 1e-3, "tasks with other words must retrieve other rows, or nothing is tested"
    pages = [path.read_text() for path in (tmp_path / "out").rglob("report*.html")]
    assert pages
    assert all("Retrieval entropy" in page for page in pages)
    one, two = (artifact.load(tmp_path / "out" / "prompt" / name) for name in ("one", "two"))
    assert sorted(one.state) == ["shared.soft", "shared.sources"]
    assert one.prompt is None
    assert all(torch.equal(one.state[key], two.state[key]) for key in one.state)
    start = job.prepare(run).init
    assert torch.equal(one.state["shared.sources"][0], start.draw(40, 200))
    assert not torch.equal(one.state["shared.soft"], one.initial[:2])
    for name, task in zip(("one", "two"), job.prepare(run).tasks, strict=True):
        opened = open_prompts([tmp_path / "out" / "prompt" / name], config=run.model)[0]
        found = list(evaluate.answers(opened, task.train[:20], prompt=opened.task, config=EvaluationConfig()))
        for row, answer in zip(task.train[:20], found, strict=True):
            for label, ids in opened.example_tokenizer(opened.task).candidates().items():
                assert answer.scores[label] == pytest.approx(alone(opened, row, ids)[1], abs=2e-5)
        config = EvaluationConfig(by="generate", max_new_tokens=3)
        together = list(evaluate.answers(opened, task.test, prompt=opened.task, config=config))
        each = [next(iter(evaluate.answers(opened, [row], prompt=opened.task, config=config))) for row in task.test]
        assert [one.text for one in together] == [one.text for one in each]


def test_it_goes_on_bit_for_bit(values: dict[str, Any], tmp_path: Path) -> None:
    """With a memory that learns too; figures of the method come back with the history."""
    values["prompt"]["options"] |= {"trained": True, "retrieval": "soft"}

    def stop(_: str, report: Any) -> None:
        if report.step == 2:
            raise KeyboardInterrupt

    whole = job.run(parse(values))
    cut = parse({**values, "output_dir": str(tmp_path / "cut")})
    with pytest.raises(KeyboardInterrupt):
        job.run(cut, job.ProgressReporter(on_step=stop))
    again = job.run(cut)
    one, two = (artifact.load(tmp_path / name / "prompt" / "one").state for name in ("out", "cut"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not torch.equal(one["shared.sources"][0], job.prepare(cut).init.draw(40, 200))
    measures = [[row["measures"] for row in page["tasks"][0]["curve"]] for page in (whole, again)]
    assert measures[0] == measures[1]


def test_the_memory_follows_the_seed(values: dict[str, Any]) -> None:
    """Other words for another seed, others than the start's, none twice, all of the most common ones."""
    jobs = [job.prepare(parse({**values, "seed": seed})) for seed in (0, 0, 1)]
    first, same, other = (method_of(one).memory for one in jobs)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert len(first.unique(dim=0)) == 40
    bb, start = jobs[0].model.backbone, jobs[0].init.prompt
    common = from_ids(bb, Site(), torch.arange(203))
    assert all((row == common).all(1).any() for row in first)
    assert not torch.equal(first[:4], start)


def test_in_a_stock_model(values: dict[str, Any], tmp_path: Path) -> None:
    """Told which words are the template's it answers as the run does; a new task shares S; a row alone is the same."""
    run = parse(values)
    job.run(run)
    model = SoftPromptModel(transformers.AutoModelForCausalLM.from_pretrained(values["model"]["name"]))
    model.load_prompt(tmp_path / "out" / "prompt" / "one")
    opened = open_prompts([tmp_path / "out" / "prompt" / "one"], config=run.model)[0]
    rows = [opened.example_tokenizer(opened.task).example(row) for row in job.prepare(run).tasks[0].test[:5]]
    batch = collate(rows, 0)
    given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}
    with torch.no_grad():
        loss = model(**given, words=batch.instruction_mask).loss
        assert float(loss) == pytest.approx(float(objectives.task(training_step(opened, batch))), abs=1e-5)
        assert abs(float(model(**given).loss - loss)) > 1e-6, "without them all words count"
        with pytest.raises(ValueError, match=r"words must be \[rows, tokens\] as the text"):
            model(**given, words=batch.instruction_mask[:, 1:])
        with model.no_prompt():
            model(**given, words=batch.instruction_mask)
    model.add_task("new")
    assert model.registry.group("new") == ("one", "new")
    model.save_pretrained(tmp_path / "both")
    again = SoftPromptModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(values["model"]["name"]), tmp_path / "both"
    )
    with torch.no_grad():
        assert torch.equal(again(**given, words=batch.instruction_mask, tasks="new").loss, loss)
    model.remove_task("one")
    assert model.tasks == ("new",)
