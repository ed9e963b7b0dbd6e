"""The names on PEFT's pages about prompt tuning and multitask prompt tuning."""

from softprompts.model.peft.multitask import MultitaskPromptEmbedding as MultitaskPromptEmbedding
from softprompts.model.peft.multitask import MultitaskPromptTuningConfig as MultitaskPromptTuningConfig
from softprompts.model.peft.multitask import MultitaskPromptTuningInit as MultitaskPromptTuningInit
from softprompts.model.peft.prompt_tuning import PeftType as PeftType
from softprompts.model.peft.prompt_tuning import PromptEmbedding as PromptEmbedding
from softprompts.model.peft.prompt_tuning import PromptTuningConfig as PromptTuningConfig
from softprompts.model.peft.prompt_tuning import PromptTuningInit as PromptTuningInit
from softprompts.model.peft.prompt_tuning import TaskType as TaskType
