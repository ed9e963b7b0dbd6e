"""PEFT's names: the example of its prompt-tuning page runs, fields and starts are PEFT's, mistakes are refused."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import tiny
import tokenizers_tiny
from softprompts.errors import BackboneError, ConfigError
from softprompts.injection import Site
from softprompts.model import initialization
from softprompts.model.peft import PeftType, PromptEmbedding, PromptTuningConfig, PromptTuningInit, TaskType

TEXT = "Predict if sentiment of this review is positive, negative or neutral"


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    tokenizers_tiny.unigram().save_pretrained(tmp_path / "words")
    return str(tmp_path / "words")


@pytest.fixture
def words() -> torch.nn.Embedding:
    torch.manual_seed(0)
    return torch.nn.Embedding(400, 16)


def text(tokenizer: str, **more: Any) -> dict[str, Any]:
    more = {"num_virtual_tokens": 20, "token_dim": 16, "num_transformer_submodules": 1, **more}
    return {
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": TEXT,
        "tokenizer_name_or_path": tokenizer,
        **more,
    }


def test_the_example_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizers_tiny.unigram().save_pretrained("t5-base")
    t5_model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=400, d_model=768, d_kv=64, d_ff=16, num_layers=1, num_heads=12)
    )

    config = PromptTuningConfig(
        peft_type="PROMPT_TUNING",
        task_type="SEQ_2_SEQ_LM",
        num_virtual_tokens=20,
        token_dim=768,
        num_transformer_submodules=1,
        num_attention_heads=12,
        num_layers=12,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="Predict if sentiment of this review is positive, negative or neutral",
        tokenizer_name_or_path="t5-base",
    )

    # t5_model.shared is the word embeddings of the base model
    prompt_embedding = PromptEmbedding(config, t5_model.shared)

    assert isinstance(prompt_embedding.embedding, torch.nn.Embedding)
    indices = torch.arange(20)[None].expand(3, -1)
    assert prompt_embedding(indices).shape == (3, 20, 768)
    assert prompt_embedding(indices).requires_grad
    assert [name for name, _ in prompt_embedding.named_parameters()] == ["embedding.weight"]


def test_fields_order_and_defaults_are_those_of_the_page() -> None:
    theirs = {f.name: f.default for f in dataclasses.fields(peft.PromptTuningConfig)}
    ours = {f.name: f.default for f in dataclasses.fields(PromptTuningConfig)}
    # peft_version is not on the page, and modules_to_save was added later in the middle
    assert [*(n for n in theirs if n not in ("peft_version", "modules_to_save")), "modules_to_save"] == list(ours)
    assert {name: default for name, default in theirs.items() if name != "peft_version"} == ours
    assert {m.name for m in peft.PromptTuningInit} | {
        "CLASS_LABELS",
        "ARTIFACT",
        "RANDOM_NORMAL",
        "RANDOM_UNIFORM",
    } == {m.name for m in PromptTuningInit}
    assert {m.value for m in TaskType} == {m.value for m in peft.TaskType}
    assert PromptTuningConfig().peft_type == peft.PeftType.PROMPT_TUNING == PeftType.PROMPT_TUNING


@pytest.mark.parametrize("count", [3, 20, 70])
@pytest.mark.parametrize("copies", [1, 2])
def test_text_starts_are_pefts_bit_for_bit(tokenizer: str, words: Any, count: int, copies: int) -> None:
    options = text(tokenizer, num_virtual_tokens=count, num_transformer_submodules=copies)
    ours = PromptEmbedding(PromptTuningConfig(**options), words).embedding.weight
    theirs = peft.PromptEmbedding(peft.PromptTuningConfig(**options), words).embedding.weight
    assert torch.equal(ours, theirs)
    assert ours.dtype == theirs.dtype == torch.float32
    assert ours.shape == (count * copies, 16)


def test_text_keeps_special_tokens_and_half_precision_words_become_float32(tokenizer: str, words: Any) -> None:
    words = words.to(torch.bfloat16)
    ids = transformers.AutoTokenizer.from_pretrained(tokenizer)(TEXT)["input_ids"]
    options = text(tokenizer, num_virtual_tokens=len(ids))
    found = PromptEmbedding(PromptTuningConfig(**options), words).embedding.weight
    assert ids[-1] == 1  # </s>
    assert torch.equal(found, words.weight[ids].float())


def test_a_model_takes_the_start_that_peft_would(tokenizer: str) -> None:
    bb = tiny.backbone("llama")
    config = PromptTuningConfig(**text(tokenizer, token_dim=32, num_virtual_tokens=4, prompt_tuning_init_text="e a"))
    ids = initialization.text_ids(transformers.AutoTokenizer.from_pretrained(tokenizer), "e a", 4, special=True)
    described, start = config.describe(bb)
    assert start is not None
    assert torch.equal(start.prompt, initialization.from_ids(bb, Site(), ids))
    assert (described.num_virtual_tokens, described.init.kind) == (4, "text")


def test_sampled_words_are_words_and_none_comes_twice(words: Any) -> None:
    config = PromptTuningConfig(num_virtual_tokens=400, token_dim=16, prompt_tuning_init="SAMPLE_VOCAB")
    found = PromptEmbedding(config, words).embedding.weight
    assert torch.equal(found.sum(1).sort().values, words.weight.sum(1).sort().values)
    with pytest.raises(ConfigError, match="401 different words are needed, but the model has 400"):
        PromptEmbedding(dataclasses.replace(config, num_virtual_tokens=401), words)


@pytest.mark.parametrize(("kind", "expected"), [("RANDOM", 0.02), ("RANDOM_NORMAL", 1.0), ("RANDOM_UNIFORM", 0.2887)])
def test_random_starts_have_their_scale(words: Any, kind: str, expected: float) -> None:
    torch.nn.init.normal_(words.weight, std=0.02)
    found = PromptEmbedding(
        PromptTuningConfig(num_virtual_tokens=200, prompt_tuning_init=kind), words
    ).embedding.weight.detach()
    assert float(found.square().mean().sqrt()) == pytest.approx(expected, rel=0.05)
    assert float(found.mean()) == pytest.approx(0, abs=expected / 10)


def test_class_labels_are_the_means_of_their_pieces(tokenizer: str, words: Any) -> None:
    config = PromptTuningConfig(
        num_virtual_tokens=5,
        prompt_tuning_init="CLASS_LABELS",
        prompt_tuning_init_text="positive, negative",
        tokenizer_name_or_path=tokenizer,
    )
    found = PromptEmbedding(config, words).embedding.weight
    pieces = transformers.AutoTokenizer.from_pretrained(tokenizer)("negative", add_special_tokens=False)["input_ids"]
    torch.testing.assert_close(found[1], words.weight[pieces].mean(0))
    assert all((words.weight == row).all(1).any() for row in found[2:])


def test_rows_are_tokens_times_submodules_and_one_unless_given(words: Any) -> None:
    assert PromptEmbedding(PromptTuningConfig(num_virtual_tokens=6), words).embedding.weight.shape == (6, 16)
    twice = PromptTuningConfig(num_virtual_tokens=6, num_transformer_submodules=2)
    assert PromptEmbedding(twice, words)(torch.arange(12)[None]).shape == (1, 12, 16)


def test_in_inference_mode_nothing_is_read(words: Any) -> None:
    config = PromptTuningConfig(**text("/nowhere", inference_mode=True))
    assert PromptEmbedding(config, words).embedding.weight.shape == (20, 16)
    with pytest.raises(BackboneError, match="no tokenizer at '/nowhere'"):
        PromptEmbedding(dataclasses.replace(config, inference_mode=False), words)


def test_peers_remote_code(tokenizer: str, words: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    load = transformers.AutoTokenizer.from_pretrained

    def spy(name: str, **options: Any) -> Any:
        seen.append(options)
        return load(name, **options)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", spy)
    given = {"trust_remote_code": True, "use_fast": True}
    PromptEmbedding(PromptTuningConfig(**text(tokenizer, tokenizer_kwargs=given)), words)
    assert seen == [{"use_fast": True}]
    assert given == {"trust_remote_code": True, "use_fast": True}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_tuning_init": "TXET"}, "prompt_tuning_init 'TXET' is unknown; did you mean 'TEXT'"),
        ({"task_type": "CAUSAL"}, "task_type 'CAUSAL' is unknown; did you mean 'CAUSAL_LM'"),
        ({"peft_type": "LORA"}, "peft_type 'LORA' is unknown; known: PROMPT_TUNING"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens must be a positive number"),
        ({"num_virtual_tokens": "20"}, "num_virtual_tokens must be a positive number"),
        ({"prompt_tuning_init": "ARTIFACT"}, "prompt_tuning_init_text can't be None"),
    ],
)
def test_peers_typos(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PromptTuningConfig(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a"},
        {"prompt_tuning_init": "TEXT", "tokenizer_name_or_path": "a"},
        {"tokenizer_kwargs": {"use_fast": True}},
        {"task_type": "NOTHING"},
    ],
)
def test_what_peft_refuses_is_refused_here(options: dict[str, Any]) -> None:
    for kind in (peft.PromptTuningConfig, PromptTuningConfig):
        with pytest.raises(ValueError) as error:
            kind(**options)
        if "task_type" not in options:
            assert str(error.value).startswith(("When prompt_tuning_init='TEXT', ", "tokenizer_kwargs only valid when"))


def test_an_embedding_needs_a_length_and_the_right_width(words: Any) -> None:
    with pytest.raises(ConfigError, match="num_virtual_tokens is missing"):
        PromptEmbedding(PromptTuningConfig(), words)
    with pytest.raises(ConfigError, match="token_dim is 768, but the word embeddings are 16 wide"):
        PromptEmbedding(PromptTuningConfig(num_virtual_tokens=3, token_dim=768), words)


def test_a_task_type_must_fit_the_model() -> None:
    with pytest.raises(ConfigError, match="CAUSAL_LM does not fit BertForMaskedLM, a masked model with head 'lm'"):
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3).describe(tiny.backbone("bert"))
    PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3).describe(tiny.backbone("llama", "sequence"))


def test_peft_itself_is_never_imported() -> None:
    program = "import sys, softprompts.peft, softprompts.model; assert 'peft' not in sys.modules, 'peft was imported'"
    source = str(Path(__file__).parents[1] / "src")
    subprocess.run([sys.executable, "-c", program], check=True, env={"PYTHONPATH": source, "PATH": ""})
