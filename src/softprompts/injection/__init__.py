"""Where a prompt enters the frozen model; nobody else knows. `forward` gives scores that line up with labels.

A site only fixes the prompt's width D; everything a method or an objective sees is free of prompt positions.

| site    | D                            | what the prompt is                                            |
|---------|------------------------------|---------------------------------------------------------------|
| input   | features                     | vectors before, among or behind the text's                    |
| decoder | features                     | the same in front of the decoder's input                      |
| layers  | L * H                        | one set per layer; overwrites or is added to hidden states    |
| kv      | sum of 2 * heads * head_dim  | keys and values in front of each layer's own, as a cache has them |
"""

from softprompts.injection.continuations import candidate_tree, score_continuations
from softprompts.injection.forward import (
    TrunkOutput,
    can_compute_prefix,
    choose_path,
    compute_prefix,
    prefill,
    run_trunk,
)
from softprompts.injection.hidden_states import LAST_HIDDEN_STATE, check_layers
from softprompts.injection.layout import Layout, add_delta, assemble_embeddings, layout_rows
from softprompts.injection.packed import Prefix, packed_prefix, why_not_packed
from softprompts.injection.packed_attention import Unpackable
from softprompts.injection.placement import place_prompts, prompt_offsets
from softprompts.injection.scoring import MAX_LOGITS, apply_head, score, sequence_scores, span_scores
from softprompts.injection.sites import (
    Site,
    check_site,
    fill_cache,
    inject_at_layers,
    prompt_spec,
    prompt_width,
    resolve_place,
    split_by_layer,
)

__all__ = [
    "LAST_HIDDEN_STATE",
    "MAX_LOGITS",
    "Layout",
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
    "check_site",
    "choose_path",
    "compute_prefix",
    "fill_cache",
    "inject_at_layers",
    "layout_rows",
    "packed_prefix",
    "place_prompts",
    "prefill",
    "prompt_offsets",
    "prompt_spec",
    "prompt_width",
    "resolve_place",
    "run_trunk",
    "score",
    "score_continuations",
    "sequence_scores",
    "span_scores",
    "split_by_layer",
    "why_not_packed",
]
