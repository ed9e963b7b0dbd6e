"""The ten lines of the README: a model by name, prompts with templates, training, evaluation, artifacts both ways."""

import inspect
from pathlib import Path

import pytest
import torch

import local
import rows
import tiny
from prompted import prompted, tensors
from rows import INPUT, KV
from softprompts import injection
from softprompts.artifacts import artifact
from softprompts.backbone.kernels import Kernels
from softprompts.config import EvaluationConfig, InitConfig, ModelConfig, PromptConfig, TrainConfig
from softprompts.data import TaskTemplate, load_task
from softprompts.errors import BackboneError, ConfigError
from softprompts.evaluation import evaluate
from softprompts.methods import build, build_tasks, fold
from softprompts.model import SoftPromptModel, setup, soft_prompt_model
from softprompts.training.loop import train
from softprompts.types import PromptInit

CONFIG = EvaluationConfig(resamples=100)


def colors(folder: Path, name: str = "colors") -> object:
    """A small task that a tiny model can read."""
    from softprompts.config import TaskConfig

    task = {"source": str(local.colors(folder / f"{name}.csv", 40)), "name": name, "template": "{text}:"}
    return load_task(TaskConfig.model_validate({**task, "split": {"validation_fraction": 0.2, "test_fraction": 0.2}}))


def test_a_model_by_its_name_is_trained_evaluated_saved_and_loaded(tmp_path: Path) -> None:
    directory = local.model_directory(tmp_path / "llama")
    model = SoftPromptModel.from_pretrained(directory, config=ModelConfig(dtype="float32", threads=1))
    assert model.tasks == ()
    task = colors(tmp_path)
    config = PromptConfig(num_virtual_tokens=4, init=InitConfig(kind="labels"))
    model.add_prompt("colors", config, task.template, seed=0)
    words = model.backbone.tokenizer(" cold", add_special_tokens=False)["input_ids"]
    begin = fold(model.registry.method("colors"))
    assert torch.equal(begin[0], model.backbone.embed(torch.tensor(words)).mean(0))
    before = evaluate.evaluate(model, task.test, prompt="colors", config=CONFIG)
    stock = evaluate.evaluate(model, task.test, prompt=None, encoder=model.example_tokenizer("colors"), config=CONFIG)
    assert stock.answers != before.answers
    steps = list(train(model, {"colors": task.train}, TrainConfig(max_steps=3, batch_size=8)))
    assert len(steps) == 3
    assert not torch.equal(fold(model.registry.method("colors")), begin)
    after = evaluate.evaluate(model, task.test, prompt="colors", config=CONFIG)
    model.save_prompt("colors", tmp_path / "prompt")
    saved = artifact.load(tmp_path / "prompt")
    assert torch.equal(saved.initial, begin)
    assert saved.template == task.template.to_json()
    again = SoftPromptModel.from_pretrained(directory, config=ModelConfig(dtype="float32", threads=1))
    assert again.load_prompt(tmp_path / "prompt") == ("colors", [])
    assert evaluate.evaluate(again, task.test, prompt="colors", config=CONFIG).answers == after.answers
    # The directory of the prompt names its model.
    by_prompt = SoftPromptModel.from_pretrained(tmp_path / "prompt", config=ModelConfig(dtype="float32", threads=1))
    assert by_prompt.tasks == ("colors",)
    assert evaluate.evaluate(by_prompt, task.test, prompt="colors", config=CONFIG).answers == after.answers
    with pytest.raises(ConfigError, match="the stock model has no template"):
        evaluate.evaluate(model, task.test, prompt=None, config=CONFIG)
    model.add_prompt("bare", PromptConfig(num_virtual_tokens=2, init=InitConfig(kind="random")))
    with pytest.raises(ConfigError, match="prompt 'bare' has no template; give one to add_prompt"):
        model.example_tokenizer("bare")


def test_what_prompts_share_is_in_the_state_once_and_loads_whichever_name_it_has() -> None:
    spec = injection.prompt_spec(tiny.backbone("llama"), INPUT, 3)
    start = PromptInit(rows.random(0, 3, spec.width))
    names = ("a.b", "c")
    model, other = (
        prompted(tiny.backbone("llama"), INPUT, build_tasks("multitask-prompt-tuning", {}, spec, start, order))
        for order in (names, names[::-1])
    )
    assert list(tensors(model)) == ["a%2Eb.shared.prompt", "a%2Eb.columns", "a%2Eb.rows", "c.columns", "c.rows"] or set(
        tensors(model)
    ) == {"a%2Eb.shared.prompt", "a%2Eb.columns", "a%2Eb.rows", "c.columns", "c.rows"}
    with torch.no_grad():
        for i, parameter in enumerate(model.trainable().values()):
            parameter.copy_(rows.random(10 + i, *parameter.shape))
    state = model.state_dict()
    assert state.keys() == model.trainable().keys()
    other.load_state_dict(state)
    for name in names:
        assert torch.equal(fold(other.registry.method(name)), fold(model.registry.method(name)))
    assert other.registry.method("c").shared is other.registry.method("a.b").shared
    del state["prompts.c.rows"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: .*prompts.c.rows"):
        other.load_state_dict(state)


@torch.no_grad()
def test_the_two_doors_give_the_same_scores() -> None:
    """`score` on labeled positions and `forward` everywhere: a mixed batch, with and without prompts."""
    bb = tiny.backbone("llama")
    spec = injection.prompt_spec(bb, INPUT, 4)
    methods = {name: build("prompt-tuning", {}, spec, PromptInit(rows.random(i, 4, 32))) for i, name in enumerate("ab")}
    model = prompted(bb, INPUT, methods)
    batch = rows.batch("llama", rows.texts("llama", (5, 9, 4)))
    batch = type(batch)(batch.input_ids, batch.attention_mask, torch.tensor([1, 0, 1]), batch.labels)
    given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    scored = model.score(batch)
    logits = model(**given, task_ids=batch.task_ids).logits
    for i in range(3):
        row = logits[i][batch.attention_mask[i].bool()]
        torch.testing.assert_close(rows.of_row(scored, i)[1:], row[:-1], atol=1e-5, rtol=1e-5)
    with model.no_prompt():
        stock = model.score(batch)
        logits = model(**given).logits
    for i in range(3):
        row = logits[i][batch.attention_mask[i].bool()]
        torch.testing.assert_close(rows.of_row(stock, i), row[:-1], atol=1e-5, rtol=1e-5)


def test_prompts_of_other_sites_and_heads_are_batched_apart() -> None:
    bb = tiny.backbone("llama")
    model = prompted(
        bb, INPUT, build("prompt-tuning", {}, injection.prompt_spec(bb, INPUT, 3), PromptInit(torch.zeros(3, 32)))
    )
    model.add_prompt("deep", PromptConfig(num_virtual_tokens=3, site="kv", init=InitConfig(kind="random")))
    assert model.registry.site_of(("deep",)) == injection.Site("kv", placement="first") != KV
    batch = rows.batch("llama", rows.texts("llama", (5, 9)))
    batch = type(batch)(batch.input_ids, batch.attention_mask, torch.tensor([0, 1]), batch.labels)
    with pytest.raises(BackboneError, match="prompts that enter at different sites cannot share a batch: a at input"):
        model.score(batch)
    heads = SoftPromptModel(tiny.backbone("bert", "sequence"))
    for name in ("one", "two"):
        heads.add_prompt(name, PromptConfig(num_virtual_tokens=2, init=InitConfig(kind="random")))
    batch = type(batch)(batch.input_ids, batch.attention_mask, torch.tensor([0, 1]), torch.tensor([0, 1]))
    with pytest.raises(BackboneError, match="separate classification heads are scored one by one, given one, two"):
        heads.score(batch)
    assert heads.score(batch.rows(torch.tensor([1]))).logits.shape == (1, 3)


def test_the_message_on_other_modes_names_the_modes() -> None:
    model = SoftPromptModel(tiny.backbone("llama"))
    for mode in ("replace", "add"):
        model.add_prompt(
            mode, PromptConfig(num_virtual_tokens=3, site="layers", mode=mode, init=InitConfig(kind="random"))
        )
    with pytest.raises(BackboneError, match=r"replace at layers \(replace\), add at layers \(add\)"):
        model.registry.site_of(("replace", "add"))


def shared_model() -> SoftPromptModel:
    """A model with two prompts that share one, the first with a template."""
    model = SoftPromptModel(tiny.backbone("llama"))
    config = PromptConfig(method="multitask-prompt-tuning", num_virtual_tokens=3, init=InitConfig(kind="random"))
    model.add_prompt("first", config, TaskTemplate("first", "{text}", verbalizer={"1": "yes"}), seed=0)
    return model


def test_a_prompt_that_shares_has_its_own_template_seed_and_history() -> None:
    model = shared_model()
    model.registry.describe("first", (), {"seed": 7})
    template = TaskTemplate("second", "Text: {text}", verbalizer={"1": "no"})
    model.add_prompt("second", template=template, seed=1)
    assert torch.initial_seed() == 1  # what the method draws comes from this seed
    model.add_prompt("other", seed=2)
    assert torch.initial_seed() == 2
    records = model.registry.records
    assert records["second"].template == template
    assert records["other"].template is None
    assert (records["second"].run, records["second"].parents, records["second"].seed) == ({}, (), 1)
    with pytest.raises(ConfigError, match="'late' shares the prompt of 'first' and starts there; leave init out"):
        model.add_prompt("late", init=PromptInit(torch.zeros(3, 32)))
    assert "late" not in model.tasks


def test_a_model_inside_another_module_loads_what_it_saves() -> None:
    """As in DistributedDataParallel, whose state has a prefix."""
    nets = []
    for seed in (0, 1):
        model = shared_model()
        model.add_prompt("second", seed=seed)
        nets.append(torch.nn.Sequential(model, torch.nn.Linear(2, 2)))
    state = {name: value.clone() for name, value in nets[0].state_dict().items()}
    assert not any(name.startswith("0.model.") for name in state)
    assert nets[1].load_state_dict(state) == ([], [])
    for name in ("first", "second"):
        expected, loaded = (fold(net[0].registry.method(name)) for net in nets)
        assert torch.equal(loaded, expected)
    missing = dict(state)
    del missing[next(name for name in state if name.startswith("0.prompts.second"))]
    with pytest.raises(RuntimeError, match=r"0\.prompts\.second"):
        nets[1].load_state_dict(missing)


def test_span_models_take_the_arguments_of_all_models() -> None:
    arguments = inspect.signature(SoftPromptModel.forward).parameters
    of_spans = inspect.signature(soft_prompt_model._Spans.forward).parameters
    assert set(of_spans) <= set(arguments)
    assert {"words", "tasks", "task_ids", "prompt_places", "start_positions"} <= set(of_spans)


def test_a_named_model_without_autotune_measures_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "WORTH", 0)
    monkeypatch.setattr(setup, "measure", lambda *_: pytest.fail("measured"))
    directory = local.model_directory(tmp_path / "llama")
    config = ModelConfig(dtype="float32", threads=1)
    model = SoftPromptModel.from_pretrained(directory, config=config, autotune=False)
    assert model.backbone.kernels == Kernels()
    stock = SoftPromptModel.from_pretrained(tiny.model("llama"), autotune=False)
    assert stock._autotune is False
