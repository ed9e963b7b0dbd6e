"""Training runs step by step in float64: our shared prefix and PEFT's concatenation take the same twenty steps."""

import peft
import pytest
import torch

import tiny
from prompted import prompted
from softprompts import backbone as b
from softprompts import injection
from softprompts.injection import Site
from softprompts.methods import build
from softprompts.training import objectives
from softprompts.training.shared_batch import training_step
from softprompts.types import IGNORE, Batch, PromptInit

P, STEPS = 4, 20
pytestmark = [
    pytest.mark.golden,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT asks for it
]


def batches(generator):
    """Ragged rows, padded on the right as PEFT needs them."""
    for _ in range(STEPS):
        ids = torch.randint(3, tiny.VOCABULARY, (4, 9), generator=generator)
        lengths = torch.randint(3, 10, (4,), generator=generator)
        lengths[0] = 9
        mask = torch.arange(9)[None] < lengths[:, None]
        yield ids, mask.long(), ids.masked_fill(~mask, IGNORE)


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "t5"])
def test_twenty_steps_equal_pefts(name):
    start = torch.randn(P, 32, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 0.3
    base = b.wrap(tiny.model(name).double())
    method = build("prompt-tuning", {}, injection.prompt_spec(base, Site(), P), PromptInit(start)).double()
    with torch.no_grad():
        method.prompt.copy_(start)
    model = prompted(base, Site(), method)
    kind = "SEQ_2_SEQ_LM" if name in tiny.SEQ2SEQ else "CAUSAL_LM"
    config = peft.PromptTuningConfig(task_type=kind, num_virtual_tokens=P, num_transformer_submodules=1)
    theirs = peft.get_peft_model(tiny.model(name), config).double().eval()
    weight = theirs.prompt_encoder.default.embedding.weight
    with torch.no_grad():
        weight.copy_(start)
    ours = torch.optim.AdamW(method.parameters(), lr=0.05)
    other = torch.optim.AdamW([weight], lr=0.05)
    for ids, mask, labels in batches(torch.Generator().manual_seed(7)):
        mine = objectives.task(training_step(model, Batch(ids, mask, torch.zeros(4, dtype=torch.long), labels)))
        peers = theirs(input_ids=ids, attention_mask=mask, labels=labels).loss
        assert mine.dtype == torch.float64
        torch.testing.assert_close(mine.detach(), peers.detach().double(), rtol=1e-6, atol=0)
        for loss, optimizer in ((mine, ours), (peers, other)):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        torch.testing.assert_close(method.prompt.detach(), weight.detach(), rtol=1e-4, atol=1e-6)
    assert float((method.prompt.detach() - start).abs().max()) > 0.1
