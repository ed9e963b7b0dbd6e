"""Many prompts at once: runs that share every batch are, step by step, the runs that they are alone."""

import functools
import json
import os
import random
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiny
from softprompts import backbone as b
from softprompts import errors, injection
from softprompts.artifacts.io import read_tensors
from softprompts.config import InitConfig, PromptConfig, TrainConfig
from softprompts.data import EncodedExample
from softprompts.errors import ConfigError
from softprompts.injection import Site
from softprompts.methods.prompt_tuning import PromptTuning
from softprompts.model import SoftPromptModel
from softprompts.model.registry import NewPrompt, PromptRecord
from softprompts.training import checkpoint, objectives, shared_batch
from softprompts.training.checkpoint import CHECKPOINT
from softprompts.training.trainables import TrainablePrompts
from softprompts.types import IGNORE, Output, PromptInit
from trainees import Trainee, fit, train_many

STEPS = 20
DEEP = Site("layers")


def encoded(name, count, seed, tasks=1):
    """Random rows of a tiny language model: texts with a label on the last few tokens, or with targets."""
    chance = random.Random(seed)
    found = []
    for number in range(count):
        ids = [chance.randrange(5, tiny.VOCABULARY) for _ in range(chance.randint(3, 11))]
        scored = chance.randint(1, 3)
        labels = [IGNORE] * (len(ids) - scored) + ids[-scored:]
        if name in tiny.SEQ2SEQ:
            labels = [chance.randrange(5, tiny.VOCABULARY) for _ in range(scored + 1)]
        found.append(EncodedExample(ids, labels, task_id=number % tasks))
    return found


def random_start(base, site, length, seed):
    """A random prompt in float64."""
    width = injection.prompt_width(base, site)
    return torch.randn(length, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.3


def tuned(base, site, length, seed, tasks=("a",), model=None):
    """A model with prompts of prompt tuning in float64, all from one random start; or these prompts in `model`."""
    spec, start = injection.prompt_spec(base, site, length), random_start(base, site, length, seed)
    model = SoftPromptModel(base) if model is None else model
    for task in tasks:
        method = PromptTuning(PromptTuning.Config(), spec, PromptInit(start)).double()
        with torch.no_grad():
            method.prompt.copy_(start)
        record = PromptRecord(site, PromptConfig(num_virtual_tokens=length))
        model.registry.add(NewPrompt(task, method, record), base.device)
    model.task = model.tasks[0]
    return model


def run_of(name, model, rows, settings, **more):
    """A run that trains the prompts of `model` whose names begin with its own, or all where none does."""
    own = tuple(task for task in model.tasks if task.startswith(f"{name}/"))
    return Trainee(name, model, own or model.tasks, rows, settings, **more)


def config(steps=STEPS, **changes):
    return TrainConfig(
        **{"max_steps": steps, "batch_size": 4, "learning_rate": 0.05, "learning_rate_unit": "absolute", **changes}
    )


def trainees(name, site, folder=None, length=True):
    """Three runs that differ in seed, start, rows, tasks, rate, optimizer, schedule, length and batch size."""
    base = double(name)
    same = 4 if not length else None
    model = tuned(base, site, 4, 1, ("plain/a",))
    tuned(base, site, same or 6, 2, ("factored/a", "factored/b"), model)
    tuned(base, site, same or 3, 3, ("accumulated/a",), model)
    made = [
        run_of("plain", model, encoded(name, 13, 1), config()),
        run_of(
            "factored",
            model,
            encoded(name, 9, 2, tasks=2),
            config(
                optimizer="adafactor", lr_scheduler_type="constant", learning_rate=0.02, batch_size=3, weight_decay=0.01
            ),
            seed=7,
        ),
        run_of(
            "accumulated",
            model,
            encoded(name, 17, 3),
            config(
                learning_rate=0.2,
                max_grad_norm=None,
                gradient_accumulation_steps=2,
                batch_size=2,
                lr_scheduler_type="cosine",
                warmup_steps=3,
            ),
            seed=3,
        ),
    ]
    return [replace(one, directory=None if folder is None else Path(folder) / one.name) for one in made]


@functools.cache
def double(name):
    """A tiny model that computes in float64 throughout: some norms go through float32 whatever they are given."""
    model = tiny.model(name).double()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            extra = 1.0 if name.startswith("gemma") else 0.0
            eps = getattr(module, "variance_epsilon", None) or module.eps
            module.forward = functools.partial(rms_norm, module.weight, extra, eps)
    return b.wrap(model, name=name)


def rms_norm(weight, extra, eps, states):
    return states * torch.rsqrt(states.square().mean(-1, keepdim=True) + eps) * (extra + weight)


def alone(trainee):
    """The losses of a run by itself, and its prompts after every step."""
    losses, prompts = [], []
    options = {"prompts": trainee.prompts, "seed": trainee.seed, "validate": trainee.validate}
    for report in fit(trainee.model, trainee.rows, trainee.config, **options):
        losses.append(report.loss)
        prompts.append(values(trainee))
    return losses, prompts


def values(trainee):
    return torch.stack([trainee.model.registry.method(name).prompt.detach().clone() for name in trainee.prompts])


def together(runs, stop=None):
    """By name: the losses and the prompts after every step; stopped after `stop` reports."""
    losses, prompts, seen = {one.name: [] for one in runs}, {one.name: [] for one in runs}, 0
    named = {one.name: one for one in runs}
    with closing(train_many(runs)) as steps:
        for name, report in steps:
            losses[name].append(report.loss)
            prompts[name].append(values(named[name]))
            seen += 1
            if seen == stop:
                break
    return losses, prompts


def equal(found, expected):
    losses, prompts = found
    assert losses == pytest.approx(expected[0], rel=1e-9)
    assert len(prompts) == len(expected[1])
    for one, two in zip(prompts, expected[1], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-10)


CASES = [("gpt2", Site()), ("llama", Site()), ("llama", DEEP), ("llama", Site("kv")), ("gemma3", Site())]
CASES += [("t5", Site()), ("t5", Site("kv")), ("bert", Site()), ("bert", DEEP)]


@pytest.mark.golden
@pytest.mark.parametrize(("name", "site"), CASES)
def test_each_run_is_what_it_is_alone(name, site):
    losses, prompts = together(trainees(name, site))
    for one in trainees(name, site):
        before = values(one)
        equal((losses[one.name], prompts[one.name]), alone(one))
        assert len(losses[one.name]) == STEPS
        assert float((prompts[one.name][-1] - before).abs().max()) > 0.05


@pytest.mark.golden
def test_what_methods_and_objectives_draw_is_their_own(monkeypatch):
    """A method with noise and an objective with noise see the same numbers beside other runs as alone."""

    class Noisy(PromptTuning):
        def forward(self, context):
            return self.prompt + 0.1 * torch.randn_like(self.prompt)

    def noise(step):
        return objectives.task(step) * torch.rand((), dtype=torch.float64)

    monkeypatch.setitem(objectives.OBJECTIVES, "noise", noise)

    def made():
        runs = trainees("llama", Site())
        for method in runs[0].model.prompts.values():
            method.__class__ = Noisy
        return [
            replace(one, config=config(6, gradient_accumulation_steps=2, objectives={"task": 1.0, "noise": 0.5}))
            for one in runs
        ]

    losses, prompts = together(made())
    for one in made():
        equal((losses[one.name], prompts[one.name]), alone(one))
    assert len({tuple(found) for found in losses.values()}) == 3


def test_runs_that_are_done_leave_the_batch_and_change_nothing(monkeypatch):
    """One run has fewer steps, one loses patience; the third goes on as if they had never been there."""

    def made():
        plain, factored, accumulated = trainees("llama", Site())
        scores = iter([0.1, 0.3, 0.2, 0.2, 0.9])
        impatient = config(12, eval_steps=2, early_stopping_patience=2)
        return [
            replace(plain, config=config(3)),
            replace(factored, config=impatient, validate=lambda: next(scores)),
            accumulated,
        ]

    rows, original = [], TrainablePrompts.loss

    def counted(trainable, batches):
        rows.append([len(batch.examples) for batch in batches])
        return original(trainable, batches)

    monkeypatch.setattr(TrainablePrompts, "loss", counted)
    runs = made()
    losses, prompts = together(runs)
    assert [len(losses[one.name]) for one in runs] == [3, 8, STEPS]
    assert [len(parts) for parts in rows[:4]] == [3, 1, 3, 1]  # the second part of a step is the accumulating run's
    assert [len(parts) for parts in rows[6:10]] == [2, 1, 2, 1]
    assert {len(parts) for parts in rows[16:]} == {1}
    assert torch.equal(values(runs[1]), prompts["factored"][3])  # the best of its validations was the second
    for one in made():
        equal((losses[one.name], prompts[one.name]), alone(one))


def snapshots(folder, runs, after):
    """The checkpoint folders as they lie on the disk after so many reports: what a kill at that moment leaves."""
    with closing(train_many(runs)) as steps:
        for number, _ in enumerate(steps, 1):
            if number in after:
                shutil.copytree(folder, folder.with_name(f"killed-{number}"))


@pytest.mark.golden
def test_killed_runs_go_on_bit_for_bit(tmp_path):
    """Runs of different lengths and checkpoint intervals, killed at several moments, in the middle of a step too."""

    def made(folder):
        plain, factored, accumulated = trainees("llama", Site(), folder)
        return [
            replace(plain, config=config(9, save_steps=4)),
            replace(factored, config=factored.config.model_copy(update={"max_steps": 6, "save_steps": 5})),
            replace(accumulated, config=accumulated.config.model_copy(update={"max_steps": 12, "save_steps": 50})),
        ]

    moments = (1, 14, 16, 21, 25)
    (tmp_path / "whole").mkdir()
    snapshots(tmp_path / "whole", made(tmp_path / "whole"), moments)
    whole = {one.name: read_tensors(tmp_path / "whole" / one.name / CHECKPOINT)[0] for one in made(tmp_path)}
    assert [int(tensors["optimizer.prompts.a.prompt.step"]) for tensors in whole.values()] == [9, 6, 12]
    began = []
    for moment in moments:
        folder = tmp_path / f"killed-{moment}"
        files = [folder / one.name / CHECKPOINT for one in made(folder)]
        began.append([json.loads(read_tensors(f)[1]["facts"])["step"] if f.exists() else 0 for f in files])
        together(made(folder))
        for one in made(folder):
            again = read_tensors(folder / one.name / CHECKPOINT)[0]
            assert again.keys() == whole[one.name].keys()
            for key, tensor in again.items():
                assert torch.equal(tensor, whole[one.name][key]), (moment, one.name, key)
    assert began == [[0, 0, 0], [5, 5, 5], [6, 6, 6], [8, 6, 8], [9, 6, 9]]


def test_an_interrupted_run_goes_on_where_it_was(tmp_path):
    whole, prompts = together(trainees("gpt2", Site()))
    together(trainees("gpt2", Site(), tmp_path), stop=8)  # in the middle of the third step's reports
    for one in trainees("gpt2", Site(), tmp_path):
        assert json.loads(read_tensors(one.directory / CHECKPOINT)[1]["facts"])["step"] == 3
    runs = trainees("gpt2", Site(), tmp_path)
    losses, _ = together(runs)
    assert losses == whole
    for one in runs:
        assert torch.equal(values(one), prompts[one.name][-1])


@pytest.mark.parametrize(("cut", "step"), [("staging", 1), ("renaming", 2)])
def test_a_joint_write_that_is_cut_is_undone_or_finished(tmp_path, monkeypatch, cut, step):
    """All three runs stand at the same step again, whichever file was the last to be written."""
    runs = [replace(one, config=config(2, save_steps=1)) for one in trainees("gpt2", Site(), tmp_path)]
    write, rename, done = checkpoint.write_tensors, os.replace, []

    def staging(file, *arguments):
        done.append(file)
        if len(done) == 3 + 2:
            raise RuntimeError("killed")
        write(file, *arguments)

    def renaming(source, target):
        done.append(source)
        if len(done) == 3 + 2:
            raise RuntimeError("killed")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_tensors", staging) if cut == "staging" else None
        patch.setattr(checkpoint, "_rename", renaming) if cut == "renaming" else None
        with pytest.raises(RuntimeError, match="killed"):
            together(runs)
    files = [one.directory / CHECKPOINT for one in runs]
    checkpoint.recover(files)
    assert [json.loads(read_tensors(file)[1]["facts"])["step"] for file in files] == [step] * 3
    assert not list(tmp_path.rglob(checkpoint.STAGED))


def collect(runs, losses):
    for name, report in train_many(runs):
        losses.setdefault(name, []).append(report.loss)


def poison(monkeypatch, when):
    """An objective that is not a number, gradients and all, from its call number `when` on."""

    def poisoned(step):
        poisoned.calls += 1
        return objectives.task(step) * (float("nan") if poisoned.calls >= when else 1.0)

    poisoned.calls = 0
    monkeypatch.setitem(objectives.OBJECTIVES, "poison", poisoned)
    return {"task": 1.0, "poison": 1.0}


@pytest.mark.parametrize(("name", "site"), [("llama", Site()), ("llama", Site("kv")), ("t5", Site())])
def test_a_run_whose_loss_is_no_number_harms_no_other(tmp_path, monkeypatch, name, site):
    def made(folder=None):
        runs = trainees(name, site, folder)
        bad = replace(runs[1], config=runs[1].config.model_copy(update={"objectives": weights}))
        return [runs[0], bad, runs[2]]

    weights = poison(monkeypatch, 5)
    losses, runs = {}, made(tmp_path)
    with pytest.raises(
        errors.TrainingError, match=r"run 'factored': the loss of step 5 is not a number; .*step 3"
    ) as e:
        collect(runs, losses)
    assert list(e.value.failed) == ["factored"]
    assert [len(found) for found in losses.values()] == [STEPS, 4, STEPS]
    poison(monkeypatch, 999)
    good = replace(made()[1], config=made()[1].config.model_copy(update={"max_steps": 3}))
    assert losses["factored"][:3] == pytest.approx(alone(good)[0], rel=1e-9)
    torch.testing.assert_close(values(runs[1]), values(good), rtol=1e-9, atol=1e-10)
    kept = read_tensors(runs[1].directory / CHECKPOINT)[0]
    assert torch.equal(kept["prompts.a.prompt"], values(runs[1])[0])
    for one, two in zip(trainees(name, site), runs, strict=True):
        if one.name == "factored":
            continue
        alone(one)
        torch.testing.assert_close(values(two), values(one), rtol=1e-9, atol=1e-10)
    # Called again, it is not tried again: what was is said again, and nothing is trained.
    with pytest.raises(errors.TrainingError, match="run 'factored': the loss of step 5 is not a number"):
        list(train_many(made(tmp_path)))


def test_inf_in_one_prompt_stays_there():
    """The rows of a run whose values overflow stand in the same pass as those of the others."""
    runs = trainees("llama", Site())
    with torch.no_grad():
        runs[1].model.prompts["factored/a"].prompt.fill_(float("inf"))
    with pytest.raises(errors.TrainingError, match="run 'factored'"):
        together(runs)
    first = trainees("llama", Site())[0]
    alone(first)
    torch.testing.assert_close(values(runs[0]), values(first), rtol=1e-9, atol=1e-10)


def test_what_cannot_share_a_batch_is_refused():
    plain, factored, _ = trainees("llama", Site())
    tuned(double("llama"), DEEP, 4, 1, ("deep/a",), plain.model)
    deep = run_of("deep", plain.model, plain.rows, config())
    with pytest.raises(ConfigError, match=r"'plain' and 'deep' differ in the name of their site \(input, layers\)"):
        next(train_many([plain, deep]))
    with pytest.raises(ConfigError, match="names that differ, given plain, plain"):
        next(train_many([plain, replace(factored, name="plain")]))
    with pytest.raises(ConfigError, match="run 'empty' has no rows"):
        next(train_many([plain, replace(factored, name="empty", rows=[])]))
    base = b.wrap(tiny.model("bert", "sequence"))
    model = SoftPromptModel(base)
    for name in ("0/a", "1/a"):
        model.add_prompt(name, PromptConfig(num_virtual_tokens=4, init=InitConfig(kind="random")))
    runs = [run_of(name, model, [EncodedExample([1, 7, 8], 1)], config(1)) for name in ("0", "1")]
    with pytest.raises(ConfigError, match=r"its own classification head.*one after the other"):
        next(train_many(runs))


def test_scores_find_their_run_in_any_order():
    """Rows 0-1 are the first run's, 2 the second's, 3-4 the third's; scores come in no order."""
    row = torch.tensor([4, 0, 2, 3, 1, 0])
    output = Output(torch.arange(6.0)[:, None], 10 + torch.arange(6), row, label_columns=torch.arange(6), path="packed")
    found = shared_batch.split_output(output, [2, 1, 2])
    assert [one.batch_rows.tolist() for one in found] == [[0, 1, 0], [0], [1, 0]]
    assert [one.labels.tolist() for one in found] == [[11, 14, 15], [12], [10, 13]]
    assert [one.logits[:, 0].tolist() for one in found] == [[1, 4, 5], [2], [0, 3]]
    assert [one.label_columns.tolist() for one in found] == [[1, 4, 5], [2], [0, 3]]
    assert {one.path for one in found} == {"packed"}


def test_only_labels_that_are_scored_count():
    """At site kv no state scores a causal text's first token, so parts would otherwise get a wrong share."""
    row = EncodedExample([5, 6, 7], [5, 6, IGNORE])
    base = double("llama")
    counts = {site: shared_batch.label_count(row, base, Site(site)) for site in ("input", "kv")}
    assert counts == {"input": 2, "kv": 1}
    assert shared_batch.label_count(replace(row, prompt_offsets=1), base, Site()) == 1
    assert shared_batch.label_count(row, base, None) == 1
    assert shared_batch.label_count(EncodedExample([5], 2), base, Site()) == 1


@pytest.mark.golden
@pytest.mark.parametrize("site", [Site(), Site("kv")])
def test_accumulated_halves_equal_one_batch(site):
    """An epoch of eight rows in one batch, and in two halves with unequal numbers of labels."""
    rows = encoded("llama", 8, 4)
    rows[0] = EncodedExample(rows[0].input_ids, rows[0].input_ids)
    runs = [
        run_of(
            f"{size}",
            tuned(double("llama"), site, 4, 1),
            rows,
            config(10, batch_size=size, gradient_accumulation_steps=8 // size),
        )
        for size in (8, 4, 2)
    ]
    expected = alone(runs[0])
    for one in runs[1:]:
        equal(alone(one), expected)
