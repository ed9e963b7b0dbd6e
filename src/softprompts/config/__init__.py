"""What a user writes: frozen sections with checked values, read from YAML and `--set a.b=c`.

Unknown keys are refused with a suggestion. Nothing here imports torch, so that `--help` is quick.
"""

from softprompts.config.reading import assign, closest, override, parse, read
from softprompts.config.sections import (
    ConfigError,
    DistilConfig,
    EvaluateConfig,
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
    "ConfigError",
    "DistilConfig",
    "EvaluateConfig",
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
    "override",
    "parse",
    "read",
]
