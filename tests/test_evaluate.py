"""Evaluation: ranked answers against sums by the stock model, generation, heads, votes and mapped labels."""

import csv
import json
import math

import pytest
import torch

import local
from prompted import method_of
from softprompts.config import EvaluationConfig, parse
from softprompts.errors import ConfigError, DataError
from softprompts.evaluation import evaluate
from softprompts.evaluation.metrics import majority_vote
from softprompts.model.initialization import from_ids
from softprompts.model.soft_prompt_model import open_prompts
from softprompts.recipes.run import run as job

CONFIG = EvaluationConfig(resamples=100, batch_size=3)


def prepared(folder, model, **task):
    """A job on the colors with a tiny `model`, nothing trained."""
    values = local.run_values(folder, model)
    values["task"] |= task
    values["model"]["head"] = values["task"].pop("head", "lm")
    return job.prepare(parse(values))


def with_words(made, ids):
    """The run's model with a prompt that is the words `ids`."""
    site = made.model.registry.site_of(made.prompts)
    with torch.no_grad():
        method_of(made).prompt.copy_(from_ids(made.model.backbone, site, torch.tensor(ids)))
    return made.model


WORDS = [5, 9, 11, 7]
ANSWERS = [
    {"warm": "warm", "cold": "cold"},
    {"warm": "a warm one", "cold": "a cold one"},  # the first tokens are the same
    {"warm": "co", "cold": "cold"},  # one answer may begin another
    {"warm": "Q", "cold": "Z"},  # one token each: both from the same pass
]


@pytest.mark.parametrize("verbalizer", ANSWERS)
@pytest.mark.parametrize("normalize", [False, True])
def test_ranking_is_the_whole_answer_s_log_probability(tmp_path, verbalizer, normalize):
    short = max(map(len, verbalizer.values())) == 1
    made = prepared(tmp_path, "llama", verbalizer=verbalizer, separator="" if short else " ")
    model, encoder = with_words(made, WORDS), made.encoders[0]
    assert short == all(len(ids) == 1 for ids in encoder.candidates().values())
    rows = [{**row, "text": row["text"] + " indeed" * (i % 3)} for i, row in enumerate(made.tasks[0].test[:5])]
    found = list(
        evaluate.answers(
            model,
            rows,
            prompt=model.task,
            encoder=encoder,
            config=CONFIG.model_copy(update={"normalize": normalize}),
        )
    )
    model = model.backbone.model
    for row, one in zip(rows, found, strict=True):
        expected = {}
        for label, ids in encoder.candidates().items():
            text = WORDS + encoder.encode(row).input_ids
            logits = model(input_ids=torch.tensor([text + ids])).logits[0].log_softmax(-1)
            parts = [float(logits[len(text) - 1 + i, token]) for i, token in enumerate(ids)]
            expected[label] = sum(parts) / (len(ids) if normalize else 1)
        assert one.scores == pytest.approx(expected, abs=2e-5)
        assert one.value == max(expected, key=expected.__getitem__)


def test_ranking_with_an_encoder_decoder(tmp_path):
    made = prepared(tmp_path, "t5", verbalizer={"warm": "it is warm", "cold": "cold"})
    model, encoder = with_words(made, WORDS), made.encoders[0]
    row = made.tasks[0].test[0]
    (found,) = evaluate.answers(model, [row], prompt=model.task, encoder=encoder, config=CONFIG)
    for label, ids in encoder.candidates().items():
        text = torch.tensor([WORDS + encoder.encode(row).input_ids])
        logits = model.backbone.model(input_ids=text, labels=torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = sum(float(logits[i, token]) for i, token in enumerate(ids))
        assert found.scores[label] == pytest.approx(expected, abs=2e-5)


def test_ranking_with_a_masked_model(tmp_path):
    made = prepared(tmp_path, "bert", template="{text} it is {mask}", verbalizer={"warm": "warm", "cold": "so cold"})
    model, encoder = with_words(made, WORDS), made.encoders[0]
    row = made.tasks[0].test[0]
    (found,) = evaluate.answers(model, [row], prompt=model.task, encoder=encoder, config=CONFIG)
    for label, answer in encoder.template.verbalizer.items():
        one = encoder.encode(row, answer)
        first, rest = one.input_ids[:1], one.input_ids[1:]
        ids = torch.tensor([first + WORDS + rest])
        logits = model.backbone.model(input_ids=ids).logits[0].log_softmax(-1)
        places = [i for i, wanted in enumerate(one.labels) if wanted != -100]
        expected = sum(float(logits[i + len(WORDS), one.labels[i]]) for i in places)
        assert found.scores[label] == pytest.approx(expected, abs=2e-5)


def test_answers_do_not_depend_on_the_batch(tmp_path):
    made = prepared(tmp_path, "llama", verbalizer=ANSWERS[1])
    rows = made.tasks[0].test
    alone = list(
        evaluate.answers(
            made.model,
            rows,
            prompt=made.prompt(0),
            encoder=made.encoders[0],
            config=CONFIG.model_copy(update={"batch_size": 1}),
        )
    )
    together = list(evaluate.answers(made.model, rows, prompt=made.prompt(0), encoder=made.encoders[0], config=CONFIG))
    for one, other in zip(alone, together, strict=True):
        assert one.scores == pytest.approx(other.scores, abs=1e-5)


def test_generated_answers_and_illegal_ones(tmp_path):
    made = prepared(tmp_path, "llama")
    found = evaluate.evaluate(
        made.model,
        made.tasks[0].test,
        prompt=made.prompt(0),
        encoder=made.encoders[0],
        config=CONFIG.model_copy(update={"by": "generate"}),
    )
    # A random model writes nonsense: everything is illegal, counted and wrong.
    assert found.headline.illegal == found.headline.n == len(made.tasks[0].test)
    assert found.headline.value == 0
    assert all(a.text is not None and a.value is None for a in found.answers)


def test_generation_after_teaching_agrees_with_ranking(tmp_path):
    values = local.run_values(tmp_path)
    local.teach(tmp_path / "llama", steps=250)
    made = job.prepare(parse(values))
    ranked = evaluate.evaluate(
        made.model, made.tasks[0].test, prompt=made.prompt(0), encoder=made.encoders[0], config=CONFIG
    )
    written = evaluate.evaluate(
        made.model,
        made.tasks[0].test,
        prompt=made.prompt(0),
        encoder=made.encoders[0],
        config=CONFIG.model_copy(update={"by": "generate"}),
    )
    assert ranked.headline.value == written.headline.value == 1.0
    assert written.headline.illegal == 0


def three_tasks(folder):
    """A job on the colors with a tiny model and three tasks that are alike, nothing trained."""
    values = local.run_values(folder)
    task = values.pop("task")
    values["tasks"] = [{**task, "name": name} for name in ("a", "b", "c")]
    return job.prepare(parse(values))


def test_several_prompts_vote_and_ties_go_to_the_first(tmp_path, monkeypatch):
    made = three_tasks(tmp_path)
    rows = list(made.tasks[0].test[:3])
    ballots = [["warm", "cold", None], ["cold", "cold", "cold"], ["odd", "warm", "warm"]]

    def ask(reader, encoder, asked, config):
        assert [task for _, task in asked] == [0, 1, 2] * len(rows)  # every row with every prompt, in one batch
        return [evaluate.Answer(ballots[task][rows.index(row)]) for row, task in asked]

    monkeypatch.setattr(evaluate, "_rank", ask)
    together = evaluate.answers(made.model, rows, prompt=made.prompts, encoder=made.encoders[0], config=CONFIG)
    assert [a.value for a in together] == ["warm", "cold", "cold"]
    assert [majority_vote(column) for column in zip(*ballots, strict=True)] == ["warm", "cold", "cold"]


def test_identical_prompts_vote_as_one(tmp_path):
    made = three_tasks(tmp_path)
    rows = made.tasks[0].test
    one = list(evaluate.answers(made.model, rows, prompt=made.prompt(0), encoder=made.encoders[0], config=CONFIG))
    three = list(evaluate.answers(made.model, rows, prompt=made.prompts, encoder=made.encoders[0], config=CONFIG))
    assert [a.value for a in one] == [a.value for a in three]


def test_labels_of_another_set_are_mapped_after_decoding(tmp_path):
    made = prepared(tmp_path, "llama")
    rows = [{"text": row["text"], "label": {"warm": "hot", "cold": "icy"}[row["label"]]} for row in made.tasks[0].test]
    own = evaluate.evaluate(
        made.model, made.tasks[0].test, prompt=made.prompt(0), encoder=made.encoders[0], config=CONFIG
    )
    mapped = evaluate.evaluate(
        made.model,
        rows,
        prompt=made.prompt(0),
        encoder=made.encoders[0],
        config=CONFIG,
        mapping={"warm": "hot", "cold": "icy"},
    )
    assert mapped.headline.value == own.headline.value
    assert set(mapped.references) <= {"hot", "icy"}
    assert {a.value for a in mapped.answers} <= {"hot", "icy"}


@pytest.mark.parametrize("kind", ["label", "regression", "multilabel"])
def test_sequence_heads_train_and_answer(tmp_path, kind):
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for i in range(40):
            warm = i % 2 == 0
            label = {
                "label": "warm" if warm else "cold",
                "regression": float(warm),
                "multilabel": "a,b" if warm else "b",
            }
            writer.writerow([f"the thing {i} is {'red' if warm else 'blue'}", label[kind]])
    values = local.run_values(tmp_path, "llama", max_steps=200, learning_rate=0.1, head_learning_rate=0.05)
    values["task"] |= {"source": str(tmp_path / "rows.csv"), "template": "{text}", "kind": kind, "name": "t"}
    values["model"]["head"] = "sequence"
    results = job.run(parse(values))
    score = results["summary"]["after"]["value"]
    assert score > 0.9, results["scores"]
    opened = open_prompts([tmp_path / "out" / "prompt"], config=parse(values).model)[0]
    assert opened.registry.head(opened.task)
    rows = [{"text": "the thing 3 is red"}, {"text": "the thing 4 is blue"}]
    one, other = evaluate.answers(opened, rows, prompt=opened.task, config=CONFIG)
    if kind == "regression":
        assert one.value - other.value > 0.5
    else:
        if kind == "multilabel":  # each label has its own chance: they do not share one between them
            assert all((chance > math.log(0.5)) == (label in one.value) for label, chance in one.scores.items())
        with pytest.raises(ConfigError, match="cannot vote in one batch"):
            open_prompts([tmp_path / "out" / "prompt"] * 2, config=parse(values).model)[0]
        assert (one.value, other.value) == {"label": ("warm", "cold"), "multilabel": (["a", "b"], ["b"])}[kind]


def test_token_heads_train_and_answer(tmp_path):
    rows = [
        {"tokens": ["the", color, "thing", str(i)], "tags": ["O", "COLOR", "O", "NUMBER"]}
        for i, color in enumerate(["red", "blue", "green", "orange"] * 10)
    ]
    (tmp_path / "tags.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    values = local.run_values(tmp_path, "llama", max_steps=60, learning_rate=0.3, head_learning_rate=0.02)
    values["task"] |= {"source": str(tmp_path / "tags.jsonl"), "template": "{tokens}", "label": "tags"}
    values["task"] |= {"kind": "tagging", "name": "tags"}
    values["model"]["head"] = "token"
    results = job.run(parse(values))
    assert results["summary"]["after"]["value"] > 0.9
    opened = open_prompts([tmp_path / "out" / "prompt"], config=parse(values).model)[0]
    (found,) = evaluate.answers(opened, [{"tokens": ["the", "red", "thing", "7"]}], prompt=opened.task, config=CONFIG)
    assert found.value == ["O", "COLOR", "O", "NUMBER"]


def test_span_heads_train_and_answer(tmp_path):
    rows = []
    for i, color in enumerate(["red", "blue", "green", "orange"] * 10):
        context = f"thing {i} is {color} today"
        start = context.index(color)
        rows.append({"q": "which color", "context": context, "answers": {"text": [color], "answer_start": [start]}})
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    values = local.run_values(tmp_path, "llama", max_steps=80, learning_rate=0.3, head_learning_rate=0.05)
    values["task"] |= {"source": str(tmp_path / "qa.jsonl"), "template": "{q}", "pair": "{context}"}
    values["task"] |= {"label": "answers", "kind": "span", "name": "qa"}
    values["model"]["head"] = "span"
    results = job.run(parse(values))
    assert results["summary"]["metric"].startswith("squad")
    opened = open_prompts([tmp_path / "out" / "prompt"], config=parse(values).model)[0]
    asked = [{"q": "which color", "context": "thing 5 is red today"}]
    (found,) = evaluate.answers(opened, asked, prompt=opened.task, config=CONFIG)
    assert found.value in asked[0]["context"]
    assert results["summary"]["after"]["value"] > 0.5, results["scores"]


def test_an_opened_artifact_scores_bit_for_bit_as_in_its_run(tmp_path):
    values = local.run_values(tmp_path)
    run = parse(values)
    made = job.prepare(run)
    job.run(run)
    opened = open_prompts([tmp_path / "out" / "prompt"], config=run.model)[0]
    method_of(made).load_state_dict(opened.registry.method(opened.task).state_dict())
    rows = made.tasks[0].test
    mine = [a.scores for a in evaluate.answers(opened, rows, prompt=opened.task, config=CONFIG)]
    assert mine == [
        a.scores
        for a in evaluate.answers(made.model, rows, prompt=made.prompt(0), encoder=made.encoders[0], config=CONFIG)
    ]


def test_labels_are_evaluated_by_name_whatever_their_words(tmp_path):
    """Multi-label and tagging references are labels, as predictions are, also where the answers are other words."""
    rows = [
        {"text": "a red one", "label": "C,O"},
        {"text": "a blue one", "label": ""},
        {"text": "a green one", "label": "O"},
    ] * 8
    (tmp_path / "m.jsonl").write_text(
        "".join(json.dumps({**row, "text": f"{row['text']} {i}"}) + "\n" for i, row in enumerate(rows))
    )
    words = {"C": "color", "O": "other"}
    made = prepared(tmp_path, "llama", source=str(tmp_path / "m.jsonl"), kind="multilabel", verbalizer=words)
    encoder = made.encoders[0]
    golds = [evaluate.reference(encoder, {"text": "x", "label": label}) for label in ("C,O", "", ["O"])]
    assert golds == [["C", "O"], [], ["O"]]
    assert [evaluate._parse_answer(encoder, text) for text in ("color, other", "", "other")] == golds


def test_the_positive_label_is_mapped_too(tmp_path):
    made = prepared(tmp_path, "llama", metrics=["f1"], positive="warm")
    rows = [{"text": row["text"], "label": {"warm": 1.0, "cold": 0.0}[row["label"]]} for row in made.tasks[0].test]
    own = evaluate.evaluate(
        made.model, made.tasks[0].test, prompt=made.prompt(0), encoder=made.encoders[0], config=CONFIG
    )
    mapped = evaluate.evaluate(
        made.model,
        rows,
        prompt=made.prompt(0),
        encoder=made.encoders[0],
        config=CONFIG,
        mapping={"warm": "1", "cold": "0"},
    )
    assert mapped.headline.value == own.headline.value
    with pytest.raises(DataError, match="mapped label 'hot' is not in the verbalizer"):
        evaluate.evaluate(
            made.model, rows, prompt=made.prompt(0), encoder=made.encoders[0], config=CONFIG, mapping={"hot": "1"}
        )


def test_writing_keeps_within_the_model_s_positions(tmp_path):
    (tmp_path / "long.jsonl").write_text(
        "".join(json.dumps({"text": f"{i} " + "very " * 300, "label": "x"}) + "\n" for i in range(20))
    )
    made = prepared(tmp_path, "gpt2", source=str(tmp_path / "long.jsonl"), kind="generation", template="{text}")
    config = CONFIG.model_copy(update={"max_new_tokens": 20})
    (one, *_) = evaluate.answers(
        made.model, made.tasks[0].test[:1], prompt=made.prompt(0), encoder=made.encoders[0], config=config
    )
    assert one.text is not None
