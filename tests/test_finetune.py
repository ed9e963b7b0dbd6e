"""Weights instead of a prompt: each step equals a plain loop on the stock model, and the backbone stays as it was."""

import hashlib
import json
import sys
from contextlib import closing
from dataclasses import replace

import peft
import pytest
import torch
import transformers
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_

import local
import rows
import tiny
from closeness import assert_close
from softprompts import backbone as b
from softprompts.backbone import loading
from softprompts.backbone.kernels import Kernels
from softprompts.backbone.quantization import quantize
from softprompts.config import TrainConfig, parse
from softprompts.data import EncodedExample, ExampleBatches
from softprompts.errors import BackboneError, ConfigError, TrainingError
from softprompts.evaluation import evaluate
from softprompts.injection import scoring
from softprompts.recipes.run import run as job
from softprompts.training import backbone_weights, loop, objectives
from softprompts.training.backbone_weights import copy_backbone
from softprompts.training.loop import TrainingRun
from softprompts.training.trainables import RunBatch, TrainableWeights
from softprompts.types import IGNORE

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks

ALL, LORA = {"target": "backbone", "learning_rate": 1e-2}, {"target": "lora", "learning_rate": 1e-1}


def config(**changes):
    values = {"max_steps": 3, "batch_size": 2, "learning_rate_unit": "absolute", **changes}
    return parse(values, TrainConfig)


def double(name, head="lm", **changes):
    """A tiny backbone in float64."""
    return b.wrap(tiny.model(name, head, **changes).double(), name=name)


def examples(name, head="lm", count=8):
    """Rows of different lengths, with every text token (or some targets, or a class) to learn."""
    found = []
    for i, text in enumerate(rows.texts(name, [3 + (i * 5) % 7 for i in range(count)])):
        labels = rows.targets([text])[0].tolist() if name in tiny.SEQ2SEQ else text.tolist()
        found.append(EncodedExample(text.tolist(), labels if head == "lm" else i % 3))
    return found


def stock_loss(model, name, part):
    """The mean loss over the labels of `part`, by the stock model alone, in its own number format."""
    ids, mask = rows.pad([torch.tensor(row.input_ids) for row in part], value=3)
    more = {}
    if isinstance(part[0].labels, int):
        labels = torch.tensor([row.labels for row in part])
    elif name in tiny.SEQ2SEQ:
        labels, there = rows.pad([torch.tensor(row.labels) for row in part], value=IGNORE)
        into = labels.masked_fill(labels == IGNORE, 0).roll(1, 1)
        into[:, 0] = model.config.decoder_start_token_id
        more = {"decoder_input_ids": into, "decoder_attention_mask": there}
    else:
        labels = ids.masked_fill(mask == 0, IGNORE)
    logits = model(input_ids=ids, attention_mask=mask, **more).logits
    if name in tiny.CAUSAL and labels.dim() == 2:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORE)


def by_hand(model, parameters, name, found, chosen):
    """The losses of a plain loop."""
    batches, losses = ExampleBatches(found, chosen.batch_size, 0), []
    optimizer = torch.optim.AdamW(parameters, lr=chosen.learning_rate, weight_decay=chosen.weight_decay)
    for step in range(chosen.max_steps):
        optimizer.zero_grad()
        loss = stock_loss(model, name, batches.at(step))
        loss.backward()
        if chosen.max_grad_norm is not None:
            clip_grad_norm_(parameters, chosen.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = chosen.learning_rate * (1 - step / chosen.max_steps)
        optimizer.step()
        losses.append(loss.item())
    return losses


def train(weights, found, chosen, **more):
    """The steps of a training of weights."""
    return loop.train_run(TrainableWeights(weights), TrainingRun("", found, chosen, **more))


def fitted(backbone, found, chosen, **more):
    weights = copy_backbone(backbone, chosen)
    return weights, list(train(weights, found, chosen, **more))


# The steps are those of a plain loop


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert"])
def test_three_steps_of_all_weights_equal_a_plain_loop(name):
    chosen, found = config(**ALL, weight_decay=0.1), examples(name)
    weights, reports = fitted(double(name), found, chosen)
    model = tiny.model(name).double()
    losses = by_hand(model, list(model.parameters()), name, found, chosen)
    assert [r.loss for r in reports] == pytest.approx(losses, rel=1e-9)
    assert [r.rate for r in reports] == pytest.approx([1e-2, 2e-2 / 3, 1e-2 / 3])
    assert {r.rms_ratio for r in reports} == {None}
    trained = dict(weights.backbone.model.named_parameters())
    for key, value in model.named_parameters():
        torch.testing.assert_close(trained[key], value.detach(), rtol=0, atol=1e-9, msg=key)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "modernbert"])
def test_three_steps_of_lora_equal_a_plain_loop_on_peft(name):
    chosen, found = config(**LORA, max_grad_norm=None, lora={"rank": 4, "alpha": 8}), examples(name)
    weights = copy_backbone(double(name), chosen, seed=5)
    reports = list(train(weights, found, chosen))
    targets = "all-linear" if name == "modernbert" else None
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, fan_in_fan_out=name == "gpt2")
    stock = tiny.model(name).double()
    torch.manual_seed(5)
    model = peft.get_peft_model(stock, settings)
    parameters = {key: value for key, value in model.named_parameters() if value.requires_grad}
    losses = by_hand(model, list(parameters.values()), name, found, chosen)
    assert [r.loss for r in reports] == pytest.approx(losses, rel=1e-9)
    assert {f"base_model.model.{key}" for key in weights.trained} == parameters.keys()
    for key, value in weights.trained.items():
        expected = parameters[f"base_model.model.{key}"].detach()
        torch.testing.assert_close(value.detach(), expected, rtol=0, atol=1e-9, msg=key)
        assert key.endswith("lora_A.default.weight") or value.abs().max() > 0


def gradients(weights, found, size=None):
    """Loss and gradients by name of the rows in parts of `size`."""
    for parameter in weights.trained.values():
        parameter.requires_grad_(True)
        parameter.grad = None
    parts = [found] if size is None else [found[i : i + size] for i in range(0, len(found), size)]
    trainable, objective, total = TrainableWeights(weights), objectives.weigh({"task": 1.0}), 0.0
    counts = [sum(trainable.label_count("", row) for row in part) for part in parts]
    for part, count in zip(parts, counts, strict=True):
        (loss,) = trainable.loss([RunBatch("", part, objective)])
        (loss.value * count / sum(counts)).backward()
        total += float(loss.value.detach()) * count / sum(counts)
    return total, {name: value.grad for name, value in weights.trained.items()}


def expect(measured, backbone, name, found):
    model = backbone.model.requires_grad_(True)
    loss = stock_loss(model, name, found)
    loss.backward()
    assert measured[0] == pytest.approx(loss.item(), rel=1e-9)
    for key, value in model.named_parameters():
        if value.grad is None:
            assert measured[1][key] is None, key
        else:
            torch.testing.assert_close(measured[1][key], value.grad, rtol=1e-7, atol=1e-9, msg=key)


@pytest.mark.parametrize("name", [*tiny.MAIN, "mistral", "bloom", "albert"])
def test_gradients_of_all_weights_are_those_of_the_stock_model(name):
    backbone, found = double(name), examples(name)
    expect(gradients(copy_backbone(backbone, config(**ALL)), found), backbone, name, found)


@pytest.mark.parametrize("name", ["bert", "llama", "bart"])
def test_gradients_with_a_classification_head(name):
    backbone, found = double(name, "sequence"), examples(name, "sequence")
    for row in found if name == "bart" else ():
        row.input_ids[-1] = 2  # its head reads the end token, of which each row has one
    if name != "llama":  # the stock head refuses batches when nothing says what padding is
        expect(gradients(copy_backbone(backbone, config(**ALL)), found), backbone, name, found)
        return
    measured = gradients(copy_backbone(backbone, config(**ALL)), found[:1])
    expect(measured, backbone, name, found[:1])


def test_gradients_agree_with_finite_differences():
    """GPT-2, whose norms keep float64."""
    weights, found = copy_backbone(double("gpt2"), config(**ALL)), examples("gpt2", count=3)
    _, slope = gradients(weights, found)
    for key in ("transformer.wte.weight", "transformer.h.1.mlp.c_fc.weight", "transformer.ln_f.bias"):
        parameter, where = weights.trained[key], int(slope[key].abs().argmax())
        ends = []
        for move in (1e-6, -2e-6):
            parameter.data.view(-1)[where] += move
            ends.append(gradients(weights, found)[0])
        assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(float(slope[key].view(-1)[where]), rel=1e-5)


def test_parts_count_with_their_share_of_the_labels():
    found = examples("llama")
    whole, parts = (gradients(copy_backbone(double("llama"), config(**ALL)), found, size) for size in (None, 3))
    assert whole[0] == pytest.approx(parts[0], rel=1e-12)
    for key, value in whole[1].items():
        torch.testing.assert_close(parts[1][key], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("chosen", [ALL, LORA], ids=["backbone", "lora"])
@pytest.mark.parametrize(
    "kernels", [Kernels(matmul_backend="onednn", packed_attention="fused"), Kernels(gradient_checkpointing=True)]
)
def test_the_backbone_s_kernels_do_not_touch_the_steps(kernels, chosen):
    """Products by oneDNN give weights no gradient, so they are not taken: the steps are the same to the bit."""
    found = examples("llama")
    plain = fitted(b.wrap(tiny.model("llama")), found, config(**chosen))
    other = fitted(replace(b.wrap(tiny.model("llama")), kernels=kernels), found, config(**chosen))
    expected = "path shared, packed_attention math, attn_implementation None, matmul_backend torch, "
    expected += "fuse_elementwise True, compiled False"
    assert expected in other[1][0].machine
    assert [r.loss for r in plain[1]] == [r.loss for r in other[1]]
    for key, value in plain[0].trained.items():
        assert torch.equal(other[0].trained[key], value), key


def test_a_large_vocabulary_leaves_the_head_its_gradient(monkeypatch):
    monkeypatch.setattr(scoring, "MAX_LOGITS", 1)
    backbone, found = double("mistral"), examples("mistral")
    measured = gradients(copy_backbone(backbone, config(**ALL)), found)
    assert measured[1]["lm_head.weight"].abs().max() > 0
    expect(measured, backbone, "mistral", found)


# What is trained, and what is not


def state(model):
    """Everything about a model that training could change."""
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    digests = {
        key: (id(value), value.dtype, value.requires_grad, hashlib.sha256(raw(value)).hexdigest())
        for key, value in tensors.items()
    }
    modules = [(key, id(part), part.training, sorted(part.__dict__)) for key, part in model.named_modules()]
    return digests, modules, model.config.to_dict(), model.config._attn_implementation


def raw(value):
    return value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("chosen", [ALL, LORA], ids=["backbone", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_backbone_stays_as_it_was(chosen, dtype):
    backbone = replace(b.wrap(tiny.model("gpt2").to(dtype)), kernels=Kernels(matmul_backend="onednn"))
    before = state(backbone.model)
    weights, reports = fitted(backbone, examples("gpt2"), config(**chosen))
    assert len(reports) == 3
    assert state(backbone.model) == before
    copied = weights.backbone.model
    assert not {id(value) for value in copied.parameters()} & {id(value) for value in backbone.model.parameters()}
    assert not any(value.requires_grad or value.grad is not None for value in copied.parameters())


def test_weights_are_trained_in_float32():
    backbone = b.wrap(tiny.model("llama").bfloat16())
    weights = copy_backbone(backbone, config(**ALL))
    for key, value in weights.backbone.model.named_parameters():
        assert value.dtype == torch.float32
        assert torch.equal(value, backbone.model.get_parameter(key).float())
    list(train(weights, examples("llama"), config(target="backbone", learning_rate=1e-6)))
    moved = weights.trained["model.norm.weight"] - backbone.model.get_parameter("model.norm.weight").float()
    assert 0 < moved.abs().max() < 1e-5  # bfloat16 would have lost it


@pytest.mark.parametrize(
    ("name", "head", "count"),
    [
        ("llama", "lm", 3 * (4 * (32 + 32) + 4 * (32 + 16))),  # q and v of grouped queries
        ("gpt2", "lm", 3 * 4 * (32 + 96)),
        ("bert", "sequence", 3 * 2 * 4 * (32 + 32) + 3 * 32 + 3),  # and the head
    ],
)
def test_how_many_numbers_are_trained(name, head, count):
    backbone = b.wrap(tiny.model(name, head))
    lora = copy_backbone(backbone, config(**LORA, lora={"rank": 4}))
    assert lora.count == count
    assert copy_backbone(backbone, config(**ALL)).count == sum(v.numel() for v in backbone.model.parameters())
    assert copy_backbone(backbone, config(**LORA, lora={"rank": 8})).count > lora.count


def test_targets_of_lora():
    backbone = b.wrap(tiny.model("llama"))
    only = copy_backbone(backbone, config(**LORA, lora={"targets": ["down_proj"], "rank": 2}))
    assert {key.split(".")[-4] for key in only.trained} == {"down_proj"}
    every = copy_backbone(backbone, config(**LORA, lora={"targets": "all-linear"}))
    assert len({key.split(".")[-4] for key in every.trained}) == 7
    with pytest.raises(ConfigError, match=r"q_prj cannot be updated in LlamaForCausalLM; did you mean 'q_proj'\?"):
        copy_backbone(backbone, config(**LORA, lora={"targets": ["q_prj"]}))
    with pytest.raises(ConfigError, match=r"targets: nothing\.\* cannot be updated .* possible: q_proj, .*all-linear"):
        copy_backbone(backbone, config(**LORA, lora={"targets": "nothing.*"}))


def test_a_head_has_its_own_rate():
    found = examples("bert", "sequence")
    chosen = config(
        target="backbone", learning_rate=1e-4, head_learning_rate=1e-2, max_steps=1, lr_scheduler_type="constant"
    )
    backbone = b.wrap(tiny.model("bert", "sequence"))
    weights, _ = fitted(backbone, found, chosen)
    # The first step of Adam moves every number by its rate.
    for key, rate in (("classifier.weight", 1e-2), ("bert.pooler.dense.weight", 1e-4)):
        moved = (weights.trained[key] - backbone.model.get_parameter(key)).abs().max()
        assert float(moved) == pytest.approx(rate, rel=1e-2)


@pytest.mark.parametrize("chosen", [ALL, LORA], ids=["backbone", "lora"])
def test_the_same_seed_gives_the_same_numbers(chosen):
    backbone, found = b.wrap(tiny.model("llama")), examples("llama")

    def losses(seed):
        weights = copy_backbone(backbone, config(**chosen), seed=seed)
        reports = list(train(weights, found, config(**chosen), seed=seed))
        return [r.loss for r in reports], [raw(value) for value in weights.trained.values()]

    torch.manual_seed(123)
    first = losses(4)
    torch.manual_seed(7)  # nothing depends on what was drawn before
    assert losses(4) == first
    assert losses(5) != first


# Which weights remain


def test_the_best_weights_are_what_remains():
    scores, seen = iter([0.2, 0.9, 0.4, 0.1]), []
    weights = copy_backbone(b.wrap(tiny.model("llama")), config(**ALL))

    def validate():
        seen.append(weights.trained["lm_head.weight"].detach().clone())
        return next(scores)

    chosen = config(**{**ALL, "max_steps": 9}, eval_steps=1, early_stopping_patience=2)
    reports = list(train(weights, examples("llama"), chosen, validate=validate))
    assert [r.score for r in reports] == [0.2, 0.9, 0.4, 0.1]  # and no fifth step
    assert torch.equal(weights.trained["lm_head.weight"], seen[1])
    assert not torch.equal(seen[1], seen[3])


def test_a_loss_that_is_no_number_stops_training():
    chosen = config(target="backbone", learning_rate=1e9, max_grad_norm=None, max_steps=20)
    with pytest.raises(
        TrainingError, match=r"not a number, and nothing was written.*training.learning_rate was 1e\+09 absolute"
    ):
        fitted(b.wrap(tiny.model("llama")), examples("llama"), chosen)


def test_training_that_is_broken_off_leaves_a_frozen_model():
    weights = copy_backbone(b.wrap(tiny.model("llama")), config(**ALL))
    with closing(train(weights, examples("llama"), config(**ALL))) as steps:
        next(steps)
        assert all(value.requires_grad for value in weights.trained.values())
    assert not any(value.requires_grad for value in weights.trained.values())


# What is refused


@pytest.mark.parametrize(
    ("train", "words"),
    [
        (
            {"target": "lora"},
            "needs a learning rate in plain numbers.*training.learning_rate_unit: absolute; a common rate is 2e-4",
        ),
        ({"target": "backbone", "learning_rate": 1e-3}, "training.learning_rate_unit: absolute; a common rate is 2e-5"),
        ({"target": "lora", "learning_rate_unit": "absolute"}, "set training.learning_rate"),
        (
            {**LORA, "learning_rate_unit": "absolute", "optimizer": "adafactor"},
            "training.optimizer: adamw, not adafactor",
        ),
        ({**LORA, "learning_rate_unit": "absolute", "objectives": {"task": 1, "distill": 1}}, "given task, distill"),
        ({**LORA, "learning_rate_unit": "absolute", "equivalence": "check"}, "leave it off"),
        ({**LORA, "learning_rate_unit": "absolute", "save_model": True}, "save_model is for target: backbone"),
        ({"target": "lorra"}, "did you mean 'lora'"),
        (
            {**LORA, "learning_rate_unit": "absolute", "lora": {"ranks": 3}},
            "unknown key 'lora.ranks'; did you mean 'rank'",
        ),
    ],
)
def test_settings_that_cannot_be(train, words):
    with pytest.raises(ConfigError, match=words):
        parse(train, TrainConfig)


@pytest.mark.parametrize(
    ("model", "words"),
    [({"quantize": "int8"}, "leave quantize out"), ({"device_map": "auto"}, "model.device instead of device_map")],
)
def test_models_that_cannot_be(model, words):
    with pytest.raises(ConfigError, match=words):
        parse({"training": {**LORA, "learning_rate_unit": "absolute"}, "model": model})


def test_backbones_that_cannot_be():
    rounded = tiny.model("llama")
    quantize(b.freeze(rounded), "int8")
    with pytest.raises(BackboneError, match=r"is quantized \(int8\), and rounded weights cannot be trained"):
        copy_backbone(b.wrap(rounded), config(**ALL))
    spread = tiny.model("llama")
    spread.hf_device_map = {"model": 0, "lm_head": 1}
    with pytest.raises(BackboneError, match="spread over devices"):
        copy_backbone(b.wrap(spread), config(**ALL))
    half = b.wrap(tiny.model("llama"))
    half.model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(BackboneError, match=r"attention 'flash_attention_2' supports half precision only.*use sdpa"):
        copy_backbone(half, config(**ALL))


def test_lora_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"pip install 'softprompts\[lora\]'"):
        copy_backbone(b.wrap(tiny.model("llama")), config(**LORA))
    assert copy_backbone(b.wrap(tiny.model("llama")), config(**ALL)).count > 0


def test_nothing_to_train_on(monkeypatch):
    weights = copy_backbone(b.wrap(tiny.model("llama")), config(**ALL))
    with pytest.raises(ConfigError, match="no rows to train on"):
        next(train(weights, [], config(**ALL)))
    with pytest.raises(TrainingError, match="no label to learn from"):
        next(train(weights, [EncodedExample([5, 6], [-100, -100])] * 4, config(**ALL)))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="start it without a launcher"):
        next(train(weights, examples("llama"), config(**ALL)))


# Whole runs


@pytest.fixture
def values(tmp_path):
    return local.run_values(tmp_path, max_steps=3, learning_rate=1e-3, learning_rate_unit="absolute")


def run_of(values, kind, out=None, **train):
    """The run of `values` that trains weights of this kind; `train` changes its section of that name."""
    values = {**values, "training": {**values["training"], "target": kind, **train}}
    return parse(values if out is None else {**values, "output_dir": str(out)})


@pytest.mark.parametrize("train", ["backbone", "lora"])
def test_a_run_from_configuration_to_page(values, tmp_path, train):
    said = []
    results = job.run(run_of(values, train), job.ProgressReporter(log=said.append))
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert saved["summary"] == results["summary"]
    stock = job.run(parse({**values, "output_dir": str(tmp_path / "prompt")}))
    assert saved["scores_before"] == stock["scores_before"]
    prepared = job.prepare(run_of(values, train))
    assert saved["summary"]["trainable"] == prepared.weights.count
    assert [row["step"] for row in saved["curve"]] == [1, 2, 3]
    assert {row["rms_ratio"] for row in saved["curve"]} == {None}
    assert saved["machine"]["dtype"] == "float32"
    assert saved["machine"]["kernels"]["matmul_backend"] == "torch"
    assert saved["next"] == []
    assert "nearest_words" not in saved
    assert len(saved["examples"]) == 10
    assert not any("prompt" in line for line in said)
    page = (tmp_path / "out" / "report.html").read_text()
    assert {"backbone": "all weights trained", "lora": "trained with LoRA"}[train] in page
    assert "Size of the prompt" not in page
    there = {path.name for path in (tmp_path / "out").iterdir()}
    assert there == {"results.json", "report.html", *(("lora",) if train == "lora" else ())}
    assert ("peft" in saved["versions"]) == (train == "lora")
    again = job.run(run_of(values, train))
    assert [row["loss"] for row in again["curve"]] == [row["loss"] for row in saved["curve"]]
    assert again["scores"] == results["scores"]


def evaluate_rows(prepared, model, index=0):
    """Log-probabilities of the labels of some test rows, by a stock model that is read by hand."""
    encoder, found = prepared.encoders[index], []
    for row in prepared.tasks[index].test[:4]:
        ids, scores = encoder.encode(row).input_ids, {}
        for label, answer in encoder.candidates().items():
            logits = model(input_ids=torch.tensor([ids + answer])).logits[0].float().log_softmax(-1)
            scores[label] = sum(float(logits[len(ids) - 1 + i, token]) for i, token in enumerate(answer))
        found.append(scores)
    return found


@pytest.mark.parametrize("attention", ["packed", "eager"])
def test_an_adapter_is_peft_s_own(values, tmp_path, attention):
    """Trained, evaluated with the fast kernels, saved, loaded by PEFT alone: the same scores and the same logits."""
    values["model"]["attention"] = attention
    prepared = job.prepare(run_of(values, "lora", learning_rate=1e-1))
    encoded = [prepared.encoders[0].example(row) for row in prepared.tasks[0].train]
    run = prepared.run
    list(train(prepared.weights, encoded, run.training, seed=run.seed))
    asked = prepared.tasks[0].test[:4]
    answers = list(
        evaluate.answers(
            prepared.model, asked, prompt=prepared.prompt(0), encoder=prepared.encoders[0], config=run.evaluation
        )
    )
    job.run(run)
    settings = json.loads((tmp_path / "out" / "lora" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == values["model"]["name"]
    assert settings["task_type"] == "CAUSAL_LM"
    stock = transformers.AutoModelForCausalLM.from_pretrained(values["model"]["name"])
    ids = torch.tensor([prepared.encoders[0].encode(asked[0]).input_ids])
    with torch.no_grad():
        before = stock(ids).logits
        loaded = peft.PeftModel.from_pretrained(stock, tmp_path / "out" / "lora").eval()
        mine = prepared.weights.backbone.model(ids).logits
        assert_close(loaded(ids).logits, mine)
        assert (mine - before).abs().max() > 1e-2
        for one, expected in zip(answers, evaluate_rows(prepared, loaded), strict=True):
            assert one.scores == pytest.approx(expected, abs=2e-5)


def test_a_model_is_kept_where_asked_for(values, tmp_path):
    run = run_of(values, "backbone", save_model=True)
    results = job.run(run)
    kept = loading.load(str(tmp_path / "out" / "model"), dtype="float32", device="cpu")
    prepared = job.prepare(run)
    with torch.no_grad():
        found = evaluate_rows(prepared, kept.model)
    for scores, example in zip(found[:1], results["examples"], strict=False):
        assert max(scores, key=scores.get) == example["after"]
    again = job.run(
        parse({**values, "model": {**values["model"], "name": kept.name}, "output_dir": str(tmp_path / "two")})
    )
    assert again["scores_before"] == results["scores"]
    (tmp_path / "mine" / "model").mkdir(parents=True)
    with pytest.raises(ConfigError, match="was not written by softprompts"):
        job.run(run_of(values, "backbone", save_model=True, out=tmp_path / "mine"))
    job.run(run)  # its own is replaced
    assert not list((tmp_path / "out").glob(".*"))


def test_a_run_with_a_head(values, tmp_path):
    bert = local.model_directory(tmp_path / "bert", "bert")
    values["model"] |= {"name": str(bert), "head": "sequence"}
    run = run_of(values, "lora", head_learning_rate=1e-2, eval_steps=1)
    results = job.run(run)
    assert results["summary"]["before"] is None  # a head that nobody has trained
    assert len(results["validation"]) == 3
    prepared = job.prepare(run)
    encoded = [prepared.encoders[0].example(row) for row in prepared.tasks[0].train]
    list(train(prepared.weights, encoded, run.training, seed=run.seed))
    stock = loading.load(str(bert), head="sequence", labels=2, dtype="float32", device="cpu").model  # the same start
    backbone_weights.save(prepared.weights, tmp_path / "kept")
    loaded = peft.PeftModel.from_pretrained(stock, tmp_path / "kept").eval()
    ids = torch.tensor([encoded[0].input_ids])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, prepared.weights.backbone.model(ids).logits)


def test_several_tasks_train_the_same_weights(values, tmp_path):
    task = values.pop("task")
    values["tasks"] = [{**task, "name": "one"}, {**task, "name": "two", "template": "{text}?"}]
    results = job.run(run_of(values, "lora"))
    assert [page["task"] for page in results["tasks"]] == ["one", "two"]
    assert len({page["summary"]["trainable"] for page in results["tasks"]}) == 1
    assert (tmp_path / "out" / "lora" / "adapter_model.safetensors").is_file()
    assert results["next"] == []


def test_runs_with_weights_go_one_after_the_other(values):
    for runs in (
        [{"name": "a"}, {"name": "b", "training.target": "lora"}],
        [{"name": "a", "training.target": "backbone"}],
    ):
        with pytest.raises(ConfigError, match=r"changes weights.*one after the other, each with its own --out"):
            job.run(parse({**values, "runs": runs}))


def test_a_run_that_is_broken_off_leaves_nothing(values, tmp_path):
    def stop(_, report):
        if report.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job.run(run_of(values, "lora"), job.ProgressReporter(on_step=stop))
    with pytest.raises(TrainingError):
        job.run(run_of(values, "backbone", learning_rate=1e9, max_grad_norm=None, max_steps=20))
    assert list((tmp_path / "out").iterdir()) == []


def test_the_directory_of_a_prompt_is_left_alone(values):
    job.run(parse(values))
    with pytest.raises(TrainingError, match=r"other settings \(training.target was prompt, is now lora\)"):
        job.run(run_of(values, "lora"))


def test_the_command(values, tmp_path, call):
    model, data = values["model"]["name"], values["task"]["source"]
    line = ["train", "--model", model, "--data", data, "--text", "{text}:", "--steps", 2, "--out", tmp_path / "o"]
    lora = ["--set", "training.target=lora", "--set", "training.learning_rate=1e-3"]
    status, _, err = call(*line, *lora)
    assert (status, err.count("\n")) == (1, 1)
    assert "training.learning_rate_unit: absolute" in err
    status, out, err = call(*line, *lora, "--set", "training.learning_rate_unit=absolute", "--dtype", "bfloat16")
    assert status == 0, err
    assert f"adapter  {tmp_path / 'o' / 'lora'}" in out
    assert "prompt" not in out
    assert "next:" not in out
    assert (tmp_path / "o" / "lora" / "adapter_config.json").is_file()
    status, _, err = call(*line, *lora, "--set", "training.learning_rate_unit=absolute", "--seeds", "0,1")
    assert status == 1
    assert "one after the other" in err
