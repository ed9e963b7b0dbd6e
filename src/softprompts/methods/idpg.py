"""IDPG (Wu, Wang, Gu et al. 2022, arXiv 2204.04497): a small generator makes each text's prompt from a vector of it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from softprompts.methods.text import require_text
from softprompts.types import Context, ParamGroup, Prompt, PromptInit, PromptSpec, pool_states

POSSIBLE = {
    "kind": ("auto", "S", "M", "L"),
    "generator": ("linear", "dnn", "phm"),
    "encoder": ("static", "backbone", "minilm"),
    "pool": ("auto", "first", "last", "mean"),
    "start": ("zero", "normal"),
}


class Idpg(nn.Module):
    """A prompt for each text, made by a small generator from a frozen encoder's vector of it.

    With M(x) [E] the text's vector, section 3.2 of the paper has the prompt `W2 GELU(W1 M(x) + b1) + b2`, W1 [m, E];
    `linear`: `W2 M(x) + b2`; `phm`: W1 and W2 are sums of Kronecker products (see `phm`). What W2 makes is [P, D] in
    kind S; [P, w] in kind M, the same for every layer's part w of D; in kind L each layer has a generator of its own.
    b2 [P, D] has a part for every layer. Each task has a generator to itself, and begins at b2 = `start.prompt`.

    Raises ValueError for an encoder that is not here, a kind that the site does not have and PHM's n that divides not
    all widths.
    """

    paper: ClassVar[str] = "Wu et al. 2022, arXiv 2204.04497"
    sites: ClassVar[tuple[str, ...]] = ("input", "decoder", "layers", "kv")
    sees_input: ClassVar[bool] = True
    groups: ClassVar[Mapping[str, ParamGroup]] = {
        "prompt": ParamGroup(("bias.",)),
        # What W2 makes is added to prompts, so its numbers grow with the embeddings; the others are numbers around one.
        "output": ParamGroup(("up.",), rate=1e-2),
        "hidden": ParamGroup(("down.", "hidden.", "rules.", "down_rules.", "up_rules."), unit="one", rate=1e-3),
    }

    bias: nn.ParameterList

    @dataclass(frozen=True)
    class Config:
        """kind: S, M or L; auto is M where a site has layers of one width, else S.

        generator: `linear`, `dnn`, or `phm` with n = `phm`, `shared`: W1 and W2 have the same matrices A. hidden: m;
        None is the paper's 256 in kind S and 16 in the others. encoder: `static`, the mean of the text's word
        embeddings; `backbone`, a state of the frozen model, read without a prompt; `minilm`, all-MiniLM-L6-v2. pool:
        which of the backbone's states; auto is the last in causal models, the first in encoders that put a token
        there, else the mean. cache: of the backbone, read each text alone and once. normalize: divide M(x) by its rms.
        dropout: on M(x) and the hidden units, in training. start: `zero`, W2 = 0, so that training begins at
        `start.prompt` itself, or `normal`, W2 drawn as the rest is, with deviation `spread`.
        """

        kind: str = "auto"
        generator: str = "phm"
        hidden: int | None = None
        phm: int = 16
        shared: bool = False
        encoder: str = "backbone"
        pool: str = "auto"
        cache: bool = False
        normalize: bool = True
        dropout: float = 0.1
        start: str = "zero"
        spread: float = 0.05

        def __post_init__(self) -> None:
            for name, possible in POSSIBLE.items():
                if getattr(self, name) not in possible:
                    raise ValueError(f"{name} '{getattr(self, name)}' is unknown; possible: {', '.join(possible)}")
            for name in ("hidden", "phm"):
                count = getattr(self, name)
                if not (isinstance(count, int) and count >= 1) and not (name == "hidden" and count is None):
                    raise ValueError(f"{name} must be a whole number from 1 on, given {count!r}")
            for name, most in (("dropout", 1.0), ("spread", math.inf)):
                value = getattr(self, name)
                if not isinstance(value, int | float) or not 0 <= value < most:
                    raise ValueError(f"{name} must be a number from 0 to below {most:g}, given {value!r}")
            if self.encoder != "backbone" and (self.pool != "auto" or self.cache):
                raise ValueError(f"pool and cache are for encoder backbone, not {self.encoder}; leave them out")

    @staticmethod
    def sentence_encoders(config: Config) -> tuple[str, ...]:
        """The encoders that must be loaded beside the backbone."""
        return ("minilm",) if config.encoder == "minilm" else ()

    def __init__(self, config: Config, slot: PromptSpec, start: PromptInit) -> None:
        super().__init__()
        self.slot, self.config = slot, config
        self.kind = _kind(config.kind, slot)
        parts = [_begin(config, slot, self.kind, start.prompt) for _ in slot.tasks]
        self.per_task = tuple(parts[0])
        for name in self.per_task:
            setattr(self, name, nn.ParameterList(part[name] for part in parts))

    def forward(self, context: Context) -> Prompt:
        """A prompt for each row, [B, P, D]; of the generators, those of tasks in the batch get a gradient.

        Raises PromptError where no row of a batch to learn from has text.
        """
        require_text(context)
        read = self._read(context)
        used = context.task_ids.unique().tolist()
        rows = [(context.task_ids == task).nonzero()[:, 0] for task in used]
        made = torch.cat([self._prompts(task, read[index]) for task, index in zip(used, rows, strict=True)])
        values = made[torch.cat(rows).argsort()]
        mask = torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)
        return Prompt(values, mask, torch.arange(len(values), device=values.device))

    def size(self) -> Tensor:
        """The root mean square of b2, to which what is made from a text is added."""
        return torch.stack(list(self.bias)).square().mean().sqrt()

    def _read(self, context: Context) -> Tensor:
        """M(x) of each row, [B, E]; of no text it is 0."""
        config, dtype = self.config, self.bias[0].dtype
        pool = self.slot.pool if config.pool == "auto" else config.pool
        if config.encoder == "static":
            found = pool_states(context.inputs_embeds.to(dtype), context.attention_mask, "mean")
        elif config.encoder == "backbone" and not config.cache:
            found = pool_states(context.encode().to(dtype), context.attention_mask, pool)
        else:
            name = config.encoder if config.encoder != "backbone" else f"backbone-{pool}"
            found = context.sentence_embedding(name).to(dtype)
        found = found.detach()
        return found / found.square().mean(1, keepdim=True).sqrt().clamp(min=1e-12) if config.normalize else found

    def _prompts(self, task: int, read: Tensor) -> Tensor:
        """The prompts [b, P, D] of one task's rows from their M(x) [b, E]."""
        inner = self._dropped(read)
        if self.config.generator != "linear":
            inner = self._dropped(
                functional.gelu(self._times("down", task, inner) + self._held("hidden", task)[:, None])
            )
        each = self._times("up", task, inner).unflatten(-1, (self.slot.length, -1))  # [G, b, P, w]
        if self.kind == "M":
            each = each.expand(len(self.slot.layers), -1, -1, -1)
        return each.permute(1, 2, 0, 3).flatten(2) + self.bias[task]

    def _dropped(self, values: Tensor) -> Tensor:
        return functional.dropout(values, self.config.dropout, self.training)

    def _times(self, name: str, task: int, values: Tensor) -> Tensor:
        """The weight called `name` times the rows of `values [b, in]` or `[G, b, in]`: [G, b, out]."""
        weight = self._held(name, task)
        if self.config.generator != "phm":
            return values @ weight.mT
        return phm(values, self._held("rules" if self.config.shared else f"{name}_rules", task), weight)

    def _held(self, name: str, task: int) -> Tensor:
        found: Tensor = getattr(self, name)[task]
        return found


def phm(values: Tensor, rules: Tensor, blocks: Tensor) -> Tensor:
    """The rows of `values` times W = Σ_i A_i ⊗ B_i, a parameterized hypercomplex multiplication, [G, b, out].

    values [b, in] or [G, b, in]; rules A [G, n, n, n]; blocks B [G, n, out/n, in/n] (section 3.2.2; Zhang et al. 2021,
    arXiv 2102.08597). W [out, in] is never made: a row as a matrix X [n, in/n] gives Σ_i A_i X B_iᵀ.
    """
    rows = values.unflatten(-1, (rules.shape[1], -1))
    rows = rows.expand(len(rules), *rows.shape[-3:])
    if blocks.shape[2] < blocks.shape[3]:  # whichever of the two products leaves less for the other comes first
        inner = torch.einsum("gbrs,giqs->gbriq", rows, blocks)
        found = torch.einsum("gipr,gbriq->gbpq", rules, inner)
    else:
        inner = torch.einsum("gipr,gbrs->gbpis", rules, rows)
        found = torch.einsum("gbpis,giqs->gbpq", inner, blocks)
    return found.flatten(2)


def _kind(kind: str, slot: PromptSpec) -> str:
    """S, M or L; raises ValueError for one that the site does not have."""
    if kind == "auto":
        return "M" if len(set(slot.layers)) == 1 else "S"
    if kind != "S" and not slot.layers:
        raise ValueError(
            f"kind {kind} has a prompt for every layer, and this site for one only; possible: S, or set prompt.site: "
            f"layers and prompt.mode: add"
        )
    if kind != "S" and len(set(slot.layers)) > 1:
        widths = ", ".join(map(str, sorted(set(slot.layers))))
        raise ValueError(f"kind {kind} needs layers of one width, and this site's are {widths} wide; possible: S")
    return kind


def _begin(config: Idpg.Config, slot: PromptSpec, kind: str, prompt: Tensor) -> dict[str, nn.Parameter]:
    """Where a task's generator begins: its parameters by name, with G generators, in kind L one for each layer."""
    known = {"static": slot.features, **slot.encoders}
    if config.encoder not in known:
        raise ValueError(f"encoder '{config.encoder}' is not here; possible: {', '.join(known)}")
    width = known[config.encoder]
    count = len(slot.layers) if kind == "L" else 1
    made = slot.length * (slot.width if kind == "S" else slot.layers[0])
    hidden = config.hidden or (256 if kind == "S" else 16)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(count, *shape) * config.spread

    found = {"bias": prompt.detach().clone().float()}
    if config.generator == "linear":
        found["up"] = drawn(made, width)
    elif config.generator == "dnn":
        found |= {"down": drawn(hidden, width), "hidden": drawn(hidden), "up": drawn(made, hidden)}
    else:
        n = config.phm
        _check_divides(n, {"the width of M(x)": width, "hidden": hidden, "what W2 makes": made})
        names = ("rules",) if config.shared else ("down_rules", "up_rules")
        found |= {"down": drawn(n, hidden // n, width // n), "hidden": drawn(hidden)}
        found |= {"up": drawn(n, made // n, hidden // n), **{name: drawn(n, n, n) for name in names}}
    if config.start == "zero":
        found["up"] = torch.zeros_like(found["up"])
    return {name: nn.Parameter(value) for name, value in found.items()}


def _check_divides(n: int, sizes: Mapping[str, int]) -> None:
    """Raise ValueError unless n divides all sizes, naming the first that it does not divide and what does."""
    for name, size in sizes.items():
        if size % n:
            common = math.gcd(*sizes.values())
            possible = ", ".join(str(i) for i in range(1, common + 1) if common % i == 0)
            raise ValueError(f"phm {n} does not divide {size}, {name}; possible: {possible}")
