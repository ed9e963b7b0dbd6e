"""Training and judging are told apart: what a method does in training only, such as dropout, is off everywhere else."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from softprompts.model.learner import Learner

import local
import rows
import test_together as together
import tiny
from rows import INPUT
from softprompts import SoftPromptModel, injection, methods
from softprompts.artifacts import artifact
from softprompts.config import PromptConfig, parse
from softprompts.data import collate
from softprompts.evaluation import evaluate
from softprompts.model import stored
from softprompts.model.soft_prompt_model import open_prompts
from softprompts.recipes.run import run as job
from softprompts.training import equivalence, objectives
from softprompts.types import Prompt, PromptInit, in_mode
from trainees import train


class Watched(torch.nn.Module):
    """Prompt tuning of one task that remembers in which mode it was asked; its dropout does not know about modes."""

    per_task = ("prompts",)

    @dataclass(frozen=True)
    class Config:
        """Nothing to choose."""

    def __init__(self, config: Config, slot: Any, start: PromptInit) -> None:
        super().__init__()
        self.slot, self.asked, self.folded = slot, [], []
        self.prompts = torch.nn.ParameterList(start.prompt.clone() for _ in slot.tasks)
        self.inner = torch.nn.Dropout(0.5)

    def forward(self, context: Any) -> Prompt:
        assert self.inner.training == self.training
        self.asked.append(self.training)
        mask = torch.ones(1, self.slot.length, dtype=torch.bool)
        return Prompt(self.inner(self.prompts[0])[None], mask, torch.zeros_like(context.task))

    def fold(self, task: str) -> torch.Tensor:
        self.folded.append(self.training)
        return self.inner(self.prompts[self.slot.tasks.index(task)]).detach().clone()


def learner(name: str = "llama") -> Learner:
    base = together.double(name)
    slot = injection.prompt_spec(base, INPUT, 4)
    return Learner(base, INPUT, slot, Watched(Watched.Config(), slot, PromptInit(rows.random(1, 4, slot.width) + 1)))


def test_a_step_trains_and_all_else_judges() -> None:
    """In the training loop too: steps in training mode, the size of reports and validation not; modes come back."""
    one, data = learner(), together.encoded("llama", 6, 1)
    batch = collate(data[:3], 0)
    method = one.method
    for before in (True, False):
        method.train(before)
        method.asked, method.folded = [], []
        one.prompt(batch)
        one.step(batch)
        one.fixed([0])
        one.reader([0]).forward(batch)
        assert method.asked == [False, True, False, False]
        one.rms_ratio()
        stored.folded(method, "a")
        assert method.folded == [False, False]
        assert (method.training, method.inner.training) == (before, before)
    method.asked = []
    scores: list[float] = []

    def validate() -> float:
        with torch.no_grad():
            scores.append(-float(objectives.task(one.step(batch))))
            one.prompt(batch)
        return scores[-1]

    config = together.config(max_steps=3, eval_steps=2)
    list(train(one, data, config, validate=validate))
    assert method.asked == [True, True, True, False, True], "two steps, a validation that makes a step, the last step"
    assert not any(method.folded)


def test_the_comparison_with_concatenation_is_of_a_training_step() -> None:
    """Both ways leave out the same, so that they can be compared."""
    one = learner()
    one = Learner(one.backbone, INPUT, one.slot, one.method.double())
    batch = collate(together.encoded("llama", 4, 2), 0)
    found = equivalence.compare(one, batch, objectives.task)
    assert set(one.method.asked) == {True}
    assert found.holds, found


def test_a_mode_comes_back_after_an_error() -> None:
    method = learner().method.eval()
    with contextlib.suppress(RuntimeError), in_mode(method, True):
        assert method.inner.training
        raise RuntimeError
    assert not method.inner.training


def test_runs_judge_without_dropout_and_go_on_with_it(tmp_path: Path) -> None:
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
    assert torch.equal(whole.prompt, whole.state["prompts.0"]), "nothing is left out of what is saved"
    values["prompt"]["options"] = {}
    job.run(parse({**values, "output_dir": str(tmp_path / "plain")}))
    assert not torch.allclose(artifact.load(tmp_path / "plain" / "prompt").prompt, whole.prompt, atol=1e-4)


def test_a_model_judges_until_it_is_told_to_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert asked == {"one": [False, True], "two": [True, False], "three": [False]}
    assert not any(flag for method in model.prompts.values() for flag in method.folded)
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
