"""Packaged models after their conversion: a tiny Llama and a tiny Gemma 3 written as GGUF here, and the real ones."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from softprompts.assets import fetch, where
from softprompts.assets.gguf import CONVERT

NORMAL, CONTROL, USER_DEFINED, BYTE = 1, 3, 4, 6
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")
RUNS = ("\n", "\n\n", "  ", "   ", "<b>")
BYTES = tuple(f"<0x{value:02X}>" for value in range(256))
# in the order in which they were joined: "the" is "th" and "e", since "he" came later
PIECES = ("th", "▁c", "at", "▁cat", "he", "▁", "t", "h", "e", "c", "a", "s")
TOKENS = (*SPECIAL, *RUNS, *BYTES, *PIECES)
KINDS = [CONTROL] * 4 + [USER_DEFINED] * 5 + [BYTE] * 256 + [NORMAL] * len(PIECES)


@pytest.fixture
def quiet() -> Iterator[Callable[[], list[str]]]:
    """Collects what transformers logs as a warning."""
    records: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield lambda: records
    logger.removeHandler(handler)


LLAMA_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA_MERGES = ("t h", "th e", "Ġ c", "2 0")
LLAMA_TOKENS = (
    *LLAMA_SPECIAL,
    *sorted(pre_tokenizers.ByteLevel.alphabet()),
    *(m.replace(" ", "") for m in LLAMA_MERGES),
)
CHAT_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"


def tiny_llama() -> LlamaForCausalLM:
    """Two layers with grouped heads; 32 columns are one block of Q4_1."""
    config = LlamaConfig(
        vocab_size=len(LLAMA_TOKENS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def permute(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp keeps the two halves of a rotated pair next to each other."""
    return weight.reshape(heads, 2, -1, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def write_llama(model: LlamaForCausalLM, path: Path) -> dict[str, Tensor]:
    """Write the file that llama.cpp writes in Q4_1; returns the weights that it holds, dequantized."""
    writer, config = gguf.GGUFWriter(path, "llama"), model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(100_000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(LLAMA_TOKENS)
    writer.add_token_types([CONTROL] * 3 + [NORMAL] * (len(LLAMA_TOKENS) - 3))
    writer.add_token_merges(LLAMA_MERGES)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    written: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        weight = parameter.detach()
        gguf_name, part = names.get_name(name, try_suffixes=(".weight",)), name.split(".")[-2]
        if weight.dim() == 1:
            writer.add_tensor(gguf_name, weight.numpy())
            written[name] = weight
            continue
        stored = permute(weight, heads[part]) if part in heads else weight
        blocks = gguf.quantize(stored.contiguous().numpy(), gguf.GGMLQuantizationType.Q4_1)
        writer.add_tensor(gguf_name, blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
        # A block is a piece of one row, and the permutation moves whole rows.
        plain = gguf.quantize(weight.contiguous().numpy(), gguf.GGMLQuantizationType.Q4_1)
        written[name] = torch.from_numpy(gguf.dequantize(plain, gguf.GGMLQuantizationType.Q4_1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], Path]:
    """The weights in the file of the tiny Llama, and the directory that the conversion made of it."""
    root = tmp_path_factory.mktemp("llama")
    files, ready = root / "files", root / "ready"
    files.mkdir()
    ready.mkdir()
    weights = write_llama(tiny_llama(), files / "model.gguf")
    CONVERT["smollm2-135m"](files, ready)
    return weights, ready


def test_the_weights_of_a_quantized_llama_are_those_of_the_file_bit_for_bit(
    llama: tuple[dict[str, Tensor], Path],
) -> None:
    weights, folder = llama
    converted = load_file(folder / "model.safetensors")
    assert converted.keys() == weights.keys()
    for name, weight in weights.items():
        assert converted[name].dtype == torch.float32
        assert torch.equal(converted[name], weight), name


def test_the_configuration_of_a_llama_is_that_of_its_model(llama: tuple[dict[str, Tensor], Path]) -> None:
    config = AutoConfig.from_pretrained(llama[1], local_files_only=True).to_dict()
    expected = tiny_llama().config.to_dict()
    expected |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "architectures": ["LlamaForCausalLM"]}
    differing = {key for key in config | expected if config.get(key) != expected.get(key)}
    assert differing <= {"_name_or_path", "dtype"}
    assert config["rms_norm_eps"] == 1e-5  # and not the float32 of the file


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("the cat", ["the", "Ġc", "a", "t"]), ("2024 20", ["2", "0", "2", "4", "Ġ", "2", "0"])],
)
def test_the_tokens_of_a_llama_cut_numbers_into_digits(
    llama: tuple[dict[str, Tensor], Path], text: str, tokens: list[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama[1], local_files_only=True)
    ids = tokenizer(text).input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == tokens
    assert tokenizer.decode(ids) == text
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "the"}], return_dict=False)
    assert tokenizer.decode(chat) == "<|im_start|>user\nthe<|im_end|>"
    assert chat[0] == tokenizer.bos_token_id == 1


def tiny() -> Gemma3ForCausalLM:
    """Seven layers, so that the sixth sees the whole text; norms that are far from doing nothing."""
    config = Gemma3TextConfig(
        vocab_size=len(TOKENS), hidden_size=32, intermediate_size=48, num_hidden_layers=7, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, query_pre_attn_scalar=16, sliding_window=4, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.randn(weight.shape) * (0.5 if name.endswith("norm.weight") else 0.2))
    return model


def write(model: Gemma3ForCausalLM, path: Path) -> None:
    """Write the file that llama.cpp writes for Gemma 3, without quantizing."""
    writer, config = gguf.GGUFWriter(path, "gemma3"), model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(config.head_dim)
    writer.add_rope_freq_base(1_000_000.0)
    writer.add_sliding_window(config.sliding_window)
    writer.add_token_list(TOKENS)
    writer.add_token_types(KINDS)
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_unk_token_id(3)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, config.num_hidden_layers)
    for name, weight in model.model.named_parameters(prefix="model"):
        values = weight.detach().numpy() + (1 if name.endswith("norm.weight") else 0)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> tuple[Gemma3ForCausalLM, Path]:
    """The tiny model, and the directory that the conversion made of it, packed in four parts as the packages are."""
    root = tmp_path_factory.mktemp("gemma")
    model, files, ready = tiny(), root / "files", root / "ready"
    write(model, root / "whole.gguf")
    content = (root / "whole.gguf").read_bytes()
    size = -(-len(content) // 4)
    for i in range(4):
        folder = files / f"part{i + 1}" / "data"
        folder.mkdir(parents=True)
        (folder / f"model.gguf.part0{i}").write_bytes(content[i * size : (i + 1) * size])
    (files / "part1" / "GEMMA_TERMS.html").write_text("terms")
    ready.mkdir()
    CONVERT["gemma3-270m"](files, ready)
    return model, ready


def test_the_weights_and_the_windows_of_gemma3(gemma: tuple[Gemma3ForCausalLM, Path]) -> None:
    expected, folder = gemma
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    ids = torch.arange(len(TOKENS) - 12, len(TOKENS))[None]  # three windows
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected(ids).logits, atol=1e-5, rtol=1e-5)
    for name, weight in load_file(folder / "model.safetensors").items():
        original = expected.get_parameter(name)
        if name.endswith("norm.weight"):  # the file has it plus one, which rounds
            torch.testing.assert_close(weight, original.detach(), atol=1e-6, rtol=0)
        else:
            assert torch.equal(weight, original), name
    assert model.config.layer_types == expected.config.layer_types
    assert model.config.rope_parameters == expected.config.rope_parameters
    assert (folder / "GEMMA_TERMS.html").read_text() == "terms"


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("the cat", ["th", "e", "▁cat"]),
        ("at  he", ["at", "▁▁", "he"]),
        ("a\n\n\ns", ["a", "\n\n", "\n", "s"]),
        (" é<b>", ["▁", "<0xC3>", "<0xA9>", "<b>"]),
    ],
)
def test_the_tokens_of_gemma3(gemma: tuple[Gemma3ForCausalLM, Path], text: str, tokens: list[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gemma[1], local_files_only=True)
    ids = tokenizer(text).input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["<bos>", *tokens]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer(text, add_special_tokens=False).input_ids == ids[1:]
    assert tokenizer.all_special_ids == [2, 1, 3, 0]


@pytest.mark.assets
def test_rxn_albert_fills_in_masked_tokens(quiet: Callable[[], list[str]]) -> None:
    folder = fetch("rxn-albert")
    assert not list(folder.glob("*.bin"))
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForMaskedLM.from_pretrained(folder, local_files_only=True).eval()
    reaction = "CC(C)S.CN(C)C=O.Fc1cccnc1F.O=C([O-])[O-].[K+].[K+]>>CC(C)Sc1ncccc1F"
    ids = tokenizer(reaction, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0], skip_special_tokens=True).replace(" ", "") == reaction
    places = torch.arange(1, ids.shape[1] - 1)
    masked = ids.repeat(len(places), 1)
    masked[torch.arange(len(places)), places] = tokenizer.mask_token_id
    with torch.no_grad():
        guesses = model(masked).logits[torch.arange(len(places)), places].argmax(-1)
    assert (guesses == ids[0, places]).float().mean() > 0.9
    assert quiet() == []


@pytest.mark.assets
def test_the_default_model_loads_without_a_warning(quiet: Callable[[], list[str]]) -> None:
    folder = fetch("smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert tokenizer.is_fast
    assert tokenizer("year 2024").input_ids == [
        *tokenizer("year").input_ids,
        *tokenizer(" ").input_ids,
        *tokenizer("2024").input_ids,
    ]
    assert len(tokenizer("2024").input_ids) == 4
    message = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert "<|im_start|>user\nhi<|im_end|>" in message
    asked = tokenizer("The capital of France is", return_tensors="pt")
    answered = model.generate(**asked, max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(answered[0]) == "The capital of France is Paris."
    assert json.loads((folder / "config.json").read_text())["rms_norm_eps"] == 1e-5
    assert quiet() == []


@pytest.mark.assets
def test_gemma_goes_on_with_a_sentence(quiet: Callable[[], list[str]]) -> None:
    folder = where("gemma3-270m")
    if folder is None:
        pytest.skip("gemma3-270m was not fetched (238 MB; softprompts assets fetch gemma3-270m)")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    asked = tokenizer("The quick brown fox jumps over the", return_tensors="pt")
    assert asked.input_ids[0, 0] == tokenizer.bos_token_id
    answered = model.generate(**asked, max_new_tokens=3, do_sample=False)
    assert tokenizer.decode(answered[0, 1:]) == "The quick brown fox jumps over the lazy dog."
    text = "naïve  日本\n\n\t😀 <table> 2024"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.unk_token_id not in ids
    assert quiet() == []
