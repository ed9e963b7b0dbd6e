"""A stock transformers model with named prompts: the face that Trainer, pipelines and people see."""

from softprompts.model.soft_prompt_model import SoftPromptModel as SoftPromptModel

__all__ = ["SoftPromptModel"]
