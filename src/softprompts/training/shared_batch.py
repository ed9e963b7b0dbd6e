"""One pass of the frozen backbone over the rows of several runs, each of which then sees a step of its own rows."""

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from softprompts.data import EncodedExample, collate
from softprompts.errors import ConfigError
from softprompts.model.learner import Learner
from softprompts.training.distillation import TeacherOutputs
from softprompts.types import IGNORE, Batch, Output, Prompt, Step, mix_prompts


def check_together(learners: Sequence[Learner], names: Sequence[str]) -> None:
    """Raise ConfigError, naming what differs, unless the learners' rows can stand in one batch of one backbone."""
    first = learners[0]
    for learner, name in zip(learners, names, strict=True):
        other = f"runs '{names[0]}' and '{name}'"
        if learner.backbone is not first.backbone:
            raise ConfigError(
                f"{other} have backbones of their own ({first.backbone.name}, {learner.backbone.name}): runs that "
                f"train together share one that is loaded once; train these one after the other"
            )
        for fact in ("name", "mode", "place"):
            one, two = getattr(first.site, fact), getattr(learner.site, fact)
            if one != two:
                raise ConfigError(
                    f"{other} differ in the {'name' if fact == 'name' else fact} of their site ({one}, {two}): runs "
                    f"that train together share the site; train these one after the other"
                )
        if learner.head and len(learners) > 1:
            raise ConfigError(
                f"run '{name}' trains a classification head of its own, and a batch is read with one head; train such "
                f"runs one after the other, or use model.head: lm"
            )


def joint_steps(
    learners: Sequence[Learner],
    rows: Sequence[Sequence[EncodedExample]],
    seeds: Sequence[int],
    pad: int,
    targets: Sequence[TeacherOutputs | None] | None = None,
) -> list[Step]:
    """The training step of each learner on its own `rows`, from one pass over the rows of all.

    seeds: of the random stream that each method draws from; targets: of the learners that have a teacher. Every
    learner's method, batch and output are those it would have alone; only `again` of a step runs that learner's rows
    alone.
    """
    targets = targets or [None] * len(learners)
    backbone, sizes = learners[0].backbone, [len(part) for part in rows]
    whole = collate([row for part in rows for row in part], pad).to(backbone.device)
    whole = replace(whole, inputs_embeds=backbone.embed(whole.input_ids))
    batches = [whole] if len(rows) == 1 else [_own(collate(part, pad), whole, i, sizes) for i, part in enumerate(rows)]
    prompts: list[Prompt] = []
    for learner, batch, seed in zip(learners, batches, seeds, strict=True):
        torch.manual_seed(seed)
        prompt = learner.prompt(batch, training=True)
        assert prompt is not None
        prompts.append(prompt)
    together = prompts[0]
    if len(rows) > 1:
        together = mix_prompts(prompts, torch.arange(sum(sizes), device=backbone.device).split(sizes))
    taught = [one for one in targets if one is not None]
    layers = sorted({number for one in taught for number in one.numbers})
    outputs = split(learners[0].forward(whole, together, logits=True if taught else None, layers=layers), sizes)
    return [
        Step(
            batch,
            prompt,
            output if own is None else _asked(output, own),
            functools.partial(learner.forward, batch),
            None if own is None else own.of(part, backbone.device),
        )
        for learner, batch, prompt, output, own, part in zip(
            learners, batches, prompts, outputs, targets, rows, strict=True
        )
    ]


def _asked(output: Output, targets: TeacherOutputs) -> Output:
    """The output with the layers that this run's teacher has, where other runs of the batch ask for others."""
    return replace(
        output, layer_states={key: states for key, states in output.layer_states.items() if key in targets.layers}
    )


def _own(batch: Batch, whole: Batch, index: int, sizes: Sequence[int]) -> Batch:
    """A run's own batch, with its part of the text that was embedded for all."""
    assert whole.inputs_embeds is not None
    begin = sum(sizes[:index])
    return replace(
        batch.to(whole.input_ids.device),
        inputs_embeds=whole.inputs_embeds[begin : begin + sizes[index], : batch.input_ids.shape[1]],
    )


def split(output: Output, sizes: Sequence[int]) -> list[Output]:
    """The outputs of the runs whose rows stand one run behind the other in the batch, `sizes` rows each.

    Scores are handed out by one `Tensor.split`, whose backward pass is one concatenation: taking each run's by index
    would make a zero gradient as large as all scores for each of them.
    """
    if len(sizes) == 1:
        return [output]
    ends = torch.tensor(sizes, device=output.batch_rows.device).cumsum(0)
    run = torch.bucketize(output.batch_rows, ends, right=True)
    counts = torch.bincount(run, minlength=len(sizes)).tolist()
    order = None if bool((run.diff() >= 0).all()) else run.argsort(stable=True)

    def scored(values: Tensor | None) -> Sequence[Tensor | None]:
        """What has one value for each score."""
        if values is None:
            return [None] * len(sizes)
        return (values if order is None else values[order]).split(counts)

    begins = [0, *ends[:-1].tolist()]
    last = [None] * len(sizes) if output.last_state is None else output.last_state.split(list(sizes))
    tokens = {side: own.split(list(sizes)) for side, own in output.token_counts.items()}
    layers = {
        key: states.split([int(own.sum()) for own in tokens[key[0]]]) for key, states in output.layer_states.items()
    }
    each = map(
        scored, (output.logits, output.nll, output.labels, output.batch_rows, output.label_columns, output.label_states)
    )
    return [
        Output(
            logits,
            labels,
            row - begin,
            column,
            last_state=own,
            path=output.path,
            nll=nll,
            label_states=states,
            head=output.head,
            layer_states={key: parts[i] for key, parts in layers.items()},
            token_counts={side: parts[i] for side, parts in tokens.items()},
        )
        for i, (begin, own, logits, nll, labels, row, column, states) in enumerate(
            zip(begins, last, *each, strict=True)
        )
    ]


def label_count(row: EncodedExample, learner: Learner) -> int:
    """How many labels of a row count in its loss: its scored tokens, or one where the row has a single label."""
    if not isinstance(row.labels, list | tuple) or not all(isinstance(x, int) for x in row.labels):
        return 1
    labels = row.labels
    # Nothing scores the first token of a causal text that has no prompt state in front of it.
    before = row.prompt_offsets[0] if isinstance(row.prompt_offsets, tuple) else row.prompt_offsets
    first = learner.method is None or learner.site.name == "kv" or bool(before)
    if learner.backbone.head == "lm" and learner.backbone.family.scores_next_token and first:
        labels = labels[1:]
    return sum(label != IGNORE for label in labels)
