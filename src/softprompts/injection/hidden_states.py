"""Hidden states between the layers of the frozen trunk, captured while it runs."""

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor, nn

from softprompts.backbone import SEQ2SEQ, Backbone
from softprompts.errors import BackboneError

LAST_HIDDEN_STATE = -1
"""The number of the states that the head reads, behind the trunk's last norm; layer 1 is the first."""

CapturedStates = dict[tuple[str, int], Tensor]
"""(side, layer) -> the layer's output in the trunk's own layout; side "text", or "target" for the decoder's text."""


def check_layers(backbone: Backbone, layers: Collection[int]) -> None:
    """Raise BackboneError unless the trunk has these layers: -1 or 1 to their number, in a decoder too."""
    inner_layers = [layer for layer in layers if layer != LAST_HIDDEN_STATE]
    if not inner_layers:
        return
    count = min(len(stack) for stack in _layer_stacks(backbone).values())
    for layer in inner_layers:
        if not 1 <= layer <= count:
            raise BackboneError(
                f"no layer {layer}; {type(backbone.model).__name__} has layers 1 to {count}, and -1 is what "
                f"the head reads"
            )


@contextlib.contextmanager
def capture(backbone: Backbone, layers: Collection[int]) -> Iterator[CapturedStates]:
    """Inside, the latest outputs of `layers` are recorded; -1, the trunk's own output, is not recorded here."""
    captured: CapturedStates = {}

    def hook_of(side: str, layer: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            captured[side, layer] = output if isinstance(output, Tensor) else output[0]

        return hook

    handles = []
    inner_layers = [layer for layer in layers if layer != LAST_HIDDEN_STATE]
    if inner_layers:  # a model without a stack of layers is fine where none is asked for
        for side, stack in _layer_stacks(backbone).items():
            for layer in inner_layers:
                handles.append(stack[layer - 1].register_forward_hook(hook_of(side, layer)))
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


def _layer_stacks(backbone: Backbone) -> dict[str, nn.ModuleList]:
    if backbone.family is SEQ2SEQ:
        return {"text": backbone.layers, "target": backbone.decoder_layers}
    return {"text": backbone.layers}
