"""Where a prompt enters the frozen model; nobody else knows. `forward` gives scores that line up with labels.

A site only fixes the prompt's width D; everything a method or an objective sees is free of prompt positions.

| site    | D                            | what the prompt is                                            |
|---------|------------------------------|---------------------------------------------------------------|
| input   | features                     | vectors before, among or behind the text's                    |
| decoder | features                     | the same in front of the decoder's input                      |
| layers  | L * H                        | one set per layer; overwrites or is added to hidden states    |
| kv      | sum of 2 * heads * head_dim  | keys and values in front of each layer's own, as a cache has them |
"""

from softprompts.injection.continuations import branches, continuations
from softprompts.injection.forward import Reading, can_read_prompts, choose_path, prefill, read, read_prompts
from softprompts.injection.hidden_states import LAST, check_layers
from softprompts.injection.layout import Layout, assemble, layout, with_added
from softprompts.injection.packed import Prefix, read_prefix, why_not_packed
from softprompts.injection.packed_attention import Unpackable
from softprompts.injection.placement import placed, stand
from softprompts.injection.scoring import LOGITS, forward, head, pooled, span_scores
from softprompts.injection.sites import Site, at_layers, by_layer, check_site, fill, resolve_place, slot, width

__all__ = [
    "LAST",
    "LOGITS",
    "Layout",
    "Prefix",
    "Reading",
    "Site",
    "Unpackable",
    "assemble",
    "at_layers",
    "branches",
    "by_layer",
    "can_read_prompts",
    "check_layers",
    "check_site",
    "choose_path",
    "continuations",
    "fill",
    "forward",
    "head",
    "layout",
    "placed",
    "pooled",
    "prefill",
    "read",
    "read_prefix",
    "read_prompts",
    "resolve_place",
    "slot",
    "span_scores",
    "stand",
    "why_not_packed",
    "width",
    "with_added",
]
