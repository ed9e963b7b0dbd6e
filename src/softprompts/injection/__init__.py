"""Where a prompt enters the frozen model; nobody else knows. `forward` gives scores that line up with labels.

A site only fixes the prompt's width D; everything a method or an objective sees is free of prompt positions.

| site    | D                            | what the prompt is                                            |
|---------|------------------------------|---------------------------------------------------------------|
| input   | features                     | vectors before, among or behind the text's                    |
| decoder | features                     | the same in front of the decoder's input                      |
| layers  | L * H                        | one set per layer; overwrites or is added to hidden states    |
| kv      | sum of 2 * heads * head_dim  | keys and values in front of each layer's own, as a cache has them |
"""

from softprompts.injection.continuations import candidate_tree, continuations
from softprompts.injection.forward import TrunkOutput, can_read_prompts, choose_path, prefill, read_prompts, run_trunk
from softprompts.injection.hidden_states import LAST, check_layers
from softprompts.injection.layout import Layout, add_delta, assemble, layout
from softprompts.injection.packed import Prefix, read_prefix, why_not_packed
from softprompts.injection.packed_attention import Unpackable
from softprompts.injection.placement import place_prompts, prompt_offsets
from softprompts.injection.scoring import LOGITS, forward, head, pooled, span_scores
from softprompts.injection.sites import Site, at_layers, by_layer, check_site, fill, prompt_spec, resolve_place, width

__all__ = [
    "LAST",
    "LOGITS",
    "Layout",
    "Prefix",
    "Site",
    "TrunkOutput",
    "Unpackable",
    "add_delta",
    "assemble",
    "at_layers",
    "by_layer",
    "can_read_prompts",
    "candidate_tree",
    "check_layers",
    "check_site",
    "choose_path",
    "continuations",
    "fill",
    "forward",
    "head",
    "layout",
    "place_prompts",
    "pooled",
    "prefill",
    "prompt_offsets",
    "prompt_spec",
    "read_prefix",
    "read_prompts",
    "resolve_place",
    "run_trunk",
    "span_scores",
    "why_not_packed",
    "width",
]
