"""Where a prompt enters the frozen model; nobody else knows. `forward` gives scores that line up with labels.

A site only fixes the prompt's width D; everything a method or an objective sees is free of prompt positions.

| site    | D                            | what the prompt is                                            |
|---------|------------------------------|---------------------------------------------------------------|
| input   | features                     | vectors in front of the text's embeddings                     |
| decoder | features                     | the same in front of the decoder's input                      |
| layers  | L * H                        | one set per layer; overwrites or is added to hidden states    |
| kv      | sum of 2 * heads * head_dim  | keys and values in front of each layer's own, as a cache has them |
"""

from softprompts.inject.layout import Layout, assemble, layout
from softprompts.inject.read import Reading, prefill, read
from softprompts.inject.score import forward, head, pooled, span_scores
from softprompts.inject.sites import Site, at_layers, by_layer, check_site, fill, resolve_place, slot, width

__all__ = [
    "Layout",
    "Reading",
    "Site",
    "assemble",
    "at_layers",
    "by_layer",
    "check_site",
    "fill",
    "forward",
    "head",
    "layout",
    "pooled",
    "prefill",
    "read",
    "resolve_place",
    "slot",
    "span_scores",
    "width",
]
