"""The frozen model: freezing, facts, fingerprint. Its kinds are rows of data in families.py, loading.py loads it.

Supported transformers: 5.16 to 5.23, tested at both ends.
"""

import contextlib
import hashlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from softprompts.backbone.families import CAUSAL, FAMILIES, MASKED, SEQ2SEQ, Family, family_of, head_of
from softprompts.backbone.kernels import Kernels, use_kernels
from softprompts.backbone.quantization import quantization_kind
from softprompts.errors import BackboneError
from softprompts.types import Fingerprint

__all__ = [
    "CAUSAL",
    "FAMILIES",
    "MASKED",
    "SEQ2SEQ",
    "Backbone",
    "Family",
    "family_of",
    "fingerprint",
    "freeze",
    "head_of",
    "wrap",
]


@dataclass(frozen=True)
class Backbone:
    """A frozen stock model with what the rest of the library needs to know about it."""

    model: PreTrainedModel
    family: Family
    head: str
    tokenizer: Any = None
    name: str = ""
    revision: str | None = None
    kernels: Kernels = field(default_factory=Kernels)
    facts: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)  # facts found out once

    @property
    def config(self) -> PreTrainedConfig:
        """The text part of the model's configuration."""
        return self.model.config.get_text_config(decoder=True)

    @property
    def device(self) -> torch.device:
        """Where token ids must be: with the embeddings, or where those are brought to when they are needed."""
        device: torch.device = self.embedding.weight.device
        hook = getattr(self.embedding, "_hf_hook", None)  # accelerate's, in a model spread over devices
        there = getattr(hook, "execution_device", None)
        return torch.device(there) if device.type == "meta" and there is not None else device

    @property
    def dtype(self) -> torch.dtype:
        """The floating point type of the embeddings, which the prompt is cast to."""
        return self.embedding.weight.dtype

    @cached_property
    def quantization(self) -> str | None:
        """How the layers' weights are quantized (int8, nf4, ...); None where they are plain numbers."""
        return quantization_kind(self.model)

    @cached_property
    def trunk(self) -> Any:
        """The module between embeddings and head (encoder-decoder models: it holds `encoder` and `decoder`)."""
        return self.model.base_model

    @property
    def embedding(self) -> Any:
        """The input embedding module."""
        return self.model.get_input_embeddings()

    @property
    def encoder(self) -> Any:
        """The module that reads the text: the encoder of encoder-decoder models, else the trunk."""
        return self.trunk.encoder if self.family is SEQ2SEQ else self.trunk

    @property
    def decoder(self) -> Any:
        """The decoder of an encoder-decoder model, else the trunk."""
        return self.trunk.decoder if self.family is SEQ2SEQ else self.trunk

    def embed(self, ids: Tensor) -> Tensor:
        """Word embeddings as the model's first layer gets them from `inputs_embeds`: ids [...] -> [..., features]."""
        return self.embedding(ids)

    @property
    def embedding_size(self) -> int:
        """Width of the input embeddings (not of the hidden states where a model projects them)."""
        return self.embed(torch.zeros(1, dtype=torch.long, device=self.device)).shape[-1]

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states between layers."""
        return int(self.config.hidden_size)

    @property
    def output_size(self) -> int:
        """Width of the last hidden states, which some models (OPT) project back to the embeddings' width."""
        return int(getattr(self.config, "word_embed_proj_dim", None) or self.hidden_size)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding table."""
        return int(self.embedding.weight.shape[0])

    @property
    def max_positions(self) -> int | None:
        """Most positions the model can take, prompt included; None where nothing bounds them (relative positions)."""
        config = self.model.config
        if config.model_type in ("t5", "mt5", "umt5", "longt5", "bloom"):
            return None
        limit = getattr(self.config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
        # RoBERTa and its kin start counting behind the padding index.
        offset = config.pad_token_id + 1 if "roberta" in config.model_type and config.pad_token_id is not None else 0
        return None if limit is None else int(limit) - offset

    @cached_property
    def layers(self) -> nn.ModuleList:
        """The stack of layers a deep prompt enters: the encoder's, or the only one.

        Raises BackboneError for models that share one layer.
        """
        config = self.config if self.family is not SEQ2SEQ else self.model.config
        count = getattr(config, "num_hidden_layers", None)
        if self.family is SEQ2SEQ:
            count = getattr(config, "encoder_layers", None) or count
        return self._stack(self.encoder, count)

    @cached_property
    def decoder_layers(self) -> nn.ModuleList:
        """The decoder's stack of layers; raises BackboneError as `layers` does."""
        if self.family is not SEQ2SEQ:
            return self.layers
        config = self.model.config
        names = ("decoder_layers", "num_decoder_layers", "num_hidden_layers")
        return self._stack(self.decoder, next(filter(None, (getattr(config, name, None) for name in names)), None))

    def _stack(self, module: nn.Module, count: int | None) -> nn.ModuleList:
        found = [m for m in module.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
        if not found:
            raise BackboneError(
                f"{type(self.model).__name__} has no stack of {count} layers of its own (it shares them), "
                f"so site 'layers' is not possible; use site 'input'"
            )
        return found[0]

    @cached_property
    def kv_shapes(self) -> tuple[tuple[int, int], ...]:
        """(heads, head width) of the keys that each layer's cache holds, read off a one-token run."""
        cache = self.new_cache()
        ids = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        with torch.no_grad():
            if self.family is SEQ2SEQ:
                state = self.encoder(input_ids=ids).last_hidden_state
                pair = transformers.EncoderDecoderCache(cache, self.new_cache())
                self.decoder(input_ids=ids, encoder_hidden_states=state, past_key_values=pair, use_cache=True)
            else:
                self.trunk(input_ids=ids, past_key_values=cache, use_cache=True)
        keys: list[Any] = [layer.keys for layer in cache.layers]  # type: ignore[union-attr]
        return tuple((k.shape[1], k.shape[3]) for k in keys)

    def new_cache(self) -> DynamicCache:
        """An empty cache with the model's own layer kinds (sliding windows included)."""
        return DynamicCache(config=self.model.config.get_text_config(decoder=True))

    @cached_property
    def no_cache_reason(self) -> str | None:
        """Why a prefix cannot be shared through a cache, or None where it can."""
        if not self.family.has_cache:
            return "an encoder's prompt sees the text"
        if any(getattr(m, "is_causal", None) is False and hasattr(m, "layer_idx") for m in self.trunk.modules()):
            return f"{type(self.model).__name__} looks both ways, so its prompt sees the text"
        if "past_key_values" not in self.trunk_arguments or self.model._is_stateful:
            return f"{type(self.model).__name__} keeps a state that is no key-value cache"
        kinds = {type(layer) for layer in self.new_cache().layers} - {DynamicLayer, DynamicSlidingWindowLayer}
        if kinds:
            return f"{type(self.model).__name__} has cache layers of kind {', '.join(k.__name__ for k in kinds)}"
        return None

    @cached_property
    def trunk_arguments(self) -> frozenset[str]:
        """Names that the trunk's forward takes."""
        return frozenset(inspect.signature(self.trunk.forward).parameters)

    @cached_property
    def embedding_rms(self) -> float:
        """Root mean square of all word embeddings, the unit of learning rates."""
        total = torch.zeros((), dtype=torch.float64)
        with torch.no_grad():
            for ids in torch.arange(self.vocab_size, device=self.device).split(4096):
                total += self.embed(ids).cpu().double().square().sum()  # not every device knows float64
        return float((total / (self.vocab_size * self.embedding_size)).sqrt())

    @cached_property
    def head_names(self) -> tuple[str, ...]:
        """Parameters of a classification head: what the model has outside its trunk; none for language models."""
        if self.head in ("lm", "features"):
            return ()
        inside = {"encoder", "decoder", "shared"} if self.trunk is self.model else {self.model.base_model_prefix}
        return tuple(name for name, _ in self.model.named_parameters() if name.split(".")[0] not in inside)

    def with_kernels(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the model runs with `kernels`; its own modules are as before afterwards."""
        return use_kernels(self.model, self.kernels, self.facts)

    @contextlib.contextmanager
    def with_head(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, the head's parameters named by `tensors` are those; the model's own come back afterwards."""
        owners = [(self.model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in tensors]
        own = [owner._parameters[name] for owner, name in owners]
        try:
            for (owner, name), tensor in zip(owners, tensors.values(), strict=True):
                owner._parameters[name] = tensor  # type: ignore[assignment]
            yield
        finally:
            for (owner, name), parameter in zip(owners, own, strict=True):
                owner._parameters[name] = parameter

    @contextlib.contextmanager
    def replay(self, output: Any) -> Iterator[None]:
        """Inside, the module below the head answers with `output` instead of computing.

        This is how the stock head is applied to chosen positions without copying any model's head: soft caps, scales,
        biases and poolers stay the model's own.
        Raises BackboneError when the model's head went past the replayed output, so that scores are never silently
        of something else.
        """
        used = False

        def answer(*args: Any, **kwargs: Any) -> Any:
            nonlocal used
            used = True
            return output

        # Some causal models (OPT) call the decoder inside their trunk directly.
        modules = [self.decoder, *([self.trunk.decoder] if hasattr(self.trunk, "decoder") else [])]
        before = [module.__dict__.get("forward") for module in modules]
        for module in modules:
            module.forward = answer
        try:
            with self.with_kernels():
                yield
        finally:
            for module, own in zip(modules, before, strict=True):
                if own is None:
                    module.__dict__.pop("forward", None)
                else:
                    module.forward = own
        if not used:
            raise BackboneError(f"the head of {type(self.model).__name__} does not read its trunk's output")


def freeze(model: PreTrainedModel) -> PreTrainedModel:
    """Put `model` in eval mode and stop all its gradients."""
    return model.eval().requires_grad_(False)


def wrap(
    model: PreTrainedModel, tokenizer: Any = None, name: str | None = None, revision: str | None = None
) -> Backbone:
    """A stock model as a frozen backbone; the model is frozen in place."""
    return Backbone(
        freeze(model),
        family_of(model),
        head_of(model),
        tokenizer,
        (model.config.name_or_path or "") if name is None else name,
        revision,
    )


_FACTS = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")


def fingerprint(backbone: Backbone) -> Fingerprint:
    """What ties a prompt to these weights: architecture facts, tokenizer hash and a sketch [32, H].

    The sketch is the trunk's last hidden states of 32 fixed token ids (encoder-decoder models: the decoder's, having
    read the same ids in the encoder), in float32.
    """
    facts = {key: getattr(backbone.config, key, None) for key in _FACTS}
    ids = ((torch.arange(32) * 1009 + 7) % backbone.config.vocab_size)[None].to(backbone.device)
    with torch.no_grad():
        if backbone.family is SEQ2SEQ:
            state = backbone.encoder(input_ids=ids).last_hidden_state
            sketch = backbone.decoder(input_ids=ids, encoder_hidden_states=state).last_hidden_state
        else:
            sketch = backbone.trunk(input_ids=ids).last_hidden_state
    dtype = backbone.quantization or str(backbone.dtype).removeprefix("torch.")
    return Fingerprint(facts, _tokenizer_hash(backbone.tokenizer), sketch[0].float().cpu(), dtype)


def _tokenizer_hash(tokenizer: Any) -> str | None:
    if tokenizer is None:
        return None
    digest = hashlib.sha256()
    for token, index in sorted(tokenizer.get_vocab().items()):
        digest.update(f"{token}\0{index}\0".encode())
    return digest.hexdigest()
