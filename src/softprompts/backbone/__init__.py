"""The frozen model: families, loading, devices, kernels, quantization."""

from softprompts.backbone.families import CAUSAL, FAMILIES, MASKED, SEQ2SEQ, Family, family_of, head_of
from softprompts.backbone.model import Backbone, fingerprint, freeze, wrap
from softprompts.errors import BackboneError

__all__ = [
    "CAUSAL",
    "FAMILIES",
    "MASKED",
    "SEQ2SEQ",
    "Backbone",
    "BackboneError",
    "Family",
    "family_of",
    "fingerprint",
    "freeze",
    "head_of",
    "wrap",
]
