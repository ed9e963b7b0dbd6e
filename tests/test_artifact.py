"""The artifact on disk: round trips bit for bit, its digest, inspection and card."""

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from artifacts import D, P, assert_equal, bits, edit, example, fingerprint, write_as_format
from softprompts.artifacts import artifact as a
from softprompts.artifacts.artifact import Artifact
from softprompts.artifacts.io import read_json, read_tensors, write_json, write_tensors
from softprompts.errors import ArtifactError


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return a.save(example(), tmp_path / "prompt")


def test_round_trip_bit_for_bit(saved: Path) -> None:
    loaded = a.load(saved)
    assert_equal(example(), loaded)
    assert list(loaded.template["verbalizer"]) == ["z", "a"]  # type: ignore[index]
    assert sorted(os.listdir(saved)) == sorted(
        ["softprompts.json", "softprompts.safetensors", "README.md", "adapter_config.json", "adapter_model.safetensors"]
    )
    assert os.listdir(saved.parent) == ["prompt"]


@pytest.mark.parametrize(
    "changes",
    [
        {"initial": None, "fingerprint": None, "template": None, "revision": None, "parents": (), "state": {}},
        {"site": "kv"},
        {"site": "layers", "mode": "add", "placement": "after_start", "family": "masked"},
        {"family": "seq2seq"},
        {"family": "masked", "head": "sequence", "heads": {"classifier.weight": torch.ones(2, D)}},
        {"prompt": example().prompt.T.contiguous().T.requires_grad_()},
    ],
)
def test_round_trip_of_variants(tmp_path: Path, changes: dict[str, Any]) -> None:
    made = example(**changes)
    assert_equal(made, a.load(a.save(made, tmp_path / "x")))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool])


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, Tensor]:
    names = draw(st.lists(st.text(max_size=12), max_size=4, unique=True))
    shape = st.lists(st.integers(0, 4), max_size=3)
    # random bytes read as numbers: NaN payloads, infinities and denormals come by themselves
    made = {}
    for name in names:
        dtype, sizes = draw(DTYPES), draw(shape)
        raw = torch.randint(0, 2 if dtype is torch.bool else 256, [*sizes, dtype.itemsize], dtype=torch.uint8)
        made[name] = raw.view(dtype)[..., 0]
    return made


@settings(deadline=None, max_examples=30)
@given(
    length=st.integers(1, 6),
    width=st.integers(1, 9),
    state=tensors(),
    task=st.text(),
    options=st.dictionaries(st.text(), JSON, max_size=3),
    heads=st.booleans(),
)
def test_round_trip_property(
    tmp_path_factory: pytest.TempPathFactory, length: int, width: int, state: Any, task: str, options: Any, heads: bool
) -> None:
    made = example(
        prompt=torch.randn(length, width),
        initial=torch.randn(length, width),
        state=state,
        task=task,
        options=options,
        scores=options,
        heads={"score.weight": torch.randn(2, width)} if heads else {},
    )
    assert_equal(made, a.load(a.save(made, tmp_path_factory.mktemp("h") / "x")))


@settings(deadline=None, max_examples=50)
@given(state=tensors(), metadata=st.dictionaries(st.text(), st.text(), max_size=3))
def test_tensor_files_round_trip(tmp_path_factory: pytest.TempPathFactory, state: Any, metadata: Any) -> None:
    state.pop("__metadata__", None)
    path = tmp_path_factory.mktemp("t") / "x.safetensors"
    write_tensors(path, state, metadata)
    loaded, found = read_tensors(path)
    assert {key: bits(value) for key, value in loaded.items()} == {key: bits(value) for key, value in state.items()}
    assert list(loaded) == sorted(state)
    assert found == metadata
    assert os.listdir(path.parent) == ["x.safetensors"]


@settings(deadline=None, max_examples=50)
@given(value=JSON)
def test_json_files_round_trip(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = tmp_path_factory.mktemp("j") / "x.json"
    write_json(path, value)
    assert read_json(path) == value


def test_loaded_tensors_can_be_trained_and_shared_storage_is_saved_twice(tmp_path: Path) -> None:
    whole = torch.randn(4, 4)
    write_tensors(tmp_path / "x", {"a": whole, "b": whole[1], "c": whole.T, "d": whole[:0]}, {})
    loaded, _ = read_tensors(tmp_path / "x")
    loaded["a"].add_(1)
    assert torch.equal(loaded["b"], whole[1])
    assert torch.equal(loaded["c"], whole.T)


def test_a_score_that_is_no_number_does_not_cost_the_prompt(tmp_path: Path) -> None:
    scores = {"loss": float("nan"), "f1": [float("inf"), 1.0], "n": torch.tensor(2)}
    loaded = a.load(a.save(example(scores=scores), tmp_path / "x"))
    assert loaded.scores == {"loss": None, "f1": [None, 1.0], "n": 2}


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": example().prompt.clone().index_put_((torch.tensor(0), torch.tensor(0)), torch.tensor(0.0))},
        {"prompt": example().prompt.reshape(D, P), "initial": None},
        {"site": "decoder"},
        {"mode": "add"},
        {"placement": "after_start"},
        {"fingerprint": fingerprint(architecture={"model_type": "gpt2"})},
    ],
)
def test_digest_changes_with_what_the_prompt_is(changes: dict[str, Any]) -> None:
    assert example(**changes).digest != example().digest


@pytest.mark.parametrize(
    "changes",
    [
        {"task": "other", "scores": {}, "config": {}, "parents": (), "version": "9", "backbone": "copy", "state": {}},
        {"fingerprint": fingerprint(sketch=torch.zeros(32, D), tokenizer=None, dtype="bfloat16")},
        {"prompt": example().prompt.T.contiguous().T, "initial": None},
    ],
)
def test_digest_stays_with_what_is_told_about_it(changes: dict[str, Any]) -> None:
    assert example(**changes).digest == example().digest
    assert len(example().digest) == 64


def test_digest_is_the_one_that_the_specification_describes() -> None:
    facts = {
        "architecture": {"hidden_size": 8, "model_type": "llama", "num_attention_heads": 4, "num_hidden_layers": 2},
        "mode": "replace",
        "place": "first",
        "shape": [P, D],
        "site": "input",
    }
    numbers = struct.pack(f"<{P * D}f", *example().prompt.flatten().tolist())
    assert example().digest == hashlib.sha256(json.dumps(facts).encode() + b"\0" + numbers).hexdigest()


def of_texts(**changes: Any) -> Artifact:
    """The artifact of a method that makes a prompt from each text: none of its own, but a state."""
    state = {"up.weight": torch.arange(6.0).view(2, 3), "sources": torch.ones(2, P, D), "n": torch.tensor(3)}
    return example(**{"prompt": None, "method": "attempt", "state": state, **changes})


def test_without_a_prompt_the_state_is_the_artifact(tmp_path: Path) -> None:
    made = of_texts()
    loaded = a.load(a.save(made, tmp_path / "x"))
    assert_equal(made, loaded)
    assert loaded.prompt is None
    assert made.shape == loaded.shape == (P, D)
    assert not (tmp_path / "x" / "adapter_config.json").exists()
    facts = a.inspect(tmp_path / "x")
    json.dumps(facts, allow_nan=False)
    assert (facts["plain_prompt"], facts["length"], facts["width"], facts["parameters"]) == (False, P, D, 7)
    assert (facts["rms"], facts["distance"]) == (None, None)
    assert facts["rms_initial"] > 0
    assert facts["peft"] == "method attempt: it has no plain prompt, and PEFT stores one matrix"
    card = (tmp_path / "x" / "README.md").read_text()
    assert "The method computes a prompt for each text" in card
    assert "PEFT cannot load it (method attempt" in card
    with pytest.raises(ArtifactError, match=r"^x holds no plain prompt: attempt makes one from each text"):
        loaded.require_prompt("x")


@pytest.mark.parametrize(
    "changes",
    [
        {"state": {**of_texts().state, "n": torch.tensor(4)}},
        {"state": {**of_texts().state, "n": torch.tensor(3.0)}},
        {"state": {**of_texts().state, "up.weight": torch.arange(6.0).view(3, 2)}},
        {"state": {**of_texts().state, "m": torch.zeros(0)}},
        {"options": {"temperature": 2.0}},
        {"method": "another"},
        {"site": "decoder"},
    ],
)
def test_the_digest_without_a_prompt_covers_what_answers(changes: dict[str, Any]) -> None:
    assert of_texts(**changes).digest != of_texts().digest


def test_the_digest_without_a_prompt_is_the_one_that_the_specification_describes() -> None:
    made = of_texts(initial=torch.zeros(P, D), scores={}, state=dict(reversed(of_texts().state.items())))
    facts = {
        "architecture": {"hidden_size": 8, "model_type": "llama", "num_attention_heads": 4, "num_hidden_layers": 2},
        "method": "attempt",
        "mode": "replace",
        "options": {"dropout": 0.1, "names": ["b", "a"]},
        "place": "first",
        "shape": [P, D],
        "site": "input",
        "state": {
            "n": ["torch.int64", []],
            "sources": ["torch.float32", [2, P, D]],
            "up.weight": ["torch.float32", [2, 3]],
        },
    }
    numbers = struct.pack(f"<q{2 * P * D}f6f", 3, *[1.0] * (2 * P * D), *map(float, range(6)))
    assert made.digest == hashlib.sha256(json.dumps(facts).encode() + b"\0" + numbers).hexdigest()


def test_format_1_loads(saved: Path, tmp_path: Path) -> None:
    """It had no key `fixed`, and always a prompt."""
    write_as_format(saved / "softprompts.json", 1)
    assert_equal(example(), a.load(saved))
    edit(saved / "softprompts.json", fixed=True)
    with pytest.raises(ArtifactError, match="unknown key 'fixed': format 1 has none"):
        a.load(saved)
    write_as_format(a.save(of_texts(), tmp_path / "x") / "softprompts.json", 1)
    with pytest.raises(ArtifactError, match="no tensor 'prompt'"):
        a.load(tmp_path / "x")


def test_inspect(saved: Path, tmp_path: Path) -> None:
    facts = a.inspect(saved)
    json.dumps(facts, allow_nan=False)
    made = example()
    assert (facts["length"], facts["width"], facts["parameters"]) == (P, D, P * D + 3)
    assert facts["origin"] == "softprompts"
    assert facts["peft"] is True
    assert facts["digest"] == made.digest
    assert facts["fingerprint"]["dtype"] == "float32"
    assert facts["bytes"] == sum(path.stat().st_size for path in saved.iterdir())
    assert facts["rms_initial"] == pytest.approx(float(made.initial.square().mean().sqrt()))  # type: ignore[union-attr]
    assert facts["distance"] == pytest.approx(facts["rms"])  # the largest float32 in the prompt outweighs all else
    for name in ("softprompts.json", "softprompts.safetensors"):
        (saved / name).unlink()
    other = a.inspect(saved)
    json.dumps(other, allow_nan=False)
    assert (other["origin"], other["rms_initial"], other["distance"]) == ("peft", None, None)
    assert (other["fingerprint"], other["parameters"]) == (None, P * D)


def test_card(tmp_path: Path) -> None:
    scores = {"test": {"accuracy": 0.9, "note": "a|b\nc"}, "per_class": [1, 2]}
    text = (a.save(example(backbone="org/name", scores=scores), tmp_path / "x") / "README.md").read_text()
    assert text.startswith("---\nbase_model: org/name\nlibrary_name: peft\n")
    assert "# Soft prompt: sst2" in text
    assert "| test.accuracy | 0.9 |" in text
    assert "| test.note | a\\|b c |" in text
    assert "PeftModel.from_pretrained" in text
