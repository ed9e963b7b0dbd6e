"""An artifact to save, and what the tests of its files share."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from softprompts.artifacts import artifact as a
from softprompts.artifacts.artifact import Artifact
from softprompts.errors import ArtifactError
from softprompts.types import Fingerprint

P, D = 5, 8


def fingerprint(**changes: Any) -> Fingerprint:
    facts = {"model_type": "llama", "hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 4}
    generator = torch.Generator().manual_seed(1)
    sketch = torch.randn(32, D, generator=generator)
    return dataclasses.replace(Fingerprint(facts, "f00d", sketch, "float32"), **changes)


def example(**changes: Any) -> Artifact:
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randn(P, D, generator=generator)
    prompt[0, :4] = torch.tensor([-0.0, 1e-45, -1e-40, torch.finfo(torch.float32).max])
    values: dict[str, Any] = {
        "task": "sst2",
        "prompt": prompt,
        "initial": torch.randn(P, D, generator=generator),
        "method": "prompt-tuning",
        "options": {"dropout": 0.1, "names": ["b", "a"]},
        "state": {"weight": prompt.clone(), "half": torch.tensor([1.5, -0.0, float("nan")], dtype=torch.bfloat16)},
        "heads": {},
        "site": "input",
        "mode": "replace",
        "placement": "first",
        "family": "causal",
        "head": "lm",
        "backbone": "smollm2-135m",
        "revision": "main",
        "fingerprint": fingerprint(),
        "template": {"template": "{text} ⇒", "verbalizer": {"z": "gut", "a": "schlecht"}},
        "config": {"training": {"max_steps": 3, "max_grad_norm": None}},
        "scores": {"test": {"accuracy": 0.1 + 0.2}},
        "parents": ("a" * 64,),
        "version": "0.1.0",
    }
    return Artifact(**{**values, **changes})


def bits(value: Tensor) -> tuple[Any, ...]:
    return value.dtype, tuple(value.shape), value.contiguous().flatten().view(torch.uint8).tolist()


def assert_equal(left: Artifact, right: Artifact) -> None:
    for field in dataclasses.fields(Artifact):
        one, two = getattr(left, field.name), getattr(right, field.name)
        if field.name == "fingerprint" and one is not None:
            assert bits(one.sketch) == bits(two.sketch)
            one, two = (dataclasses.replace(value, sketch=None) for value in (one, two))
        if isinstance(one, Tensor):
            one, two = bits(one), bits(two)
        if field.name in ("state", "heads"):
            one, two = ({key: bits(value) for key, value in part.items()} for part in (one, two))
        assert one == two, field.name
    assert left.digest == right.digest


def edit(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in {**values, **changes}.items() if value is not Ellipsis}))


OLD_MANIFEST_KEYS = {"plain_prompt": "fixed", "placement": "place", "template": "format"}
OLD_TEMPLATE_KEYS = {"verbalizer": "verbaliser", "chat_placement": "chat_place"}


def write_as_format(path: Path, version: int) -> None:
    """Rewrite a manifest as `version` 1, 2 or 3 of the format wrote it."""
    values = json.loads(path.read_text())
    values["format_version"] = version
    values["template"] = {OLD_TEMPLATE_KEYS.get(key, key): value for key, value in values["template"].items()}
    values = {OLD_MANIFEST_KEYS.get(key, key): value for key, value in values.items()}
    for key, since in (("fixed", 2), ("segments", 3)):
        if version < since:
            del values[key]
    path.write_text(json.dumps(values))


def refused(directory: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        a.load(directory)
    message = str(caught.value)
    assert "\n" not in message
    return message


def trained(tuned: Tensor, initial: Tensor, /, **changes: Any) -> Artifact:
    """What prompt tuning leaves that went from `initial [P, D]` to `tuned [P, D]`."""
    return example(**{"prompt": tuned, "initial": initial, "state": {}, "options": {}, "parents": (), **changes})
