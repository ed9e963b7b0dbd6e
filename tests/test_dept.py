"""DePT against its equation written out by hand: what each text token gets, and nothing else gets anything."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import local
import rows
import tiny
from closeness import GRADIENT_ROUNDINGS, assert_close
from prompted import methods_of, prompted, spec_of
from rows import INPUT, called
from softprompts import SoftPromptModel, injection
from softprompts.artifacts import artifact
from softprompts.config import EvaluationConfig, InitConfig, PromptConfig, parse
from softprompts.errors import ConfigError
from softprompts.evaluation import evaluate
from softprompts.injection.generation import generate
from softprompts.methods import build, build_tasks
from softprompts.methods.dept import DePT
from softprompts.model.soft_prompt_model import open_prompts
from softprompts.recipes.run import run
from softprompts.training import objectives
from softprompts.training.shared_batch import training_step
from softprompts.types import IGNORE, Batch, EmbeddingDelta, PromptInit, PromptSpec, mix_prompts

P, S, R = 3, 4, 2
TASKS = ("one", "two")
TASK = [1, 0, 1, 1]
GIVEN = (2, 5, 0, 6)
"""Tokens before the first label of rows.LENGTHS (5, 9, 1, 7): fewer than S, more, none, more."""


def tuned(name: str, site: injection.Site = INPUT, zero: bool = False) -> SoftPromptModel:
    """The method for two tasks on a tiny model; `zero`: as it begins, else with random rows too."""
    bb = tiny.backbone(name)
    spec = injection.prompt_spec(bb, site, P)
    torch.manual_seed(0)
    options, start = {"rank": R, "positions": S}, PromptInit(rows.random(5, P, spec.width))
    methods = build_tasks("dept", options, spec, start, TASKS)
    with torch.no_grad():
        for i, method in enumerate(methods.values()):
            method.prompt.add_(rows.random(40 + i, *method.prompt.shape))
            if not zero:
                method.rows.copy_(rows.random(50 + i, *method.rows.shape))
    return prompted(bb, site, methods)


def batch_of(name: str, side: str = "right", extra: int = 0) -> Batch:
    """Ragged rows of two tasks; causal ones have GIVEN tokens before their first label."""
    found = rows.batch(name, rows.texts(name), side, extra)
    labels = found.labels
    if name in tiny.CAUSAL:
        labels = labels.masked_fill(found.attention_mask.cumsum(1) <= torch.tensor(GIVEN)[:, None], IGNORE)
    return Batch(found.input_ids, found.attention_mask, torch.tensor(TASK), labels)


def changed(made: SoftPromptModel, ids: Tensor, task: int, reach: int) -> Tensor:
    """The embeddings [T, H] of one text, number by number: c Σ_k A[i, k] B[k, j] on token i."""
    method = methods_of(made)[task]
    a, b, c = method.columns, method.rows, 8 / math.sqrt(R)
    found = list(made.backbone.embed(ids[None])[0])
    for i in range(min(S, reach, len(ids))):
        for k in range(R):
            found[i] = found[i] + c * a[i, k] * b[k]
    return torch.stack(found)


def alone(made: SoftPromptModel, ids: Tensor, task: int, reach: int) -> Tensor:
    """The stock model's scores of one row's labels, its changed text behind (BERT: around) the prompt by hand."""
    bb, prompt = made.backbone, methods_of(made)[task].prompt
    text = changed(made, ids, task, reach)
    place = 1 if bb.family.name == "masked" else 0
    full = torch.cat([text[:place], prompt, text[place:]])[None]
    if bb.family.name == "seq2seq":
        return bb.model(inputs_embeds=full, decoder_input_ids=rows.shifted(bb, rows.targets([ids])[0])[None]).logits[0]
    logits = bb.model(inputs_embeds=full).logits[0]
    if bb.family.name == "masked":
        return torch.cat([logits[:1], logits[1 + P :]])
    return logits[P - 1 + reach : -1]


def reached(name: str) -> list[int]:
    return list(GIVEN) if name in tiny.CAUSAL else list(rows.LENGTHS)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart", "bert"])
@pytest.mark.parametrize(("side", "extra"), [("right", 0), ("left", 3)])
def test_scores_and_gradients_are_those_of_the_equation(name: str, side: str, extra: int) -> None:
    """On every path: neighbors of another task, padding of any side and size, short and long texts, no given text."""
    made, batch = tuned(name), batch_of(name, side, extra)
    texts = rows.texts(name)
    each = [alone(made, ids, task, n) for ids, task, n in zip(texts, TASK, reached(name), strict=True)]
    wanted = rows.targets(texts) if name in tiny.SEQ2SEQ else texts
    if name in tiny.CAUSAL:
        wanted = [ids[n:] for ids, n in zip(texts, GIVEN, strict=True)]
    functional.cross_entropy(torch.cat(each), torch.cat(wanted)).backward()
    expected = {key: p.grad for key, p in made.prompts.named_parameters()}
    assert all(value.abs().max() > 1e-6 for value in expected.values())
    for path in (None, *rows.paths(name, INPUT)):
        made.prompts.zero_grad()
        prompt = made.make_prompts(batch)
        output = injection.score(made.backbone, batch, prompt, INPUT, path=path)
        for i in range(len(texts)):
            torch.testing.assert_close(rows.of_row(output, i), each[i].detach(), atol=1e-5, rtol=1e-5)
        functional.cross_entropy(output.logits, output.labels).backward()
        for key, parameter in made.prompts.named_parameters():
            assert_close(parameter.grad, expected[key], GRADIENT_ROUNDINGS)


@pytest.mark.parametrize(("name", "site"), rows.cases(("llama", "t5", "bert")), ids=called)
def test_with_rows_at_zero_it_is_prompt_tuning_bit_for_bit(name: str, site: injection.Site) -> None:
    made, batch = tuned(name, site, zero=True), batch_of(name)
    starts = {name: PromptInit(method.prompt.detach()) for name, method in made.prompts.items()}
    plain = {name: build("prompt-tuning", {}, spec_of(made), start) for name, start in starts.items()}
    one, two = training_step(made, batch), training_step(prompted(made.backbone, site, plain), batch)
    assert torch.equal(one.output.logits, two.output.logits)
    objectives.task(one).backward()
    objectives.task(two).backward()
    for task in TASKS:
        mine, theirs = made.prompts[task].prompt.grad, plain[task].prompt.grad
        assert torch.equal(mine, theirs)
        assert mine.abs().max() > 0
    if site.name != "decoder":  # whatever the prompt does, the text is there to be changed
        assert all(method.rows.grad.abs().max() > 0 for method in methods_of(made))


def test_mixed_prompts_add_what_each_adds() -> None:
    """Zeros for those that add nothing, short ones lengthened; rows keep their reach wherever they go."""
    none = rows.single(torch.zeros(2, 6), 1)
    one = rows.single(torch.zeros(3, 6), 2)
    short = replace(one, embedding_delta=EmbeddingDelta(rows.random(0, 1, 2, 5), torch.tensor([4, 1])))
    long = replace(none, embedding_delta=EmbeddingDelta(rows.random(1, 1, 3, 5), torch.tensor([2])))
    found = mix_prompts([none, short, long], [torch.tensor([1]), torch.tensor([3, 0]), torch.tensor([2])])
    assert found.embedding_delta.values.shape == (3, 3, 5)
    assert found.embedding_delta.reach.tolist() == [1, 0, 2, 4]
    assert found.prompt_index.tolist() == [1, 0, 2, 1]
    assert torch.equal(found.embedding_delta.values[0], torch.zeros(3, 5))
    assert torch.equal(found.embedding_delta.values[1], torch.cat([short.embedding_delta.values[0], torch.zeros(1, 5)]))
    assert torch.equal(found.embedding_delta.values[2], long.embedding_delta.values[0])
    part = found.rows(torch.tensor([3, 0, 3]))
    assert (part.prompt_index.tolist(), part.embedding_delta.reach.tolist()) == ([1, 1, 1], [4, 1, 4])
    assert mix_prompts([none, none], [torch.tensor([0]), torch.tensor([1])]).embedding_delta is None


@torch.no_grad()
def test_nothing_but_the_text_is_changed() -> None:
    """Padding and what lies beyond stays as it is to the bit, in a model of half precision too."""
    text, mask = rows.random(0, 2, 6, 8).bfloat16(), torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])
    prompt = replace(
        rows.single(torch.zeros(1, 8), 2), embedding_delta=EmbeddingDelta(rows.random(1, 1, 4, 8), torch.tensor([2, 9]))
    )
    found = injection.add_delta(text, mask, prompt)
    assert found.dtype == torch.bfloat16
    expected = text.clone()
    expected[0, :2] = (text[0, :2].float() + prompt.embedding_delta.values[0, :2]).bfloat16()
    expected[1, :3] = (text[1, :3].float() + prompt.embedding_delta.values[0, :3]).bfloat16()
    assert torch.equal(found, expected)
    assert injection.add_delta(text, mask, None) is text


@torch.no_grad()
@pytest.mark.parametrize("site", rows.sites("llama"), ids=called)
def test_continuations_agree_with_training(site: injection.Site) -> None:
    """A candidate's log-probability is that of the same tokens as labels; candidates are never changed."""
    made, candidates = tuned("llama", site), [[7], [8, 9], [8, 10, 11]]
    text, mask = rows.pad(rows.texts("llama"), "left", value=3)
    asked = Batch(text, mask, torch.tensor(TASK))
    for path in rows.paths("llama", site):
        found = injection.score_continuations(
            made.backbone, asked, made.make_prompts(asked), site, candidates, path=path
        )
        for c, candidate in enumerate(candidates):
            for i, ids in enumerate(rows.texts("llama")):
                row = torch.cat([ids, torch.tensor(candidate)])[None]
                labels = row.masked_fill(torch.arange(row.shape[1]) < len(ids), IGNORE)
                batch = Batch(row, torch.ones_like(row), torch.tensor([TASK[i]]), labels)
                loss = objectives.task(training_step(made, batch)) * len(candidate)
                assert float(found[i, c]) == pytest.approx(-float(loss), abs=2e-5)


@torch.no_grad()
@pytest.mark.parametrize(("name", "site"), rows.cases(("llama", "t5")), ids=called)
def test_writing_agrees_with_training(name: str, site: injection.Site) -> None:
    """The score of each written token is what it has as a label behind the same text; what is written stays as is."""
    made, options = tuned(name, site), {"output_scores": True, "return_dict_in_generate": True, "do_sample": False}
    text, mask = rows.pad(rows.texts(name), "left", value=3)
    asked = Batch(text, mask, torch.tensor(TASK))
    written = generate(
        made.backbone, asked, made.make_prompts(asked), site, max_new_tokens=3, min_new_tokens=3, **options
    )
    new = written.sequences[:, -3:]
    for i, ids in enumerate(rows.texts(name)):
        if name in tiny.SEQ2SEQ:
            batch = Batch(ids[None], torch.ones_like(ids[None]), torch.tensor([TASK[i]]), new[i : i + 1])
        else:
            row = torch.cat([ids, new[i]])[None]
            labels = row.masked_fill(torch.arange(row.shape[1]) < len(ids), IGNORE)
            batch = Batch(row, torch.ones_like(row), torch.tensor([TASK[i]]), labels)
        logits = training_step(made, batch).output.logits
        for step, scores in enumerate(written.scores):
            legal = scores[i].isfinite()  # the end token is not, before three tokens are written
            torch.testing.assert_close(scores[i][legal], logits[step][legal], atol=2e-5, rtol=1e-5)


def test_start_and_size() -> None:
    """Columns as torch's Kaiming start, by the run's seed; rows zero; the scale of the code; the paper's budget."""
    spec = PromptSpec(60, 768, 768)
    torch.manual_seed(3)
    method = DePT(DePT.Config(rank=30), spec, PromptInit(torch.zeros(60, 768)))
    torch.manual_seed(3)
    expected = torch.nn.init.kaiming_uniform_(torch.empty(256, 30), a=math.sqrt(5))
    assert torch.equal(method.columns, expected)
    assert 0.99 / math.sqrt(30) < float(method.columns.detach().abs().max()) <= 1 / math.sqrt(30)
    assert not method.rows.any()
    assert method.scale == 8 / math.sqrt(30)
    assert DePT(DePT.Config(scale=1), spec, PromptInit(torch.zeros(60, 768))).scale == 1
    assert {name: (g.unit, g.rate) for name, g in method.groups.items()} == {
        "prompt": ("rms", None),
        "matrices": ("one", 5e-4),
    }


@pytest.mark.parametrize(("length", "rank"), [(40, 45), (60, 30)])
def test_budget_is_the_papers(length: int, rank: int) -> None:
    method = DePT(DePT.Config(rank=rank), PromptSpec(length, 768, 768), PromptInit(torch.zeros(length, 768)))
    assert sum(p.numel() for p in method.parameters()) == 76_800 == 100 * 768


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "options of method dept: rank must be a whole number of at least 1, given 0"),
        ({"positions": 2.5}, "positions must be a whole number of at least 1, given 2.5"),
        ({"positions": True}, "positions must be a whole number of at least 1, given True"),
        ({"scale": 0}, "scale must be a number above 0, given 0"),
        ({"scale": "big"}, "scale must be a number above 0, given 'big'"),
        ({"alpha": 1}, "'alpha'"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("dept", options, PromptSpec(P, 6, 6), PromptInit(torch.zeros(P, 6)))


def test_in_a_stock_model_as_in_training(tmp_path: Path) -> None:
    """SoftPromptModel's loss, also of rows of two methods, and what it writes; saved and loaded bit for bit."""
    config = PromptConfig(
        method="dept", num_virtual_tokens=P, init=InitConfig(kind="random"), options={"rank": R, "positions": S}
    )
    model = SoftPromptModel(tiny.model("llama"), config, task="two")
    model.add_task("plain", PromptConfig(num_virtual_tokens=2, init=InitConfig(kind="random")))
    made = tuned("llama")
    model.prompts["two"].load_state_dict(made.prompts["two"].state_dict())
    batch = batch_of("llama", "left")
    given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    with torch.no_grad():
        loss = model(**given, labels=batch.labels).loss
        assert float(loss) == pytest.approx(
            float(objectives.task(training_step(made, replace(batch, task_ids=torch.ones(4).long())))), abs=1e-5
        )
        # Without labels all of a text is given, and all is changed.
        text = rows.texts("llama")[1]
        expected = made.backbone.model(
            inputs_embeds=torch.cat([made.prompts["two"].prompt, changed(made, text, 1, len(text))])[None]
        ).logits[0, P:]
        both = model(**given, tasks=["plain", "two", "plain", "two"]).logits
        torch.testing.assert_close(both[1], expected, atol=1e-5, rtol=1e-5)
        model.save_pretrained(tmp_path)
        again = SoftPromptModel.from_pretrained(tiny.model("llama"), tmp_path)
        assert torch.equal(again(**given, labels=batch.labels, tasks="two").loss, loss)
        assert torch.equal(
            again.generate(**given, tasks="two", max_new_tokens=3), model.generate(**given, max_new_tokens=3)
        )


def test_a_run_and_its_artifact(tmp_path: Path) -> None:
    """Trained, interrupted and continued bit for bit; evaluated rows, which begin alike, are what each is alone."""
    values = local.run_values(tmp_path, max_steps=4, save_steps=1, learning_rates={"matrices": 0.05})
    values["prompt"] |= {"method": "dept", "options": {"rank": R, "positions": 6}}

    def stop(_: str, report: Any) -> None:
        if report.step == 2:
            raise KeyboardInterrupt

    results = run.run(parse(values))
    assert results["summary"]["trainable"] == 4 * 32 + (6 + 32) * R
    cut = parse({**values, "output_dir": str(tmp_path / "cut")})
    with pytest.raises(KeyboardInterrupt):
        run.run(cut, run.ProgressReporter(on_step=stop))
    run.run(cut)
    found, other = (artifact.load(tmp_path / name / "prompt") for name in ("out", "cut"))
    assert found.prompt is None
    assert all(torch.equal(found.state[key], other.state[key]) for key in found.state)
    assert found.state["rows"].abs().max() > 0
    opened = open_prompts([tmp_path / "out" / "prompt"], config=cut.model)[0]
    few = run.prepare(cut).tasks[0].train[:20]
    answers = list(evaluate.answers(opened, few, prompt=opened.task, config=EvaluationConfig()))
    for row, answer in zip(few, answers, strict=True):
        text = opened.example_tokenizer(opened.task).encode(row).input_ids
        for label, ids in opened.example_tokenizer(opened.task).candidates().items():
            whole = torch.tensor([text + ids])
            labels = whole.masked_fill(torch.arange(whole.shape[1]) < len(text), IGNORE)
            batch = Batch(whole, torch.ones_like(whole), torch.tensor([0]), labels)
            with torch.no_grad():
                output = injection.score(
                    opened.backbone, batch, opened.make_prompts(batch), INPUT, path="concatenation"
                )
            chance = output.logits.log_softmax(-1).gather(1, output.labels[:, None]).sum()
            assert answer.scores[label] == pytest.approx(float(chance), abs=2e-5)
