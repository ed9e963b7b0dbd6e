"""A method as an artifact holds it, one task at a time; and from artifacts back to a method that answers."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from softprompts.artifacts.artifact import Artifact
from softprompts.errors import ArtifactError
from softprompts.methods import build, state_of
from softprompts.types import SOURCES, Context, Prompt, PromptInit, PromptSpec, in_mode, mix_prompts


def folded(method: Any, task: str) -> Tensor | None:
    """The plain prompt [P, D] of `task`, in float32 on the CPU; None where the method makes one from each text."""
    if not hasattr(method, "fold"):
        return None
    with torch.no_grad(), in_mode(method, False):
        found: Tensor = method.fold(task)
    return found.detach().float().cpu().clone()


def state(method: Any, task: str) -> dict[str, Tensor]:
    """What the method would hold if it had `task` alone, on the CPU."""
    return {name: value.detach().cpu().clone() for name, value in state_of(method, task).items()}


def plain(found: Artifact, origin: str | Path) -> Artifact:
    """The artifact's folded prompt as ordinary prompt tuning, to be trained on as such; its parent is the artifact.

    Raises ArtifactError where the prompt depends on the text.
    """
    prompt = found.matrix(origin)
    held = {"prompts.0": prompt.clone()}
    return replace(found, method="prompt-tuning", options={}, state=held, parents=(found.digest,))


def unchanged(before: Artifact, now: Artifact) -> bool:
    """Whether two artifacts answer alike: the same prompt, or without one the same state, and the same heads."""
    pairs = [(before.heads, now.heads)]
    if before.prompt is not None and now.prompt is not None:
        pairs.append(({"prompt": before.prompt}, {"prompt": now.prompt}))
    else:
        pairs.append((before.state, now.state))
    return all(a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in pairs)


def rebuilt(found: Artifact, slot: PromptSpec, origin: str | Path) -> Any:
    """The method of an artifact as it was saved, for the one task of `slot`; PEFT's starts at its prompt.

    Raises ConfigError for a method or options that are not known here, ArtifactError where the state does not fit.
    """
    start = found.initial if found.state and found.initial is not None else found.matrix(origin)
    method = build(found.method, found.options, slot, PromptInit(start, found.state.get(SOURCES)))
    if found.state:
        try:
            method.load_state_dict(dict(found.state))
        except RuntimeError as error:
            taught: tuple[str, ...] = getattr(method, "pretrained", ())
            if taught and {name.partition(".")[0] for name in found.state} <= set(taught):
                raise ArtifactError(
                    f"{origin} holds what pretraining taught method {found.method} and answers no task; train a run "
                    f"that begins with it (prompt.init.state)"
                ) from None
            told = " ".join(str(error).split())
            raise ArtifactError(f"{origin}: the tensors of method {found.method} do not fit: {told}") from None
    return method


def answering(found: Sequence[Artifact], slot: PromptSpec, origins: Sequence[str | Path]) -> Any:
    """A method that answers as the artifacts do, which are all of one method; task i of `slot` is artifact i.

    Raises as `rebuilt` does.
    """
    prompts = [one.prompt for one in found if one.prompt is not None]
    if len(prompts) == len(found):
        method = build("prompt-tuning", {}, slot, PromptInit(prompts[0]))
        with torch.no_grad():
            for parameter, prompt in zip(method.prompts, prompts, strict=True):
                parameter.copy_(prompt)
        return method
    parts = zip(found, slot.tasks, origins, strict=True)
    methods = [rebuilt(one, replace(slot, tasks=(task,)), origin) for one, task, origin in parts]
    return methods[0] if len(methods) == 1 else SideBySide(methods)


class SideBySide(nn.Module):
    """Methods of one task each in one batch: the prompts of task i's rows are made by `methods[i]`."""

    def __init__(self, methods: Sequence[nn.Module]) -> None:
        super().__init__()
        self.methods = nn.ModuleList(methods)
        self.eval()  # as its methods are: it only answers

    def forward(self, context: Context) -> Prompt:
        """The prompts of the batch's rows, whatever their tasks `[B]`."""
        used = context.task_ids.unique().tolist()
        rows = [(context.task_ids == task).nonzero()[:, 0] for task in used]
        made = [self.methods[task](_part(context, index)) for task, index in zip(used, rows, strict=True)]
        return mix_prompts(made, rows)


def _part(context: Context, rows: Tensor) -> Context:
    """What a method of one task may look at of `rows [R]`."""
    task, ids, embeds, mask = (
        context.task_ids[rows],
        context.input_ids[rows],
        context.inputs_embeds[rows],
        context.attention_mask[rows],
    )
    return Context(
        torch.zeros_like(task),
        ids,
        embeds,
        mask,
        lambda: context.encode()[rows],
        lambda name: context.sentence_embedding(name)[rows],
        None if context.instruction_mask is None else context.instruction_mask[rows],
    )
