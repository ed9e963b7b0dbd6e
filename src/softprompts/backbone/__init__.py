"""The frozen model: its family, its facts, the kernels that run it.

`loading`, `devices`, `cache` and `quantization` are separate modules.
"""

from softprompts.backbone.families import CAUSAL, FAMILIES, MASKED, SEQ2SEQ, Family
from softprompts.backbone.kernels import Kernels
from softprompts.backbone.model import Backbone, fingerprint, freeze, wrap

__all__ = [
    "CAUSAL",
    "FAMILIES",
    "MASKED",
    "SEQ2SEQ",
    "Backbone",
    "Family",
    "Kernels",
    "fingerprint",
    "freeze",
    "wrap",
]
