"""Instance-wise prompt tuning (Jiang et al. 2022, arXiv 2206.01958): a text's own first words choose its prompt."""

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from softprompts.errors import PromptError
from softprompts.methods.base import MethodConfig, PromptMethod
from softprompts.methods.text import require_text
from softprompts.types import Context, ParamGroup, PromptInit, PromptOutput, PromptSpec


class InstancePromptTuning(PromptMethod):
    """Each text's prompt is looked up for its first words in a trained table T [V, d], or encoded from T's vectors.

    With x_1 ... x_n the first n tokens of the text that may be seen, the paper's strategies are
    `lookup`: p_i = T[x_i]; and, with Z = T[x_1 ... x_n] and p = reshape(W f + b) in R^{n x d},
    `cnn`: f the maxima over time of ReLU(conv_h(Z)), heights h = 3, 4, 5, one filter each;
    `rnn`: f the last states of both directions of a bi-LSTM of two layers, hidden size 64;
    `mlp`: f the mean of Z, and p = dropout(ReLU(W f + b)).
    At sites input and decoder p is the prompt; at layers and kv the task's own prompt stays and `scale` p is added to
    its part for the first layer. Tables and encoders are shared by the tasks of a run.

    Raises:
        ValueError: The options contradict each other or the spec.
    """

    paper: ClassVar[str] = "Jiang et al. 2022, arXiv 2206.01958"
    input_dependent: ClassVar[bool] = True
    pretrained: ClassVar[tuple[str, ...]] = ("shared.table.", "shared.encoder.")
    groups: ClassVar[Mapping[str, ParamGroup]] = {
        "prompt": ParamGroup(("prompt", "shared.linear.bias")),
        "table": ParamGroup(("shared.table.rows", "shared.table.directions"), decay=False),
        "codes": ParamGroup(("shared.table.codes",), unit="one", decay=False),
        "encoder": ParamGroup(("shared.encoder", "shared.linear.weight"), unit="one", rate=1e-3),
    }
    shared: "TextReader"

    class Config(MethodConfig):
        """The options of ipt."""

        strategy: Literal["lookup", "cnn", "rnn", "mlp"] = "lookup"
        """How a text becomes a prompt."""

        table: Literal["full", "low-rank", "hashed", "common"] = "full"
        """How T is stored; see `Table`."""

        rank: int = Field(default=16, ge=1)
        """The rank of a `low-rank` table."""

        rows: int = Field(default=2048, ge=1)
        """The rows of a `hashed` or `common` table."""

        base: Literal["none", "start"] | None = None
        """What the text's prompt is added to.

        `none`: it replaces the task's. `start`: it is added to a trained one that begins at the start. None: the
        paper's, none at sites input and decoder, start at layers and kv.
        """

        scale: float | None = Field(default=None, ge=0)
        """The scale of the text's prompt; None is the paper's, 0.05 at layers and kv, else 1."""

        start: Literal["uniform", "zero", "words"] | None = None
        """Where T begins: uniform around zero, at zero, or at the backbone's own embeddings.

        None is zero where T is looked up and added to a base, else uniform.
        """

        spread: float | None = Field(default=None, ge=0)
        """The root mean square of a uniform T; None is that of the start."""

        tokens: int | None = Field(default=None, ge=1)
        """How many tokens an encoder reads; None is the prompt's length."""

        dropout: float = Field(default=0.5, ge=0, lt=1)
        """The share of the prompt that a training step of strategy mlp leaves out."""

        @model_validator(mode="after")
        def _strategy_options(self) -> Self:
            if self.strategy == "lookup" and self.tokens is not None:
                raise ValueError("tokens is for strategies that encode; lookup reads as many as the prompt is long")
            if self.strategy != "lookup" and self.start == "zero":
                raise ValueError(
                    f"strategy {self.strategy} would learn nothing from a table of zeros; use uniform or words"
                )
            return self

    def __init__(self, config: Config, spec: PromptSpec, init: PromptInit, shared: nn.Module | None = None) -> None:
        super().__init__(config, spec, init, shared)
        self.config = config
        self.scale = config.scale if config.scale is not None else 0.05 if spec.layers else 1.0
        self.prompt = nn.Parameter(init.prompt.detach().clone().float()) if _has_base(config, spec) else None

    @classmethod
    def share(cls, config: Config, spec: PromptSpec, init: PromptInit, tasks: Sequence[str]) -> "TextReader":
        """The table and the encoder."""
        return TextReader(config, spec, init.prompt.detach().float())

    def forward(self, context: Context) -> PromptOutput:
        """A prompt for each row, [B, P, D]; without a base, a text with fewer tokens than P has a shorter one.

        Raises:
            PromptError: The text was given as embeddings, or no row of a batch to learn from has text.
        """
        require_text(context)
        prompts, exists = self.shared(context)
        prompts = prompts * self.scale
        if self.prompt is not None:
            return PromptOutput(self.prompt + nn.functional.pad(prompts, (0, self.spec.width - prompts.shape[2])))
        order = exists.long().argsort(dim=1, stable=True)  # what is missing goes to the left
        prompts = prompts.gather(1, order[:, :, None].expand_as(prompts))
        return PromptOutput(prompts, mask=exists.gather(1, order))

    def features(self, context: Context) -> Tensor:
        """What a classifier reads in pretraining, [B, F]: what the encoder makes, or the mean of the looked-up rows."""
        return self.shared.features(context)

    def rms(self) -> None:
        """Only the prompts of a batch say how large they are."""
        return


def _has_base(config: InstancePromptTuning.Config, spec: PromptSpec) -> bool:
    """Whether the text's prompt is added to a prompt of the task."""
    deep = bool(spec.layers)
    based = (config.base or ("start" if deep else "none")) == "start"
    if deep and not based:
        raise ValueError("base none would leave all layers but the first without a prompt; use start")
    return based


class TextReader(nn.Module):
    """The table T, the encoder and the linear layer that make a prompt of a text's first tokens."""

    def __init__(self, config: InstancePromptTuning.Config, spec: PromptSpec, prompt: Tensor) -> None:
        super().__init__()
        lookup, based = config.strategy == "lookup", _has_base(config, spec)
        part = spec.layers[0] if spec.layers else spec.width
        width = part if lookup else spec.embedding_size
        self.config = config
        self.length = spec.length
        self.words = config.start == "words"
        if self.words and width != spec.embedding_size:
            raise ValueError(
                f"start words needs prompts as wide as the embeddings, {spec.embedding_size}, not {width}; use uniform"
            )
        unit = float(prompt[:, :part].square().mean().sqrt()) if config.spread is None else config.spread
        zero = self.words or (config.start or ("zero" if lookup and based else "uniform")) == "zero"
        self.table = Table(config, spec.vocab_size, width, unit, zero)
        self.encoder = ENCODERS[config.strategy](width)
        if not lookup:
            self.linear = nn.Linear(self.encoder.size, spec.length * part)
            self._begin(None if based else prompt)
        self.dropout = nn.Dropout(config.dropout)

    def _begin(self, prompt: Tensor | None) -> None:
        """Let W f + b begin at `prompt [P, d]`, or at zero: whatever the encoder says, W is zero.

        Behind a ReLU that would be a start which half of the numbers never leave; there W is torch's and b zero.
        """
        nn.init.zeros_(self.linear.bias)
        if self.config.strategy == "mlp":
            return
        nn.init.zeros_(self.linear.weight)
        if prompt is not None:
            with torch.no_grad():
                self.linear.bias.copy_(prompt.flatten())

    def forward(self, context: Context) -> tuple[Tensor, Tensor]:
        """The texts' own prompts [B, P, d], from the first token on, and where there is one, [B, P]."""
        seen, exists = self._read(context)
        if self.config.strategy == "lookup":
            return seen, exists
        prompts = self.linear(self.encoder(seen, exists)).unflatten(1, (self.length, -1))
        if self.config.strategy == "mlp":
            prompts = self.dropout(prompts.relu())
        return prompts, torch.ones(prompts.shape[:2], dtype=torch.bool, device=prompts.device)

    def features(self, context: Context) -> Tensor:
        """What a classifier reads of each text, [B, F]."""
        features: Tensor = self.encoder(*self._read(context))
        return features

    def _read(self, context: Context) -> tuple[Tensor, Tensor]:
        """T's vectors of the first n tokens that may be seen, [B, n, d], and where there are such, [B, n]."""
        count = self.config.tokens or self.length
        visible = context.attention_mask.bool()
        order = (~visible).long().argsort(dim=1, stable=True)[:, :count]
        spare = count - order.shape[1]
        exists = nn.functional.pad(visible.gather(1, order), (0, spare))
        ids = nn.functional.pad(context.input_ids.gather(1, order), (0, spare)).masked_fill(~exists, 0)
        if bool((ids < 0).any()):
            raise PromptError("the method looks tokens up, and the text was given as embeddings; give input_ids")
        seen: Tensor = self.table(ids)
        if self.words:
            embeds = context.inputs_embeds.gather(1, order[:, :, None].expand(-1, -1, context.inputs_embeds.shape[2]))
            seen = seen + nn.functional.pad(embeds, (0, 0, 0, spare)).to(seen.dtype)
        return seen.masked_fill(~exists[:, :, None], 0), exists


class Table(nn.Module):
    """A vector for each token id, held as `config.table` says, with root mean square `unit` at the start, or zero.

    `full`: T [V, d], the paper's; `low-rank`: codes [V, r] times directions [r, d]; `hashed`: T [rows, d], token ids
    hashed into it; `common`: T [rows + 1, d] for the lowest ids, which are the most common tokens in vocabularies of
    trained tokenizers, and a last row that all others share.
    Raises ValueError for a vocabulary that is not known, or that has no more tokens than `rows`.
    """

    def __init__(
        self, config: InstancePromptTuning.Config, vocab_size: int, width: int, unit: float, zero: bool
    ) -> None:
        super().__init__()
        if vocab_size < 1:
            raise ValueError("it has a row for each token, so PromptSpec.vocab_size must be at least 1")
        if config.table in ("hashed", "common") and config.rows >= vocab_size:
            raise ValueError(
                f"table {config.table} of {config.rows} rows would not be smaller than that of all {vocab_size} "
                f"tokens; set rows lower, or use table full"
            )
        self.kind, self.limit = config.table, config.rows
        if self.kind == "low-rank":
            # Codes alone decide whether T is zero, so that a token which no text had adds nothing.
            codes = torch.zeros(vocab_size, config.rank) if zero else _uniform(1.0, vocab_size, config.rank)
            self.codes = nn.Parameter(codes)
            self.directions = nn.Parameter(_uniform(unit / math.sqrt(config.rank), config.rank, width))
        else:
            count = {"full": vocab_size, "hashed": config.rows, "common": config.rows + 1}[self.kind]
            self.rows = nn.Parameter(torch.zeros(count, width) if zero else _uniform(unit, count, width))

    def forward(self, ids: Tensor) -> Tensor:
        """The vectors [B, T, d] of token ids [B, T]."""
        if self.kind == "low-rank":
            return nn.functional.embedding(ids, self.codes) @ self.directions
        place = {"full": ids, "common": ids.clamp(max=self.limit)}.get(self.kind)
        if place is None:  # Fibonacci hashing (Knuth): neighbors, which often are alike, do not collide
            place = (ids * 2_654_435_769 % 2**32) * self.limit >> 32
        return nn.functional.embedding(place, self.rows)


def _uniform(rms: float, *shape: int) -> Tensor:
    return (torch.rand(shape) * 2 - 1) * math.sqrt(3) * rms


class Convolutions(nn.Module):
    """Strategy cnn: [B, n, d] to f [B, 3]. A text shorter than a kernel is one window, filled up with zeros."""

    size: ClassVar[int] = 3

    def __init__(self, width: int) -> None:
        super().__init__()
        self.kernels = nn.ModuleList(nn.Conv1d(width, 1, height) for height in (3, 4, 5))

    def forward(self, seen: Tensor, mask: Tensor) -> Tensor:
        """seen [B, n, d], zero where there [B, n] is not."""
        columns, maxima = nn.functional.pad(seen, (0, 0, 0, 4)).transpose(1, 2), []
        for height, kernel in zip((3, 4, 5), self.kernels, strict=True):
            activations = kernel(columns)[:, 0].relu()
            last = (mask.sum(1, keepdim=True) - height).clamp(min=0)
            inside = torch.arange(activations.shape[1], device=activations.device) <= last
            maxima.append(activations.masked_fill(~inside, 0).amax(1))
        return torch.stack(maxima, 1)


class Recurrent(nn.Module):
    """Strategy rnn: [B, n, d] to f [B, 128], the last layer's state after the last token and, backwards, the first."""

    size: ClassVar[int] = 128

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, 64, num_layers=2, batch_first=True, bidirectional=True)

    def forward(self, seen: Tensor, mask: Tensor) -> Tensor:
        """seen [B, n, d], zero where there [B, n] is not; a text of no tokens reads as one zero."""
        lengths = mask.sum(1).clamp(min=1).cpu()
        packed = nn.utils.rnn.pack_padded_sequence(seen, lengths, batch_first=True, enforce_sorted=False)
        _, (states, _) = self.lstm(packed)
        return torch.cat([states[-2], states[-1]], 1)


class Mean(nn.Module):
    """Strategy mlp, and features of lookup: [B, n, d] to f [B, d], the mean over the tokens there; zero without any."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.size = width

    def forward(self, seen: Tensor, mask: Tensor) -> Tensor:
        """seen [B, n, d], zero where there [B, n] is not."""
        return seen.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


ENCODERS: dict[str, type[Convolutions] | type[Recurrent] | type[Mean]] = {
    "lookup": Mean,
    "cnn": Convolutions,
    "rnn": Recurrent,
    "mlp": Mean,
}
