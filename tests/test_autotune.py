"""The choice of kernels: what was asked for is taken, the rest is measured once and remembered."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from softprompts.backbone import Backbone
from softprompts.backbone.kernels import Kernels
from softprompts.errors import BackboneError
from softprompts.model import setup


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, float]:
    """Times that the test gives, by what is being timed; and a cache and a size from which measuring pays."""
    monkeypatch.setenv("SOFTPROMPTS_CACHE", str(tmp_path))
    monkeypatch.setattr(setup, "WORTH", 1000)
    times: dict[str, float] = {"torch": 2.0, "onednn": 1.0, "math": 1.0, "fused": 2.0, "eager": 3.0, "sdpa": 4.0}

    def timed(backbone: Backbone, kernels: Kernels, workload: Any) -> float:
        if workload is setup._one_product:
            times["products"] = times.get("products", 0) + 1
            return times[kernels.matmul_backend]
        return times[kernels.packed_attention if kernels.path == "packed" else kernels.attn_implementation]

    monkeypatch.setattr(setup, "_clock", timed)
    return times


def test_the_fastest_is_taken_and_remembered(clock: dict[str, float], tmp_path: Path) -> None:
    bb = tiny.backbone("llama")
    found = setup.autotune(bb)
    assert found.kernels == Kernels(matmul_backend="onednn")
    assert found.seconds == {
        "matmul: torch": 2, "matmul: onednn": 1, "packed": 1, "packed-fused": 2, "sdpa": 4, "eager": 3,
    }  # fmt: skip
    assert str(found) == "attention: packed (math), matmul: onednn"
    (entry,) = json.loads((tmp_path / "autotune.json").read_text()).values()
    assert entry["kernels"]["matmul_backend"] == "onednn"
    done = clock["products"]
    clock["onednn"] = 9.0
    assert setup.autotune(bb) == found  # not measured again, whatever the clock would say now
    assert clock["products"] == done
    setup.autotune(tiny.backbone("qwen3"))  # another model is
    assert clock["products"] > done
    assert len(json.loads((tmp_path / "autotune.json").read_text())) == 2


def test_a_little_faster_is_not_enough(clock: dict[str, float]) -> None:
    clock |= {"onednn": 1.95, "eager": 0.97, "fused": 0.96}
    assert setup.autotune(tiny.backbone("llama")).kernels == Kernels()
    clock["eager"] = 0.5
    found = setup.autotune(tiny.backbone("qwen2")).kernels
    assert found == Kernels(path="shared", attn_implementation="eager")


def test_what_is_asked_for_is_taken(clock: dict[str, float]) -> None:
    bb = tiny.backbone("llama")
    assert setup.autotune(bb, attention="packed-fused").kernels == Kernels(
        packed_attention="fused", matmul_backend="onednn"
    )
    assert setup.autotune(bb, attention="sdpa", matmul_backend="torch").kernels == Kernels(path="shared")
    assert setup.autotune(bb, matmul_backend="torch", torch_compile=True).kernels == Kernels(compiled=True)
    with pytest.raises(BackboneError, match=r"attention 'packed-fused' is not possible: .*caps scores"):
        setup.autotune(tiny.backbone("gemma2"), attention="packed-fused")
    for name, reason in (("bloom", "uses another kind of attention"), ("t5", "an encoder's prompt sees the text")):
        with pytest.raises(BackboneError, match=f"attention 'packed' is not possible: .*{reason}; leave"):
            setup.autotune(tiny.backbone(name), attention="packed")


@pytest.mark.parametrize(
    ("challenger", "winner"),
    [
        ([0.80, 0.81, 0.82, 0.83], "challenger"),
        ([0.96, 0.97, 0.98, 0.99], "default"),  # faster, but by less than the margin
        ([0.50, 1.20, 1.20, 1.20], "default"),  # one lucky round
        ([2.00, 0.80, 0.80, 0.80], "challenger"),  # one unlucky round
    ],
)
def test_a_challenger_wins_by_a_margin_in_most_rounds(challenger: list[float], winner: str) -> None:
    assert setup.fastest_of({"default": [1.0] * 4, "challenger": challenger}) == winner


def test_a_minute_that_slows_all_candidates_decides_nothing() -> None:
    times = {"default": [1.0, 3.0, 3.0, 1.0], "challenger": [0.9, 2.7, 2.7, 0.9], "other": [1.1, 3.3, 3.3, 1.1]}
    assert setup.fastest_of(times) == "challenger"
    assert setup.fastest_of({}) is None


def test_retune_measures_again(clock: dict[str, float]) -> None:
    assert setup.autotune(tiny.backbone("llama")).kernels.matmul_backend == "onednn"
    clock["onednn"] = 9.0
    assert setup.autotune(tiny.backbone("llama"), retune=True).kernels.matmul_backend == "torch"
    assert setup.autotune(tiny.backbone("llama")).kernels.matmul_backend == "torch"


def test_a_damaged_memory_only_costs_the_measurement(clock: dict[str, float], tmp_path: Path) -> None:
    for text in ("{", "[]", '{"other": 1}'):
        (tmp_path / "autotune.json").write_text(text)
        assert setup.autotune(tiny.backbone("llama")).kernels.matmul_backend == "onednn"
    assert json.loads((tmp_path / "autotune.json").read_text())["other"] == 1


def test_small_models_are_not_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SOFTPROMPTS_CACHE", str(tmp_path))
    assert setup.autotune(tiny.backbone("llama")) == setup.TunedKernels(Kernels(), {})
    for name in ("bloom", "bert", "t5"):  # nothing is packed, and what is said is true
        found = setup.autotune(tiny.backbone(name))
        assert found == setup.TunedKernels(Kernels(path="shared"), {})
        assert str(found) == "attention: the model's own, matmul: torch"
    assert not (tmp_path / "autotune.json").exists()


@pytest.mark.parametrize(("name", "head"), [("llama", "lm"), ("bloom", "lm"), ("t5", "lm"), ("bert", "sequence")])
def test_measuring_runs_on_every_family(name: str, head: str) -> None:
    """A kernel that does not run is no candidate; what is chosen is one of those that ran."""
    bb = replace(tiny.backbone(name, head), facts={})
    kernels, seconds = setup.measure(bb)
    packed = {"packed", "packed-fused"} if name == "llama" else set()
    own = bb.model.config._attn_implementation
    assert packed <= seconds.keys()
    assert all(0 < value < 60 for value in seconds.values())
    assert {"matmul: torch", "matmul: onednn"} <= seconds.keys() or not torch.backends.mkldnn.is_available()
    assert kernels.attn_implementation in (None, own, "eager", "sdpa")
    assert bb.model.config._attn_implementation == own


def test_a_kernel_that_fails_is_no_candidate(clock: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    given = setup._clock

    def timed(backbone: Backbone, kernels: Kernels, once: Any) -> float:
        if kernels.packed_attention == "fused":
            raise RuntimeError("no such kernel")
        return given(backbone, kernels, once)

    monkeypatch.setattr(setup, "_clock", timed)
    assert "packed-fused" not in setup.autotune(tiny.backbone("llama")).seconds

    def none(*_: Any) -> float:
        raise RuntimeError("nothing runs")

    monkeypatch.setattr(setup, "_clock", none)
    assert setup.autotune(tiny.backbone("qwen2")) == setup.TunedKernels(Kernels(), {})
