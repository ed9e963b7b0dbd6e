"""What evaluation costs: prompts and common words read once, rows encoded once, batches of tokens, rows in order."""

from dataclasses import replace

import pytest
import torch

import local
from prompted import method_of
from softprompts import injection
from softprompts.backbone.kernels import Kernels
from softprompts.config import EvaluationConfig, parse
from softprompts.errors import DataError
from softprompts.evaluation import evaluate
from softprompts.evaluation.metrics import majority_vote
from softprompts.model.initialization import from_ids
from softprompts.recipes.run import run
from softprompts.types import IGNORE, Batch

CONFIG = EvaluationConfig(resamples=100, batch_size=3)
WORDS = {"warm": "a warm one", "cold": "a cold one"}  # the first tokens are the same


def prepared(folder, model="llama", tasks=1, site="input", **task):
    """A job on the colors with a tiny `model` and several tasks that are alike, nothing trained."""
    values = local.run_values(folder, model)
    values["prompt"]["site"] = site
    first = {"verbalizer": WORDS, **values.pop("task"), **task}
    values["tasks"] = [{**first, "name": f"colors{i}"} for i in range(tasks)]
    return run.prepare(parse(values))


def passes(model):
    """What counts the tokens of each pass through the first layer; and a handle to stop it."""
    found = []
    injection.why_not_packed(model.backbone)  # tries a few tokens, once

    def count(module, args, kwargs, output):
        found.append((args[0] if args else kwargs["hidden_states"]).shape[:2].numel())

    return found, model.backbone.layers[0].register_forward_hook(count, with_kwargs=True)


def alike(texts):
    """How many tokens all texts begin with."""
    return next(i for i, column in enumerate(zip(*texts, strict=False)) if len(set(column)) > 1)


def one_by_one(model, encoder, rows, task=0):
    """Each row's scores with the whole row read by itself, nothing shared: the prompt's words by concatenation."""
    found = []
    for row in rows:
        text = encoder.encode(row).input_ids
        scores = {}
        for label, ids in encoder.candidates().items():
            batch = Batch(
                torch.tensor([text + ids]), torch.ones(1, len(text + ids), dtype=torch.long), torch.tensor([task])
            )
            batch = replace(batch, labels=torch.tensor([[IGNORE] * len(text) + ids]))
            path = None if model.registry.site_of(model.tasks).in_cache else "concatenation"
            output = model.score(batch, path=path)
            logits = output.logits.log_softmax(-1)
            scores[label] = float(logits.gather(1, output.labels[:, None]).sum())
        found.append(scores)
    return found


@pytest.mark.parametrize("model", ["llama", "gpt2"])
@pytest.mark.parametrize("site", ["input", "layers", "kv"])
@torch.no_grad()
def test_prompts_and_what_all_texts_begin_with_are_read_once(tmp_path, model, site):
    made = prepared(tmp_path, model, site=site, template="What is this: {text}")
    model, encoder = made.model, made.encoders[0]
    rows = list(made.tasks[0].train[:20])
    expected = one_by_one(model, encoder, rows)
    read, handle = passes(model)
    found = list(
        evaluate.answers(
            model, rows, prompt=model.task, encoder=encoder, config=CONFIG.model_copy(update={"batch_size": 5})
        )
    )
    handle.remove()
    for one, scores in zip(found, expected, strict=True):
        assert one.scores == pytest.approx(scores, abs=2e-5)
    texts = [encoder.encode(row).input_ids for row in rows]
    common = alike(texts) if site == "input" else 0
    assert common > 3 or site != "input"
    beside = len(injection.candidate_tree(list(encoder.candidates().values())).token_ids)
    first, *others = read if site != "kv" else [0, *read]
    assert first == (0 if site == "kv" else 4 + common)
    assert len(others) == 4
    assert sum(others) == sum(map(len, texts)) + len(rows) * (beside - common)


def test_models_that_cannot_pack_read_their_prompts_once_too(tmp_path):
    made = prepared(tmp_path, verbalizer={"warm": "co", "cold": "cold"})
    model, rows = made.model, list(made.tasks[0].train[:20])
    packed = list(evaluate.answers(made.model, rows, prompt=made.prompt(0), encoder=made.encoders[0], config=CONFIG))
    model.backbone = replace(model.backbone, kernels=Kernels(path="shared"))
    read, handle = passes(model)
    found = list(
        evaluate.answers(
            made.model,
            rows,
            prompt=made.prompt(0),
            encoder=made.encoders[0],
            config=CONFIG.model_copy(update={"batch_size": 1}),
        )
    )
    handle.remove()
    for one, other in zip(found, packed, strict=True):
        assert one.scores == pytest.approx(other.scores, abs=2e-5)
    assert sum(read[1:]) < len(rows) * 40  # no row read the prompt's 4 and the common tokens again
    assert read[0] == 4 + alike([made.encoders[0].encode(row).input_ids for row in rows])


def test_each_task_is_evaluated_with_its_own_prompt(tmp_path):
    made = prepared(tmp_path, tasks=3)
    with torch.no_grad():
        for i in range(3):
            words = torch.tensor([5 + i, 9, 11 + i, 7])
            method_of(made, i).prompt.copy_(from_ids(made.model.backbone, injection.Site(), words))
    rows = list(made.tasks[0].test[:4])
    seen = []
    for i, encoder in enumerate(made.encoders):
        with torch.no_grad():
            expected = one_by_one(made.model, encoder, rows, i)
        found = [
            one.scores
            for one in evaluate.answers(made.model, rows, prompt=made.prompt(i), encoder=encoder, config=CONFIG)
        ]
        for one, scores in zip(found, expected, strict=True):
            assert one == pytest.approx(scores, abs=2e-5)
        seen.append(found[0]["warm"])
    assert len({round(value, 3) for value in seen}) == 3
    # Of three votes each is that of its own prompt: the majority is theirs.
    ballots = [
        [a.value for a in evaluate.answers(made.model, rows, prompt=name, encoder=e, config=CONFIG)]
        for name, e in zip(made.prompts, made.encoders, strict=True)
    ]
    voted = [
        a.value
        for a in evaluate.answers(made.model, rows, prompt=made.prompts, encoder=made.encoders[0], config=CONFIG)
    ]
    assert voted == [majority_vote(column) for column in zip(*ballots, strict=True)]


def test_a_batch_keeps_to_its_tokens_and_a_row_is_encoded_once(tmp_path, monkeypatch):
    made = prepared(tmp_path)
    model, encoder = made.model, made.encoders[0]
    rows = [{**row, "text": row["text"] + " indeed" * (i % 5)} for i, row in enumerate(made.tasks[0].train[:30])]
    whole = [
        one.scores
        for one in evaluate.answers(
            model, rows, prompt=model.task, encoder=encoder, config=CONFIG.model_copy(update={"batch_size": 30})
        )
    ]
    encoded = []
    original = type(encoder).encode

    def encode(self, row, answer=None):
        encoded.append(row["text"])
        return original(self, row, answer)

    monkeypatch.setattr(type(encoder), "encode", encode)
    read, handle = passes(model)
    config = CONFIG.model_copy(update={"batch_size": 30, "batch_tokens": 120})
    found = [one.scores for one in evaluate.answers(model, rows, prompt=model.task, encoder=encoder, config=config)]
    handle.remove()
    for one, scores in zip(found, whole, strict=True):
        assert one == pytest.approx(scores, abs=2e-5)
    assert sorted(encoded) == sorted(row["text"] for row in rows)
    assert len(read) > 8
    assert max(read[1:]) <= 120


def test_rows_are_taken_as_they_are_needed_and_those_before_a_fault_are_answered(tmp_path):
    made = prepared(tmp_path, verbalizer={"warm": "Q", "cold": "Z"}, separator="")
    alive, most, texts = 0, 0, ["red", "blue", "green", "orange"]

    class Counted(dict):
        def __init__(self, **values):
            nonlocal alive, most
            super().__init__(**values)
            alive += 1
            most = max(most, alive)

        def __del__(self):
            nonlocal alive
            alive -= 1

    def rows(count):
        for i in range(count):
            yield Counted(text=texts[i % 4])
        raise DataError("row 20001 is broken")

    found = evaluate.answers(
        made.model, rows(20_000), prompt=made.prompt(0), encoder=made.encoders[0], config=EvaluationConfig()
    )
    values = []
    with pytest.raises(DataError, match="row 20001"):
        values.extend(one.value for one in found)
    assert len(values) == 20_000
    assert values == values[:4] * 5000
    assert most <= 2 * evaluate.CHUNK + 2
