"""What a user writes: frozen sections with checked values, read from YAML and `--set a.b=c`.

Unknown keys are refused with a suggestion. Nothing here imports torch, so that `--help` is quick.
"""

import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

Kind = Literal["label", "multilabel", "regression", "tagging", "span", "generation"]
Head = Literal["lm", "sequence", "token", "span", "features"]


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says what was given and what is possible."""


class Section(BaseModel):
    """Base of all sections: frozen, and every key must be known."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelConfig(Section):
    """The frozen backbone."""

    name: str = "smollm2-135m"  # packaged model, local directory or hub name
    revision: str | None = None
    head: Head = "lm"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bfloat16 where it is native
    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto: the first accelerator, else cpu
    device_map: Literal["auto"] | dict[str, str | int] | None = None  # instead of device: one for each part
    quantise: Literal["int8", "nf4", "fp4"] | None = None  # the matrices inside the layers; dtype is the rest's
    attention: str | None = None  # packed, packed-fused or transformers' eager, sdpa, ...; None: the fastest, measured
    products: Literal["auto", "torch", "onednn"] = "auto"  # who multiplies matrices on a CPU; auto: the faster
    compiled: bool = False  # norms and MLPs through torch.compile: some seconds once, then faster steps
    checkpointing: bool = False  # compute layers again in the backward pass instead of keeping them: slower, smaller
    threads: int | None = Field(default=None, ge=1)


class InitConfig(Section):
    """Where a prompt starts."""

    kind: Literal["random", "vocabulary", "text", "labels", "artefact", "mean"] = "vocabulary"
    text: str | None = None  # kind text
    labels: tuple[str, ...] | None = None  # kind labels; None takes the task's label words
    path: str | None = None  # kind artefact
    paths: tuple[str, ...] = ()  # kind mean
    weights: tuple[float, ...] | None = None  # kind mean, one for each path; None: all alike
    sources: tuple[str, ...] = ()  # trained prompts that a method mixes, whatever the kind
    population: int | None = Field(default=None, ge=1)  # draw from the n most common tokens only
    distribution: Literal["table", "normal", "uniform"] = "table"  # kind random

    @model_validator(mode="after")
    def _complete(self) -> "InitConfig":
        if self.kind == "text" and not self.text:
            raise ValueError("init kind 'text' needs init.text, the words to start from")
        if self.kind == "artefact" and not self.path:
            raise ValueError("init kind 'artefact' needs init.path, the directory of a trained prompt")
        if self.kind == "mean" and not self.paths:
            raise ValueError("init kind 'mean' needs init.paths, the directories of trained prompts")
        if self.kind == "mean" and self.weights is not None:
            _check_weights(self.weights, len(self.paths))
        return self


def _check_weights(weights: tuple[float, ...], count: int) -> None:
    if len(weights) != count:
        raise ValueError(f"init.weights are {len(weights)} numbers for {count} init.paths; give one for each path")
    if not all(0 <= weight <= 1e9 for weight in weights) or not any(weights):
        shown = ", ".join(f"{weight:g}" for weight in weights)
        raise ValueError(f"init.weights must be numbers from 0 to 1e9, not all 0; given {shown}")


class PromptConfig(Section):
    """What is trained and where it enters."""

    method: str = "prompt-tuning"
    length: int = Field(default=20, ge=1)
    site: Literal["input", "decoder", "layers", "kv"] = "input"
    mode: Literal["replace", "add"] = "replace"  # site layers: overwrite the hidden states or add to them
    place: Literal["auto", "first", "after_start"] = "auto"  # auto: after the first token in encoders, else first
    init: InitConfig = InitConfig()
    options: dict[str, Any] = {}  # the method's own configuration


class SplitConfig(Section):
    """Which rows train, choose and judge. Named splits of the source win over fractions."""

    train: str | None = None  # a split name of the source, or a file
    validation: str | None = None
    test: str | None = None
    validation_fraction: float = Field(default=0.1, ge=0, lt=1)
    test_fraction: float = Field(default=0.1, ge=0, lt=1)
    seed: int = Field(default=0, ge=0)
    shots: int | None = Field(default=None, ge=1)  # rows per class (per set where there are no classes) to train on
    limit: dict[Literal["train", "validation", "test"], int] = {}


class TaskConfig(Section):
    """One task: where its rows are, how a row is put into words, what the answers are called."""

    name: str = ""
    source: str = "trec"  # packaged set, csv/tsv/jsonl/parquet file, dataset directory or hub name
    kind: Kind | None = None  # None: what the packaged set says, else label
    template: str | None = None  # "{text}" with the source's column names; masked models: with {mask}
    pair: str | None = None  # the second text of a pair, for heads: template of the second segment
    label: str = "label"  # column of the label, the answer, the tags or the answer spans
    verbaliser: dict[str, str] | None = None  # label -> answer; None: the packaged one, else the labels themselves
    separator: str = " "  # between template and answer
    max_length: int | None = Field(
        default=None, ge=8
    )  # tokens of a row without the prompt; None: what the model can take
    truncate: tuple[str, ...] | None = None  # columns that may be cut; None: all columns of the template
    chat: bool = False
    chat_place: Literal["start", "user"] = "start"  # chat: prompt before everything, or where the user begins
    system: str | None = None  # chat: system message
    metrics: tuple[str, ...] | None = None
    positive: str | None = None  # the positive label of binary F1
    split: SplitConfig = SplitConfig()

    @property
    def title(self) -> str:
        """What the task is called: its name, else the source without folders and suffix."""
        return self.name or Path(self.source).stem

    @field_validator("name")
    @classmethod
    def _no_folder(cls, name: str) -> str:
        if "/" in name or "\\" in name or name in (".", ".."):
            raise ValueError("a task name becomes a file name, so it holds no slash; give a plain name")
        return name

    @field_validator("verbaliser", mode="before")
    @classmethod
    def _words(cls, words: Any) -> Any:
        # YAML reads 0, 1, yes and no as numbers and truth values; labels in rows are read the same way.
        return {_word(k): _word(v) for k, v in words.items()} if isinstance(words, dict) else words


def _word(value: Any) -> Any:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float) else value


class TrainConfig(Section):
    """How the prompt is trained."""

    steps: int = Field(default=300, ge=0)
    batch_size: int = Field(default=16, ge=1)
    batch_tokens: int | None = Field(
        default=None, ge=1
    )  # most text tokens of a batch; batch_size is then the most rows
    parity: Literal["off", "check"] = "off"  # check: compare the first batch with plain concatenation before training
    accumulate: int = Field(default=1, ge=1)
    optimiser: Literal["adamw", "adafactor"] = "adamw"
    rate: float = Field(default=0.1, gt=0, le=1e9, allow_inf_nan=False)
    rate_unit: Literal["rms", "absolute"] = "rms"  # rms: in units of the embedding table's rms
    head_rate: float = Field(default=1e-3, gt=0, le=1e9, allow_inf_nan=False)  # absolute: for a trained head
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    clip: float | None = Field(default=1.0, gt=0)
    evaluate_every: int | None = Field(default=None, ge=1)  # validation for the best checkpoint and early stopping
    patience: int | None = Field(default=None, ge=1)  # evaluations without a better one before stopping
    checkpoint_every: int = Field(default=50, ge=1)
    objectives: dict[str, float] = {"task": 1.0}
    train: Literal["prompt"] = "prompt"

    @model_validator(mode="after")
    def _patience_needs_evaluations(self) -> "TrainConfig":
        if self.patience is not None and self.evaluate_every is None:
            raise ValueError("patience counts evaluations: set train.evaluate_every too")
        return self


class EvaluateConfig(Section):
    """How answers are judged."""

    by: Literal["auto", "rank", "generate"] = "auto"  # auto: rank where there are label words
    normalise: bool = False  # rank: mean instead of sum of the answer's token log-probabilities
    batch_size: int = Field(default=512, ge=1)  # most rows of a batch
    batch_tokens: int | None = Field(default=None, ge=1)  # most tokens of its texts and answers; None: by the device
    max_new_tokens: int = Field(default=32, ge=1)
    resamples: int = Field(default=1000, ge=100)


class Run(Section):
    """Everything one run needs; `results.json` stores it resolved."""

    model: ModelConfig = ModelConfig()
    prompt: PromptConfig = PromptConfig()
    tasks: tuple[TaskConfig, ...] = Field(default=(TaskConfig(),), min_length=1)
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    out: str = "runs/run"
    seed: int = Field(default=0, ge=0)
    runs: tuple[dict[str, Any], ...] = ()  # runs that train together: each a name, and what it has otherwise

    @model_validator(mode="before")
    @classmethod
    def _one_task(cls, values: Any) -> Any:
        if isinstance(values, dict) and "task" in values:
            if "tasks" in values:
                raise ValueError("give either task or tasks, not both")
            values = {**values, "tasks": [values["task"]]}
            del values["task"]
        return values

    @model_validator(mode="after")
    def _distinct_names(self) -> "Run":
        names = [t.title for t in self.tasks]
        if len(set(names)) != len(names):
            raise ValueError(f"task names must differ, given {', '.join(names)}; set tasks[i].name")
        return self


def closest(word: str, known: Iterable[str]) -> str:
    """What joins a complaint to the list of what is known: `; did you mean 'x'?`, or with nothing close `;`."""
    found = difflib.get_close_matches(word, list(known), 1, 0.5)
    return f"; did you mean '{found[0]}'?" if found else ";"


def parse(values: Mapping[str, Any], model: type[Section] = Run, origin: str = "configuration") -> Any:
    """`values` as a checked section.

    Raises ConfigError that names each wrong key with the closest known one, and each wrong value with what is allowed.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(e, model, origin) for e in error.errors())) from None


def read(path: str | Path, overrides: Iterable[str] = ()) -> Run:
    """The run written in a YAML file, with `a.b=c` overrides applied.

    Raises ConfigError for a file that is missing or is not a YAML mapping, and as `parse` does.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no configuration file {path}") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold `key: value` pairs, found {type(values).__name__}")
    return parse(override(values, overrides), origin=str(path))


def override(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """`values` with each `a.b=c` set; values are read as YAML, numbers in a path index lists (`tasks.0.name=x`)."""
    result = yaml.safe_load(yaml.safe_dump(dict(values)))
    for item in overrides:
        path, equals, text = item.partition("=")
        if not equals or not path.strip():
            raise ConfigError(f"--set {item}: write it as section.key=value, for example train.steps=500")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {item}: the value is not YAML: {' '.join(str(error).split())}") from None
        assign(result, path.strip().split("."), value, f"--set {item}")
    return typing.cast(dict[str, Any], result)


def assign(node: Any, keys: list[str], value: Any, item: str) -> None:
    """Set `value` at the path `keys` of nested values, making sections on the way; `item` is how a message calls it."""
    for here, key in enumerate(keys):
        last = here == len(keys) - 1
        if isinstance(node, list):
            if not key.isdigit() or int(key) >= len(node):
                raise ConfigError(f"{item}: '{key}' is no index of a list of {len(node)}")
            if last:
                node[int(key)] = value
            else:
                node = node[int(key)]
        elif isinstance(node, dict):
            if last:
                node[key] = value
            else:
                node = node.setdefault(key, {})
        else:
            raise ConfigError(f"{item}: '{'.'.join(keys[:here])}' is a value, not a section")


def _explain(error: Any, model: type[BaseModel], origin: str) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        owner = _section_at(model, error["loc"][:-1])
        known = list(owner.model_fields) if owner else []
        key = str(error["loc"][-1])
        return f"{origin}: unknown key '{where}'{closest(key, known)} known: {', '.join(known)}"
    message = error["msg"].removeprefix("Value error, ")
    given = error.get("input")
    shown = "" if isinstance(given, dict | list) or given is None else f" (given: {given!r}{_near(given, error)})"
    return f"{origin}: {where}: {message}{shown}" if where else f"{origin}: {message}"


def _near(given: Any, error: Any) -> str:
    expected = str(error.get("ctx", {}).get("expected", ""))
    options = [part.strip("' ") for part in expected.replace(" or ", ",").split(",")]
    return closest(str(given), options).removesuffix(";") if isinstance(given, str) and expected else ""


def _section_at(model: type[BaseModel], loc: Iterable[Any]) -> type[BaseModel] | None:
    """The section class at a pydantic error location, looking through optionals and tuples."""
    current: Any = model
    for part in loc:
        if isinstance(part, int):
            continue
        current = next(iter(_sections(current.model_fields[part].annotation)), None) if current else None
    return typing.cast("type[BaseModel] | None", current)


def _sections(annotation: Any) -> Iterable[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif typing.get_origin(annotation) in (tuple, list, typing.Union, types.UnionType):
        for part in typing.get_args(annotation):
            yield from _sections(part)
