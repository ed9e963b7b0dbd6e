"""Round trips: a prompt saved by us answers in PEFT with the same scores, and one saved by PEFT answers in ours."""

import dataclasses

import peft
import pytest
import torch

import artifacts
import tiny
from softprompts import backbone as b
from softprompts import injection
from softprompts.artifacts import artifact as a
from softprompts.injection import Site
from softprompts.types import Batch, Prompt

pytestmark = [
    pytest.mark.golden,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT asks for it
]

CASES = [
    ("gpt2", "lm", "CAUSAL_LM"),
    ("llama", "lm", "CAUSAL_LM"),
    ("opt", "lm", "CAUSAL_LM"),
    ("t5", "lm", "SEQ_2_SEQ_LM"),
    ("bart", "lm", "SEQ_2_SEQ_LM"),
    ("bert", "sequence", "SEQ_CLS"),
    ("roberta", "sequence", "SEQ_CLS"),
]
P = 4
IDS = torch.tensor([[1, 11, 12, 13, 14, 2], [1, 21, 22, 23, 24, 2]])


def ours(model, head, values):
    """Our scores of IDS with the prompt `values [P, D]` placed first, as PEFT does."""
    base = b.wrap(model)
    labels = {"lm": IDS, "sequence": torch.tensor([0, 1])}[head]
    prompt = Prompt(values[None], torch.ones(1, P, dtype=torch.bool), torch.zeros(2, dtype=torch.long))
    batch = Batch(IDS, torch.ones_like(IDS), prompt.prompt_index, labels)
    with torch.no_grad():
        return injection.score(base, batch, prompt, Site(placement="first")).logits


def theirs(model, kind):
    """PEFT's scores of IDS, those of the labels alone."""
    with torch.no_grad():
        if kind == "SEQ_2_SEQ_LM":
            return model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS).logits.flatten(0, 1)
        logits = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    return logits[:, P - 1 : -1].flatten(0, 1) if kind == "CAUSAL_LM" else logits


@pytest.mark.parametrize(("name", "head", "kind"), CASES)
def test_ours_answers_in_peft(tmp_path, name, head, kind):
    model = tiny.model(name, head)
    base = b.wrap(model)
    values = base.embed(torch.arange(40, 40 + P)).detach() + 0.01
    heads = {key: dict(model.named_parameters())[key].detach().clone() + 0.1 for key in base.head_names}
    made = artifacts.example(
        prompt=values,
        initial=None,
        state={},
        heads=heads,
        family=tiny.family(name).name,
        head=head,
        placement="first",
        fingerprint=b.fingerprint(base),
    )
    a.save(made, tmp_path / "ours")
    with base.with_head({k: torch.nn.Parameter(v) for k, v in heads.items()}):
        expected = ours(model, head, a.load(tmp_path / "ours").prompt)
    loaded = peft.PeftModel.from_pretrained(tiny.model(name, head), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(theirs(loaded, kind), expected, rtol=0, atol=1e-5)


# PEFT allocates the rows twice for encoder-decoders, unless told otherwise.
THEIRS = [(*case, 1) for case in CASES] + [(*case, 2) for case in CASES if case[2] == "SEQ_2_SEQ_LM"]


@pytest.mark.parametrize(("name", "head", "kind", "rows"), THEIRS)
def test_theirs_answers_in_ours(tmp_path, name, head, kind, rows):
    torch.manual_seed(3)
    config = peft.PromptTuningConfig(task_type=kind, num_virtual_tokens=P, num_transformer_submodules=rows)
    model = peft.get_peft_model(tiny.model(name, head), config).eval()
    model.save_pretrained(tmp_path / "theirs")
    found = a.load(tmp_path / "theirs")
    assert found.prompt.shape[0] == P
    assert (found.site, found.placement) == ("input", "first")
    stock = tiny.model(name, head)
    with b.wrap(stock).with_head({k: torch.nn.Parameter(v) for k, v in found.heads.items()}):
        mine = ours(stock, head, found.prompt)
    torch.testing.assert_close(mine, theirs(model, kind), rtol=0, atol=1e-5)
    # and once more through our own format
    again = dataclasses.replace(found, family=tiny.family(name).name)
    a.save(again, tmp_path / "again")
    assert torch.equal(a.load(tmp_path / "again").prompt, found.prompt)
