"""The methods that fold to one matrix through everything: runs, resume, artifacts, PEFT, mixed batches, the command."""

import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import yaml

import local
import rows
import tiny
from closeness import assert_close
from prompted import method_of
from softprompts import SoftPromptModel, assets, injection, methods
from softprompts.artifacts import artifact
from softprompts.cli import listing
from softprompts.config import PromptConfig, parse
from softprompts.config.sweep import grid, sweep
from softprompts.errors import BackboneError, ConfigError
from softprompts.evaluation import evaluate
from softprompts.methods import PromptMethod, fold
from softprompts.model.soft_prompt_model import open_prompts
from softprompts.recipes.run import run as job
from softprompts.recipes.run.prepare import prepare_many
from softprompts.types import PromptInit, PromptSpec

PROMPTS: dict[str, dict[str, Any]] = {
    "prefix": {"method": "prefix-tuning", "site": "kv"},
    "network": {"method": "prefix-tuning", "site": "kv", "options": {"reparametrize": True, "hidden": 8}},
    "states": {"method": "p-tuning-v2", "site": "layers", "options": {"dropout": 0.1}},
    "lstm": {"method": "p-tuning"},
    "mlp": {"method": "p-tuning", "options": {"network": "mlp"}, "init": {"kind": "zeros"}},
    "residual": {"method": "residual", "options": {"bottleneck": 8}},
    "tokens": {"method": "residual", "options": {"bottleneck": 8, "per_token": True}},
    "low": {"method": "low-rank", "options": {"rank": 3}},
}
RATES = {"network": 0.01, "output": 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and its data."""
    found = tmp_path_factory.mktemp("deep")
    local.run_values(found)
    return found


def values(folder: Path, out: Path, prompt: dict[str, Any], **train: Any) -> dict[str, Any]:
    """The configuration of a small run of a method."""
    known = [name for name in methods.find(prompt["method"]).groups if name in RATES]
    return {
        "model": {"name": str(folder / "llama"), "dtype": "float32", "threads": 1},
        "prompt": {"num_virtual_tokens": 4, **prompt},
        "task": {
            "source": str(folder / "colors.csv"),
            "name": "colors",
            "template": "{text}:",
            "split": {"validation_fraction": 0.2, "test_fraction": 0.2},
        },
        "training": {"max_steps": 4, "batch_size": 8, "learning_rate": 0.5, "save_steps": 2}
        | {"learning_rates": {name: RATES[name] for name in known}}
        | train,
        "evaluation": {"resamples": 100},
        "output_dir": str(out),
    }


def stopped(_: str, report: Any) -> None:
    if report.step == 3:
        raise KeyboardInterrupt


@pytest.mark.parametrize("case", PROMPTS)
def test_a_run_its_artifact_and_its_resumption(folder: Path, tmp_path: Path, case: str) -> None:
    """What is kept is a plain prompt that answers as the run did; a cut run goes on to the very same."""
    run = parse(values(folder, tmp_path / "out", PROMPTS[case]))
    results = job.run(run)
    made = artifact.load(tmp_path / "out" / "prompt")
    ready = job.prepare(run)
    assert made.method == run.prompt.method
    assert made.shape == made.prompt.shape == (4, method_of(ready).spec.width)
    assert float((made.prompt - made.initial).abs().max()) > 1e-3
    if case != "low":
        assert torch.equal(made.initial, ready.init.prompt)
    assert results["summary"]["trainable"] == sum(p.numel() for p in method_of(ready).parameters())
    assert ("nearest_words" in results) == (run.prompt.site == "input")
    opened = open_prompts([tmp_path / "out" / "prompt"], config=run.model)[0]
    found = evaluate.evaluate(opened, ready.tasks[0].test, prompt=opened.task, config=run.evaluation)
    assert found.headline.value == results["summary"]["after"]["value"]
    assert artifact.inspect(tmp_path / "out" / "prompt")["parameters"] == results["summary"]["trainable"]
    method_of(ready).load_state_dict(made.state)
    assert torch.equal(fold(method_of(ready)), made.prompt)
    cut = parse(values(folder, tmp_path / "cut", PROMPTS[case]))
    with pytest.raises(KeyboardInterrupt):
        job.run(cut, job.ProgressReporter(on_step=stopped))
    job.run(cut)
    again = artifact.load(tmp_path / "cut" / "prompt")
    assert made.state.keys() == again.state.keys()
    assert all(torch.equal(made.state[key], again.state[key]) for key in made.state)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("case", ["lstm", "residual", "low"])
def test_peft_loads_the_folded_prompt(folder: Path, tmp_path: Path, case: str) -> None:
    job.run(parse(values(folder, tmp_path / "out", PROMPTS[case], max_steps=2)))
    stock = transformers.AutoModelForCausalLM.from_pretrained(folder / "llama")
    theirs = peft.PeftModel.from_pretrained(stock, tmp_path / "out" / "prompt").eval()
    model = SoftPromptModel(transformers.AutoModelForCausalLM.from_pretrained(folder / "llama"))
    model.load_prompt(tmp_path / "out" / "prompt")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=ids).logits[:, 4:], model(input_ids=ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "site"), [("t5", "kv"), ("bert", "layers"), ("t5", "layers")])
def test_other_families(tmp_path: Path, name: str, site: str) -> None:
    run = local.run_values(tmp_path, name, max_steps=2)
    run["prompt"] |= {"method": "p-tuning-v2", "site": site, "options": {"reparametrize": True, "hidden": 8}}
    run["task"]["template"] = "{text}: {mask}" if name == "bert" else "{text}:"
    results = job.run(parse(run))
    opened = open_prompts([tmp_path / "out" / "prompt"], config=parse(run).model)[0]
    found = evaluate.evaluate(
        opened, job.prepare(parse(run)).tasks[0].test, prompt=opened.task, config=parse(run).evaluation
    )
    assert found.headline.value == results["summary"]["after"]["value"]


def test_two_tasks_are_apart_and_go_on_from_a_trained_one(folder: Path, tmp_path: Path) -> None:
    """Each task's artifact holds its own network, loads alone, and lets every task of another run begin there."""
    both = values(folder, tmp_path / "out", PROMPTS["network"], max_steps=2)
    task = both.pop("task")
    both["tasks"] = [{**task, "name": "one"}, {**task, "name": "two", "template": "{text}?"}]
    job.run(parse(both))
    one, two = (artifact.load(tmp_path / "out" / "prompt" / name) for name in ("one", "two"))
    names = ("start", "inputs", "hidden.weight", "hidden.bias", "output.weight", "output.bias")
    assert sorted(one.state) == sorted(f"network.{name}" for name in names)
    assert not torch.equal(one.state["network.inputs"], two.state["network.inputs"])
    model = SoftPromptModel(transformers.AutoModelForCausalLM.from_pretrained(folder / "llama"))
    model.load_prompt(tmp_path / "out" / "prompt" / "two")
    assert torch.equal(fold(model.prompts["two"]), two.prompt)
    both["prompt"]["init"] = {"state": str(tmp_path / "out" / "prompt" / "two")}
    ready = job.prepare(parse(both))
    begun = [method_of(ready, i) for i in range(2)]
    assert all(torch.equal(fold(method), two.prompt) for method in begun)
    assert begun[0].network.inputs is not begun[1].network.inputs
    both["prompt"]["options"] = {"reparametrize": True, "hidden": 7}
    with pytest.raises(ConfigError, match=r"a tensor 'network.hidden.bias' of \[8\] .* one of \[7\]"):
        job.prepare(parse(both))


def test_a_batch_of_several_methods(folder: Path, tmp_path: Path) -> None:
    """Rows with prefixes of several methods and lengths are the rows alone; groups are saved, loaded, made smaller."""
    path, deep = folder / "llama", {"site": "kv", "init": {"kind": "random"}}
    model = SoftPromptModel(transformers.AutoModelForCausalLM.from_pretrained(path))
    network = {"method": "prefix-tuning", "options": {"reparametrize": True, "hidden": 8, "output": "torch"}}
    model.add_tasks(("one", "two", "three"), PromptConfig(num_virtual_tokens=4, **network, **deep))
    model.add_task("plain", PromptConfig(num_virtual_tokens=6, **deep))
    model.add_task("low", PromptConfig(num_virtual_tokens=2, method="low-rank", **deep))
    model.add_task(
        "residual", PromptConfig(num_virtual_tokens=3, method="residual", options={"output": "torch"}, **deep)
    )
    tasks, ids = ["plain", "two", "low", "residual", "one"], rows.ids(3, 30).view(5, 6)

    def alike(one: Any, names: list[str]) -> torch.Tensor:
        with torch.no_grad():
            together = one(input_ids=ids[: len(names)], tasks=names).logits
            for i, name in enumerate(names):
                alone = one(input_ids=ids[i : i + 1], tasks=name).logits[0]
                torch.testing.assert_close(together[i], alone, atol=1e-5, rtol=1e-5)
        return together

    expected = alike(model, tasks)
    model.save_pretrained(tmp_path)
    again = SoftPromptModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(path), tmp_path)
    assert torch.equal(alike(again, tasks), expected)
    again.remove_task("two")
    tasks[1] = "three"
    assert_close(alike(again, tasks)[4], expected[4])
    assert again.tasks == ("one", "three", "plain", "low", "residual")


class Matrix(torch.nn.Module):
    """A matrix that tasks share."""

    def __init__(self, matrix: torch.Tensor) -> None:
        super().__init__()
        self.matrix = torch.nn.Parameter(matrix.clone())


class Shared(PromptMethod):
    """A method whose tasks share a matrix and each have a module; it says nothing of itself."""

    def __init__(self, config: Any, spec: PromptSpec, init: PromptInit, shared: Any = None) -> None:
        super().__init__(config, spec, init, shared)
        self.part = torch.nn.Linear(spec.width, 1)

    @classmethod
    def share(cls, config: Any, spec: PromptSpec, init: PromptInit, tasks: Any) -> Matrix:
        return Matrix(init.prompt)

    def forward(self, context: Any) -> torch.Tensor:
        matrix = self.shared.matrix
        prompt: torch.Tensor = matrix + self.part(matrix)
        return prompt


def test_tasks_with_modules_of_their_own_that_share_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Joined, saved, loaded together and removed as those with parameters of their own are, in the model's mode."""
    monkeypatch.setitem(methods.METHODS, "shared", f"{__name__}:Shared")
    model = SoftPromptModel(tiny.model("llama"), PromptConfig(method="shared", num_virtual_tokens=3), task="one")
    model.add_task("two")
    assert model.registry.group("one") == ("one", "two")
    assert not any(part.training for part in model.prompts.modules())
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    with torch.no_grad():
        before = model(input_ids=ids, tasks=["two", "one"]).logits
        model.save_pretrained(tmp_path)
        again = SoftPromptModel.from_pretrained(tiny.model("llama"), tmp_path)
        assert torch.equal(again(input_ids=ids, tasks=["two", "one"]).logits, before)
        again.remove_task("one")
        assert_close(again(input_ids=ids[:1]).logits[0], before[0])
    assert again.registry.group("two") == ("two",)
    assert sorted(artifact.load(tmp_path / "two").state) == ["part.bias", "part.weight", "shared.matrix"]


# What is refused, and what is told


@pytest.mark.parametrize(
    ("name", "prompt", "error", "message"),
    [
        (
            "llama",
            {"method": "prefix-tuning"},
            ConfigError,
            "prefix-tuning cannot be used at site 'input'.*: kv, layers",
        ),
        ("llama", {"method": "p-tuning", "site": "kv"}, ConfigError, "p-tuning cannot be used at site 'kv'.*: input"),
        ("bert", PROMPTS["prefix"], BackboneError, "'kv' is not possible for masked models; .*'layers' puts a prompt"),
        ("llama", {"method": "residual", "site": "decoder"}, BackboneError, "'decoder' is not possible for causal"),
        ("llama", {"method": "residal"}, ConfigError, "unknown method 'residal'; did you mean 'residual'"),
        ("llama", {"method": "low-rank", "options": {"ranks": 3}}, ConfigError, "low-rank: .*'ranks'"),
    ],
)
def test_what_cannot_be_is_said_before_training(
    tmp_path: Path, name: str, prompt: dict[str, Any], error: type[Exception], message: str
) -> None:
    run = local.run_values(tmp_path, name)
    run["prompt"] |= prompt
    run["task"]["template"] = "{text}: {mask}" if name == "bert" else "{text}:"
    with pytest.raises(error, match=message):
        job.prepare(parse(run))
    config = parse({"prompt": {"num_virtual_tokens": 3, **prompt, "init": {"kind": "random"}}}).prompt
    with pytest.raises(error, match=message):
        SoftPromptModel(tiny.model(name), config)


def test_a_rate_that_changes_nothing_is_told(folder: Path, tmp_path: Path) -> None:
    """Where all parameters have rates of their own; nothing is said where one has none, or no rate was set."""
    said: dict[str, list[str]] = {}
    for name, prompt, changes in (
        ("network", PROMPTS["network"], {}),
        ("mlp", PROMPTS["mlp"], {}),
        ("prefix", PROMPTS["prefix"], {}),
        ("residual", PROMPTS["residual"], {}),
        ("all", PROMPTS["residual"], {"learning_rates": {"prompt": 0.1}}),
        ("unset", PROMPTS["network"], None),
    ):
        run = values(folder, tmp_path / name, prompt, **(changes or {}))
        if changes is None:
            del run["training"]["learning_rate"]
        lines: list[str] = []
        job.prepare(parse(run), job.ProgressReporter(log=lines.append))
        said[name] = [line for line in lines if line.startswith("training.learning_rate")]
    every = (
        "training.learning_rate changes nothing: all parameters of method {} have separate rates, "
        "training.learning_rates: {}"
    )
    assert said == {
        "network": [every.format("prefix-tuning", "network")],
        "mlp": [every.format("p-tuning", "network, output")],
        "all": [every.format("residual", "prompt, network")],
        "prefix": [],
        "residual": [],
        "unset": [],
    }
    lines.clear()
    for seeds in ({}, {"training.learning_rate": [0.2]}):
        together = sweep(grid(parse(run), {"seed": [0, 1], **seeds}))
        prepare_many(together, job.ProgressReporter(log=lines.append))
        told = [line.partition(": ")[2] for line in lines if "training.learning_rate" in line]
        assert told == [every.format("prefix-tuning", "network")] * (2 if seeds else 0)


# The command


def test_the_command(folder: Path, tmp_path: Path, call: Callable[..., Any]) -> None:
    """Trains from YAML, and every command takes the artifact; a wrong site is one line."""
    run = values(folder, tmp_path / "out", PROMPTS["network"], max_steps=2)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    status, _, err = call("train", "--config", tmp_path / "run.yaml")
    assert status == 0, err
    prompt = tmp_path / "out" / "prompt"
    status, out, err = call("evaluate", prompt, "--json")
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert json.loads(out)["scores"]["accuracy"]["value"] == saved["summary"]["after"]["value"], err
    assert json.loads(call("predict", prompt, "the thing is red")[1])["answer"] in ("warm", "cold")
    assert call("generate", prompt, "the thing is", "--max-new-tokens", "3")[0] == 0
    assert json.loads(call("inspect", prompt, "--json")[1])["plain_prompt"] is True
    assert call("fold", prompt, "--out", tmp_path / "plain")[0] == 0
    assert torch.equal(artifact.load(tmp_path / "plain").prompt, artifact.load(prompt).prompt)
    assert artifact.load(tmp_path / "plain").method == "prompt-tuning"
    status, _, err = call("train", "--config", tmp_path / "run.yaml", "--set", "prompt.site=input")
    assert status == 1
    assert [line for line in err.splitlines() if line.startswith("error: ")] == [
        "error: method prefix-tuning cannot be used at site 'input'; set prompt.site to one of: kv, layers"
    ]


def test_the_list_of_methods(call: Callable[..., Any]) -> None:
    """Papers, sizes by their formulas, sites; of the default model, which need not be loaded."""
    found = json.loads(call("methods", "--json")[1])
    assert found.keys() == methods.METHODS.keys()
    assert all(row["paper"] and row["sites"] and row["about"] for row in found.values())
    look = ["attempt", "ipt", "idpg", "spt-reconstruction"]
    assert [name for name, row in found.items() if row["input_dependent"]] == look
    assert {name for name, row in found.items() if not row["folds"]} == {*look, "dept"}  # which changes the text
    sizes = {name: row["trained"]["numbers"] for name, row in found.items()}
    assert sizes == {
        "prompt-tuning": 20 * 576,
        "multitask-prompt-tuning": 20 * 576 + 20 + 576,
        "attempt": 20 * 576 + 2 * 100 * 576 + 2 * 576,
        "prefix-tuning": 20 * 30 * 2 * 3 * 64,
        "p-tuning-v2": 20 * 30 * 2 * 3 * 64,
        "p-tuning": 4_666_752,
        "residual": 20 * 576 + 2 * 800 * 576 + 800 + 3 * 576,
        "low-rank": 10 * (20 + 576),
        "ipt": 49152 * 576,
        "idpg": 2 * 16**3 + 576 * 256 // 16 + 256 * 20 * 576 // 16 + 20 * 576 + 256,
        "dept": 20 * 576 + 45 * (256 + 576),
        "spt-reconstruction": (20 - 5) * 576,
    }
    assert {name: row["trained"]["site"] for name, row in found.items() if row["sites"][0] != "input"} == {
        "prefix-tuning": "kv",
        "p-tuning-v2": "kv",
    }
    longer = json.loads(call("methods", "--length", "100", "--json")[1])
    assert longer["prompt-tuning"]["trained"]["numbers"] == 57_600
    status, out, _ = call("methods")
    assert status == 0
    assert "prefix-tuning" in out
    assert "230,400 at kv" in out
    status, _, err = call("methods", "--length", "0")
    assert status == 1
    assert "--length must be 1 or more, given 0" in err


@pytest.mark.parametrize(("name", "site", "width"), [("llama", "kv", 96), ("t5", "kv", 128), ("bert", "layers", 96)])
def test_the_list_for_a_model(call: Callable[..., Any], tmp_path: Path, name: str, site: str, width: int) -> None:
    """Counted at the first site of a method that the model has."""
    model = local.model_directory(tmp_path / name, name)
    status, out, err = call("methods", "--model", model, "--length", "5", "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found["prompt-tuning"]["trained"] == {"site": "input", "numbers": 5 * 32}
    assert found["prefix-tuning"]["trained"] == {"site": site, "numbers": 5 * width}
    assert found["spt-reconstruction"]["trained"] is None
    assert found["spt-reconstruction"]["why"].startswith("k 5 leaves no room for a trained prompt")
    assert "k 5 leaves no room" in " ".join(call("methods", "--model", model, "--length", "5")[1].split())
    status, _, err = call("methods", "--model", model, "--length", "500")
    assert (status, "leaves no room for text" in err) == ((1, True) if name != "t5" else (0, False))


def test_methods_of_others_are_listed(call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that say nothing of themselves, and those that cannot be built without more."""

    class Needing(Shared):
        """Needs what nobody gives it."""

        def __init__(self, *_: Any) -> None:
            raise KeyError("a file")

    monkeypatch.setattr(f"{__name__}.Needing", Needing, raising=False)
    entries = [types.SimpleNamespace(name=kind.lower(), value=f"{__name__}:{kind}") for kind in ("Shared", "Needing")]
    monkeypatch.setattr(
        methods.registry, "entry_points", lambda group, name=None: [e for e in entries if name in (None, e.name)]
    )
    found = json.loads(call("methods", "--json")[1])
    assert found["shared"] == {
        "about": "A method whose tasks share a matrix and each have a module; it says nothing of itself.",
        "paper": None,
        "sites": ["input", "decoder", "layers", "kv"],
        "folds": True,
        "input_dependent": False,
        "trained": {"site": "input", "numbers": 20 * 576 + 577},
        "why": None,
    }
    assert found["needing"]["trained"] is None
    assert "needing" in call("methods")[1]


@pytest.mark.assets
def test_the_facts_of_the_default_model() -> None:
    config = transformers.AutoConfig.from_pretrained(assets.fetch(listing.DEFAULT))
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (
        listing.WIDTH,
        listing.LAYERS,
        listing.VOCABULARY,
    )
    assert 2 * config.num_key_value_heads * config.head_dim == listing.KEYS


def test_slots_are_those_of_models() -> None:
    """The widths that are worked out without a model are what a model of these facts has."""
    bb = tiny.backbone("llama")
    facts = (listing.WIDTH, listing.LAYERS, listing.KEYS)
    for site in ("input", "layers", "kv"):
        slot, own = injection.prompt_spec(bb, injection.Site(site), 5), listing._default_spec(site, 5)
        parts = {"input": (facts[0], 32), "layers": (facts[1] * facts[0], 96), "kv": (facts[1] * facts[2], 96)}[site]
        assert (own.width, slot.width) == parts
        assert len(own.layers) == (0 if site == "input" else facts[1])
        assert (sum(own.layers) or own.width) == own.width
    assert listing._default_spec("decoder", 5) is None
