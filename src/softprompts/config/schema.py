"""The sections: one class each, every key with its meaning beside its default."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Kind = Literal["label", "multilabel", "regression", "tagging", "span", "generation"]
Head = Literal["lm", "sequence", "token", "span", "features"]


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
    quantize: Literal["int8", "nf4", "fp4"] | None = None  # the matrices inside the layers; dtype is the rest's
    attention: str | None = None  # packed, packed-fused or transformers' eager, sdpa, ...; None: the fastest, measured
    matmul_backend: Literal["auto", "torch", "onednn"] = "auto"  # who multiplies matrices on a CPU; auto: the faster
    torch_compile: bool = False  # norms and MLPs through torch.compile: some seconds once, then faster steps
    gradient_checkpointing: bool = (
        False  # compute layers again in the backward pass instead of keeping them: slower, smaller
    )
    threads: int | None = Field(default=None, ge=1)


class InitConfig(Section):
    """Where a prompt starts."""

    kind: Literal["random", "zeros", "vocabulary", "text", "labels", "artifact", "mean", "multitask", "vector"] = (
        "vocabulary"
    )
    text: str | None = None  # kind text
    labels: tuple[str, ...] | None = None  # kind labels; None takes the task's label words
    path: str | None = None  # kind artifact; kind multitask: the directory with the prompts of the source tasks
    paths: tuple[str, ...] = ()  # kind mean
    weights: tuple[float, ...] | None = None  # kind mean, one for each path; None: all alike
    factors: Literal["average", "task", "ones"] = "average"  # kind multitask: of all sources, of init.task, or one
    task: str | None = None  # kind multitask with factors `task`: the source task
    sources: tuple[str, ...] = ()  # trained prompts that a method mixes, whatever the kind
    state: str | None = None  # a trained prompt of the same method, whose tensors training goes on from
    vector: str | None = None  # kind vector: a sum of trained prompts, such as movies + 0.5*products
    start: "InitConfig | None" = None  # kind vector: what the sum is added to; None: where all its prompts began
    population: int | None = Field(default=None, ge=1)  # draw from the n most common tokens only
    distribution: Literal["table", "normal", "uniform"] = "table"  # kind random
    seed: int | None = Field(default=None, ge=0)  # of what is drawn; None: the run's

    @model_validator(mode="before")
    @classmethod
    def _sums_are_vectors(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("vector") and "kind" not in values:
            return {**values, "kind": "vector"}
        return values

    @model_validator(mode="after")
    def _complete(self) -> "InitConfig":
        if self.kind == "text" and not self.text:
            raise ValueError("init kind 'text' needs init.text, the words to start from")
        if self.kind in ("artifact", "multitask") and not self.path:
            raise ValueError(f"init kind '{self.kind}' needs init.path, the directory of a trained prompt")
        if self.kind == "multitask" and self.factors == "task" and not self.task:
            raise ValueError("init.factors 'task' needs init.task, the source task whose factors to start from")
        if self.kind == "mean" and not self.paths:
            raise ValueError("init kind 'mean' needs init.paths, the directories of trained prompts")
        if self.kind == "vector" and not self.vector:
            raise ValueError("init kind 'vector' needs init.vector, a sum such as movies + 0.5*products")
        for key in ("vector", "start"):
            if getattr(self, key) is not None and self.kind != "vector":
                raise ValueError(f"init.{key} is for kind vector, not {self.kind}; leave one of them out")
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
    num_virtual_tokens: int = Field(default=20, ge=1)
    site: Literal["input", "decoder", "layers", "kv"] = "input"
    mode: Literal["replace", "add"] = "replace"  # site layers: overwrite the hidden states or add to them
    # auto: where the template has <prompt>, else after the first token in encoders, else first
    placement: Literal["auto", "first", "after_start", "suffix", "template"] = "auto"
    segments: tuple[int, ...] = ()  # place template in a SoftPromptModel: prompt tokens of each segment; (): one
    init: InitConfig = InitConfig()
    options: dict[str, Any] = {}  # the method's own configuration

    @model_validator(mode="after")
    def _segments_are_the_prompt(self) -> "PromptConfig":
        if self.segments and self.placement != "template":
            raise ValueError(f"prompt.segments is for placement template, not {self.placement}; leave one of them out")
        shown = " + ".join(map(str, self.segments))
        if self.segments and (min(self.segments) < 1 or sum(self.segments) != self.num_virtual_tokens):
            raise ValueError(
                f"prompt.segments {shown} must each be at least 1 and sum to prompt.num_virtual_tokens, which is "
                f"{self.num_virtual_tokens}"
            )
        return self


class SplitConfig(Section):
    """Which rows train, choose and judge. Named splits of the source win over fractions."""

    train: str | None = None  # a split name of the source, or a file
    validation: str | None = None
    test: str | None = None
    validation_fraction: float = Field(default=0.1, ge=0, lt=1)
    test_fraction: float = Field(default=0.1, ge=0, lt=1)
    seed: int = Field(default=0, ge=0)
    shots: int | None = Field(default=None, ge=1)  # rows per class (or in all, where there are none) to train on
    shots_per: Literal["class", "set"] = "class"  # set: so many rows in all, whatever their classes
    shots_seed: int | None = Field(default=None, ge=0)  # of the draw of shots alone; None: seed
    limit: dict[Literal["train", "validation", "test"], int] = {}


class TaskConfig(Section):
    """One task: where its rows are, how a row is put into words, what the answers are called."""

    name: str = ""
    source: str = "trec"  # packaged set, csv/tsv/jsonl/parquet file, dataset directory or hub name
    kind: Kind | None = None  # None: what the packaged set says, else label
    # "{text}" with the source's column names; masked models: with {mask}; <prompt> or <prompt:10>: where it stands
    template: str | None = None
    pair: str | None = None  # the second text of a pair, for heads: template of the second segment
    label: str = "label"  # column of the label, the answer, the tags or the answer spans
    verbalizer: dict[str, str] | None = None  # label -> answer; None: the packaged one, else the labels themselves
    separator: str = " "  # between template and answer
    max_length: int | None = Field(
        default=None, ge=8
    )  # tokens of a row without the prompt; None: what the model can take
    truncate: tuple[str, ...] | None = None  # columns that may be cut; None: all columns of the template
    chat: bool = False
    chat_placement: Literal["start", "user"] = "start"  # chat: prompt before everything, or where the user begins
    system: str | None = None  # chat: system message; may have <prompt> too
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

    @field_validator("verbalizer", mode="before")
    @classmethod
    def _words(cls, words: Any) -> Any:
        # YAML reads 0, 1, yes and no as numbers and truth values; labels in rows are read the same way.
        return {_word(k): _word(v) for k, v in words.items()} if isinstance(words, dict) else words


def _word(value: Any) -> Any:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float) else value


class SamplingConfig(Section):
    """Which tasks the rows of a batch come from, where a run has several.

    draw: `rows`, all rows shuffled; `all`, every batch has every task; `some`, each batch draws how many, uniformly
    from 2 to all, then which, and splits itself evenly among them (Wang et al. 2023, section 3.2).
    mixing: how probable a task with n rows is, for draw `some`: as n, min(n, cap) or log n, or all alike.
    """

    draw: Literal["rows", "all", "some"] = "rows"
    mixing: Literal["proportional", "capped", "log", "equal"] = "proportional"
    cap: int = Field(default=2**18, ge=1)


class DistillationConfig(Section):
    """Teachers for the objectives `distil-logits` and `distil-hidden` (Wang et al. 2023, section 3.1)."""

    teachers: dict[str, str]  # task -> directory of its trained prompt
    temperature: float = Field(default=1.0, gt=0)  # of both softmaxes; the divergence is multiplied by its square
    layers: tuple[int, ...] = Field(
        default=(-1,), min_length=1
    )  # states after layer 1, 2, ...; -1: what the head reads
    cache: str | None = None  # where the teachers' states are kept; None: in the run's directory


class LoraConfig(Section):
    """Low-rank updates of the backbone's matrices (Hu et al. 2021, https://arxiv.org/abs/2106.09685)."""

    rank: int = Field(default=8, ge=1)
    alpha: int = Field(default=16, ge=1)  # an update counts alpha / rank
    targets: tuple[str, ...] | str | None = (
        None  # module names, or one pattern; None: PEFT's usual ones, else all-linear
    )


class TrainConfig(Section):
    """How the prompt is trained; or, where `train` says so, the weights of a copy of the backbone."""

    max_steps: int = Field(default=300, ge=0)
    batch_size: int = Field(default=16, ge=1)
    batch_tokens: int | None = Field(
        default=None, ge=1
    )  # most text tokens of a batch; batch_size is then the most rows
    equivalence: Literal["off", "check"] = (
        "off"  # check: compare the first batch with plain concatenation before training
    )
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    learning_rate: float = Field(default=0.1, gt=0, le=1e9, allow_inf_nan=False)
    learning_rate_unit: Literal["rms", "absolute"] = "rms"  # rms: in units of the embedding table's rms
    head_learning_rate: float = Field(default=1e-3, gt=0, le=1e9, allow_inf_nan=False)  # absolute: for a trained head
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "linear"
    warmup_steps: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    eval_steps: int | None = Field(default=None, ge=1)  # validation for the best checkpoint and early stopping
    early_stopping_patience: int | None = Field(default=None, ge=1)  # evaluations without a better one before stopping
    save_steps: int = Field(default=50, ge=1)
    learning_rates: dict[
        str, float
    ] = {}  # of the method's groups of parameters; others learn at `rate`, or at the group's own
    sampling: SamplingConfig = SamplingConfig()
    objectives: dict[str, float] = {"task": 1.0}
    distillation: DistillationConfig | None = None
    target: Literal["prompt", "backbone", "lora"] = "prompt"  # backbone: all weights, lora: updates; without a prompt
    lora: LoraConfig = LoraConfig()
    save_model: bool = False  # train backbone: write the trained model too, as large as the backbone is in float32

    @field_validator("learning_rates")
    @classmethod
    def _positive(cls, rates: dict[str, float]) -> dict[str, float]:
        for name, rate in rates.items():
            if not 0 < rate <= 1e9:
                raise ValueError(f"the rate of '{name}' must be above 0 and finite, given {rate}")
        return rates

    @model_validator(mode="after")
    def _patience_needs_evaluations(self) -> "TrainConfig":
        if self.early_stopping_patience is not None and self.eval_steps is None:
            raise ValueError("early_stopping_patience counts evaluations: set training.eval_steps too")
        return self

    @model_validator(mode="after")
    def _weights_are_no_prompt(self) -> "TrainConfig":
        if self.save_model and self.target != "backbone":
            raise ValueError("save_model is for target: backbone; a prompt and LoRA's adapter are always saved")
        if self.target == "prompt":
            return self
        if self.learning_rate_unit != "absolute" or "learning_rate" not in self.model_fields_set:
            raise ValueError(
                f"target: {self.target} needs a learning rate in plain numbers, as rms is the unit of a prompt: set "
                f"training.learning_rate and training.learning_rate_unit: absolute; a common rate is "
                f"{'2e-5' if self.target == 'backbone' else '2e-4'}"
            )
        if self.optimizer != "adamw":
            raise ValueError(f"target: {self.target} is trained with training.optimizer: adamw, not {self.optimizer}")
        if set(self.objectives) != {"task"}:
            raise ValueError(f"target: {self.target} has the objective task alone, given {', '.join(self.objectives)}")
        if self.equivalence != "off":
            raise ValueError(
                f"equivalence compares how prompts are computed, and target: {self.target} has none; leave it off"
            )
        return self


class EvaluationConfig(Section):
    """How answers are judged."""

    by: Literal["auto", "rank", "generate"] = "auto"  # auto: rank where there are label words
    normalize: bool = False  # rank: mean instead of sum of the answer's token log-probabilities
    batch_size: int = Field(default=512, ge=1)  # most rows of a batch
    batch_tokens: int | None = Field(default=None, ge=1)  # most tokens of its texts and answers; None: by the device
    max_new_tokens: int = Field(default=32, ge=1)
    resamples: int = Field(default=1000, ge=100)


class Run(Section):
    """Everything one run needs; `results.json` stores it resolved."""

    model: ModelConfig = ModelConfig()
    prompt: PromptConfig = PromptConfig()
    tasks: tuple[TaskConfig, ...] = Field(default=(TaskConfig(),), min_length=1)
    training: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    output_dir: str = "runs/run"
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

    @model_validator(mode="after")
    def _weights_are_plain(self) -> "Run":
        kind = self.training.target
        if kind != "prompt" and self.model.quantize is not None:
            raise ValueError(
                f"target: {kind} changes weights in float32, and model.quantize: {self.model.quantize} rounds them; "
                f"leave quantize out, or train a prompt"
            )
        if kind != "prompt" and self.model.device_map is not None:
            raise ValueError(f"target: {kind} needs the model on one device; set model.device instead of device_map")
        return self
