"""One batch with the rows of several runs, which the frozen backbone reads in one pass."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from softprompts.data import EncodedExample, collate
from softprompts.errors import ConfigError
from softprompts.model.learner import Learner
from softprompts.types import Batch, Output, Prompt, mix_prompts


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
        cls, learners: Sequence[Learner], examples: Sequence[Sequence[EncodedExample]], seeds: Sequence[int], pad: int
    ) -> "SharedBatch":
        """Join the examples of several runs.

        Args:
            learners: The learner of each run; all have the same backbone and site.
            examples: The examples of each run.
            seeds: The seed of each run's random stream, from which its method draws.
            pad: The id of the padding token.
        """
        backbone = learners[0].backbone
        sizes = [len(part) for part in examples]
        together = [example for part in examples for example in part]
        whole = collate(together, pad).to(backbone.device)
        embeddings = backbone.embed(whole.input_ids)
        whole = replace(whole, inputs_embeds=embeddings)
        batches = [whole]
        if len(examples) > 1:
            parts = zip(examples, embeddings.split(sizes), strict=True)
            batches = [_alone(part, pad, part_embeddings) for part, part_embeddings in parts]
        prompts = []
        for learner, batch, seed in zip(learners, batches, seeds, strict=True):
            torch.manual_seed(seed)
            prompt = learner.prompt(batch, training=True)
            assert prompt is not None
            prompts.append(prompt)
        mixed = prompts[0]
        if len(prompts) > 1:
            mixed = mix_prompts(prompts, torch.arange(sum(sizes), device=backbone.device).split(sizes))
        return cls(whole, mixed, batches, prompts)

    def split(self, output: Output) -> list[Output]:
        """The output of each run."""
        return split_output(output, [len(batch.input_ids) for batch in self.batches])


def _alone(examples: Sequence[EncodedExample], pad: int, embeddings: Tensor) -> Batch:
    """The batch of one run, with its part [B, T, H] of the text that was embedded for all."""
    batch = collate(examples, pad).to(embeddings.device)
    return replace(batch, inputs_embeds=embeddings[:, : batch.input_ids.shape[1]])


def check_shared_batch(learners: Mapping[str, Learner]) -> None:
    """Check that the rows of all learners can be in one batch of one backbone.

    Raises:
        ConfigError: Two learners differ in backbone or site, or one of several trains a classification head.
    """
    (first_name, first), *others = learners.items()
    for name, learner in learners.items():
        if learner.head and others:
            raise ConfigError(
                f"run '{name}' trains a classification head of its own, and a batch is read with one head; train such "
                f"runs one after the other, or use model.head: lm"
            )
    for name, learner in others:
        runs = f"runs '{first_name}' and '{name}'"
        if learner.backbone is not first.backbone:
            raise ConfigError(
                f"{runs} have backbones of their own ({first.backbone.name}, {learner.backbone.name}): runs that "
                f"train together share one that is loaded once; train these one after the other"
            )
        for attribute in ("name", "mode", "place"):
            expected, actual = getattr(first.site, attribute), getattr(learner.site, attribute)
            if expected != actual:
                raise ConfigError(
                    f"{runs} differ in the {attribute} of their site ({expected}, {actual}): runs that train together "
                    f"share the site; train these one after the other"
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
    ends = torch.tensor(sizes, device=output.row.device).cumsum(0)
    run_of_score = torch.bucketize(output.row, ends, right=True)
    counts = torch.bincount(run_of_score, minlength=len(sizes)).tolist()
    in_order = bool((run_of_score.diff() >= 0).all())
    order = None if in_order else run_of_score.argsort(stable=True)

    def split_scores(values: Tensor | None) -> Sequence[Tensor | None]:
        if values is None:
            return [None] * len(sizes)
        return (values if order is None else values[order]).split(counts)

    last = [None] * len(sizes) if output.last is None else output.last.split(list(sizes))
    tokens = {side: counts_of_rows.split(list(sizes)) for side, counts_of_rows in output.tokens.items()}
    layers = {}
    for key, layer in output.layers.items():
        layers[key] = layer.split([int(counts_of_rows.sum()) for counts_of_rows in tokens[key[0]]])
    logits, nll, labels = split_scores(output.logits), split_scores(output.nll), split_scores(output.labels)
    rows, columns, states = split_scores(output.row), split_scores(output.column), split_scores(output.states)
    outputs = []
    for index, first_row in enumerate([0, *ends[:-1].tolist()]):
        row = rows[index]
        assert row is not None
        outputs.append(
            Output(
                logits=logits[index],
                labels=labels[index],
                row=row - first_row,
                column=columns[index],
                last=last[index],
                path=output.path,
                nll=nll[index],
                states=states[index],
                scores=output.scores,
                layers={key: parts[index] for key, parts in layers.items()},
                tokens={side: parts[index] for side, parts in tokens.items()},
            )
        )
    return outputs
