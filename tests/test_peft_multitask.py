"""PEFT's names for multitask prompt tuning: same fields, same tensors, same results; the two-stage example runs."""

import copy
import dataclasses
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.multitask_prompt_tuning import MultitaskPromptEmbedding as Theirs
from safetensors.torch import load_file, save_file
from torch import Tensor

import rows
import tiny
import tokenizers_tiny
from closeness import assert_close
from softprompts import (
    MultitaskPromptEmbedding,
    MultitaskPromptTuningConfig,
    MultitaskPromptTuningInit,
    SoftPromptModel,
)
from softprompts.errors import ArtifactError, ConfigError
from softprompts.methods import fold
from softprompts.model.peft import PromptTuningConfig

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks

P, D = 5, 16
TENSORS = "adapter_model.safetensors"


@pytest.fixture
def words() -> torch.nn.Embedding:
    torch.manual_seed(0)
    return torch.nn.Embedding(50, D)


def config(**more: Any) -> MultitaskPromptTuningConfig:
    return MultitaskPromptTuningConfig(**{"num_virtual_tokens": P, "token_dim": D, **more})


def peers(words: Any, **more: Any) -> Any:
    """PEFT's embedding for the same configuration."""
    options = {"num_virtual_tokens": P, "token_dim": D, "num_transformer_submodules": 1, **more}
    return Theirs(peft.MultitaskPromptTuningConfig(**options), words)


def fill(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(rows.random(i, *parameter.shape) + 0.5)


def source(path: Path, tasks: int = 3, ranks: int = 1, length: int = P, width: int = D) -> Path:
    """A trained multitask prompt in PEFT's file."""
    stored = {
        "prompt_embeddings": rows.random(1, length, width),
        "prefix_task_cols": rows.random(2, tasks, length, ranks) + 1,
        "prefix_task_rows": rows.random(3, tasks, ranks, width) + 1,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(stored, path)
    return path


def effective(module: Any, task: int) -> Tensor:
    return module(torch.arange(module.embedding.weight.shape[0])[None], torch.tensor([task]))[0].detach()


def test_fields_order_and_defaults_are_pefts() -> None:
    theirs = {f.name: f.default for f in dataclasses.fields(peft.MultitaskPromptTuningConfig)}
    ours = {f.name: f.default for f in dataclasses.fields(MultitaskPromptTuningConfig)}
    assert ours.pop("factors_init") == "ones"
    assert {name: default for name, default in theirs.items() if name != "peft_version"} == ours
    assert list(ours)[-4:] == list(theirs)[-4:]
    assert {m.name for m in peft.MultitaskPromptTuningInit} <= {m.name for m in MultitaskPromptTuningInit}
    assert {m.name for m in MultitaskPromptTuningInit} >= {"SAMPLE_VOCAB", "CLASS_LABELS", "ARTIFACT"}
    assert config().peft_type == peft.PeftType.MULTITASK_PROMPT_TUNING
    assert config(peft_type=peft.PeftType.MULTITASK_PROMPT_TUNING).prompt_tuning_init == "RANDOM"


@pytest.mark.golden
@pytest.mark.parametrize("ranks", [1, 3])
def test_training_begins_at_the_shared_prompt_bit_for_bit(words: Any, ranks: int) -> None:
    made = MultitaskPromptEmbedding(config(num_tasks=3, num_ranks=ranks, prompt_tuning_init="SAMPLE_VOCAB"), words)
    assert [(name, tuple(p.shape)) for name, p in made.named_parameters()] == [
        ("prefix_task_cols", (3, P, ranks)),
        ("prefix_task_rows", (3, ranks, D)),
        ("embedding.weight", (P, D)),
    ]
    assert all((words.weight == row).all(1).any() for row in made.embedding.weight)
    for task in range(3):
        assert torch.equal(effective(made, task), made.embedding.weight)


def test_pefts_start_is_there_by_name(words: Any) -> None:
    torch.manual_seed(0)
    made = MultitaskPromptEmbedding(config(num_tasks=40, num_ranks=2, factors_init="normal"), words)
    for part in (made.prefix_task_cols, made.prefix_task_rows):
        assert float(part.detach().std()) == pytest.approx(0.02, rel=0.2)
    assert float(effective(made, 0).std() / made.embedding.weight.detach().std()) < 0.01


@pytest.mark.golden
def test_with_rank_one_the_factors_scale_rows_and_columns(words: Any) -> None:
    made = MultitaskPromptEmbedding(config(num_tasks=2), words)
    fill(made)
    u, v = made.prefix_task_cols[1, :, 0], made.prefix_task_rows[1, 0]
    expected = torch.diag(u) @ made.embedding.weight @ torch.diag(v)
    assert_close(effective(made, 1), expected.detach())
    before = effective(made, 1)
    with torch.no_grad():
        u.mul_(8)
        v.div_(8)
    assert torch.equal(effective(made, 1), before)


@pytest.mark.golden
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("ids", [[2, 0, 2], [1]])
def test_values_and_gradients_are_pefts(words: Any, ranks: int, copies: int, ids: list[int]) -> None:
    options = {"num_tasks": 3, "num_ranks": ranks, "num_transformer_submodules": copies}
    ours, theirs = MultitaskPromptEmbedding(config(**options), words), peers(words, **options)
    fill(theirs)
    ours.load_state_dict(theirs.state_dict())
    indices, weights = torch.arange(P * copies).expand(3, -1), rows.random(9, 3, P * copies, D)
    before = ours.embedding.weight.detach().clone()
    found, expected = (made(indices, torch.tensor(ids)) for made in (ours, theirs))
    assert_close(found, expected)
    if ranks == 1:
        assert torch.equal(found, expected)
    assert torch.equal(ours.embedding.weight, before)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs.get_parameter(name).grad, atol=1e-5, rtol=1e-5)
        assert parameter.grad.abs().sum() > 0
    absent = next(i for i in range(3) if i not in ids)
    assert not ours.prefix_task_cols.grad[absent].any()


def test_some_of_the_tokens_get_the_factors_of_their_own_places(words: Any) -> None:
    made = MultitaskPromptEmbedding(config(), words)
    fill(made)
    found = made(torch.tensor([[3, 1]]), torch.tensor([0]))[0]
    assert_close(found, effective(made, 0)[[3, 1]])


def test_task_ids_are_needed_and_must_be_there(words: Any) -> None:
    ours, theirs = MultitaskPromptEmbedding(config(num_tasks=2), words), peers(words, num_tasks=2)
    for made in (ours, theirs):
        with pytest.raises(ValueError, match=r"^task_ids cannot be None$"):
            made(torch.arange(P)[None], None)
    for wrong in (2, -1):
        with pytest.raises(ConfigError, match=rf"task_ids \[{wrong}\] name tasks that do not exist; num_tasks is 2"):
            ours(torch.arange(P)[None], torch.tensor([wrong]))


def test_parameter_counts_are_those_of_the_paper() -> None:
    words = torch.nn.Embedding(10, 768)
    one = MultitaskPromptTuningConfig(num_virtual_tokens=100)
    assert sum(p.numel() for p in MultitaskPromptEmbedding(one, words).parameters()) == 77_668
    eight = dataclasses.replace(one, num_tasks=8)
    assert sum(p.numel() for p in MultitaskPromptEmbedding(eight, words).parameters()) / 8 == 10_468


STARTS = [("AVERAGE_SOURCE_TASKS", 1), ("EXACT_SOURCE_TASK", 1), ("ONLY_SOURCE_SHARED", 1), ("ONLY_SOURCE_SHARED", 4)]


@pytest.mark.golden
@pytest.mark.parametrize(("kind", "tasks"), STARTS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_starts_from_a_source_are_pefts(words: Any, tmp_path: Path, kind: str, tasks: int, ranks: int) -> None:
    options = {
        "prompt_tuning_init": kind,
        "prompt_tuning_init_state_dict_path": str(source(tmp_path / "source.safetensors", ranks=ranks)),
        "prompt_tuning_init_task": 2,
        "num_tasks": tasks,
        "num_ranks": ranks,
    }
    ours, theirs = MultitaskPromptEmbedding(config(**options), words), peers(words, **options)
    assert torch.equal(ours.embedding.weight, theirs.embedding.weight)
    if kind == "ONLY_SOURCE_SHARED":
        assert torch.equal(effective(ours, tasks - 1), ours.embedding.weight)
        return
    assert_close(ours.prefix_task_cols, theirs.prefix_task_cols)
    assert_close(ours.prefix_task_rows, theirs.prefix_task_rows)
    stored = load_file(tmp_path / "source.safetensors")
    means = stored["prefix_task_cols"].mean(0), stored["prefix_task_rows"].mean(0)
    product = (stored["prefix_task_cols"] @ stored["prefix_task_rows"]).mean(0)
    if kind == "AVERAGE_SOURCE_TASKS":  # of each factor by itself, not of their products
        assert torch.equal(ours.prefix_task_cols[0], means[0])
        assert not torch.allclose(ours.prefix_task_cols[0] @ ours.prefix_task_rows[0], product, atol=1e-3)


def test_peers_saved_target_asks_for_its_source(words: Any, tmp_path: Path) -> None:
    """PEFT opens the source again whenever it loads what was trained from it; we never do."""
    path = source(tmp_path / "stage1" / TENSORS, width=32)
    options = {
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": P,
        "prompt_tuning_init": "AVERAGE_SOURCE_TASKS",
        "prompt_tuning_init_state_dict_path": str(path),
    }
    theirs = peft_model("gpt2", **options)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = SoftPromptModel(tiny.model("gpt2"), MultitaskPromptTuningConfig(**options), "target")
    ours.save_pretrained(tmp_path / "ours")
    shutil.rmtree(tmp_path / "stage1")
    with pytest.raises(FileNotFoundError):
        peft.PeftModel.from_pretrained(tiny.model("gpt2"), tmp_path / "theirs")
    ids = rows.ids(1, 6)[None]
    expected = theirs(input_ids=ids, task_ids=torch.tensor([0])).logits[:, P:]
    for name in ("theirs", "ours"):
        again = SoftPromptModel.from_pretrained(tiny.model("gpt2"), tmp_path / name)
        torch.testing.assert_close(again(ids).logits, expected, atol=1e-5, rtol=1e-5)
        assert all(p.requires_grad for p in again.prompts.parameters())
    loaded = peft.PeftModel.from_pretrained(tiny.model("gpt2"), tmp_path / "ours")
    torch.testing.assert_close(loaded(input_ids=ids).logits[:, P:], expected, atol=1e-5, rtol=1e-5)
    # the embedding too, where its tensors will be loaded
    quiet = MultitaskPromptTuningConfig(**options, inference_mode=True)
    assert MultitaskPromptEmbedding(quiet, words).prefix_task_cols.shape == (1, P, 1)
    assert SoftPromptModel(tiny.model("gpt2"), quiet).tasks == ("default",)
    with pytest.raises(ConfigError, match=r"prompt_tuning_init_state_dict_path: .* cannot be read: No such file"):
        MultitaskPromptEmbedding(dataclasses.replace(quiet, inference_mode=False), torch.nn.Embedding(9, 32))


def from_source(path: Path, **more: Any) -> dict[str, Any]:
    return {"prompt_tuning_init": "EXACT_SOURCE_TASK", "prompt_tuning_init_state_dict_path": str(path), **more}


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ({"length": 7}, {}, "holds a prompt of 7 tokens, but 5 are needed; set num_virtual_tokens to match"),
        ({"width": 8}, {}, "holds a prompt of width 8, but width 16 is needed"),
        ({"ranks": 2}, {}, "holds factors of rank 2, but rank 1 is needed; set num_ranks to match, or take ONLY"),
        ({}, {"prompt_tuning_init_task": 3}, "prompt_tuning_init_task 3 is not a task of .*; its tasks: 0, 1, 2"),
        (
            {},
            {"prompt_tuning_init_task": "qqp"},
            "prompt_tuning_init_task 'qqp' is not a task of .*; its tasks: 0, 1, 2",
        ),
        ({}, {"prompt_tuning_init_task": None}, "prompt_tuning_init_task None is not a task"),
        ({}, {"prompt_tuning_init_task": True}, "prompt_tuning_init_task True is not a task"),
        ({}, {"token_dim": 8}, "token_dim is 8, but the word embeddings are 16 wide"),
        ({}, {"num_tasks": 3}, "EXACT_SOURCE_TASK starts one task, but num_tasks is 3; set it to 1, or start several"),
    ],
)
def test_a_source_that_does_not_fit_is_refused(
    words: Any, tmp_path: Path, given: dict[str, int], options: dict[str, Any], message: str
) -> None:
    path = source(tmp_path / "source.safetensors", **given)
    with pytest.raises(ConfigError, match=message):
        MultitaskPromptEmbedding(config(**from_source(path, **options)), words)


def test_a_source_that_cannot_be_read_is_refused(words: Any, tmp_path: Path) -> None:
    torch.save({"prompt_embeddings": torch.ones(P, D)}, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "MULTITASK_PROMPT_TUNING"}')
    (tmp_path / "empty").mkdir()
    save_file({"prompt_embeddings": torch.ones(P, D)}, tmp_path / "plain.safetensors")
    save_file(
        {"prompt_embeddings": torch.ones(P, D), "prefix_task_cols": torch.ones(2, P, 1)}
        | {"prefix_task_rows": torch.ones(3, 1, D)},
        tmp_path / "odd.safetensors",
    )
    for path, message in (
        ("adapter_model.bin", r"torch pickle can execute code when read and is not opened: convert it.*save_file"),
        ("", r"adapter_model.bin is a pickle.*safe_serialization=True"),
        ("nowhere", "cannot be read: No such file or directory"),
        ("empty", "empty holds no multitask prompts; one is needed"),
        ("plain.safetensors", "no tensor 'prefix_task_cols', which a multitask prompt has; found: prompt_embeddings"),
        ("odd.safetensors", r"prefix_task_cols \[2, 5, 1\] and prefix_task_rows \[3, 1, 16\] do not fit each other"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            MultitaskPromptEmbedding(config(**from_source(tmp_path / path)), words)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_tuning_init": "AVERAGE_SOURCE_TASK"}, "did you mean 'AVERAGE_SOURCE_TASKS'"),
        ({"prompt_tuning_init": "TXET"}, "prompt_tuning_init 'TXET' is unknown; did you mean 'TEXT'"),
        ({"prompt_tuning_init": "ONLY_SOURCE_SHARED"}, "prompt_tuning_init_state_dict_path can't be None"),
        ({"factors_init": "one"}, "factors_init 'one' is unknown; did you mean 'ones'"),
        ({"num_tasks": 0}, "num_tasks must be a positive number, given 0"),
        ({"num_ranks": "1"}, "num_ranks must be a positive number, given '1'"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens must be a positive number"),
        ({"peft_type": "PROMPT_TUNING"}, "peft_type PROMPT_TUNING is not that of a MultitaskPromptTuningConfig"),
    ],
)
def test_peers_typos(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**options)
    with pytest.raises(ConfigError, match="peft_type MULTITASK_PROMPT_TUNING is not that of a PromptTuningConfig"):
        PromptTuningConfig(peft_type="MULTITASK_PROMPT_TUNING")


def peft_model(name: str, **options: Any) -> Any:
    model = tiny.model(name)
    model.name_or_path = ""  # PEFT would look it up
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own remarks about models without a name
        return peft.get_peft_model(model, peft.MultitaskPromptTuningConfig(**options)).eval()


def test_a_directory_of_pefts_is_a_source_and_only_the_encoders_half_of_its_rows_is_wanted(tmp_path: Path) -> None:
    theirs = peft_model("t5", task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P, num_tasks=2)
    fill(theirs.prompt_encoder)
    theirs.save_pretrained(tmp_path)
    stored, words = load_file(tmp_path / TENSORS), torch.nn.Embedding(9, 32)
    assert stored["prompt_embeddings"].shape == (2 * P, 32)
    for path in (tmp_path, tmp_path / TENSORS):
        for count in (1, 2):
            options = from_source(path, prompt_tuning_init_task="1", token_dim=32, num_transformer_submodules=count)
            made = MultitaskPromptEmbedding(config(**options), words)
            assert torch.equal(made.embedding.weight, stored["prompt_embeddings"][: P * count])
            assert torch.equal(made.prefix_task_cols[0], stored["prefix_task_cols"][1, : P * count])
            assert torch.equal(made.prefix_task_rows[0], stored["prefix_task_rows"][1])


@pytest.mark.parametrize("kind", ["AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK"])
def test_the_two_stages_of_pefts_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Source tasks together, then a target from them: PEFT's example with one import changed."""
    monkeypatch.chdir(tmp_path)
    tokenizers_tiny.unigram().save_pretrained("t5-tiny")
    base = tiny.model("t5", tokenizer=tokenizers_tiny.unigram())
    source_config = MultitaskPromptTuningConfig(
        tokenizer_name_or_path="t5-tiny",
        num_tasks=2,
        task_type="SEQ_2_SEQ_LM",
        prompt_tuning_init=MultitaskPromptTuningInit.TEXT,
        num_virtual_tokens=50,
        num_transformer_submodules=1,
        prompt_tuning_init_text="classify the following into either positive or negative, or entailment or neutral:",
    )
    target_config = MultitaskPromptTuningConfig(
        tokenizer_name_or_path="t5-tiny",
        num_tasks=1,
        task_type="SEQ_2_SEQ_LM",
        prompt_tuning_init=kind,
        prompt_tuning_init_state_dict_path="checkpoints_source/adapter_model.safetensors",
        num_virtual_tokens=50,
        num_transformer_submodules=1,
    )
    batch = {"input_ids": torch.stack([rows.ids(i, 6) for i in range(4)]), "task_ids": torch.tensor([0, 1, 0, 1])}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["labels"] = torch.tensor([[7, 1], [8, 1], [7, 1], [8, 1]])

    def train(model: Any, batch: dict[str, Tensor]) -> list[float]:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        losses = []
        for _ in range(8):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    model = SoftPromptModel(copy.deepcopy(base), source_config)
    losses = train(model, batch)
    assert losses[-1] < losses[0]
    model.save_pretrained("checkpoints_source")
    first = train(SoftPromptModel(copy.deepcopy(base), source_config), {**batch, "task_ids": torch.tensor([0])})

    model = SoftPromptModel(copy.deepcopy(base), target_config)
    stored = load_file("checkpoints_source/adapter_model.safetensors")
    method = model.registry.method("default")
    assert torch.equal(method.shared.prompt, stored["prompt_embeddings"])
    expected = stored["prefix_task_rows"]
    torch.testing.assert_close(method.rows.detach(), expected.mean(0) if kind.startswith("AVER") else expected[0])
    second = train(model, {**batch, "task_ids": torch.zeros(4, dtype=torch.long)})
    assert second[0] < first[0]
    assert second[-1] < second[0]


def test_a_source_of_ours_knows_its_tasks_by_name_and_its_weights(tmp_path: Path) -> None:
    names = ["mnli", "qqp", "sst2"]
    shared = MultitaskPromptTuningConfig(num_virtual_tokens=P, num_tasks=3, num_ranks=2)
    model = SoftPromptModel(tiny.model("llama"), shared, tasks=names)
    fill(model.prompts)
    model.add_task("plain", PromptTuningConfig(num_virtual_tokens=P))
    model.save_pretrained(tmp_path / "all")
    methods = {name: model.registry.method(name) for name in names}
    words = torch.nn.Embedding(9, 32)
    options = {"num_virtual_tokens": P, "num_ranks": 2}
    for task in (1, "qqp"):
        made = MultitaskPromptEmbedding(
            MultitaskPromptTuningConfig(**options, **from_source(tmp_path / "all", prompt_tuning_init_task=task)), words
        )
        assert torch.equal(made.prefix_task_rows[0], methods["qqp"].rows)
        assert_close(effective(made, 0), fold(methods["qqp"]))
    one = MultitaskPromptTuningConfig(**options, **from_source(tmp_path / "all" / "sst2"))
    assert torch.equal(MultitaskPromptEmbedding(one, words).prefix_task_cols[0], methods["sst2"].columns)
    with pytest.raises(ConfigError, match=r"'qpq' is not a task of .*; did you mean 'qqp'.*: 0 mnli, 1 qqp, 2 sst2"):
        MultitaskPromptEmbedding(
            MultitaskPromptTuningConfig(**options, **from_source(tmp_path / "all", prompt_tuning_init_task="qpq")),
            words,
        )
    with pytest.raises(ConfigError, match="plain holds no multitask prompts; one is needed"):
        MultitaskPromptEmbedding(
            MultitaskPromptTuningConfig(**options, **from_source(tmp_path / "all" / "plain")), words
        )
    with pytest.raises(ArtifactError, match="made for other weights"):
        SoftPromptModel(tiny.model("llama", seed=1), one)
    one_file = from_source(tmp_path / "all" / "sst2" / TENSORS)  # which holds the folded prompt
    made = MultitaskPromptEmbedding(MultitaskPromptTuningConfig(**options, **one_file), words)
    assert torch.equal(made.prefix_task_rows[0], methods["sst2"].rows)
    # what a run of several tasks leaves: one artifact beside the other, in a directory without an order
    for name in ("tasks.json", TENSORS, "adapter_config.json"):
        (tmp_path / "all" / name).unlink()
    again = MultitaskPromptTuningConfig(**options, **from_source(tmp_path / "all", prompt_tuning_init_task="sst2"))
    target = SoftPromptModel(tiny.model("llama"), again, "target")
    assert torch.equal(fold(target.registry.method("target")), fold(methods["sst2"]))
    target.save_pretrained(tmp_path / "target")
    told = json.loads((tmp_path / "target" / "softprompts.json").read_text())["config"]["prompt"]["init"]
    assert (told["kind"], told["factors"], told["task"]) == ("multitask", "task", "sst2")
