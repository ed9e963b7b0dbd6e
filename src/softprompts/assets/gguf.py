"""How a packaged model becomes a directory for `from_pretrained`.

Each conversion is a function of (the package's files, the new directory). The files are written here and not by
transformers, so that the result does not depend on its version.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

WEIGHTS = "model.safetensors"
GGUF_PARTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
}
"""The parts of a layer in GGUF and in transformers, as far as all families agree."""
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
"""Kinds of tokens in GGUF."""
SPACE = "▁"
"""What SentencePiece writes for a space."""


def _copy(files: Path, ready: Path) -> None:
    for path in files.iterdir():
        if path.is_file():
            shutil.move(path, ready / path.name)


def _smollm2(files: Path, ready: Path) -> None:
    """Unpack the 4-bit GGUF to float32 safetensors, with the configuration and the tokenizer it describes."""
    import gguf

    reader = gguf.GGUFReader(next(files.glob("*.gguf")))
    fact = _facts(reader)
    config = _gguf_config(fact) | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "head_dim": fact("llama.rope.dimension_count"),
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": fact("llama.rope.freq_base")},
    }
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}

    def change(part: str, values: Any) -> Any:
        if part not in heads:
            return values
        # GGUF keeps the two halves of a rotated pair next to each other
        halves = values.reshape(heads[part], -1, 2, values.shape[-1])
        return halves.swapaxes(1, 2).reshape(values.shape)

    _gguf_weights(reader, GGUF_PARTS | {"ffn_norm": "post_attention_layernorm"}, change, ready)
    special = _write_configs(config, ready)
    _smollm2_tokenizer(fact, special, config["max_position_embeddings"], ready)


def _gemma3(files: Path, ready: Path) -> None:
    """Join the parts of the 4-bit GGUF, unpack it as above, and keep the terms of use beside it."""
    import gguf

    whole = files / "whole.gguf"
    with whole.open("wb") as joined:
        for part in sorted(files.rglob("*.gguf.part*"), key=lambda path: path.name):
            with part.open("rb") as piece:
                shutil.copyfileobj(piece, joined)
    reader = gguf.GGUFReader(whole)
    fact = _facts(reader)
    config = _gguf_config(fact)
    layers, head = range(1, config["num_hidden_layers"] + 1), fact("gemma3.attention.key_length")
    config |= {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "head_dim": head,
        "query_pre_attn_scalar": head,
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": fact("gemma3.attention.sliding_window"),
        # What GGUF does not say, the same in every Gemma 3: each sixth layer sees the whole text, the others rotate
        # their short windows by another base.
        "layer_types": ["sliding_attention" if i % 6 else "full_attention" for i in layers],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": fact("gemma3.rope.freq_base")},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    }
    parts = GGUF_PARTS | {
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    }
    # A norm multiplies by its weight in GGUF, by one plus its weight in transformers.
    _gguf_weights(reader, parts, lambda part, values: values - 1 if part.endswith("norm") else values, ready)
    special = _write_configs(config, ready)
    _gemma3_tokenizer(fact, special, config["max_position_embeddings"], ready)
    for terms in files.rglob("*TERMS*"):
        shutil.move(terms, ready / terms.name)


def _facts(reader: Any) -> Callable[[str], Any]:
    """What a GGUF says beside its weights, by key."""
    return lambda key: reader.fields[key].contents()


def _gguf_config(fact: Callable[[str], Any]) -> dict[str, Any]:
    """What the configurations of all families have in common."""
    family = fact("general.architecture")
    epsilon = fact(f"{family}.attention.layer_norm_rms_epsilon")
    return {
        "dtype": "float32",
        "vocab_size": len(fact("tokenizer.ggml.tokens")),
        "hidden_size": fact(f"{family}.embedding_length"),
        "intermediate_size": fact(f"{family}.feed_forward_length"),
        "num_hidden_layers": fact(f"{family}.block_count"),
        "num_attention_heads": fact(f"{family}.attention.head_count"),
        "num_key_value_heads": fact(f"{family}.attention.head_count_kv"),
        "max_position_embeddings": fact(f"{family}.context_length"),
        "rms_norm_eps": float(f"{epsilon:.6g}"),  # such as 1e-5, stored as a float32
        "tie_word_embeddings": True,
        "bos_token_id": fact("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fact("tokenizer.ggml.eos_token_id"),
        "pad_token_id": fact("tokenizer.ggml.padding_token_id"),
    }


def _write_configs(config: dict[str, Any], ready: Path) -> dict[str, int]:
    """Write the model's configuration and that of its generation; returns the special tokens."""
    special = {key: value for key, value in config.items() if key.endswith("_token_id")}
    _write(ready / "config.json", config)
    _write(ready / "generation_config.json", special)
    return special


def _gguf_weights(reader: Any, parts: dict[str, str], change: Callable[[str, Any], Any], ready: Path) -> None:
    """Write all weights in float32, under transformers' names (`parts`: of a layer) and after `change` of each."""
    import gguf
    import numpy
    from safetensors.numpy import save_file

    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    weights = {}
    for tensor in reader.tensors:
        name = part = tensor.name.removesuffix(".weight")
        if name.startswith("blk."):
            _, layer, part = name.split(".")
            name = f"model.layers.{layer}.{parts[part]}"
        else:
            name = names[name]
        values = change(part, gguf.dequantize(tensor.data, tensor.tensor_type))
        weights[f"{name}.weight"] = numpy.ascontiguousarray(values, dtype=numpy.float32)
    save_file(weights, ready / WEIGHTS, metadata={"format": "pt"})


def _smollm2_tokenizer(fact: Callable[[str], Any], special: dict[str, int], longest: int, ready: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokens = fact("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in fact("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    # what "smollm" means in tokenizer.ggml.pre: digits one by one, then the words of GPT-2
    pieces = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(pieces)
    tokenizer.decoder = decoders.ByteLevel()
    _write_gguf_tokenizer(tokenizer, tokens, fact, special, longest, ready)
    (ready / "chat_template.jinja").write_text(fact("tokenizer.chat_template"), encoding="utf-8")


def _gemma3_tokenizer(fact: Callable[[str], Any], special: dict[str, int], longest: int, ready: Path) -> None:
    """A SentencePiece model as byte-pair merges: of two pieces that could be made, the lower id comes first."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    kinds = fact("tokenizer.ggml.token_type")
    # llama.cpp writes spaces in the pieces that are made of nothing else; the text has marks there when it meets them
    tokens = [token.replace(" ", SPACE) for token in fact("tokenizer.ggml.tokens")]
    pieces = {token for token, kind in zip(tokens, kinds, strict=True) if kind in (NORMAL, USER_DEFINED)}
    merges = [
        (token[:at], token[at:])
        for token in tokens
        if token in pieces
        for at in range(1, len(token))
        if token[:at] in pieces and token[at:] in pieces
    ]
    unknown, begin = (tokens[fact(f"tokenizer.ggml.{name}_token_id")] for name in ("unknown", "bos"))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        f"{begin} $A", f"{begin} $A {begin}:1 $B:1", [(begin, vocabulary[begin])]
    )
    _write_gguf_tokenizer(tokenizer, tokens, fact, special, longest, ready)


def _write_gguf_tokenizer(
    tokenizer: Any, tokens: list[str], fact: Callable[[str], Any], special: dict[str, int], longest: int, ready: Path
) -> None:
    """Write a tokenizer, with the tokens that texts are split at before all else."""
    from tokenizers import AddedToken

    kinds = fact("tokenizer.ggml.token_type")
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=kind == CONTROL)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in (CONTROL, USER_DEFINED)
        ]
    )
    tokenizer.save(str(ready / "tokenizer.json"))
    _write(
        ready / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{key.removesuffix("_id"): tokens[i] for key, i in special.items()},
            "unk_token": tokens[fact("tokenizer.ggml.unknown_token_id")],
            "model_max_length": longest,
            "clean_up_tokenization_spaces": False,
        },
    )


def _rxn_albert(files: Path, ready: Path) -> None:
    """Turn a pickled state dict into safetensors (read as weights only, nothing is run) and write a fast tokenizer."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

    weights = torch.load(files / "pytorch_model.bin", weights_only=True, map_location="cpu")
    # The decoder is tied to the embeddings, and the pooler was never trained (there was no sentence-order loss).
    dropped = ("predictions.decoder.", "albert.pooler.")
    model_weights = {name: weight.contiguous() for name, weight in weights.items() if not name.startswith(dropped)}
    save_file(model_weights, ready / WEIGHTS, metadata={"format": "pt"})

    vocabulary = {line: i for i, line in enumerate((files / "vocab.txt").read_text(encoding="utf-8").splitlines())}
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("cls", "sep", "pad", "unk", "mask")}
    stated = json.loads((files / "config.json").read_text(encoding="utf-8"))
    # fmt: off
    obsolete = ("do_sample", "length_penalty", "max_length", "num_beams", "repetition_penalty", "temperature", "top_k",
                "top_p", "eos_token_ids", "finetuning_task", "num_labels", "output_past", "pruned_heads", "torchscript",
                "use_bfloat16")
    # fmt: on
    config = {key: value for key, value in stated.items() if key not in obsolete}
    ends = {"bos_token_id": vocabulary["[CLS]"], "eos_token_id": vocabulary["[SEP]"]}
    _write(ready / "config.json", config | ends | {"dtype": "float32"})

    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    atoms = r"\[[^\]]+]|Br?|Cl?|[NOSPFIbcnosp]|\(|\)|\.|=|#|-|\+|\\|\/|:|~|@|\?|>>?|\*|\$|%[0-9]{2}|[0-9]"
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(atoms), "isolated")
    pair = [(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", pair)
    tokenizer.add_special_tokens(list(special.values()))
    tokenizer.save(str(ready / "tokenizer.json"))
    longest = {"model_max_length": config["max_position_embeddings"], "clean_up_tokenization_spaces": False}
    _write(ready / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **special, **longest})


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


CONVERT: dict[str, Callable[[Path, Path], None]] = {
    "smollm2-135m": _smollm2,
    "minilm-l6": _copy,
    "gemma3-270m": _gemma3,
    "rxn-albert": _rxn_albert,
}
# Part of the cache key: change it when the result of a conversion changes.
RECIPE = {
    "smollm2-135m": "float32 1",
    "minilm-l6": "as it is 1",
    "gemma3-270m": "float32 1",
    "rxn-albert": "masked-LM 1",
}
