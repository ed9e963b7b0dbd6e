"""Whether a prompt meets the weights it was made for."""

import math

from torch import Tensor

from softprompts.artifacts.io import plain
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
"""Largest `sketch_distance` that the same weights are taken to reach in another dtype, on another device or kernel.

Twice the largest distance measured on the default model against float32, on a CPU with eager and sdpa attention:
float32 7e-7 (1e-4 leaves room for other devices), float16 0.0029, bfloat16 0.0217; quantized by quantize.py, with the
rest of the model in float32, float16 and bfloat16, int8 0.0349 (0.0320 but for bfloat16), nf4 0.252, fp4 0.337. One
step of fine-tuning that moves every weight by 1e-5 is at 0.0047, by 1e-4 at 0.054: only float32 tells such weights
apart, and in 4 bits little more than another model is noticed.
"""


def check_fingerprint(saved: Fingerprint | None, current: Fingerprint, allow_other_weights: bool = False) -> list[str]:
    """Compares the weights a prompt was made for with those it meets, and returns warnings.

    Raises WrongBackboneError where the architecture differs, and, unless `allow_other_weights`, where the sketch lies
    outside the band of the coarser dtype of the two.
    """
    if saved is None:
        return ["nothing ties this prompt to weights: PEFT's files do not say which it was made for"]
    here = plain(current.architecture, "architecture")
    # only what was recorded can differ: a fact that a later version adds says nothing against an old prompt
    differing = [
        f"{key} {value!r}, here {here.get(key)!r}"
        for key, value in plain(saved.architecture, "architecture").items()
        if key not in here or here[key] != value
    ]
    if saved.sketch.shape != current.sketch.shape:
        differing.append(f"sketch {list(saved.sketch.shape)}, here {list(current.sketch.shape)}")
    if differing:
        raise WrongBackboneError(f"this prompt was made for another architecture: {'; '.join(differing)}")
    warnings = []
    if saved.tokenizer and current.tokenizer and saved.tokenizer != current.tokenizer:
        warnings.append("the tokenizer differs from the one this prompt was made with")
    problem = _outside(saved, current)
    if problem and not allow_other_weights:
        raise WrongBackboneError(f"{problem}; --allow-other-weights uses it all the same")
    return [*warnings, problem] if problem else warnings


def sketch_distance(saved: Tensor, current: Tensor) -> float:
    """The relative distance of two sketches [32, H]: rms(saved - current) / rms(saved)."""
    moved, size = rms(saved.double() - current.double()), rms(saved)
    return moved / size if size else (0.0 if moved == 0 else math.inf)


def rms(value: Tensor) -> float:
    """Root mean square of a tensor of any shape."""
    return float(value.double().square().mean().sqrt())


def _outside(saved: Fingerprint, current: Fingerprint) -> str | None:
    """Why the sketches say that these are other weights; None where they do not."""
    unknown = [dtype for dtype in (saved.dtype, current.dtype) if dtype not in BANDS]
    if unknown:
        return f"sketches in {unknown[0]} cannot be compared: there are bands for {', '.join(BANDS)}"
    band = max(BANDS[saved.dtype], BANDS[current.dtype])
    distance = sketch_distance(saved.sketch, current.sketch)
    if distance <= band:  # this way round, so that NaN is outside
        return None
    return (
        f"this prompt was made for other weights: sketch distance {distance:.3g}, allowed {band:g} "
        f"(made in {saved.dtype}, here {current.dtype})"
    )
