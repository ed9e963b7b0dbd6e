"""How far two results of one formula may lie apart: a number of roundings of their dtype, for numbers of their size.

Kernels add up in an order that depends on the CPU, so a limit that holds on one machine by an absolute number fails on
another by one unit in the last place. A limit in roundings holds on all of them, and for numbers of any size.
"""

import torch
from torch import Tensor

ROUNDINGS = 32
"""Units in the last place of the largest number; scores of a tiny model differ by about 10 from CPU to CPU."""

GRADIENT_ROUNDINGS = 256
"""The same for gradients, which pass every layer twice: 3e-5 of the largest number in float32."""


def tolerance(expected: Tensor | float, roundings: float = ROUNDINGS, size: float | None = None) -> float:
    """The largest difference that rounding explains.

    Args:
        expected: The expected numbers; a Python number counts as float32, the dtype of the models in tests.
        roundings: How many units in the last place the results may lie apart.
        size: The size of the numbers that were added up, where they cancel; the largest of `expected` by default.

    Returns:
        An absolute tolerance for every element.
    """
    dtype = expected.dtype if isinstance(expected, Tensor) else torch.float32
    if size is None:
        numbers = expected.detach() if isinstance(expected, Tensor) else torch.tensor([expected])
        size = float(numbers.abs().max()) if numbers.numel() else 0.0
    return roundings * torch.finfo(dtype).eps * size


def assert_close(found: Tensor, expected: Tensor, roundings: float = ROUNDINGS, size: float | None = None) -> None:
    """Raise AssertionError where `found` differs from `expected` by more than rounding; see `tolerance`."""
    torch.testing.assert_close(found, expected, atol=tolerance(expected, roundings, size), rtol=0)
