"""One run from configuration to files: mixed tasks, starts from artifacts, results.json, the default model."""

import json

import pytest
import torch
import transformers

import local
import tokenizers_tiny
from softprompts import SoftPromptModel, assets, backbone, injection, methods
from softprompts.artifacts import artifact
from softprompts.artifacts.fingerprint import check_fingerprint
from softprompts.backbone import loading
from softprompts.backbone.kernels import Kernels
from softprompts.config import EvaluationConfig, Run, parse
from softprompts.errors import ArtifactError, BackboneError, ConfigError
from softprompts.evaluation import evaluate
from softprompts.injection import Site
from softprompts.methods.prompt_tuning import PromptTuning
from softprompts.model import setup
from softprompts.model.soft_prompt_model import open_prompts
from softprompts.recipes.run import run
from softprompts.recipes.run.results import evenly_spaced
from softprompts.types import Batch, Prompt, PromptInit


@pytest.fixture
def values(tmp_path):
    return local.run_values(tmp_path, max_steps=3)


def test_two_tasks_train_in_the_same_batches(values, tmp_path):
    task = values.pop("task")
    values["tasks"] = [{**task, "name": "one"}, {**task, "name": "two", "template": "{text}?"}]
    results = run.run(parse(values))
    assert [page["task"] for page in results["tasks"]] == ["one", "two"]
    one, two = (artifact.load(tmp_path / "out" / "prompt" / name) for name in ("one", "two"))
    assert not torch.equal(one.prompt, two.prompt)
    assert torch.equal(one.initial, two.initial)
    assert two.template["template"] == "{text}?"
    for name in ("report-one.html", "report-two.html"):
        assert (tmp_path / "out" / name).is_file()


def test_the_artifact_tells_where_it_came_from(values, tmp_path):
    results = run.run(parse(values))
    made = artifact.load(tmp_path / "out" / "prompt")
    again = run.prepare(parse(values))
    assert torch.equal(made.initial, again.init.prompt)
    assert made.config["task"]["template"] == "{text}:"
    assert made.scores["accuracy"]["value"] == results["summary"]["after"]["value"]
    check_fingerprint(made.fingerprint, backbone.fingerprint(again.model.backbone))


class Halved(PromptTuning):
    """Prompt tuning that begins at half of its start."""

    def __init__(self, config, spec, init, shared=None):
        super().__init__(config, spec, PromptInit(init.prompt / 2), shared)


def test_the_artifact_holds_where_the_method_began(values, tmp_path, monkeypatch):
    """Not every method begins at the start that it is given; a task vector is counted from where it did."""
    monkeypatch.setitem(methods.METHODS, "halved", f"{__name__}:Halved")
    values["prompt"] |= {"method": "halved"}
    run.run(parse(values))
    start = run.prepare(parse(values)).init.prompt
    assert torch.equal(artifact.load(tmp_path / "out" / "prompt").initial, start / 2)
    model = SoftPromptModel(transformers.AutoModelForCausalLM.from_pretrained(values["model"]["name"]))
    model.add_task("a", parse({"prompt": {**values["prompt"], "init": {"kind": "random"}}}).prompt)
    model.save_pretrained(tmp_path / "model")
    saved = artifact.load(tmp_path / "model")
    assert torch.equal(saved.initial, saved.prompt)


def test_results_hold_the_resolved_run(values, tmp_path):
    results = run.run(parse(values))
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert saved["summary"] == results["summary"]
    assert parse(saved["config"]) == parse(values)
    assert [row["step"] for row in saved["curve"]] == [1, 2, 3]
    matrix = torch.tensor(saved["confusion"]["matrix"])
    assert int(matrix.sum()) == saved["rows"]["test"] == saved["summary"]["after"]["n"]
    assert sum(row["support"] for row in saved["per_class"]) == saved["rows"]["test"]
    assert len(saved["examples"]) == 10
    assert len(saved["nearest_words"]) == 4
    assert saved["summary"]["trainable"] == 4 * 32


def test_a_finished_run_is_not_trained_again(values, tmp_path):
    first = run.run(parse(values))
    steps = []
    second = run.run(parse(values), run.ProgressReporter(on_step=lambda _, r: steps.append(r.seconds)))
    assert steps == [row["seconds"] for row in first["curve"]]
    assert second["scores"] == first["scores"]


def test_a_run_starts_from_another_artifact(values, tmp_path):
    run.run(parse(values))
    init = {"kind": "artifact", "path": str(tmp_path / "out" / "prompt")}
    made = run.prepare(parse({**values, "prompt": {"num_virtual_tokens": 4, "init": init}}))
    assert torch.equal(made.init.prompt, artifact.load(init["path"]).prompt)
    with pytest.raises(ArtifactError, match=r"\[4, 32\] at site input.*\[5, 32\]"):
        run.prepare(parse({**values, "prompt": {"num_virtual_tokens": 5, "init": init}}))
    other = local.model_directory(tmp_path / "other", seed=9)
    with pytest.raises(ArtifactError, match="weights"):
        run.prepare(
            parse(
                {
                    **values,
                    "model": {**values["model"], "name": str(other)},
                    "prompt": {"num_virtual_tokens": 4, "init": init},
                }
            )
        )


def test_label_words_are_a_start(values):
    made = run.prepare(parse({**values, "prompt": {"num_virtual_tokens": 4, "init": {"kind": "labels"}}}))
    base = made.model.backbone
    pieces = base.tokenizer(" cold", add_special_tokens=False)["input_ids"]
    assert torch.equal(made.init.prompt[0], base.embed(torch.tensor(pieces)).mean(0))


@pytest.mark.parametrize("site", ["layers", "kv"])
def test_deep_prompts_train_and_come_back(values, tmp_path, site):
    run.run(parse({**values, "prompt": {"num_virtual_tokens": 4, "site": site}}))
    opened = open_prompts([tmp_path / "out" / "prompt"], config=parse(values).model)[0]
    assert opened.registry.records[opened.task].site.name == site
    assert not (tmp_path / "out" / "prompt" / "adapter_config.json").exists()


@pytest.mark.parametrize("place", ["start", "user"])
def test_chat_puts_the_prompt_where_it_says(values, tmp_path, place):
    """The place goes from the task through training, artifact and generation to the same scores as by hand."""
    tokenizers_tiny.byte_bpe(chat=True).save_pretrained(tmp_path / "llama")
    values["task"] |= {"chat": True, "chat_placement": place, "template": "{text}"}
    made = run.prepare(parse(values))
    row = made.tasks[0].test[0]
    before = made.encoders[0].encode(row).prompt_offsets
    assert (before == 0) == (place == "start")
    run.run(parse(values))
    opened = open_prompts([tmp_path / "out" / "prompt"], config=parse(values).model)[0]
    (found,) = evaluate.answers(opened, [row], prompt=opened.task, config=EvaluationConfig())
    ids, model = opened.example_tokenizer(opened.task).encode(row).input_ids, opened.backbone.model
    for label, answer in opened.example_tokenizer(opened.task).candidates().items():
        words = model.get_input_embeddings()(torch.tensor(ids + answer))
        whole = torch.cat([words[:before], opened.registry.records[opened.task].artifact.prompt, words[before:]])[None]
        logits = model(inputs_embeds=whole).logits[0].log_softmax(-1)
        first = len(ids) + 4 - 1
        expected = sum(float(logits[first + i, token]) for i, token in enumerate(answer))
        assert found.scores[label] == pytest.approx(expected, abs=2e-5)
    written = EvaluationConfig(by="generate", max_new_tokens=3)
    (said,) = evaluate.answers(opened, [row], prompt=opened.task, config=written)
    words = model.get_input_embeddings()(torch.tensor(ids))
    whole = torch.cat([words[:before], opened.registry.records[opened.task].artifact.prompt, words[before:]])[None]
    tokens = model.generate(inputs_embeds=whole, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert said.text == opened.backbone.tokenizer.decode(tokens[0], skip_special_tokens=True).strip()


def test_heads_and_several_tasks_are_refused(values):
    task = values.pop("task")
    values |= {"tasks": [{**task, "name": "a"}, {**task, "name": "b"}]}
    values["model"]["head"] = "sequence"
    with pytest.raises(ConfigError, match="one task at a time"):
        run.prepare(parse(values))


def test_each_of_several_artifacts_keeps_its_prompt(values, tmp_path):
    run.run(parse(values))
    run.run(parse({**values, "seed": 1, "output_dir": str(tmp_path / "second")}))
    paths = [tmp_path / "out" / "prompt", tmp_path / "second" / "prompt"]
    opened = open_prompts(paths, config=parse(values).model)[0]
    found = [opened.registry.method(name).prompt.detach() for name in opened.tasks]
    assert not torch.equal(*found)
    for prompt, path in zip(found, paths, strict=True):
        assert torch.equal(prompt, artifact.load(path).prompt)


def test_artifacts_of_different_sites_cannot_stand_together(values, tmp_path):
    run.run(parse(values))
    run.run(parse({**values, "prompt": {"num_virtual_tokens": 4, "site": "kv"}, "output_dir": str(tmp_path / "kv")}))
    paths = [tmp_path / "out" / "prompt", tmp_path / "kv" / "prompt"]
    with pytest.raises(ConfigError, match="differ in site"):
        open_prompts(paths, config=parse(values).model)[0]


@pytest.mark.assets
@pytest.mark.slow
def test_the_default_model_shares_its_prefix_exactly():
    """Loss and prompt gradient of the real model: shared prefix and concatenation agree to float32's rounding."""
    base = run.load_backbone(Run().model.model_copy(update={"dtype": "float32"}))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, 40_000, (4, 12), generator=generator)
    mask = torch.arange(12)[None] < torch.tensor([12, 7, 9, 12])[:, None]
    start = base.embedding_rms * torch.randn(2, 20, 576, generator=generator)
    found = []
    for path in ("packed", "shared", "concatenation"):
        values = start.clone().requires_grad_()
        prompt = Prompt(values, torch.ones(2, 20, dtype=torch.bool), torch.tensor([0, 1, 1, 0]))
        batch = Batch(ids, mask.long(), prompt.prompt_index, ids.masked_fill(~mask, -100))
        out = injection.score(base, batch, prompt, Site(), path=path)
        loss = torch.nn.functional.cross_entropy(out.logits, out.labels)
        loss.backward()
        found.append((loss.detach(), values.grad))
    assert assets.is_asset("smollm2-135m")
    for loss, gradient in found[:-1]:
        torch.testing.assert_close(loss, found[-1][0], rtol=1e-5, atol=0)
        assert (gradient - found[-1][1]).norm() < 1e-4 * found[-1][1].norm()


def test_results_tell_what_the_run_was_made_with(values, tmp_path):
    products = "onednn" if torch.backends.mkldnn.is_available() else "torch"
    values["model"] |= {"matmul_backend": products, "attention": "packed-fused", "gradient_checkpointing": True}
    machine = run.run(parse(values))["machine"]
    chosen = {
        "path": "packed",
        "packed_attention": "fused",
        "matmul_backend": products,
        "gradient_checkpointing": True,
        "compiled": False,
    }
    assert {key: machine["kernels"][key] for key in chosen} == chosen
    assert (machine["device"], machine["dtype"], machine["threads"]) == ("cpu", "float32", 1)
    assert machine["paths"] == {"packed": 3}
    assert "kernels.packed_attention" in (tmp_path / "out" / "report.html").read_text()


def test_a_run_that_goes_on_with_other_kernels_says_so(values, tmp_path, monkeypatch):
    """What was measured may be lost, or the run moved to another machine: equal up to rounding, and told."""
    values["training"] |= {"save_steps": 1}
    steps = []

    def stop(_, report):
        steps.append(report.step)
        if report.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.run(parse(values), run.ProgressReporter(on_step=stop))
    choice = setup.TunedKernels(Kernels(packed_attention="fused"), {})
    monkeypatch.setattr(setup, "autotune", lambda *_, **__: choice)
    said = []
    results = run.run(parse(values), run.ProgressReporter(log=said.append))
    line = (
        "from step 3 on with packed_attention fused, before with packed_attention math: equal up to "
        "rounding, not to the bit"
    )
    assert line in said
    assert line in results["warnings"]
    assert [bool(row["machine"]) for row in results["curve"]] == [True, False, True]
    assert run.run(parse(values))["warnings"] == results["warnings"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nonsense", "no attention 'nonsense'; possible: packed, packed-fused, eager, .*sdpa"),
        ("packt", "no attention 'packt'; did you mean 'packed'"),
    ],
)
def test_an_attention_that_is_not_there_is_named(values, name, message):
    values["model"] |= {"attention": name}
    with pytest.raises(BackboneError, match=message):
        run.prepare(parse(values))


def test_an_attention_whose_package_is_missing_is_one_line(values, monkeypatch):
    def missing(*_, **__):
        raise ImportError("flash is not here.")

    monkeypatch.setattr(loading, "load", missing)
    values["model"] |= {"attention": "flash_attention_2"}
    with pytest.raises(BackboneError, match="'flash_attention_2' cannot be used here: flash is not here"):
        run.prepare(parse(values))


@pytest.mark.parametrize(
    ("size", "indices"),
    [
        (0, []),
        (1, [0]),
        (3, [0, 1, 2]),
        (10, list(range(10))),
        (19, list(range(0, 19, 2))),
        (91, list(range(0, 91, 10))),
    ],
)
def test_examples_of_a_page_are_different_rows(size: int, indices: list[int]) -> None:
    assert evenly_spaced(size, 10) == indices
