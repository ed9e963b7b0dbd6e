"""One pass of the frozen backbone over the rows of several runs, each of which then sees a step of its own rows."""

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from softprompts.backbone import Backbone
from softprompts.data import EncodedExample, collate
from softprompts.errors import ConfigError
from softprompts.injection import Site
from softprompts.model import SoftPromptModel
from softprompts.training.distillation import TeacherOutputs
from softprompts.types import IGNORE, Batch, Output, Prompt, Step, mix_prompts


def training_step(model: SoftPromptModel, batch: Batch) -> Step:
    """Run `batch` in training mode and give what objectives look at; its text is embedded once.

    Args:
        model: The model.
        batch: The rows; `task_ids` are places in the model's tasks.
    """
    if batch.inputs_embeds is None:
        batch = replace(batch, inputs_embeds=model.backbone.embed(batch.input_ids))
    prompt = model.make_prompts(batch, training=True)
    again = functools.partial(_again, model, batch)
    return Step(batch, prompt, again(prompt), again)


def _again(model: SoftPromptModel, batch: Batch, prompt: Prompt | None) -> Output:
    """The batch with another prompt; None: without one."""
    if prompt is not None:
        return model.score(batch, prompts=prompt)
    with model.no_prompt():
        return model.score(batch)


def check_together(runs: Sequence[tuple[SoftPromptModel, Sequence[str]]], names: Sequence[str]) -> None:
    """Raise ConfigError, naming what differs, unless the rows of all runs can share the batches of one model.

    Args:
        runs: The model and the prompts of each run.
        names: What the runs are called.
    """
    first, prompts = runs[0]
    site = first.registry.site_of(prompts)
    for (model, own), name in zip(runs, names, strict=True):
        other = f"runs '{names[0]}' and '{name}'"
        if model is not first:
            raise ConfigError(
                f"{other} have models of their own ({first.backbone.name}, {model.backbone.name}): runs that "
                f"train together are prompts of one model, which is loaded once; train these one after the other"
            )
        theirs = model.registry.site_of(own)
        for fact in ("name", "mode", "place"):
            one, two = getattr(site, fact), getattr(theirs, fact)
            if one != two:
                raise ConfigError(
                    f"{other} differ in the {'name' if fact == 'name' else fact} of their site ({one}, {two}): runs "
                    f"that train together share the site; train these one after the other"
                )
        if len(runs) > 1 and any(model.registry.head(prompt) for prompt in own):
            raise ConfigError(
                f"run '{name}' trains a classification head of its own, and a batch is read with one head; train such "
                f"runs one after the other, or use model.head: lm"
            )


def task_batch(model: SoftPromptModel, prompts: Sequence[str], rows: Sequence[EncodedExample], pad: int) -> Batch:
    """Rows whose task numbers count `prompts` as a batch whose `task_ids` are places in the model's tasks."""
    places = torch.tensor([model.index(name) for name in prompts])
    batch = collate(rows, pad)
    return replace(batch, task_ids=places[batch.task_ids])


def joint_steps(
    model: SoftPromptModel,
    prompts: Sequence[Sequence[str]],
    rows: Sequence[Sequence[EncodedExample]],
    seeds: Sequence[int],
    pad: int,
    targets: Sequence[TeacherOutputs | None] | None = None,
) -> list[Step]:
    """The training step of each run on its own `rows`, from one pass over the rows of all.

    Every run's prompts, batch and output are those it would have alone; only `again` of a step runs that run's rows
    alone.

    Args:
        model: The model whose prompts the runs train.
        prompts: The prompts of each run, in the order that its rows' task numbers count.
        rows: The rows of each run.
        seeds: Of the random stream that each run's methods draw from.
        pad: The token id of padding.
        targets: The teachers of each run, None where it has none.
    """
    targets = targets or [None] * len(prompts)
    sizes, device = [len(part) for part in rows], model.device
    alone = [task_batch(model, names, part, pad) for names, part in zip(prompts, rows, strict=True)]
    whole = alone[0]
    if len(rows) > 1:
        every = [row for part in rows for row in part]
        whole = replace(collate(every, pad), task_ids=torch.cat([batch.task_ids for batch in alone]))
    whole = whole.to(device)
    whole = replace(whole, inputs_embeds=model.backbone.embed(whole.input_ids))
    batches = [whole] if len(rows) == 1 else [_own(batch, whole, i, sizes) for i, batch in enumerate(alone)]
    made: list[Prompt] = []
    for batch, seed in zip(batches, seeds, strict=True):
        torch.manual_seed(seed)
        made.append(model.make_prompts(batch, training=True))
    together = made[0]
    if len(rows) > 1:
        together = mix_prompts(made, torch.arange(sum(sizes), device=device).split(sizes))
    taught = [one for one in targets if one is not None]
    layers = sorted({number for one in taught for number in one.numbers})
    outputs = split(model.score(whole, prompts=together, logits=True if taught else None, layers=layers), sizes)
    steps = []
    for batch, prompt, output, own, part in zip(batches, made, outputs, targets, rows, strict=True):
        again = functools.partial(_again, model, batch)
        if own is None:
            steps.append(Step(batch, prompt, output, again))
        else:
            steps.append(Step(batch, prompt, _asked(output, own), again, own.of(part, device)))
    return steps


def _asked(output: Output, targets: TeacherOutputs) -> Output:
    """The output with the layers that this run's teacher has, where other runs of the batch ask for others."""
    asked = {key: states for key, states in output.layer_states.items() if key in targets.layers}
    return replace(output, layer_states=asked)


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
    layers = {}
    for key, states in output.layer_states.items():
        layers[key] = states.split([int(counts.sum()) for counts in tokens[key[0]]])
    tensors = (output.logits, output.nll, output.labels, output.batch_rows, output.label_columns, output.label_states)
    each = map(scored, tensors)
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


def label_count(row: EncodedExample, backbone: Backbone, site: Site | None) -> int:
    """How many labels of a row count in its loss: its scored tokens, or one where the row has a single label.

    Args:
        row: The row.
        backbone: The model that scores it.
        site: Where its prompt enters; None: it has none.
    """
    if not isinstance(row.labels, list | tuple) or not all(isinstance(x, int) for x in row.labels):
        return 1
    labels = row.labels
    # Nothing scores the first token of a causal text that has no prompt state in front of it.
    before = row.prompt_offsets[0] if isinstance(row.prompt_offsets, tuple) else row.prompt_offsets
    first = site is None or not site.scores_first_token or bool(before)
    if backbone.head == "lm" and backbone.family.scores_next_token and first:
        labels = labels[1:]
    return sum(label != IGNORE for label in labels)
