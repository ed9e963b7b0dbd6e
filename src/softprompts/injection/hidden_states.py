"""Hidden states between the layers of the frozen trunk, caught while it runs."""

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor, nn

from softprompts.backbone import SEQ2SEQ, Backbone
from softprompts.errors import BackboneError

LAST_HIDDEN_STATE = -1
"""The number of the states that the head reads, behind the trunk's last norm; layer 1 is the first."""

CapturedStates = dict[tuple[str, int], Tensor]
"""(side, layer) -> the layer's output as the trunk lays it out; side "text", or "target" for a decoder's own."""


def check_layers(backbone: Backbone, layers: Collection[int]) -> None:
    """Raise BackboneError unless the trunk has these layers: -1 or 1 to their number, in a decoder too."""
    inner = [number for number in layers if number != LAST_HIDDEN_STATE]
    if not inner:
        return
    count = min(len(stack) for stack in _stacks(backbone).values())
    for number in inner:
        if not 1 <= number <= count:
            raise BackboneError(
                f"there is no layer {number}; {type(backbone.model).__name__} has layers 1 to {count}, and -1 is what "
                f"the head reads"
            )


@contextlib.contextmanager
def capture(backbone: Backbone, layers: Collection[int]) -> Iterator[CapturedStates]:
    """Inside, the outputs of `layers` are kept, of each the last; -1 is the trunk's own output and not kept here."""
    found: CapturedStates = {}

    def keep(side: str, number: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found[side, number] = output if isinstance(output, Tensor) else output[0]

        return hook

    inner = [number for number in layers if number != LAST_HIDDEN_STATE]
    handles = [
        stack[number - 1].register_forward_hook(keep(side, number))
        for side, stack in (_stacks(backbone).items() if inner else ())
        for number in inner
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _stacks(backbone: Backbone) -> dict[str, nn.ModuleList]:
    if backbone.family is SEQ2SEQ:
        return {"text": backbone.layers, "target": backbone.decoder_layers}
    return {"text": backbone.layers}
