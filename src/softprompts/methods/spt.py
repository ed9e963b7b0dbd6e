"""Semi-parametric prompt tuning after Bari et al. 2022 (arXiv 2212.10929): a prompt, and rows of a memory behind it.

A RECONSTRUCTION: of the paper only the abstract was at hand, so what is not said there is our decision.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from softprompts.methods.text import require_text
from softprompts.types import Context, ParamGroup, Prompt, PromptInit, PromptSpec


class SemiParametric(nn.Module):
    """One prompt for all tasks, then `k` rows of a memory that the text's instructions retrieve: `[S ; R(h) ; text]`.

    `S [P - k, D]` starts at the first rows of `start.prompt`. The memory `B [N, D]` holds the rows of `start.sources`
    or, without any, words drawn by `start.draw`; it has the embeddings' width. h, the template's own words (all words
    where nobody says which these are), asks by inner products, not normalized: with its mean embedding, or with every
    word, of which the best answer counts. R(h) are the k rows of the largest products, the largest first, of equal ones
    the first (hard), or mixtures of them (soft): the i-th of all rows but the i - 1 best, weighed by the softmax of
    their products over the temperature, which near 0 are the same rows. The k rows of the memory do not start at
    `start.prompt`; with k = 0 this is prompt tuning with one prompt for all tasks.

    Raises ValueError for a memory of fewer than k rows, no room for S, sites of another width than the embeddings, and
    for faiss where it is not installed.
    """

    paper: ClassVar[str] = "a reconstruction of Bari et al. 2022, arXiv 2212.10929"
    sites: ClassVar[tuple[str, ...]] = ("input", "decoder")
    sees_input: ClassVar[bool] = True
    per_task: ClassVar[tuple[str, ...]] = ()
    groups: ClassVar[Mapping[str, ParamGroup]] = {"prompt": ParamGroup(("soft",)), "memory": ParamGroup(("sources",))}

    @dataclass(frozen=True)
    class Config:
        """`k`: memory rows of a prompt; `bank`: N, drawn from the `population` most common words (None: all).

        query: `mean` or `words`; retrieval: `hard` or `soft` at `temperature`; trained: whether the memory learns too
        (hard retrieval: only the rows that were retrieved); index: `torch`, or `faiss` for large frozen memories.
        """

        k: int = 5
        bank: int = 1000
        population: int | None = None
        query: Literal["mean", "words"] = "mean"
        retrieval: Literal["hard", "soft"] = "hard"
        temperature: float = 1.0
        trained: bool = False
        index: Literal["torch", "faiss"] = "torch"

        def __post_init__(self) -> None:
            for name, possible in (
                ("query", ("mean", "words")),
                ("retrieval", ("hard", "soft")),
                ("index", ("torch", "faiss")),
            ):
                if (given := getattr(self, name)) not in possible:
                    raise ValueError(f"{name} '{given}' is unknown; possible: {', '.join(possible)}")
            for name, least in (("k", 0), ("bank", 1), ("population", 1)):
                given = getattr(self, name)
                if not (isinstance(given, int) and given >= least) and not (name == "population" and given is None):
                    raise ValueError(f"{name} must be a whole number from {least} on, given {given!r}")
            number = isinstance(self.temperature, int | float)
            if not (number and 0 < self.temperature < math.inf):
                raise ValueError(f"temperature must be a number above 0, given {self.temperature!r}")
            if self.index == "faiss" and (self.trained or self.retrieval == "soft"):
                raise ValueError("index 'faiss' finds rows of a frozen memory by hard retrieval; use index 'torch'")

    def __init__(self, config: Config, slot: PromptSpec, start: PromptInit) -> None:
        super().__init__()
        if config.k >= slot.length:
            raise ValueError(
                f"k {config.k} leaves no room for a trained prompt: prompt.length {slot.length} counts both; choose a "
                f"smaller k or a longer prompt"
            )
        if config.k and (slot.width != slot.features or slot.layers):
            raise ValueError(
                f"its memory has the width of the embeddings, {slot.features}, and the site has {slot.width}; use "
                f"site input or decoder"
            )
        self.slot, self.config = slot, config
        self.soft = nn.Parameter(start.prompt.detach().float()[: slot.length - config.k].clone())
        self.sources: Tensor
        self._index: _Index | None = None
        if config.index == "faiss":
            _faiss()
        if config.k and config.trained:
            self.sources = nn.Parameter(_memory(config, start))
        elif config.k:
            self.register_buffer("sources", _memory(config, start))

    @property
    def memory(self) -> Tensor:
        """B, [N, D]."""
        return self.sources.flatten(0, 1)

    def forward(self, context: Context) -> Prompt:
        """The distinct prompts `[U, P, D]`, one for each h of the batch; `[B]` rows with the same h share one.

        aux `retrieval_entropy []`: of how the batch's rows spread over the memory, in nats; log k where all retrieve
        the same k rows.
        Raises PromptError where no row of a batch to learn from has text and there is a memory to ask.
        """
        if not self.config.k:
            row = torch.zeros_like(context.task_ids)
            mask = torch.ones(1, self.slot.length, dtype=torch.bool, device=row.device)
            return Prompt(self.soft[None], mask, row)
        require_text(context)
        words, counts, row = _instructions(context)
        share = torch.bincount(row, minlength=len(words)) / len(row)
        weigh = self._mixed if self.config.retrieval == "soft" else self._retrieved
        rows, spread = [], torch.zeros(len(self.memory), device=row.device)
        for own, count, part in zip(words, counts.tolist(), share, strict=True):
            found, weights = weigh(_queries(own[:count], self.config.query))
            rows.append(torch.cat([self.soft, found]))
            spread = spread + part * weights
        values = torch.stack(rows)
        mask = torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)
        return Prompt(values, mask, row, {"retrieval_entropy": torch.special.entr(spread).sum()})

    def size(self) -> Tensor:
        """The root mean square of the trained prompt."""
        return self.soft.square().mean().sqrt()

    def _retrieved(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """The k rows [k, D] that `queries [Q, D]` retrieve, and each memory row's share of them, [N]."""
        with torch.no_grad():
            if self.config.index == "faiss":
                self._index = _current(self._index, self.memory)
                chosen = self._index.best(self.memory, queries, self.config.k)
            else:
                chosen = best(products(self.memory, queries), self.config.k)
        return self.memory[chosen], _share(chosen, len(self.memory))

    def _mixed(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """The k mixtures [k, D], and each memory row's share of them, [N]."""
        memory, scores = self.memory, products(self.memory, queries)
        first = best(scores.detach(), self.config.k)
        taken = torch.zeros(len(first), len(memory), dtype=torch.bool, device=memory.device)
        for i in range(1, len(first)):
            taken[i:, first[i - 1]] = True
        weights = (scores / self.config.temperature).expand_as(taken).masked_fill(taken, -math.inf).softmax(1)
        return weights @ memory, weights.detach().mean(0)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_index": None}  # it cannot be copied, and is made again where it is needed


def _memory(config: SemiParametric.Config, start: PromptInit) -> Tensor:
    """The memory as sources, [S, n, D]: trained prompts that were named, or one set of words."""
    if start.sources is None and start.draw is None:
        raise ValueError("its memory needs words of a model or, in prompt.init.sources, trained prompts")
    size = config.bank if start.sources is None else start.sources.shape[:2].numel()
    if size < config.k:
        where = "prompt.options.bank" if start.sources is None else "prompt.init.sources"
        raise ValueError(f"a memory of {size} rows cannot give k = {config.k}; enlarge {where}, or choose a smaller k")
    if start.sources is not None:
        return start.sources.detach().clone().float()
    assert start.draw is not None
    try:
        drawn = start.draw(config.bank, config.population)
    except ValueError as error:
        raise ValueError(f"its memory, prompt.options.bank: {error}") from None
    return drawn.detach().clone().float()[None]


def _instructions(context: Context) -> tuple[Tensor, Tensor, Tensor]:
    """The distinct h of a batch: embeddings [U, W, H] of their words, how many each has [U], and each row's, [B].

    Rows have the same h where its words are the same in the same order, wherever they stand in the text.
    """
    there = (
        context.attention_mask.bool()
        if context.instruction_mask is None
        else context.attention_mask.bool() & context.instruction_mask.bool()
    )
    counts = there.sum(1)
    size = int(counts.max())
    order = there.long().argsort(dim=1, descending=True, stable=True)[:, :size]
    words = (
        context.inputs_embeds.detach()
        .float()
        .gather(1, order[..., None].expand(-1, -1, context.inputs_embeds.shape[2]))
    )
    words = words.masked_fill((torch.arange(size, device=there.device) >= counts[:, None])[..., None], 0)
    flat = torch.cat([counts[:, None].float(), words.flatten(1)], 1)
    found, row = flat.unique(dim=0, return_inverse=True)
    return found[:, 1:].reshape(len(found), size, words.shape[2]), found[:, 0].long(), row


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
    found = (memory * queries[0]).sum(1)
    for query in queries[1:]:
        found = torch.maximum(found, (memory * query).sum(1))
    return found


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
