"""Templates, formats, encoding, batches: what the tokens are, for every family and head."""

import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from softprompts.config import TaskConfig
from softprompts.data import (
    PACKAGED,
    EncodedExample,
    ExampleBatches,
    ExampleTokenizer,
    TaskTemplate,
    answer_text,
    classes,
    collate,
    decode_answer,
    evaluation_order,
    load_task,
    training_order,
)
from softprompts.data.templates import parse_template, render, template_columns
from softprompts.data.tokenization import TextTokenizer
from softprompts.errors import ConfigError, DataError
from softprompts.types import IGNORE
from tokenizers_tiny import byte_bpe, unigram, wordpiece

QUESTION = TaskTemplate(
    name="questions",
    template="Question: {text}\nType:",
    verbalizer={"HUM": "human", "LOC": "location", "NUM": "number"},
)
ROW = {"text": "Who wrote the play?", "label": "HUM"}
NLI = TaskTemplate(name="nli", template="{a}", pair="{b}", verbalizer={"y": "yes", "n": "no"})
BPE, BOS, WORDS, PIECES = byte_bpe(), byte_bpe(bos=True), wordpiece(), unigram()


def causal(form=QUESTION, tokenizer=BPE, room=200, **other) -> ExampleTokenizer:
    return ExampleTokenizer(form, tokenizer, "causal", "lm", room, **other)


# Templates


def test_template_pieces():
    assert parse_template("{{a}} {b c} {mask}!") == [("{a} ", "b c"), (" ", "mask"), ("!", None)]
    assert template_columns("{b} {a} {b} {mask}") == ("b", "a")
    assert render("{a}{{x}}{b} {mask}", {"a": "1", "b": "{2}"}, "M") == "1{x}{2} M"


@given(st.lists(st.tuples(st.text(), st.sampled_from(["a", "b c", "d:e", ""])), max_size=4), st.text())
def test_template_round_trip(pieces, end):
    template = "".join(
        literal.replace("{", "{{").replace("}", "}}") + ("{" + name + "}" if name else "") for literal, name in pieces
    )
    template += end.replace("{", "{{").replace("}", "}}")
    values = {"a": "{one}", "b c": "two", "d:e": "}}"}
    assert render(template, values) == "".join(literal + values.get(name, "") for literal, name in pieces) + end


@pytest.mark.parametrize("template", ["{", "a}", "{a", "{}", "{a{b}}"])
def test_a_template_that_is_none(template):
    with pytest.raises(DataError, match=r"names no column; write \{column\}, and \{\{ or \}\} for a literal brace"):
        parse_template(template)


# Formats and answers


def test_a_format_goes_through_json():
    form = replace(QUESTION, truncate=("text",), metrics=("accuracy",), max_length=40, chat=True, chat_placement="user")
    assert TaskTemplate.from_json(json.loads(json.dumps(form.to_json()))) == form
    assert list(TaskTemplate.from_json(form.to_json()).verbalizer) == ["HUM", "LOC", "NUM"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "a", "template": "", "templat": ""}, "unknown key 'templat'; did you mean 'template'? known: name, "),
        ({"template": ""}, "template: 'name' must be text, found NoneType"),
        (
            {"name": "a", "template": "", "kind": "x"},
            "template: unknown kind 'x', known: label, multilabel, regression",
        ),
    ],
)
def test_a_format_that_is_none(values, message):
    with pytest.raises(DataError) as error:
        TaskTemplate.from_json(values)
    assert message in str(error.value)


def test_answers_and_back():
    many = replace(QUESTION, kind="multilabel")
    tags = replace(QUESTION, kind="tagging")
    number = TaskTemplate("n", "{text}", kind="regression")
    free = TaskTemplate("f", "{text}", kind="generation")
    span = TaskTemplate("s", "{q}", pair="{c}", kind="span")
    assert classes(QUESTION) == ("HUM", "LOC", "NUM")
    assert classes(free) == ()
    assert answer_text(QUESTION, {"label": "LOC"}) == "location"
    assert answer_text(many, {"label": "HUM, NUM"}) == answer_text(many, {"label": ["HUM", "NUM"]}) == "human, number"
    assert answer_text(many, {"label": []}) == ""
    assert answer_text(tags, {"label": ["HUM", "NUM", "HUM"]}) == "human number human"
    assert answer_text(number, {"label": "2.50"}) == "2.5"
    assert answer_text(free, {"label": " so "}) == "so"
    assert answer_text(span, {"label": {"text": ["in Rome", "Rome"], "answer_start": [3, 6]}}) == "in Rome"
    assert [decode_answer(QUESTION, text) for text in (" human\n", "Human", "human.", "")] == ["HUM", None, None, None]
    assert [decode_answer(many, text) for text in ("human, number", "human,", "human, who")] == [
        "HUM, NUM",
        "HUM",
        None,
    ]
    assert decode_answer(tags, "human number") == "HUM NUM"
    assert [decode_answer(number, text) for text in (" 2.50", "two")] == ["2.5", None]
    assert decode_answer(free, " so ") == "so"
    with pytest.raises(DataError, match="label 'HUN' is not in the verbalizer; did you mean 'HUM'"):
        answer_text(QUESTION, {"label": "HUN"})
    with pytest.raises(DataError, match="no column 'label' for the label; columns: text"):
        answer_text(QUESTION, {"text": "a"})


def test_labels_that_are_no_text(tmp_path):
    rows = [{"text": f"t{i}", "label": [True, False][i % 2]} for i in range(30)]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    task = load_task(TaskConfig(source=str(tmp_path / "d.json"), verbalizer={"false": "no", "true": "yes"}))
    assert {answer_text(task.template, row) for row in task.train} == {"yes", "no"}
    (tmp_path / "e.csv").write_text("text,label\n" + "".join(f"t{i},{i % 11}\n" for i in range(60)))
    assert classes(load_task(TaskConfig(source=str(tmp_path / "e.csv"))).template) == tuple(map(str, range(11)))


def test_a_missing_cell_is_empty_text_with_a_note(tmp_path):
    rows = [{"a": f"t{i}", "b": None if i < 3 else math.nan if i < 5 else "x", "label": "y"} for i in range(10)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = load_task(TaskConfig(source=str(tmp_path / "d.jsonl"), template="{a}|{b}|", name="t"))
    assert task.notes == ("5 rows have no b: read as empty text",)
    assert (
        BPE.decode(ExampleTokenizer(task.template, BPE, "causal", "lm", 50).encode({"a": "1", "b": None}).input_ids)
        == "1||"
    )


# Language models


def test_causal_rows_value_by_value():
    encoder = causal()
    row = encoder.example(ROW)
    text = BPE("Question: Who wrote the play?\nType:")["input_ids"]
    word = BPE(" human")["input_ids"]
    assert row.input_ids == [*text, *word, BPE.eos_token_id]
    assert row.labels == [IGNORE] * len(text) + [*word, BPE.eos_token_id]
    assert (row.text_tokens, row.truncated_tokens, row.prompt_offsets, row.token_type_ids, row.task_id) == (
        len(text),
        0,
        0,
        None,
        0,
    )
    bare = encoder.encode(ROW)
    assert (bare.input_ids, bare.labels, bare.text_tokens) == (text, None, len(text))
    assert causal(task_id=3).encode(ROW).task_id == 3


def test_a_begin_token_stays_and_nothing_else_is_added():
    assert causal(tokenizer=BOS).example(ROW).input_ids == [BOS.bos_token_id, *causal().example(ROW).input_ids]
    row = causal(tokenizer=WORDS).encode(ROW)  # an encoder used as a decoder: [CLS] in front, no [SEP] inside
    assert row.input_ids[0] == WORDS.cls_token_id
    assert WORDS.sep_token_id not in row.input_ids
    assert causal(tokenizer=WORDS).example(ROW).input_ids[-1] == WORDS.sep_token_id
    assert PIECES.eos_token_id not in causal(tokenizer=PIECES).encode(ROW).input_ids


@pytest.mark.parametrize("tokenizer", [BPE, BOS, WORDS, PIECES], ids=["bpe", "bos", "wordpiece", "unigram"])
@pytest.mark.parametrize("name", [n for n, p in PACKAGED.items() if p.verbalizer])
def test_answer_tokens_are_the_same_in_training_scoring_and_generation(name, tokenizer):
    dataset = PACKAGED[name]
    form = TaskTemplate(name, dataset.template, verbalizer=dict(dataset.verbalizer))
    encoder = causal(form, tokenizer)
    candidates = encoder.candidates()
    assert tuple(candidates) == classes(form)
    for label, word in form.verbalizer.items():
        row = {**dict.fromkeys(form.columns, "Who is it?"), "label": label}
        text, example = encoder.encode(row).input_ids, encoder.example(row)
        whole = tokenizer(render(form.template, row) + " " + word, add_special_tokens=False)["input_ids"]
        assert example.input_ids == text + encoder.answer_ids(word)
        assert example.input_ids[len(text) :][: len(candidates[label])] == candidates[label]
        assert example.input_ids[-len(whole) - 1 : -1] == whole  # as in context
        assert tokenizer.decode(candidates[label], skip_special_tokens=True).strip() == word


@settings(deadline=None)
@given(st.text(max_size=12), st.sampled_from([" ", "", "\n", ": "]), st.sampled_from([BPE, WORDS, PIECES]))
def test_answer_tokens_depend_on_the_answer_alone(word, separator, tokenizer):
    encoder = causal(replace(QUESTION, kind="generation", separator=separator, verbalizer=None), tokenizer)
    for text in ("", "x", "Who? ", "12"):
        row = {"text": text}
        assert encoder.encode(row, word).input_ids == encoder.encode(row).input_ids + encoder.answer_ids(word)
        assert [i for i in encoder.encode(row, word).labels if i != IGNORE] == encoder.answer_ids(word)
    if tokenizer is BPE:
        assert BPE.decode(encoder.answer_ids(word)[:-1]) == separator + word


def test_answers_get_no_second_space_piece():
    from tokenizers import Tokenizer, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    old = Tokenizer.from_str(PIECES.backend_tokenizer.to_str())  # as in the first Llama: the normalizer adds the space
    old.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    old.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=old, eos_token="</s>")
    assert tokenizer.convert_ids_to_tokens(tokenizer(" human", add_special_tokens=False)["input_ids"])[0] == "▁"
    ids = causal(tokenizer=tokenizer).answer_ids("human")[:-1]
    assert "".join(tokenizer.convert_ids_to_tokens(ids)) == "▁human"


def test_a_tokenizer_without_offsets():
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    encoder = ExampleTokenizer(QUESTION, tokenizer, "seq2seq", "lm", 30)
    row = encoder.example({"text": "Who wrote the play? né", "label": "HUM"})
    assert tokenizer.decode(row.input_ids) == "Question: Who wrote th\nType:</s>"
    assert (len(row.input_ids), row.truncated_tokens, tokenizer.decode(row.labels)) == (29, 11, "human</s>")
    with pytest.raises(DataError, match="head 'token' needs a fast tokenizer"):
        ExampleTokenizer(TAGS, tokenizer, "seq2seq", "token", 30)


def test_candidates_get_the_end_token_only_where_one_begins_another():
    end = BPE.eos_token_id
    assert all(ids[-1] != end for ids in causal().candidates().values())
    form = replace(QUESTION, verbalizer={"a": "no", "b": "not"})
    assert BPE(" not")["input_ids"][: len(BPE(" no")["input_ids"])] == BPE(" no")["input_ids"]
    assert causal(form).candidates() == {
        label: [*BPE(f" {w}")["input_ids"], end] for label, w in form.verbalizer.items()
    }
    with pytest.raises(DataError, match="the answers for 'a' and 'b' are the same tokens"):
        causal(replace(QUESTION, verbalizer={"a": "Yes", "b": "yes"}), WORDS).candidates()
    with pytest.raises(
        DataError, match="kind 'generation' has no candidate answers to compare; evaluate by generating"
    ):
        causal(replace(QUESTION, kind="generation", verbalizer=None)).candidates()


def test_encoder_decoder_rows():
    encoder = ExampleTokenizer(QUESTION, PIECES, "seq2seq", "lm", 100)
    row = encoder.example(ROW)
    assert row.input_ids == PIECES("Question: Who wrote the play?\nType:")["input_ids"]
    assert row.labels == PIECES("human")["input_ids"]
    assert row.labels[-1] == PIECES.eos_token_id
    assert row.prompt_offsets is None
    assert encoder.candidates()["HUM"] == row.labels[:-1]
    assert ExampleTokenizer(QUESTION, BPE, "seq2seq", "lm", 100).answer_ids("human") == [
        *BPE("human")["input_ids"],
        BPE.eos_token_id,
    ]
    pair = ExampleTokenizer(NLI, PIECES, "seq2seq", "lm", 100).encode({"a": "Who", "b": "is"})
    assert pair.input_ids == PIECES("Who", "is")["input_ids"]


def test_masked_rows():
    form = replace(QUESTION, template="{text} It is a {mask}.")
    encoder = ExampleTokenizer(form, WORDS, "masked", "lm", 100)
    for word in form.verbalizer.values():
        pieces = encoder.answer_ids(word)
        row = encoder.encode(ROW, word)
        places = [i for i, token in enumerate(row.input_ids) if token == WORDS.mask_token_id]
        assert len(places) == len(pieces)
        assert [row.labels[i] for i in places] == pieces
        assert [label for i, label in enumerate(row.labels) if i not in places] == [IGNORE] * (
            len(row.input_ids) - len(pieces)
        )
        assert WORDS.decode(
            [p if t == WORDS.mask_token_id else t for t, p in zip(row.input_ids, row.labels, strict=True)][1:-1]
        ) == (f"who wrote the play? it is a {word}.")
    assert row.token_type_ids == [0] * len(row.input_ids)
    assert encoder.encode(ROW).input_ids.count(WORDS.mask_token_id) == max(map(len, encoder.candidates().values()))
    assert WORDS.sep_token_id not in encoder.answer_ids("human")


def test_a_masked_template_without_a_place_ends_with_it_and_text_cannot_forge_one():
    row = ExampleTokenizer(QUESTION, WORDS, "masked", "lm", 100).encode({"text": "a [MASK] b"}, "human")
    assert row.input_ids.count(WORDS.mask_token_id) == len(WORDS("human", add_special_tokens=False)["input_ids"])
    assert row.input_ids[-2] == WORDS.mask_token_id
    sentence = ExampleTokenizer(QUESTION, PIECES, "masked", "lm", 100).encode({"text": "a <mask> b"}, "no")
    assert [label for label in sentence.labels if label != IGNORE] == PIECES("no", add_special_tokens=False)[
        "input_ids"
    ]


def test_plain_text_has_an_empty_template_and_may_be_cut():
    form = TaskTemplate("text", "", kind="generation", label="text", truncate=("text",))
    text = "The people live in the city near the river."
    whole = causal(form).example({"text": text})
    assert whole.input_ids == whole.labels == [*BPE(text)["input_ids"], BPE.eos_token_id]
    short = causal(form, room=8).example({"text": text})
    assert (short.input_ids, short.labels, short.truncated_tokens) == (
        whole.input_ids[:8],
        whole.input_ids[:8],
        len(whole.input_ids) - 8,
    )


# Cutting


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60), st.text(max_size=60), st.integers(30, 70), st.sampled_from([BPE, BOS, PIECES, WORDS]))
def test_cutting_touches_neither_template_nor_answer(a, b, room, tokenizer):
    form = TaskTemplate("t", "a: {a}\nb: {b}\nc:", verbalizer={"x": "yes", "y": "no"})
    encoder, whole = causal(form, tokenizer, room), causal(form, tokenizer, 10_000)
    row = {"a": a, "b": b, "label": "x"}
    cut, full = encoder.example(row), whole.example(row)
    assert len(cut.input_ids) <= room
    assert cut.truncated_tokens == len(full.input_ids) - len(cut.input_ids)
    longest = max(len(encoder.answer_ids(word)) for word in ("yes", "no"))
    assert (cut.truncated_tokens > 0) == (full.text_tokens + longest > room)
    assert cut.truncated_tokens or cut == full
    assert cut.input_ids[cut.text_tokens :] == encoder.answer_ids("yes")
    assert (
        cut.input_ids[: cut.text_tokens] == encoder.encode(row, "no").input_ids[: cut.text_tokens]
    )  # the same text for all
    if tokenizer in (BPE, BOS):
        text = tokenizer.decode(cut.input_ids[: cut.text_tokens]).removeprefix("<s>")
        left = text.removeprefix("a: ").removesuffix("\nc:")
        assert text == f"a: {left}\nc:"
        assert any(
            a.startswith(left[:at]) and b.startswith(left[at + 4 :])
            for at in range(len(left))
            if left[at : at + 4] == "\nb: "
        )


def test_the_longest_column_is_cut_first_and_only_those_that_may_be():
    form = TaskTemplate("t", "{a}|{b}|", kind="generation")
    row = {"a": "x" * 40, "b": "y" * 10, "label": ""}
    assert BPE.decode(causal(form, room=30).encode(row).input_ids) == "x" * 18 + "|" + "y" * 10 + "|"
    assert BPE.decode(causal(form, room=12).encode(row).input_ids) == "x" * 5 + "|" + "y" * 5 + "|"
    only = replace(form, truncate=("b",))
    assert BPE.decode(causal(only, room=45).encode(row).input_ids) == "x" * 40 + "|" + "y" * 3 + "|"
    with pytest.raises(
        DataError, match="t: template and answer alone take 42 tokens, but the prompt leaves room for 41; use"
    ):
        causal(only, room=41).encode(row)
    with pytest.raises(
        DataError, match="but max_length is 41; use a shorter prompt, a larger max_length or a shorter temp"
    ):
        causal(replace(only, max_length=41)).encode(row)


def test_room_for_the_longest_answer_is_kept_whatever_the_answer():
    form = replace(QUESTION, template="{text}:", verbalizer={"a": "no", "b": "a rather long answer"})
    encoder = causal(form, room=40)
    rows = [encoder.encode({"text": "x" * 90}, word) for word in (None, *form.verbalizer.values())]
    assert len({tuple(row.input_ids[: row.text_tokens]) for row in rows}) == 1
    assert max(len(row.input_ids) for row in rows) == 40
    masked = ExampleTokenizer(form, WORDS, "masked", "lm", 40)
    texts = [masked.encode({"text": "x" * 90}, word).input_ids for word in form.verbalizer.values()]
    assert len({tuple(i for i in ids if i != WORDS.mask_token_id) for ids in texts}) == 1


# Chat


def test_chat_rows():
    tokenizer = byte_bpe(bos=True, chat=True)
    form = replace(QUESTION, template="Question: {text}", chat=True, system="Be short.")
    start = causal(form, tokenizer).example(ROW)
    text = "<s>system\nBe short.</s>\n<s>user\nQuestion: Who wrote the play?</s>\n<s>assistant\n"
    assert tokenizer.decode(start.input_ids[: start.text_tokens]) == text
    assert tokenizer.decode(start.input_ids[start.text_tokens :]) == "human</s>"
    assert start.prompt_offsets == 0
    user = causal(replace(form, chat_placement="user"), tokenizer).example(ROW)
    assert user.input_ids == start.input_ids
    assert tokenizer.decode(user.input_ids[: user.prompt_offsets]) == "<s>system\nBe short.</s>\n<s>user\n"


@settings(deadline=None)
@given(st.text(max_size=20))
def test_the_place_in_a_chat_is_exact(text):
    tokenizer = byte_bpe(chat=True)
    row = causal(TaskTemplate("t", "{text}", kind="generation", chat=True, chat_placement="user"), tokenizer).encode(
        {"text": text}
    )
    assert tokenizer.decode(row.input_ids[: row.prompt_offsets]) == "<s>user\n"
    assert tokenizer.decode(row.input_ids[row.prompt_offsets :]) == f"{text}</s>\n<s>assistant\n"


def test_a_token_across_the_place_is_split():
    tokenizer = byte_bpe(chat=True)
    tokenizer.add_tokens(["\nWho"])
    row = causal(replace(QUESTION, template="{text}", chat=True, chat_placement="user"), tokenizer).encode(ROW)
    assert tokenizer.decode(row.input_ids[: row.prompt_offsets]) == "<s>user\n"
    assert tokenizer.decode(row.input_ids[row.prompt_offsets :]).startswith("Who wrote")


# Heads


def test_sequence_heads():
    row = {"a": "Who is it", "b": "the king", "label": "n"}
    encoded_pair = ExampleTokenizer(NLI, WORDS, "masked", "sequence", 50).encode(row)
    both = WORDS("Who is it", "the king")
    assert (encoded_pair.input_ids, encoded_pair.token_type_ids, encoded_pair.labels) == (
        both["input_ids"],
        both["token_type_ids"],
        1,
    )
    many = replace(NLI, kind="multilabel")
    assert ExampleTokenizer(many, WORDS, "masked", "sequence", 50).encode({**row, "label": ["n", "y"]}).labels == [
        1.0,
        1.0,
    ]
    assert ExampleTokenizer(many, WORDS, "masked", "sequence", 50).encode({**row, "label": ""}).labels == [0.0, 0.0]
    number = replace(NLI, kind="regression", verbalizer=None)
    assert ExampleTokenizer(number, WORDS, "masked", "sequence", 50).encode({**row, "label": "2.5"}).labels == 2.5
    assert ExampleTokenizer(NLI, WORDS, "masked", "sequence", 50).encode({"a": "x", "b": "y"}).labels is None
    assert ExampleTokenizer(NLI, WORDS, "masked", "features", 50).encode(row).labels is None
    one_line = ExampleTokenizer(NLI, BPE, "causal", "sequence", 50).example(row)
    assert BPE.decode(one_line.input_ids) == "Who is it\nthe king"
    assert one_line.labels == 1
    cut = ExampleTokenizer(NLI, WORDS, "masked", "sequence", 9).encode(
        {"a": "the king " * 5, "b": "the city " * 3, "label": "y"}
    )
    assert (len(cut.input_ids), cut.token_type_ids.count(1), cut.input_ids[-1]) == (9, 4, WORDS.sep_token_id)
    with pytest.raises(DataError, match="nli: label 'z' is not in the verbalizer; known labels: y, n"):
        ExampleTokenizer(NLI, WORDS, "masked", "sequence", 50).encode({**row, "label": "z"})


TAGS = TaskTemplate("tags", "{words}", kind="tagging", verbalizer={"O": "O", "P": "P"})


@pytest.mark.parametrize(
    ("tokenizer", "family"), [(WORDS, "masked"), (PIECES, "seq2seq"), (BPE, "causal"), (BOS, "causal")]
)
def test_token_heads(tokenizer, family):
    words = ["Who", "wrote", "the", "abbreviations", "?", "Xylophone-players", "né"]
    row = {"words": words, "label": ["O", "O", "O", "P", "O", "P", "O"]}
    encoder = ExampleTokenizer(TAGS, tokenizer, family, "token", 200)
    whole, firsts = encoder.encode(row), encoder.first_tokens(row)
    assert [whole.labels[at] for at in firsts] == [0, 0, 0, 1, 0, 1, 0]
    assert sum(label != IGNORE for label in whole.labels) == len(words)
    split = tokenizer(words, is_split_into_words=True).word_ids(0)
    if tokenizer is WORDS:
        assert firsts == [split.index(i) for i in range(len(words))]
    assert encoder.encode({**row, "words": " ".join(words), "label": "O O O P O P O"}) == whole
    for room in range(6, len(whole.input_ids)):
        short = ExampleTokenizer(TAGS, tokenizer, family, "token", room).encode(row)
        firsts_left = ExampleTokenizer(TAGS, tokenizer, family, "token", room).first_tokens(row)
        assert len(short.input_ids) <= room
        assert short.truncated_tokens == len(whole.input_ids) - len(short.input_ids)
        assert [short.labels[at] for at in firsts_left] == [0, 0, 0, 1, 0, 1, 0][: len(firsts_left)]
    assert encoder.encode({"words": words}).labels is None
    with pytest.raises(DataError, match="tags: a row has 2 words but 1 tags: 'a b'"):
        encoder.encode({"words": ["a", "b"], "label": ["O"]})


SPAN = TaskTemplate("spans", "{question}", pair="{context}", kind="span", label="answers")
CONTEXT = "The play was written near the river in 1605 by a warm and funny human."


@pytest.mark.parametrize(("tokenizer", "family"), [(WORDS, "masked"), (PIECES, "seq2seq"), (BPE, "causal")])
@pytest.mark.parametrize("words", ["The play", "near the river", "1605", "human", "a"])
def test_span_heads(tokenizer, family, words):
    row = {"question": "Where was it written?", "context": CONTEXT}
    at = CONTEXT.index(f" {words}") + 1 if words != "The play" else 0
    encoder = ExampleTokenizer(SPAN, tokenizer, family, "span", 300)
    example = encoder.encode({**row, "answers": {"text": [words], "answer_start": [at]}})
    start, end = example.labels
    assert encoder.decode_span(row, start, end) == words
    for given_ in ([at, at + len(words)], f"[{at}, {at + len(words)}]"):
        assert encoder.encode({**row, "answers": given_}).labels == [start, end]
    assert encoder.decode_span(row, end, start - 1) == ""
    assert encoder.decode_span(row, 0, end) == ""  # begins in the question
    assert encoder.decode_span(row, start, 10_000) == ""


def test_spans_that_are_not_there():
    row = {"question": "Where?", "context": CONTEXT}
    encoder = ExampleTokenizer(SPAN, WORDS, "masked", "span", 300)
    assert encoder.encode({**row, "answers": {"text": [], "answer_start": []}}).labels == [0, 0]
    assert encoder.encode(row).labels is None
    short = ExampleTokenizer(SPAN, WORDS, "masked", "span", 20)
    last = {**row, "answers": [CONTEXT.index("human"), len(CONTEXT) - 1]}
    assert short.encode(last).labels == [IGNORE, IGNORE]
    assert short.encode(last).truncated_tokens > 0
    assert short.encode({**row, "answers": [4, len(CONTEXT)]}).labels == [IGNORE, IGNORE]  # only its end is cut off
    assert short.encode({**row, "answers": [0, 3]}).labels == encoder.encode({**row, "answers": [0, 3]}).labels
    with pytest.raises(DataError, match=r"spans: a span label is \{'text': \[...\], 'answer_start': \[...\]\} or"):
        encoder.encode({**row, "answers": "here"})


@pytest.mark.parametrize(
    ("form", "family", "head", "message"),
    [
        (
            replace(QUESTION, kind="generation"),
            "masked",
            "sequence",
            "head 'sequence' is for kind label or multilabel or",
        ),
        (QUESTION, "masked", "token", "head 'token' is for kind tagging, not 'label'"),
        (
            replace(QUESTION, template="{mask}"),
            "causal",
            "lm",
            "{mask} in the template is for the lm head of masked models",
        ),
        (replace(QUESTION, template="{mask} {mask}"), "masked", "lm", "the template may have one {mask}"),
        (replace(QUESTION, chat=True), "masked", "lm", "chat is for the lm head of causal models"),
        (replace(QUESTION, chat=True), "causal", "lm", "the tokenizer has no chat template; set chat: false"),
        (replace(TAGS, template="x {words}"), "masked", "token", "a tagging template is the column of words alone"),
        (replace(SPAN, pair=None), "masked", "span", "a span task needs pair, the column of the context alone"),
        (
            replace(SPAN, pair="In {context}"),
            "masked",
            "span",
            "a span task needs pair, the column of the context alone",
        ),
    ],
)
def test_formats_that_a_head_cannot_use(form, family, head, message):
    with pytest.raises(DataError) as error:
        ExampleTokenizer(form, WORDS, family, head, 50)
    assert message in str(error.value)


def test_other_messages():
    with pytest.raises(DataError, match="the tokenizer has no mask token"):
        ExampleTokenizer(QUESTION, BPE, "masked", "lm", 50)
    with pytest.raises(
        DataError, match="questions: no column 'text' for the template; did you mean 'texts'\\? columns: texts"
    ):
        causal().encode({"texts": "a"})
    refusing = byte_bpe()
    refusing.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(DataError, match="the chat template refuses the messages: no system role"):
        causal(replace(QUESTION, chat=True), refusing).encode(ROW)
    hiding = byte_bpe()
    hiding.chat_template = "hello"
    with pytest.raises(DataError, match="the chat template hides the user's words; use chat_placement: start"):
        causal(replace(QUESTION, chat=True, chat_placement="user"), hiding).encode(ROW)


# Batches


def encoded(ids, labels=None, **other) -> EncodedExample:
    return EncodedExample(list(ids), labels, **other)


@given(st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=9), min_size=1, max_size=5), st.booleans())
def test_collate_has_an_inverse(rows, typed):
    batch = collate(
        [
            encoded(ids, [IGNORE, *ids[1:]], token_type_ids=[1] * len(ids) if typed else None, task_id=i)
            for i, ids in enumerate(rows)
        ],
        pad=0,
    )
    assert batch.input_ids.shape == batch.attention_mask.shape == batch.labels.shape == (len(rows), max(map(len, rows)))
    assert [ids[mask.bool()].tolist() for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)] == rows
    assert [label[label != IGNORE].tolist() for label in batch.labels] == [row[1:] for row in rows]
    assert batch.task_ids.tolist() == list(range(len(rows)))
    assert (batch.token_type_ids is not None) == typed
    assert batch.prompt_offsets is None
    assert batch.input_ids[batch.attention_mask == 0].tolist() == [0] * int((batch.attention_mask == 0).sum())
    if typed:
        assert torch.equal(batch.token_type_ids, batch.attention_mask)


def test_collate_by_kind_of_label():
    def labels(*values):
        return collate([encoded(range(1 + i), value) for i, value in enumerate(values)], pad=7).labels

    assert torch.equal(labels(2, 0), torch.tensor([2, 0]))
    assert torch.equal(labels(2.5, 0.0), torch.tensor([2.5, 0.0]))
    assert torch.equal(labels([1.0, 0.0], [0.0, 0.0]), torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    assert torch.equal(labels([3, 4], [0, 0]), torch.tensor([[3, 4], [0, 0]]))
    assert torch.equal(labels([5], [6, 7, 8]), torch.tensor([[5, IGNORE, IGNORE], [6, 7, 8]]))  # targets of a decoder
    assert labels(None, None) is None
    assert labels(1, 2).dtype == torch.long
    assert collate([encoded([1, 2], prompt_offsets=1), encoded([3], prompt_offsets=0)], 0).prompt_offsets.tolist() == [
        1,
        0,
    ]
    for values, message in (
        ((1, None), "1 of the 2 rows of the batch have no labels"),
        ((1, 2.0), "labels of different kinds"),
        (([1.0], [1.0, 0.0]), "labels of different kinds"),
    ):
        with pytest.raises(DataError, match=message):
            labels(*values)
    with pytest.raises(DataError, match="at least one row"):
        collate([], 0)
    with pytest.raises(DataError, match="two tokenizers"):
        collate([encoded([1], token_type_ids=[0]), encoded([1])], 0)


@given(st.lists(st.integers(0, 50), max_size=300), st.integers(1, 9), st.integers(0, 3), st.integers(0, 3))
def test_order_has_every_row_once(lengths, size, seed, epoch):
    batches = training_order(lengths, size, seed, epoch)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert sorted(map(len, batches), reverse=True)[:-1] == [size] * (len(batches) - 1)
    assert training_order(lengths, size, seed, epoch) == batches
    ordered = evaluation_order(lengths, size)
    assert sorted(i for batch in ordered for i in batch) == list(range(len(lengths)))
    assert [lengths[i] for batch in ordered for i in batch] == sorted(lengths, reverse=True)


def test_order_changes_with_seed_and_epoch_and_saves_padding():
    lengths = [(i * 7919) % 101 for i in range(2000)]
    orders = [training_order(lengths, 8, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({str(epoch_order) for epoch_order in orders}) == 4
    padded = sum(max(lengths[i] for i in batch) * len(batch) for batch in orders[0])
    assert padded < 1.06 * sum(lengths)
    firsts = [lengths[batch[0]] for batch in orders[0]]
    assert firsts != sorted(firsts)
    one_pool = [min(lengths[i] for i in batch) for batch in training_order(lengths[:400], 8, 0, 0)]
    assert one_pool != sorted(one_pool)
    with pytest.raises(ConfigError, match="batch_size must be at least 1, given 0"):
        training_order([1], 0, 0, 0)
    with pytest.raises(ConfigError, match="batch_size must be at least 1, given 0"):
        evaluation_order([1], 0)
    with pytest.raises(ConfigError, match="tokens must be at least 1, given 0"):
        evaluation_order([1], 1, 0)


@given(st.lists(st.integers(0, 50), max_size=300), st.integers(1, 9), st.integers(1, 200))
def test_batches_keep_to_their_tokens(lengths, size, tokens):
    ordered = evaluation_order(lengths, size, tokens)
    assert [i for batch in ordered for i in batch] == [i for batch in evaluation_order(lengths, 1) for i in batch]
    for batch, after in itertools.zip_longest(ordered, ordered[1:]):
        longest = lengths[batch[0]]
        assert len(batch) == 1 or (len(batch) <= size and longest * len(batch) <= tokens)
        assert not after or len(batch) == size or longest * (len(batch) + 1) > tokens  # none is smaller than need be


@pytest.fixture(scope="module")
def smollm():
    from transformers import AutoTokenizer

    from softprompts.assets import fetch

    return AutoTokenizer.from_pretrained(fetch("smollm2-135m"))


BIG = ("vitaminc", "presuppositions", "intents", "fever", "strategyqa")  # a package that is fetched by hand


@pytest.mark.assets
@pytest.mark.parametrize("name", [name for name in PACKAGED if name not in BIG])
def test_packaged_rows_have_the_tokens_of_their_plain_text(name, smollm):
    task = load_task(TaskConfig(source=name))
    encoder = causal(replace(task.template, max_length=None), smollm, 100_000)
    for row in task.test[:150]:
        text = (
            render(task.template.template, row)
            + (" " if task.template.template else "")
            + answer_text(task.template, row)
        )
        assert encoder.example(row).input_ids == [*smollm(text)["input_ids"], smollm.eos_token_id]
    if task.template.kind == "label":
        candidates = encoder.candidates()
        assert {k: smollm.decode(v).strip() for k, v in candidates.items()} == task.template.verbalizer


@pytest.mark.assets
def test_the_default_models_chat(smollm):
    form = replace(QUESTION, template="{text}", chat=True, system="Be short.", chat_placement="user")
    speller = TextTokenizer(form, smollm, "causal", "lm")
    for text in ("Who is it?", "  two spaces", "\n\nlines", " one", "123", ""):
        row = causal(form, smollm).example({"text": text, "label": "LOC"})
        assert smollm.decode(row.input_ids[: row.prompt_offsets]).endswith("<|im_start|>user\n")
        assert (
            smollm.decode(row.input_ids[row.prompt_offsets : row.text_tokens])
            == f"{text}<|im_end|>\n<|im_start|>assistant\n"
        )
        assert smollm.decode(row.input_ids[row.text_tokens :]) == "location<|im_end|>"
        messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": text}]
        stock = smollm.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        if not text.startswith((" ", "\n")):
            assert row.input_ids[: row.text_tokens] == stock
        start = causal(replace(form, chat_placement="start"), smollm).encode({"text": text})
        assert (start.input_ids, start.prompt_offsets) == (stock, 0)
    assert speller.answer("location")[-1] == smollm.eos_token_id


@given(st.lists(st.integers(1, 50), min_size=1, max_size=120), st.integers(1, 9), st.integers(1, 200) | st.none())
def test_micro_batches_are_a_function_of_their_number(lengths, size, tokens):
    """Epoch after epoch in `order`, however many batches an epoch has, and in whatever order they are asked for."""
    rows = [encoded([0] * length, task_id=i) for i, length in enumerate(lengths)]
    expected = [batch for epoch in range(3) for batch in training_order(lengths, size, 5, epoch, tokens)]
    for batch in expected:
        assert len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= (tokens or 10**9)
    forward, backward = ExampleBatches(rows, size, 5, tokens), ExampleBatches(rows, size, 5, tokens)
    assert [[row.task_id for row in forward.at(i)] for i in range(len(expected))] == expected
    last = range(len(expected))[::-1]
    assert [[row.task_id for row in backward.at(i)] for i in last] == [expected[i] for i in last]


@pytest.mark.parametrize(
    ("package", "unused"),
    [
        ("softprompts.data", ("pyarrow", "pandas", "datasets", "gguf", "tokenizers", "transformers")),
        ("softprompts.assets", ("gguf", "tokenizers", "numpy", "torch", "transformers", "safetensors")),
    ],
)
def test_importing_a_package_does_not_import_what_only_some_calls_need(package, unused):
    code = f"import sys, {package}; print([name for name in {unused!r} if name in sys.modules])"
    source = Path(__file__).parent.parent / "src"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(source)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "[]"
