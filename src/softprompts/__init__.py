"""Train, combine and serve soft prompts for frozen transformers."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Names are loaded when first used, so that the command's help does not wait for torch.
_PUBLIC = {
    "SoftPromptModel": "softprompts.model",
    "MultitaskPromptEmbedding": "softprompts.model.peft",
    "MultitaskPromptTuningConfig": "softprompts.model.peft",
    "MultitaskPromptTuningInit": "softprompts.model.peft",
    "PromptEmbedding": "softprompts.model.peft",
    "PromptTuningConfig": "softprompts.model.peft",
    "PromptTuningInit": "softprompts.model.peft",
    "TaskType": "softprompts.model.peft",
    "Artifact": "softprompts.artifacts.artifact",
    "PromptConfig": "softprompts.config",
    "Run": "softprompts.config",
    "TrainConfig": "softprompts.config",
    "train": "softprompts.training.loop",
}

if TYPE_CHECKING:
    from softprompts.artifacts.artifact import Artifact as Artifact
    from softprompts.config import PromptConfig as PromptConfig
    from softprompts.config import Run as Run
    from softprompts.config import TrainConfig as TrainConfig
    from softprompts.model import SoftPromptModel as SoftPromptModel
    from softprompts.model.peft import MultitaskPromptEmbedding as MultitaskPromptEmbedding
    from softprompts.model.peft import MultitaskPromptTuningConfig as MultitaskPromptTuningConfig
    from softprompts.model.peft import MultitaskPromptTuningInit as MultitaskPromptTuningInit
    from softprompts.model.peft import PromptEmbedding as PromptEmbedding
    from softprompts.model.peft import PromptTuningConfig as PromptTuningConfig
    from softprompts.model.peft import PromptTuningInit as PromptTuningInit
    from softprompts.model.peft import TaskType as TaskType
    from softprompts.training.loop import train as train

__all__ = [
    "Artifact",
    "MultitaskPromptEmbedding",
    "MultitaskPromptTuningConfig",
    "MultitaskPromptTuningInit",
    "PromptConfig",
    "PromptEmbedding",
    "PromptTuningConfig",
    "PromptTuningInit",
    "Run",
    "SoftPromptModel",
    "TaskType",
    "TrainConfig",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'softprompts' has no attribute '{name}'")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]
