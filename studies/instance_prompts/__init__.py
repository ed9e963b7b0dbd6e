"""Input-dependent and deep prompts compared with prompt tuning: scores, trained numbers and step times.

IPT (arXiv 2206.01958), IDPG (2204.04497), a reconstruction of SPT (2212.10929), prefix tuning (2101.00190) and P-tuning
(2103.10385) train on the same rows with the same steps and seeds, and their learning rates are chosen in the same way.
Fine-tuning and LoRA are the upper lines.
"""

from studies.instance_prompts.plan import Study
from studies.instance_prompts.stages import execute

__all__ = ["Study", "execute"]
