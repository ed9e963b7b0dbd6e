"""Golden: where PEFT's prompt tuning is right ours equals it; where users suffer from it, ours does what they expect.

The tests named test_peers_* hold both halves of one known defect: what PEFT does, and what we do.
"""

import functools
import warnings
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import rows
import tiny
from rows import INPUT
from softprompts import backbone as b
from softprompts import injection
from softprompts.config import InitConfig
from softprompts.injection import generation
from softprompts.model import initialization
from softprompts.training import objectives
from softprompts.types import IGNORE, Batch, Output, Prompt, Step

pytestmark = pytest.mark.golden
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
P = 4
KINDS = {"lm": "CAUSAL_LM", "sequence": "SEQ_CLS", "token": "TOKEN_CLS", "span": "QUESTION_ANS"}
FACTORIZED = ("opt_projected", "albert")
FIRST = injection.Site(placement="first")


def wrapped(name: str, head: str = "lm", values: Tensor | None = None) -> Any:
    """The same tiny model under PEFT's prompt tuning, in eval mode; its prompt set to `values [P, H]`."""
    kind = "SEQ_2_SEQ_LM" if name in tiny.SEQ2SEQ else KINDS[head]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own remarks about models without a name
        made = peft.get_peft_model(
            tiny.model(name, head),
            peft.PromptTuningConfig(task_type=kind, num_virtual_tokens=P, num_attention_heads=4, num_layers=2),
        ).eval()
    if values is not None:
        with torch.no_grad():
            made.prompt_encoder.default.embedding.weight[:P] = values
    return made


def prompt_of(made: Any) -> Tensor:
    """PEFT's parameter."""
    return made.prompt_encoder.default.embedding.weight


def values_for(name: str) -> Tensor:
    """A prompt for site input."""
    return rows.random(1, P, tiny.backbone(name).embedding_size)


def loss(output: Output) -> Tensor:
    """Our task loss."""
    batch = Batch(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1))
    prompt = Prompt(torch.zeros(1, 1, 1), torch.zeros(1, 1), torch.zeros(1))
    return objectives.task(Step(batch, prompt, output))


def same_loss_and_gradient(name: str, batch: Batch, path: str) -> None:
    """Our loss and prompt gradient are PEFT's."""
    made = wrapped(name, values=values_for(name))
    theirs = made(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
    (gradient,) = torch.autograd.grad(theirs, prompt_of(made))
    values = values_for(name).requires_grad_()
    output = injection.score(tiny.backbone(name), batch, rows.single(values, len(batch.input_ids)), INPUT, path=path)
    ours = loss(output)
    torch.testing.assert_close(ours, theirs, **CLOSE)
    (own,) = torch.autograd.grad(ours, values)
    assert (own - gradient[:P]).norm() < 1e-4 * gradient.norm()


@pytest.mark.parametrize(
    ("name", "path"),
    [(name, path) for name in tiny.CAUSAL if name not in FACTORIZED for path in rows.paths(name, INPUT)],
)
def test_first_causal(name: str, path: str) -> None:
    """With labels = input_ids, right-padded: packed = shared = concatenation = PEFT."""
    same_loss_and_gradient(name, rows.batch(name, rows.texts(name)), path)


@pytest.mark.parametrize("name", tiny.SEQ2SEQ)
def test_first_seq2seq(name: str) -> None:
    same_loss_and_gradient(name, rows.batch(name, rows.texts(name)), path="concatenation")


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert"])
def test_first_sequence_classification(name: str) -> None:
    """An encoder with the prompt in front of everything, as PEFT places it, on texts of one length."""
    text, mask = rows.pad(rows.texts(name, (6, 6, 6)))
    labels = torch.tensor([0, 2, 1])
    made = wrapped(name, "sequence", values_for(name))
    theirs = made(input_ids=text, attention_mask=mask, labels=labels)
    batch = Batch(text, mask, torch.zeros(3), labels)
    output = injection.score(tiny.backbone(name, "sequence"), batch, rows.single(values_for(name), 3), FIRST)
    torch.testing.assert_close(output.logits, theirs.logits, **CLOSE)
    torch.testing.assert_close(loss(output), theirs.loss, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "gemma3"])
def test_peers_left_padding(name: str) -> None:
    """PEFT's text positions move with the padding; ours never do."""
    made, texts = wrapped(name, values=values_for(name)), rows.texts(name, (5,))
    theirs, ours = [], []
    for extra in (0, 4):
        batch = rows.batch(name, texts, "left", extra)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            seen = made(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[0, P + extra :]
        theirs.append(seen)
        ours.append(injection.score(tiny.backbone(name), batch, rows.single(values_for(name)), INPUT).logits)
    assert (theirs[0] - theirs[1]).abs().max() > 1e-2
    torch.testing.assert_close(ours[1], ours[0], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_peers_extra_positions(name: str) -> None:
    """PEFT's logits are P longer than the labels; ours line up with them, one by one."""
    batch = rows.batch(name, rows.texts(name), "left")
    theirs = wrapped(name)(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    assert theirs.shape[1] == batch.labels.shape[1] + P
    output = injection.score(tiny.backbone(name), batch, rows.single(values_for(name), 4), INPUT)
    assert len(output.logits) == len(output.labels) == int((batch.labels != IGNORE).sum())
    assert batch.labels[output.batch_rows, output.label_columns].equal(output.labels)


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_peers_token_classification(name: str) -> None:
    """PEFT raises on labels; ours gives the stock model's loss over the concatenation."""
    text, mask = rows.pad(rows.texts(name))
    labels = (text % 3).masked_fill(mask == 0, IGNORE)
    with pytest.raises((ValueError, RuntimeError)):
        wrapped(name, "token")(input_ids=text, attention_mask=mask, labels=labels)
    bb, values = tiny.backbone(name, "token"), values_for(name)
    output = injection.score(bb, Batch(text, mask, torch.zeros(4), labels), rows.single(values, 4), INPUT)
    words = bb.embedding(text)
    full = torch.cat([words[:, :1], values.expand(4, -1, -1), words[:, 1:]], 1)
    longer = torch.cat([mask[:, :1], torch.ones(4, P), mask[:, 1:]], 1)
    beside = torch.cat([labels[:, :1], torch.full((4, P), IGNORE), labels[:, 1:]], 1)
    theirs = bb.model(inputs_embeds=full, attention_mask=longer, labels=beside).loss
    torch.testing.assert_close(loss(output), theirs, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_peers_question_answering(name: str) -> None:
    """PEFT trains on spans that are not shifted by the prompt; ours point at the words they name."""
    row = rows.texts(name, (7,))[0]
    values, labels = values_for(name), torch.tensor([[3, 5]])
    theirs = wrapped(name, "span", values)(
        input_ids=row[None], attention_mask=torch.ones(1, 7), start_positions=labels[:, 0], end_positions=labels[:, 1]
    )
    bb = tiny.backbone(name, "span")
    concatenated = functools.partial(bb.model, inputs_embeds=torch.cat([values, bb.embedding(row)])[None])
    unshifted = concatenated(start_positions=labels[:, 0], end_positions=labels[:, 1])
    torch.testing.assert_close(theirs.loss, unshifted.loss, **CLOSE)
    output = injection.score(bb, Batch(row[None], torch.ones(1, 7), torch.zeros(1), labels), rows.single(values), FIRST)
    torch.testing.assert_close(output.logits[0], unshifted.start_logits[0, P:], **CLOSE)
    torch.testing.assert_close(output.logits[1], unshifted.end_logits[0, P:], **CLOSE)
    shifted = [unshifted.start_logits[:, P:], unshifted.end_logits[:, P:]]
    entropy = [torch.nn.functional.cross_entropy(s, t) for s, t in zip(shifted, labels.T, strict=True)]
    torch.testing.assert_close(loss(output), sum(entropy) / 2, **CLOSE)
    assert (loss(output) - theirs.loss).abs() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_peers_sequence_classification_pools_right_slot(name: str) -> None:
    """Under right padding PEFT's decoder pools a pad; ours pools the row's last token."""
    texts = rows.texts(name, (6, 3))
    text, mask = rows.pad(texts)
    made, bb = wrapped(name, "sequence", values_for(name)), tiny.backbone(name, "sequence")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = made(input_ids=text, attention_mask=mask).logits[1]
        alone = made(input_ids=texts[1][None], attention_mask=torch.ones(1, 3)).logits[0]
    assert (theirs - alone).abs().max() > 1e-2
    output = injection.score(bb, Batch(text, mask, torch.zeros(2)), rows.single(values_for(name), 2), INPUT)
    torch.testing.assert_close(output.logits[1], alone, **CLOSE)


@torch.no_grad()
def test_peers_sequence_classification_pools_virtual_token() -> None:
    """PEFT's BERT pools virtual token 0; ours pools [CLS], which stands before the prompt."""
    row, values, bb = rows.texts("bert", (6,))[0], values_for("bert"), tiny.backbone("bert", "sequence")
    embedded = bb.embedding(row)
    pooled = []
    for full in (torch.cat([values, embedded]), torch.cat([embedded[:1], values, embedded[1:]])):
        state = bb.trunk(inputs_embeds=full[None]).last_hidden_state[:, 0]
        pooled.append(bb.model.classifier(torch.tanh(bb.trunk.pooler.dense(state))))
    theirs = wrapped("bert", "sequence", values)(input_ids=row[None], attention_mask=torch.ones(1, 6)).logits
    torch.testing.assert_close(theirs, pooled[0], **CLOSE)
    ours = injection.score(bb, Batch(row[None], torch.ones(1, 6), torch.zeros(1)), rows.single(values), INPUT).logits
    torch.testing.assert_close(ours, pooled[1], **CLOSE)


@pytest.mark.parametrize("name", tiny.SEQ2SEQ)
def test_peers_seq2seq_unused_rows(name: str) -> None:
    """PEFT allocates 2P rows and trains P of them; our slot has P rows and all get a gradient."""
    made, batch = wrapped(name, values=values_for(name)), rows.batch(name, rows.texts(name))
    assert prompt_of(made).shape[0] == 2 * P
    made(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss.backward()
    assert prompt_of(made).grad[:P].abs().sum(1).gt(0).all()
    assert prompt_of(made).grad[P:].abs().sum() == 0
    values = values_for(name).requires_grad_()
    assert injection.prompt_spec(tiny.backbone(name), INPUT, P).length == P
    loss(injection.score(tiny.backbone(name), batch, rows.single(values, 4), INPUT)).backward()
    assert values.grad.abs().sum(1).gt(0).all()


@torch.no_grad()
@pytest.mark.parametrize(("name", "head"), [("opt_projected", "lm"), ("albert", "sequence")])
def test_peers_factorized_embeddings(name: str, head: str) -> None:
    """Where embeddings are narrower than hidden states PEFT's prompt does not fit them; ours is as wide as they are."""
    text, mask = rows.pad(rows.texts(name, (5, 5)))
    made, bb = wrapped(name, head), tiny.backbone(name, head)
    assert prompt_of(made).shape[1] == 32
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        made(input_ids=text, attention_mask=mask)
    assert injection.prompt_spec(bb, INPUT, P).width == 24
    labels = text if head == "lm" else torch.tensor([0, 1])
    output = injection.score(bb, Batch(text, mask, torch.zeros(2), labels), rows.single(values_for(name), 2), INPUT)
    assert output.logits.isfinite().all()


@torch.no_grad()
def test_peers_mixed_tasks() -> None:
    """PEFT ignores `adapter_names` in forward; ours gives each row its own prompt."""
    made, batch = wrapped("llama", values=values_for("llama")), rows.batch("llama", rows.texts("llama", (5, 5)))
    other = rows.random(2, P, 32)
    made.add_adapter("other", peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P))
    made.prompt_encoder.other.embedding.weight[:] = other
    asked = made(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, adapter_names=["default", "other"]
    ).logits
    ignored = made(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    torch.testing.assert_close(asked, ignored)
    mixed = rows.several([values_for("llama"), other], [0, 1])
    ours = injection.score(tiny.backbone("llama"), batch, mixed, INPUT)
    made.set_adapter("other")
    theirs = made(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    torch.testing.assert_close(rows.of_row(ours, 0), ignored[0, P - 1 : -1], **CLOSE)
    torch.testing.assert_close(rows.of_row(ours, 1), theirs[1, P - 1 : -1], **CLOSE)


def test_peers_gradient_checkpointing() -> None:
    """Checkpointing drops a prefix cache in training mode; our backbone is never in training mode."""
    model = tiny.model("llama")
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    bb, batch = b.wrap(model, name="llama"), rows.batch("llama", rows.texts("llama"))
    for site in rows.sites("llama"):
        values = rows.random(0, P, injection.prompt_width(bb, site)).requires_grad_()
        ours = loss(injection.score(bb, batch, rows.single(values, 4), site))
        plain = loss(injection.score(tiny.backbone("llama"), batch, rows.single(values, 4), site))
        torch.testing.assert_close(ours, plain)
        torch.testing.assert_close(torch.autograd.grad(ours, values), torch.autograd.grad(plain, values))


@torch.no_grad()
@pytest.mark.parametrize("site", [INPUT, rows.KV], ids=rows.called)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_peers_generated_tokens(name: str, site: injection.Site) -> None:
    """From transformers 5.24 on PEFT's generate loses the prompt after the first token; ours never does.

    What is right is what PEFT's own forward says when it reads the whole text again for each token.
    """
    text, new = rows.texts(name)[1], 8
    values = rows.random(1, P, injection.prompt_width(tiny.backbone(name), site))
    options: dict[str, Any] = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ours = generation.generate(tiny.backbone(name), rows.batch(name, [text]), rows.single(values), site, **options)
    kind = peft.PromptTuningConfig if site == INPUT else peft.PrefixTuningConfig
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's remarks; transformers' that PEFT gives the cache its former name
        made = peft.get_peft_model(tiny.model(name), kind(task_type="CAUSAL_LM", num_virtual_tokens=P)).eval()
        prompt_of(made).copy_(values)
        right = text
        for _ in range(new):
            logits = made(input_ids=right[None], attention_mask=torch.ones_like(right)[None]).logits
            right = torch.cat([right, logits[0, -1:].argmax(-1)])
        theirs = made.generate(input_ids=text[None], attention_mask=torch.ones_like(text)[None], **options)
    assert ours[0].tolist() == right.tolist()
    assert (theirs[0].tolist() == right.tolist()) is not rows.AT_LEAST_5_24


def test_peers_default_start() -> None:
    """PEFT starts at N(0, 1), far from any word; our default start is words of the table, random ones have its rms."""
    bb = b.wrap(tiny.model("llama"), name="llama")
    bb.embedding.weight.data.mul_(0.1)
    slot = injection.prompt_spec(bb, INPUT, 32)
    assert float(prompt_of(wrapped("llama")).detach().square().mean().sqrt()) == pytest.approx(1, abs=0.3)
    words = initialization.initialize(InitConfig(), bb, INPUT, slot).prompt
    assert all((bb.embedding.weight == word).all(1).any() for word in words)
    noise = initialization.initialize(InitConfig(kind="random"), bb, INPUT, slot).prompt
    assert float(noise.square().mean().sqrt()) == pytest.approx(bb.embedding_rms, rel=0.1)
