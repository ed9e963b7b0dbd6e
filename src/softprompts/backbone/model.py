"""The frozen model: freezing, facts, fingerprint. `families` describes its kinds, `loading` loads it.

Supported transformers: 5.16 to 5.24, tested at both ends.
"""

import contextlib
import hashlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from softprompts.backbone.cache import (
    DynamicCache,
    EncoderDecoderCache,
    cache_argument,
    new_cache,
    takes_cache,
    unsupported_layers,
)
from softprompts.backbone.families import SEQ2SEQ, Family, family_of, head_of
from softprompts.backbone.kernels import Kernels, replace_forwards, use_kernels
from softprompts.backbone.quantization import quantization_kind
from softprompts.errors import BackboneError
from softprompts.types import Fingerprint


@dataclass(frozen=True)
class Backbone:
    """A frozen stock model with what the rest of the library needs to know about it.

    Attributes:
        model: The model of transformers, frozen.
        family: Its kind.
        head: lm, sequence, token, span or features.
        tokenizer: Its tokenizer; None: it has none.
        name: How messages and artifacts call it.
        revision: Branch, tag or commit that it was loaded from.
        kernels: With what it runs.
        facts: What a trial run showed, by name; it holds for this model with these kernels.
    """

    model: PreTrainedModel
    family: Family
    head: str
    tokenizer: Any = None
    name: str = ""
    revision: str | None = None
    kernels: Kernels = field(default_factory=Kernels)
    facts: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def config(self) -> PreTrainedConfig:
        """The text part of the model's configuration."""
        return self.model.config.get_text_config(decoder=True)

    @property
    def device(self) -> torch.device:
        """Where token ids must be: with the embeddings, or where accelerate brings these to."""
        device: torch.device = self.embedding.weight.device
        hook = getattr(self.embedding, "_hf_hook", None)  # accelerate's, in a model spread over devices
        execution_device = getattr(hook, "execution_device", None)
        if device.type == "meta" and execution_device is not None:
            return torch.device(execution_device)
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The floating point type of the embeddings, which the prompt is cast to."""
        return self.embedding.weight.dtype

    @cached_property
    def quantization(self) -> str | None:
        """How the layers' weights are quantized (int8, nf4, ...); None where they are not."""
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
        """Word embeddings as the model takes them as `inputs_embeds`: ids [...] -> [..., embedding_size]."""
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
        if limit is None:
            return None
        # RoBERTa and its kin start counting behind the padding index.
        counts_from_padding = "roberta" in config.model_type and config.pad_token_id is not None
        return int(limit) - (config.pad_token_id + 1 if counts_from_padding else 0)

    @cached_property
    def layers(self) -> nn.ModuleList:
        """The stack of layers a deep prompt enters: the encoder's, or the only one.

        Raises:
            BackboneError: The model shares one layer.
        """
        if self.family is SEQ2SEQ:
            count = self._first_setting("encoder_layers", "num_hidden_layers")
        else:
            count = getattr(self.config, "num_hidden_layers", None)
        return self._layer_stack(self.encoder, count)

    @cached_property
    def decoder_layers(self) -> nn.ModuleList:
        """The decoder's stack of layers; raises BackboneError as `layers` does."""
        if self.family is not SEQ2SEQ:
            return self.layers
        count = self._first_setting("decoder_layers", "num_decoder_layers", "num_hidden_layers")
        return self._layer_stack(self.decoder, count)

    def _first_setting(self, *names: str) -> int | None:
        """The first of these settings that the model's configuration has; families name the same thing differently."""
        for name in names:
            if value := getattr(self.model.config, name, None):
                return int(value)
        return None

    def _layer_stack(self, module: nn.Module, count: int | None) -> nn.ModuleList:
        for part in module.modules():
            if isinstance(part, nn.ModuleList) and len(part) == count:
                return part
        raise BackboneError(
            f"{type(self.model).__name__} has no stack of {count} separate layers (they share weights), "
            f"so site 'layers' is not possible; use site 'input'"
        )

    @cached_property
    def kv_shapes(self) -> tuple[tuple[int, int], ...]:
        """(kv_heads, head_dim) of the keys that each layer's cache holds, read off a run of one token."""
        layers = self.read_into_cache(torch.zeros(1, 1, dtype=torch.long, device=self.device))
        return tuple((layer.keys.shape[1], layer.keys.shape[3]) for layer in layers)

    def read_into_cache(self, ids: Tensor) -> list[Any]:
        """The layers of a new cache after the model has read `ids [1, P]`; a decoder's encoder reads the same words."""
        cache = self.new_cache()
        with torch.no_grad():
            if self.family is SEQ2SEQ:
                encoder_states = self.encoder(input_ids=ids).last_hidden_state
                arguments = cache_argument(self.decoder, EncoderDecoderCache(cache, self.new_cache()))
                self.decoder(input_ids=ids, encoder_hidden_states=encoder_states, **arguments)
            else:
                self.trunk(input_ids=ids, **cache_argument(self.trunk, cache))
        layers: list[Any] = cache.layers
        return layers

    def new_cache(self) -> DynamicCache:
        """An empty cache with the model's own layer kinds (sliding windows included)."""
        return new_cache(self.model.config)

    @cached_property
    def no_cache_reason(self) -> str | None:
        """Why rows cannot share the keys and values of a prompt; None where they can."""
        if not self.family.has_cache:
            return "an encoder's prompt sees the text"
        if any(getattr(m, "is_causal", None) is False and hasattr(m, "layer_idx") for m in self.trunk.modules()):
            return f"{type(self.model).__name__} attends in both directions, so its prompt sees the text"
        if not takes_cache(self.trunk) or self.model._is_stateful:
            return f"{type(self.model).__name__} keeps a state that is not a key-value cache"
        kinds = unsupported_layers(self.new_cache())
        if kinds:
            return f"{type(self.model).__name__} has cache layers of kind {', '.join(kinds)}"
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
        """Inside, the model runs with `kernels`; afterwards its modules are as before."""
        return use_kernels(self.model, self.kernels, self.facts)

    @contextlib.contextmanager
    def with_head(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, `tensors` replace the head's parameters of the same names; the model's own come back afterwards."""
        replaced: list[tuple[nn.Module, str, nn.Parameter | None]] = []
        try:
            for path, tensor in tensors.items():
                module_path, _, name = path.rpartition(".")
                module = self.model.get_submodule(module_path)
                replaced.append((module, name, module._parameters[name]))
                module._parameters[name] = tensor  # type: ignore[assignment]
            yield
        finally:
            for module, name, parameter in replaced:
                module._parameters[name] = parameter

    @contextlib.contextmanager
    def replay(self, output: Any) -> Iterator[None]:
        """Inside, the module below the head returns `output` instead of computing.

        So the stock head scores chosen positions, and no model's head is copied: soft caps, scales, biases and poolers
        stay the model's own.

        Raises:
            BackboneError: The model's head did not read the replayed output, so that its scores are of something else.
        """
        was_read = False

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal was_read
            was_read = True
            return output

        forwards = {self.decoder: forward}
        if hasattr(self.trunk, "decoder"):  # some causal models (OPT) call the decoder inside their trunk directly
            forwards[self.trunk.decoder] = forward
        with replace_forwards(forwards), self.with_kernels():
            yield
        if not was_read:
            raise BackboneError(f"the head of {type(self.model).__name__} does not read its trunk's output")


def freeze(model: PreTrainedModel) -> PreTrainedModel:
    """Put `model` in eval mode and stop all its gradients."""
    return model.eval().requires_grad_(False)


def wrap(
    model: PreTrainedModel, tokenizer: Any = None, name: str | None = None, revision: str | None = None
) -> Backbone:
    """A stock model as a frozen backbone; the model is frozen in place."""
    return Backbone(
        model=freeze(model),
        family=family_of(model),
        head=head_of(model),
        tokenizer=tokenizer,
        name=(model.config.name_or_path or "") if name is None else name,
        revision=revision,
    )


_ARCHITECTURE_SETTINGS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
)


def fingerprint(backbone: Backbone) -> Fingerprint:
    """What ties a prompt to these weights: architecture facts, tokenizer hash and a sketch [32, H].

    The sketch is the trunk's last hidden states of 32 fixed token ids, in float32 (encoder-decoder models: the
    decoder's, with the same ids in the encoder).
    """
    architecture = {name: getattr(backbone.config, name, None) for name in _ARCHITECTURE_SETTINGS}
    ids = ((torch.arange(32) * 1009 + 7) % backbone.config.vocab_size)[None].to(backbone.device)
    with torch.no_grad():
        if backbone.family is SEQ2SEQ:
            encoder_states = backbone.encoder(input_ids=ids).last_hidden_state
            sketch = backbone.decoder(input_ids=ids, encoder_hidden_states=encoder_states).last_hidden_state
        else:
            sketch = backbone.trunk(input_ids=ids).last_hidden_state
    dtype = backbone.quantization or str(backbone.dtype).removeprefix("torch.")
    return Fingerprint(
        architecture=architecture,
        tokenizer=_tokenizer_hash(backbone.tokenizer),
        sketch=sketch[0].float().cpu(),
        dtype=dtype,
    )


def _tokenizer_hash(tokenizer: Any) -> str | None:
    if tokenizer is None:
        return None
    digest = hashlib.sha256()
    for token, index in sorted(tokenizer.get_vocab().items()):
        digest.update(f"{token}\0{index}\0".encode())
    return digest.hexdigest()
