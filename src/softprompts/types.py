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
        features: H, the width of the backbone's input embeddings, which a method that reads the text sees.
        vocabulary: The number of the backbone's token ids.
        layers: The widths of each layer's part of a prompt that has one for every layer (sites layers and kv); they
            sum to `width`.
        encoders: The widths of the vectors that frozen encoders make of whole texts, by the encoder's name:
            "backbone", and the encoders that the method asks for.
        pool: Which of the backbone's states of a text usually represents all of it, as `pool_states` takes it.
    """

    length: int
    width: int
    features: int
    vocabulary: int = 0
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
    """Parameters of a method that learn at a rate of their own: those whose names begin with one of `parameters`.

    unit: "rms", the rate counts in rms of the word embeddings, as that of prompts does; "one", as it stands, which is
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
    """One batch of rows, padded on either side; `mask` says what is text.

    ids     [B, T] token ids (of the encoder in encoder-decoder models)
    mask    [B, T] 1 for text, 0 for padding
    task    [B] index into the model's tasks
    labels  language models [B, T] (encoder-decoder: [B, S]), token heads [B, T], classes [B], values [B],
            multi-label [B, C] (float), spans [B, 2]; `IGNORE` marks what is not scored
    types   [B, T] token types of text pairs, for encoders that have them
    embeds  [B, T, H] instead of looking `ids` up
    place   [B] how many text tokens stand before the prompt, or [B, S] before each of its S segments, never falling;
            None: as the site says
    segments  [B, S] how many prompt tokens each segment has, 0 behind a row's last; None: as the site says
    positions  [B, T] text positions given by the caller, counted without the prompt
    decoder_ids, decoder_mask  [B, S] decoder input where it is not the labels shifted by one
    words   [B, T] 1 for tokens of the instructions that a person wrote, such as a template's own words; None: not known
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
        return replace(self, **{k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)})

    def rows(self, index: Tensor) -> "Batch":
        """The rows named by `index [R]`, in that order."""
        return replace(self, **{k: v[index] for k, v in vars(self).items() if isinstance(v, Tensor)})


def _no_encoder(name: str) -> Tensor:
    raise ValueError(f"no encoder '{name}' of whole texts is here")


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

    values [U, S, H]: of each distinct prompt; text tokens beyond S stay as they are; reach [B]: the number of tokens
    of each row that may be changed, those of `Context.mask`. So nothing is added to what a model is to predict, nor to
    continuations, nor to what it writes, and training, scoring and writing agree.
    """

    values: Tensor
    reach: Tensor


@dataclass(frozen=True)
class Prompt:
    """The distinct prompts of a batch, and which row uses which.

    values [U, P, D]; mask [U, P], 0 where a short prompt is padded (always on the left); row [B] -> U;
    aux: what a method wants its objectives to see, and, where it is a single number [], the history of the run;
    added: what is added to the text (of encoder-decoder models the encoder's), whatever the site; a method that has it
    can have no `fold`.
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
        added = (
            None
            if self.embedding_delta is None
            else replace(self.embedding_delta, reach=self.embedding_delta.reach[index])
        )
        return replace(self, prompt_index=self.prompt_index[index], embedding_delta=added)


@dataclass(frozen=True)
class Output:
    """What the frozen backbone says about the labeled positions; nothing here belongs to a prompt position.

    logits  [N, V] for language models, [N, C] for token heads, [B, C] for sequence heads, [2B, T] for spans
            (starts, then ends), None for feature extraction
    nll     [N] minus the log-probability of each label, in float32, where `logits` would be too large and is None
    labels  [N], aligned with `logits` (multi-label [B, C] and values [B] as floats); None where none were given
    row     [N] batch row of each scored position
    column  [N] its place in the labels; None where a row has one label
    hidden  [B, T, H] last hidden states of the text in its own layout (only where asked for)
    cache   the backbone's cache after the text (on path "shared"), and `last` [B, H] the state that scores the first
            new token
    path    "packed", "shared" or "concatenation", and why
    states  [N, H] what the head read at the scored positions, and `scores`, the head from such states to [N, V]
            (language models and token heads)
    layers  states [M, H] of all M text tokens, row behind row, where layers were asked for: (side, layer) -> states;
            side "text", and in encoder-decoder models also "target", the decoder's; `tokens`: side -> [B], how many
            of the M belong to each row
    """

    logits: Tensor | None
    labels: Tensor | None
    row: Tensor
    column: Tensor | None = None
    hidden: Tensor | None = None
    cache: Any = None
    last: Tensor | None = None
    path: str = ""
    nll: Tensor | None = None
    states: Tensor | None = None
    scores: Callable[[Tensor], Tensor] | None = None
    layers: Mapping[tuple[str, int], Tensor] = field(default_factory=dict)
    tokens: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class TeacherBatch:
    """What the frozen backbone makes of a batch behind the prompts of its rows' teachers; lines up with the Output.

    states [N, H], from which the head makes the teachers' scores; layers: (side, layer) -> [M, H]; temperature: of both
    softmaxes.
    """

    states: Tensor
    layers: Mapping[tuple[str, int], Tensor]
    temperature: float = 1.0


@dataclass(frozen=True)
class Step:
    """One training step as an objective sees it; `again(prompt)` runs the batch with another prompt (None: without)."""

    batch: Batch
    prompt: Prompt
    output: Output
    again: Callable[[Prompt | None], Output]
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

    architecture: facts that must be equal (model type, width, layers, vocabulary size, ...); tokenizer: a hash, of
    which a change only warns; sketch [32, H]: float32 last hidden states of 32 fixed token ids; dtype: of the weights
    that made the sketch.
    """

    architecture: dict[str, Any]
    tokenizer: str | None
    sketch: Tensor
    dtype: str


@contextlib.contextmanager
def in_mode(method: Any, training: bool) -> Iterator[None]:
    """Inside, the method is in training mode, or in the mode of judging, folding and answering; then as it was."""
    before = method.training
    method.train(training)
    try:
        yield
    finally:
        method.train(before)


def pool_states(states: Tensor, mask: Tensor, how: str) -> Tensor:
    """One state [B, H] for each text: the first or last of `states [B, T, H]` that `mask [B, T]` has, or their mean.

    It is 0 where the mask has none. Raises ValueError for another way.
    """
    there = mask.bool()
    if how == "mean":
        return states.masked_fill(~there[..., None], 0).sum(1) / there.sum(1, keepdim=True).clamp(min=1)
    if how not in ("first", "last"):
        raise ValueError(f"states are pooled by first, last or mean, not '{how}'")
    columns = torch.arange(mask.shape[1], device=mask.device)
    place = columns.masked_fill(~there, -1).amax(1) if how == "last" else there.long().argmax(1)
    found = states[torch.arange(len(states), device=states.device), place.clamp(min=0)]
    return found.masked_fill(~there.any(1, keepdim=True), 0)


def mask_before_labels(mask: Tensor, labels: Tensor | None) -> Tensor:
    """`mask [B, T]` of a text without its first label `[B, T]` and all that follows; without labels as it is.

    Where a model scores tokens of the text it reads, a prompt made from these would tell it what it is to predict: it
    would learn to look there, and find nothing when it has to answer.
    """
    if labels is None:
        return mask
    return mask * (labels.to(mask.device).ne(IGNORE).cumsum(1) == 0)


def mix_prompts(prompts: Sequence[Prompt], rows: Sequence[Tensor]) -> Prompt:
    """One prompt for a batch whose rows come from several prompts of any length.

    `rows[i] [B_i]` are the batch rows that `prompts[i]` serves; together they must name each row once. Short prompts
    are padded on the left of their slot, so that nothing ever stands between a prompt and its text. Rows of prompts
    that add nothing to their text keep it as it is beside rows of prompts that do.

    Raises ValueError when the widths differ or the rows are not a permutation.
    """
    widths = {p.values.shape[2] for p in prompts}
    if len(widths) != 1:
        raise ValueError(f"prompts of widths {sorted(widths)} cannot share a batch: they belong to different sites")
    order = torch.cat(list(rows))
    if not torch.equal(order.sort().values, torch.arange(len(order), device=order.device)):
        raise ValueError(f"rows {order.tolist()} must name each of the {len(order)} batch rows exactly once")
    length = max(p.values.shape[1] for p in prompts)
    prompt_index, before = torch.empty_like(order), 0
    values, masks = [], []
    for prompt, index in zip(prompts, rows, strict=True):
        pad = length - prompt.values.shape[1]
        values.append(functional.pad(prompt.values, (0, 0, pad, 0)) if pad else prompt.values)
        masks.append(functional.pad(prompt.mask, (pad, 0)) if pad else prompt.mask)
        prompt_index[index] = prompt.prompt_index + before
        before += len(prompt.values)
    return Prompt(
        torch.cat(values),
        torch.cat(masks),
        prompt_index,
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
            counts = torch.tensor([len(index) for index in rows], device=parts[0].device, dtype=parts[0].dtype)
            mixed[name] = (torch.stack(parts) * counts).sum() / counts.sum()
        elif len({part.shape[1:] for part in parts}) == 1:
            mixed[name] = torch.cat(parts)[order]
    return mixed


def _mix_embedding_deltas(prompts: Sequence[Prompt], rows: Sequence[Tensor]) -> EmbeddingDelta | None:
    """What the prompts of a mixed batch add to their texts; None where none adds anything."""
    there = [prompt.embedding_delta for prompt in prompts if prompt.embedding_delta is not None]
    if not there:
        return None
    size = max(one.values.shape[1] for one in there)
    nothing = there[0].values.new_zeros(1, size, there[0].values.shape[2])
    values, reach = [], rows[0].new_zeros(sum(map(len, rows)))
    for prompt, index in zip(prompts, rows, strict=True):
        if prompt.embedding_delta is None:
            values.append(nothing.expand(len(prompt.values), -1, -1))
        else:
            own = prompt.embedding_delta.values
            values.append(functional.pad(own, (0, 0, 0, size - own.shape[1])))
            reach[index] = prompt.embedding_delta.reach.to(reach.dtype)
    return EmbeddingDelta(torch.cat(values), reach)
