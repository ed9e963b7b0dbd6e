"""Artifacts of formats 1 to 3, written by the code of their time, load with the prompts, scores and answers of then.

tests/data/artifacts/README.md says what wrote each. What depends on the library's API is in the functions on top.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from softprompts import SoftPromptModel, injection
from softprompts.artifacts import artifact
from softprompts.config import InitConfig, ModelConfig, parse
from softprompts.errors import ArtifactError, TrainingError
from softprompts.evaluation.evaluate import answers, evaluation_config
from softprompts.injection import Site
from softprompts.methods import METHODS
from softprompts.model import initialization
from softprompts.model.setup import load_backbone
from softprompts.model.soft_prompt_model import open_prompts
from softprompts.recipes.run.run import run
from softprompts.types import Batch

DATA = Path(__file__).parent / "data"
ARTIFACTS = DATA / "artifacts"
CHECKPOINT = DATA / "checkpoints" / "old"
TEXTS = ("the thing 3 is red", "the thing 81 is blue", "the other thing is green")
CLOSE = {"atol": 1e-5, "rtol": 1e-5}

FIELDS = {"ids": "input_ids", "mask": "attention_mask", "place": "prompt_offsets", "segments": "segment_lengths"}
FIELDS |= {"words": "instruction_mask"}
"""Fields of a Batch that had other names when the batches were stored."""

ATTRIBUTES = {"place": "placement", "format": "template", "sum": "vector_sum"}
"""What attributes of an Artifact are called today, by their names in expected.json."""

RENAMED = {
    "verbalizer": "verbaliser",
    "chat_placement": "chat_place",
    "normalize": "normalise",
    "reparametrize": "reparametrise",
}
"""Keys of a template, of a method's options and of the evaluation that had other names then."""

# What the library is called with --------------------------------------------------------------------------------------


def facts(directory: Path) -> dict[str, Any]:
    """What the artifact says, under the names of expected.json, as JSON values."""
    loaded = artifact.load(directory)
    names = ("task", "method", "options", "site", "mode", "place", "segments", "shape", "family", "head", "backbone")
    names += ("revision", "format", "scores", "version", "parents", "digest", "sum")
    attributes = {name: getattr(loaded, ATTRIBUTES.get(name, name)) for name in names}
    values: dict[str, Any] = json.loads(json.dumps(attributes))
    return {**values, "options": as_then(values["options"]), "format": as_then(values["format"])}


def as_then(values: dict[str, Any] | None) -> dict[str, Any] | None:
    """The same values under the names that keys had when the artifacts were written."""
    return None if values is None else {RENAMED.get(key, key): value for key, value in values.items()}


def tensors(directory: Path) -> dict[str, Tensor]:
    """The prompt, its start and the head, under the names of expected.safetensors."""
    loaded = artifact.load(directory)
    single = {"prompt": loaded.prompt, "initial": loaded.initial}
    heads = {f"head.{name}": value for name, value in loaded.heads.items()}
    return {**{name: value for name, value in single.items() if value is not None}, **heads}


def opened(directory: Path) -> tuple[SoftPromptModel, tuple[str, ...]]:
    """The artifact with its backbone, ready to answer."""
    return open_prompts([directory], config=backbone_config(artifact.load(directory).backbone))


def backbone_config(name: str) -> ModelConfig:
    return ModelConfig(name=str(ARTIFACTS / name), dtype="float32", device="cpu", threads=1)


def scores(ready: SoftPromptModel, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The logits [N, V] of the labels of a batch, and the prompt of each row: values [B, P, D] and mask [B, P]."""
    given = Batch(task_ids=torch.zeros(3, dtype=torch.long), **{FIELDS.get(name, name): batch[name] for name in batch})
    with torch.no_grad():
        prompt = ready.make_prompts(given)
        logits = ready.score(given, prompts=prompt).logits
    return logits, prompt.values[prompt.prompt_index], prompt.mask[prompt.prompt_index]


def answered(ready: SoftPromptModel, directory: Path) -> list[dict[str, Any]]:
    """The answers to TEXTS, evaluated as in the run; none where the artifact holds no task."""
    saved = artifact.load(directory)
    if saved.template is None:
        return []
    rows = [{"text": text} for text in TEXTS]
    return [vars(answer) for answer in answers(ready, rows, prompt=ready.task, config=evaluation_config(saved))]


def evaluation_settings(directory: Path) -> dict[str, Any]:
    """How answers of the artifact are evaluated, under the names of expected.json."""
    config = evaluation_config(artifact.load(directory))
    return {"by": config.by, "normalise": config.normalize, "max_new_tokens": config.max_new_tokens}


def model_of(directory: Path) -> SoftPromptModel:
    """A SoftPromptModel with all prompts of a directory."""
    single = (directory / "softprompts.json").exists()
    first = directory if single else next(path for path in sorted(directory.iterdir()) if path.is_dir())
    base = load_backbone(model_config(artifact.load(first)))
    return SoftPromptModel.from_pretrained(base.model, directory, tokenizer=base.tokenizer)


def model_config(loaded: Any) -> ModelConfig:
    return backbone_config(loaded.backbone).model_copy(update={"head": loaded.head})


def model_scores(model: SoftPromptModel, tasks: list[str], batch: Mapping[str, Tensor]) -> tuple[float, Tensor]:
    """The loss and the logits of a batch whose rows belong to `tasks`."""
    names = {"place": "prompt_places", "words": "words"}
    more = {new: batch[old] for old, new in names.items() if old in batch}
    with torch.no_grad():
        output = model(batch["ids"], batch["mask"], labels=batch["labels"], tasks=tasks, **more)
    return float(output.loss), output.logits


def resaved(directory: Path, target: Path) -> Path:
    """The artifact as today's code writes it."""
    return artifact.save(artifact.load(directory), target)


def started(config: InitConfig, length: int) -> Any:
    """A start for the input of the tiny llama."""
    base = load_backbone(backbone_config("backbones/llama"))
    return initialization.initialize(config, base, Site(), injection.prompt_spec(base, Site(), length))


def run_values(out: Path) -> dict[str, Any]:
    """The run of tests/data/checkpoints/old as it is configured now."""
    words = {"warm": "positive", "cold": "negative"}
    task = {"source": "colors.csv", "name": "full", "template": "Review: {text}\nSentiment", "verbalizer": words}
    task |= {"separator": ": ", "max_length": 48, "truncate": ["text"], "metrics": ["f1-macro", "accuracy"]}
    task |= {"positive": "warm", "split": {"validation_fraction": 0.1, "test_fraction": 0.2}}
    return {
        "model": {"name": "backbones/llama", "dtype": "float32", "threads": 1},
        "prompt": {"num_virtual_tokens": 4, "init": {"kind": "random"}},
        "task": task,
        "training": {"max_steps": 4, "batch_size": 8, "learning_rate": 0.5, "head_learning_rate": 0.05},
        "evaluation": {"resamples": 100, "max_new_tokens": 4},
        "output_dir": str(out),
    }


# What is expected -----------------------------------------------------------------------------------------------------


def cases() -> list[Path]:
    return sorted(path.parent for path in ARTIFACTS.glob("format*/*/expected.json"))


def expected(case: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((case / "expected.json").read_text())
    return values


def directories(part: str, refused: bool = False) -> list[Any]:
    """The directories that expected.json names under `part`, without, or only, those that were refused then."""
    chosen: list[Any] = []
    for case in cases():
        for name, values in expected(case)[part].items():
            if ("refused" in values) == refused:
                chosen.append(pytest.param(name, id=name.removesuffix("/prompt")))
    return chosen


ALL = directories("artifacts") + directories("artifacts", refused=True)
ANSWERING = directories("artifacts")
MODELS = directories("models")


def case_of(name: str) -> Path:
    """format1/kv-gpt2 of format1/kv-gpt2/prompt/one."""
    return ARTIFACTS.joinpath(*Path(name).parts[:2])


def told(name: str, part: str = "artifacts") -> dict[str, Any]:
    values: dict[str, Any] = expected(case_of(name))[part][name]
    return values


def stored(name: str) -> dict[str, Tensor]:
    """The tensors of expected.safetensors that belong to one directory."""
    every = load_file(case_of(name) / "expected.safetensors")
    return {key.partition("|")[2]: value for key, value in every.items() if key.startswith(f"{name}|")}


def batch_of(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("batch."): value for key, value in values.items() if key.startswith("batch.")}


def some(logits: Tensor) -> Tensor:
    """What was stored of the scores: every fourth of a vocabulary, all of a few classes."""
    return logits if logits.shape[1] < 10 else logits[:, ::4]


def bits(value: Tensor) -> tuple[list[int], bytes]:
    return list(value.shape), value.detach().contiguous().numpy().tobytes()


# Tests ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_facts_of_an_old_artifact_are_those_it_was_saved_with(name: str) -> None:
    saved = told(name)
    assert facts(ARTIFACTS / name) == {key: saved[key] for key in facts(ARTIFACTS / name)}


@pytest.mark.parametrize("name", ANSWERING)
def test_tensors_of_an_old_artifact_come_back_bit_for_bit(name: str) -> None:
    every = stored(name)
    saved = {key: value for key, value in every.items() if key.startswith("head.") or key in ("prompt", "initial")}
    loaded = tensors(ARTIFACTS / name)
    assert {key: bits(value) for key, value in loaded.items()} == {key: bits(value) for key, value in saved.items()}


@pytest.mark.parametrize("name", ANSWERING)
def test_an_old_artifact_scores_a_batch_as_then_and_fits_its_backbone_without_warnings(name: str) -> None:
    saved, (ready, warnings) = stored(name), opened(ARTIFACTS / name)
    logits, values, mask = scores(ready, batch_of(saved))
    torch.testing.assert_close(some(logits), saved["logits"], **CLOSE)
    if "rows.values" in saved:
        assert torch.equal(mask, saved["rows.mask"])
        torch.testing.assert_close(values, saved["rows.values"], **CLOSE)
    else:
        assert [bits(row) for row in values] == [bits(saved["prompt"])] * len(values)
    assert list(warnings) == told(name)["warnings"] == []


@pytest.mark.parametrize("name", ANSWERING)
def test_an_old_artifact_answers_texts_as_then(name: str) -> None:
    now, then = answered(opened(ARTIFACTS / name)[0], ARTIFACTS / name), told(name)["answers"]
    assert [(one["value"], one["text"]) for one in now] == [(one["value"], one["text"]) for one in then]
    for one, other in zip(now, then, strict=True):
        assert one["scores"] == pytest.approx(other["scores"], abs=1e-5)
    settings = evaluation_settings(ARTIFACTS / name)
    assert settings == {key: told(name)["evaluate"][key] for key in settings}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_with_old_prompts_has_the_loss_and_the_scores_of_then(name: str) -> None:
    saved, model = told(name, "models"), model_of(ARTIFACTS / name)
    assert list(model.tasks) == saved["tasks"]
    first = (
        name if (ARTIFACTS / name / "softprompts.json").exists() else next(iter(expected(case_of(name))["artifacts"]))
    )
    tasks = [model.tasks[row % len(model.tasks)] for row in range(3)]
    loss, logits = model_scores(model, tasks, batch_of(stored(first)))
    assert loss == pytest.approx(saved["loss"], abs=1e-5)
    last = logits if logits.dim() == 2 else logits[:, -1]
    torch.testing.assert_close(some(last), stored(name)["model.logits"], **CLOSE)


@pytest.mark.parametrize("name", ANSWERING)
def test_an_old_artifact_that_is_saved_again_scores_as_before(name: str, tmp_path: Path) -> None:
    new = resaved(ARTIFACTS / name, tmp_path / "new")
    logits, _, _ = scores(opened(new)[0], batch_of(stored(name)))
    torch.testing.assert_close(some(logits), stored(name)["logits"], **CLOSE)
    version = json.loads((new / "softprompts.json").read_text())["format_version"]
    assert version >= json.loads((ARTIFACTS / name / "softprompts.json").read_text())["format_version"]
    assert facts(new) == facts(ARTIFACTS / name)


@pytest.mark.parametrize("name", directories("artifacts", refused=True))
def test_what_pretraining_taught_answers_no_task(name: str) -> None:
    with pytest.raises(ArtifactError, match="holds what pretraining taught method ipt and answers no task"):
        opened(ARTIFACTS / name)


def test_old_artifacts_start_new_runs() -> None:
    """A plain prompt, factors that tasks shared, sources of a mixture, and what pretraining taught."""
    plain = ARTIFACTS / "format1" / "input-llama" / "prompt"
    start = started(InitConfig(kind="artifact", path=str(plain)), 4)
    assert bits(start.prompt) == bits(stored("format1/input-llama/prompt")["prompt"])
    start = started(InitConfig(kind="multitask", path=str(ARTIFACTS / "format2" / "shared" / "prompt")), 3)
    parts = [load_file(path) for path in sorted((ARTIFACTS / "format2" / "shared").rglob("softprompts.safetensors"))]
    assert bits(start.prompt) == bits(parts[0]["state.shared"])
    assert len(start.factors) == 2
    sources = (str(plain), str(ARTIFACTS / "format3" / "sum" / "prompt"))
    start = started(InitConfig(kind="zeros", sources=sources), 4)
    assert bits(start.sources[1]) == bits(stored("format3/sum/prompt")["prompt"])
    table = ARTIFACTS / "format3" / "ipt-pretrained" / "table"
    start = started(InitConfig(kind="zeros", state=str(table)), 4)
    written = load_file(table / "softprompts.safetensors")
    taught = {key: bits(value) for key, value in written.items() if key.startswith("state.")}
    assert {key.replace("shared.", "state.", 1): bits(value) for key, value in start.state.items()} == taught


def test_format_3_has_every_method_every_place_and_every_site() -> None:
    saved = [
        values for case in cases() for values in expected(case)["artifacts"].values() if case.parent.name == "format3"
    ]
    assert {values["method"] for values in saved} == set(METHODS)
    assert {values["place"] for values in saved} == {"first", "after_start", "suffix", "template"}
    assert {values["site"] for values in saved} == {"input", "decoder", "layers", "kv"}
    for name in ("format1", "format2", "format3"):
        for path in (ARTIFACTS / name).rglob("softprompts.json"):
            assert json.loads(path.read_text())["format_version"] == int(name[-1])


@pytest.mark.parametrize("name", ANSWERING)
def test_training_had_moved_what_is_stored(name: str) -> None:
    saved = load_file(ARTIFACTS / name / "softprompts.safetensors")
    if "prompt" in saved:
        assert not torch.equal(saved["prompt"], saved["initial"])
        assert bool(saved["prompt"].abs().sum() > 0)
    else:
        assert all(bool(value.abs().sum() > 0) for key, value in saved.items() if key.startswith("state."))


def test_a_checkpoint_of_the_old_library_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same run, as it is configured now; run.json beside the checkpoint is how it was configured then."""
    monkeypatch.chdir(ARTIFACTS)
    file = shutil.copy(CHECKPOINT / "checkpoint.safetensors", tmp_path)
    with pytest.raises(TrainingError) as caught:
        run(parse(run_values(tmp_path)))
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)
    assert Path(file).read_bytes() == (CHECKPOINT / "checkpoint.safetensors").read_bytes()
    assert not (tmp_path / "prompt").exists()
