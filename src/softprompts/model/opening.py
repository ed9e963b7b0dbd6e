"""From artifacts to what answers: their backbone, a learner and an encoder."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from softprompts import backbone, errors, injection
from softprompts.artifacts import artifact
from softprompts.artifacts.artifact import Artifact
from softprompts.config import EvaluateConfig, ModelConfig, parse
from softprompts.data import ExampleTokenizer, TaskTemplate
from softprompts.errors import ConfigError
from softprompts.injection import Site
from softprompts.methods import sentence_encoders
from softprompts.model import stored
from softprompts.model.learner import Learner
from softprompts.model.sentence_encoders import Sentences
from softprompts.recipes.run.prepare import SILENT, encoder_for, head_size, load_backbone


@dataclass(frozen=True)
class Opened:
    """Artifacts made ready to answer: a learner whose task i is artifact i, their encoder, and what was noticed."""

    learner: Learner
    encoder: ExampleTokenizer | None
    artifacts: tuple[Artifact, ...]
    warnings: tuple[str, ...]


def open_artifacts(
    paths: Sequence[str | Path],
    *,
    model: ModelConfig | None = None,
    allow_other_weights: bool = False,
    say: Callable[[str], None] = SILENT.log,
) -> Opened:
    """Load artifacts of one backbone, site and length, and the backbone itself.

    model: where the backbone is, when not where the artifact says (its head is the artifact's all the same).
    Raises ArtifactError, BackboneError, AssetError; ConfigError when the artifacts cannot stand in one batch.
    """
    found = tuple(artifact.load(path) for path in paths)
    first = found[0]
    for other, path in zip(found, paths, strict=True):
        facts = ("site", "mode", "place", "segments", "head", "method")
        differs = [f for f in facts if getattr(other, f) != getattr(first, f)]
        differs += (
            ["task format"] if {**(other.format or {}), "name": ""} != {**(first.format or {}), "name": ""} else []
        )
        if differs or other.shape != first.shape:
            raise ConfigError(f"{path} and {paths[0]} differ in {', '.join(differs) or 'shape'}: open them one by one")
    if len(found) > 1 and any(one.heads for one in found):
        raise ConfigError(
            "prompts with classification heads of their own cannot vote in one batch; open them one by one"
        )
    size = _head_rows(first)
    config = (model or ModelConfig(name=first.backbone, revision=first.revision)).model_copy(
        update={"head": first.head}
    )
    base = load_backbone(config, labels=size, say=say)
    now = backbone.fingerprint(base)
    warnings = [w for a in found for w in artifact.check_fingerprint(a.fingerprint, now, allow_other_weights)]
    site = Site(first.site, first.mode, first.place, first.segments)
    names = tuple(f"{i}:{a.task}" for i, a in enumerate(found))
    sentences = Sentences()
    made = [one for one in found if one.prompt is None]
    sentences.fetch({name for one in made for name in sentence_encoders(one.method, one.options)}, base, say)
    slot = injection.prompt_spec(base, site, names, first.shape[0], sentences.widths)
    if slot.width != first.shape[1]:
        raise errors.ArtifactError(
            f"{paths[0]}: prompt rows of width {first.shape[1]} do not fit site {site.name} of {base.name}, "
            f"which takes {slot.width}"
        )
    method = stored.answering(found, slot, paths)
    learner = Learner(base, site, slot, method.to(base.device).requires_grad_(False), None, sentences)
    if first.heads:
        learner = replace(learner, head={k: nn.Parameter(v, requires_grad=False) for k, v in first.heads.items()})
    encoder = None
    if first.format is not None:
        encoder = encoder_for(base, TaskTemplate.from_json(first.format), first.shape[0], place=first.place)
    return Opened(learner, encoder, found, tuple(dict.fromkeys(warnings)))


def _head_rows(one: Artifact) -> int | None:
    """Classes of the artifact's head: the task's, or, where none is stored, the rows of its last weight."""
    if one.format is not None:
        return head_size(one.head, TaskTemplate.from_json(one.format))
    sizes: list[Tensor] = [v for k, v in one.heads.items() if k.endswith("weight")]
    return sizes[-1].shape[0] if sizes and one.head in ("sequence", "token") else None


def settings_of(one: Artifact, section: str) -> dict[str, Any]:
    """A section of the run that made the artifact, as it was resolved; empty where nothing usable is stored."""
    found = one.config.get(section)
    return dict(found) if isinstance(found, Mapping) else {}


def judging_of(one: Artifact, **changes: Any) -> EvaluateConfig:
    """How the run that made the artifact judged its answers, with the `changes` that are not None."""
    given = {key: value for key, value in changes.items() if value is not None}
    config: EvaluateConfig = parse({**settings_of(one, "evaluate"), **given}, EvaluateConfig, "evaluate")
    return config
