"""The frozen model: loading, freezing, facts, fingerprint; its kinds are rows of data in families.py.

Supported transformers: 5.16 to 5.23, tested at both ends. This is the only user of the Auto classes, and the only
file that names a device.
"""

import contextlib
import hashlib
import inspect
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from softprompts.families import (
    CAUSAL,
    FAMILIES,
    MASKED,
    SEQ2SEQ,
    BackboneError,
    Family,
    family_of,
    family_of_config,
    head_of,
)
from softprompts.prompt import Fingerprint

__all__ = [
    "CAUSAL",
    "FAMILIES",
    "MASKED",
    "SEQ2SEQ",
    "Backbone",
    "BackboneError",
    "Family",
    "choose_device",
    "choose_dtype",
    "choose_threads",
    "family_of",
    "fingerprint",
    "freeze",
    "head_of",
    "load",
    "load_tokenizer",
    "native_bf16",
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

    @property
    def config(self) -> PreTrainedConfig:
        """The text part of the model's configuration."""
        return self.model.config.get_text_config(decoder=True)

    @property
    def device(self) -> torch.device:
        """Where token ids must be."""
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The floating point type of the embeddings, which the prompt is cast to."""
        return self.embedding.weight.dtype

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
    def features(self) -> int:
        """Width of the input embeddings (not of the hidden states where a model projects them)."""
        return self.embed(torch.zeros(1, dtype=torch.long, device=self.device)).shape[-1]

    @property
    def hidden(self) -> int:
        """Width of the hidden states between layers."""
        return int(self.config.hidden_size)

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding table."""
        return int(self.embedding.weight.shape[0])

    @property
    def context(self) -> int | None:
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
        """The stack of layers a deep prompt enters.

        Raises BackboneError for models that share one layer.
        """
        config = self.config if self.family is not SEQ2SEQ else self.model.config
        count = getattr(config, "num_hidden_layers", None)
        if self.family is SEQ2SEQ:
            count = getattr(config, "encoder_layers", None) or count
        found = [m for m in self.encoder.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
        if not found:
            raise BackboneError(
                f"{type(self.model).__name__} has no stack of {count} layers of its own (it shares them), "
                f"so site 'layers' is not possible; use site 'input'"
            )
        return found[0]

    @cached_property
    def kv_shape(self) -> tuple[tuple[int, int], ...]:
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
    def no_cache_because(self) -> str | None:
        """Why a prefix cannot be shared through a cache, or None where it can."""
        if not self.family.caches:
            return "an encoder's prompt sees the text"
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
    def rms(self) -> float:
        """Root mean square of all word embeddings, the unit of learning rates."""
        total = torch.zeros((), dtype=torch.float64)
        with torch.no_grad():
            for ids in torch.arange(self.vocabulary, device=self.device).split(4096):
                total += self.embed(ids).double().square().sum().cpu()
        return float((total / (self.vocabulary * self.features)).sqrt())

    @cached_property
    def head_names(self) -> tuple[str, ...]:
        """Parameters of a classification head: what the model has outside its trunk; none for language models."""
        if self.head in ("lm", "features"):
            return ()
        inside = {"encoder", "decoder", "shared"} if self.trunk is self.model else {self.model.base_model_prefix}
        return tuple(name for name, _ in self.model.named_parameters() if name.split(".")[0] not in inside)

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


def load(
    name: str,
    *,
    path: str | Path | None = None,
    revision: str | None = None,
    head: str = "lm",
    dtype: str = "auto",
    device: str = "auto",
    attention: str | None = None,
    labels: int | None = None,
) -> Backbone:
    """The model and tokenizer at `path` (a directory or hub name; default `name`), frozen.

    head: which Auto class; labels: classes of a classification head. A head that the checkpoint does not hold starts
    from a fixed seed, so that a run is repeatable.
    Raises BackboneError when nothing can be loaded from there.
    """
    where = str(path or name)
    try:
        config = transformers.AutoConfig.from_pretrained(where, revision=revision)
        if labels is not None:
            config.num_labels = labels
        family = family_of_config(config)
        auto = getattr(transformers, family.auto[head])
        options = {} if attention is None else {"attn_implementation": attention}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = auto.from_pretrained(
                where, config=config, revision=revision, dtype=choose_dtype(dtype), use_safetensors=True, **options
            )
        tokenizer = transformers.AutoTokenizer.from_pretrained(where, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise BackboneError(
            f"cannot load '{where}': {' '.join(str(error).split())[:300]} Give a packaged model "
            f"(`softprompts assets list`), a local directory with config.json, model.safetensors and a tokenizer, "
            f"or a hub name that can be reached."
        ) from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return wrap(model.to(choose_device(device)), tokenizer, name, revision)


def load_tokenizer(name: str, options: Mapping[str, Any]) -> Any:
    """The tokenizer at `name`, a directory or hub name; raises BackboneError when there is none."""
    tokenizers: Any = transformers.AutoTokenizer
    try:
        return tokenizers.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise BackboneError(
            f"no tokenizer at '{name}': {' '.join(str(error).split())[:200]} Give a local directory or a hub name that "
            f"can be reached."
        ) from None


def choose_device(name: str) -> torch.device:
    """The device called `name`; auto is the first accelerator that torch sees, else the CPU.

    Raises BackboneError for a device this machine does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise BackboneError(f"device '{name}' cannot be used here: {str(error).splitlines()[0]}") from None


def native_bf16() -> bool:
    """Whether this machine multiplies bfloat16 matrices in hardware."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    facts: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(facts.get("avx512_bf16") or facts.get("amx_bf16") or facts.get("bf16"))


def choose_dtype(name: str) -> torch.dtype:
    """The torch dtype called `name`; auto is bfloat16 where it is native, else float32."""
    if name == "auto":
        return torch.bfloat16 if native_bf16() else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def choose_threads(threads: int | None) -> int:
    """Set and return torch's thread count; None keeps torch's own choice unless OMP_NUM_THREADS says otherwise."""
    if threads is None and "OMP_NUM_THREADS" not in os.environ:
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if threads is not None:
        torch.set_num_threads(threads)
    return torch.get_num_threads()


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
    dtype = str(backbone.dtype).removeprefix("torch.")
    return Fingerprint(facts, _tokenizer_hash(backbone.tokenizer), sketch[0].float().cpu(), dtype)


def _tokenizer_hash(tokenizer: Any) -> str | None:
    if tokenizer is None:
        return None
    digest = hashlib.sha256()
    for token, index in sorted(tokenizer.get_vocab().items()):
        digest.update(f"{token}\0{index}\0".encode())
    return digest.hexdigest()
