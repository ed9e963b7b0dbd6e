"""The caches of keys and values in transformers: the one module that knows their names, classes and layers.

transformers 5.24 renamed the argument and the output field `past_key_values` to `cache`. The name is read from the
signature of the forward that gets the cache, never from a version number, so that no other name is ever passed.
"""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import GenerationMixin, PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    StaticCache,
)

from softprompts.errors import BackboneError

__all__ = [
    "CACHE_OPTIONS",
    "Cache",
    "DynamicCache",
    "EncoderDecoderCache",
    "StaticCache",
    "cache_argument",
    "generate_argument",
    "new_cache",
    "output_cache",
    "takes_cache",
    "unsupported_layers",
    "window_sizes",
]

NAMES = ("cache", "past_key_values")
"""The names of the cache in signatures and outputs, newest first."""

CACHE_OPTIONS = (*NAMES, "cache_params")
"""The options of `generate` that hand over a cache; `cache_params` is the name that models with a state used."""


def _name(forward: Callable[..., Any]) -> str | None:
    parameters = inspect.signature(forward).parameters
    return next((name for name in NAMES if name in parameters), None)


def takes_cache(module: nn.Module) -> bool:
    """Whether the forward of `module` takes a cache of keys and values."""
    return _name(type(module).forward) is not None


def cache_argument(module: nn.Module, cache: Cache) -> dict[str, Any]:
    """The keyword arguments with which `module` reads and extends `cache`.

    Args:
        module: A transformers model, a trunk or a decoder.
        cache: The cache that the call continues.

    Returns:
        Keyword arguments for the call of `module`, `use_cache=True` included.

    Raises:
        BackboneError: The forward of `module` takes no cache.
    """
    name = _name(type(module).forward)  # the class's own: a kernel may have replaced the instance's
    if name is None:
        raise BackboneError(f"{type(module).__name__} takes no cache of keys and values; use site 'input'")
    return {name: cache, "use_cache": True}


def generate_argument(cache: Cache) -> dict[str, Cache]:
    """The keyword argument with which transformers' `generate` continues `cache`."""
    name = _name(GenerationMixin.prepare_inputs_for_generation)
    assert name is not None, "transformers' generate takes no cache"
    return {name: cache}


def output_cache(output: Any) -> Cache | None:
    """The cache that a model's output holds; None where it holds none."""
    fields = vars(output)  # a look at the other name would warn
    return next((fields[name] for name in NAMES if name in fields), None)


def new_cache(config: PreTrainedConfig) -> DynamicCache:
    """An empty cache with the layer kinds of a model (sliding windows included), by the model's configuration."""
    return DynamicCache(config=config.get_text_config(decoder=True))


def unsupported_layers(cache: Cache) -> list[str]:
    """The sorted kinds of layers in `cache` that cannot hold a prompt's keys and values."""
    kinds = set(map(type, cache.layers)) - {DynamicLayer, DynamicSlidingWindowLayer}
    return sorted(kind.__name__ for kind in kinds)


def window_sizes(cache: Cache) -> tuple[int | None, ...]:
    """The number of tokens that each layer's window holds; None for a layer that sees everything."""
    return tuple(
        layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None for layer in cache.layers
    )
