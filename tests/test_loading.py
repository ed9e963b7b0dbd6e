"""Where a model stands: devices, maps of devices with accelerate's hooks, the options of the command."""

import json

import accelerate
import pytest
import torch
import transformers

import local
import rows
import tiny
from rows import called
from softprompts import backbone, injection
from softprompts.artifacts import artifact
from softprompts.backbone import devices, loading
from softprompts.config import ModelConfig, parse
from softprompts.errors import BackboneError, ConfigError
from softprompts.recipes.run import run

LAYERS_ON_DISK = {
    "llama": {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    | {"model.layers": "disk"},
    "gpt2": {"transformer.wte": "cpu", "transformer.wpe": "disk", "transformer.h": "disk", "transformer.ln_f": "cpu"}
    | {"lm_head": "cpu"},
    "t5": {"shared": "cpu", "encoder": "disk", "decoder": "disk", "lm_head": "disk"},
    "bert": {"bert.embeddings": "disk", "bert.encoder": "disk", "cls": "cpu"},
}


def hooked(name, folder, how):
    """A tiny model that accelerate has dispatched: hooks on every module, with or without weights brought from disk."""
    model = tiny.model(name)
    skip = model._skip_keys_device_placement
    if how == "hooks":
        made = accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True, skip_keys=skip)
    else:
        accelerate.utils.offload_state_dict(folder, model.state_dict())
        made = accelerate.dispatch_model(
            model, LAYERS_ON_DISK[name], main_device="cpu", offload_dir=folder, skip_keys=skip
        )
    assert sum(hasattr(module, "_hf_hook") for module in made.modules()) > 20
    return loading.align_part_devices(backbone.wrap(made, name=name))


@pytest.mark.parametrize("how", ["hooks", "disk"])
@pytest.mark.parametrize(("name", "site"), rows.cases(tuple(LAYERS_ON_DISK)), ids=called)
def test_hooks_change_nothing(name, site, how, tmp_path):
    """accelerate puts its own `forward` on every module, and so do replaying, deep prompts and packing."""
    bb, plain = hooked(name, tmp_path, how), tiny.backbone(name)
    if how == "disk":
        assert any(parameter.device.type == "meta" for parameter in bb.model.parameters())
    assert bb.device == torch.device("cpu")
    assert bb.embedding_rms == plain.embedding_rms
    assert bb.trunk_arguments == plain.trunk_arguments
    own = {key: module.forward for key, module in bb.model.named_modules()}
    values = rows.random(0, 4, injection.prompt_width(plain, site)).requires_grad_()
    found = []
    for one in (bb, plain):
        output = injection.score(one, rows.batch(name, rows.texts(name)), rows.single(values, 4), site)
        loss = torch.nn.functional.cross_entropy(output.logits, output.labels)
        found.append((output.logits, torch.autograd.grad(loss, values)[0]))
    (logits, gradient), (expected, other) = found  # the paths may differ: not every one takes weights from a disk
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert float((gradient - other).norm() / other.norm()) < 1e-4
    assert {key: module.forward for key, module in bb.model.named_modules()} == own


def test_parts_answer_where_they_were_asked():
    """What a part of a spread model gives is where its input was, so that prompts and labels meet it there."""
    bb = hooked("llama", "", "hooks")
    asked = []
    hook = bb.trunk._hf_hook.hooks[-1]
    assert hook.io_same_device
    forward = hook.post_forward
    hook.post_forward = lambda module, output: asked.append(hook.input_device) or forward(module, output)
    bb.trunk(input_ids=torch.tensor([[5, 6]]))
    assert asked == [torch.device("cpu")]


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}, LAYERS_ON_DISK["llama"]])
def test_load_with_a_map(device_map, tmp_path):
    where = local.model_directory(tmp_path / "llama")
    plain = loading.load(str(where), dtype="float32", device="cpu")
    if isinstance(device_map, str) and len(devices.available_devices()) > 1:
        pytest.skip("auto takes the accelerator here")
    bb = loading.load(str(where), dtype="float32", device_map=device_map)
    assert bb.device == torch.device("cpu")
    assert backbone.fingerprint(bb).sketch.equal(backbone.fingerprint(plain).sketch)
    spread = "disk" in str(device_map)
    assert any(p.device.type == "meta" for p in bb.model.parameters()) == spread
    assert hasattr(bb.trunk, "_hf_hook") == spread
    if spread:
        hook = bb.trunk._hf_hook
        assert getattr(hook, "hooks", [hook])[-1].io_same_device


def test_a_language_model_must_be_whole(tmp_path):
    """An encoder that was saved without the layer that writes; with a head of its own it is as good as another."""
    whole = local.model_directory(tmp_path / "bert", "bert")
    assert loading.load(str(whole), dtype="float32", device="cpu").head == "lm"
    transformers.AutoModel.from_pretrained(whole).save_pretrained(whole)
    message = r"holds no complete language model: cls.predictions.* would be random; set model.head to sequence, token"
    with pytest.raises(BackboneError, match=message):
        loading.load(str(whole), dtype="float32", device="cpu")
    for head in ("sequence", "features"):
        assert loading.load(str(whole), dtype="float32", device="cpu", head=head).head == head


def test_a_run_on_a_spread_model_equals_one_on_a_whole_model(tmp_path):
    values = local.run_values(tmp_path, max_steps=3)
    made = []
    for out, more in (("a", {}), ("b", {"device_map": LAYERS_ON_DISK["llama"]})):
        run.run(parse(values | {"model": values["model"] | more, "output_dir": str(tmp_path / out)}))
        made.append(artifact.load(tmp_path / out / "prompt"))
    torch.testing.assert_close(made[0].prompt, made[1].prompt, atol=1e-4, rtol=1e-3)
    assert float((made[0].prompt - made[0].initial).abs().max()) > 0.01


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"device": "cpu", "device_map": "auto"}, "device 'cpu' and a device_map cannot both be given"),
        ({"quantize": "int8", "device_map": "auto"}, r"quantized \(int8\) for one device"),
        ({"device_map": {"": "cuda:9"}}, "device 'cuda:9' cannot be used here"),
        ({"device": "gpu"}, "device 'gpu' cannot be used here"),
        ({"quantize": "int3"}, "quantization 'int3' is unknown; possible: int8, nf4, fp4"),
    ],
)
def test_what_does_not_go_together(given, message, tmp_path):
    where = local.model_directory(tmp_path / "llama")
    with pytest.raises(BackboneError, match=message):
        loading.load(str(where), dtype="float32", **given)


def test_the_section_of_the_configuration():
    config = parse({"device": "cuda:1", "quantize": "nf4"}, ModelConfig)
    assert (config.device, config.quantize, config.device_map) == ("cuda:1", "nf4", None)
    assert parse({"device_map": {"model.embed_tokens": 0, "": "cpu"}}, ModelConfig).device_map == {
        "model.embed_tokens": 0,
        "": "cpu",
    }
    with pytest.raises(ConfigError, match="quantize: Input should be 'int8', 'nf4' or 'fp4'"):
        parse({"quantize": "int4"}, ModelConfig)


def test_the_options_of_the_command(call, tmp_path, monkeypatch):
    data, model = local.colors(tmp_path / "c.csv"), local.model_directory(tmp_path / "llama")
    out = tmp_path / "o"
    asked = []
    load = loading.load
    monkeypatch.setattr(
        loading,
        "load",
        lambda *a, **k: asked.append((k["device"], k["dtype"], k["quantize"], k["device_map"])) or load(*a, **k),
    )
    small = ["--steps", 2, "--length", 3, "--set", "evaluation.resamples=100", "--out", out]
    words = ["--data", data, "--text", "text", "--label", "label"]
    where = ["--device", "cpu", "--dtype", "float32", "--quantize", "int8"]
    status, _, err = call("train", "--model", model, *words, *where, *small)
    assert status == 0, err
    assert artifact.load(out / "prompt").fingerprint.dtype == "int8"
    config = json.loads((out / "results.json").read_text())["config"]["model"]
    assert (config["device"], config["dtype"], config["quantize"]) == ("cpu", "float32", "int8")
    for arguments in (
        ("predict", out / "prompt", "the thing is red"),
        ("predict", out / "prompt", "the thing is red", *where[:4], "--quantize", "none"),
        ("generate", out / "prompt", "the thing is red", "--max-new-tokens", 2, "--dtype", "float32"),
        ("evaluate", out / "prompt", "--json", "--dtype", "float32"),
    ):
        status, _, err = call(*arguments)
        assert status == 0, err
    assert asked == [
        ("cpu", "float32", "int8", None),
        ("auto", "auto", "int8", None),  # as the run was, unless told otherwise
        ("cpu", "float32", None, None),
        ("auto", "float32", "int8", None),
        ("auto", "float32", "int8", None),
    ]


@pytest.mark.parametrize("command", ["quickstart", "train"])
def test_a_device_that_is_not_here_is_one_line(command, call, tmp_path):
    data, model = local.colors(tmp_path / "c.csv"), local.model_directory(tmp_path / "llama")
    more = ["--model", model, "--data", data, "--text", "text"] if command == "train" else []
    if command == "quickstart":
        values = {"model.name": str(model), "task.source": str(data), "task.template": "{text}"}
        more = [word for key, value in values.items() for word in ("--set", f"{key}={value!r}")]
    status, _, err = call(command, *more, "--device", "cuda:9", "--out", tmp_path / "o")
    assert status == 1
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "device 'cuda:9' cannot be used here" in line
    assert "possible: auto" in line
