"""The vocabulary of the library: what goes in, what comes out, what a method must fill.

Shapes use one alphabet everywhere: B rows, T text tokens, S target tokens, P prompt tokens, U distinct prompts,
H hidden, D site width, L layers, V vocabulary, C classes, N scored positions.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

Row = dict[str, Any]
"""One row of a data set: column name to value."""

IGNORE = -100
"""The label of a position that is not scored, as in transformers and torch."""

START = "start"
"""The last part of the names of buffers that hold where a network begins, to which it adds."""

SOURCES = "sources"
"""The buffer in which a method keeps `Start.sources`, so that its artifacts hold all that it needs."""


@dataclass(frozen=True)
class PromptSpec:
    """What a method must fill: one prompt of `[length, width]`.

    Attributes:
        length: P, the number of prompt tokens.
        width: D, the numbers of a prompt token at the site.
        embedding_size: H, the width of the backbone's input embeddings, which a method that reads the text sees.
        vocab_size: The number of the backbone's token ids.
        layers: The widths of each layer's part of a prompt that has one for every layer (sites layers and kv); they
            sum to `width`.
        encoders: The widths of the vectors that frozen encoders make of whole texts, by the encoder's name:
            "backbone", and the encoders that the method asks for.
        pool: Which of the backbone's states of a text usually represents all of it, as `pool_states` takes it.
    """

    length: int
    width: int
    embedding_size: int
    vocab_size: int = 0
    layers: tuple[int, ...] = ()
    encoders: Mapping[str, int] = field(default_factory=dict)
    pool: str = "mean"


@dataclass(frozen=True)
class PromptInit:
    """Where training begins: `prompt [P, D]` and, for methods that mix other artifacts, `sources [S, P, D]`.

    factors: of a multitask prompt that was trained before, columns [P, r] and rows [r, D], for every task; state:
    tensors of the same method that was trained before, under its own names, for every task. draw: `draw(count,
    population)` gives `count` different words' embeddings, [count, H], drawn by the run's seed from the `population`
    most common words (None: from all), for methods that keep some; None where a trained method is built again. parents:
    digests of the artifacts that it was made from.
    """

    prompt: Tensor
    sources: Tensor | None = None
    factors: tuple[Tensor, Tensor] | None = None
    state: Mapping[str, Tensor] | None = None
    draw: Callable[[int, int | None], Tensor] | None = None
    parents: tuple[str, ...] = ()


@dataclass(frozen=True)
class ParamGroup:
    """Parameters of a method that learn at a separate rate: those whose names begin with one of `parameters`.

    unit: "rms", the rate counts in rms of the word embeddings, as that of prompts does; "one", a plain number, which is
    right for factors around one and for weights. rate: what it is unless `training.learning_rates` says otherwise;
    None: the run's. decay: whether `training.weight_decay` counts: it would shrink rows of a table in every step, used
    or not.
    """

    parameters: tuple[str, ...]
    unit: Literal["rms", "one"] = "rms"
    rate: float | None = None
    decay: bool = True


@dataclass(frozen=True)
class Batch:
    """One batch of rows, padded on either side.

    Attributes:
        input_ids: Token ids, [B, T]; of encoder-decoder models the encoder's.
        attention_mask: 1 for text, 0 for padding, [B, T].
        task_ids: Which of the model's prompts each row reads, [B].
        labels: Language models [B, T] (encoder-decoder: [B, S]), token heads [B, T], classes [B], values [B],
            multi-label [B, C] (float), spans [B, 2]; `IGNORE` marks what is not scored.
        token_type_ids: Token types of text pairs, for encoders that have them, [B, T].
        inputs_embeds: Embeddings that replace those of `input_ids`, [B, T, H].
        prompt_offsets: How many text tokens precede the prompt, [B], or each of its G segments, [B, G], never falling;
            None: as the site says.
        segment_lengths: How many prompt tokens each segment has, 0 behind a row's last, [B, G]; None: as the site says.
        position_ids: Positions of the text that the caller gives, counted without the prompt, [B, T].
        decoder_input_ids: What the decoder reads, [B, S]; None: the labels shifted by one.
        decoder_attention_mask: 1 for tokens, 0 for padding of `decoder_input_ids`, [B, S].
        instruction_mask: 1 for instructions that a person wrote, such as a template's own words, [B, T]; None: not
            known.
    """

    input_ids: Tensor
    attention_mask: Tensor
    task_ids: Tensor
    labels: Tensor | None = None
    token_type_ids: Tensor | None = None
    inputs_embeds: Tensor | None = None
    prompt_offsets: Tensor | None = None
    segment_lengths: Tensor | None = None
    position_ids: Tensor | None = None
    decoder_input_ids: Tensor | None = None
    decoder_attention_mask: Tensor | None = None
    instruction_mask: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`."""
        return replace(self, **{name: tensor.to(device) for name, tensor in self._tensors()})

    def rows(self, index: Tensor) -> "Batch":
        """The rows named by `index [R]`, in that order."""
        return replace(self, **{name: tensor[index] for name, tensor in self._tensors()})

    def _tensors(self) -> list[tuple[str, Tensor]]:
        return [(name, value) for name, value in vars(self).items() if isinstance(value, Tensor)]


def _no_encoder(name: str) -> Tensor:
    raise ValueError(f"no encoder '{name}' of whole texts is available")


@dataclass(frozen=True)
class Context:
    """What a method may look at: the rows of one task. None of the tensors has a gradient.

    Attributes:
        input_ids: Token ids, [B, T].
        inputs_embeds: Their embeddings, [B, T, H].
        attention_mask: 1 for what the prompt may be made from, [B, T]; see `mask_before_labels`.
        encode: Gives the frozen backbone's last hidden states of the text without a prompt, [B, T, H].
        sentence_embedding: Gives the vectors [B, E] of whole texts by the name of a frozen encoder: one of
            `PromptSpec.encoders`; the backbone's name says how its states are pooled ("backbone-last"). Each text is
            read alone, by what `attention_mask` leaves of it, and its vector is kept.
        instruction_mask: 1 for a template's own words, [B, T]; None where nobody said which these are.
        batch_mask: `attention_mask` of the whole batch, of which this holds the rows of one task; None: it holds all.
    """

    input_ids: Tensor
    inputs_embeds: Tensor
    attention_mask: Tensor
    encode: Callable[[], Tensor]
    sentence_embedding: Callable[[str], Tensor] = _no_encoder
    instruction_mask: Tensor | None = None
    batch_mask: Tensor | None = None

    def rows(self, index: Tensor) -> "Context":
        """The same of the rows named by `index [R]`, in that order."""
        return Context(
            input_ids=self.input_ids[index],
            inputs_embeds=self.inputs_embeds[index],
            attention_mask=self.attention_mask[index],
            encode=lambda: self.encode()[index],
            sentence_embedding=lambda name: self.sentence_embedding(name)[index],
            instruction_mask=None if self.instruction_mask is None else self.instruction_mask[index],
            batch_mask=self.attention_mask if self.batch_mask is None else self.batch_mask,
        )

    @staticmethod
    def empty() -> "Context":
        """The context of no rows: for methods whose prompt does not depend on the text."""
        ids = torch.zeros(0, 0, dtype=torch.long)
        embeds = torch.zeros(0, 0, 0)
        return Context(ids, embeds, ids, lambda: embeds)


@dataclass(frozen=True)
class PromptOutput:
    """What a method returns that makes more than one matrix.

    Attributes:
        prompt: The prompt of all rows, [P, D]; of an input-dependent method the distinct prompts, [U, P, D].
        mask: 0 where a short prompt is padded on the left, [U, P]; None: no prompt is shorter than P.
        prompt_index: Which of the U prompts each row reads, [B]; None: each row has its own, U = B.
        embedding_delta: What is added to the embeddings of the first S text tokens of each row, [S, H].
        measures: What objectives may look at, [B, ...]; single numbers [] also go into the history of a run.
    """

    prompt: Tensor
    mask: Tensor | None = None
    prompt_index: Tensor | None = None
    embedding_delta: Tensor | None = None
    measures: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class EmbeddingDelta:
    """What a prompt adds to the embeddings of the text behind it, token by token from each row's first text token on.

    Nothing is added to labels, to continuations, or to generated text, so that training, scoring and generation agree.

    Attributes:
        values: Of each distinct prompt, [U, S, H]; text tokens beyond S stay as they are.
        reach: How many tokens of each row may change, [B]: those of `Context.attention_mask`.
    """

    values: Tensor
    reach: Tensor


@dataclass(frozen=True)
class Prompt:
    """The distinct prompts of a batch, and which row reads which.

    Attributes:
        values: [U, P, D].
        mask: 0 where a short prompt is padded, always on the left, [U, P].
        prompt_index: Which of the U prompts each row reads, [B].
        aux: What objectives may look at, [B, ...]; single numbers [] also go into the history of a run.
        embedding_delta: What is added to the text (of encoder-decoder models the encoder's), whatever the site.
    """

    values: Tensor
    mask: Tensor
    prompt_index: Tensor
    aux: dict[str, Tensor] = field(default_factory=dict)
    embedding_delta: EmbeddingDelta | None = None

    @property
    def lengths(self) -> Tensor:
        """Number of prompt tokens of each distinct prompt, [U]."""
        return self.mask.bool().sum(1)

    def rows(self, index: Tensor) -> "Prompt":
        """The prompt for the batch rows named by `index [R]`; the distinct prompts stay as they are."""
        delta = self.embedding_delta
        if delta is not None:
            delta = replace(delta, reach=delta.reach[index])
        return replace(self, prompt_index=self.prompt_index[index], embedding_delta=delta)


@dataclass(frozen=True)
class Output:
    """The frozen backbone's scores of the N labeled positions; nothing here belongs to a prompt position.

    Attributes:
        logits: Language models [N, V], token heads [N, C], sequence heads [B, C], spans [2B, T] (starts, then ends);
            None: a model without a head, or `nll` replaces them.
        labels: Aligned with `logits`, [N] (multi-label [B, C] and values [B] as floats); None: the batch has none.
        batch_rows: The batch row of each scored position, [N].
        label_columns: Its column in the labels, [N]; None where a row has one label.
        hidden_states: Last hidden states of the text in its own layout, [B, T, H], where the caller asks for them.
        cache: The backbone's cache behind the text, on path `shared`.
        last_state: The state that scores the first new token of a causal language model, [B, H].
        path: packed, shared, or concatenation and the reason.
        nll: Minus the log-probability of each label in float32, [N], where the logits would be large.
        label_states: The states from which the head makes the scores, [N, H] (language models and token heads).
        head: From such states [n, H] to logits [n, V].
        layer_states: (side, layer) -> states [M, H] of all M text tokens, row behind row, where the caller asks for
            layers; side `text`, and in encoder-decoder models also `target`, the decoder's.
        token_counts: Side -> how many of the M tokens belong to each row, [B].
    """

    logits: Tensor | None
    labels: Tensor | None
    batch_rows: Tensor
    label_columns: Tensor | None = None
    hidden_states: Tensor | None = None
    cache: Any = None
    last_state: Tensor | None = None
    path: str = ""
    nll: Tensor | None = None
    label_states: Tensor | None = None
    head: Callable[[Tensor], Tensor] | None = None
    layer_states: Mapping[tuple[str, int], Tensor] = field(default_factory=dict)
    token_counts: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class TeacherBatch:
    """The frozen backbone's states of a batch behind the prompts of its rows' teachers; lines up with the Output.

    Attributes:
        label_states: The states from which the head makes the teachers' scores, [N, H].
        layer_states: (side, layer) -> states [M, H].
        temperature: Of the softmax of both, student and teacher.
    """

    label_states: Tensor
    layer_states: Mapping[tuple[str, int], Tensor]
    temperature: float = 1.0


@dataclass(frozen=True)
class Step:
    """One training step as an objective sees it.

    Attributes:
        batch: The rows.
        prompt: Their prompts.
        output: Their scores.
        teacher: A teacher's outputs for the same rows, or None.
    """

    batch: Batch
    prompt: Prompt
    output: Output
    teacher: TeacherBatch | None = None


Objective = Callable[[Step], Tensor]


@dataclass(frozen=True)
class Progress:
    """One training step of one run, as checkpoints, results.json and the screen have it.

    Attributes:
        step: The number of the step, counted from 1.
        steps: The number of steps that the run makes unless it stops early.
        loss: The mean loss over the labels of the step.
        rate: The learning rate of the first parameter group: the prompt's, or that of the weights.
        rms_ratio: rms(P) / rms(E) of the prompts; None where no prompt is trained.
        tokens: The text tokens of this run in the step.
        seconds: The time of the step, which runs that share a batch share.
        score: The validation score, where one was due.
        path: How the prompt was computed: packed, shared or concatenation, with the reason.
        equivalence: The comparison of the first batch with plain concatenation, where the settings ask for it.
        machine: Device, dtype, threads and kernels: at the first step, and wherever they change.
        measures: The single numbers that the method reports (`Prompt.aux`).
    """

    step: int
    steps: int
    loss: float
    rate: float
    rms_ratio: float | None
    tokens: int
    seconds: float
    score: float | None = None
    path: str = ""
    equivalence: str = ""
    machine: str = ""
    measures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Fingerprint:
    """What ties a prompt to the weights it was made for.

    Attributes:
        architecture: Facts that must be equal: model type, width, layers, vocabulary size and more.
        tokenizer: A hash, of which a change only warns; None: the model has no tokenizer.
        sketch: Last hidden states of 32 fixed token ids in float32, [32, H].
        dtype: That of the weights that made the sketch.
    """

    architecture: dict[str, Any]
    tokenizer: str | None
    sketch: Tensor
    dtype: str


@contextlib.contextmanager
def in_mode(method: Any, training: bool) -> Iterator[None]:
    """Inside, the method is in training mode, or in eval mode for evaluation, folding and answering; then as it was."""
    before = method.training
    method.train(training)
    try:
        yield
    finally:
        method.train(before)


def pool_states(states: Tensor, mask: Tensor, how: str) -> Tensor:
    """One state [B, H] for each text; 0 where the mask has no token.

    Args:
        states: [B, T, H].
        mask: 1 for the tokens that count, [B, T].
        how: first or last: that token's state; mean: the mean over all.

    Raises:
        ValueError: There is no such way.
    """
    included = mask.bool()
    if how == "mean":
        return states.masked_fill(~included[..., None], 0).sum(1) / included.sum(1, keepdim=True).clamp(min=1)
    if how not in ("first", "last"):
        raise ValueError(f"states are pooled by first, last or mean, not '{how}'")
    if how == "last":
        columns = torch.arange(mask.shape[1], device=mask.device)
        column = columns.masked_fill(~included, -1).amax(1)
    else:
        column = included.long().argmax(1)
    pooled = states[torch.arange(len(states), device=states.device), column.clamp(min=0)]
    return pooled.masked_fill(~included.any(1, keepdim=True), 0)


def mask_before_labels(mask: Tensor, labels: Tensor | None) -> Tensor:
    """The mask of a text without its first label and all that follows; without labels as it is.

    A prompt made from labels would show the model what it is to predict, and there are no labels when it answers.

    Args:
        mask: 1 for text, [B, T].
        labels: Of a model that scores the tokens of its own text, [B, T].
    """
    if labels is None:
        return mask
    return mask * (labels.to(mask.device).ne(IGNORE).cumsum(1) == 0)


def mix_prompts(prompts: Sequence[Prompt], rows: Sequence[Tensor]) -> Prompt:
    """One prompt for a batch whose rows come from several prompts of any length.

    Short prompts are padded on the left, so that nothing comes between a prompt and its text. Rows whose prompt adds
    nothing to their text keep it as it is beside rows whose prompt does.

    Args:
        prompts: The prompts.
        rows: The batch rows [B_i] that each prompt serves; together they name each row once.

    Raises:
        ValueError: The widths differ, or the rows are not a permutation.
    """
    widths = {prompt.values.shape[2] for prompt in prompts}
    if len(widths) != 1:
        raise ValueError(f"prompts of widths {sorted(widths)} cannot share a batch: they belong to different sites")
    order = torch.cat(list(rows))
    if not torch.equal(order.sort().values, torch.arange(len(order), device=order.device)):
        raise ValueError(f"rows {order.tolist()} must name each of the {len(order)} batch rows exactly once")
    length = max(prompt.values.shape[1] for prompt in prompts)
    values = []
    masks = []
    prompt_index = torch.empty_like(order)
    prompts_so_far = 0
    for prompt, index in zip(prompts, rows, strict=True):
        padding = length - prompt.values.shape[1]
        values.append(functional.pad(prompt.values, (0, 0, padding, 0)) if padding else prompt.values)
        masks.append(functional.pad(prompt.mask, (padding, 0)) if padding else prompt.mask)
        prompt_index[index] = prompt.prompt_index + prompts_so_far
        prompts_so_far += len(prompt.values)
    return Prompt(
        values=torch.cat(values),
        mask=torch.cat(masks),
        prompt_index=prompt_index,
        aux=_mix_measures(prompts, rows),
        embedding_delta=_mix_embedding_deltas(prompts, rows),
    )


def _mix_measures(prompts: Sequence[Prompt], rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """The measures that all prompts of a mixed batch have: numbers as means over rows, the others row by row."""
    names = [name for name in prompts[0].aux if all(name in prompt.aux for prompt in prompts)]
    order = torch.cat(list(rows)).argsort()
    mixed: dict[str, Tensor] = {}
    for name in names:
        parts = [prompt.aux[name] for prompt in prompts]
        if all(part.dim() == 0 for part in parts):
            counts = torch.tensor(list(map(len, rows)), device=parts[0].device, dtype=parts[0].dtype)
            mixed[name] = (torch.stack(parts) * counts).sum() / counts.sum()
        elif len({part.shape[1:] for part in parts}) == 1:
            mixed[name] = torch.cat(parts)[order]
    return mixed


def _mix_embedding_deltas(prompts: Sequence[Prompt], rows: Sequence[Tensor]) -> EmbeddingDelta | None:
    """What the prompts of a mixed batch add to their texts; None where none adds anything."""
    deltas = [prompt.embedding_delta for prompt in prompts if prompt.embedding_delta is not None]
    if not deltas:
        return None
    length = max(delta.values.shape[1] for delta in deltas)
    zeros = deltas[0].values.new_zeros(1, length, deltas[0].values.shape[2])
    values = []
    reach = rows[0].new_zeros(sum(map(len, rows)))
    for prompt, index in zip(prompts, rows, strict=True):
        delta = prompt.embedding_delta
        if delta is None:
            values.append(zeros.expand(len(prompt.values), -1, -1))
        else:
            values.append(functional.pad(delta.values, (0, 0, 0, length - delta.values.shape[1])))
            reach[index] = delta.reach.to(reach.dtype)
    return EmbeddingDelta(torch.cat(values), reach)
