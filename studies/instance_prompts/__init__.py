"""Prompts that look at the input, and deep prompts, beside prompt tuning: what do they gain, and what do they cost?

IPT (arXiv 2206.01958), IDPG (2204.04497), a reconstruction of SPT (2212.10929), prefix tuning (2101.00190) and P-tuning
(2103.10385), with the same rows, steps and seeds, and rates chosen alike; fine-tuning and LoRA are the upper lines.
"""

from studies.instance_prompts.plan import Study
from studies.instance_prompts.stages import execute

__all__ = ["Study", "execute"]
