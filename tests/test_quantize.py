"""Quantized backbones: what is rounded, exact gradients, fingerprints, and that everything else works on them."""

import copy
import importlib.util
import sys

import pytest
import torch

import local
import rows
import tiny
from prompted import prompted
from rows import called
from softprompts import assets, backbone, injection
from softprompts.artifacts import artifact
from softprompts.artifacts.fingerprint import BANDS, check_fingerprint, sketch_distance
from softprompts.backbone import loading, quantization
from softprompts.config import parse
from softprompts.errors import BackboneError, WrongBackboneError
from softprompts.methods import build
from softprompts.model.soft_prompt_model import open_prompts
from softprompts.recipes.run import run
from softprompts.training import objectives
from softprompts.training.shared_batch import training_step
from softprompts.types import PromptInit
from test_golden_contract import snapshot

HERE = importlib.util.find_spec("bitsandbytes") is not None
FOUR = pytest.mark.skipif(not HERE, reason="bitsandbytes is not installed")
KINDS = ["int8", pytest.param("nf4", marks=FOUR), pytest.param("fp4", marks=FOUR)]
WORST = {"int8": 0.005, "nf4": 0.11, "fp4": 0.14}  # relative rounding of normal weights


def quantized(name, kind="int8", dtype=torch.float32, head="lm"):
    """A tiny quantized backbone, and a plain one whose weights are the rounded ones."""
    model = backbone.freeze(tiny.model(name, head).to(dtype))
    plain = copy.deepcopy(model)
    quantization.quantize(model, kind)
    for key, module in quantization.quantizable_linears(plain).items():
        rounded = model.get_submodule(key).dequantize(dtype)
        module.weight.data = rounded if isinstance(module, torch.nn.Linear) else rounded.t()
    return backbone.wrap(model, name=name), backbone.wrap(plain, name=name)


def loss_of(bb, name, values, site):
    output = injection.score(bb, rows.batch(name, rows.texts(name)), rows.single(values, 4), site)
    return torch.nn.functional.cross_entropy(output.logits, output.labels), output.logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "site"), rows.cases((*tiny.MAIN, "falcon", "mpt")), ids=called)
def test_the_gradient_is_that_of_the_rounded_weights(name, site, kind, monkeypatch):
    monkeypatch.setattr(quantization, "WEIGHTS_PER_CHUNK", 500)  # several parts, of unequal size
    small, plain = quantized(name, kind)
    found = []
    for bb in (small, plain):
        values = rows.random(1, 4, injection.prompt_width(bb, site)).requires_grad_()
        loss, logits = loss_of(bb, name, values, site)
        found.append((logits.detach(), torch.autograd.grad(loss, values)[0]))
    (ours, gradient), (logits, expected) = found
    torch.testing.assert_close(ours, logits, atol=1e-5, rtol=1e-5)
    assert float((gradient - expected).norm() / expected.norm()) < 1e-5
    assert float((logits - loss_of(tiny.backbone(name), name, values.detach(), site)[1]).abs().max()) > 1e-4


@pytest.mark.parametrize(("name", "site"), rows.cases(("gpt2", "gpt_neox", "bert")), ids=called)
def test_finite_differences(name, site):
    """In float64: families that compute their norms in float32 whatever the dtype cannot be measured like this."""
    small, _ = quantized(name, dtype=torch.float64)
    values = rows.random(1, 4, injection.prompt_width(small, site)).double().requires_grad_()
    gradient = torch.autograd.grad(loss_of(small, name, values, site)[0], values)[0]
    direction, step = rows.random(2, *values.shape).double(), 1e-6
    with torch.no_grad():
        up, down = (loss_of(small, name, values + sign * step * direction, site)[0] for sign in (1, -1))
    assert float((up - down) / (2 * step)) == pytest.approx(float((gradient * direction).sum()), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_product(kind, dtype, bias):
    torch.manual_seed(0)
    linear = torch.nn.Linear(192, 40, bias=bias).to(dtype).requires_grad_(False)
    small = quantization.quantize_linear(linear, kind)
    weight = small.dequantize(torch.float32)
    assert float((weight - linear.weight.float()).norm() / linear.weight.float().norm()) < WORST[kind]
    x = torch.randn(2, 7, 192).to(dtype).requires_grad_()
    exact = torch.nn.functional.linear(x.detach().float(), weight, None if linear.bias is None else linear.bias.float())
    band = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.02, "rtol": 0.01}
    y = small(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.detach().float(), exact, **band)
    up = torch.randn(2, 7, 40).to(dtype)
    (gradient,) = torch.autograd.grad(y, x, up)
    torch.testing.assert_close(gradient.float(), up.float() @ weight, **band)
    with torch.no_grad():  # few rows take another kernel in bfloat16
        torch.testing.assert_close(small(x[:1, :3]).float(), exact[:1, :3], **band)


def test_int8_uses_its_whole_range_and_survives_zeros():
    linear = torch.nn.Linear(4, 3, bias=False).requires_grad_(False)
    linear.weight.data = torch.tensor([[1.0, -2.0, 0.5, 0.0], [0, 0, 0, 0], [1e-3, 2e-3, -4e-3, 0]])
    small = quantization.quantize_linear(linear, "int8")
    assert small.weight.tolist() == [[64, -127, 32, 0], [0, 0, 0, 0], [32, 64, -127, 0]]
    assert small.dequantize(torch.float32)[1].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert", "albert", "opt_projected"])
def test_only_products_inside_layers_are_rounded(name):
    before = dict(tiny.model(name).named_parameters())
    bb, _ = quantized(name)
    left = dict(bb.model.named_parameters())
    changed = {key.rpartition(".")[0] for key in before.keys() - left.keys()}
    assert changed == {key for key, m in bb.model.named_modules() if isinstance(m, quantization.Int8Linear)}
    assert all("layer" in key or ".h." in key or "block" in key for key in changed)
    for key, value in left.items():
        assert torch.equal(value, before[key]), key
    assert "lm_head" not in " ".join(changed)
    for key in changed:  # nothing takes it for a plain product
        module = bb.model.get_submodule(key)
        assert not isinstance(module, torch.nn.Linear)
        assert module.weight.dtype == torch.int8


def test_tied_heads_stay_tied():
    config = tiny.CONFIGS["llama"]()
    config.tie_word_embeddings = True
    model = type(tiny.model("llama"))(config)
    quantization.quantize(model, "int8")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_memory():
    """A byte a weight, and four (here) for the scale of an output."""
    (model, plain), sizes = (bb.model for bb in quantized("llama")), []
    for one in (model, plain):
        tensors = [*one.parameters(), *one.buffers()]
        sizes.append(sum(tensor.numel() * tensor.element_size() for tensor in tensors))
    weights = [module.weight for module in quantization.quantizable_linears(plain).values()]
    saved = sum(3 * weight.numel() - 4 * len(weight) for weight in weights)
    assert sizes[1] - sizes[0] == saved


@pytest.mark.golden
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_frozen(name, kind):
    """Training leaves every byte as it was, and scoring does."""
    bb, _ = quantized(name, kind)
    spec = injection.prompt_spec(bb, rows.INPUT, 5)
    model = prompted(bb, rows.INPUT, build("prompt-tuning", {}, spec, PromptInit(rows.random(0, 5, 32))))
    batch = rows.batch(name, rows.texts(name))
    before = snapshot(bb.model)
    optimizer = torch.optim.Adam(model.trainable().values(), lr=0.1)
    losses = []
    for _ in range(4):
        loss = objectives.task(training_step(model, batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    with torch.no_grad():
        training_step(model, batch)
    assert losses[-1] < losses[0] - 0.05
    assert snapshot(bb.model) == before


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_generation_equals_that_of_the_rounded_weights(name):
    from softprompts.injection import generation

    small, plain = quantized(name)
    values = rows.random(0, 4, 32)
    batch = rows.batch(name, rows.texts(name, (4, 6)), "left")
    written = [
        generation.generate(bb, batch, rows.single(values, 2), rows.INPUT, max_new_tokens=6) for bb in (small, plain)
    ]
    assert torch.equal(*written)


def test_what_is_refused(monkeypatch):
    model = tiny.model("llama")
    with pytest.raises(BackboneError, match="quantization 'int3' is unknown; possible: int8, nf4, fp4"):
        quantization.quantize(model, "int3")
    with pytest.raises(BackboneError, match="Linear has no matrix products in a stack of layers"):
        quantization.quantize(torch.nn.Linear(2, 2), "int8")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(BackboneError, match=r"nf4 and fp4 need .* bitsandbytes; .*softprompts\[quantize\]"):
        quantization.quantize(model, "nf4")
    assert quantization.quantization_kind(model) is None


def test_a_model_that_transformers_quantized_is_named():
    model = tiny.model("llama")
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    assert backbone.wrap(model).quantization == "gptq"
    with pytest.raises(WrongBackboneError, match="sketches in gptq cannot be compared"):
        check_fingerprint(backbone.fingerprint(tiny.backbone("llama")), backbone.fingerprint(backbone.wrap(model)))


@pytest.mark.parametrize(("trained", "used"), [(None, "int8"), ("int8", None), ("int8", "int8")])
def test_a_prompt_moves_between_float_and_int8(tmp_path, trained, used):
    values = local.run_values(tmp_path, max_steps=3)
    made = values["model"] | {"quantize": trained}
    results = run.run(parse(values | {"model": made}))
    stored = artifact.load(tmp_path / "out" / "prompt")
    assert stored.fingerprint.dtype == (trained or "float32")
    assert stored.config["model"]["quantize"] == trained
    assert results["summary"]["after"]["n"] == 16
    config = parse(values | {"model": values["model"] | {"quantize": used}}).model
    opened, warnings = open_prompts([tmp_path / "out" / "prompt"], config=config)
    assert warnings == ()
    assert opened.backbone.quantization == used
    # Another model of the same shape is refused in either format.
    other = local.model_directory(tmp_path / "other", seed=1)
    with pytest.raises(WrongBackboneError, match=r"other weights: sketch distance .* allowed 0.07"):
        open_prompts([tmp_path / "out" / "prompt"], config=config.model_copy(update={"name": str(other)}))[0]


def test_int8_on_float32_weights_is_outside_the_band_of_float32(tmp_path):
    """Without its own kind a quantized model would be taken for other weights."""
    where = local.model_directory(tmp_path / "llama")
    plain, small = (loading.load(str(where), dtype="float32", quantize=kind) for kind in (None, "int8"))
    one, two = backbone.fingerprint(plain), backbone.fingerprint(small)
    assert (one.dtype, two.dtype) == ("float32", "int8")
    assert BANDS["float32"] < sketch_distance(one.sketch, two.sketch) < BANDS["int8"]


@pytest.mark.assets
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bands_hold_on_the_default_model(kind, dtype):
    path = assets.fetch("smollm2-135m")
    exact = backbone.fingerprint(loading.load("smollm2-135m", path=path, dtype="float32"))
    rounded = backbone.fingerprint(loading.load("smollm2-135m", path=path, dtype=dtype, quantize=kind))
    assert rounded.dtype == kind
    distance = sketch_distance(exact.sketch, rounded.sketch)
    assert BANDS[kind] / 2.5 < distance <= BANDS[kind] / 1.95
