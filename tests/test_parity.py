"""The comparison of the fast path with plain concatenation: it holds where it should, and fails where it should."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import rows
import tiny
from closeness import tolerance
from prompted import prompted
from rows import INPUT, KV
from softprompts import backbone as b
from softprompts import injection
from softprompts.backbone.kernels import Kernels
from softprompts.injection import packed_attention
from softprompts.methods import build
from softprompts.model import SoftPromptModel
from softprompts.training import equivalence, objectives
from softprompts.types import PromptInit


def tuned(name: str, site: injection.Site = INPUT, kernels: Kernels | None = None) -> SoftPromptModel:
    """Prompt tuning with three tokens on a tiny model."""
    bb = tiny.backbone(name) if kernels is None else replace(tiny.backbone(name), kernels=kernels)
    spec = injection.prompt_spec(bb, site, 3)
    return prompted(bb, site, build("prompt-tuning", {}, spec, PromptInit(rows.random(0, 3, spec.width))))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "t5", "bert"])
def test_it_holds(name: str) -> None:
    objective = objectives.weigh({"task": 1.0})
    for site in (INPUT, KV) if name in tiny.CAUSAL else (INPUT,):
        one = tuned(name, site)
        before = torch.get_rng_state()
        found = equivalence.compare(one, rows.batch(name, rows.texts(name)), objective)
        assert found.holds
        assert found.loss < tolerance(1.0)
        assert found.gradient < tolerance(1.0, roundings=256)
        assert torch.get_rng_state().equal(before)
        assert all(p.grad is None for p in one.trainable().values())
    assert found.path.startswith(
        "concatenation" if name in ("t5", "bert") else "shared" if name == "bloom" else "packed"
    )


def test_half_precision_measures_its_own_rounding() -> None:
    """Two plain ways differ by rounding too, and that widens what is allowed; in float32 one plain way is enough."""
    coarse = b.wrap(tiny.model("llama").bfloat16(), name="llama")
    one = tuned("llama")
    half, objective = prompted(coarse, INPUT, one.prompts["a"]), objectives.weigh({"task": 1.0})
    batch = rows.batch("llama", rows.texts("llama"))
    found = equivalence.compare(half, batch, objective)
    assert found.holds
    assert 0 < found.noise[1] < 0.2
    assert equivalence.compare(one, batch, objective).noise == (0.0, 0.0)
    wide = replace(found, gradient=0.5, noise=(0.0, 0.26))
    assert wide.allowed == (2e-2, 0.52)
    assert wide.holds
    assert not replace(wide, gradient=0.53).holds
    assert not replace(found, gradient=0.5).holds


def test_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong mask shows in the figures; so does a gradient that is wrong while the loss is right."""
    one, objective = tuned("llama"), objectives.weigh({"task": 1.0})
    batch = rows.batch("llama", rows.texts("llama"))
    injection.why_not_packed(one.backbone)
    honest = packed_attention._math_attention

    def wrong(part: packed_attention.AttentionPart, *rest: Any) -> Tensor:
        return honest(replace(part, values=part.values * 1.01), *rest)

    def cut(part: packed_attention.AttentionPart, *rest: Any) -> Tensor:
        return honest(replace(part, keys=part.keys.detach()), *rest)

    for core, loss_moves in ((wrong, True), (cut, False)):
        monkeypatch.setitem(
            packed_attention.ALL_ATTENTION_FUNCTIONS,
            packed_attention.ATTENTION_NAMES["math"],
            packed_attention._attention_function(core),
        )
        found = equivalence.compare(one, batch, objective)
        assert not found.holds
        assert (found.loss > 1e-5) == loss_moves
        assert found.gradient > 2e-3
        assert str(found).startswith("packed against concatenation: asked for: loss differs by ")
        assert str(found).endswith("(allowed in float32: 1e-05, 1e-03)")
