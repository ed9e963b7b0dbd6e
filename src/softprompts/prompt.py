"""The vocabulary of the library: what goes in, what comes out, what a method must fill.

Shapes use one alphabet everywhere: B rows, T text tokens, S target tokens, P prompt tokens, U distinct prompts,
H hidden, D site width, L layers, V vocabulary, C classes, N scored positions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

IGNORE = -100
"""The label of a position that is not scored, as in transformers and torch."""

SOURCES = "sources"
"""The buffer in which a method keeps `Start.sources`, so that its artefacts hold all that it needs."""


@dataclass(frozen=True)
class Slot:
    """What a method must fill: one prompt of `[length, width]` for each of `tasks`.

    `features` is the width of the backbone's input embeddings (what a method that reads the text sees), `vocabulary`
    the number of its token ids; `layers` are the widths of each layer's part where a prompt has one for every layer
    (sites layers and kv), and sum to `width`.
    """

    tasks: tuple[str, ...]
    length: int
    width: int
    features: int
    vocabulary: int = 0
    layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Start:
    """Where training begins: `prompt [P, D]` and, for methods that mix other artefacts, `sources [S, P, D]`.

    factors: of a multitask prompt that was trained before, columns [P, r] and rows [r, D], for every task; state:
    tensors of the same method that was trained before, under its own names, for every task.
    """

    prompt: Tensor
    sources: Tensor | None = None
    factors: tuple[Tensor, Tensor] | None = None
    state: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class Group:
    """Parameters of a method that learn at a rate of their own: those whose names begin with one of `parameters`.

    unit: "rms", the rate counts in rms of the word embeddings, as that of prompts does; "one", as it stands, which is
    right for factors around one and for weights. rate: what it is unless `train.rates` says otherwise; None: the run's.
    """

    parameters: tuple[str, ...]
    unit: Literal["rms", "one"] = "rms"
    rate: float | None = None


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
    """

    ids: Tensor
    mask: Tensor
    task: Tensor
    labels: Tensor | None = None
    types: Tensor | None = None
    embeds: Tensor | None = None
    place: Tensor | None = None
    segments: Tensor | None = None
    positions: Tensor | None = None
    decoder_ids: Tensor | None = None
    decoder_mask: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`."""
        return replace(self, **{k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)})

    def rows(self, index: Tensor) -> "Batch":
        """The rows named by `index [R]`, in that order."""
        return replace(self, **{k: v[index] for k, v in vars(self).items() if isinstance(v, Tensor)})


@dataclass(frozen=True)
class Context:
    """What a method may look at.

    task [B]; ids [B, T]; embeds [B, T, H]; mask [B, T], 1 for what the prompt may be made from (see `unscored`);
    `encode()` gives the frozen backbone's last hidden states of the text without a prompt, `[B, T, H]`, computed when
    first asked for.
    """

    task: Tensor
    ids: Tensor
    embeds: Tensor
    mask: Tensor
    encode: Callable[[], Tensor]


@dataclass(frozen=True)
class Prompt:
    """The distinct prompts of a batch, and which row uses which.

    values [U, P, D]; mask [U, P], 0 where a short prompt is padded (always on the left); row [B] -> U;
    aux: what a method wants its objectives to see.
    """

    values: Tensor
    mask: Tensor
    row: Tensor
    aux: dict[str, Tensor] = field(default_factory=dict)

    @property
    def lengths(self) -> Tensor:
        """Number of prompt tokens of each distinct prompt, [U]."""
        return self.mask.bool().sum(1)

    def rows(self, index: Tensor) -> "Prompt":
        """The prompt for the batch rows named by `index [R]`; the distinct prompts stay as they are."""
        return replace(self, row=self.row[index])


@dataclass(frozen=True)
class Output:
    """What the frozen backbone says about the labelled positions; nothing here belongs to a prompt position.

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
class Teacher:
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
    teacher: Teacher | None = None


Objective = Callable[[Step], Tensor]


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


class Method(Protocol):
    """A module that turns (task ids, input) into a prompt; one file each in `methods/`.

    It may have `fold(task) -> [P, D]`, where the prompt does not depend on the text; `per_task`, names of its lists
    with one parameter a task; and `groups`, parameters with learning rates of their own (name -> Group).
    """

    Config: type

    def __init__(self, config: Any, slot: Slot, start: Start) -> None: ...

    def __call__(self, context: Context) -> Prompt: ...


def distinct(task: Tensor) -> tuple[Tensor, Tensor]:
    """The tasks of a batch without repetition `[U]`, and each row's index into them `[B]`."""
    found, row = torch.unique(task, return_inverse=True)
    return found, row


def unscored(mask: Tensor, labels: Tensor | None) -> Tensor:
    """`mask [B, T]` of a text without its first label `[B, T]` and all that follows; without labels as it is.

    Where a model scores tokens of the text it reads, a prompt made from these would tell it what it is to predict: it
    would learn to look there, and find nothing when it has to answer.
    """
    if labels is None:
        return mask
    return mask * (labels.to(mask.device).ne(IGNORE).cumsum(1) == 0)


def mix(prompts: Sequence[Prompt], rows: Sequence[Tensor]) -> Prompt:
    """One prompt for a batch whose rows come from several prompts of any length.

    `rows[i] [B_i]` are the batch rows that `prompts[i]` serves; together they must name each row once. Short prompts
    are padded on the left of their slot, so that nothing ever stands between a prompt and its text.

    Raises ValueError when the widths differ or the rows are not a permutation.
    """
    widths = {p.values.shape[2] for p in prompts}
    if len(widths) != 1:
        raise ValueError(f"prompts of widths {sorted(widths)} cannot share a batch: they belong to different sites")
    order = torch.cat(list(rows))
    if not torch.equal(order.sort().values, torch.arange(len(order), device=order.device)):
        raise ValueError(f"rows {order.tolist()} must name each of the {len(order)} batch rows exactly once")
    length = max(p.values.shape[1] for p in prompts)
    values, mask, row, before = [], [], torch.empty_like(order), 0
    for prompt, index in zip(prompts, rows, strict=True):
        pad = length - prompt.values.shape[1]
        values.append(torch.nn.functional.pad(prompt.values, (0, 0, pad, 0)))
        mask.append(torch.nn.functional.pad(prompt.mask, (pad, 0)))
        row[index] = prompt.row + before
        before += len(prompt.values)
    return Prompt(torch.cat(values), torch.cat(mask), row)
