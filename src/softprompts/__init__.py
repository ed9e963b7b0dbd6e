"""Train, combine and serve soft prompts for frozen transformers."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Names are loaded when first used, so that the command's help does not wait for torch.
_PUBLIC = {
    "SoftPromptModel": "softprompts.model",
    "MultitaskPromptEmbedding": "softprompts.peft",
    "MultitaskPromptTuningConfig": "softprompts.peft",
    "MultitaskPromptTuningInit": "softprompts.peft",
    "PromptEmbedding": "softprompts.peft",
    "PromptTuningConfig": "softprompts.peft",
    "PromptTuningInit": "softprompts.peft",
    "TaskType": "softprompts.peft",
    "Artefact": "softprompts.artefact",
    "Run": "softprompts.config",
}

if TYPE_CHECKING:
    from softprompts.artefact import Artefact as Artefact
    from softprompts.config import Run as Run
    from softprompts.model import SoftPromptModel as SoftPromptModel
    from softprompts.peft import MultitaskPromptEmbedding as MultitaskPromptEmbedding
    from softprompts.peft import MultitaskPromptTuningConfig as MultitaskPromptTuningConfig
    from softprompts.peft import MultitaskPromptTuningInit as MultitaskPromptTuningInit
    from softprompts.peft import PromptEmbedding as PromptEmbedding
    from softprompts.peft import PromptTuningConfig as PromptTuningConfig
    from softprompts.peft import PromptTuningInit as PromptTuningInit
    from softprompts.peft import TaskType as TaskType

__all__ = [
    "Artefact",
    "MultitaskPromptEmbedding",
    "MultitaskPromptTuningConfig",
    "MultitaskPromptTuningInit",
    "PromptEmbedding",
    "PromptTuningConfig",
    "PromptTuningInit",
    "Run",
    "SoftPromptModel",
    "TaskType",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'softprompts' has no attribute '{name}'")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]
