"""What a user writes: frozen sections with checked values, read from YAML and `--set a.b=c`.

Unknown keys are refused with a suggestion. Nothing here imports torch, so that `--help` is quick.
"""

from softprompts.config.old_keys import find_old_keys, update_old_keys, update_old_options
from softprompts.config.parsing import assign, closest, override, parse, read
from softprompts.config.schema import (
    DistillationConfig,
    EvaluationConfig,
    Head,
    InitConfig,
    Kind,
    LoraConfig,
    ModelConfig,
    PromptConfig,
    Run,
    SamplingConfig,
    Section,
    SplitConfig,
    TaskConfig,
    TrainConfig,
)

__all__ = [
    "DistillationConfig",
    "EvaluationConfig",
    "Head",
    "InitConfig",
    "Kind",
    "LoraConfig",
    "ModelConfig",
    "PromptConfig",
    "Run",
    "SamplingConfig",
    "Section",
    "SplitConfig",
    "TaskConfig",
    "TrainConfig",
    "assign",
    "closest",
    "find_old_keys",
    "override",
    "parse",
    "read",
    "update_old_keys",
    "update_old_options",
]
