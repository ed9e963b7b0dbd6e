"""The sections of a configuration: one class each. The docstring below a key is its help."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Kind = Literal["label", "multilabel", "regression", "tagging", "span", "generation"]
Head = Literal["lm", "sequence", "token", "span", "features"]
LearningRate = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0)]

DISTILLATION_OBJECTIVES = ("distill-logits", "distill-hidden")
"""The objectives that compare with a teacher."""


class Section(BaseModel):
    """Base of all sections: it cannot be changed, and it refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ModelConfig(Section):
    """The frozen backbone."""

    name: str = "smollm2-135m"
    """A packaged model, a local directory or a name on the hub."""

    revision: str | None = None
    """Branch, tag or commit on the hub."""

    head: Head = "lm"
    """What the model ends in: `lm` writes words, the others are classification heads, which are trained."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the weights; `auto`: bfloat16 where the device computes in it, else float32."""

    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1` or `mps`; `auto`: the first accelerator, else the CPU."""

    device_map: Literal["auto"] | dict[str, str | int] | None = None
    """A device for each part of the model, instead of `device`; `auto`: as accelerate spreads it."""

    quantize: Literal["int8", "nf4", "fp4"] | None = None
    """Number format of the matrices inside the layers; all other weights have `dtype`."""

    attention: str | None = None
    """`packed`, `packed-fused` or one of transformers, such as `sdpa`; null: the fastest, measured once."""

    matmul_backend: Literal["auto", "torch", "onednn"] = "auto"
    """The library that multiplies matrices on a CPU; `auto`: the faster one, measured once."""

    torch_compile: bool = False
    """Compile norms and MLPs with torch.compile: some seconds once, then faster steps."""

    gradient_checkpointing: bool = False
    """Compute layers again in the backward pass instead of keeping their states: less memory, more time."""

    threads: Count | None = None
    """Threads of torch on a CPU; null: the number of cores."""


class InitConfig(Section):
    """Where a prompt starts."""

    kind: Literal["random", "zeros", "vocabulary", "text", "labels", "artifact", "mean", "multitask", "vector"] = (
        "vocabulary"
    )
    """Where the start comes from: random numbers, zeros, words, or trained prompts."""

    text: str | None = None
    """Kind `text`: the words to start from."""

    labels: tuple[str, ...] | None = None
    """Kind `labels`: the words to start from; null: the label words of the task."""

    path: str | None = None
    """Kind `artifact`: a trained prompt. Kind `multitask`: the directory with the prompts of the source tasks."""

    paths: tuple[str, ...] = ()
    """Kind `mean`: the trained prompts to average."""

    weights: tuple[Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)], ...] | None = None
    """Kind `mean`: the weight of each path; null: all alike."""

    factors: Literal["average", "task", "ones"] = "average"
    """Kind `multitask`: the factors to start from, those of all sources, those of `task`, or ones."""

    task: str | None = None
    """Kind `multitask` with factors `task`: the source task."""

    sources: tuple[str, ...] = ()
    """Trained prompts that the method mixes, whatever the kind."""

    state: str | None = None
    """A trained prompt of the same method, whose tensors training continues from."""

    vector: str | None = None
    """Kind `vector`: a sum of trained prompts, such as `movies + 0.5*products`."""

    start: "InitConfig | None" = None
    """Kind `vector`: what the sum is added to; null: where all its prompts began."""

    population: Count | None = None
    """Draw from this many of the most common tokens only."""

    distribution: Literal["table", "normal", "uniform"] = "table"
    """Kind `random`: the distribution of the numbers; `table`: that of the word embeddings."""

    seed: Seed | None = None
    """Seed of what is drawn; null: the run's."""

    @model_validator(mode="before")
    @classmethod
    def _sums_are_vectors(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("vector") and "kind" not in values:
            return {**values, "kind": "vector"}
        return values

    @model_validator(mode="after")
    def _check_complete(self) -> "InitConfig":
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
            if len(self.weights) != len(self.paths):
                raise ValueError(
                    f"init.weights are {len(self.weights)} numbers for {len(self.paths)} init.paths; give one for each "
                    f"path"
                )
            if not any(self.weights):
                raise ValueError("init.weights must not all be 0")
        return self


class PromptConfig(Section):
    """What is trained and where it enters."""

    method: str = "prompt-tuning"
    """A method's name, as `softprompts methods` lists them."""

    num_virtual_tokens: Count = 20
    """Tokens of the prompt."""

    site: Literal["input", "decoder", "layers", "kv"] = "input"
    """Where the prompt enters: before the text, before the decoder's text, in every layer, or as keys and values."""

    mode: Literal["replace", "add"] = "replace"
    """Site `layers`: replace the hidden states at the prompt's positions, or add to them."""

    placement: Literal["auto", "first", "after_start", "suffix", "template"] = "auto"
    """Where in the text; `auto`: at `<prompt>` in the template, else after `[CLS]` in encoders, else first."""

    segments: tuple[int, ...] = ()
    """Placement `template` in a SoftPromptModel: prompt tokens of each segment; empty: one segment."""

    init: InitConfig = InitConfig()
    """Where the prompt starts."""

    options: dict[str, Any] = {}
    """Options of the method; `softprompts config METHOD` lists them."""

    @model_validator(mode="after")
    def _check_segments(self) -> "PromptConfig":
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
    """Which rows are for training, validation and test. Named splits of the source win over fractions."""

    train: str | None = None
    """Rows for training: a split of the source, or a file."""

    validation: str | None = None
    """Rows for validation: a split of the source, or a file."""

    test: str | None = None
    """Rows for the test: a split of the source, or a file."""

    validation_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of the training rows that is held back for validation, where no split is for it."""

    test_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of the training rows that is held back for the test, where no split is for it."""

    seed: Seed = 0
    """Seed of all draws of rows."""

    shots: Count | None = None
    """Training rows per class, or in all without classes; null: all rows."""

    shots_per: Literal["class", "set"] = "class"
    """`set`: `shots` counts all training rows, whatever their classes."""

    shots_seed: Seed | None = None
    """Seed of the draw of `shots` alone; null: `seed`."""

    limit: dict[Literal["train", "validation", "test"], Count] = {}
    """Most rows of each split."""


class TaskConfig(Section):
    """One task: where its rows are, how a row becomes text, and what the answers are called."""

    name: str = ""
    """The task's name; empty: the source's, without folders and suffix."""

    source: str = "trec"
    """A packaged set, a csv, tsv, jsonl or parquet file, a directory of a data set, or a name on the hub."""

    kind: Kind | None = None
    """The kind of answer; null: that of the packaged set, else `label`."""

    template: str | None = None
    """The text, with columns in braces, as in `Review: {text}`; `{mask}` and `<prompt>` mark their places."""

    pair: str | None = None
    """Template of the second text of a pair, for classification heads."""

    label: str = "label"
    """Column of the label, the answer, the tags or the answer spans."""

    verbalizer: dict[str, str] | None = None
    """The answer for each label; null: the packaged set's, else the labels themselves."""

    separator: str = " "
    """The text between a row's text and its answer."""

    max_length: int | None = Field(default=None, ge=8)
    """Most tokens of a text, without the prompt; null: as many as the model can take."""

    truncate: tuple[str, ...] | None = None
    """Columns that may be cut; null: all columns of the template."""

    chat: bool = False
    """Put the text into the tokenizer's chat template."""

    chat_placement: Literal["start", "user"] = "start"
    """Chat: the prompt comes before everything, or where the user's words begin."""

    system: str | None = None
    """Chat: the system message, which may have `<prompt>` too."""

    metrics: tuple[str, ...] | None = None
    """The scores; the first one is the headline. null: those that are usual for the kind."""

    positive: str | None = None
    """The positive label of binary F1."""

    split: SplitConfig = SplitConfig()
    """Which rows are for training, validation and test."""

    @property
    def title(self) -> str:
        """What the task is called: its name, else the source without folders and suffix."""
        return self.name or Path(self.source).stem

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if "/" in name or "\\" in name or name in (".", ".."):
            raise ValueError("a task name becomes a file name, so it holds no slash; give a plain name")
        return name

    @field_validator("verbalizer", mode="before")
    @classmethod
    def _read_words(cls, words: Any) -> Any:
        # YAML reads 0, 1, yes and no as numbers and truth values; labels in rows are read the same way.
        return {_word(k): _word(v) for k, v in words.items()} if isinstance(words, dict) else words


def _word(value: Any) -> Any:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float) else value


class SamplingConfig(Section):
    """Which tasks the rows of a batch come from, where a run has several (Wang et al. 2023, section 3.2)."""

    draw: Literal["rows", "all", "some"] = "rows"
    """`rows`: all rows shuffled; `all`: every batch has every task; `some`: a batch draws 2 or more tasks."""

    mixing: Literal["proportional", "capped", "log", "equal"] = "proportional"
    """Draw `some`: how probable a task with n rows is, as n, min(n, cap) or log n, or all alike."""

    cap: Count = 2**18
    """Mixing `capped`: the number of rows from which on tasks are equally probable."""


class DistillationConfig(Section):
    """Teachers for the objectives `distill-logits` and `distill-hidden` (Wang et al. 2023, section 3.1)."""

    teachers: dict[str, str]
    """The directory of a trained prompt for each task."""

    temperature: float = Field(default=1.0, gt=0)
    """Temperature of both softmaxes; the divergence is multiplied by its square."""

    layers: tuple[int, ...] = Field(default=(-1,), min_length=1)
    """The states that are compared: those behind layer 1, 2, ...; -1: what the head reads."""

    cache: str | None = None
    """File in which the teachers' states are kept; null: one in the run's directory."""


class LoraConfig(Section):
    """Low-rank updates of the backbone's matrices (Hu et al. 2021, https://arxiv.org/abs/2106.09685)."""

    rank: Count = 8
    """Rank of an update."""

    alpha: Count = 16
    """An update counts alpha / rank."""

    targets: tuple[str, ...] | str | None = None
    """Names of the modules that get an update, or one pattern; null: PEFT's usual ones, else `all-linear`."""


class TrainConfig(Section):
    """How a prompt is trained, or, where `target` says so, weights of a copy of the backbone."""

    max_steps: int = Field(default=300, ge=0)
    """Training steps."""

    batch_size: Count = 16
    """Rows of a batch."""

    batch_tokens: Count | None = None
    """Most text tokens of a batch; `batch_size` is then the most rows."""

    equivalence: Literal["off", "check"] = "off"
    """`check`: compare the first batch with plain concatenation before training."""

    gradient_accumulation_steps: Count = 1
    """Batches of one step."""

    optimizer: Literal["adamw", "adafactor"] = "adamw"
    """The optimizer."""

    learning_rate: LearningRate = 0.1
    """Learning rate, in the unit of `learning_rate_unit`."""

    learning_rate_unit: Literal["rms", "absolute"] = "rms"
    """`rms`: learning rates of prompts count in rms of the word embeddings; `absolute`: they are plain numbers."""

    head_learning_rate: LearningRate = 1e-3
    """Learning rate of a classification head, a plain number."""

    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "linear"
    """How the learning rate changes after the warmup."""

    warmup_steps: int = Field(default=0, ge=0)
    """Steps in which the learning rate rises from 0."""

    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of the optimizer."""

    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Longer gradients are cut to this norm; null: none is cut."""

    eval_steps: Count | None = None
    """Steps between evaluations on validation rows, which choose the best checkpoint; null: no evaluation."""

    early_stopping_patience: Count | None = None
    """Stop after so many evaluations without a better one; null: never."""

    save_steps: Count = 50
    """Steps between checkpoints."""

    learning_rates: dict[str, LearningRate] = {}
    """Learning rates of the method's parameter groups, by name."""

    sampling: SamplingConfig = SamplingConfig()
    """Which tasks the rows of a batch come from."""

    objectives: dict[str, float] = {"task": 1.0}
    """The weight of each part of the loss, by name."""

    distillation: DistillationConfig | None = None
    """Teachers, for objectives that compare with them."""

    target: Literal["prompt", "backbone", "lora"] = "prompt"
    """What is trained: a prompt, all weights of the backbone, or low-rank updates of them."""

    lora: LoraConfig = LoraConfig()
    """Target `lora`: the updates."""

    save_model: bool = False
    """Target `backbone`: write the trained model too, which takes as much space as the backbone in float32."""

    @model_validator(mode="after")
    def _check_patience(self) -> "TrainConfig":
        if self.early_stopping_patience is not None and self.eval_steps is None:
            raise ValueError("early_stopping_patience counts evaluations: set training.eval_steps too")
        return self

    @model_validator(mode="after")
    def _check_batches(self) -> "TrainConfig":
        if self.sampling.draw != "rows" and self.batch_tokens is not None:
            raise ValueError(
                f"training.batch_tokens cuts shuffled rows into batches, and draw '{self.sampling.draw}' draws tasks "
                f"first; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _check_target(self) -> "TrainConfig":
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
    """How rows are answered and answers scored."""

    by: Literal["auto", "rank", "generate"] = "auto"
    """Rank the label words, or let the model write; `auto`: rank where the task has label words."""

    normalize: bool = False
    """Rank by the mean instead of the sum of the answer's token log-probabilities."""

    batch_size: Count = 512
    """Most rows of a batch."""

    batch_tokens: Count | None = None
    """Most tokens of a batch's texts and answers; null: by the device."""

    max_new_tokens: Count = 32
    """Most tokens of a written answer."""

    resamples: int = Field(default=1000, ge=100)
    """Resamples of the bootstrap behind the 95 % intervals."""


class Run(Section):
    """Everything that one run needs; `results.json` stores it resolved."""

    model: ModelConfig = ModelConfig()
    """The frozen backbone."""

    prompt: PromptConfig = PromptConfig()
    """What is trained and where it enters."""

    tasks: tuple[TaskConfig, ...] = Field(default=(TaskConfig(),), min_length=1)
    """The tasks, which train in the same batches; a single one may be written as `task`."""

    training: TrainConfig = TrainConfig()
    """How it is trained."""

    evaluation: EvaluationConfig = EvaluationConfig()
    """How rows are answered and answers scored."""

    output_dir: str = "runs/run"
    """The directory of the prompt, results.json and report.html."""

    seed: Seed = 0
    """Seed of the start and of the order of rows."""

    runs: tuple[dict[str, Any], ...] = ()
    """Runs that train together: each has a name and the keys in which it differs."""

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
    def _check_tasks(self) -> "Run":
        names = [task.title for task in self.tasks]
        if len(set(names)) != len(names):
            raise ValueError(f"task names must differ, given {', '.join(names)}; set tasks[i].name")
        if self.model.head == "features":
            raise ValueError("head 'features' has nothing to train on; possible: lm, sequence, token, span")
        if self.model.head != "lm" and len(names) > 1:
            raise ValueError("a classification head is trained for one task at a time; use one task, or model.head: lm")
        return self

    @model_validator(mode="after")
    def _check_chat(self) -> "Run":
        for task in self.tasks:
            if self.prompt.site in ("decoder", "kv") and task.chat and task.chat_placement == "user":
                raise ValueError(
                    f"{task.title}: chat_placement is user, but at site '{self.prompt.site}' nothing can come before "
                    f"the prompt; use chat_placement: start, or site input or layers"
                )
        return self

    @model_validator(mode="after")
    def _check_distillation(self) -> "Run":
        training = self.training
        compared = [name for name in DISTILLATION_OBJECTIVES if training.objectives.get(name)]
        if compared and training.distillation is None:
            raise ValueError(
                f"objective '{compared[0]}' compares with teachers; name them in training.distillation.teachers"
            )
        if training.distillation is not None and not compared:
            raise ValueError(
                f"training.distillation names teachers that nothing uses; give one of "
                f"{', '.join(DISTILLATION_OBJECTIVES)} a weight in training.objectives, or leave training.distillation "
                f"out"
            )
        return self

    @model_validator(mode="after")
    def _check_target(self) -> "Run":
        target = self.training.target
        if target != "prompt" and self.model.quantize is not None:
            raise ValueError(
                f"target: {target} changes weights in float32, and model.quantize: {self.model.quantize} rounds them; "
                f"leave quantize out, or train a prompt"
            )
        if target != "prompt" and self.model.device_map is not None:
            raise ValueError(f"target: {target} needs the model on one device; set model.device instead of device_map")
        return self
