"""Golden: whatever the frozen model is run with, loss and gradient are the same, and the model is as before."""

import contextvars
import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import rows
import tiny
from rows import INPUT, KV, called
from softprompts import backbone as b
from softprompts import injection
from softprompts.backbone import kernels
from softprompts.backbone.kernels import Kernels
from softprompts.errors import BackboneError
from softprompts.injection import packed_attention, scoring
from softprompts.types import IGNORE, Batch, Output

pytestmark = pytest.mark.golden
LENGTHS = (9, 7, 12, 3, 10, 8, 9, 5, 6, 11)  # 80 tokens: enough for oneDNN's product
USED = [2, 0, 0, 1, 2, 0, 1, 1, 0, 2]
MANY = {
    "onednn": Kernels(matmul_backend="onednn"),
    "fused": Kernels(packed_attention="fused"),
    "fused parts": Kernels(),
    "fused parts, cache": Kernels(path="shared"),
    "whole last layer": Kernels(trim_last_layer=False),
    "again": Kernels(gradient_checkpointing=True),
    "again, onednn": Kernels(gradient_checkpointing=True, matmul_backend="onednn"),
    "again, cache": Kernels(path="shared", gradient_checkpointing=True),
    "again, cache, other attention": Kernels(path="shared", gradient_checkpointing=True, attn_implementation="eager"),
}


def step(bb: b.Backbone, name: str, site: injection.Site, **options: Any) -> tuple[Output, list[Tensor]]:
    """Output and prompt gradients of one batch with one label a row."""
    width = injection.prompt_width(bb, site)
    values = [rows.random(i, 5, width).requires_grad_() for i in range(3)]
    batch = one_label(rows.batch(name, rows.texts(name, LENGTHS), "left", 2))
    output = injection.score(bb, batch, rows.several(values, USED), site, **options)
    loss = torch.nn.functional.cross_entropy(output.logits, output.labels)
    return output, list(torch.autograd.grad(loss, values))


def one_label(batch: Batch) -> Batch:
    """The batch with its last label a row only."""
    columns = torch.arange(batch.labels.shape[1]).expand_as(batch.labels)
    last = columns.where(batch.labels != IGNORE, -1).amax(1, keepdim=True)
    return replace(batch, labels=batch.labels.masked_fill(columns != last, IGNORE))


@pytest.mark.parametrize("kind", MANY)
@pytest.mark.parametrize(("name", "site"), rows.cases(tiny.ALL), ids=called)
def test_kernels(name: str, site: injection.Site, kind: str) -> None:
    plain, changed = tiny.backbone(name), replace(tiny.backbone(name), kernels=MANY[kind])
    if MANY[kind].gradient_checkpointing and (name == "albert" or (name in tiny.SEQ2SEQ and site == KV)):
        with pytest.raises(BackboneError, match=r"(Albert|T5|Bart).*gradient checkpointing"):
            step(changed, name, site)
        return
    if kind == "fused" and name == "gemma2":  # it caps its scores
        with pytest.raises(packed_attention.Unpackable, match="caps scores"):
            step(changed, name, site)
        return
    path = rows.paths(name, site)[-1] if name in tiny.CAUSAL else None
    stock = replace(plain, kernels=Kernels(path="shared", fuse_elementwise=False))
    expected, gradients = step(stock, name, site, path=path)
    before = state(plain)
    output, found = step(changed, name, site)
    assert state(plain) == before
    torch.testing.assert_close(output.logits, expected.logits, atol=1e-5, rtol=1e-5)
    for one, other in zip(found, gradients, strict=True):
        assert (one - other).norm() < 1e-4 * other.norm()


def state(bb: b.Backbone) -> list[Any]:
    """Module identities, their instance attributes, and the attention in use."""
    modules = [(name, id(m), sorted(m.__dict__), len(m._forward_pre_hooks)) for name, m in bb.model.named_modules()]
    return [modules, bb.model.config._attn_implementation, bb.model.training]


def test_the_model_is_as_before_after_an_error() -> None:
    bb = replace(tiny.backbone("llama"), kernels=Kernels(matmul_backend="onednn", gradient_checkpointing=True))
    before = state(bb)

    def broken(*_: Any) -> Tensor:
        raise RuntimeError("broken")

    handle = bb.layers[1].mlp.act_fn.register_forward_hook(broken)
    with pytest.raises(RuntimeError, match="broken"):
        step(bb, "llama", INPUT)
    handle.remove()
    assert state(bb) == before


FUSED = {
    "llama": (7, 1),
    "qwen3": (13, 1),
    "gemma2": (13, 1),
    "gemma3": (19, 1),
    "phi": (0, 1),
    "gpt2": (0, 0),
    "t5": (12, 0),
}
"""RMS norms (of every layer, and the last one) and modules with a rotation by halves."""


@pytest.mark.parametrize("name", FUSED)
def test_norms_and_rotations_of_frozen_models_are_fused(name: str) -> None:
    parts = kernels.FusedParts.of(tiny.backbone(name).model)
    assert (len(parts.norms), len(parts.rotary_modules)) == FUSED[name]


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_fused_norm_has_the_stock_norm_s_values_and_gradient(name: str) -> None:
    parts = kernels.FusedParts.of(tiny.backbone(name).model)
    assert parts.norms
    for norm, fused in parts.norms.items():
        x = (3 * rows.random(1, 6, norm.weight.shape[0])).requires_grad_()
        upstream = rows.random(2, 6, norm.weight.shape[0])
        (gradient,) = torch.autograd.grad(fused(x), x, upstream)
        (stock_gradient,) = torch.autograd.grad(norm(x), x, upstream)
        torch.testing.assert_close(fused(x), norm(x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(gradient, stock_gradient, atol=1e-5, rtol=1e-5)


def norm_and_rotation_inputs() -> tuple[Tensor, Tensor, Tensor]:
    """States [3, 8] that need a gradient, a scale [8] and angles [3, 8], in float64."""
    states = rows.random(1, 3, 8).double().requires_grad_()
    return states, rows.random(2, 1, 8)[0].double(), rows.random(3, 3, 8).double()


def test_gradients_of_fused_parts_agree_with_finite_differences() -> None:
    x, scale, angles = norm_and_rotation_inputs()
    assert torch.autograd.gradcheck(lambda x: kernels._RMSNorm.apply(x, scale, 1e-3)[0], x)
    assert torch.autograd.gradcheck(lambda x: kernels._Rotation.apply(x, angles.cos(), angles.sin()), x)
    # Cosines and sines of pairs need not be equal: models with scaled angles multiply them.
    assert torch.autograd.gradcheck(lambda x: kernels._Rotation.apply(x, angles, angles.flip(0)), x)


def test_gradients_of_fused_parts_can_be_differentiated() -> None:
    x, scale, angles = norm_and_rotation_inputs()
    assert torch.autograd.gradgradcheck(lambda x: kernels._RMSNorm.apply(x, scale, 1e-3)[0], x)
    assert torch.autograd.gradgradcheck(lambda x: kernels._Rotation.apply(x, angles.cos(), angles.sin()), x)
    gradient = torch.func.grad(lambda x: kernels._RMSNorm.apply(x, scale, 1e-3)[0].square().sum())(x.detach())
    (expected,) = torch.autograd.grad(kernels._RMSNorm.apply(x, scale, 1e-3)[0].square().sum(), x)
    torch.testing.assert_close(gradient, expected)


def test_rotations_of_overlapping_contexts_are_put_back() -> None:
    """As in two threads: the context that was entered first is left first."""
    from transformers.models.llama import modeling_llama

    stock = modeling_llama.apply_rotary_pos_emb
    name = modeling_llama.__name__
    for _ in range(3):
        first, second = kernels._replace_rotations([name]), kernels._replace_rotations([name])
        threads = [contextvars.copy_context(), contextvars.copy_context()]
        threads[0].run(first.__enter__)
        threads[1].run(second.__enter__)
        assert modeling_llama.apply_rotary_pos_emb.args == (stock,)
        threads[0].run(first.__exit__, None, None, None)
        assert modeling_llama.apply_rotary_pos_emb is not stock
        threads[1].run(second.__exit__, None, None, None)
        assert modeling_llama.apply_rotary_pos_emb is stock


def test_other_threads_rotate_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    fused = []
    monkeypatch.setattr(kernels, "_rotate", lambda *arguments: fused.append(1) or arguments[1:3])
    states = torch.zeros(1, 2, 3, 8)
    angles = torch.zeros(1, 3, 8)
    with kernels._replace_rotations([modeling_llama.__name__]):
        contextvars.Context().run(modeling_llama.apply_rotary_pos_emb, states, states, angles, angles)
        assert fused == []
        modeling_llama.apply_rotary_pos_emb(states, states, angles, angles)
        assert fused == [1]


def test_a_trained_norm_is_the_stock_norm() -> None:
    model = b.wrap(tiny.model("llama")).model
    parts = kernels.FusedParts.of(model)
    norm, fused = next(iter(parts.norms.items()))
    norm.weight.requires_grad_(True)
    x = rows.random(1, 6, 32)
    fused(x).square().sum().backward()
    assert norm.weight.grad is not None
    assert norm.weight.grad.abs().sum() > 0
    assert norm not in kernels.FusedParts.of(model).norms
    norm.to(torch.float64)
    assert fused(x.double()).dtype == torch.float64


class GatedNorm(torch.nn.Module):
    """An RMS norm that may take a gate too, as in Mamba 2 and Qwen3-Next."""

    def __init__(self, needs_gate: bool) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(8), requires_grad=False)
        self.variance_epsilon = 1e-6
        self.needs_gate = needs_gate

    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        if self.needs_gate and gate is None:
            raise TypeError("gate is missing")
        return torch.nn.functional.rms_norm(hidden_states, (8,), self.weight, self.variance_epsilon)


class StrictNorm(GatedNorm):
    """A norm whose forward refuses the states of the trial."""

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        raise KeyError(hidden_states.shape)


@pytest.mark.parametrize("norm", [GatedNorm(True), GatedNorm(False), StrictNorm(False)])
def test_norms_that_take_more_than_states_keep_their_forward(norm: torch.nn.Module) -> None:
    assert kernels.FusedParts.of(norm).norms == {}


def test_a_copied_model_has_fused_parts_with_its_weights() -> None:
    parts = kernels.FusedParts.of(tiny.backbone("llama").model)
    model, copied = copy.deepcopy((tiny.backbone("llama").model, parts))
    norm, fused = next(iter(copied.norms.items()))
    assert norm is next(module for module in model.modules() if module in copied.norms)
    norm.weight.data.mul_(2)
    x = rows.random(1, 6, 32)
    assert torch.equal(fused(x), 2 * next(iter(parts.norms.values()))(x))


def test_parts_of_other_types_are_not_fused() -> None:
    model = b.wrap(tiny.model("llama")).model
    for dtype in (torch.float64, torch.bfloat16):
        assert not kernels.FusedParts.of(model.to(dtype)).norms
    assert kernels.FusedParts.of(model.to(torch.float32)).norms


@pytest.mark.parametrize("shape", [(1, 2, 3, 8), (1, 2, 3, 12)])
def test_rotations_that_differ_stay_with_the_model(shape: tuple[int, ...]) -> None:
    """Angles for a part of each head, and another type, are rotated by the model's own function."""
    calls = []

    def stock(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        calls.append(unsqueeze_dim)
        return q, k

    q = torch.zeros(shape)
    cos = torch.ones(1, 3, 8)
    kernels._rotate(stock, q, q, cos, cos, unsqueeze_dim=1)
    assert calls == ([1] if shape[-1] != 8 else [])
    kernels._rotate(stock, q.double(), q.double(), cos.double(), cos.double())
    assert calls[-1:] == [1]


def test_other_rotations_are_told_apart() -> None:
    def interleaved(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        def rotate(x: Tensor) -> Tensor:
            turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
            return x * cos.unsqueeze(unsqueeze_dim) + turned * sin.unsqueeze(unsqueeze_dim)

        return rotate(q), rotate(k)

    assert not kernels._rotates_halves(interleaved)
    assert not kernels._rotates_halves(lambda q, k, cos: (q, k))
    assert not kernels._rotates_halves(None)


def test_the_model_s_rotation_is_back_after_an_error() -> None:
    from transformers.models.llama import modeling_llama

    stock = modeling_llama.apply_rotary_pos_emb
    model = tiny.backbone("llama").model
    rotations = []

    def broken(*_: Any) -> None:
        rotations.append(modeling_llama.apply_rotary_pos_emb)
        raise RuntimeError("broken")

    handle = model.get_input_embeddings().register_forward_hook(broken)
    with pytest.raises(RuntimeError, match="broken"), kernels.use_kernels(model, Kernels(), {}):
        model(torch.ones(1, 2, dtype=torch.long))
    handle.remove()
    assert rotations != [stock]
    assert modeling_llama.apply_rotary_pos_emb is stock


@pytest.mark.parametrize("path", ["packed", "shared"])
def test_recomputed_layers_use_the_same_fused_parts(path: str) -> None:
    """The backward pass comes after the kernels' context has ended, and must round as the first run did."""
    stored, recomputed = (
        step(replace(tiny.backbone("llama"), kernels=Kernels(path=path, gradient_checkpointing=again)), "llama", INPUT)
        for again in (False, True)
    )
    for gradient, again in zip(stored[1], recomputed[1], strict=True):
        assert torch.equal(gradient, again)


def seen(module: Any, run: Callable[[], Any]) -> list[tuple[int, ...]]:
    """Shapes of what `module` was given while `run` ran."""
    shapes: list[tuple[int, ...]] = []
    handle = module.register_forward_pre_hook(lambda m, args: shapes.append(tuple(args[0].shape)))
    try:
        run()
    finally:
        handle.remove()
    return shapes


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_nothing_is_computed_in_vain(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No padding, prompts once, no repeated keys; head and last layer only for what is asked for."""
    bb = tiny.backbone(name)
    tokens = 3 * 5 + sum(LENGTHS)

    def refuse(*_: Any) -> Tensor:
        raise AssertionError("keys were repeated")

    assert injection.why_not_packed(bb) is None  # found out before, with the model's own attention
    injection.prompt_width(bb, KV)
    monkeypatch.setattr(f"transformers.models.{name}.modeling_{name}.repeat_kv", refuse)
    assert seen(bb.layers[0].mlp, lambda: step(bb, name, INPUT)) == [(1, tokens, 32)]
    assert seen(bb.model.lm_head, lambda: step(bb, name, INPUT)) == [(1, len(LENGTHS), 32)]
    asked = 3 + 2 * len(LENGTHS)  # the prompts' ends, and of each row the state that scores its label, and its end
    assert seen(bb.layers[-1].mlp, lambda: step(bb, name, INPUT)) == [(1, asked, 32)]
    assert seen(bb.layers[0].mlp, lambda: step(bb, name, KV)) == [(1, sum(LENGTHS), 32)]


def test_no_graph_below_the_first_layer_a_prompt_can_influence() -> None:
    """At site kv the first layer's queries, keys and values of the text need no gradient; its output does."""
    bb, wants = tiny.backbone("llama"), {}
    parts = {"q": bb.layers[0].self_attn.q_proj, "out": bb.layers[0].self_attn.o_proj, "next": bb.layers[1].mlp}
    handles = [
        part.register_forward_hook(lambda m, a, out, name=name: wants.update({name: out.requires_grad}))
        for name, part in parts.items()
    ]
    step(bb, "llama", KV)
    for handle in handles:
        handle.remove()
    assert wants == {"q": False, "out": True, "next": True}


def test_checkpointing_keeps_less() -> None:
    """What is kept for the backward pass shrinks to the layers' inputs (and the trimmed last layer)."""
    sizes = {}
    for again in (False, True):
        kept: dict[int, int] = {}

        def note(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        bb = replace(tiny.backbone("llama"), kernels=Kernels(gradient_checkpointing=again))
        values = rows.random(0, 5, 32).requires_grad_()
        batch = one_label(rows.batch("llama", rows.texts("llama", LENGTHS)))
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            injection.score(bb, batch, rows.single(values, len(LENGTHS)), INPUT)
        weights = {p.untyped_storage().data_ptr() for p in bb.model.parameters()}
        sizes[again] = sum(size for place, size in kept.items() if place not in weights)
    assert sizes[True] < 0.6 * sizes[False]


def test_products_fit_the_weights() -> None:
    """oneDNN's product is torch's, in values and gradient, for both kinds of layer."""
    for name in ("gpt2", "bert"):
        bb = tiny.backbone(name)
        found = kernels.frozen_linears(bb.model)
        assert len(found) > 6
        for module in found[:8]:
            width = module.nx if hasattr(module, "nx") else module.in_features
            x = rows.random(0, 2, 40, width).requires_grad_()
            plain = module(x)
            with kernels.use_kernels(bb.model, Kernels(matmul_backend="onednn"), {}):
                fast, none = module(x), module(x[:, :0])
            torch.testing.assert_close(fast, plain)
            assert type(fast.grad_fn).__name__ == "_OneDNNLinearBackward"
            assert none.shape == (2, 0, plain.shape[-1])
            weights = rows.random(1, *plain.shape)
            torch.testing.assert_close(
                torch.autograd.grad((fast * weights).sum(), x), torch.autograd.grad((plain * weights).sum(), x)
            )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's compiler looks at its own deprecated parts
def test_compiled_parts() -> None:
    """Norms and MLPs are compiled once for all layers, and give the same loss and gradient at any length."""
    for products in ("torch", "onednn"):
        bb = replace(tiny.backbone("llama"), kernels=Kernels(compiled=True, matmul_backend=products), facts={})
        parts = kernels.compile_parts(bb.model, bb.kernels)
        assert {type(m).__name__ for m in parts} == (
            {"LlamaRMSNorm", "LlamaMLP"} if products == "torch" else {"LlamaRMSNorm"}
        )
        expected, gradients = step(tiny.backbone("llama"), "llama", INPUT)
        output, found = step(bb, "llama", INPUT)
        torch.testing.assert_close(output.logits, expected.logits, atol=1e-5, rtol=1e-5)
        for one, other in zip(found, gradients, strict=True):
            assert (one - other).norm() < 1e-4 * other.norm()


@pytest.mark.parametrize("name", ["llama", "gemma2", "t5", "bert"])
def test_large_vocabularies_in_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where scores would be large they are made a few rows at a time: same loss, same gradient, never more at once."""
    bb, batch = tiny.backbone(name), rows.batch(name, rows.texts(name))
    values = rows.random(0, 3, bb.embedding_size).requires_grad_()
    plain = injection.score(bb, batch, rows.single(values, 4), INPUT)
    expected = torch.nn.functional.cross_entropy(plain.logits, plain.labels, reduction="none")
    (gradient,) = torch.autograd.grad(expected.square().sum(), values)
    monkeypatch.setattr(scoring, "MAX_LOGITS", 5 * tiny.VOCABULARY)
    shapes = seen(bb.model.get_output_embeddings(), lambda: injection.score(bb, batch, rows.single(values, 4), INPUT))
    assert len(shapes) == -(-len(plain.labels) // 5)
    assert max(shape[1] for shape in shapes) == 5
    output = injection.score(bb, batch, rows.single(values, 4), INPUT)
    assert output.logits is None
    torch.testing.assert_close(output.nll, expected, atol=1e-5, rtol=1e-5)
    (own,) = torch.autograd.grad(output.nll.square().sum(), values)
    assert (own - gradient).norm() < 1e-4 * gradient.norm()
    with torch.no_grad():
        torch.testing.assert_close(injection.score(bb, batch, rows.single(values, 4), INPUT).nll, output.nll)
    assert injection.score(bb, batch, rows.single(values, 4), INPUT, return_logits=True).logits is not None


def test_a_model_that_cannot_pack_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = {name: injection.why_not_packed(tiny.backbone(name)) for name in tiny.ALL}
    for name in tiny.CAUSAL:
        assert (reasons[name] is None) == (name not in rows.UNPACKED)
    assert reasons["bloom"] == "BloomForCausalLM uses another kind of attention"
    assert reasons["bert"] == "an encoder's prompt sees the text"
    # Attention that is not what the model's own is: packed rows are not taken, and the next best path is.
    honest = packed_attention._math_attention

    def shifted(part: Any, mask: packed_attention.AttentionMask, *rest: Any) -> Tensor:
        return honest(part, packed_attention.AttentionMask(mask.allowed.roll(1, -1)), *rest)

    monkeypatch.setitem(
        packed_attention.ALL_ATTENTION_FUNCTIONS,
        packed_attention.ATTENTION_NAMES["math"],
        packed_attention._attention_function(shifted),
    )
    bb = replace(tiny.backbone("llama"), facts={})
    assert injection.why_not_packed(bb) == "LlamaForCausalLM gives other states with packed rows"
    assert step(bb, "llama", INPUT)[0].path == "shared"
    monkeypatch.undo()
    mistral = b.wrap(tiny.model("mistral"), name="mistral")
    monkeypatch.setattr(mistral.model.config, "sliding_window", None)
    monkeypatch.setattr("softprompts.injection.packed.layer_windows", lambda backbone: (6,) * 3)
    assert injection.why_not_packed(mistral) == (
        "MistralForCausalLM cannot pack rows: its attention does not report its window"
    )
    # A window that is longer than the few tokens that are tried.
    monkeypatch.setattr("softprompts.injection.packed.layer_windows", lambda backbone: (4096,) * 3)
    other = b.wrap(tiny.model("mistral"), name="mistral")
    assert injection.why_not_packed(other) == (
        "MistralForCausalLM cannot pack rows: its attention has a window of 6 tokens and its cache one of 4096"
    )


def test_a_model_that_fails_when_packed_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong with packed rows, the next best path is taken; running out of memory says nothing."""

    def broken(*_: Any) -> Tensor:
        raise RuntimeError("no kernel")

    monkeypatch.setitem(
        packed_attention.ALL_ATTENTION_FUNCTIONS,
        packed_attention.ATTENTION_NAMES["math"],
        packed_attention._attention_function(broken),
    )
    bb = replace(tiny.backbone("llama"), facts={})
    before = state(bb)
    assert injection.why_not_packed(bb) == "LlamaForCausalLM fails with packed rows (RuntimeError: no kernel)"
    assert step(bb, "llama", INPUT)[0].path == "shared"
    assert state(bb) == before

    def full(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setitem(
        packed_attention.ALL_ATTENTION_FUNCTIONS,
        packed_attention.ATTENTION_NAMES["math"],
        packed_attention._attention_function(full),
    )
    bb = replace(tiny.backbone("llama"), facts={})
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        injection.why_not_packed(bb)
    assert "packed" not in bb.facts
