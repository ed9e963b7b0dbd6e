"""Training: pure data order, resume bit for bit, equal gradients for accumulation, best state, divergence."""

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

import local
import softprompts
from closeness import tolerance
from softprompts import errors, injection
from softprompts.artifacts.io import read_tensors
from softprompts.config import TrainConfig, parse
from softprompts.errors import ConfigError
from softprompts.injection import packed_attention
from softprompts.recipes.run import run as job
from softprompts.training import loop
from softprompts.training.checkpoint import CHECKPOINT
from softprompts.training.trainables import TrainablePrompts
from trainees import fit


@pytest.fixture
def values(tmp_path):
    return local.run_values(tmp_path)


def fitted(values, directory=None, stop_at=None, validate=None, **changes):
    """The prepared run after training `values` with `changes`, and its reports (up to step `stop_at`)."""
    run = parse({**values, "training": {**values["training"], **changes}})
    made = job.prepare(run)
    rows = [made.encoders[0].example(row) for row in made.tasks[0].train]
    reports = []
    fitting = fit(made.model, rows, run.training, seed=run.seed, validate=validate, directory=directory)
    with closing(fitting):
        for report in fitting:
            reports.append(report)
            if report.step == stop_at:
                break
    return made, reports


def prompt_of(made):
    return made.model.registry.method(made.prompts[0]).prompt.detach()


def test_training_lowers_the_loss_and_reports_every_step(values):
    made, reports = fitted(values, learning_rate=1.0)
    assert [r.step for r in reports] == [1, 2, 3, 4, 5, 6]
    assert reports[-1].loss < reports[0].loss
    assert reports[0].path in ("shared", "packed")
    rms = prompt_of(made).square().mean().sqrt() / made.model.backbone.embedding_rms
    assert reports[-1].rms_ratio == pytest.approx(float(rms), rel=1e-5)


def test_a_seed_is_a_curve(values):
    """The same seed gives the same losses to the bit; another one takes the rows in another order, from one start."""
    values["prompt"]["init"] = {"kind": "vocabulary", "seed": 5}
    (one, first), (same, again), (other, others) = (fitted({**values, "seed": seed}) for seed in (0, 0, 1))
    losses = [[report.loss for report in each] for each in (first, again, others)]
    assert losses[0] == losses[1]
    assert torch.equal(prompt_of(one), prompt_of(same))
    assert all(a != b for a, b in zip(losses[0], losses[2], strict=True))
    assert not torch.equal(prompt_of(one), prompt_of(other))


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_resuming_equals_never_stopping(values, tmp_path, optimizer):
    whole, all_reports = fitted(values, optimizer=optimizer)
    fitted(values, tmp_path / "run", stop_at=3, optimizer=optimizer)
    resumed, reports = fitted(values, tmp_path / "run", optimizer=optimizer)
    assert torch.equal(prompt_of(whole), prompt_of(resumed))
    assert [r.loss for r in reports] == [r.loss for r in all_reports]


def test_a_killed_run_goes_on_bit_for_bit(values, tmp_path):
    """The whole command, killed with SIGKILL in the middle of training, then called again."""
    values["training"] |= {"max_steps": 200, "save_steps": 1}
    outs = []
    for name in ("whole", "killed"):
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump({**values, "output_dir": str(tmp_path / name)}))
        outs.append(file)
    command = [sys.executable, "-m", "softprompts", "train", "--json", "--config"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "src"), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(outs[0])], check=True, capture_output=True, env=environment)
    process = subprocess.Popen(
        [*command, str(outs[1])], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    )
    checkpoint = tmp_path / "killed" / CHECKPOINT
    for _ in range(3000):
        if checkpoint.exists():
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "results.json").exists()
    subprocess.run([*command, str(outs[1])], check=True, capture_output=True, env=environment)
    one, two = (read_tensors(tmp_path / name / "prompt" / "softprompts.safetensors")[0] for name in ("whole", "killed"))
    assert one.keys() == two.keys()
    for key in one:
        assert torch.equal(one[key], two[key]), key


def test_accumulated_batches_equal_one_large_batch(values):
    """Two micro-batches of four in another order have the rows of no batch of eight, so one epoch is compared whole."""
    values["task"]["split"]["limit"] = {"train": 8}
    values["task"]["verbalizer"] = {"warm": "warm", "cold": "as cold as ice"}  # parts with unequal numbers of labels
    large, reports = fitted(values, stop_at=2, batch_size=8, max_grad_norm=None)
    small, parts = fitted(values, stop_at=2, batch_size=4, gradient_accumulation_steps=2, max_grad_norm=None)
    assert [r.loss for r in parts[:2]] == pytest.approx([r.loss for r in reports[:2]], rel=1e-5)
    torch.testing.assert_close(prompt_of(small), prompt_of(large), rtol=1e-4, atol=1e-5)


def test_the_best_state_is_what_remains(values):
    scores = iter([0.2, 0.9, 0.4])
    seen = []

    def validate():
        seen.append(prompt_of(holder[0]).clone())
        return next(scores)

    run = parse({**values, "training": {**values["training"], "eval_steps": 2}})
    made = job.prepare(run)
    holder = [made]
    rows = [made.encoders[0].example(row) for row in made.tasks[0].train]
    list(fit(made.model, rows, run.training, validate=validate))
    assert len(seen) == 3
    assert torch.equal(prompt_of(made), seen[1])


def test_patience_stops_early(values):
    scores = iter([0.5, 0.4, 0.4, 0.4, 0.4, 0.4])
    _, reports = fitted(values, validate=lambda: next(scores), eval_steps=1, early_stopping_patience=2)
    assert len(reports) == 3


@pytest.mark.parametrize("when", [1, 4])
def test_a_loss_that_is_no_number_keeps_the_last_good_state(values, tmp_path, monkeypatch, when):
    good, _ = fitted(values, stop_at=max(1, when - 2))
    original = TrainablePrompts.loss

    def poisoned(*arguments):
        poisoned.calls += 1
        (loss,) = original(*arguments)
        # The gradient stays finite.
        return [replace(loss, value=loss.value + float("nan")) if poisoned.calls == when else loss]

    poisoned.calls = 0
    monkeypatch.setattr(TrainablePrompts, "loss", poisoned)
    with pytest.raises(errors.TrainingError, match=r"not a number; the state after step \d+ is kept.*lower rate"):
        fitted(values, tmp_path / "run")
    tensors, _ = read_tensors(tmp_path / "run" / CHECKPOINT)
    assert torch.isfinite(tensors["prompts.colors.prompt"]).all()
    if when == 4:
        assert torch.equal(tensors["prompts.colors.prompt"], prompt_of(good))


def test_a_checkpoint_of_other_settings_is_refused(values, tmp_path):
    run = parse(values)
    made = job.prepare(run)
    rows = [made.encoders[0].example(row) for row in made.tasks[0].train]
    list(fit(made.model, rows, run.training, directory=tmp_path, settings={"training": {"learning_rate": 1.0}}))
    again = fit(made.model, rows, run.training, directory=tmp_path, settings={"training": {"learning_rate": 2.0}})
    with pytest.raises(errors.TrainingError, match=r"training\.learning_rate was 1\.0, is now 2\.0"):
        next(again)


def test_a_checkpoint_of_other_rows_is_refused(values, tmp_path):
    """The file of the data set was replaced by another one with as many rows."""
    job.run(parse(values))
    local.colors(tmp_path / "colors.csv", seed=1)
    with pytest.raises(errors.TrainingError, match=r"examples was \w+, is now \w+"):
        job.run(parse(values))


def test_the_rate_follows_its_schedule(values):
    _, reports = fitted(values, lr_scheduler_type="linear", warmup_steps=2, learning_rate=1.0)
    unit = reports[1].rate
    assert [r.rate / unit for r in reports] == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25])
    made, absolute = fitted(values, lr_scheduler_type="constant", learning_rate=0.25, learning_rate_unit="absolute")
    assert {r.rate for r in absolute} == {0.25}
    assert unit == pytest.approx(made.model.backbone.embedding_rms)


def test_nothing_to_train_on_is_said(values):
    made = job.prepare(parse(values))
    with pytest.raises(ConfigError, match="no rows to train on"):
        next(fit(made.model, [], TrainConfig()))


def test_adafactor_keeps_the_whole_second_moment(values):
    made = job.prepare(parse(values))
    rows = [made.encoders[0].example(row) for row in made.tasks[0].train]
    config = TrainConfig(
        optimizer="adafactor",
        max_steps=1,
        lr_scheduler_type="constant",
        learning_rate=0.3,
        learning_rate_unit="absolute",
    )
    captured = {}
    original = loop.build_optimizer

    def keep(param_groups, config):
        captured["optimizer"] = original(param_groups, config)
        return captured["optimizer"]

    loop.build_optimizer = keep
    try:
        list(fit(made.model, rows, config))
    finally:
        loop.build_optimizer = original
    (state,) = captured["optimizer"].state.values()
    assert state["exp_avg_sq"].shape == prompt_of(made).shape
    assert "exp_avg_sq_row" not in state


def test_the_backbone_is_never_touched(values):
    run = parse(values)
    made = job.prepare(run)
    before = {k: v.clone() for k, v in made.model.backbone.model.state_dict().items()}
    rows = [made.encoders[0].example(row) for row in made.tasks[0].train]
    list(fit(made.model, rows, replace_steps(run, 3).training))
    after = made.model.backbone.model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert all(p.grad is None and not p.requires_grad for p in made.model.backbone.model.parameters())


def replace_steps(run, steps):
    return run.model_copy(update={"training": run.training.model_copy(update={"max_steps": steps})})


def test_a_batch_of_tokens(values, tmp_path):
    """`batch_tokens` bounds each step's tokens; a run that stops goes on with the same batches, epochs later too."""
    values["training"]["max_steps"] = 30
    changes = {"batch_tokens": 90, "batch_size": 8}
    whole, reports = fitted(values, **changes)
    rows = [whole.encoders[0].example(row) for row in whole.tasks[0].train]
    assert sum(r.tokens for r in reports) > sum(len(row.input_ids) for row in rows)  # more than one epoch
    assert 60 < max(r.tokens for r in reports) <= 90
    fitted(values, tmp_path / "run", stop_at=25, **changes)
    resumed, again = fitted(values, tmp_path / "run", **changes)
    assert [r.tokens for r in again] == [r.tokens for r in reports]
    assert torch.equal(prompt_of(whole), prompt_of(resumed))


def test_the_first_batch_is_compared_where_asked_for(values, monkeypatch):
    plain, _ = fitted(values)
    checked, reports = fitted(values, equivalence="check")
    assert torch.equal(prompt_of(plain), prompt_of(checked))  # comparing changes nothing
    assert reports[0].equivalence.startswith("packed against concatenation: asked for: loss differs by ")
    assert [r.equivalence for r in reports[1:]] == [""] * (len(reports) - 1)
    honest = packed_attention._math_attention

    def wrong(part, *rest):
        return honest(replace(part, values=part.values * 1.01), *rest)

    made = job.prepare(parse({**values, "training": {**values["training"], "equivalence": "check"}}))
    injection.why_not_packed(made.model.backbone)  # the model is found fit, and goes wrong after that
    monkeypatch.setitem(
        packed_attention.ALL_ATTENTION_FUNCTIONS,
        packed_attention.ATTENTION_NAMES["math"],
        packed_attention._attention_function(wrong),
    )
    rows = [made.encoders[0].example(row) for row in made.tasks[0].train]
    before = prompt_of(made).clone()
    with pytest.raises(errors.TrainingError, match=r"from plain concatenation: packed against .*eager"):
        next(fit(made.model, rows, made.run.training))
    assert torch.equal(prompt_of(made), before)


def test_checkpointed_layers_train_the_same_prompt(values):
    plain, reports = fitted(values)
    again, others = fitted({**values, "model": {**values["model"], "gradient_checkpointing": True}})
    assert again.model.backbone.kernels.gradient_checkpointing
    assert [r.loss for r in others] == pytest.approx([r.loss for r in reports], rel=tolerance(1.0))
    torch.testing.assert_close(prompt_of(again), prompt_of(plain))


def test_a_model_is_trained_with_rows(values):
    """The door for people: rows of a data set by the name of the prompt, and the losses of the run."""
    made, reports = fitted(values)
    other = job.prepare(parse(values))
    steps = softprompts.train(other.model, {"colors": other.tasks[0].train}, other.run.training)
    assert [progress.loss for progress in steps] == [progress.loss for progress in reports]
    assert torch.equal(prompt_of(other), prompt_of(made))
    with pytest.raises(ConfigError, match="no prompt 'colours'; did you mean 'colors'"):
        next(softprompts.train(other.model, {"colours": other.tasks[0].train}, other.run.training))
