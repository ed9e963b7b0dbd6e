"""Golden: a prompt computed once gives what the plain concatenation gives: scores, loss, gradient."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import rows
import tiny
from rows import INPUT, KV, called
from softprompts import backbone as b
from softprompts import injection
from softprompts.backbone.cache import cache_argument
from softprompts.backbone.kernels import Kernels
from softprompts.errors import BackboneError
from softprompts.training import objectives
from softprompts.types import Batch, Output, Prompt, Step

pytestmark = pytest.mark.golden
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
USED = [2, 0, 0, 1, 2, 0]
TEXTS = (5, 9, 1, 7, 3, 4)


def loss(bb: b.Backbone, batch: Batch, prompt: Prompt, site: injection.Site, path: str | None) -> tuple[Tensor, Output]:
    """The task loss, as training sees it."""
    output = injection.score(bb, batch, prompt, site, path=path)
    return objectives.task(Step(batch, prompt, output)), output


def apart(one: Tensor, other: Tensor) -> float:
    """Distance relative to the second."""
    return float((one - other).norm() / other.norm())


def three(name: str, site: injection.Site, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Three prompts of 3, 8 and 5 tokens that want gradients."""
    width = injection.prompt_width(tiny.backbone(name), site)
    return [rows.random(i, n, width).to(dtype).requires_grad_() for i, n in enumerate((3, 8, 5))]


@pytest.mark.parametrize(("name", "site"), rows.cases(tiny.CAUSAL, ("input", "layers")), ids=called)
def test_shared(name: str, site: injection.Site) -> None:
    bb = tiny.backbone(name)
    found = []
    sides = {"concatenation": ("right", 0), "shared": ("right", 0), "packed": ("left", 2)}
    for path in reversed(rows.paths(name, site)):
        side, extra = sides[path]
        values = three(name, site)
        batch = rows.batch(name, rows.texts(name, TEXTS), side, extra)
        value, output = loss(bb, batch, rows.several(values, USED), site, path)
        assert output.path == ("concatenation: asked for" if path == "concatenation" else path)
        found.append((output, value.detach(), torch.autograd.grad(value, values), output.last_state))
    (plain, value, gradients, last), *others = found
    for output, same, grads, end in others:
        for i in range(len(TEXTS)):
            torch.testing.assert_close(rows.of_row(output, i), rows.of_row(plain, i), **CLOSE)
        torch.testing.assert_close(same, value, atol=1e-5, rtol=0)
        torch.testing.assert_close(end, last, **CLOSE)
        for one, other in zip(grads, gradients, strict=True):
            assert apart(one, other) < 1e-4


@pytest.mark.parametrize("name", tiny.CAUSAL)
def test_prompt_of_each_row(name: str) -> None:
    """With as many prompts as rows the cache saves nothing; the result is the same on every path."""
    bb = tiny.backbone(name)
    found = []
    for path in (None, "shared"):
        values = three(name, INPUT)
        prompt = rows.several(values, [1, 2, 0])
        value, output = loss(bb, rows.batch(name, rows.texts(name, TEXTS[:3])), prompt, INPUT, path)
        best = "packed" if name not in rows.UNPACKED else "concatenation: every row has its own prompt"
        assert output.path == (path or best)
        found.append((output.logits, torch.autograd.grad(value, values)))
    torch.testing.assert_close(found[1][0], found[0][0], **CLOSE)
    for one, other in zip(found[1][1], found[0][1], strict=True):
        assert apart(one, other) < 1e-4


@pytest.mark.parametrize(
    ("name", "site"),
    [case for case in rows.cases(("gpt2", "gpt_neox", "bart", "bert")) if case != ("bart", KV)],
    ids=called,
)
def test_finite_differences(name: str, site: injection.Site) -> None:
    """A second opinion on the gradient, in float64: the slope along random directions, for each prompt.

    Families that compute their norms in float32 whatever the dtype (Llama, T5) cannot be measured like this.
    """
    bb = b.wrap(tiny.model(name).double(), name=name)
    values = three(name, site, torch.float64)
    batch = rows.batch(name, rows.texts(name, TEXTS), "left", 1)

    def exact(prompts: list[Tensor]) -> Tensor:
        output = injection.score(bb, batch, rows.several(prompts, USED), site)
        assert output.logits.dtype == torch.float64
        return torch.nn.functional.cross_entropy(output.logits, output.labels)

    gradients = torch.autograd.grad(exact(values), values)
    step = 1e-6
    for i, gradient in enumerate(gradients):
        direction = rows.random(50 + i, *gradient.shape).double()

        def at(offset: float, i: int = i, direction: Tensor = direction) -> Tensor:
            moved = [v.detach() + offset * direction if j == i else v.detach() for j, v in enumerate(values)]
            with torch.no_grad():
                return exact(moved)

        slope = (at(step) - at(-step)) / (2 * step)
        assert float(slope) == pytest.approx(float((gradient * direction).sum()), rel=1e-5, abs=1e-8)


def test_reasons() -> None:
    """The path says why a prompt is not shared."""
    values = rows.random(0, 3, 32)
    batch = rows.batch("llama", rows.texts("llama", (4, 5)))
    after = Batch(
        batch.input_ids, batch.attention_mask, batch.task_ids, batch.labels, prompt_offsets=torch.tensor([0, 1])
    )
    for name, given, prompt, reason in (
        ("llama", batch, None, "no prompt"),
        ("llama", after, rows.single(values, 2), "text comes before the prompt"),
        ("bert", batch, rows.single(values, 2), "an encoder's prompt sees the text"),
        ("t5", batch, rows.single(values, 2), "an encoder's prompt sees the text"),
    ):
        output = injection.score(tiny.backbone(name), given, prompt, INPUT)
        assert output.path == f"concatenation: {reason}"
        for path in ("packed", "shared"):
            with pytest.raises(BackboneError, match=f"path '{path}' is not possible: {reason}; leave the path out"):
                injection.score(tiny.backbone(name), given, prompt, INPUT, path=path)
    prompt = rows.single(values, 2)
    with pytest.raises(BackboneError, match="path 'concatenation' is not possible: keys and values are not tokens"):
        injection.score(
            tiny.backbone("llama"), batch, rows.single(rows.random(0, 3, 96), 2), rows.KV, path="concatenation"
        )
    with pytest.raises(BackboneError, match="path 'pack' is unknown; possible: packed, shared, concatenation"):
        injection.score(tiny.backbone("llama"), batch, prompt, INPUT, path="pack")
    with pytest.raises(
        BackboneError, match="path 'packed' is not possible: BloomForCausalLM uses another kind of attention"
    ):
        injection.score(tiny.backbone("bloom"), batch, prompt, INPUT, path="packed")
    shared = replace(tiny.backbone("llama"), kernels=Kernels(path="shared"))
    assert injection.score(shared, batch, prompt, INPUT).path == "shared"


@torch.no_grad()
@pytest.mark.parametrize(("name", "site"), rows.cases(tiny.CAUSAL), ids=called)
def test_prefill_once_decode_often(name: str, site: injection.Site) -> None:
    """The cache behind the text goes on as the concatenation does: one more token, either path."""
    bb = tiny.backbone(name)
    text, token = rows.texts(name, (6,))[0], rows.ids(9, 1)
    values = rows.random(0, 4, injection.prompt_width(bb, site))
    output = injection.score(bb, rows.batch(name, [text]), rows.single(values), site, path="shared")
    again = bb.model(input_ids=token[None], **cache_argument(bb.model, output.cache)).logits[0, -1]
    expected = injection.score(bb, rows.batch(name, [torch.cat([text, token, token])]), rows.single(values), site)
    torch.testing.assert_close(again, expected.logits[-1], **CLOSE)
    if site == KV:
        assert injection.prefill(bb, rows.single(values), site)[1] is None


def test_half_precision() -> None:
    """In bfloat16 the error is at most twice the stock model's own, and gradients come back in float32."""
    exact, coarse = tiny.backbone("llama"), b.wrap(tiny.model("llama").bfloat16(), name="llama")
    text, words = rows.texts("llama", (9,)), rows.ids(7, 6)
    with torch.no_grad():
        own = coarse.model(input_ids=torch.cat([words, text[0]])[None]).logits[0, 5:-1].float()
        true = exact.model(input_ids=torch.cat([words, text[0]])[None]).logits[0, 5:-1]
    for site in rows.sites("llama"):
        values = rows.random(0, 6, injection.prompt_width(coarse, site)).requires_grad_()
        value, _ = loss(coarse, rows.batch("llama", text), rows.single(values), site, None)
        value.backward()
        assert values.grad.dtype == torch.float32
    prompt = rows.single(coarse.embed(words).float())
    for path in rows.paths("llama", INPUT):
        ours = injection.score(coarse, rows.batch("llama", text), prompt, INPUT, path=path).logits.float()
        assert (ours - true).norm() < 2 * (own - true).norm()
