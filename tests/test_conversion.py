"""What packaged models are after their conversion."""

import json
import logging
from collections.abc import Callable, Iterator

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from softprompts.assets import fetch


@pytest.fixture
def quiet() -> Iterator[Callable[[], list[str]]]:
    """Collects what transformers logs as a warning."""
    records: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield lambda: records
    logger.removeHandler(handler)


@pytest.mark.assets
def test_rxn_albert_fills_in_masked_tokens(quiet: Callable[[], list[str]]) -> None:
    folder = fetch("rxn-albert")
    assert not list(folder.glob("*.bin"))
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForMaskedLM.from_pretrained(folder, local_files_only=True).eval()
    reaction = "CC(C)S.CN(C)C=O.Fc1cccnc1F.O=C([O-])[O-].[K+].[K+]>>CC(C)Sc1ncccc1F"
    ids = tokenizer(reaction, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0], skip_special_tokens=True).replace(" ", "") == reaction
    places = torch.arange(1, ids.shape[1] - 1)
    masked = ids.repeat(len(places), 1)
    masked[torch.arange(len(places)), places] = tokenizer.mask_token_id
    with torch.no_grad():
        guesses = model(masked).logits[torch.arange(len(places)), places].argmax(-1)
    assert (guesses == ids[0, places]).float().mean() > 0.9
    assert quiet() == []


@pytest.mark.assets
def test_the_default_model_loads_without_a_warning(quiet: Callable[[], list[str]]) -> None:
    folder = fetch("smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert tokenizer.is_fast
    assert tokenizer("year 2024").input_ids == [
        *tokenizer("year").input_ids,
        *tokenizer(" ").input_ids,
        *tokenizer("2024").input_ids,
    ]
    assert len(tokenizer("2024").input_ids) == 4
    message = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert "<|im_start|>user\nhi<|im_end|>" in message
    asked = tokenizer("The capital of France is", return_tensors="pt")
    answered = model.generate(**asked, max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(answered[0]) == "The capital of France is Paris."
    assert json.loads((folder / "config.json").read_text())["rms_norm_eps"] == 1e-5
    assert quiet() == []
