"""Golden: a prompt is computed once where the model has a cache, whatever name transformers gives that cache."""

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rows
import tiny
from rows import called
from softprompts import backbone as b
from softprompts import injection
from softprompts.backbone import cache
from softprompts.errors import BackboneError

pytestmark = pytest.mark.golden

PROMPT_LENGTH = 7
ENCODER = "concatenation: an encoder's prompt sees the text"
PATHS = {
    "gpt2": "packed",
    "llama": "packed",
    "qwen2": "packed",
    "qwen3": "packed",
    "mistral": "packed",
    "opt": "packed",
    "opt_projected": "packed",
    "gemma": "packed",
    "gemma2": "packed",
    "gemma3": "packed",
    "phi": "packed",
    "gpt_neox": "packed",
    "gptj": "shared" if "gptj" in rows.UNPACKED else "packed",  # packed since transformers 5.24
    "bloom": "shared",
    "falcon": "shared",
    "falcon_alibi": "shared",
    "mpt": "shared",
    "t5": ENCODER,
    "bart": ENCODER,
    "bert": ENCODER,
    "roberta": ENCODER,
    "albert": ENCODER,
    "distilbert": ENCODER,
    "modernbert": ENCODER,
}
"""The path that each family takes when nobody asks for one, at every site that it has."""


def positions_read(bb: b.Backbone, site: injection.Site) -> tuple[str, int]:
    """The path of one prompt for rows of 5, 9, 1 and 7 tokens, and how many positions the text's trunk computed."""
    name = bb.name
    positions = 0

    def count(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal positions
        tensor: Tensor | None = kwargs.get("inputs_embeds")
        tensor = kwargs["input_ids"] if tensor is None else tensor
        positions += tensor.shape[0] * tensor.shape[1]

    prompt = rows.single(rows.random(0, PROMPT_LENGTH, injection.prompt_width(bb, site)), len(rows.LENGTHS))
    batch = rows.batch(name, rows.texts(name))
    injection.why_not_packed(bb)  # tries the model on a few tokens
    handle = bb.encoder.register_forward_pre_hook(count, with_kwargs=True)
    try:
        with torch.no_grad():
            path = injection.run_trunk(bb, batch, prompt, site).path
    finally:
        handle.remove()
    return path, positions


def expected_positions(path: str, site: injection.Site) -> int:
    """The positions of U = 1 prompt and the texts, as each path computes them."""
    before = 0 if site.name in ("kv", "decoder") else PROMPT_LENGTH
    count, longest = len(rows.LENGTHS), max(rows.LENGTHS)
    if path == "packed":
        return before + sum(rows.LENGTHS)
    if path == "shared":
        return before + count * longest
    return count * (before + longest)


def test_every_family_is_in_the_table() -> None:
    assert PATHS.keys() == tiny.CONFIGS.keys()


@pytest.mark.parametrize(("name", "site"), rows.cases(tiny.ALL), ids=called)
def test_prompt_is_computed_once_where_the_model_has_a_cache(
    name: str, site: injection.Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(logging.Logger, "warning_once", lambda self, message, *more: lines.append(message))
    path, positions = positions_read(tiny.backbone(name), site)
    assert path == PATHS[name]
    assert positions == expected_positions(PATHS[name], site)
    assert [line for line in lines if "deprecated" in line] == []


@pytest.mark.parametrize("name", tiny.CAUSAL)
def test_prompts_are_read_before_any_text(name: str) -> None:
    """A prefix of keys and values is made once and reused; it is of the path that the family takes."""
    bb = tiny.backbone(name)
    prefix = injection.compute_prefix(bb, rows.single(rows.random(0, 3, bb.embedding_size)), rows.INPUT)
    assert prefix is not None
    assert prefix.path == PATHS[name]


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_a_wrong_name_would_switch_sharing_off(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above notice a cache that goes by a name which is not looked for."""
    monkeypatch.setattr(cache, "NAMES", ("key_value_store",))
    bb = b.wrap(tiny.model(name), name=name)
    path, positions = positions_read(bb, rows.INPUT)
    assert path == f"concatenation: {type(bb.model).__name__} keeps a state that is not a key-value cache"
    assert positions == expected_positions(path, rows.INPUT)
    assert positions > expected_positions(PATHS[name], rows.INPUT)
    with pytest.raises(BackboneError, match="site 'kv' needs a key-value cache, but"):
        injection.prompt_width(bb, rows.KV)
    with pytest.raises(BackboneError, match="takes no cache of keys and values; use site 'input'"):
        cache.cache_argument(bb.trunk, bb.new_cache())


@pytest.mark.parametrize("name", ["llama", "gptj", "t5", "bart"])
def test_names_of_argument_and_output_belong_together(name: str) -> None:
    """A model hands out the cache that it was given, under the name by which it took it."""
    bb = tiny.backbone(name)
    ids = rows.texts(name, (4,))[0][None]
    own = bb.new_cache()
    if name in tiny.SEQ2SEQ:
        pair = cache.EncoderDecoderCache(own, bb.new_cache())
        output = bb.model(input_ids=ids, decoder_input_ids=ids, **cache.cache_argument(bb.model, pair))
        assert cache.output_cache(output) is pair
    else:
        output = bb.model(input_ids=ids, **cache.cache_argument(bb.model, own))
        assert cache.output_cache(output) is own
    assert own.get_seq_length() == 4
    assert cache.cache_argument(bb.model, own).keys() == {*cache.generate_argument(own), "use_cache"}


def test_an_encoder_takes_and_gives_no_cache() -> None:
    bb = tiny.backbone("bert")
    assert not cache.takes_cache(tiny.backbone("distilbert").trunk)
    assert cache.output_cache(bb.trunk(input_ids=rows.ids(0, 3)[None])) is None


def test_no_other_module_knows_the_name() -> None:
    root = Path(__file__).parents[1]
    private = re.compile(r"past_key_values=|\.past_key_values|\btransformers\.cache_utils")
    allowed = {root / "src/softprompts/backbone/cache.py", root / "tests/test_layers.py", Path(__file__)}
    knowing = [
        str(path.relative_to(root))
        for folder in ("src", "tests", "benchmarks", "studies", "examples")
        for path in sorted((root / folder).rglob("*.py"))
        if path not in allowed and private.search(path.read_text(encoding="utf-8"))
    ]
    assert knowing == []
