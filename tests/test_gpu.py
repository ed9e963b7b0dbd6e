"""The golden tests again, on an accelerator: the same functions, with the models and everything a test makes on it.

They run where torch sees CUDA or MPS. `SOFTPROMPTS_TEST_DEVICE=cuda:1` names a device, and `=cpu` runs them without
one, which only shows that this file works.
"""

import os
import sys
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode

import local
import rows
import test_golden_contract
import test_golden_rows
import test_golden_shared
import test_golden_training
import test_golden_words
import test_quantize
import tiny
from closeness import assert_close
from softprompts.artifacts import artifact
from softprompts.backbone import devices
from softprompts.config import parse
from softprompts.evaluation import evaluate
from softprompts.methods import find
from softprompts.model.soft_prompt_model import open_prompts
from softprompts.recipes.run import run as job

DEVICE = os.environ.get("SOFTPROMPTS_TEST_DEVICE") or next((d for d in devices.available_devices() if d != "cpu"), None)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE is None, reason="torch sees neither CUDA nor MPS here (SOFTPROMPTS_TEST_DEVICE names a device)"
    ),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT asks for it
]

TESTS = Path(__file__).parent
MAKERS = (torch.tensor, torch.zeros, torch.ones, torch.full, torch.arange, torch.empty, torch.rand, torch.randn)
MAKERS = (*MAKERS, torch.randint, torch.randperm)
DOUBLE = ("test_finite_differences", "test_twenty_steps_equal_pefts")  # in float64, which MPS does not know
ELSEWHERE = ("test_layout", "test_mix_refuses", "test_batch_rows_and_device")  # nothing of a model in them

GOLDEN = {
    f"{name}_{module.__name__.removeprefix('test_golden_')}": value
    for module in (test_golden_words, test_golden_rows, test_golden_shared, test_golden_contract, test_golden_training)
    for name, value in vars(module).items()
    if name.startswith("test_") and callable(value) and name not in ELSEWHERE
    if not (name in DOUBLE and DEVICE == "mps")
}
QUANTIZED = ("test_the_gradient_is_that_of_the_rounded_weights", "test_frozen")
GOLDEN |= {f"{name}_quantized": vars(test_quantize)[name] for name in QUANTIZED}
globals().update(GOLDEN)


class OnDevice(TorchFunctionMode):
    """What test code makes without naming a device stands on `device`; what the library makes does not.

    A library that forgets the device then fails here, as it would for its users.
    """

    def __init__(self, device):
        super().__init__()
        self.device = torch.device(device)
        self.moved = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if function not in MAKERS or (kwargs or {}).get("device") is not None:
            return made
        frame = sys._getframe(1)
        while frame is not None and frame.f_code is OnDevice.__torch_function__.__code__:  # one inside another
            frame = frame.f_back
        if frame is None or Path(frame.f_code.co_filename).parent != TESTS:
            return made
        self.moved += 1
        # Made on the CPU and moved, so that random numbers are the same on every device.
        grad = made.requires_grad
        return made.detach().to(self.device).requires_grad_(grad) if grad else made.to(self.device)


@pytest.fixture(scope="module", autouse=True)
def models():
    """Tiny models on the device for this file only."""
    make = tiny.model

    def model(*arguments, **options):
        return make(*arguments, **options).to(DEVICE)

    with pytest.MonkeyPatch.context() as patch:
        tiny.backbone.cache_clear()
        patch.setattr(tiny, "model", model)
        yield
    tiny.backbone.cache_clear()


@pytest.fixture(autouse=True)
def device():
    """Inside a test, its tensors are made on the device."""
    with OnDevice(DEVICE) as mode:
        yield mode


def test_what_tests_make_is_on_the_device_and_what_the_library_makes_is_not():
    """Shown with the device `meta`, in place of an accelerator that may not be here."""
    with OnDevice("meta"):
        assert torch.zeros(2).device.type == "meta"
        assert torch.zeros(2, device="cpu").device.type == "cpu"
        assert torch.ones(1, requires_grad=True).is_leaf
        assert torch.ones(1, requires_grad=True).requires_grad
        assert rows.random(0, 3).device.type == "meta"
        assert all(
            part.device.type == "meta"
            for part in vars(rows.batch("llama", rows.texts("llama"))).values()
            if part is not None
        )
        library = {"torch": torch}
        exec(compile("made = torch.zeros(2)", "library.py", "exec"), library)
        assert library["made"].device.type == "cpu"


def test_the_models_and_tensors_of_a_test_are_on_the_device(device):
    before = device.moved
    assert torch.zeros(2).device == tiny.backbone("llama").device
    assert device.moved == before + 1
    assert tiny.backbone("llama").device.type == DEVICE.split(":")[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, a task, and a prompt that was trained on the device, for methods that mix others."""
    made = tmp_path_factory.mktemp("folder")
    run = local.run_values(made, max_steps=2)
    run["model"]["device"] = DEVICE
    job.run(parse(run))
    return made


@pytest.mark.parametrize("method", test_golden_contract.CASES)
def test_a_run_on_it_is_one_on_the_cpu(method, folder, tmp_path):
    """What is drawn is drawn alike; it trains and answers alike; and one process can use both, one after the other."""
    kind, options = test_golden_contract.CASES[method]
    sites = find(kind).sites
    found, losses = [], []
    for place, device in (("there", DEVICE), ("here", "cpu")):
        run = local.run_values(folder, max_steps=3)
        run |= {"output_dir": str(tmp_path / place)}
        run["model"] |= {"device": device, "matmul_backend": "torch"}
        run["prompt"] |= {"method": kind, "options": options, "site": sites[0]}
        sources = [str(folder / "out" / "prompt")] if sites[0] == "input" else []
        run["prompt"]["init"] = {"kind": "vocabulary", "sources": sources}
        results = job.run(parse(run))
        assert results["machine"]["device"].startswith(device)
        losses.append([step["loss"] for step in results["curve"]])
        found.append(artifact.load(Path(run["output_dir"]) / "prompt"))
        opened = open_prompts([Path(run["output_dir"]) / "prompt"], config=parse(run).model)[0]
        test = job.prepare(parse(run)).tasks[0].test
        answered = evaluate.evaluate(opened, test, prompt=opened.task, config=parse(run).evaluation)
        assert answered.headline.value == results["summary"]["after"]["value"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert_close(found[0].initial, found[1].initial)
    assert found[0].state.keys() == found[1].state.keys()
