"""Whether a prompt meets the weights that it was trained on."""

import math

import torch
from torch import Tensor

from softprompts.artifacts.io import to_json
from softprompts.errors import WrongBackboneError
from softprompts.types import Fingerprint

BANDS = {
    "float64": 1e-4,
    "float32": 1e-4,
    "float16": 0.006,
    "bfloat16": 0.044,
    "int8": 0.07,
    "nf4": 0.51,
    "fp4": 0.68,
}
"""The largest `sketch_distance` of the same weights in another dtype, on another device or with other kernels.

Each band is twice the largest distance to float32 that was measured on the default model, on a CPU, with eager and sdpa
attention: float32 7e-7 (1e-4 leaves room for other devices), float16 0.0029, bfloat16 0.0217. Quantized layers were
measured with the rest of the model in float32, float16 and bfloat16: int8 0.0349 (0.0320 without bfloat16), nf4 0.252,
fp4 0.337. One step of fine-tuning that moves every weight by 1e-5 has the distance 0.0047, one by 1e-4 has 0.054. Only
float32 tells such weights apart, and 4 bits notice little more than another model.
"""


def check_fingerprint(saved: Fingerprint | None, current: Fingerprint, allow_other_weights: bool = False) -> list[str]:
    """Compare the weights that a prompt was trained on with those that it meets.

    Args:
        saved: The fingerprint in the artifact; None where PEFT wrote it.
        current: The fingerprint of the model at hand.
        allow_other_weights: Whether sketches outside the band give a warning instead of an error.

    Returns:
        Warnings.

    Raises:
        WrongBackboneError: The architecture differs, or the sketch is outside the band of the coarser dtype of the two.
    """
    if saved is None:
        return ["this prompt has no fingerprint: PEFT's files do not name the weights it was trained on"]
    differences = _differing_facts(saved, current)
    if saved.sketch.shape != current.sketch.shape:
        differences.append(f"sketch {list(saved.sketch.shape)}, here {list(current.sketch.shape)}")
    if differences:
        raise WrongBackboneError(f"this prompt was made for another architecture: {'; '.join(differences)}")
    warnings = []
    if saved.tokenizer and current.tokenizer and saved.tokenizer != current.tokenizer:
        warnings.append("the tokenizer differs from the one this prompt was made with")
    problem = _other_weights(saved, current)
    if problem and not allow_other_weights:
        raise WrongBackboneError(f"{problem}; --allow-other-weights uses it anyway")
    return [*warnings, problem] if problem else warnings


def sketch_distance(saved: Tensor, current: Tensor) -> float:
    """The relative distance of two sketches [32, H]: rms(saved - current) / rms(saved)."""
    difference = rms(saved.double() - current.double())
    size = rms(saved)
    if size:
        return difference / size
    return 0.0 if difference == 0 else math.inf


def tensor_bytes(value: Tensor) -> bytes:
    """The bits of a tensor of any shape and dtype, for digests."""
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def rms(value: Tensor) -> float:
    """Root mean square of a tensor of any shape."""
    return float(value.double().square().mean().sqrt())


def _differing_facts(saved: Fingerprint, current: Fingerprint) -> list[str]:
    """The facts of the architecture that differ.

    Only recorded facts count: a fact that a later version records says nothing against an older prompt.
    """
    current_facts = to_json(current.architecture, "architecture")
    differences = []
    for key, value in to_json(saved.architecture, "architecture").items():
        if key not in current_facts or current_facts[key] != value:
            differences.append(f"{key} {value!r}, here {current_facts.get(key)!r}")
    return differences


def _other_weights(saved: Fingerprint, current: Fingerprint) -> str | None:
    """Why the sketches belong to different weights; None where they may belong to the same."""
    for dtype in (saved.dtype, current.dtype):
        if dtype not in BANDS:
            return f"sketches in {dtype} cannot be compared: bands exist for {', '.join(BANDS)}"
    band = max(BANDS[saved.dtype], BANDS[current.dtype])
    distance = sketch_distance(saved.sketch, current.sketch)
    if distance <= band:  # in this form, NaN is outside the band
        return None
    return (
        f"this prompt was made for other weights: sketch distance {distance:.3g}, allowed {band:g} "
        f"(made in {saved.dtype}, here {current.dtype})"
    )
