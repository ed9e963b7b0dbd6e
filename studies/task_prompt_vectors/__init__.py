"""The three questions of Belanec et al. 2024 (arXiv 2408.01119) on task prompt vectors, with controls.

Are vectors independent of the start they were trained from? Does the sum of two vectors work on both tasks? Do sums
help a new task with few examples?
"""

from studies.task_prompt_vectors.plan import Study
from studies.task_prompt_vectors.stages import execute

__all__ = ["Study", "execute"]
