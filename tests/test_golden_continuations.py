"""Golden: continuations scored together are those of the stock model reading each of them alone."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import rows
import tiny
from prompted import prompted
from rows import INPUT, KV, called
from softprompts import backbone as b
from softprompts import injection
from softprompts.errors import BackboneError
from softprompts.injection import continuations
from softprompts.injection.continuations import candidate_tree
from softprompts.methods import build_tasks
from softprompts.model import SoftPromptModel
from softprompts.types import PromptInit

pytestmark = [pytest.mark.golden, pytest.mark.usefixtures("no_gradient")]
CLOSE: dict[str, Any] = {"atol": 2e-5, "rtol": 1e-5}
TEXTS = (5, 9, 1, 7)
USED = [2, 0, 0, 1]
CANDIDATES = [[7], [9], [7, 9], [7, 9, 11], [7, 10, 12, 13], [20, 21], [20, 22, 30], [7, 9]]


@pytest.fixture(name="no_gradient")
def _no_gradient() -> Any:
    with torch.no_grad():
        yield


def prompts(name: str, site: injection.Site) -> list[Tensor]:
    """Three prompts of 3, 8 and 5 tokens."""
    width = injection.prompt_width(tiny.backbone(name), site)
    return [rows.random(i, n, width) for i, n in enumerate((3, 8, 5))]


def alone(bb: b.Backbone, site: injection.Site, values: Tensor, text: Tensor, candidate: list[int]) -> float:
    """What the stock model alone says about one candidate behind one text."""
    logits = rows.by_hand(bb, site, values, torch.cat([text, torch.tensor(candidate)]))[-len(candidate) :]
    return float(logits.log_softmax(-1).double().gather(1, torch.tensor(candidate)[:, None]).sum())


def expected(
    bb: b.Backbone, site: injection.Site, values: list[Tensor], texts: list[Tensor], used: list[int]
) -> Tensor:
    found = [[alone(bb, site, values[u], t, c) for c in CANDIDATES] for t, u in zip(texts, used, strict=True)]
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize(("name", "site"), rows.cases(tiny.CAUSAL), ids=called)
def test_continuations(name: str, site: injection.Site) -> None:
    """Every path, either padding side, prompts read before or not, several prompts; windows shorter than the text."""
    bb, values, texts = tiny.backbone(name), prompts(name, site), rows.texts(name, TEXTS)
    wanted = expected(bb, site, values, texts, USED)
    prompt = rows.several(values, USED)
    prefix = injection.compute_prefix(bb, prompt, site)
    assert prefix is not None
    assert prefix.path == ("shared" if name in rows.UNPACKED else "packed")
    for path in (None, *rows.paths(name, site)):
        for side, extra in (("right", 0), ("left", 2)):
            batch = rows.batch(name, texts, side, extra)
            found = injection.score_continuations(bb, batch, prompt, site, CANDIDATES, path=path)
            assert found.dtype == torch.float64
            torch.testing.assert_close(found, wanted, **CLOSE)
    for _ in range(2):  # what was read before is as it was
        found = injection.score_continuations(
            bb, rows.batch(name, texts, "left"), prompt, site, CANDIDATES, prefix=prefix
        )
        torch.testing.assert_close(found, wanted, **CLOSE)
    output = injection.score(bb, rows.batch(name, texts), prompt, site, prefix=prefix)
    assert output.path == prefix.path
    plain = injection.score(bb, rows.batch(name, texts), prompt, site)
    for i in range(len(texts)):
        torch.testing.assert_close(rows.of_row(output, i), rows.of_row(plain, i), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gptj", "bloom"])
def test_a_row_does_not_know_its_neighbors(name: str) -> None:
    bb, values, texts = tiny.backbone(name), prompts(name, INPUT), rows.texts(name, TEXTS)
    together = injection.score_continuations(bb, rows.batch(name, texts), rows.several(values, USED), INPUT, CANDIDATES)
    for i, text in enumerate(texts):
        one = rows.single(values[USED[i]])
        for c, candidate in enumerate(CANDIDATES):
            own = injection.score_continuations(bb, rows.batch(name, [text]), one, INPUT, [candidate])
            torch.testing.assert_close(own[0, 0], together[i, c], **CLOSE)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "opt", "gptj", "bloom"])
def test_without_a_prompt(name: str) -> None:
    """The stock model's own texts are packed too."""
    bb, texts = tiny.backbone(name), rows.texts(name, TEXTS)
    found = injection.score_continuations(bb, rows.batch(name, texts, "left"), None, INPUT, CANDIDATES)
    for i, text in enumerate(texts):
        for c, candidate in enumerate(CANDIDATES):
            logits = bb.model(input_ids=torch.cat([text, torch.tensor(candidate)])[None]).logits[0, len(text) - 1 : -1]
            own = logits.log_softmax(-1).double().gather(1, torch.tensor(candidate)[:, None]).sum()
            torch.testing.assert_close(found[i, c], own, **CLOSE)
    read: list[int] = []
    handle = bb.layers[0].register_forward_hook(lambda module, args, output: read.append(output[0].numel()))
    injection.score_continuations(bb, rows.batch(name, texts, "left"), None, INPUT, CANDIDATES)
    handle.remove()
    assert len(read) == (1 if name not in rows.UNPACKED else 1 + sum(len(c) > 1 for c in CANDIDATES))


@pytest.mark.parametrize("name", ["llama", "mistral", "gptj", "bloom"])
@pytest.mark.parametrize("candidates", [CANDIDATES, [[7], [9]]])
def test_empty_texts(name: str, candidates: list[list[int]]) -> None:
    """Behind a prompt they are texts like others; at site kv nothing scores a candidate's first token."""
    bb, none = tiny.backbone(name), torch.zeros(0, dtype=torch.long)
    for texts in ([none, rows.ids(3, 4)], [none, none]):
        batch = rows.batch(name, texts)
        values = prompts(name, INPUT)
        for prefix in (None, injection.compute_prefix(bb, rows.several(values, [1, 2]), INPUT)):
            found = injection.score_continuations(
                bb, batch, rows.several(values, [1, 2]), INPUT, candidates, prefix=prefix
            )
            for i, text in enumerate(texts):
                own = [alone(bb, INPUT, values[i + 1], text, c) for c in candidates]
                torch.testing.assert_close(found[i], torch.tensor(own, dtype=torch.float64), **CLOSE)
        values = prompts(name, KV)
        found = injection.score_continuations(bb, batch, rows.several(values, [1, 2]), KV, candidates)
        for c, candidate in enumerate(candidates):
            own = 0.0
            if len(candidate) > 1:
                own = alone(bb, KV, values[1], torch.tensor(candidate[:1]), candidate[1:])
            assert float(found[0, c]) == pytest.approx(own, abs=2e-5)
        assert not bool(injection.score_continuations(bb, rows.batch(name, [none]), None, INPUT, [[7], [9]]).any())


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_given_positions_and_embeddings(name: str) -> None:
    """Positions with a gap go on behind the text's last one, whichever way the candidates are read."""
    bb, texts = tiny.backbone(name), rows.texts(name, TEXTS)
    batch, prompt = rows.batch(name, texts, "left", 1), rows.several(prompts(name, INPUT), USED)
    batch = replace(
        batch,
        position_ids=(batch.attention_mask.cumsum(1) - 1).clamp(min=0) * 2,
        inputs_embeds=bb.embed(batch.input_ids),
    )
    found = [
        injection.score_continuations(
            bb, replace(batch, input_ids=batch.input_ids * 0), prompt, INPUT, CANDIDATES, path=path
        )
        for path in ("packed", "shared")
    ]
    torch.testing.assert_close(found[0], found[1], **CLOSE)
    plain = injection.score_continuations(bb, replace(batch, position_ids=None), prompt, INPUT, CANDIDATES)
    assert not torch.allclose(found[0], plain, atol=1e-3)
    candidate = torch.tensor(CANDIDATES[4])
    row = torch.cat([texts[1], candidate])
    own = torch.cat([torch.arange(9) * 2, 17 + torch.arange(len(candidate))])  # the ninth stands at 16
    one = replace(rows.batch(name, [row]), position_ids=own[None])
    one = replace(one, labels=one.labels.index_fill(1, torch.arange(9), -100))
    output = injection.score(bb, one, rows.single(prompts(name, INPUT)[USED[1]]), INPUT, path="concatenation")
    chances = output.logits.log_softmax(-1).double().gather(1, candidate[:, None])
    torch.testing.assert_close(found[0][1, 4], chances.sum(), **CLOSE)


def headed_model(name: str, site: injection.Site, head: str = "lm") -> SoftPromptModel:
    """A model with two tasks of different prompts."""
    bb = tiny.backbone(name, head)
    spec = injection.prompt_spec(bb, site, 5)
    methods = build_tasks("prompt-tuning", {}, spec, PromptInit(rows.random(0, 5, spec.width)), ("a", "b"))
    methods["b"].prompt.add_(rows.random(1, 5, spec.width))
    return prompted(bb, site, methods)


@pytest.mark.parametrize("name", tiny.CAUSAL)
def test_what_all_texts_begin_with_is_read_with_the_prompts(name: str) -> None:
    """The common tokens, read once behind the prompts: nothing changes, also where nothing more is left of a row."""
    model, common = headed_model(name, INPUT), rows.ids(50, 4)
    texts = [torch.cat([common, text]) for text in (*rows.texts(name, TEXTS), rows.ids(1, 0))]
    tasks = torch.tensor([1, 0, 0, 1, 1])
    whole = replace(rows.batch(name, texts), task_ids=tasks)
    rest = replace(rows.batch(name, [text[4:] for text in texts]), task_ids=tasks)
    bb, cache = model.backbone, model.prefix_cache(["a", "b"])
    assert cache.reads_leading
    plain = injection.score_continuations(bb, whole, model.make_prompts(whole), INPUT, CANDIDATES)
    for _ in range(2):
        prompt, prefix = cache.prompts(rest, tuple(common.tolist()))
        assert prefix is not None
        found = injection.score_continuations(bb, rest, prompt, INPUT, CANDIDATES, prefix=prefix)
        torch.testing.assert_close(found, plain, **CLOSE)
        prompt, prefix = cache.prompts(whole)
        found = injection.score_continuations(bb, whole, prompt, INPUT, CANDIDATES, prefix=prefix)
        torch.testing.assert_close(found, plain, **CLOSE)


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "gemma3", "gptj", "bloom"])
def test_sequence_heads_with_prompts_that_were_read_before(name: str) -> None:
    for site in rows.sites(name):
        model, texts = headed_model(name, site, "sequence"), rows.texts(name, TEXTS)
        whole = replace(rows.batch(name, texts), task_ids=torch.tensor([1, 0, 0, 1]), labels=None)
        cache = model.prefix_cache(["a", "b"])
        plain = model.score(whole).logits
        torch.testing.assert_close(cache.score(whole).logits, plain, atol=1e-5, rtol=1e-5)
        assert cache.reads_leading == (site == INPUT)
        one = model.prefix_cache(["b"])
        batch = whole.rows(torch.tensor([0, 3]))
        torch.testing.assert_close(one.score(batch).logits, plain[[0, 3]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_encoders_read_their_prompts_with_the_text(name: str) -> None:
    model = headed_model(name, INPUT)
    cache, batch = model.prefix_cache(["a", "b"]), rows.batch(name, rows.texts(name, TEXTS))
    prompt, prefix = cache.prompts(batch)
    assert prefix is None
    assert not cache.reads_leading
    torch.testing.assert_close(model.score(batch, prompts=prompt).logits, cache.score(batch).logits)
    assert injection.compute_prefix(model.backbone, prompt, INPUT) is None


def test_half_precision() -> None:
    """In bfloat16 the error is at most twice the stock model's own."""
    exact, coarse = tiny.backbone("llama"), b.wrap(tiny.model("llama").bfloat16(), name="llama")
    texts, words = rows.texts("llama", TEXTS), rows.ids(7, 6)
    own, true = (
        torch.tensor(
            [
                [
                    float(
                        bb.model(input_ids=torch.cat([words, t, torch.tensor(c)])[None])
                        .logits[0, len(words) + len(t) - 1 : -1]
                        .float()
                        .log_softmax(-1)
                        .gather(1, torch.tensor(c)[:, None])
                        .sum()
                    )
                    for c in CANDIDATES
                ]
                for t in texts
            ]
        )
        for bb in (coarse, exact)
    )
    prompt = rows.single(coarse.embed(words).float(), len(texts))
    for path in rows.paths("llama", INPUT):
        found = injection.score_continuations(coarse, rows.batch("llama", texts), prompt, INPUT, CANDIDATES, path=path)
        assert (found.float() - true).norm() < 2 * (own - true).norm()


def test_large_vocabularies_are_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    bb, texts = tiny.backbone("llama"), rows.texts("llama", TEXTS)
    prompt = rows.several(prompts("llama", INPUT), USED)
    whole = injection.score_continuations(bb, rows.batch("llama", texts), prompt, INPUT, CANDIDATES)
    sizes = []
    original = continuations.apply_head

    def head(backbone: b.Backbone, reading: Any, states: Tensor) -> Tensor:
        sizes.append(states.shape[1])
        return original(backbone, reading, states)

    monkeypatch.setattr(continuations, "apply_head", head)
    monkeypatch.setattr(continuations, "MAX_LOGITS", 3 * bb.vocab_size)
    parts = injection.score_continuations(bb, rows.batch("llama", texts), prompt, INPUT, CANDIDATES)
    assert max(sizes) == 3
    torch.testing.assert_close(parts, whole, **CLOSE)


def test_work_is_that_of_the_text_and_distinct_beginnings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates of one token add nothing, common beginnings are read once, read prompts are not read again."""
    bb, texts = tiny.backbone("llama"), rows.texts("llama", TEXTS)
    prompt = rows.several(prompts("llama", INPUT), USED)
    prefix = injection.compute_prefix(bb, prompt, INPUT)
    read: list[int] = []
    handle = bb.layers[0].register_forward_hook(lambda module, args, output: read.append(args[0].shape[1]))
    try:
        for candidates in ([[7], [9]], CANDIDATES):
            injection.score_continuations(bb, rows.batch("llama", texts), prompt, INPUT, candidates, prefix=prefix)
        injection.score_continuations(bb, rows.batch("llama", texts), prompt, INPUT, [[7], [9]])
    finally:
        handle.remove()
    # Chains 7 9, 7 10 12, 20 22 and, as no other goes on from it, none for 20 alone.
    assert read == [sum(TEXTS), sum(TEXTS) + len(TEXTS) * 7, sum(TEXTS) + 16]
    assert candidate_tree(CANDIDATES).token_ids.tolist() == [7, 9, 7, 10, 12, 20, 22]


def test_refusals() -> None:
    bb, batch = tiny.backbone("llama"), rows.batch("llama", rows.texts("llama", (4,)))
    prompt = rows.single(rows.random(0, 3, 32))
    for wrong in ([], [[]], [[7], []]):
        with pytest.raises(ValueError, match="candidates must be lists of at least one token"):
            injection.score_continuations(bb, batch, prompt, INPUT, wrong)
    with pytest.raises(BackboneError, match="continuations need a causal language model, not head 'lm' of a seq2seq"):
        injection.score_continuations(tiny.backbone("t5"), batch, prompt, INPUT, [[7]])
    long = rows.batch("gpt2", rows.texts("gpt2", (58,)))
    values = rows.single(rows.random(0, 3, 32))
    fits = [[7, 8, 9], [10, 11, 12, 13], [14, 15, 16, 17]]  # beside each other: 3 + 58 + 3 positions of 64
    assert injection.score_continuations(tiny.backbone("gpt2"), long, values, INPUT, fits).isfinite().all()
    with pytest.raises(BackboneError, match="prompt and text need 65 positions"):
        injection.score_continuations(tiny.backbone("gpt2"), long, values, INPUT, [*fits, [1, 2, 3, 4, 5]])
