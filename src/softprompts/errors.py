"""The errors of the library: each message says what was given, what is possible and what to do."""

from collections.abc import Mapping


class SoftPromptsError(Exception):
    """Base of every error that softprompts raises on purpose."""


class ConfigError(SoftPromptsError, ValueError):
    """A configuration that cannot be used."""


class BackboneError(SoftPromptsError, ValueError):
    """A model that cannot be loaded, or that cannot do what was asked."""


class DataError(SoftPromptsError, ValueError):
    """Rows that cannot be read or turned into examples."""


class AssetError(SoftPromptsError):
    """A packaged model or data set that cannot be provided."""


class PromptError(SoftPromptsError, ValueError):
    """A prompt that cannot be computed from the text that a method got."""


class ArtifactError(SoftPromptsError, ValueError):
    """A file or directory that cannot be read, written or used."""


class WrongBackboneError(ArtifactError):
    """A prompt that was trained for other weights than those it meets."""


class VectorError(ArtifactError):
    """An expression of task vectors that cannot be parsed, or a name in it that is no trained prompt."""


class TrainingError(SoftPromptsError, RuntimeError):
    """Training that cannot continue.

    Args:
        message: What happened, what was saved and what to change.
        failed: The message of each failed run by its name, where other runs of the batch continued.
    """

    def __init__(self, message: str, failed: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.failed = dict(failed or {})
