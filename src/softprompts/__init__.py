"""Train, combine and serve soft prompts for frozen transformers."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Names are loaded when first used, so that the command's help does not wait for torch.
_PUBLIC = {
    "Artifact": "softprompts.artifacts.artifact",
    "MultitaskPromptEmbedding": "softprompts.model.peft",
    "MultitaskPromptTuningConfig": "softprompts.model.peft",
    "MultitaskPromptTuningInit": "softprompts.model.peft",
    "PromptConfig": "softprompts.config",
    "PromptEmbedding": "softprompts.model.peft",
    "PromptTuningConfig": "softprompts.model.peft",
    "PromptTuningInit": "softprompts.model.peft",
    "Run": "softprompts.config",
    "SoftPromptModel": "softprompts.model",
    "SoftPromptsError": "softprompts.errors",
    "TaskConfig": "softprompts.config",
    "TaskTemplate": "softprompts.data",
    "TaskType": "softprompts.model.peft",
    "TrainConfig": "softprompts.config",
    "evaluate": "softprompts.evaluation.evaluate",
    "load_task": "softprompts.data",
    "train": "softprompts.training.loop",
}

if TYPE_CHECKING:
    from softprompts.artifacts.artifact import Artifact as Artifact
    from softprompts.config import PromptConfig as PromptConfig
    from softprompts.config import Run as Run
    from softprompts.config import TaskConfig as TaskConfig
    from softprompts.config import TrainConfig as TrainConfig
    from softprompts.data import TaskTemplate as TaskTemplate
    from softprompts.data import load_task as load_task
    from softprompts.errors import SoftPromptsError as SoftPromptsError
    from softprompts.evaluation.evaluate import evaluate as evaluate
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
    "SoftPromptsError",
    "TaskConfig",
    "TaskTemplate",
    "TaskType",
    "TrainConfig",
    "evaluate",
    "load_task",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'softprompts' has no attribute '{name}'")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]
