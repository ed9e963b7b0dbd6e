"""Semi-parametric prompt tuning after Bari et al. 2022 (arXiv 2212.10929): a prompt, and rows of a memory behind it.

A RECONSTRUCTION: of the paper only the abstract was at hand, so what is not said there is our decision.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from softprompts.methods.base import MethodConfig, PromptMethod
from softprompts.methods.text import require_text
from softprompts.types import Context, ParamGroup, PromptInit, PromptOutput, PromptSpec


class SemiParametric(PromptMethod):
    """One prompt for all tasks, then `k` rows of a memory that the text's instructions retrieve: `[S ; R(h) ; text]`.

    `S [P - k, D]` starts at the first rows of `init.prompt`. The memory `B [N, D]` holds the rows of `init.sources`
    or, without any, words drawn by `init.draw`; it has the embeddings' width. h, the template's own words (all words
    where nobody says which these are), asks by inner products, not normalized: with its mean embedding, or with every
    word, of which the best answer counts. R(h) are the k rows of the largest products, the largest first, of equal ones
    the first (hard), or mixtures of them (soft): the i-th of all rows but the i - 1 best, weighed by the softmax of
    their products over the temperature, which near 0 are the same rows. The k rows of the memory do not start at
    `init.prompt`; with k = 0 this is prompt tuning with one prompt for all tasks.

    Raises:
        ValueError: A memory of fewer than k rows, no room for S, a site of another width than the embeddings, or faiss
            where it is not installed.
    """

    paper: ClassVar[str] = "a reconstruction of Bari et al. 2022, arXiv 2212.10929"
    sites: ClassVar[tuple[str, ...]] = ("input", "decoder")
    input_dependent: ClassVar[bool] = True
    groups: ClassVar[Mapping[str, ParamGroup]] = {
        "prompt": ParamGroup(("shared.soft",)),
        "memory": ParamGroup(("shared.sources",)),
    }
    shared: "Memory"

    class Config(MethodConfig):
        """The options of spt-reconstruction."""

        k: int = Field(default=5, ge=0)
        """How many rows of the memory a prompt has."""

        bank: int = Field(default=1000, ge=1)
        """N, the words that the memory draws where it has no sources."""

        population: int | None = Field(default=None, ge=1)
        """How many of the most common words they are drawn from; None is all."""

        query: Literal["mean", "words"] = "mean"
        """What asks the memory: the mean embedding of the instructions, or each of their words."""

        retrieval: Literal["hard", "soft"] = "hard"
        """Whether rows are retrieved as they are, or mixed."""

        temperature: float = Field(default=1.0, gt=0)
        """The temperature of soft retrieval."""

        trained: bool = False
        """Whether the memory learns too; with hard retrieval, only the rows that were retrieved."""

        index: Literal["torch", "faiss"] = "torch"
        """What finds the rows; `faiss` is for large frozen memories."""

        @model_validator(mode="after")
        def _index_options(self) -> Self:
            if self.index == "faiss" and (self.trained or self.retrieval == "soft"):
                raise ValueError("index 'faiss' finds rows of a frozen memory by hard retrieval; use index 'torch'")
            return self

    def __init__(self, config: Config, spec: PromptSpec, init: PromptInit, shared: nn.Module | None = None) -> None:
        super().__init__(config, spec, init, shared)
        self.config = config

    @classmethod
    def share(cls, config: Config, spec: PromptSpec, init: PromptInit, tasks: Sequence[str]) -> "Memory":
        """The trained prompt and the memory."""
        return Memory(config, spec, init)

    @property
    def memory(self) -> Tensor:
        """B, [N, D]."""
        return self.shared.rows

    def forward(self, context: Context) -> PromptOutput:
        """The distinct prompts [U, P, D], one for each h of the batch; rows with the same h share one.

        `retrieval_entropy []` measures how the batch's rows spread over the memory, in nats; it is log k where all
        retrieve the same k rows.

        Raises:
            PromptError: No row of a batch to learn from has text, and there is a memory to ask.
        """
        if not self.config.k:
            row = torch.zeros(len(context.input_ids), dtype=torch.long, device=context.input_ids.device)
            return PromptOutput(self.shared.soft[None], prompt_index=row)
        require_text(context)
        words, counts, row = _instructions(context)
        share = torch.bincount(row, minlength=len(words)) / len(row)
        prompts, spread = [], torch.zeros(len(self.memory), device=row.device)
        for instruction, count, part in zip(words, counts.tolist(), share, strict=True):
            retrieved, weights = self.shared(_queries(instruction[:count], self.config.query))
            prompts.append(torch.cat([self.shared.soft, retrieved]))
            spread = spread + part * weights
        entropy = torch.special.entr(spread).sum()
        return PromptOutput(torch.stack(prompts), prompt_index=row, measures={"retrieval_entropy": entropy})

    def rms(self) -> Tensor:
        """The root mean square of the trained prompt."""
        return self.shared.soft.square().mean().sqrt()


class Memory(nn.Module):
    """The trained prompt `soft [P - k, D]` and the memory `sources [S, n, D]`, with what finds its rows."""

    sources: Tensor

    def __init__(self, config: SemiParametric.Config, spec: PromptSpec, init: PromptInit) -> None:
        super().__init__()
        if config.k >= spec.length:
            raise ValueError(
                f"k {config.k} leaves no room for a trained prompt: prompt.num_virtual_tokens {spec.length} counts "
                f"both; choose a smaller k or a longer prompt"
            )
        if config.k and (spec.width != spec.embedding_size or spec.layers):
            raise ValueError(
                f"its memory has the width of the embeddings, {spec.embedding_size}, and the site has {spec.width}; "
                f"use site input or decoder"
            )
        self.config = config
        self.soft = nn.Parameter(init.prompt.detach().float()[: spec.length - config.k].clone())
        self._index: _Index | None = None
        if config.index == "faiss":
            _faiss()
        if config.k and config.trained:
            self.sources = nn.Parameter(_memory(config, init))
        elif config.k:
            self.register_buffer("sources", _memory(config, init))

    @property
    def rows(self) -> Tensor:
        """B, [N, D]."""
        return self.sources.flatten(0, 1)

    def forward(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """The k rows, or mixtures of rows, [k, D] for `queries [Q, D]`, and each memory row's share of them, [N]."""
        return self._mixed(queries) if self.config.retrieval == "soft" else self._retrieved(queries)

    def _retrieved(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        memory = self.rows
        with torch.no_grad():
            if self.config.index == "faiss":
                self._index = _current(self._index, memory)
                chosen = self._index.best(memory, queries, self.config.k)
            else:
                chosen = best(products(memory, queries), self.config.k)
        return memory[chosen], _share(chosen, len(memory))

    def _mixed(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        memory = self.rows
        scores = products(memory, queries)
        first = best(scores.detach(), self.config.k)
        taken = torch.zeros(len(first), len(memory), dtype=torch.bool, device=memory.device)
        for i in range(1, len(first)):
            taken[i:, first[i - 1]] = True
        weights = (scores / self.config.temperature).expand_as(taken).masked_fill(taken, -math.inf).softmax(1)
        return weights @ memory, weights.detach().mean(0)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_index": None}  # it cannot be copied, and is made again where it is needed


def _memory(config: SemiParametric.Config, init: PromptInit) -> Tensor:
    """The memory as sources, [S, n, D]: trained prompts that were named, or one set of words."""
    if init.sources is None and init.draw is None:
        raise ValueError("its memory needs words of a model, or trained prompts in prompt.init.sources")
    size = config.bank if init.sources is None else init.sources.shape[:2].numel()
    if size < config.k:
        where = "prompt.options.bank" if init.sources is None else "prompt.init.sources"
        raise ValueError(f"a memory of {size} rows cannot give k = {config.k}; enlarge {where}, or choose a smaller k")
    if init.sources is not None:
        return init.sources.detach().clone().float()
    assert init.draw is not None
    try:
        drawn = init.draw(config.bank, config.population)
    except ValueError as error:
        raise ValueError(f"its memory, prompt.options.bank: {error}") from None
    return drawn.detach().clone().float()[None]


def _instructions(context: Context) -> tuple[Tensor, Tensor, Tensor]:
    """The distinct h of a batch: embeddings [U, W, H] of their words, how many each has [U], and each row's, [B].

    Rows have the same h where its words are the same in the same order, wherever they are in the text.
    """
    readable = (
        context.attention_mask.bool()
        if context.instruction_mask is None
        else context.attention_mask.bool() & context.instruction_mask.bool()
    )
    counts = readable.sum(1)
    size = int(counts.max())
    order = readable.long().argsort(dim=1, descending=True, stable=True)[:, :size]
    words = (
        context.inputs_embeds.detach()
        .float()
        .gather(1, order[..., None].expand(-1, -1, context.inputs_embeds.shape[2]))
    )
    words = words.masked_fill((torch.arange(size, device=readable.device) >= counts[:, None])[..., None], 0)
    flat = torch.cat([counts[:, None].float(), words.flatten(1)], 1)
    texts, row = flat.unique(dim=0, return_inverse=True)
    return texts[:, 1:].reshape(len(texts), size, words.shape[2]), texts[:, 0].long(), row


def _queries(words: Tensor, kind: str) -> Tensor:
    """What asks the memory, [Q, H]: each of `words [W, H]`, or their mean; without words a zero, to which all is equal.

    Added one by one, because a sum's rounding must not depend on how far the batch was padded.
    """
    if not len(words):
        return words.new_zeros(1, words.shape[1])
    if kind == "words":
        return words
    total = torch.zeros_like(words[0])
    for word in words:
        total = total + word
    return total[None] / len(words)


def products(memory: Tensor, queries: Tensor) -> Tensor:
    """The largest inner product of each row of `memory [N, D]` with any of `queries [Q, D]`: [N].

    Row by row: a matrix product may round equal rows of the memory differently, and then there are no ties.
    """
    largest = (memory * queries[0]).sum(1)
    for query in queries[1:]:
        largest = torch.maximum(largest, (memory * query).sum(1))
    return largest


def best(scores: Tensor, k: int) -> Tensor:
    """The places [k] of the largest of `scores [N]`, in descending order, of equal ones the first."""
    return scores.sort(descending=True, stable=True).indices[:k]


def _share(chosen: Tensor, size: int) -> Tensor:
    return torch.bincount(chosen, minlength=size) / len(chosen)


@dataclass(frozen=True)
class _Index:
    """faiss' index of a memory of which tensor and version are known, and its longest row."""

    faiss: Any
    longest: float
    made_of: tuple[int, int]

    def best(self, memory: Tensor, queries: Tensor, k: int) -> Tensor:
        """As `best(products(memory, queries), k)`, with products of the index's candidates only.

        faiss rounds in its own way and gives ties in any order, so it is asked for more rows, until those that it left
        out cannot be among the best, and these are compared by the same products.
        """
        size, asked = k, queries.float().cpu().contiguous()
        slack = torch.finfo(torch.float32).eps * memory.shape[1] * self.longest * float(asked.norm(dim=1).max())
        while True:
            size = min(2 * size, len(memory))
            near, rows = self.faiss.search(asked.numpy(), size)
            candidates = torch.from_numpy(rows).flatten().unique().to(memory.device)
            scores = products(memory[candidates], queries)
            chosen = best(scores, k)
            if size == len(memory) or float(near[:, -1].max()) < float(scores[chosen[-1]]) - 2 * slack:
                return candidates[chosen]


def _current(index: _Index | None, memory: Tensor) -> _Index:
    """The index where it is that of this memory as it is now; else a new one."""
    made_of = (memory.data_ptr(), memory._version)
    if index is not None and index.made_of == made_of:
        return index
    made = _faiss().IndexFlatIP(memory.shape[1])
    made.add(memory.detach().float().cpu().contiguous().numpy())
    return _Index(made, float(memory.detach().norm(dim=1).max()), made_of)


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise ValueError(
            "index 'faiss' needs faiss, which is not installed: pip install 'softprompts[retrieval]', or use index "
            "'torch'"
        ) from None
    return faiss
