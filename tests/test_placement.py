"""Places of a prompt from configuration and template to tokens, artifacts and answers; what cannot be is refused."""

import itertools
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import local
import rows
import tiny
import tokenizers_tiny
from prompted import method_of
from softprompts import SoftPromptModel
from softprompts.artifacts import artifact
from softprompts.config import EvaluationConfig, PromptConfig, parse
from softprompts.data import ExampleTokenizer, TaskTemplate, collate, resolve_placement
from softprompts.data.templates import slot_sizes, split_slots
from softprompts.errors import ArtifactError, BackboneError, ConfigError, DataError
from softprompts.evaluation import evaluate
from softprompts.injection import Site
from softprompts.model import initialization
from softprompts.model.soft_prompt_model import open_prompts
from softprompts.recipes.run import run
from softprompts.types import IGNORE
from test_golden_placement import order

BPE, BOS, WORDS, PIECES = (
    tokenizers_tiny.byte_bpe(),
    tokenizers_tiny.byte_bpe(bos=True),
    tokenizers_tiny.wordpiece(),
    tokenizers_tiny.unigram(),
)
FORM = TaskTemplate("t", "<prompt:2>Review: {text} <prompt:3>Sentiment:", verbalizer={"p": "positive", "n": "negative"})
ROW = {"text": "a warm <prompt:9> film", "label": "p"}
CLOSE = {"atol": 2e-5, "rtol": 1e-5}


def encoder(
    form: TaskTemplate, tokenizer: Any, family: str = "causal", length: int = 5, **other: Any
) -> ExampleTokenizer:
    slots = slot_sizes(form.templates, length, form.name)
    return ExampleTokenizer(form, tokenizer, family, other.pop("head", "lm"), 200, segment_lengths=slots, **other)  # type: ignore[arg-type]


def bare(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


# Tokens


def test_slots_of_a_template() -> None:
    assert split_slots("a<prompt> {b}<prompt: 12 >") == (["a", " {b}", ""], [None, 12])
    assert split_slots("{a<b} <Prompt>") == (["{a<b} <Prompt>"], [])
    assert split_slots(None) == ([""], [])
    assert slot_sizes(["{a}"], 7, "t") == ()
    assert slot_sizes(["x <prompt>", None], 7, "t") == (7,)
    assert slot_sizes([None, "<prompt:3>{a}", "<prompt:4>"], 7, "t") == (3, 4)


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        (["<prompt>{a}<prompt>"], "has 2 slots for the prompt; write how many of its 7 tokens each has, .* <prompt:3>"),
        (
            ["<prompt:0>{a}<prompt:7>"],
            "has 2 slots for the prompt; write how many of its 7 tokens each has, at least one",
        ),
        (
            ["<prompt:4>{a}", "<prompt:4>"],
            r"slots have 4 \+ 4 = 8 prompt tokens, but prompt.num_virtual_tokens is 7; make them equal",
        ),
        (["<prompt:5>{a}"], r"slots have 5 prompt tokens, but prompt.num_virtual_tokens is 7"),
        (["<prompt:all>{a}"], "'<prompt:all>' names no number of prompt tokens, as <prompt:10>"),
    ],
)
def test_slots_that_do_not_fit(templates: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        slot_sizes(templates, 7, "t")


@pytest.mark.parametrize(("tokenizer", "begin"), [(BPE, []), (BOS, [1])])
def test_pieces_are_what_the_tokenizer_makes_of_them(tokenizer: Any, begin: list[int]) -> None:
    """No token reaches across a slot, `<prompt:9>` in a row is a row's own words, and the answer stays the same."""
    found = encoder(FORM, tokenizer).example(ROW)
    first, second = bare(tokenizer, "Review: a warm <prompt:9> film "), bare(tokenizer, "Sentiment:")
    answer = encoder(FORM, tokenizer).answer_ids("positive")
    assert found.input_ids == [*begin, *first, *second, *answer]
    assert found.prompt_offsets == (len(begin), len(begin) + len(first))
    assert found.segment_lengths == (2, 3)
    assert found.labels == [IGNORE] * found.text_tokens + answer
    # A slot may stand where a token would reach across: here inside a word.
    inside = encoder(replace(FORM, template="{text} positi<prompt>ve"), tokenizer).encode({"text": "x"})
    assert inside.input_ids == [*begin, *bare(tokenizer, "x positi"), *bare(tokenizer, "ve")]
    assert bare(tokenizer, " positive") != [*bare(tokenizer, " positi"), *bare(tokenizer, "ve")]


def test_pieces_of_encoders_keep_their_special_tokens_and_types() -> None:
    form = replace(FORM, template="<prompt:1>{text}<prompt:2> so", pair="a {text}<prompt:2>", kind="label")
    found = encoder(form, WORDS, "masked", head="sequence").encode({"text": "good film"})
    cls, sep = WORDS.cls_token_id, WORDS.sep_token_id
    first, rest, second = (bare(WORDS, text) for text in ("good film", "so", "a good film"))
    assert found.input_ids == [cls, *first, *rest, sep, *second, sep]
    plain = WORDS("good film so", "a good film")
    assert (found.input_ids, found.token_type_ids) == (plain["input_ids"], plain["token_type_ids"])
    assert found.prompt_offsets == (1, 1 + len(first), len(found.input_ids) - 1)
    masked = encoder(replace(FORM, template="{text}<prompt> so {mask}."), WORDS, "masked").example(ROW)
    assert WORDS.mask_token_id in masked.input_ids
    assert masked.input_ids[0] == cls
    assert WORDS.decode(masked.input_ids[: masked.prompt_offsets[0]]) == WORDS.decode([cls, *bare(WORDS, ROW["text"])])
    # SentencePiece pieces: the first begins a text, the second goes on as written, with one space.
    with pytest.raises(DataError, match="the template has a slot for the prompt, but none for the text; write the col"):
        encoder(replace(FORM, template="good<prompt> film"), PIECES, "seq2seq")
    found = encoder(replace(FORM, template="{text}<prompt> film"), PIECES, "seq2seq").encode({"text": "good"})
    assert found.input_ids == PIECES("good film")["input_ids"]
    assert found.prompt_offsets == (len(bare(PIECES, "good")),)
    inside = encoder(replace(FORM, template="{text}<prompt>ish"), PIECES, "seq2seq").encode({"text": "good"})
    assert PIECES.decode(inside.input_ids, skip_special_tokens=True) == "goodish"


def test_slots_inside_chat_turns() -> None:
    tokenizer = tokenizers_tiny.byte_bpe(chat=True)
    form = replace(FORM, chat=True, system="Be short.<prompt:1>", template="<prompt:2>{text}<prompt:2>")
    found = encoder(form, tokenizer).encode({"text": "how \ue000 so"})
    pieces = ["<s>system\nBe short.", "</s>\n<s>user\n", "how \ue000 so", "</s>\n<s>assistant\n"]
    tokens = [bare(tokenizer, piece) for piece in pieces]
    before = [0, *itertools.accumulate(map(len, tokens))]
    assert found.input_ids == list(itertools.chain(*tokens))
    assert found.prompt_offsets == tuple(before[1:4])
    hiding = tokenizers_tiny.byte_bpe(chat=True)
    hiding.chat_template = "{{ messages[-1]['content'] }}"
    with pytest.raises(DataError, match="the chat template leaves a slot for the prompt out or repeats it"):
        encoder(form, hiding).encode({"text": "x"})


def test_texts_are_cut_around_slots() -> None:
    """A long text loses tokens, the template none, and the places are those of what is left."""
    form = replace(FORM, max_length=20)
    found = encoder(form, BPE).encode({"text": "warm film " * 30})
    assert found.truncated_tokens > 0
    assert found.text_tokens <= 20
    assert BPE.decode(found.input_ids[found.prompt_offsets[1] :]) == "Sentiment:"


def test_batches_of_rows_with_slots() -> None:
    one = encoder(FORM, BPE).encode(ROW)
    two = encoder(replace(FORM, template="{text}<prompt>"), BPE).encode(ROW)
    batch = collate([one, two], 0)
    assert batch.prompt_offsets.tolist() == [list(one.prompt_offsets), [two.prompt_offsets[0]] * 2]
    assert batch.segment_lengths.tolist() == [[2, 3], [5, 0]]
    with pytest.raises(ValueError, match="some rows of the batch have slots for the prompt and some have none"):
        collate([one, ExampleTokenizer(replace(FORM, template="{text}"), BPE, "causal", "lm", 200).encode(ROW)], 0)


# Configuration


def test_where_the_template_puts_the_prompt() -> None:
    plain, chat = replace(FORM, template="{text}"), replace(FORM, template="{text}", chat=True, chat_placement="user")
    assert [resolve_placement("auto", forms) for forms in ([FORM], [plain], [chat])] == ["template", "auto", "auto"]
    assert resolve_placement("template", [FORM, FORM]) == "template"
    assert resolve_placement("suffix", [plain]) == "suffix"
    system = replace(plain, chat=True, system="<prompt>")
    assert resolve_placement("auto", [system]) == "template"
    assert resolve_placement("auto", [replace(system, chat=False)]) == "auto"  # without a chat nobody reads it
    for asked, forms, message in (
        ("auto", [FORM, replace(plain, name="u")], "t has slots for the prompt in its template, u has none"),
        ("template", [plain], "prompt.placement is template, but the template '{text}' has no slot for the prompt"),
        ("first", [FORM], "the template has a slot for the prompt, and prompt.placement is first; leave one out"),
        ("suffix", [chat], "chat_placement is user, and prompt.placement is suffix: both place the prompt"),
        (
            "auto",
            [replace(FORM, chat=True, chat_placement="user")],
            "chat_placement is user, and the template has a slot",
        ),
    ):
        with pytest.raises(DataError, match=message):
            resolve_placement(asked, forms)


@pytest.mark.parametrize("head", ["token", "span"])
def test_heads_that_look_at_words_have_no_slots(head: str) -> None:
    form = TaskTemplate("t", "{text}<prompt>", pair="{text}", kind="tagging" if head == "token" else "span")
    with pytest.raises(DataError, match=f"head '{head}' cannot have a slot for the prompt in its template"):
        encoder(form, WORDS, "masked", head=head)


@pytest.mark.parametrize(
    ("prompt", "task", "message"),
    [
        ({}, {"template": "<prompt:3>{text}"}, "slots have 3 prompt tokens, but prompt.num_virtual_tokens is 4"),
        ({}, {"template": "<prompt>:"}, "the template '<prompt>:' has no slot for the text"),
        ({}, {"template": "Type:"}, "the template 'Type:' has no slot for the text"),
        (
            {"site": "kv"},
            {"template": "{text}<prompt>"},
            "placement 'template' is not possible .*take <prompt> out of the",
        ),
        ({"site": "kv", "placement": "suffix"}, {}, "placement 'suffix' is not possible at site 'kv'"),
        ({"placement": "template"}, {}, "prompt.placement is template, but the template '{text}:' has no slot"),
        (
            {"site": "kv"},
            {"chat": True, "chat_placement": "user"},
            "chat_placement is user, but at site 'kv' nothing can come",
        ),
        (
            {"placement": "template", "segments": [1, 3]},
            {"template": "<prompt:2>{text}<prompt:2>"},
            r"slots have 2 \+ 2 prompt tokens, prompt.segments says 1 \+ 3; leave prompt.segments out",
        ),
    ],
)
def test_runs_that_cannot_be(tmp_path: Any, prompt: dict[str, Any], task: dict[str, Any], message: str) -> None:
    values = local.run_values(tmp_path)
    values["prompt"] |= prompt
    values["task"] |= task
    with pytest.raises((DataError, ConfigError, BackboneError), match=message):
        run.prepare(parse(values))


def test_segments_are_the_prompt() -> None:
    assert PromptConfig(num_virtual_tokens=5, placement="template", segments=(2, 3)).segments == (2, 3)
    for given, message in (
        (
            {"num_virtual_tokens": 5, "placement": "template", "segments": (2, 2)},
            r"prompt.segments 2 \+ 2 must each be at least 1 and sum",
        ),
        (
            {"num_virtual_tokens": 5, "placement": "template", "segments": (5, 0)},
            r"prompt.segments 5 \+ 0 must each be at least 1",
        ),
        ({"num_virtual_tokens": 5, "segments": (2, 3)}, "prompt.segments is for placement template, not auto"),
    ):
        with pytest.raises(ValueError, match=message):
            PromptConfig(**given)


# Runs and artifacts


@pytest.mark.parametrize(
    ("name", "template", "place"),
    [
        ("llama", "<prompt:1>the {text}<prompt:3>:", "template"),
        ("llama", "{text}:", "suffix"),
        ("t5", "{text}<prompt>:", "template"),
        ("bert", "{text}<prompt:4> it is {mask}", "template"),
    ],
)
def test_a_run_with_slots(tmp_path: Any, name: str, template: str, place: str) -> None:
    """Trained, evaluated, saved and opened again: answers are the stock model's with the prompt in its slots."""
    values = local.run_values(tmp_path, name, max_steps=3)
    values["task"] |= {"template": template, "split": {"test_fraction": 0.2, "limit": {"train": 16, "test": 4}}}
    values["prompt"] |= {"placement": "suffix"} if place == "suffix" else {}
    run.run(parse(values))
    directory = tmp_path / "out" / "prompt"
    found = artifact.load(directory)
    assert (found.placement, found.segments) == (place, (1, 3) if template.count("<prompt:") == 2 else ())
    written = json.loads((directory / "softprompts.json").read_text())
    assert written["peft"] == f"placement {place}: PEFT puts the prompt before the text"
    assert not (directory / "adapter_config.json").exists()
    opened = open_prompts([directory], config=parse(values).model)[0]
    made = run.prepare(parse(values))
    test = made.tasks[0].test
    answers = list(evaluate.answers(opened, test, prompt=opened.task, config=EvaluationConfig()))
    if name != "llama":
        method_of(made).load_state_dict(found.state)
        ours = evaluate.answers(
            made.model, test, prompt=made.prompt(0), encoder=made.encoders[0], config=EvaluationConfig()
        )
        assert [one.scores for one in ours] == [one.scores for one in answers]
        return
    model = opened.backbone.model
    for row, found_answer in zip(test, answers, strict=True):
        text = opened.example_tokenizer(opened.task).encode(row)
        places, sizes = (
            (text.prompt_offsets, text.segment_lengths) if place == "template" else ((len(text.input_ids),), (4,))
        )
        for label, answer in opened.example_tokenizer(opened.task).candidates().items():
            words = model.get_input_embeddings()(torch.tensor(text.input_ids + answer))
            full = order(places, sizes, len(text.input_ids) + len(answer))
            logits = model(inputs_embeds=torch.cat([found.prompt, words])[full][None]).logits[0].log_softmax(-1)
            begin = len(text.input_ids) + 4 - 1
            own = sum(float(logits[begin + i, token]) for i, token in enumerate(answer))
            assert found_answer.scores[label] == pytest.approx(own, abs=2e-5)


def test_prompts_shorter_than_their_slots(tmp_path: Any) -> None:
    """IPT has a prompt token for each of the text's tokens: of a short text the last slot stays partly empty."""
    values = local.run_values(tmp_path, max_steps=2)
    values["task"] |= {"template": "<prompt:9>{text}<prompt:9>:", "split": {"test_fraction": 0.2, "limit": {"test": 4}}}
    values["prompt"] = {"method": "ipt", "num_virtual_tokens": 18}
    run.run(parse(values))
    made, opened = (
        run.prepare(parse(values)),
        open_prompts([tmp_path / "out" / "prompt"], config=parse(values).model)[0],
    )
    test, encoder = made.tasks[0].test, made.encoders[0]
    method_of(made).load_state_dict(opened.registry.method(opened.task).state_dict())
    batch = collate([encoder.encode(row) for row in test], 0)
    assert int(opened.make_prompts(batch).lengths.min()) < 18
    together = list(evaluate.answers(opened, test, prompt=opened.task, config=EvaluationConfig()))
    for row, one in zip(test, together, strict=True):
        (alone,) = evaluate.answers(
            made.model,
            [row],
            prompt=made.prompt(0),
            encoder=encoder,
            config=EvaluationConfig(),
        )
        assert alone.scores == pytest.approx(one.scores, abs=2e-5)


def test_tasks_with_other_slots_share_a_run_and_resume(tmp_path: Any) -> None:
    values = local.run_values(tmp_path, max_steps=4, save_steps=2)
    task = values.pop("task") | {"split": {"test_fraction": 0.2, "limit": {"train": 16, "test": 4}}}
    values["tasks"] = [
        {**task, "name": "one", "template": "{text}<prompt>:"},
        {**task, "name": "two", "template": "<prompt:2>{text}<prompt:2>:"},
    ]
    run.run(parse(values))
    whole = {name: artifact.load(tmp_path / "out" / "prompt" / name) for name in ("one", "two")}
    assert [whole[name].segments for name in whole] == [(), (2, 2)]
    assert [whole[name].placement for name in whole] == ["template"] * 2
    values["output_dir"] = str(tmp_path / "again")
    stop = StopIteration()

    def step(_: str, report: Any) -> None:
        if report.step == 3:
            raise KeyboardInterrupt from stop

    with pytest.raises(KeyboardInterrupt):
        run.run(parse(values), run.ProgressReporter(on_step=step))
    run.run(parse(values))
    for name, one in whole.items():
        assert torch.equal(artifact.load(tmp_path / "again" / "prompt" / name).prompt, one.prompt)


def test_runs_of_other_lengths_have_their_own_slots(tmp_path: Any) -> None:
    """Also in models without a limit of positions, where texts of all runs have the same room."""
    values = local.run_values(tmp_path, "t5", max_steps=1)
    values["task"] |= {
        "template": "{text}<prompt>:",
        "split": {"test_fraction": 0.2, "limit": {"train": 16, "test": 4}},
    }
    values["runs"] = [{"name": "a", "prompt.num_virtual_tokens": 3}, {"name": "b", "prompt.num_virtual_tokens": 5}]
    run.run(parse(values))
    for name, length in (("a", 3), ("b", 5)):
        found = artifact.load(tmp_path / "out" / name / "prompt")
        assert (found.placement, found.shape[0]) == ("template", length)


def test_older_artifacts_load_and_a_prompt_in_a_chat_turn_is_not_written_for_peft(tmp_path: Any) -> None:
    from artifacts import assert_equal, edit, example, write_as_format

    directory = artifact.save(example(), tmp_path / "a")
    write_as_format(directory / "softprompts.json", 2)
    assert_equal(artifact.load(directory), example())
    edit(directory / "softprompts.json", segments=[])
    with pytest.raises(ArtifactError, match="unknown key 'segments': format 2 has none"):
        artifact.load(directory)
    parted = example(placement="template", segments=(2, 3))
    assert_equal(artifact.load(artifact.save(parted, tmp_path / "b")), parted)
    assert parted.digest != example(placement="template").digest
    edit(tmp_path / "b" / "softprompts.json", segments=[2, 2])
    with pytest.raises(ArtifactError, match=r"segments \[2, 2\] do not sum to the prompt's 5 tokens"):
        artifact.load(tmp_path / "b")
    chat = example(template={"name": "t", "template": "{text}", "chat": True, "chat_placement": "user"})
    artifact.save(chat, tmp_path / "c")
    assert json.loads((tmp_path / "c" / "softprompts.json").read_text())["peft"].startswith(
        "chat_placement user: PEFT puts"
    )


# SoftPromptModel


def prompted(name: str, **tasks: PromptConfig) -> tuple[SoftPromptModel, dict[str, Tensor]]:
    """A model with prompts of words, and the words of each."""
    model, words = SoftPromptModel(tiny.model(name)), {}
    for i, (task, config) in enumerate(tasks.items()):
        model.add_task(task, config)
        words[task] = rows.ids(70 + i, config.num_virtual_tokens)
        with torch.no_grad():
            next(iter(model.prompts[task].parameters())).copy_(
                initialization.from_ids(model.backbone, Site(), words[task])
            )
    return model, words


TASKS = {
    "parted": PromptConfig(num_virtual_tokens=5, placement="template", segments=(2, 3)),
    "front": PromptConfig(num_virtual_tokens=3, placement="first"),
    "behind": PromptConfig(num_virtual_tokens=4, placement="suffix"),
}


def test_a_stock_model_with_segments_in_its_rows(tmp_path: Any) -> None:
    """Logits, and a loss that counts each label once, scored by what stands before it; either padding side."""
    model, words = prompted("llama", **TASKS)
    model.save_pretrained(tmp_path)
    again = SoftPromptModel.from_pretrained(tiny.model("llama"), tmp_path)
    texts = rows.texts("llama", (6, 9))
    places = torch.tensor([[1, 4], [0, 9]])
    for side, extra in (("right", 0), ("left", 2)):
        ids, mask = rows.pad(texts, side, extra, value=3)
        found = model(ids, mask, labels=ids, tasks="parted", prompt_places=places)
        assert torch.equal(found.logits, again(ids, mask, labels=ids, tasks="parted", prompt_places=places).logits)
        total, count = torch.zeros(()), 0
        for i, text in enumerate(texts):
            full = order(places[i].tolist(), (2, 3), len(text))
            logits = model.model(input_ids=torch.cat([words["parted"], text])[full][None]).logits[0]
            own = [at for at, token in enumerate(full) if token >= 5]
            torch.testing.assert_close(found.logits[i][mask[i].bool()], logits[own], **CLOSE)
            scored = [(at, int(text[token - 5])) for at, token in enumerate(full) if token >= 5 and at > 0]
            total = total - sum(logits[at - 1].log_softmax(-1)[token] for at, token in scored)
            count += len(scored)
        torch.testing.assert_close(found.loss, total / count, **CLOSE)


def test_prompts_of_every_place_share_a_batch() -> None:
    model, _ = prompted("llama", **TASKS)
    texts = rows.texts("llama", (6, 9, 4))
    ids, mask = rows.pad(texts, "left", 1, value=3)
    labels = ids.masked_fill(mask.cumsum(1) <= 3, IGNORE)
    places = {"parted": [1, 4], "front": [0, 0], "behind": [3, 3]}
    found = model(ids, mask, labels=labels, tasks=list(TASKS), prompt_places=torch.tensor(list(places.values())))
    for i, task in enumerate(TASKS):
        more = {"prompt_places": torch.tensor([places[task]])} if task == "parted" else {}
        text = texts[i][None]
        alone = model(text, labels=labels[i, mask[i].bool()][None], tasks=task, **more)
        torch.testing.assert_close(found.logits[i][mask[i].bool()], alone.logits[0], **CLOSE)
    # Without places each stands where its configuration says; behind the text there is nothing to say.
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    names = ["front", "behind", "front"]
    together = model.generate(ids, attention_mask=mask, tasks=names, **options)
    for i, name in enumerate(names):
        alone = model.generate(texts[i][None], tasks=name, **options)
        assert together[i, -4:].tolist() == alone[0, -4:].tolist()
    with pytest.raises(BackboneError, match=r"the batch does not say where they are.*prompt_places"):
        model(ids, mask, tasks="parted")
    with pytest.raises(BackboneError, match="2 segments of the prompt, but 1 places; give one place for each"):
        model(ids, mask, tasks="parted", prompt_places=torch.tensor([1, 2, 3]))
