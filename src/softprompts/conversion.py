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


def _copy(files: Path, ready: Path) -> None:
    for path in files.iterdir():
        if path.is_file():
            shutil.move(path, ready / path.name)


def _smollm2(files: Path, ready: Path) -> None:
    """Unpack the 4-bit GGUF to float32 safetensors, with the configuration and the tokenizer it describes."""
    import gguf
    import numpy
    from safetensors.numpy import save_file

    reader = gguf.GGUFReader(next(files.glob("*.gguf")))

    def fact(key: str) -> Any:
        return reader.fields[key].contents()

    heads, kv_heads = fact("llama.attention.head_count"), fact("llama.attention.head_count_kv")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": len(fact("tokenizer.ggml.tokens")),
        "hidden_size": fact("llama.embedding_length"),
        "intermediate_size": fact("llama.feed_forward_length"),
        "num_hidden_layers": fact("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": fact("llama.rope.dimension_count"),
        "hidden_act": "silu",
        "max_position_embeddings": fact("llama.context_length"),
        "rms_norm_eps": float(f"{fact('llama.attention.layer_norm_rms_epsilon'):.6g}"),  # 1e-5, stored as a float32
        "rope_parameters": {"rope_type": "default", "rope_theta": fact("llama.rope.freq_base")},
        "tie_word_embeddings": True,
        "bos_token_id": fact("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fact("tokenizer.ggml.eos_token_id"),
        "pad_token_id": fact("tokenizer.ggml.padding_token_id"),
    }
    special = {key: value for key, value in config.items() if key.endswith("_token_id")}
    _write(ready / "config.json", config)
    _write(ready / "generation_config.json", special)

    weights = {}
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    parts = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    for tensor in reader.tensors:
        name, values = tensor.name.removesuffix(".weight"), gguf.dequantize(tensor.data, tensor.tensor_type)
        if name.startswith("blk."):
            _, layer, part = name.split(".")
            name = f"model.layers.{layer}.{parts[part]}"
            if part in ("attn_q", "attn_k"):  # GGUF keeps the two halves of a rotated pair next to each other
                halves = values.reshape(heads if part == "attn_q" else kv_heads, -1, 2, values.shape[-1])
                values = halves.swapaxes(1, 2).reshape(values.shape)
        else:
            name = names[name]
        weights[f"{name}.weight"] = numpy.ascontiguousarray(values, dtype=numpy.float32)
    save_file(weights, ready / WEIGHTS, metadata={"format": "pt"})
    _smollm2_tokenizer(fact, special, config["max_position_embeddings"], ready)


def _smollm2_tokenizer(fact: Callable[[str], Any], special: dict[str, int], longest: int, ready: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, control = fact("tokenizer.ggml.tokens"), 3
    merges = [tuple(merge.split(" ")) for merge in fact("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    # what "smollm" means in tokenizer.ggml.pre: digits one by one, then the words of GPT-2
    pieces = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(pieces)
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, fact("tokenizer.ggml.token_type"), strict=True)
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token, kind in kinds if kind == control]
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
    (ready / "chat_template.jinja").write_text(fact("tokenizer.chat_template"), encoding="utf-8")


def _rxn_albert(files: Path, ready: Path) -> None:
    """Turn a pickled state dict into safetensors (read as weights only, nothing is run) and write a fast tokenizer."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

    weights = torch.load(files / "pytorch_model.bin", weights_only=True, map_location="cpu")
    # The decoder is tied to the embeddings, and the pooler was never trained (there was no sentence-order loss).
    dropped = ("predictions.decoder.", "albert.pooler.")
    kept = {name: weight.contiguous() for name, weight in weights.items() if not name.startswith(dropped)}
    save_file(kept, ready / WEIGHTS, metadata={"format": "pt"})

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
    "rxn-albert": _rxn_albert,
}
# Part of the cache key: change it when the result of a conversion changes.
RECIPE = {"smollm2-135m": "float32 1", "minilm-l6": "as it is 1", "rxn-albert": "masked-LM 1"}
