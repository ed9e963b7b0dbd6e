"""Golden: architectures beyond the main families. Each takes a path that gives what the stock model says row by row."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor

import rows
import tiny
from rows import INPUT
from softprompts import backbone as b
from softprompts import injection
from softprompts.backbone.kernels import Kernels
from softprompts.injection import packed
from softprompts.types import IGNORE

pytestmark = pytest.mark.golden
LENGTHS = (5, 13, 1, 9)  # a window of 6 is shorter than the longest text
USED = (2, 0, 1, 2)
WINDOW: dict[str, Any] = {**tiny.GROUPED, "sliding_window": 6}
EXPERTS: dict[str, Any] = {**WINDOW, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT: dict[str, Any] = {
    **tiny.SIZES,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
LAYERED: dict[str, Any] = {
    **WINDOW,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": tiny.VOCABULARY,
    "laurel_rank": 4,
    "num_kv_shared_layers": 0,
    "activation_sparsity_pattern": None,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
}
CONFIGS: dict[str, dict[str, Any]] = {
    "Phi3Config": WINDOW,
    "Starcoder2Config": WINDOW,
    "MixtralConfig": {**EXPERTS, "num_local_experts": 4},
    "Qwen3MoeConfig": {**EXPERTS, "num_experts": 4},
    "OlmoeConfig": {**tiny.GROUPED, "num_experts_per_tok": 2, "num_experts": 4},
    "CohereConfig": tiny.GROUPED,
    "Cohere2Config": {**WINDOW, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    "Olmo2Config": tiny.GROUPED,
    "Olmo3Config": WINDOW,
    "GraniteConfig": {
        **tiny.GROUPED,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.5,
        "embedding_multiplier": 3.0,
    },
    "StableLmConfig": tiny.GROUPED,
    "SmolLM3Config": {**tiny.GROUPED, "no_rope_layer_interval": 2},
    "GlmConfig": tiny.GROUPED,
    "Glm4Config": tiny.GROUPED,
    "NemotronConfig": tiny.GROUPED,
    "PersimmonConfig": tiny.GROUPED,
    "SeedOssConfig": tiny.GROUPED,
    "HunYuanDenseV1Config": tiny.GROUPED,
    "Exaone4Config": {**WINDOW, "sliding_window_pattern": 2},
    "BioGptConfig": tiny.SIZES,
    "GPTBigCodeConfig": {**tiny.SIZES, "n_positions": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 48},
    "DeepseekV3Config": LATENT,
    "Gemma3nTextConfig": LAYERED,
    "GptOssConfig": {**EXPERTS, "num_local_experts": 4},
    "Qwen2MoeConfig": {**EXPERTS, "num_experts": 4, "use_sliding_window": True, "max_window_layers": 1},
    "BertGenerationConfig": tiny.SIZES,
    "CodeGenConfig": {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
    "XGLMConfig": {"vocab_size": 96, "d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48},
    "MambaConfig": {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
}
OTHERWISE = {
    "GptOssConfig": "shared",  # attention sinks
    "Qwen2MoeConfig": "shared",  # its attention does not say its window
    **({} if rows.AT_LEAST_5_24 else {"CodeGenConfig": "shared"}),  # as GPT-J: its attention became switchable
    "XGLMConfig": "shared",
    "BertGenerationConfig": (
        "concatenation: BertGenerationDecoder attends in both directions, so its prompt sees the text"
    ),
    "MambaConfig": "concatenation: MambaForCausalLM keeps a state that is not a key-value cache",
}
WHOLE = ("Gemma3nTextConfig",)  # their last layer cannot be run for some tokens only


def backbone(name: str, dtype: torch.dtype = torch.float32, spread: float = 0.15) -> b.Backbone:
    """A tiny random model of a configuration class; skipped where this transformers does not have it."""
    if not hasattr(t, name):
        pytest.skip(f"transformers {t.__version__} has no {name}")
    torch.manual_seed(0)
    made = t.AutoModelForCausalLM.from_config(getattr(t, name)(**CONFIGS[name])).to(torch.float32)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1 or not parameter.any():  # biases and attention sinks begin at zero
                parameter.normal_(0, spread)
    return b.wrap(made.to(dtype), name=name)


def prompts(bb: b.Backbone) -> list[Tensor]:
    """Three prompts of 3, 9 and 5 tokens that want gradients."""
    return [rows.random(i, n, bb.embedding_size).requires_grad_() for i, n in enumerate((3, 9, 5))]


def apart(found: Tensor, expected: Tensor) -> float:
    """Distance relative to the second."""
    return float((found - expected).detach().norm() / expected.detach().norm())


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # GPTBigCode, before 5.23
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # what an architecture's own code warns of
def test_other_architectures(name: str) -> None:
    """Scores of all labels, and of one label a row, and the gradient: by the best path, recomputed or not."""
    bb, texts = backbone(name), rows.texts("llama", LENGTHS)
    batch = rows.batch("llama", texts, "left", 2)
    values = prompts(bb)
    whole = [torch.cat([values[u], bb.model.get_input_embeddings()(x)])[None] for u, x in zip(USED, texts, strict=True)]
    stock = [
        bb.model(inputs_embeds=x, use_cache=False).logits[0, -len(y) - 1 : -1]
        for x, y in zip(whole, texts, strict=True)
    ]
    columns = torch.arange(batch.input_ids.shape[1]).expand_as(batch.input_ids)
    one = replace(batch, labels=batch.labels.masked_fill(columns != columns[0, -1], IGNORE))
    for given, expected in ((batch, torch.cat(stock)), (one, torch.stack([scores[-1] for scores in stock]))):
        weights = rows.random(3, *expected.shape)
        wanted = torch.autograd.grad((expected * weights).sum(), values, retain_graph=True)
        for again in (False, True):
            run = replace(bb, kernels=Kernels(gradient_checkpointing=again))
            output = injection.score(run, given, rows.several(values, USED), INPUT)
            assert output.path == OTHERWISE.get(name, "packed")
            assert apart(output.logits, expected) < 1e-5
            found = torch.autograd.grad((output.logits * weights).sum(), values)
            assert max(apart(f, w) for f, w in zip(found, wanted, strict=True)) < 1e-4
    if name not in OTHERWISE:
        assert bb.facts["trimmed"] == (name not in WHOLE)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("GptOssConfig", "GptOssForCausalLM cannot pack rows: its attention has sinks"),
        ("BertGenerationConfig", "BertGenerationDecoder attends in both directions, so its prompt sees the text"),
    ],
)
def test_what_would_pass_for_rounding(name: str, reason: str) -> None:
    """In bfloat16, with weights as small as at the beginning of training, the states alone would not tell."""
    assert packed.why_not_packed(backbone(name, torch.bfloat16, 0.02)) == reason
