"""One batch with the rows of several runs, which the frozen backbone reads in one pass."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from softprompts.backbone import Backbone
from softprompts.data.collation import collate
from softprompts.data.encoding import EncodedExample
from softprompts.errors import ConfigError
from softprompts.injection import Site
from softprompts.model import SoftPromptModel
from softprompts.types import IGNORE, Batch, Output, Prompt, Step, mix_prompts


@dataclass(frozen=True)
class SharedBatch:
    """The rows of several runs, one run behind the other, with the prompts of all.

    Attributes:
        batch: The rows of all runs, whose text is embedded once.
        prompt: The prompts of all runs.
        batches: The batch that each run would have alone.
        prompts: The prompts that each run would have alone.
    """

    batch: Batch
    prompt: Prompt
    batches: list[Batch]
    prompts: list[Prompt]

    @classmethod
    def of(
        cls,
        model: SoftPromptModel,
        prompts: Sequence[Sequence[str]],
        examples: Sequence[Sequence[EncodedExample]],
        seeds: Sequence[int],
    ) -> "SharedBatch":
        """Join the examples of several runs.

        Args:
            model: The model whose prompts the runs train.
            prompts: The prompts of each run, which the task numbers of its examples count.
            examples: The examples of each run.
            seeds: The seed of each run's random stream, from which its methods draw.
        """
        sizes = list(map(len, examples))
        alone = [prompt_batch(model, names, part) for names, part in zip(prompts, examples, strict=True)]
        whole = alone[0]
        if len(examples) > 1:
            whole = collate(list(itertools.chain(*examples)), pad_token(model.backbone)).to(model.device)
            whole = replace(whole, task_ids=torch.cat([batch.task_ids for batch in alone]))
        embeddings = model.backbone.embed(whole.input_ids)
        whole = replace(whole, inputs_embeds=embeddings)
        batches = [whole]
        if len(examples) > 1:
            batches = []
            for batch, part in zip(alone, embeddings.split(sizes), strict=True):
                batches.append(replace(batch, inputs_embeds=part[:, : batch.input_ids.shape[1]]))
        of_runs = []
        for batch, seed in zip(batches, seeds, strict=True):
            torch.manual_seed(seed)
            of_runs.append(model.make_prompts(batch, training=True))
        mixed = of_runs[0]
        if len(of_runs) > 1:
            mixed = mix_prompts(of_runs, torch.arange(sum(sizes), device=model.device).split(sizes))
        return cls(whole, mixed, batches, of_runs)

    def split(self, output: Output) -> list[Output]:
        """The output of each run."""
        return split_output(output, [len(batch.input_ids) for batch in self.batches])


def training_step(model: SoftPromptModel, batch: Batch) -> Step:
    """Score a batch in training mode, and give what objectives see; its text is embedded once.

    Args:
        model: The model.
        batch: The rows; `task_ids` [B] count the prompts of the model.
    """
    if batch.inputs_embeds is None:
        batch = replace(batch, inputs_embeds=model.backbone.embed(batch.input_ids))
    prompt = model.make_prompts(batch, training=True)
    return Step(batch, prompt, model.score(batch, prompts=prompt))


def prompt_batch(model: SoftPromptModel, prompts: Sequence[str], examples: Sequence[EncodedExample]) -> Batch:
    """The batch of examples whose task numbers count `prompts`, with `task_ids` that count all prompts of the model."""
    places = torch.tensor([model.index(name) for name in prompts])
    batch = collate(examples, pad_token(model.backbone))
    return replace(batch, task_ids=places[batch.task_ids]).to(model.device)


def pad_token(backbone: Backbone) -> int:
    """The id with which texts are padded; 0 where no tokenizer names one."""
    return 0 if backbone.tokenizer is None else backbone.tokenizer.pad_token_id or 0


def label_count(example: EncodedExample, backbone: Backbone, site: Site | None) -> int:
    """The number of labels of an example that its loss counts: its scored tokens, or 1 where it has a single label.

    Args:
        example: The example.
        backbone: The backbone that reads it.
        site: Where its prompt enters; None without a prompt.
    """
    labels = example.labels
    if not isinstance(labels, list | tuple) or not all(isinstance(label, int) for label in labels):
        return 1
    offsets = example.prompt_offsets
    tokens_before_prompt = offsets[0] if isinstance(offsets, tuple) else offsets
    # Nothing scores the first token of a causal text that has no prompt state in front of it.
    first_is_unscored = site is None or not site.scores_first_token or bool(tokens_before_prompt)
    if backbone.head == "lm" and backbone.family.scores_next_token and first_is_unscored:
        labels = labels[1:]
    return len(labels) - labels.count(IGNORE)


def check_shared_batch(model: SoftPromptModel, runs: Mapping[str, Sequence[str]]) -> None:
    """Check that the rows of all runs can be in one batch.

    Args:
        model: The model whose prompts the runs train.
        runs: The prompts of each run by its name.

    Raises:
        ConfigError: Two runs differ in their site, or one of several trains a classification head.
    """
    (first_name, first_prompts), *others = runs.items()
    for name, prompts in runs.items():
        if others and any(model.registry.head(prompt) for prompt in prompts):
            raise ConfigError(
                f"run '{name}' trains its own classification head, and a batch has one head; train such "
                f"runs one after the other, or use model.head: lm"
            )
    site = model.registry.site_of(first_prompts)
    for name, prompts in others:
        other = model.registry.site_of(prompts)
        for attribute in ("name", "mode", "placement"):
            expected, actual = getattr(site, attribute), getattr(other, attribute)
            if expected != actual:
                raise ConfigError(
                    f"runs '{first_name}' and '{name}' differ in the {attribute} of their site ({expected}, {actual}): "
                    f"runs that train together share the site; train these one after the other"
                )


def split_output(output: Output, sizes: Sequence[int]) -> list[Output]:
    """Split the output of a batch between runs.

    One `Tensor.split` hands out the scores, and its backward pass is one concatenation. Indexing would make a zero
    gradient as large as all scores for each run.

    Args:
        output: The output of a batch in which the rows of each run follow those of the run before it.
        sizes: The number of rows of each run.

    Returns:
        The output of each run, whose rows are counted from 0.
    """
    if len(sizes) == 1:
        return [output]
    ends = torch.tensor(sizes, device=output.batch_rows.device).cumsum(0)
    run_of_score = torch.bucketize(output.batch_rows, ends, right=True)
    counts = torch.bincount(run_of_score, minlength=len(sizes)).tolist()
    in_order = bool((run_of_score.diff() >= 0).all())
    order = None if in_order else run_of_score.argsort(stable=True)

    def split_scores(values: Tensor | None) -> Sequence[Tensor | None]:
        if values is None:
            return [None] * len(sizes)
        return (values if order is None else values[order]).split(counts)

    last = [None] * len(sizes) if output.last_state is None else output.last_state.split(list(sizes))
    tokens = {side: counts_of_rows.split(list(sizes)) for side, counts_of_rows in output.token_counts.items()}
    layers = {}
    for key, layer in output.layer_states.items():
        layers[key] = layer.split([int(counts_of_rows.sum()) for counts_of_rows in tokens[key[0]]])
    logits, nll, labels = split_scores(output.logits), split_scores(output.nll), split_scores(output.labels)
    rows, columns = split_scores(output.batch_rows), split_scores(output.label_columns)
    states = split_scores(output.label_states)
    outputs = []
    for index, first_row in enumerate([0, *ends[:-1].tolist()]):
        row = rows[index]
        assert row is not None
        outputs.append(
            Output(
                logits=logits[index],
                labels=labels[index],
                batch_rows=row - first_row,
                label_columns=columns[index],
                last_state=last[index],
                path=output.path,
                nll=nll[index],
                label_states=states[index],
                head=output.head,
                layer_states={key: parts[index] for key, parts in layers.items()},
                token_counts={side: parts[index] for side, parts in tokens.items()},
            )
        )
    return outputs
