"""Task prompt vectors (Belanec, Ostermann, Srba, Bielikova 2024, arXiv 2408.01119): arithmetic on trained prompts.

A task's vector is its trained prompt minus the prompt from which training began. Every artifact holds both, so any two
prompts of one backbone, length and site can be combined. A sum keeps its summands and is computed once, in float64, in
the order of the parents' hashes. No result depends on the order of arguments, and what cancels is exactly zero.
"""

from softprompts.artifacts.vectors.expression import (
    evaluate_expression,
    locate_prompt,
    parse_expression,
    read_expression,
)
from softprompts.artifacts.vectors.measures import COSINES, compare, cosine, cosines, distances, norm, norm_ratio
from softprompts.artifacts.vectors.merging import MERGES, MergeOptions, average, dare, merge, slerp, ties, weighted
from softprompts.artifacts.vectors.vector import (
    Vector,
    apply,
    check_start,
    common_start,
    require_common_start,
    task_vector,
    to_artifact,
)

__all__ = [
    "COSINES",
    "MERGES",
    "MergeOptions",
    "Vector",
    "apply",
    "average",
    "check_start",
    "common_start",
    "compare",
    "cosine",
    "cosines",
    "dare",
    "distances",
    "evaluate_expression",
    "locate_prompt",
    "merge",
    "norm",
    "norm_ratio",
    "parse_expression",
    "read_expression",
    "require_common_start",
    "slerp",
    "task_vector",
    "ties",
    "to_artifact",
    "weighted",
]
