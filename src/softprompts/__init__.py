"""Train, combine and use soft prompts for frozen transformers."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Names are loaded when first used, so that the command's help does not wait for torch.
_PUBLIC = {
    "Artifact": "softprompts.artifacts.artifact",
    "MultitaskPromptEmbedding": "softprompts.model.peft.multitask",
    "MultitaskPromptTuningConfig": "softprompts.model.peft.multitask",
    "MultitaskPromptTuningInit": "softprompts.model.peft.multitask",
    "PromptConfig": "softprompts.config",
    "PromptEmbedding": "softprompts.model.peft.prompt_tuning",
    "PromptTuningConfig": "softprompts.model.peft.prompt_tuning",
    "PromptTuningInit": "softprompts.model.peft.prompt_tuning",
    "Run": "softprompts.config",
    "SoftPromptModel": "softprompts.model",
    "SoftPromptsError": "softprompts.errors",
    "TaskConfig": "softprompts.config",
    "TaskTemplate": "softprompts.data",
    "TaskType": "softprompts.model.peft.prompt_tuning",
    "TrainConfig": "softprompts.config",
    "evaluate": "softprompts.evaluation.evaluate",
    "evaluate_prompts": "softprompts.recipes.evaluate_prompts",
    "load_task": "softprompts.data",
    "predict": "softprompts.recipes.predict",
    "pretrain": "softprompts.recipes.pretrain",
    "search_coefficient": "softprompts.recipes.coefficient_search",
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
    from softprompts.model.peft.multitask import MultitaskPromptEmbedding as MultitaskPromptEmbedding
    from softprompts.model.peft.multitask import MultitaskPromptTuningConfig as MultitaskPromptTuningConfig
    from softprompts.model.peft.multitask import MultitaskPromptTuningInit as MultitaskPromptTuningInit
    from softprompts.model.peft.prompt_tuning import PromptEmbedding as PromptEmbedding
    from softprompts.model.peft.prompt_tuning import PromptTuningConfig as PromptTuningConfig
    from softprompts.model.peft.prompt_tuning import PromptTuningInit as PromptTuningInit
    from softprompts.model.peft.prompt_tuning import TaskType as TaskType
    from softprompts.recipes.coefficient_search import search_coefficient as search_coefficient
    from softprompts.recipes.evaluate_prompts import evaluate_prompts as evaluate_prompts
    from softprompts.recipes.predict import predict as predict
    from softprompts.recipes.pretrain import pretrain as pretrain
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
    "evaluate_prompts",
    "load_task",
    "predict",
    "pretrain",
    "search_coefficient",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'softprompts' has no attribute '{name}'")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]
