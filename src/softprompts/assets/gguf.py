"""Conversion of packaged models into directories for `from_pretrained`.

A conversion is a function of the package's files and the new directory. transformers unpacks the weights of a GGUF
file. The configuration and the tokenizer are written here, because those of transformers (5.16 to 5.24) differ:

- The configuration has the epsilon in float32 (9.999999747378752e-06), and Gemma's attention scale is always 256.
- The tokenizer of SmolLM2 ignores `tokenizer.ggml.pre`. It does not cut numbers into digits, so texts get other tokens.
- The tokenizer of Gemma pads on the left, has no longest length, and lacks 30 of the tokens that texts are split at.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

WEIGHTS = "model.safetensors"
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
"""Kinds of tokens in GGUF."""
SPACE = "▁"
"""SentencePiece's mark for a space."""

Metadata = dict[str, Any]
"""The values of a GGUF file beside its weights."""


def _copy_files(files: Path, ready: Path) -> None:
    for path in files.iterdir():
        if path.is_file():
            shutil.move(path, ready / path.name)


def _convert_smollm2(files: Path, ready: Path) -> None:
    """Unpack a 4-bit GGUF file to float32, with its configuration and tokenizer."""
    from transformers import LlamaForCausalLM

    path = next(files.glob("*.gguf"))
    metadata = _read_metadata(path)
    config = _common_config(metadata) | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "head_dim": metadata["llama.rope.dimension_count"],
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": metadata["llama.rope.freq_base"]},
    }
    _write_configs(config, ready)
    _write_weights(path, LlamaForCausalLM, ready)
    _write_smollm2_tokenizer(metadata, ready)


def _convert_gemma3(files: Path, ready: Path) -> None:
    """Join the parts of a 4-bit GGUF file, unpack it to float32, and keep the terms of use beside it."""
    from transformers import Gemma3ForCausalLM

    path = files / "whole.gguf"
    with path.open("wb") as whole:
        for part in sorted(files.rglob("*.gguf.part*"), key=lambda path: path.name):
            with part.open("rb") as content:
                shutil.copyfileobj(content, whole)
    metadata = _read_metadata(path)
    layers, head_dim = metadata["gemma3.block_count"], metadata["gemma3.attention.key_length"]
    config = _common_config(metadata) | {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "head_dim": head_dim,
        "query_pre_attn_scalar": head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": metadata["gemma3.attention.sliding_window"],
        # GGUF does not state these; they are the same in every Gemma 3: each sixth layer sees the whole text, the
        # others rotate their short windows by another base.
        "layer_types": ["sliding_attention" if i % 6 else "full_attention" for i in range(1, layers + 1)],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": metadata["gemma3.rope.freq_base"]},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    }
    _write_configs(config, ready)
    _write_weights(path, Gemma3ForCausalLM, ready)
    _write_gemma3_tokenizer(metadata, ready)
    for terms in files.rglob("*TERMS*"):
        shutil.move(terms, ready / terms.name)


def _convert_rxn_albert(files: Path, ready: Path) -> None:
    """Turn a pickled state dict into safetensors (read as weights only, nothing is run) and write a fast tokenizer."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

    state = torch.load(files / "pytorch_model.bin", weights_only=True, map_location="cpu")
    # The decoder is tied to the embeddings, and the pooler was never trained (there was no sentence-order loss).
    unused = ("predictions.decoder.", "albert.pooler.")
    weights = {name: weight.contiguous() for name, weight in state.items() if not name.startswith(unused)}
    save_file(weights, ready / WEIGHTS, metadata={"format": "pt"})

    vocabulary = _numbered((files / "vocab.txt").read_text(encoding="utf-8").splitlines())
    special_tokens = {f"{name}_token": f"[{name.upper()}]" for name in ("cls", "sep", "pad", "unk", "mask")}
    original = json.loads((files / "config.json").read_text(encoding="utf-8"))
    # fmt: off
    obsolete = ("do_sample", "length_penalty", "max_length", "num_beams", "repetition_penalty", "temperature", "top_k",
                "top_p", "eos_token_ids", "finetuning_task", "num_labels", "output_past", "pruned_heads", "torchscript",
                "use_bfloat16")
    # fmt: on
    config = {key: value for key, value in original.items() if key not in obsolete}
    ends = {"bos_token_id": vocabulary["[CLS]"], "eos_token_id": vocabulary["[SEP]"]}
    _write_json(ready / "config.json", config | ends | {"dtype": "float32"})

    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    atoms = r"\[[^\]]+]|Br?|Cl?|[NOSPFIbcnosp]|\(|\)|\.|=|#|-|\+|\\|\/|:|~|@|\?|>>?|\*|\$|%[0-9]{2}|[0-9]"
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(atoms), "isolated")
    ends_of_text = [(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ends_of_text
    )
    tokenizer.add_special_tokens(list(special_tokens.values()))
    _write_tokenizer(tokenizer, special_tokens, config["max_position_embeddings"], ready)


def _numbered(tokens: list[str]) -> dict[str, int]:
    """The id of each token."""
    return dict(zip(tokens, range(len(tokens)), strict=True))


def _read_metadata(path: Path) -> Metadata:
    import gguf

    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def _common_config(metadata: Metadata) -> dict[str, Any]:
    """The part of the configuration that all families of GGUF files share."""
    family = metadata["general.architecture"]
    epsilon = metadata[f"{family}.attention.layer_norm_rms_epsilon"]
    return {
        "dtype": "float32",
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "hidden_size": metadata[f"{family}.embedding_length"],
        "intermediate_size": metadata[f"{family}.feed_forward_length"],
        "num_hidden_layers": metadata[f"{family}.block_count"],
        "num_attention_heads": metadata[f"{family}.attention.head_count"],
        "num_key_value_heads": metadata[f"{family}.attention.head_count_kv"],
        "max_position_embeddings": metadata[f"{family}.context_length"],
        "rms_norm_eps": float(f"{epsilon:.6g}"),  # such as 1e-5, stored as a float32
        "tie_word_embeddings": True,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
    }


def _write_configs(config: dict[str, Any], ready: Path) -> None:
    """Write the configurations of the model and of its generation."""
    _write_json(ready / "config.json", config)
    token_ids = {key: value for key, value in config.items() if key.endswith("_token_id")}
    _write_json(ready / "generation_config.json", token_ids)


def _write_weights(path: Path, model_class: Any, ready: Path) -> None:
    """Write the weights of a GGUF file in float32, for the configuration in `ready`."""
    import torch
    from safetensors.torch import save_file

    model = model_class.from_pretrained(
        path.parent,
        gguf_file=path.name,
        config=model_class.config_class.from_pretrained(ready),  # else it parses the metadata once more
        dtype=torch.float32,
        local_files_only=True,
    )
    # `named_parameters` has the tied embeddings once.
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    save_file(weights, ready / WEIGHTS, metadata={"format": "pt"})


def _write_smollm2_tokenizer(metadata: Metadata, ready: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = _numbered(metadata["tokenizer.ggml.tokens"])
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    # The meaning of "smollm" in `tokenizer.ggml.pre`: digits one by one, then the words of GPT-2.
    pieces = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(pieces)
    tokenizer.decoder = decoders.ByteLevel()
    _write_gguf_tokenizer(tokenizer, list(vocabulary), metadata, ready)
    (ready / "chat_template.jinja").write_text(metadata["tokenizer.chat_template"], encoding="utf-8")


def _write_gemma3_tokenizer(metadata: Metadata, ready: Path) -> None:
    """Write a SentencePiece model as byte-pair merges: of two pieces that could be made, the lower id comes first."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    # llama.cpp writes spaces in pieces that consist of spaces only; the text has marks there when it meets them.
    tokens = [token.replace(" ", SPACE) for token in metadata["tokenizer.ggml.tokens"]]
    pieces: dict[str, None] = {}
    for token, kind in zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True):
        if kind in (NORMAL, USER_DEFINED):
            pieces[token] = None
    merges: list[tuple[str, str]] = []
    for piece in pieces:
        for cut in range(1, len(piece)):
            if piece[:cut] in pieces and piece[cut:] in pieces:
                merges.append((piece[:cut], piece[cut:]))
    vocabulary = _numbered(tokens)
    unknown = tokens[metadata["tokenizer.ggml.unknown_token_id"]]
    begin = tokens[metadata["tokenizer.ggml.bos_token_id"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        f"{begin} $A", f"{begin} $A {begin}:1 $B:1", [(begin, vocabulary[begin])]
    )
    _write_gguf_tokenizer(tokenizer, tokens, metadata, ready)


def _write_gguf_tokenizer(tokenizer: Any, tokens: list[str], metadata: Metadata, ready: Path) -> None:
    """Write a tokenizer with the tokens that texts are split at before all else."""
    from tokenizers import AddedToken

    added_tokens: list[AddedToken] = []
    for token, kind in zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True):
        if kind in (CONTROL, USER_DEFINED):
            added_tokens.append(AddedToken(token, normalized=False, special=kind == CONTROL))
    tokenizer.add_tokens(added_tokens)
    special_tokens: dict[str, str] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        special_tokens[f"{name}_token"] = tokens[metadata[f"tokenizer.ggml.{key}_token_id"]]
    family = metadata["general.architecture"]
    _write_tokenizer(tokenizer, special_tokens, metadata[f"{family}.context_length"], ready)


def _write_tokenizer(tokenizer: Any, special_tokens: dict[str, str], max_length: int, ready: Path) -> None:
    tokenizer.save(str(ready / "tokenizer.json"))
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **special_tokens}
    config |= {"model_max_length": max_length, "clean_up_tokenization_spaces": False}
    _write_json(ready / "tokenizer_config.json", config)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


CONVERT: dict[str, Callable[[Path, Path], None]] = {
    "smollm2-135m": _convert_smollm2,
    "minilm-l6": _copy_files,
    "gemma3-270m": _convert_gemma3,
    "rxn-albert": _convert_rxn_albert,
}
# Part of the cache key: change it when the result of a conversion changes.
RECIPE = {
    "smollm2-135m": "float32 1",
    "minilm-l6": "as it is 1",
    "gemma3-270m": "float32 1",
    "rxn-albert": "masked-LM 1",
}
