"""What PEFT's prompt tuning gets wrong, beside ours, on tiny random models: `python -m benchmarks.peft_defects`.

Every check compares both libraries with the stock model that reads the prompt's vectors in front of one row alone.
It takes seconds on a CPU, needs no download, and prints one row a check.
"""

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

import softprompts

PROMPT_TOKENS = 6
NEW_TOKENS = 5
PAD_ID = 0
TEXTS = ([5, 9, 4, 11, 7], [8, 3], [6, 12, 10, 4], [13], [7, 7, 9, 15, 3, 4, 8])


class Check(NamedTuple):
    """One row of the table: the question, and what each library answers."""

    question: str
    theirs: str
    ours: str


def llama(seed: int = 0) -> Any:
    """A random Llama of two layers, in eval mode."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=128,
        pad_token_id=PAD_ID,
        bos_token_id=1,
        eos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def prompt_values() -> Tensor:
    """The prompt [P, H] that both libraries get."""
    return torch.randn(PROMPT_TOKENS, 64, generator=torch.Generator().manual_seed(1)) * 0.3


def with_peft() -> Any:
    """PEFT's model with that prompt."""
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PROMPT_TOKENS)
    model = peft.get_peft_model(llama(), config)
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.copy_(prompt_values())
    return model.eval()


def with_softprompts() -> Any:
    """Our model with that prompt."""
    config = softprompts.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PROMPT_TOKENS)
    model = softprompts.SoftPromptModel(llama(), config)
    (parameter,) = (parameter for parameter in model.parameters() if parameter.requires_grad)
    with torch.no_grad():
        parameter.copy_(prompt_values())
    return model


def padded_batch(side: str) -> dict[str, Tensor]:
    """All texts in one batch [B, T], padded on `side`."""
    rows = [torch.tensor(text) for text in TEXTS]
    ids = pad_sequence(rows, batch_first=True, padding_value=PAD_ID, padding_side=side)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
    return {"input_ids": ids, "attention_mask": mask}


def reference_logits(text: list[int]) -> Tensor:
    """The stock model's logits [P + T, V] behind the prompt's vectors, for one row alone."""
    model = llama()
    embeds = torch.cat([prompt_values(), model.get_input_embeddings()(torch.tensor(text))])[None]
    with torch.no_grad():
        logits: Tensor = model(inputs_embeds=embeds).logits[0]
    return logits


def reference_tokens(text: list[int]) -> list[int]:
    """Greedy tokens of the stock model without a cache, for one row alone."""
    tokens: list[int] = []
    for _ in range(NEW_TOKENS):
        tokens.append(int(reference_logits([*text, *tokens])[-1].argmax()))
    return tokens


def right_rows(generate: Callable[..., Tensor]) -> str:
    """How many rows of a left-padded batch get the tokens of the row alone."""
    batch = padded_batch("left")
    with torch.no_grad():
        output = generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False)
    new_tokens = output[:, -NEW_TOKENS:].tolist()
    right = sum(tokens == reference_tokens(text) for tokens, text in zip(new_tokens, TEXTS, strict=True))
    return f"{right} of {len(TEXTS)} rows right"


def right_single_rows(generate: Callable[..., Tensor]) -> str:
    """How many texts get the right tokens, each generated alone with a cache."""
    right = 0
    for text in TEXTS:
        with torch.no_grad():
            output = generate(input_ids=torch.tensor([text]), max_new_tokens=NEW_TOKENS, do_sample=False)
        right += output[0, -NEW_TOKENS:].tolist() == reference_tokens(text)
    return f"{right} of {len(TEXTS)} rows right"


def trainer_loss(model: Any) -> float:
    """The loss that transformers' Trainer computes for one batch, with the label count that Trainer takes."""
    batch = padded_batch("right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(folder, report_to=[], use_cpu=True)
        trainer = transformers.Trainer(model=model.train(), args=arguments)
        inputs = {**batch, "labels": labels}
        count = trainer._get_num_items_in_batch([inputs], torch.device("cpu"))
        loss = trainer.compute_loss(model, inputs, num_items_in_batch=count)
    return float(loss.detach())


def reference_loss() -> float:
    """The mean loss of every text token behind the prompt, the first token included."""
    losses = []
    for text in TEXTS:
        logits = reference_logits(text)[PROMPT_TOKENS - 1 : -1]
        losses.append(functional.cross_entropy(logits, torch.tensor(text), reduction="none"))
    return float(torch.cat(losses).mean())


def outcome(action: Callable[[], Any], otherwise: str) -> str:
    """The error that `action` raises, as its class and first words; `otherwise` where it raises none."""
    try:
        action()
    except Exception as error:
        words = " ".join(str(error).split()).split(" ")[:8]
        return f"{type(error).__name__}: {' '.join(words)} ..."
    return otherwise


def misspelled_start(library: Any) -> Callable[[], Any]:
    """A configuration with a misspelled start."""
    return lambda: library.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=PROMPT_TOKENS, prompt_tuning_init="TXET"
    )


def train_on(folder: Path) -> tuple[str, str]:
    """Load a saved prompt to train on: PEFT's way and ours."""
    with_peft().save_pretrained(folder / "peft")
    with_softprompts().save_pretrained(folder / "ours")
    theirs = outcome(
        lambda: peft.PeftModel.from_pretrained(llama(), str(folder / "peft"), is_trainable=True), "loads for training"
    )
    ours = outcome(lambda: softprompts.SoftPromptModel.from_pretrained(llama(), folder / "ours"), "loads for training")
    return theirs, ours


def other_weights(folder: Path) -> tuple[str, str]:
    """Load a saved prompt onto a model with other weights."""
    theirs = outcome(lambda: peft.PeftModel.from_pretrained(llama(seed=7), str(folder / "peft")), "loads in silence")
    ours = outcome(lambda: softprompts.SoftPromptModel.from_pretrained(llama(seed=7), folder / "ours"), "loads")
    return theirs, ours


def mixed_batch() -> tuple[str, str]:
    """Whether a batch whose rows name two prompts gives each row its own."""
    batch = padded_batch("right")
    names = ["default", "other"] * 3
    model = with_peft()
    model.add_adapter("other", peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PROMPT_TOKENS))
    with torch.no_grad():
        named = model(**batch, adapter_names=names[: len(TEXTS)]).logits
        plain = model(**batch).logits
    theirs = "adapter_names ignored in silence" if torch.equal(named, plain) else "works"
    ours_model = with_softprompts()
    ours_model.add_task(
        "other", softprompts.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PROMPT_TOKENS)
    )
    with torch.no_grad():
        mixed = ours_model(**batch, tasks=names[: len(TEXTS)]).logits
        first = ours_model(**batch, tasks="default").logits
        second = ours_model(**batch, tasks="other").logits
    each_row_own = all(
        torch.allclose(mixed[row], (first if row % 2 == 0 else second)[row], atol=1e-4) for row in range(len(TEXTS))
    )
    return theirs, "each row has its own prompt" if each_row_own else "wrong"


def checks() -> list[Check]:
    """All rows of the table."""
    true_loss = reference_loss()
    rows = [
        Check(
            f"Trainer's loss of one batch (true: {true_loss:.3f})",
            f"{trainer_loss(with_peft()):.3f}",
            f"{trainer_loss(with_softprompts()):.3f}",
        ),
        Check(
            "generate, one row at a time, with a cache",
            right_single_rows(with_peft().generate),
            right_single_rows(with_softprompts().generate),
        ),
        Check(
            "generate, a left-padded batch",
            right_rows(with_peft().generate),
            right_rows(with_softprompts().generate),
        ),
        Check("two prompts in one batch", *mixed_batch()),
        Check(
            'prompt_tuning_init="TXET"',
            outcome(misspelled_start(peft), "random start, in silence"),
            outcome(misspelled_start(softprompts), "random start, in silence"),
        ),
    ]
    with tempfile.TemporaryDirectory() as folder:
        rows.append(Check("continue training a saved prompt", *train_on(Path(folder))))
        rows.append(Check("load a prompt onto other weights", *other_weights(Path(folder))))
    return rows


def main() -> None:
    """Print the table."""
    transformers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    table = Table(title=f"peft {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
    for heading in ("", f"peft {peft.__version__}", f"softprompts {softprompts.__version__}"):
        table.add_column(heading, overflow="fold")
    for check in checks():
        table.add_row(*check)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
