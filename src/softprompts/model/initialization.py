"""Where a prompt starts: random vectors, zeros, words, class labels or other artifacts, at any site.

A start from words is the frozen model's own result for those words at the site: their embeddings, their hidden
states at every layer, or their keys and values. So a prompt that starts from words begins exactly as those words.
"""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softprompts import errors
from softprompts.artifacts import artifact, collection, peft_files, vectors
from softprompts.artifacts.artifact import Artifact
from softprompts.artifacts.fingerprint import check_fingerprint, tensor_bytes
from softprompts.artifacts.vectors import similarity
from softprompts.artifacts.vectors.expression import read_expression
from softprompts.backbone import Backbone, fingerprint
from softprompts.config import InitConfig, closest
from softprompts.errors import ArtifactError, BackboneError, ConfigError
from softprompts.injection import Site
from softprompts.types import Fingerprint, PromptInit, PromptSpec

LABEL_POPULATION = 5000
"""Rows that no class label fills are drawn from the 5,000 most common tokens (Lester et al. 2021, section 3.2)."""


DRAWN = 1 << 40
"""Added to the seed of words that a method keeps for itself."""

READ = ("artifact", "mean", "multitask", "vector")
"""The kinds that are read from artifacts."""


def digest(init: PromptInit) -> str:
    """A digest of the tensors of a start."""
    tensors = (init.prompt, init.sources, *(init.factors or ()), *(init.state or {}).values())
    content = b"".join(tensor_bytes(tensor) for tensor in tensors if tensor is not None)
    return hashlib.sha256(content).hexdigest()


def initialize(
    config: InitConfig,
    backbone: Backbone,
    site: Site,
    spec: PromptSpec,
    *,
    seed: int = 0,
    labels: Sequence[str] = (),
    allow_other_weights: bool = False,
) -> PromptInit:
    """The start `[P, D]` that `config` describes, with sources `[S, P, D]` and a trained state where it names some.

    labels: the task's label words, for kind labels where the configuration names none.
    Raises BackboneError when words are needed and there is no tokenizer, when a text has no tokens, when more rows are
    wanted than there are words, and ArtifactError when another artifact does not fit.
    """
    seed = seed if config.seed is None else config.seed
    paths = {"artifact": (config.path or "",), "mean": config.paths}.get(config.kind, ())
    state = (config.state,) if config.state else ()
    read = _fitting(
        [(path, None) for path in (*paths, *config.sources, *state)], backbone, site, spec, allow_other_weights
    )
    sources = [source.require_prompt(path) for source, path in zip(read[len(paths) :], config.sources, strict=False)]
    prompts = [source.require_prompt(path).clone() for source, path in zip(read, paths, strict=False)]
    if config.kind == "artifact":
        init = PromptInit(prompts[0])
    elif config.kind == "mean":
        init = PromptInit(similarity.weighted_mean(prompts, config.weights))
    elif config.kind == "multitask":
        assert config.path is not None
        parts = _fitting(_parts(config.path), backbone, site, spec, allow_other_weights)
        init = replace(_from_multitask(config, config.path, parts), parents=tuple(source.digest for source in parts))
    elif config.kind == "vector":
        init = _from_vector(config, backbone, site, spec, seed, labels, allow_other_weights)
    else:
        init = PromptInit(_made(config, backbone, site, spec, torch.Generator().manual_seed(seed), labels))
    return replace(
        init,
        sources=torch.stack(sources) if sources else None,
        state=read[-1].state if state else None,
        draw=functools.partial(_draw, backbone, seed),
        parents=tuple(dict.fromkeys([*init.parents, *(source.digest for source in read)])),
    )


def _draw(backbone: Backbone, seed: int, count: int, population: int | None) -> Tensor:
    """Embeddings [count, H] of words that are drawn apart from those of the start, which has the same seed."""
    generator = torch.Generator().manual_seed(seed + DRAWN)
    return from_ids(backbone, Site(), sample_vocabulary(backbone, count, population, generator))


def _made(
    config: InitConfig,
    backbone: Backbone,
    site: Site,
    spec: PromptSpec,
    generator: torch.Generator,
    labels: Sequence[str],
) -> Tensor:
    """The start of the kinds that need no other artifact."""
    if config.kind == "random":
        return _random(config.distribution, backbone, site, spec, generator)
    if config.kind == "zeros":
        return torch.zeros(spec.length, spec.width)
    if config.kind == "text":
        return from_ids(backbone, site, text_ids(backbone.tokenizer, config.text or "", spec.length))
    if config.kind == "labels":
        words = config.labels or tuple(labels)
        return _from_labels(words, backbone, site, spec, config.population or LABEL_POPULATION, generator)
    return from_ids(backbone, site, sample_vocabulary(backbone, spec.length, config.population, generator))


def text_ids(tokenizer: Any, text: str, length: int, special: bool = False) -> Tensor:
    """Token ids [length] of `text`: cut where it is longer, repeated where it is shorter.

    special: keep the tokens that the tokenizer adds by itself (as PEFT's TEXT does).
    """
    if tokenizer is None:
        raise BackboneError("a start from words needs the model's tokenizer")
    ids = tokenizer(text, add_special_tokens=special)["input_ids"]
    if not ids:
        raise BackboneError(f"the start text {text!r} has no tokens; give some words")
    return torch.tensor((ids * -(-length // len(ids)))[:length])


def sample_vocabulary(backbone: Backbone, count: int, population: int | None, generator: torch.Generator) -> Tensor:
    """`count` different token ids drawn from the whole table, or from its `population` most common tokens.

    Vocabularies of trained tokenizers are ordered by frequency (merges, pieces), so the most common are the first.
    Special tokens are never drawn.
    """
    vocabulary = min(backbone.vocab_size, backbone.config.vocab_size)
    special = set() if backbone.tokenizer is None else set(backbone.tokenizer.all_special_ids)
    known = vocabulary if backbone.tokenizer is None else min(vocabulary, len(backbone.tokenizer))
    pool = torch.tensor([i for i in range(known) if i not in special])[:population]
    if count > len(pool):
        raise BackboneError(
            f"{count} different words are needed, but only {len(pool)} can be drawn; ask for fewer"
            + ("" if population is None or population >= known else f", or set a population above {population}")
        )
    return pool[torch.randperm(len(pool), generator=generator)[:count]]


def from_ids(backbone: Backbone, site: Site, ids: Tensor) -> Tensor:
    """The prompt `[P, D]` that does at `site` what the words `ids [P]` would do, in float32 on the CPU."""
    row = ids[None].to(backbone.device)
    with torch.no_grad():
        if site.at_decoder_input:
            embedded: Tensor = backbone.decoder.embed_tokens(row)[0]
            return embedded.float().cpu().clone()
        if site.at_embeddings:
            return backbone.embed(row)[0].float().cpu().clone()
        parts = _layer_inputs(backbone, site, row) if site.in_layers else _keys_and_values(backbone, row)
        return torch.cat([part.flatten(1) for part in parts], 1).float().cpu()


def _layer_inputs(backbone: Backbone, site: Site, ids: Tensor) -> list[Tensor]:
    """Each layer's input [P, H] when the model reads `ids [1, P]`; layer 0 takes the embeddings themselves."""
    inputs: list[Tensor] = []

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        inputs.append((args[0] if args else kwargs["hidden_states"])[0])

    handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in backbone.layers]
    try:
        backbone.encoder(input_ids=ids)
    finally:
        for handle in handles:
            handle.remove()
    embedded = backbone.embed(ids)[0]
    if site.mode == "add":  # what is added at layer 0 is carried on by the model itself
        return [embedded, *map(torch.zeros_like, inputs[1:])]
    return [embedded, *inputs[1:]]


def _keys_and_values(backbone: Backbone, ids: Tensor) -> list[Tensor]:
    """Each layer's keys and values [P, 2, heads, size] after reading `ids [1, P]`."""
    layers = backbone.read_into_cache(ids)
    if any(layer.keys.shape[2] != ids.shape[1] for layer in layers):
        raise BackboneError(
            f"a sliding window of {backbone.config.sliding_window} positions cannot hold {ids.shape[1]} prompt tokens; "
            f"choose a shorter prompt or site 'input'"
        )
    return [torch.stack([layer.keys[0], layer.values[0]]).permute(2, 0, 1, 3) for layer in layers]


def _random(distribution: str, backbone: Backbone, site: Site, spec: PromptSpec, generator: torch.Generator) -> Tensor:
    if distribution == "uniform":  # Lester et al. 2021, section 3.2; the released code draws from [0, 0.5) instead
        return torch.rand(spec.length, spec.width, generator=generator) - 0.5
    noise = torch.randn(spec.length, spec.width, generator=generator)
    if distribution == "normal":  # PEFT's start: about 50 times a Llama's embeddings
        return noise
    if site.at_embeddings:
        return noise * backbone.embedding_rms
    words = from_ids(backbone, site, sample_vocabulary(backbone, spec.length, None, generator))
    return noise * words.square().mean().sqrt()


def _from_labels(
    words: Sequence[str], backbone: Backbone, site: Site, spec: PromptSpec, population: int, generator: torch.Generator
) -> Tensor:
    """Row i is the mean of label i's piece embeddings; rows left over are common words (section 3.2 of the paper)."""
    if backbone.tokenizer is None or not words:
        raise BackboneError("a start from class labels needs label words (a verbalizer or init.labels) and a tokenizer")
    if len(words) > spec.length:
        raise BackboneError(
            f"{len(words)} labels do not fit into a prompt of {spec.length} tokens; lengthen the prompt or list fewer "
            f"words in init.labels"
        )
    if not site.at_embeddings:
        raise BackboneError(f"a start from class labels is for sites input and decoder, not {site.name}; use text")
    rows = []
    for word in words:
        ids = text_pieces(backbone.tokenizer, word)
        if not len(ids):
            raise BackboneError(f"the label word {word!r} has no tokens; name words in init.labels or the verbalizer")
        rows.append(from_ids(backbone, site, ids).mean(0, keepdim=True))
    filler = sample_vocabulary(backbone, spec.length - len(words), population, generator)
    if len(filler):
        rows.append(from_ids(backbone, site, filler))
    return torch.cat(rows)


def text_pieces(tokenizer: Any, text: str) -> Tensor:
    """All token ids of `text`, without special tokens."""
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])


def _fitting(
    places: Sequence[tuple[str | Path, int | None]],
    backbone: Backbone,
    site: Site,
    spec: PromptSpec,
    allow_other_weights: bool,
) -> list[Artifact]:
    """The artifacts in directories (and which of several there, or None).

    Raises ArtifactError unless they were made for these weights, this site and this shape.
    """
    every = [artifact.load(path, task) for path, task in places]
    weights = fingerprint(backbone) if places else None
    for (path, _), opened in zip(places, every, strict=True):
        assert weights is not None
        _check_fits(opened, path, weights, site, spec, allow_other_weights)
    return every


def _check_fits(
    opened: Artifact, path: str | Path, weights: Fingerprint, site: Site, spec: PromptSpec, allow_other_weights: bool
) -> None:
    try:
        check_fingerprint(opened.fingerprint, weights, allow_other_weights)
    except errors.WrongBackboneError as error:
        raise errors.WrongBackboneError(f"{path}: {error}") from None
    if opened.site != site.name or opened.shape != (spec.length, spec.width):
        raise ArtifactError(
            f"{path} holds a prompt of {list(opened.shape)} at site {opened.site}, but the run wants "
            f"[{spec.length}, {spec.width}] at site {site.name}; set prompt.num_virtual_tokens and prompt.site to match"
        )


def _from_vector(
    config: InitConfig,
    backbone: Backbone,
    site: Site,
    spec: PromptSpec,
    seed: int,
    labels: Sequence[str],
    allow_other_weights: bool,
) -> PromptInit:
    """A start plus a sum of task prompt vectors (Belanec et al. 2024, section 3)."""
    assert config.vector is not None
    total = read_expression(config.vector)
    _check_fits(total.reference, config.vector, fingerprint(backbone), site, spec, allow_other_weights)
    if config.start is not None:
        began = initialize(
            config.start, backbone, site, spec, seed=seed, labels=labels, allow_other_weights=allow_other_weights
        )
        return PromptInit(vectors.apply(total, began.prompt), parents=(*total.parents, *began.parents))
    advice = "set init.start, to which it is added, such as init.start: {kind: vocabulary}"
    common = vectors.require_common_start(total, advice, f"the sum '{config.vector}'")
    return PromptInit(vectors.apply(total, common), parents=total.parents)


def _from_multitask(config: InitConfig, path: str, artifacts: Sequence[Artifact]) -> PromptInit:
    """The shared prompt of source tasks, with their factors' average (Wang et al. 2023, section 3.2), one's, or ones.

    Columns and rows are averaged on their own; the average of their products would not be of the same rank.
    """
    states = {source.task: source.state for source in artifacts}
    for source in artifacts:
        if not set(peft_files.MULTITASK_STATE) <= set(states[source.task]):
            raise ArtifactError(
                f"{path}: the prompt of {source.task} was trained with {source.method}, which has no shared prompt and "
                f"factors; start from a multitask prompt, or use init kind 'artifact'"
            )
    prompt, columns, rows = peft_files.MULTITASK_STATE
    shared = next(iter(states.values()))[prompt]
    if any(not torch.equal(state[prompt], shared) for state in states.values()):
        raise ArtifactError(f"{path}: {', '.join(states)} do not share one prompt; they come from different runs")
    if config.factors == "ones":
        return PromptInit(shared.clone())
    if config.factors == "task":
        if config.task not in states:
            raise ConfigError(
                f"{path} has no source task '{config.task}'{closest(str(config.task), states)} tasks: "
                f"{', '.join(states)}"
            )
        states = {config.task: states[config.task]}
    factors = [torch.stack([state[name].double() for state in states.values()]) for name in (columns, rows)]
    return PromptInit(shared.clone(), factors=(factors[0].mean(0).float(), factors[1].mean(0).float()))


def _parts(path: str) -> list[tuple[str | Path, int | None]]:
    """The prompts in a directory: what a run of several tasks or a SoftPromptModel left, PEFT's, or a single one."""
    folders = sorted(entry.parent for entry in Path(path).glob(f"*/{artifact.MANIFEST}"))
    if folders and not (Path(path) / collection.INDEX).is_file():
        return [(folder, None) for folder in folders]
    members: list[tuple[str | Path, int | None]] = []
    for group in collection.member_groups(Path(path)):
        members.extend((member.path, member.task) for member in group)
    return members
