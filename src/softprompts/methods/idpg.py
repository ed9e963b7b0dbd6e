"""IDPG (Wu, Wang, Gu et al. 2022, arXiv 2204.04497): a small generator makes each text's prompt from a vector of it."""

import math
from collections.abc import Mapping
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from softprompts.methods.base import MethodConfig, PromptMethod
from softprompts.methods.text import require_text
from softprompts.types import Context, ParamGroup, PromptInit, PromptSpec, pool_states


class Idpg(PromptMethod):
    """A prompt for each text, made by a small generator from a frozen encoder's vector of it.

    With M(x) [E] the text's vector, section 3.2 of the paper has the prompt `W2 GELU(W1 M(x) + b1) + b2`, W1 [m, E];
    `linear`: `W2 M(x) + b2`; `phm`: W1 and W2 are sums of Kronecker products (see `phm`). What W2 makes is [P, D] in
    kind S; [P, w] in kind M, the same for every layer's part w of D; in kind L each layer has its own generator.
    b2 [P, D] has a part for every layer. Each task has a generator to itself, and begins at b2 = `init.prompt`.

    Raises:
        ValueError: An encoder that is not here, a kind that the site does not have, or PHM's n does not divide a width.
    """

    paper: ClassVar[str] = "Wu et al. 2022, arXiv 2204.04497"
    input_dependent: ClassVar[bool] = True
    groups: ClassVar[Mapping[str, ParamGroup]] = {
        "prompt": ParamGroup(("bias",)),
        # What W2 makes is added to prompts, so its numbers grow with the embeddings; the others are numbers around one.
        "output": ParamGroup(("up",), rate=1e-2),
        "hidden": ParamGroup(("down", "hidden", "rules"), unit="one", rate=1e-3),
    }
    bias: nn.Parameter
    hidden: nn.Parameter

    class Config(MethodConfig):
        """The options of idpg."""

        kind: Literal["auto", "S", "M", "L"] = "auto"
        """What a generator makes: a prompt, one part for all layers, or a part for each layer.

        `auto` is M where a site has layers of one width, else S.
        """

        generator: Literal["linear", "dnn", "phm"] = "phm"
        """The network: one linear layer, two, or two made of Kronecker products."""

        hidden: int | None = Field(default=None, ge=1)
        """m, the hidden units; None is the paper's 256 in kind S and 16 in the others."""

        phm: int = Field(default=16, ge=1)
        """n, the number of Kronecker products of generator `phm`."""

        shared: bool = False
        """Whether W1 and W2 of generator `phm` have the same matrices A."""

        encoder: Literal["static", "backbone", "minilm"] = "backbone"
        """What reads the text.

        `static`: the mean of its word embeddings. `backbone`: a state of the frozen model, read without a prompt.
        `minilm`: all-MiniLM-L6-v2.
        """

        pool: Literal["auto", "first", "last", "mean"] = "auto"
        """Which of the backbone's states represents the text.

        `auto` is the last in causal models, the first in encoders that put a token there, else the mean.
        """

        cache: bool = False
        """Whether the backbone reads each text alone and once, and keeps its vector."""

        normalize: bool = True
        """Whether M(x) is divided by its root mean square."""

        dropout: float = Field(default=0.1, ge=0, lt=1)
        """The share of M(x) and of the hidden units that a training step leaves out."""

        start: Literal["zero", "normal"] = "zero"
        """How W2 begins: at zero, so that training begins at the start, or drawn as the other weights."""

        spread: float = Field(default=0.05, ge=0)
        """The standard deviation of what is drawn."""

        @model_validator(mode="after")
        def _backbone_options(self) -> Self:
            if self.encoder != "backbone" and (self.pool != "auto" or self.cache):
                raise ValueError(f"pool and cache are for encoder backbone, not {self.encoder}; leave them out")
            return self

    def __init__(self, config: Config, spec: PromptSpec, init: PromptInit, shared: nn.Module | None = None) -> None:
        super().__init__(config, spec, init, shared)
        self.config = config
        self.kind = _kind(config.kind, spec)
        for name, value in _begin(config, spec, self.kind, init.prompt).items():
            self.register_parameter(name, nn.Parameter(value))

    @classmethod
    def sentence_encoders(cls, config: Config) -> tuple[str, ...]:
        """The encoders that must be loaded beside the backbone."""
        return ("minilm",) if config.encoder == "minilm" else ()

    def forward(self, context: Context) -> Tensor:
        """A prompt for each row, [B, P, D].

        Raises:
            PromptError: No row of a batch to learn from has text.
        """
        require_text(context)
        inner = self._dropped(self._read(context))
        if self.config.generator != "linear":
            inner = self._dropped(functional.gelu(self._times("down", inner) + self.hidden[:, None]))
        each = self._times("up", inner).unflatten(-1, (self.spec.length, -1))  # [G, B, P, w]
        if self.kind == "M":
            each = each.expand(len(self.spec.layers), -1, -1, -1)
        return each.permute(1, 2, 0, 3).flatten(2) + self.bias

    def rms(self) -> Tensor:
        """The root mean square of b2, to which what is made from a text is added."""
        return self.bias.square().mean().sqrt()

    def _read(self, context: Context) -> Tensor:
        """M(x) of each row, [B, E]; of no text it is 0."""
        config, dtype = self.config, self.bias.dtype
        pool = self.spec.pool if config.pool == "auto" else config.pool
        if config.encoder == "static":
            vectors = pool_states(context.inputs_embeds.to(dtype), context.attention_mask, "mean")
        elif config.encoder == "backbone" and not config.cache:
            vectors = pool_states(context.encode().to(dtype), context.attention_mask, pool)
        else:
            name = config.encoder if config.encoder != "backbone" else f"backbone-{pool}"
            vectors = context.sentence_embedding(name).to(dtype)
        vectors = vectors.detach()
        if not config.normalize:
            return vectors
        return vectors / vectors.square().mean(1, keepdim=True).sqrt().clamp(min=1e-12)

    def _dropped(self, values: Tensor) -> Tensor:
        return functional.dropout(values, self.config.dropout, self.training)

    def _times(self, name: str, values: Tensor) -> Tensor:
        """The weight called `name` times the rows of `values [B, in]` or `[G, B, in]`: [G, B, out]."""
        weight: Tensor = getattr(self, name)
        if self.config.generator != "phm":
            return values @ weight.mT
        return phm(values, getattr(self, "rules" if self.config.shared else f"rules_{name}"), weight)


def phm(values: Tensor, rules: Tensor, blocks: Tensor) -> Tensor:
    """The rows of `values` times W = Σ_i A_i ⊗ B_i, a parameterized hypercomplex multiplication, [G, b, out].

    values [b, in] or [G, b, in]; rules A [G, n, n, n]; blocks B [G, n, out/n, in/n] (section 3.2.2; Zhang et al. 2021,
    arXiv 2102.08597). W [out, in] is never made: a row as a matrix X [n, in/n] gives Σ_i A_i X B_iᵀ.
    """
    rows = values.unflatten(-1, (rules.shape[1], -1))
    rows = rows.expand(len(rules), *rows.shape[-3:])
    if blocks.shape[2] < blocks.shape[3]:  # whichever of the two products leaves less for the other comes first
        inner = torch.einsum("gbrs,giqs->gbriq", rows, blocks)
        product = torch.einsum("gipr,gbriq->gbpq", rules, inner)
    else:
        inner = torch.einsum("gipr,gbrs->gbpis", rules, rows)
        product = torch.einsum("gbpis,giqs->gbpq", inner, blocks)
    return product.flatten(2)


def _kind(kind: str, spec: PromptSpec) -> str:
    """S, M or L; raises ValueError for one that the site does not have."""
    if kind == "auto":
        return "M" if len(set(spec.layers)) == 1 else "S"
    if kind != "S" and not spec.layers:
        raise ValueError(
            f"kind {kind} has a prompt for every layer, and this site for one only; possible: S, or set prompt.site: "
            f"layers and prompt.mode: add"
        )
    if kind != "S" and len(set(spec.layers)) > 1:
        widths = ", ".join(map(str, sorted(set(spec.layers))))
        raise ValueError(f"kind {kind} needs layers of one width, and this site's are {widths} wide; possible: S")
    return kind


def _begin(config: Idpg.Config, spec: PromptSpec, kind: str, prompt: Tensor) -> dict[str, Tensor]:
    """Where a generator begins: its parameters by name, with G generators, in kind L one for each layer."""
    known = {"static": spec.embedding_size, **spec.encoders}
    if config.encoder not in known:
        raise ValueError(f"encoder '{config.encoder}' is not available; possible: {', '.join(known)}")
    width = known[config.encoder]
    count = len(spec.layers) if kind == "L" else 1
    output_size = spec.length * (spec.width if kind == "S" else spec.layers[0])
    hidden = config.hidden or (256 if kind == "S" else 16)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(count, *shape) * config.spread

    start = {"bias": prompt.detach().clone().float()}
    if config.generator == "linear":
        start["up"] = drawn(output_size, width)
    elif config.generator == "dnn":
        start |= {"down": drawn(hidden, width), "hidden": drawn(hidden), "up": drawn(output_size, hidden)}
    else:
        n = config.phm
        _check_divides(n, {"the width of M(x)": width, "hidden": hidden, "what W2 makes": output_size})
        start |= {"down": drawn(n, hidden // n, width // n), "hidden": drawn(hidden)}
        start |= {"up": drawn(n, output_size // n, hidden // n)}
        for name in ("rules",) if config.shared else ("rules_down", "rules_up"):
            start[name] = drawn(n, n, n)
    if config.start == "zero":
        start["up"] = torch.zeros_like(start["up"])
    return start


def _check_divides(n: int, sizes: Mapping[str, int]) -> None:
    """Raise ValueError unless n divides all sizes, naming the first that it does not divide and what does."""
    for name, size in sizes.items():
        if size % n:
            common = math.gcd(*sizes.values())
            possible = ", ".join(str(i) for i in range(1, common + 1) if common % i == 0)
            raise ValueError(f"phm {n} does not divide {size}, {name}; possible: {possible}")
