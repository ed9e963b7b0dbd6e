"""Distillation: the two losses by their formulas, the states they compare, and teachers computed once."""

import math
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

import local
import rows
import test_together as together
import tiny
from prompted import methods_of, plain, several
from softprompts import injection
from softprompts.artifacts import artifact
from softprompts.config import DistillationConfig, PromptConfig, parse
from softprompts.config.schema import DISTILLATION_OBJECTIVES
from softprompts.data import collate
from softprompts.errors import ArtifactError, BackboneError, ConfigError
from softprompts.injection import Site
from softprompts.methods.multitask import MultitaskPromptTuning
from softprompts.model import SoftPromptModel
from softprompts.model.registry import NewPrompt, PromptRecord
from softprompts.recipes.run import run
from softprompts.training import distillation, objectives
from softprompts.training.trainables import RunBatch, TrainablePrompts
from softprompts.types import Output, PromptInit, Step, TeacherBatch
from trainees import fit, train_many

TASKS = ("a", "b")
LAYERS = (-1, 1, 2)
INPUT = Site()


# What the objectives compare


def stock_states(bb, prompt, row, layers):
    """The stock model's states of the text behind `prompt [P, H]`, by hand: (side, layer) -> [T, H]."""
    text = bb.model.get_input_embeddings()(row)
    full = torch.cat([prompt, text])[None]
    out = bb.model(inputs_embeds=full, output_hidden_states=True)
    return {("text", n): out.hidden_states[n][0, len(prompt) :] for n in layers}


@torch.no_grad()
@pytest.mark.parametrize("path", ["packed", "shared", "concatenation"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "opt", "gemma3"])
def test_states_are_the_stock_models(name, path):
    bb = tiny.backbone(name)
    prompt = rows.random(3, 4, 32)
    texts = rows.texts(name)
    for side in ("left", "right"):
        batch = rows.batch(name, texts, side)
        output = injection.score(bb, batch, rows.single(prompt, 4), Site(), path=path, layers=LAYERS)
        parts = {key: states.split(output.token_counts["text"].tolist()) for key, states in output.layer_states.items()}
        assert output.token_counts["text"].tolist() == [len(text) for text in texts]
        for i, text in enumerate(texts):
            expected = stock_states(bb, prompt, text, LAYERS)
            for key, states in expected.items():
                torch.testing.assert_close(parts[key][i], states, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_states_of_both_stacks(name):
    bb = tiny.backbone(name)
    prompt = rows.random(3, 4, 32)
    texts = rows.texts(name)
    batch = rows.batch(name, texts, "left")
    output = injection.score(bb, batch, rows.single(prompt, 4), Site(), layers=(-1, 1))
    for i, (text, target) in enumerate(zip(texts, rows.targets(texts), strict=True)):
        full = torch.cat([prompt, bb.model.get_input_embeddings()(text)])[None]
        out = bb.model(inputs_embeds=full, decoder_input_ids=rows.shifted(bb, target)[None], output_hidden_states=True)
        sides = {"text": (out.encoder_hidden_states, 4), "target": (out.decoder_hidden_states, 0)}
        for side, (states, before) in sides.items():
            for number in (-1, 1):
                own = output.layer_states[side, number].split(output.token_counts[side].tolist())[i]
                torch.testing.assert_close(own, states[number][0, before:], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_states_of_an_encoder():
    bb = tiny.backbone("bert")
    prompt, text = rows.random(3, 4, 32), rows.texts("bert")[1]
    batch = rows.batch("bert", [text], "right", extra=3)
    output = injection.score(bb, batch, rows.single(prompt), Site(), layers=(2,))
    words = bb.model.get_input_embeddings()(text)
    full = torch.cat([words[:1], prompt, words[1:]])[None]
    states = bb.model(inputs_embeds=full, output_hidden_states=True).hidden_states[2][0]
    torch.testing.assert_close(
        output.layer_states["text", 2], torch.cat([states[:1], states[5:]]), rtol=1e-4, atol=1e-5
    )


def test_layers_that_are_not_there():
    bb = tiny.backbone("llama")
    with pytest.raises(BackboneError, match=r"no layer 4; LlamaForCausalLM has layers 1 to 3, and -1 is what"):
        injection.check_layers(bb, (1, 4))
    with pytest.raises(BackboneError, match="no layer 0"):
        injection.check_layers(bb, (0,))
    injection.check_layers(tiny.backbone("albert"), (-1,))


# The losses


def step_of(student, teacher, temperature=1.0, row=None):
    """A step whose head is the identity, so that states are scores."""
    row = torch.arange(len(student)) if row is None else row
    output = Output(student, torch.zeros(len(student), dtype=torch.long), row, label_states=student, head=lambda s: s)
    batch = rows.batch("llama", rows.texts("llama")[: int(row.max()) + 1])
    return Step(batch, None, output, TeacherBatch(teacher, {}, temperature))


def divergence(p, q, temperature):
    """KL(p || q) by the sum, for lists of scores."""
    total = 0.0
    for one, other in zip(p.tolist(), q.tolist(), strict=True):
        a, b = ([math.exp(x / temperature) for x in scores] for scores in (one, other))
        total += sum(x / sum(a) * math.log((x / sum(a)) / (y / sum(b))) for x, y in zip(a, b, strict=True))
    return total / len(p)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_logits_by_the_sum_and_in_the_right_direction(temperature):
    student, teacher = rows.random(1, 3, 5) * 4, rows.random(2, 3, 5) * 4
    found = float(objectives.distill_logits(step_of(student, teacher, temperature)))
    assert found == pytest.approx(temperature**2 * divergence(teacher, student, temperature), rel=1e-5)
    assert found != pytest.approx(temperature**2 * divergence(student, teacher, temperature), rel=1e-2)
    assert found > 0
    assert float(objectives.distill_logits(step_of(teacher, teacher, temperature))) == 0


def test_hidden_by_the_mean_of_rows():
    """Rows of 2 and 3 tokens with 1 and 3 labels: each row's mean square counts with its share of the labels."""
    student, teacher = rows.random(1, 5, 4), rows.random(2, 5, 4)
    key = ("text", -1)
    output = Output(
        None, None, torch.tensor([0, 1, 1, 1]), layer_states={key: student}, token_counts={"text": torch.tensor([2, 3])}
    )
    step = Step(
        rows.batch("llama", rows.texts("llama")[:2]), None, output, TeacherBatch(torch.zeros(0), {key: teacher})
    )
    square = (student - teacher).square()
    expected = 0.25 * square[:2].mean() + 0.75 * square[2:].mean()
    torch.testing.assert_close(objectives.distill_hidden(step), expected)
    two = {key: student, ("text", 1): student * 0}
    both = replace(
        step,
        output=replace(output, layer_states=two),
        teacher=TeacherBatch(torch.zeros(0), dict.fromkeys(two, teacher)),
    )
    zero = 0.25 * teacher[:2].square().mean() + 0.75 * teacher[2:].square().mean()
    torch.testing.assert_close(objectives.distill_hidden(both), (expected + zero) / 2)


def test_a_step_without_a_teacher_says_so():
    step = replace(step_of(rows.random(1, 2, 4), rows.random(1, 2, 4)), teacher=None)
    for name in DISTILLATION_OBJECTIVES:
        with pytest.raises(ConfigError, match=r"the step has none; name them in training\.distillation"):
            objectives.OBJECTIVES[name](step)


# Teachers


def student(name, seed=1, tasks=TASKS, site=None, model=None, run=""):
    """A model whose prompts of multitask prompt tuning are called as `tasks`; or these prompts in `model`, of a run."""
    site = site or Site()
    base = together.double(name) if model is None else model.backbone
    spec, start = injection.prompt_spec(base, site, 4), together.random_start(base, site, 4, seed)
    methods = several(MultitaskPromptTuning, MultitaskPromptTuning.Config(), spec, PromptInit(start), tasks).double()
    with torch.no_grad():
        methods[tasks[0]].shared.prompt.copy_(start)
    model = SoftPromptModel(base) if model is None else model
    for task in tasks:
        record = PromptRecord(site, PromptConfig(num_virtual_tokens=4))
        model.registry.add(NewPrompt(f"{run}{task}", methods[task], record), base.device)
    return model


def teachers(prompts, site=INPUT):
    return tuple(
        distillation.TaskTeacher(task, prompt, site, str(i))
        for i, (task, prompt) in enumerate(zip(TASKS, prompts, strict=True))
    )


def folded(model):
    """The plain prompt of each task."""
    return [plain(method) for method in methods_of(model)]


def config(**changes):
    return DistillationConfig(**{"teachers": {}, "layers": LAYERS, **changes})


@pytest.mark.parametrize(
    ("name", "site"),
    [("llama", Site()), ("gemma3", Site()), ("llama", Site("kv")), ("gpt2", Site("layers")), ("bert", Site())],
)
def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient(name, site):
    check_equal_student(name, site, LAYERS)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_the_same_for_encoder_decoders(name):
    check_equal_student(name, Site(), (-1, 1))


def check_equal_student(name, site, layers):
    model = student(name, site=site)
    data = together.encoded(name, 8, 5, tasks=2)
    if site.name == "kv":  # nothing scores a first token there
        data = [replace(row, labels=[-100, *row.labels[1:]]) for row in data]
    same = folded(model)
    turned = [-prompt.flip(0) for prompt in same]
    for prompts, equal in ((same, True), (turned, False)):
        targets = distillation.targets(model.backbone, teachers(prompts, site), data, config(layers=layers))
        trainable = TrainablePrompts(model, {"one": TASKS}, {"one": targets})
        for objective in (objectives.distill_logits, objectives.distill_hidden):
            (measured,) = trainable.loss([RunBatch("one", data[2:7], objective)])
            loss = measured.value
            gradient = torch.autograd.grad(loss, list(model.trainable().values()), retain_graph=True)
            size = max(float(g.abs().max()) for g in gradient)
            if equal:
                assert float(loss.detach()) == pytest.approx(0, abs=1e-12)
                assert size < 1e-10
            else:
                assert float(loss.detach()) > 1e-4
                assert size > 1e-5


def test_kept_states_are_those_of_the_pass(tmp_path):
    """What is kept, in whatever order and batches it was computed, is what one pass over the batch gives."""
    one = student("llama")
    data = together.encoded("llama", 9, 5, tasks=2)
    prompts = [rows.random(7, 4, 32), rows.random(8, 4, 32)]
    seen = []
    file = tmp_path / "kept.safetensors"
    made = distillation.targets(one.backbone, teachers(prompts), data, config(), file, lambda *done: seen.append(done))
    assert seen[-1] == (9, 9)
    again = distillation.targets(one.backbone, teachers(prompts), data, config(), file)
    chosen = [data[3], data[0], data[6]]
    for targets in (made, again):
        teacher = targets.of(chosen, torch.device("cpu"))
        batch = collate(chosen, 0)
        prompt = rows.several(prompts, [row.task_id for row in chosen])
        expected = injection.score(one.backbone, batch, prompt, Site(), layers=LAYERS)
        torch.testing.assert_close(teacher.label_states, expected.label_states)
        torch.testing.assert_close(expected.head(teacher.label_states), expected.logits)
        for key, states in expected.layer_states.items():
            torch.testing.assert_close(teacher.layer_states[key], states)


def test_states_are_computed_once_and_again_where_anything_changed(tmp_path, monkeypatch):
    one = student("llama")
    data = together.encoded("llama", 6, 5, tasks=2)
    prompts = [rows.random(7, 4, 32), rows.random(8, 4, 32)]
    calls = []
    original = distillation._compute
    monkeypatch.setattr(distillation, "_compute", lambda *given: calls.append(1) or original(*given))
    file = tmp_path / "kept.safetensors"

    def made(own=data, given=prompts, **changes):
        distillation.targets(one.backbone, teachers(given), own, config(**changes), file)
        return len(calls)

    assert (made(), made(), made(temperature=3.0)) == (1, 1, 1)
    assert made(layers=(-1,)) == 2
    assert made(data[1:], layers=(-1,)) == 3
    changed = [replace(teachers(prompts)[0], digest="x"), teachers(prompts)[1]]
    distillation.targets(one.backbone, changed, data[1:], config(layers=(-1,)), file)
    assert len(calls) == 4


def test_distilled_runs_train_alone_and_together_alike():
    """Two students with other layers and a plain run share their batches; each is the run it is alone, step by step."""
    weights = {"task": 1.0, "distill-logits": 0.9, "distill-hidden": 0.5}
    data = together.encoded("llama", 12, 5, tasks=2)

    def runs():
        base = together.double("llama")
        model, made = SoftPromptModel(base), []
        for name, layers, changes in (("one", (-1, 2), {}), ("two", (1,), {"learning_rate": 0.1})):
            student("llama", model=model, run=f"{name}/")
            prompts = [rows.random(7, 4, 32).double(), rows.random(8, 4, 32).double()]
            targets = distillation.targets(base, teachers(prompts), data, config(layers=layers, temperature=2.0))
            settings = together.config(max_steps=8, objectives=weights, **changes)
            made.append(together.run_of(name, model, data, settings, targets=targets))
        together.tuned(base, Site(), 4, 3, ("plain/a", "plain/b"), model)
        return [*made, together.run_of("plain", model, data, together.config(max_steps=8))]

    alone = {}
    for one in runs():
        alone[one.name] = [report.loss for _, report in train_many([one])]
    both = {name: [] for name in alone}
    for name, report in train_many(runs()):
        both[name].append(report.loss)
    for name, losses in alone.items():
        assert both[name] == pytest.approx(losses, rel=1e-9)
    assert alone["one"] != pytest.approx(alone["two"], rel=1e-3)


def test_accumulated_batches_equal_one_large_batch():
    weights = {"task": 1.0, "distill-logits": 0.9, "distill-hidden": 0.5}
    data = together.encoded("llama", 8, 5, tasks=2)
    found = []
    for size, parts in ((8, 1), (2, 4)):
        one = student("llama")
        prompts = [rows.random(7, 4, 32).double(), rows.random(8, 4, 32).double()]
        targets = distillation.targets(one.backbone, teachers(prompts), data, config())
        settings = together.config(max_steps=4, batch_size=size, gradient_accumulation_steps=parts, objectives=weights)
        losses = [r.loss for r in fit(one, data, settings, targets=targets)]
        found.append((losses, folded(one)[0]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-9)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-8, atol=1e-10)


def test_a_cut_run_with_teachers_and_drawn_tasks_goes_on_bit_for_bit(tmp_path):
    """Three steps, a stop, five more: the losses and prompts of eight steps in one go."""
    data = together.encoded("llama", 14, 5, tasks=2)
    weights = {"task": 1.0, "distill-logits": 0.9, "distill-hidden": 0.5}
    settings = together.config(max_steps=8, objectives=weights, sampling={"draw": "some"}, save_steps=2)

    def fitted(folder, stop=None):
        one = student("llama")
        prompts = [rows.random(7, 4, 32).double(), rows.random(8, 4, 32).double()]
        targets = distillation.targets(one.backbone, teachers(prompts), data, config(), folder / "kept.safetensors")
        losses = []
        with closing(fit(one, data, settings, targets=targets, directory=folder)) as steps:
            for report in steps:
                losses.append(report.loss)
                if report.step == stop:
                    break
        return losses, folded(one)

    whole, prompts = fitted(tmp_path / "whole")
    assert fitted(tmp_path / "cut", stop=3)[0] == whole[:3]
    again, found = fitted(tmp_path / "cut")
    assert again == whole
    assert all(one.equal(other) for one, other in zip(found, prompts, strict=True))


def test_a_weight_of_zero_is_the_task_alone():
    data = together.encoded("llama", 8, 5, tasks=2)
    losses = []
    for weights, taught in (
        ({"task": 1.0}, False),
        ({"task": 1.0, "distill-logits": 0.0, "distill-hidden": 0.0}, True),
    ):
        one = student("llama")
        targets = distillation.targets(one.backbone, teachers([rows.random(7, 4, 32)] * 2), data, config())
        settings = together.config(max_steps=6, objectives=weights)
        fitting = fit(one, data, settings, targets=targets if taught else None)
        losses.append([report.loss for report in fitting])
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


# Runs with teachers


@pytest.fixture
def values(tmp_path):
    """A run of two tasks on a tiny model, and a teacher for each."""
    made = local.run_values(tmp_path, max_steps=4)
    task = made.pop("task")
    made["tasks"] = [{**task, "name": name} for name in TASKS]
    for name in TASKS:
        run.run(parse({**made, "tasks": [{**task, "name": name}], "output_dir": str(tmp_path / name)}))
    made["prompt"] |= {"method": "multitask-prompt-tuning"}
    made["training"] |= {
        "objectives": {"task": 1.0, "distill-logits": 0.9, "distill-hidden": 0.9},
        "distillation": {"teachers": {name: str(tmp_path / name / "prompt") for name in TASKS}},
        "sampling": {"draw": "some"},
    }
    return made


def test_a_run_with_teachers_from_its_configuration(values, tmp_path):
    results = run.run(parse(values))
    assert len(results["tasks"]) == 2
    assert (tmp_path / "out" / distillation.FILE).exists()
    one = artifact.load(tmp_path / "out" / "prompt" / "a")
    assert sorted(one.state) == ["columns", "rows", "shared.prompt"]
    assert one.prompt.equal(one.state["shared.prompt"] * (one.state["columns"] @ one.state["rows"]))
    other = artifact.load(tmp_path / "out" / "prompt" / "b")
    assert one.state["shared.prompt"].equal(other.state["shared.prompt"])
    assert not one.state["columns"].equal(other.state["columns"])
    curve = [step["loss"] for step in results["tasks"][0]["curve"]]
    assert len(curve) == 4


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (
            lambda v: v["training"]["distillation"]["teachers"].pop("b"),
            ConfigError,
            "no teacher for b: name the directory",
        ),
        (
            lambda v: v["training"]["distillation"]["teachers"].update(c="x"),
            ConfigError,
            "training.distillation.teachers: no task 'c'; tasks: a, b",
        ),
        (
            lambda v: v["training"]["distillation"]["teachers"].update(b="nowhere"),
            ArtifactError,
            "no directory nowhere",
        ),
        (lambda v: v["training"]["distillation"].update(layers=[9]), BackboneError, "no layer 9"),
        (lambda v: v["training"].pop("distillation"), ConfigError, "objective 'distill-logits' compares with teachers"),
        (lambda v: v["training"].update(objectives={"task": 1.0}), ConfigError, "names teachers that nothing uses"),
        (
            lambda v: v["training"].update(learning_rates={"factor": 1.0}),
            ConfigError,
            "no group 'factor'; did you mean 'factors'",
        ),
        (lambda v: v["training"].update(batch_tokens=100), ConfigError, "draw 'some' draws tasks first"),
        (lambda v: v["model"].update(name=str(v["other"])), ArtifactError, "weights"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_training(values, tmp_path, change, kind, words):
    values["other"] = local.model_directory(tmp_path / "other", seed=5)
    change(values)
    del values["other"]
    values["output_dir"] = str(tmp_path / "refused")
    with pytest.raises(kind, match=words):
        run.run(parse(values))
    assert not list((tmp_path / "refused").glob("*"))


def test_a_teacher_that_scores_other_tokens_is_refused(values, tmp_path):
    """A text that is all answer: at site kv nothing scores its first token, at site input the prompt does."""
    split = {"validation_fraction": 0, "test_fraction": 0}
    bare = [{**task, "template": "", "kind": "generation", "label": "text", "split": split} for task in values["tasks"]]
    for name, task in zip(TASKS, bare, strict=True):
        alone = {
            **values,
            "tasks": [task],
            "output_dir": str(tmp_path / "bare" / name),
            "prompt": {"num_virtual_tokens": 4},
        }
        run.run(parse({**alone, "training": {"max_steps": 1, "batch_size": 4}}))
        values["training"]["distillation"]["teachers"][name] = str(tmp_path / "bare" / name / "prompt")
    values["prompt"]["site"] = "kv"
    with pytest.raises(ConfigError, match=r"its teacher scores .* give them the same site"):
        run.run(parse({**values, "tasks": bare}))


def test_divergence_equals_torchs_own():
    student, teacher = rows.random(1, 6, 9) * 3, rows.random(2, 6, 9) * 3
    expected = functional.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")
    torch.testing.assert_close(objectives.distill_logits(step_of(student, teacher)), expected)
