"""Local model directories and files, as a user without an index has them: tiny models with matching tokenizers."""

import csv
import random
from pathlib import Path
from typing import Any

import torch
import transformers

import tiny
import tokenizers_tiny

TOKENIZERS = {
    "llama": tokenizers_tiny.byte_bpe,
    "gpt2": tokenizers_tiny.byte_bpe,
    "t5": tokenizers_tiny.unigram,
    "bert": tokenizers_tiny.wordpiece,
}
COLORS = {"red": "warm", "orange": "warm", "blue": "cold", "green": "cold"}


def model_directory(path: Path, name: str = "llama", seed: int = 0) -> Path:
    """A tiny model with a tokenizer, saved where `from_pretrained` can read it."""
    tokenizer = TOKENIZERS[name]()
    config = tiny.CONFIGS[name]()
    config.vocab_size = len(tokenizer)
    config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    config.bos_token_id = tokenizer.bos_token_id
    if name == "t5":
        config.decoder_start_token_id = tokenizer.pad_token_id
    if getattr(config, "max_position_embeddings", None):
        config.max_position_embeddings = 128
    torch.manual_seed(seed)
    model = getattr(transformers, tiny.family(name).auto_classes["lm"]).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def colors(path: Path, rows: int = 80, seed: int = 0) -> Path:
    """A csv of sentences about colors, warm or cold: a task that a tiny model can learn."""
    chance = random.Random(seed)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for number in range(rows):
            color = chance.choice(list(COLORS))
            writer.writerow([f"the thing {number} is {color}", COLORS[color]])
    return path


def run_values(folder: Path, model: str = "llama", **train: Any) -> dict[str, Any]:
    """The configuration of a small run in `folder`, with its model and data made there."""
    return {
        "model": {"name": str(model_directory(folder / model, model)), "dtype": "float32", "threads": 1},
        "prompt": {"num_virtual_tokens": 4},
        "task": {
            "source": str(colors(folder / "colors.csv")),
            "name": "colors",
            "template": "{text}:",
            "split": {"validation_fraction": 0.2, "test_fraction": 0.2},
        },
        "training": {"max_steps": 6, "batch_size": 8, "learning_rate": 0.5, **train},
        "evaluation": {"resamples": 100},
        "output_dir": str(folder / "out"),
    }


def teach(path: Path, steps: int = 120) -> None:
    """Train all weights of the model at `path` on sentences about colors, so that there is something to prompt."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    chance = random.Random(1)
    for _ in range(steps):
        loss = torch.zeros(())
        for _ in range(8):
            color = chance.choice(list(COLORS))
            text = tokenizer(f"the thing {chance.randrange(100)} is {color}:")["input_ids"]
            answer = [*tokenizer(f" {COLORS[color]}")["input_ids"], tokenizer.eos_token_id]
            ids = torch.tensor([text + answer])
            labels = torch.tensor([[-100] * len(text) + answer])
            loss = loss + model(input_ids=ids, labels=labels).loss / 8
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(path)
