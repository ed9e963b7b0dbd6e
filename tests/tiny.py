"""Tiny random models of every family, each built once per process, in float32 with a fixed seed."""

import functools
from typing import Any

import torch
import transformers as t

from softprompts import backbone as b

VOCABULARY = 96
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
ENCODER = {**SIZES, "type_vocab_size": 2}

CONFIGS: dict[str, Any] = {
    "gpt2": lambda: t.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
    "llama": lambda: t.LlamaConfig(**GROUPED),
    "qwen2": lambda: t.Qwen2Config(**GROUPED),
    "qwen3": lambda: t.Qwen3Config(**GROUPED),
    "mistral": lambda: t.MistralConfig(**GROUPED, sliding_window=6),
    "opt": lambda: t.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
        pad_token_id=0,
    ),
    "opt_projected": lambda: t.OPTConfig(  # as opt-350m
        vocab_size=VOCABULARY,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=24,
        pad_token_id=0,
        do_layer_norm_before=False,
    ),
    "gemma": lambda: t.GemmaConfig(**GROUPED),
    "gemma2": lambda: t.Gemma2Config(  # older transformers: sdpa forgets the cap on scores
        **GROUPED, sliding_window=6, query_pre_attn_scalar=8, attn_implementation="eager"
    ),
    "gemma3": lambda: t.Gemma3TextConfig(**GROUPED, sliding_window=6, query_pre_attn_scalar=8),
    "phi": lambda: t.PhiConfig(**SIZES),
    "gpt_neox": lambda: t.GPTNeoXConfig(**SIZES),
    "gptj": lambda: t.GPTJConfig(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        rotary_dim=4,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "bloom": lambda: t.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=3, n_head=4, pad_token_id=0),
    "falcon": lambda: t.FalconConfig(**{**SIZES, "ffn_hidden_size": 48}),
    "falcon_alibi": lambda: t.FalconConfig(**{**SIZES, "ffn_hidden_size": 48}, alibi=True),
    "mpt": lambda: t.MptConfig(vocab_size=VOCABULARY, d_model=32, n_heads=4, n_layers=2, max_seq_len=64),
    "t5": lambda: t.T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
    ),
    "bart": lambda: t.BartConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
        scale_embedding=True,
    ),
    "bert": lambda: t.BertConfig(**ENCODER),
    "roberta": lambda: t.RobertaConfig(**{**ENCODER, "pad_token_id": 1, "bos_token_id": 0, "vocab_size": VOCABULARY}),
    "albert": lambda: t.AlbertConfig(**ENCODER, embedding_size=24),
    "distilbert": lambda: t.DistilBertConfig(
        vocab_size=VOCABULARY, dim=32, n_layers=3, n_heads=4, hidden_dim=48, max_position_embeddings=64
    ),
    "modernbert": lambda: t.ModernBertConfig(
        **SIZES, local_attention=8, cls_token_id=1, sep_token_id=2, classifier_pooling="mean"
    ),
}
CAUSAL = ("gpt2", "llama", "qwen2", "qwen3", "mistral", "opt", "gemma", "gemma2", "gemma3", "phi", "gpt_neox", "gptj")
CAUSAL += ("bloom", "falcon", "falcon_alibi", "mpt", "opt_projected")
SEQ2SEQ = ("t5", "bart")
MASKED = ("bert", "roberta", "albert", "distilbert", "modernbert")
ALL = (*CAUSAL, *SEQ2SEQ, *MASKED)
# The main families, for tests that are slower or concern heads.
MAIN = ("gpt2", "llama", "qwen3", "opt", "gemma3", "t5", "bart", "bert", "roberta")
GENERATING = (*CAUSAL, *SEQ2SEQ)


def family(name: str) -> b.Family:
    """The family row of a tiny model."""
    return b.CAUSAL if name in CAUSAL else b.SEQ2SEQ if name in SEQ2SEQ else b.MASKED


def model(name: str, head: str = "lm", labels: int = 3, seed: int = 0, tokenizer: Any = None) -> t.PreTrainedModel:
    """A fresh tiny model; weights are spread wider than usual so that scores differ clearly.

    With a tokenizer its vocabulary is the tokenizer's.
    """
    config = CONFIGS[name]()
    if head in ("sequence", "token"):
        config.num_labels = labels
    if tokenizer is not None:
        config.vocab_size = len(tokenizer)
    torch.manual_seed(seed)
    made = getattr(t, family(name).auto_classes[head]).from_config(config)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    return made.eval()


@functools.cache
def backbone(name: str, head: str = "lm", labels: int = 3) -> b.Backbone:
    """A frozen tiny model, shared by the tests of a process."""
    return b.wrap(model(name, head, labels), name=name)


def start(name: str) -> int | None:
    """The token that encoders put first."""
    return 0 if name == "roberta" else 1 if name in (*MASKED, "bart") else None
