"""The names on PEFT's pages about prompt tuning and multitask prompt tuning."""

from softprompts.model.peft import MultitaskPromptEmbedding as MultitaskPromptEmbedding
from softprompts.model.peft import MultitaskPromptTuningConfig as MultitaskPromptTuningConfig
from softprompts.model.peft import MultitaskPromptTuningInit as MultitaskPromptTuningInit
from softprompts.model.peft import PeftType as PeftType
from softprompts.model.peft import PromptEmbedding as PromptEmbedding
from softprompts.model.peft import PromptTuningConfig as PromptTuningConfig
from softprompts.model.peft import PromptTuningInit as PromptTuningInit
from softprompts.model.peft import TaskType as TaskType
