"""PEFT's files, both ways: what it loads of ours, what we load of its, what is refused."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny
from artifacts import D, P, assert_equal, bits, edit, example, fingerprint, refused
from softprompts.artifacts import artifact as a

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks

PEFT_KEYS = {field.name for field in dataclasses.fields(peft.PromptTuningConfig)}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return a.save(example(), tmp_path / "prompt")


def head_of(model: Any, *names: str) -> dict[str, Tensor]:
    return {key: torch.randn_like(value) for key, value in model.state_dict().items() if key.split(".")[0] in names}


PAIRS = [  # tiny model, our head, head modules, PEFT's class
    ("gpt2", "lm", (), peft.PeftModelForCausalLM),
    ("llama", "lm", (), peft.PeftModelForCausalLM),
    ("opt", "lm", (), peft.PeftModelForCausalLM),
    ("t5", "lm", (), peft.PeftModelForSeq2SeqLM),
    ("bart", "lm", (), peft.PeftModelForSeq2SeqLM),
    ("bert", "lm", (), peft.PeftModelForFeatureExtraction),
    ("bert", "features", (), peft.PeftModelForFeatureExtraction),
    ("bert", "sequence", ("classifier",), peft.PeftModelForSequenceClassification),
    ("roberta", "sequence", ("classifier",), peft.PeftModelForSequenceClassification),
    ("llama", "sequence", ("score",), peft.PeftModelForSequenceClassification),
    ("bert", "token", ("classifier",), peft.PeftModelForTokenClassification),
    ("gpt2", "token", ("classifier",), peft.PeftModelForTokenClassification),
    ("bert", "span", ("qa_outputs",), peft.PeftModelForQuestionAnswering),
]


@pytest.mark.parametrize(("name", "head", "modules", "kind"), PAIRS)
def test_ours_loads_in_peft(tmp_path: Path, name: str, head: str, modules: tuple[str, ...], kind: type) -> None:
    model = tiny.model(name, head)
    width = model.get_input_embeddings().weight.shape[1]
    made = example(
        prompt=torch.randn(P, width),
        initial=None,
        family=tiny.family(name).name,
        head=head,
        heads=head_of(model, *modules),
        fingerprint=None,
    )
    directory = a.save(made, tmp_path / "x")
    loaded = peft.PeftModel.from_pretrained(model, directory)
    assert type(loaded) is kind
    assert bits(loaded.prompt_encoder["default"].embedding.weight.detach()) == bits(made.prompt)
    inside = loaded.base_model.state_dict()
    for key, value in made.heads.items():
        module, _, rest = key.partition(".")
        assert bits(inside[f"{module}.modules_to_save.default.{rest}"]) == bits(value)
    # PEFT reads the prompt in its forward, rather than only holding it
    ids = torch.tensor([[3, 4, 5]])
    extra = {"labels": ids} if name in tiny.SEQ2SEQ else {}
    scores = loaded(input_ids=ids, attention_mask=torch.ones_like(ids), **extra)[1 if extra else 0]
    with torch.no_grad():
        loaded.prompt_encoder["default"].embedding.weight.add_(1)
    moved = loaded(input_ids=ids, attention_mask=torch.ones_like(ids), **extra)[1 if extra else 0]
    assert scores.shape == moved.shape
    assert not torch.equal(scores, moved)


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_our_config_is_the_one_peft_writes(tmp_path: Path, name: str) -> None:
    model = tiny.model(name)
    family = tiny.family(name).name
    facts = {key: getattr(model.config, key) for key in ("num_hidden_layers", "num_attention_heads")}
    made = example(
        prompt=torch.randn(P, 32),
        initial=None,
        family=family,
        fingerprint=fingerprint(architecture=facts),
        backbone="org/name",
        revision=None,
    )
    ours = (a.save(made, tmp_path / "ours") / "adapter_config.json").read_text()
    task_type = json.loads(ours)["task_type"]
    config = peft.PromptTuningConfig(task_type=task_type, num_virtual_tokens=P, num_transformer_submodules=1)
    model.name_or_path = ""  # PEFT would look it up
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "theirs")
    theirs = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    assert {**theirs, "base_model_name_or_path": "org/name"} == json.loads(ours)
    assert set(json.loads(ours)) == PEFT_KEYS
    assert ours == json.dumps(json.loads(ours), indent=2, sort_keys=True) + "\n"


def peft_saves(directory: Path, name: str, head: str = "lm", **options: Any) -> Any:
    task_type = "SEQ_CLS" if head == "sequence" else "SEQ_2_SEQ_LM" if name in tiny.SEQ2SEQ else "CAUSAL_LM"
    model = tiny.model(name, head)
    model.name_or_path = ""
    wrapped = peft.get_peft_model(model, peft.PromptTuningConfig(task_type=task_type, num_virtual_tokens=P, **options))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    wrapped.save_pretrained(directory)
    return wrapped


@pytest.mark.parametrize(
    ("name", "head", "family"),
    [("gpt2", "lm", "causal"), ("llama", "lm", "causal"), ("t5", "lm", "seq2seq"), ("bert", "sequence", None)],
)
def test_theirs_loads_in_ours(tmp_path: Path, name: str, head: str, family: str | None) -> None:
    wrapped = peft_saves(tmp_path / "theirs", name, head)
    loaded = a.load(tmp_path / "theirs")
    rows = wrapped.prompt_encoder["default"].embedding.weight.detach()
    assert rows.shape[0] == (2 * P if name == "t5" else P)
    assert bits(loaded.prompt) == bits(rows[:P])
    assert (loaded.family, loaded.head, loaded.site, loaded.placement) == (family, head, "input", "first")
    assert (loaded.task, loaded.initial, loaded.fingerprint, loaded.state) == ("theirs", None, None, {})
    assert loaded.version == "peft 0.21.2"
    inside = wrapped.base_model.state_dict()
    expected = (
        {}
        if head == "lm"
        else {f"classifier.{k}": f"classifier.modules_to_save.default.{k}" for k in ("weight", "bias")}
    )
    assert {key: bits(value) for key, value in loaded.heads.items()} == {
        k: bits(inside[v]) for k, v in expected.items()
    }
    # and once more through ours and back to PEFT
    directory = a.save(loaded, tmp_path / "ours")
    assert_equal(loaded, a.load(directory))
    again = peft.PeftModel.from_pretrained(tiny.model(name, head), directory)
    assert bits(again.prompt_encoder["default"].embedding.weight.detach()) == bits(rows[:P])


def test_a_half_precision_prompt_of_peft_is_widened_exactly(tmp_path: Path) -> None:
    peft_saves(tmp_path, "gpt2")
    stored = {"prompt_embeddings": torch.randn(P, 32, dtype=torch.bfloat16)}
    save_file(stored, tmp_path / "adapter_model.safetensors")
    assert bits(a.load(tmp_path).prompt) == bits(stored["prompt_embeddings"].float())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"placement": "after_start", "family": "masked"}, "placement after_start: PEFT puts the prompt before [CLS]"),
        ({"site": "kv"}, "site kv: PEFT's prompt tuning enters at the input embeddings only"),
        ({"head": "sequence"}, "head sequence without a trained copy: PEFT loads this task only with one"),
        (
            {"head": "sequence", "family": "seq2seq", "heads": {"classification_head.weight": torch.ones(2, 2)}},
            "head sequence of an encoder-decoder: its forward takes no input embeddings from PEFT",
        ),
        ({"family": None}, "family unknown: PEFT's task_type needs it"),
    ],
)
def test_what_peft_cannot_reproduce_is_not_written_for_it(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    a.save(example(), tmp_path / "x")  # PEFT's files of the replaced artifact must not stay behind
    directory = a.save(example(**changes), tmp_path / "x")
    assert json.loads((directory / "softprompts.json").read_text())["peft"] == reason
    assert sorted(os.listdir(directory)) == ["README.md", "softprompts.json", "softprompts.safetensors"]
    assert reason in (directory / "README.md").read_text()
    assert_equal(example(**changes), a.load(directory))


def test_peft_saving_over_ours_is_noticed(saved: Path) -> None:
    stored = load_file(saved / "adapter_model.safetensors")
    save_file({"prompt_embeddings": stored["prompt_embeddings"] + 1}, saved / "adapter_model.safetensors")
    assert "was not written by softprompts: PEFT saved here later" in refused(saved)
    for name in ("softprompts.json", "softprompts.safetensors"):
        (saved / name).unlink()
    assert torch.equal(a.load(saved).prompt, stored["prompt_embeddings"] + 1)


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    directory = a.save(example(heads={"score.weight": torch.ones(2, D)}), tmp_path / "theirs")
    for name in ("softprompts.json", "softprompts.safetensors"):
        (directory / name).unlink()
    return directory


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"peft_type": "LORA"},
            "peft_type 'LORA' is not a soft prompt that loads here; possible: PROMPT_TUNING, MULTI",
        ),
        ({"peft_type": ...}, "peft_type None is not a soft prompt"),
        (
            {"task_type": None},
            "task_type None (PEFT ignores the prompt of such a directory); set it to one of CAUSAL_LM",
        ),
        ({"task_type": ["X"]}, "task_type ['X']; set it to one of"),
        ({"num_virtual_tokens": 7}, f"prompt_embeddings has shape [{P}, {D}], but num_virtual_tokens 7"),
        ({"token_dim": 9}, f"token_dim 9 make [{P}, 9]"),
        ({"num_virtual_tokens": None}, "num_virtual_tokens is missing"),
        ({"num_virtual_tokens": True}, "num_virtual_tokens must be int, found bool"),
        ({"token_dim": "8"}, "token_dim must be int, found str"),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules is 2, which only SEQ_2_SEQ_LM can have"),
        ({"modules_to_save": None}, "tensor 'base_model.score.weight' belongs neither to the prompt nor to modules_to"),
        ({"modules_to_save": "score"}, "modules_to_save must be list, found str"),
        ({"base_model_name_or_path": 1}, "base_model_name_or_path must be str, found int"),
    ],
)
def test_wrong_peft_config(theirs: Path, changes: dict[str, Any], message: str) -> None:
    a.load(theirs)
    edit(theirs / "adapter_config.json", **changes)
    assert message in refused(theirs)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"prompts": torch.ones(P, D)}, "no tensor 'prompt_embeddings' in adapter_model.safetensors; found: prompts"),
        ({"prompt_embeddings": torch.ones(P, D).long()}, "prompt_embeddings must be floating point"),
        ({"prompt_embeddings": torch.tensor(1.0)}, "prompt_embeddings has shape []"),
        ({"prompt_embeddings": torch.full((P, D), torch.nan)}, f"prompt has NaN or Inf in {P * D} of {P * D} numbers"),
        ({"prompt_embeddings": torch.ones(P, D), "wte.weight": torch.ones(1)}, "tensor 'wte.weight' belongs neither"),
    ],
)
def test_wrong_peft_tensors(theirs: Path, stored: dict[str, Tensor], message: str) -> None:
    save_file(stored, theirs / "adapter_model.safetensors")
    assert message in refused(theirs)


def test_a_pickled_adapter_is_refused_with_the_way_out(theirs: Path) -> None:
    stored = load_file(theirs / "adapter_model.safetensors")
    torch.save(stored, theirs / "adapter_model.bin")
    assert torch.equal(a.load(theirs).prompt, stored["prompt_embeddings"])
    (theirs / "adapter_model.safetensors").unlink()
    message = refused(theirs)
    assert "adapter_model.bin is a pickle" in message
    assert "save_pretrained(directory, safe_serialization=True)" in message
    (theirs / "adapter_model.bin").unlink()
    assert "adapter_model.safetensors cannot be read: No such file" in refused(theirs)
