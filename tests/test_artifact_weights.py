"""A prompt and the weights it was made for."""

import shutil
from pathlib import Path

import pytest
import torch

from artifacts import D, assert_equal, example, fingerprint
from softprompts.artifacts import artifact as a
from softprompts.artifacts.fingerprint import check_fingerprint, sketch_distance
from softprompts.errors import WrongBackboneError


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return a.save(example(), tmp_path / "prompt")


def test_equal_weights_pass_in_silence() -> None:
    assert check_fingerprint(fingerprint(), fingerprint()) == []
    noisy = fingerprint(sketch=fingerprint().sketch * (1 + 5e-5))
    assert check_fingerprint(fingerprint(), noisy) == []


def test_no_fingerprint_warns() -> None:
    assert check_fingerprint(None, fingerprint()) == [
        "this prompt has no fingerprint: PEFT's files do not name the weights it was trained on"
    ]


def test_another_architecture_names_each_difference_and_cannot_be_overridden() -> None:
    facts = {**fingerprint().architecture, "hidden_size": 16, "model_type": "gpt2"}
    for allow in (False, True):
        with pytest.raises(WrongBackboneError) as caught:
            check_fingerprint(fingerprint(), fingerprint(architecture=facts), allow)
        assert "model_type 'llama', here 'gpt2'; hidden_size 8, here 16" in str(caught.value)
    facts.pop("hidden_size")
    with pytest.raises(WrongBackboneError, match="hidden_size 8, here None"):
        check_fingerprint(fingerprint(), fingerprint(architecture=facts))
    with pytest.raises(WrongBackboneError, match=r"sketch \[32, 8\], here \[32, 9\]"):
        check_fingerprint(fingerprint(), fingerprint(sketch=torch.ones(32, 9)), True)


def test_facts_survive_json_and_later_facts_do_not_count(tmp_path: Path) -> None:
    current = fingerprint(architecture={**fingerprint().architecture, "kv": (2, 4)})
    loaded = a.load(a.save(example(fingerprint=current), tmp_path / "x")).fingerprint
    assert check_fingerprint(loaded, current) == []
    assert check_fingerprint(fingerprint(), current) == []


def test_another_tokenizer_warns() -> None:
    assert check_fingerprint(fingerprint(), fingerprint(tokenizer="beef")) == [
        "the tokenizer differs from the one this prompt was made with"
    ]
    assert check_fingerprint(fingerprint(), fingerprint(tokenizer=None)) == []


@pytest.mark.parametrize(
    ("saved_dtype", "dtype", "moved", "fits"),
    [
        ("float32", "float32", 2e-4, False),
        ("float32", "bfloat16", 0.04, True),
        ("bfloat16", "float32", 0.04, True),
        ("float16", "bfloat16", 0.06, False),
        ("float16", "float32", 0.005, True),
        ("float32", "float32", float("nan"), False),
        ("float32", "gptq", 0.0, False),
        ("float32", "int8", 0.06, True),
        ("int8", "bfloat16", 0.06, True),
        ("int8", "bfloat16", 0.08, False),
    ],
)
def test_other_weights_are_refused_unless_allowed(saved_dtype: str, dtype: str, moved: float, fits: bool) -> None:
    one = fingerprint(dtype=saved_dtype)
    two = fingerprint(dtype=dtype, sketch=one.sketch * (1 + moved))
    if fits:
        assert check_fingerprint(one, two) == []
        return
    with pytest.raises(WrongBackboneError) as caught:
        check_fingerprint(one, two)
    if dtype != "gptq":
        assert f"sketch distance {sketch_distance(one.sketch, two.sketch):.3g}, allowed" in str(caught.value)
    (warning,) = check_fingerprint(one, two, allow_other_weights=True)
    assert str(caught.value).startswith(warning)


def test_sketch_distance() -> None:
    one = torch.randn(32, D)
    assert sketch_distance(one, one) == 0
    assert sketch_distance(one, 1.5 * one) == pytest.approx(0.5)
    assert sketch_distance(torch.zeros(2, 2), torch.zeros(2, 2)) == 0
    assert sketch_distance(torch.zeros(2, 2), torch.ones(2, 2)) == float("inf")


def test_a_copied_directory_loads(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "copy")
    assert_equal(a.load(saved), a.load(tmp_path / "copy"))
