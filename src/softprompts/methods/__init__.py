"""The methods: each makes one task's prompt. One file a method; `registry` finds them by name."""

from softprompts.methods.base import MethodConfig, PromptMethod, fold, make_prompts
from softprompts.methods.registry import (
    METHODS,
    build,
    build_tasks,
    check_site,
    find,
    names,
    parse_options,
    sentence_encoders,
)

__all__ = [
    "METHODS",
    "MethodConfig",
    "PromptMethod",
    "build",
    "build_tasks",
    "check_site",
    "find",
    "fold",
    "make_prompts",
    "names",
    "parse_options",
    "sentence_encoders",
]
