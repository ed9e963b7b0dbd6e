"""Prompt tuning under PEFT's names: configuration, embedding, and what both share with the multitask kind."""

import enum
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from softprompts.artifacts import artifact
from softprompts.backbone import Backbone
from softprompts.backbone.loading import load_tokenizer
from softprompts.config import InitConfig, PromptConfig, closest
from softprompts.errors import ConfigError
from softprompts.injection import Site
from softprompts.model import initialization
from softprompts.types import PromptInit


class PromptTuningInit(enum.StrEnum):
    """Where a prompt starts."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"
    CLASS_LABELS = "CLASS_LABELS"  # prompt_tuning_init_text: label words, separated by commas
    ARTIFACT = "ARTIFACT"  # prompt_tuning_init_text: the directory of a trained prompt
    RANDOM_NORMAL = "RANDOM_NORMAL"
    RANDOM_UNIFORM = "RANDOM_UNIFORM"


class TaskType(enum.StrEnum):
    """What a model is for; must agree with the model's head."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class PeftType(enum.StrEnum):
    """The kinds of adapter; the other methods of this library are named in `PromptConfig.method`."""

    PROMPT_TUNING = "PROMPT_TUNING"
    MULTITASK_PROMPT_TUNING = "MULTITASK_PROMPT_TUNING"


_FITS = {  # task type -> family (None: any), head; FEATURE_EXTRACTION fits all, PEFT writes it for masked models too
    TaskType.SEQ_CLS: (None, "sequence"),
    TaskType.TOKEN_CLS: (None, "token"),
    TaskType.QUESTION_ANS: (None, "span"),
    TaskType.CAUSAL_LM: ("causal", "lm"),
    TaskType.SEQ_2_SEQ_LM: ("seq2seq", "lm"),
}
_RANDOM = {
    PromptTuningInit.RANDOM: "table",
    PromptTuningInit.RANDOM_NORMAL: "normal",
    PromptTuningInit.RANDOM_UNIFORM: "uniform",
}
_WORDS = (PromptTuningInit.TEXT, PromptTuningInit.CLASS_LABELS)


@dataclass
class PromptTuningConfig:
    """The configuration of a PromptEmbedding, or of a SoftPromptModel with one; fields are PEFT's.

    num_virtual_tokens: rows of the prompt, needed as soon as one is made. token_dim, num_attention_heads, num_layers:
    None asks the model. prompt_tuning_init_text, tokenizer_name_or_path and tokenizer_kwargs belong to TEXT; a
    `trust_remote_code` among the last is never honored. modules_to_save: modules of the head that are trained along,
    a copy a task; None means the whole classification head.
    Raises ConfigError for a value that is not known and for TEXT without words or tokenizer.
    """

    task_type: TaskType | str | None = None
    peft_type: PeftType | str | None = None
    auto_mapping: dict[str, Any] | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    prompt_tuning_init: PromptTuningInit | str = PromptTuningInit.RANDOM
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None
    modules_to_save: list[str] | None = None

    _type: ClassVar[PeftType] = PeftType.PROMPT_TUNING
    _starts: ClassVar[type[enum.StrEnum]] = PromptTuningInit

    def __post_init__(self) -> None:
        if self.task_type is not None:
            self.task_type = known("task_type", self.task_type, TaskType)
        self.peft_type = known("peft_type", self.peft_type or self._type, PeftType)
        if self.peft_type is not self._type:
            raise ConfigError(f"peft_type {self.peft_type.value} is not that of a {type(self).__name__}; leave it out")
        kind = known("prompt_tuning_init", self.prompt_tuning_init, self._starts)
        self.prompt_tuning_init = kind
        if kind == PromptTuningInit.TEXT and not self.tokenizer_name_or_path:
            raise ConfigError(missing(kind, "tokenizer_name_or_path", self.tokenizer_name_or_path))
        if kind in (*_WORDS, PromptTuningInit.ARTIFACT) and not self.prompt_tuning_init_text:
            raise ConfigError(missing(kind, "prompt_tuning_init_text", self.prompt_tuning_init_text))
        if self.tokenizer_kwargs and kind not in _WORDS:
            raise ConfigError("tokenizer_kwargs only valid when using prompt_tuning_init='TEXT'.")
        count = self.num_virtual_tokens
        if count is not None and not positive(count):
            raise ConfigError(f"num_virtual_tokens must be a positive number of prompt tokens, given {count!r}")

    @property
    def length(self) -> int:
        """Number of prompt tokens; raises ConfigError where it was not given."""
        if self.num_virtual_tokens is None:
            raise ConfigError("num_virtual_tokens is missing: give the number of prompt tokens, for example 20")
        return self.num_virtual_tokens

    @property
    def count(self) -> int:
        """Number of tasks."""
        return 1

    def describe(self, backbone: Backbone) -> tuple[PromptConfig, PromptInit | None]:
        """The same in this library's words, and the start [P, D] where PEFT's rules for it are its own (TEXT).

        Raises ConfigError where task_type or token_dim contradict the model.
        """
        family, head = _FITS.get(TaskType(self.task_type), (None, None)) if self.task_type else (None, None)
        if head not in (None, backbone.head) or family not in (None, backbone.family.name):
            raise ConfigError(
                f"task_type {TaskType(str(self.task_type)).value} does not fit {type(backbone.model).__name__}, a "
                f"{backbone.family.name} model with head '{backbone.head}'; leave task_type out or load another class"
            )
        check_width(self.token_dim, backbone.embedding_size)
        return PromptConfig(num_virtual_tokens=self.length, init=self._init()), self._start(backbone)

    def _init(self) -> InitConfig:
        kind, text = self.prompt_tuning_init, self.prompt_tuning_init_text
        if kind == PromptTuningInit.TEXT:
            return InitConfig(kind="text", text=text)
        if kind == PromptTuningInit.CLASS_LABELS:
            return InitConfig(kind="labels", labels=_labels(text))
        if kind == PromptTuningInit.ARTIFACT:
            return InitConfig(kind="artifact", path=text)
        if kind == PromptTuningInit.SAMPLE_VOCAB:
            return InitConfig(kind="vocabulary")
        return InitConfig.model_validate({"kind": "random", "distribution": _RANDOM[PromptTuningInit(kind)]})

    def _start(self, backbone: Backbone) -> PromptInit | None:
        if self.prompt_tuning_init != PromptTuningInit.TEXT or self.inference_mode:
            return None
        return PromptInit(initialization.from_ids(backbone, Site(), _text_ids(self, self.length)))


class PromptEmbedding(nn.Module):
    """The model that encodes virtual tokens into prompt embeddings.

    config: a PromptTuningConfig; word_embeddings: the base model's (its device is taken, its weights only read).
    embedding: nn.Embedding of num_virtual_tokens * num_transformer_submodules rows of token_dim, float32.
    With `inference_mode` neither tokenizer nor artifact is read, as the rows will be loaded.
    Raises ConfigError without num_virtual_tokens and when token_dim is not the width of the word embeddings.
    """

    def __init__(self, config: PromptTuningConfig, word_embeddings: Any) -> None:
        super().__init__()
        rows = config.length * (config.num_transformer_submodules or 1)
        with torch.no_grad():
            start = first_rows(config, word_embeddings, rows).to(word_embeddings.weight.device, torch.float32)
        self.embedding = nn.Embedding(start.shape[0], start.shape[1], _weight=start)

    def forward(self, indices: Tensor) -> Tensor:
        """indices (batch, total_virtual_tokens) -> (batch, total_virtual_tokens, token_dim)."""
        embeddings: Tensor = self.embedding(indices)
        return embeddings


def first_rows(config: PromptTuningConfig, embed: Any, count: int) -> Tensor:
    """The first values [count, token_dim] of a prompt."""
    kind = config.prompt_tuning_init
    device = embed.weight.device
    width = embed(torch.zeros(1, dtype=torch.long, device=device)).shape[-1]
    check_width(config.token_dim, width)
    if config.inference_mode and kind not in _RANDOM:
        kind = PromptTuningInit.RANDOM
    if kind == PromptTuningInit.RANDOM_NORMAL:
        return torch.randn(count, width)
    if kind == PromptTuningInit.RANDOM_UNIFORM:
        return torch.rand(count, width) - 0.5
    if kind == PromptTuningInit.RANDOM:
        return torch.randn(count, width) * _rms(embed)
    if kind == PromptTuningInit.TEXT:
        return _words(embed, _text_ids(config, count))
    if kind == PromptTuningInit.SAMPLE_VOCAB:
        return _words(embed, _sample(embed.weight.shape[0], count))
    if kind == PromptTuningInit.CLASS_LABELS:
        return _label_rows(config, embed, count)
    prompt = artifact.load(str(config.prompt_tuning_init_text)).require_prompt(str(config.prompt_tuning_init_text))
    if tuple(prompt.shape) != (count, width):
        raise ConfigError(
            f"{config.prompt_tuning_init_text} holds a prompt of {list(prompt.shape)}, but {[count, width]} is needed; "
            f"set num_virtual_tokens to match"
        )
    return prompt


def _label_rows(config: PromptTuningConfig, embed: Any, count: int) -> Tensor:
    """Row i is the mean of label i's piece embeddings, the rest are common words (Lester et al. 2021, section 3.2)."""
    labels = _labels(config.prompt_tuning_init_text)
    if len(labels) > count:
        raise ConfigError(f"{len(labels)} labels do not fit into {count} rows; raise num_virtual_tokens")
    if not config.tokenizer_name_or_path:
        raise ConfigError(missing(PromptTuningInit.CLASS_LABELS, "tokenizer_name_or_path", None))
    tokenizer = _tokenizer(config)
    means = [_words(embed, initialization.text_pieces(tokenizer, label)).mean(0, keepdim=True) for label in labels]
    common = _sample(min(initialization.LABEL_POPULATION, embed.weight.shape[0]), count - len(labels))
    return torch.cat([*means, _words(embed, common)])


def _words(embed: Any, ids: Tensor) -> Tensor:
    embeddings: Tensor = embed(ids.to(embed.weight.device)).detach().clone()
    return embeddings.to(torch.float32)


def _sample(population: int, count: int) -> Tensor:
    if count > population:
        raise ConfigError(f"{count} different words are needed, but the model has {population}")
    return torch.randperm(population)[:count]


def _rms(embed: Any) -> float:
    """Root mean square of all word embeddings."""
    parts = torch.arange(embed.weight.shape[0], device=embed.weight.device).split(4096)
    return float(torch.cat([embed(ids).double().square().mean(1) for ids in parts]).mean().sqrt())


def _text_ids(config: PromptTuningConfig, count: int) -> Tensor:
    """PEFT's rule: all ids that the tokenizer gives, its special tokens too, repeated or cut to `count`."""
    return initialization.text_ids(_tokenizer(config), str(config.prompt_tuning_init_text), count, special=True)


def _tokenizer(config: PromptTuningConfig) -> Any:
    options = {k: v for k, v in (config.tokenizer_kwargs or {}).items() if k != "trust_remote_code"}
    return load_tokenizer(str(config.tokenizer_name_or_path), options)


def _labels(text: str | None) -> tuple[str, ...]:
    return tuple(label.strip() for label in (text or "").split(",") if label.strip())


def check_width(token_dim: int | None, width: int) -> None:
    if token_dim is not None and token_dim != width:
        raise ConfigError(
            f"token_dim is {token_dim}, but the word embeddings are {width} wide; leave it out to ask them"
        )


Known = TypeVar("Known", bound=enum.Enum)


def positive(value: Any) -> bool:
    """Whether `value` is a whole number above zero."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def known(field: str, value: Any, kind: type[Known]) -> Known:
    names = [str(member.value) for member in kind]
    try:
        return kind(value)
    except ValueError:
        raise ConfigError(
            f"{field} '{value}' is unknown{closest(str(value), names)} known: {', '.join(names)}"
        ) from None


def missing(kind: enum.StrEnum, field: str, value: Any) -> str:
    return f"When prompt_tuning_init='{kind.value}', {field} can't be {value}."
