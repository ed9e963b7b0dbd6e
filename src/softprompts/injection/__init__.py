"""Where a prompt enters the frozen model; nobody else knows. `score` gives scores that line up with labels.

A site only fixes the prompt's width D; everything a method or an objective sees is free of prompt positions.

| site    | D                               | what the prompt is                                                  |
|---------|---------------------------------|---------------------------------------------------------------------|
| input   | embedding size                  | vectors before, among or behind the text's                          |
| decoder | embedding size                  | the same in front of the decoder's input                            |
| layers  | L * H                           | one set per layer; replaces or is added to hidden states            |
| kv      | sum of 2 * kv_heads * head_dim  | keys and values in front of each layer's own, as a cache holds them |
"""

from softprompts.injection.continuations import candidate_tree, score_continuations
from softprompts.injection.forward import (
    TrunkOutput,
    can_compute_prefix,
    compute_prefix,
    prefill,
    run_trunk,
)
from softprompts.injection.hidden_states import check_layers
from softprompts.injection.layout import add_delta, assemble_embeddings, layout_rows
from softprompts.injection.packed import Prefix, why_not_packed
from softprompts.injection.packed_attention import Unpackable
from softprompts.injection.placement import prompt_offsets
from softprompts.injection.scoring import (
    MAX_LOGITS,
    apply_head,
    score,
    sequence_scores,
    span_scores,
    text_states,
)
from softprompts.injection.sites import (
    Site,
    prompt_spec,
    prompt_width,
    resolve_placement,
    split_by_layer,
)

__all__ = [
    "MAX_LOGITS",
    "Prefix",
    "Site",
    "TrunkOutput",
    "Unpackable",
    "add_delta",
    "apply_head",
    "assemble_embeddings",
    "can_compute_prefix",
    "candidate_tree",
    "check_layers",
    "compute_prefix",
    "layout_rows",
    "prefill",
    "prompt_offsets",
    "prompt_spec",
    "prompt_width",
    "resolve_placement",
    "run_trunk",
    "score",
    "score_continuations",
    "sequence_scores",
    "span_scores",
    "split_by_layer",
    "text_states",
    "why_not_packed",
]
