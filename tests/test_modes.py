"""What a method does in training only, such as dropout, is off everywhere else."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import local
import rows
import test_together as together
import tiny
from prompted import prompted
from rows import INPUT
from softprompts import SoftPromptModel, injection, methods
from softprompts.artifacts import artifact
from softprompts.config import PromptConfig, parse
from softprompts.data import collate
from softprompts.evaluation import evaluate
from softprompts.methods import PromptMethod, fold
from softprompts.model.soft_prompt_model import open_prompts
from softprompts.recipes.run import run as job
from softprompts.training import equivalence, objectives
from softprompts.training.shared_batch import training_step
from softprompts.types import PromptInit, in_mode
from trainees import fit


class Watched(PromptMethod):
    """Prompt tuning that remembers in which mode it was asked."""

    def __init__(self, config: Any, spec: Any, init: PromptInit, shared: Any = None) -> None:
        super().__init__(config, spec, init, shared)
        self.asked: list[bool] = []
        self.prompt = torch.nn.Parameter(init.prompt.clone())
        self.inner = torch.nn.Dropout(0.5)

    def forward(self, context: Any) -> torch.Tensor:
        assert self.inner.training == self.training
        self.asked.append(self.training)
        dropped: torch.Tensor = self.inner(self.prompt)
        return dropped


def tuned(name: str = "llama") -> SoftPromptModel:
    base = together.double(name)
    spec = injection.prompt_spec(base, INPUT, 4)
    start = PromptInit(rows.random(1, 4, spec.width) + 1)
    return prompted(base, INPUT, Watched(Watched.Config(), spec, start).double())


def test_a_step_trains_and_all_else_answers() -> None:
    """In the training loop too: steps in training mode, the size of reports and validation not; modes come back."""
    model, data = tuned(), together.encoded("llama", 6, 1)
    batch, method = collate(data[:3], 0), model.prompts["a"]
    for before in (True, False):
        model.train(before)
        method.asked = []
        model.make_prompts(batch, training=False)
        training_step(model, batch)
        model.fixed_prompts(["a"])
        model.prefix_cache(["a"]).score(batch)
        assert method.asked == [False, True, False, False]
        model.rms_ratio(["a"])
        fold(method)
        assert method.asked[4:] == [False, False]
        assert (method.training, method.inner.training) == (before, before)
    method.asked = []
    scores: list[float] = []

    def validate() -> float:
        with torch.no_grad():
            scores.append(-float(objectives.task(training_step(model, batch))))
            model.make_prompts(batch)
        return scores[-1]

    config = together.config(max_steps=3, eval_steps=2)
    list(fit(model, data, config, validate=validate))
    step, size, validation = [True], [False], [True, False]
    assert method.asked == [*step, *size, *step, *validation, *size, *step, *size]


def test_the_comparison_with_concatenation_is_of_a_training_step() -> None:
    """Both ways leave out the same, so that they can be compared."""
    model = tuned()
    batch = collate(together.encoded("llama", 4, 2), 0)
    comparison = equivalence.compare(model, batch, objectives.task)
    assert set(model.prompts["a"].asked) == {True}
    assert comparison.holds, comparison


def test_a_mode_comes_back_after_an_error() -> None:
    method = tuned().prompts["a"].eval()
    with contextlib.suppress(RuntimeError), in_mode(method, True):
        assert method.inner.training
        raise RuntimeError
    assert not method.inner.training


def test_runs_evaluate_without_dropout_and_continue_with_it(tmp_path: Path) -> None:
    """With dropout an artifact scores as its run did, and a resumed run is the whole one; it makes a difference."""
    values = local.run_values(tmp_path, max_steps=4, save_steps=2, eval_steps=2)
    values["prompt"] |= {"method": "prefix-tuning", "site": "kv", "options": {"dropout": 0.5}}
    values["training"]["learning_rate"] = 0.1
    results = job.run(parse(values))
    run = parse(values)
    opened = open_prompts([tmp_path / "out" / "prompt"], config=run.model)[0]
    found = evaluate.evaluate(opened, job.prepare(run).tasks[0].test, prompt=opened.task, config=run.evaluation)
    assert found.headline.value == results["summary"]["after"]["value"]

    def stop(_: str, report: Any) -> None:
        if report.step == 3:
            raise KeyboardInterrupt

    cut = parse({**values, "output_dir": str(tmp_path / "cut")})
    with pytest.raises(KeyboardInterrupt):
        job.run(cut, job.ProgressReporter(on_step=stop))
    job.run(cut)
    whole, again = (artifact.load(tmp_path / name / "prompt") for name in ("out", "cut"))
    assert torch.equal(whole.prompt, again.prompt)
    assert torch.equal(whole.prompt, whole.state["prompt"]), "nothing is left out of what is saved"
    values["prompt"]["options"] = {}
    job.run(parse({**values, "output_dir": str(tmp_path / "plain")}))
    assert not torch.allclose(artifact.load(tmp_path / "plain" / "prompt").prompt, whole.prompt, atol=1e-4)


def test_a_model_is_in_eval_mode_until_train_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a model of transformers' from_pretrained: new, loaded and joined prompts are in the model's mode."""
    monkeypatch.setitem(methods.METHODS, "watched", f"{__name__}:Watched")
    config = PromptConfig(method="watched", num_virtual_tokens=4)
    model = SoftPromptModel(tiny.model("llama"), config, task="one")
    ids = torch.tensor([[5, 6, 7]])
    model(input_ids=ids)
    model.train()
    model(input_ids=ids)
    model.add_task("two")
    model(input_ids=ids, tasks="two")
    model.save_pretrained(tmp_path)
    assert all(part.training for part in model.prompts.modules()), "saving does not change the mode"
    model.eval()
    model.add_task("three")
    model(input_ids=ids, tasks="three")
    model.generate(ids, max_new_tokens=1, tasks="two", pad_token_id=0)
    asked = {name: method.asked for name, method in model.prompts.items()}
    folded = [False]  # where it begins, and when it is saved
    assert asked == {
        "one": [*folded, False, True, *folded],
        "two": [*folded, True, *folded, False],
        "three": [*folded, False],
    }
    again = SoftPromptModel.from_pretrained(tiny.model("llama"), tmp_path)
    assert not any(part.training for part in again.modules())


def test_a_prefix_with_dropout_answers_alike_every_time(tmp_path: Path) -> None:
    folder = local.model_directory(tmp_path / "llama")
    model = SoftPromptModel(
        transformers.AutoModelForCausalLM.from_pretrained(folder),
        PromptConfig(
            method="prefix-tuning", site="kv", num_virtual_tokens=4, options={"dropout": 0.5}, init={"kind": "random"}
        ),
    )
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        first, second = (model(input_ids=ids).logits for _ in range(2))
        assert torch.equal(first, second)
        model.train()
        torch.manual_seed(0)
        assert not torch.allclose(model(input_ids=ids).logits, first)
