"""What a user writes: sections with checked values, read from YAML and `--set a.b=c`.

Nothing here imports torch, so that `--help` is quick.
"""

from softprompts.config.old_keys import (
    OLD_KEYS,
    find_old_keys,
    original_options,
    update_old_keys,
    update_old_options,
)
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
    "OLD_KEYS",
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
    "original_options",
    "override",
    "parse",
    "read",
    "update_old_keys",
    "update_old_options",
]
