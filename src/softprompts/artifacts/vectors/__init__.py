"""Task prompt vectors (Belanec, Ostermann, Srba, Bielikova 2024, arXiv 2408.01119): arithmetic on trained prompts.

A task's vector is what training added: its prompt minus the prompt it began with. Every artifact holds both, so any two
of one backbone, length and site can be combined. Sums are kept as sums and computed once, in float64 and in the order
of the parents' hashes: no result depends on the order of arguments, and what cancels is exactly zero.
"""

from softprompts.artifacts.vectors.expression import locate, read, terms, weigh
from softprompts.artifacts.vectors.measures import COSINES, compare, cosine, cosines, distances, norm, norm_ratio
from softprompts.artifacts.vectors.merging import MERGES, Merge, average, dare, merge, slerp, ties, weighted
from softprompts.artifacts.vectors.vector import Part, Vector, apply, common_start, fits, made, vector

__all__ = [
    "COSINES",
    "MERGES",
    "Merge",
    "Part",
    "Vector",
    "apply",
    "average",
    "common_start",
    "compare",
    "cosine",
    "cosines",
    "dare",
    "distances",
    "fits",
    "locate",
    "made",
    "merge",
    "norm",
    "norm_ratio",
    "read",
    "slerp",
    "terms",
    "ties",
    "vector",
    "weigh",
    "weighted",
]
