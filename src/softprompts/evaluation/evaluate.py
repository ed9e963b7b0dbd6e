"""Judging: answers by ranking label words, by generating, or by a classification head; then scores with intervals."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from softprompts import injection
from softprompts.artifacts.artifact import Artifact
from softprompts.config import EvaluationConfig, parse
from softprompts.data import (
    EncodedExample,
    ExampleTokenizer,
    Row,
    answer,
    classes,
    collate,
    decode_answer,
    evaluation_order,
)
from softprompts.data.spans import split_words
from softprompts.data.task import need_label
from softprompts.data.templates import label_names, need
from softprompts.errors import ConfigError
from softprompts.evaluation import metrics
from softprompts.injection import generation
from softprompts.model import SoftPromptModel
from softprompts.model.prefix_cache import PrefixCache
from softprompts.types import IGNORE, Batch

MAX_SPAN_TOKENS = 30
"""Tokens an extracted answer may have, as in SQuAD's baselines."""

CHUNK = 512
"""Rows that are encoded and sorted by length together when answers are streamed."""

MIN_ROWS_FOR_LEADING = 16
"""Rows below which it does not pay to look for tokens that all of them begin with."""

TOKENS, TOKENS_THERE, TOKENS_WRITTEN = 1024, 8192, 4096
"""Tokens of a batch, unless the configuration says otherwise: where full speed begins on a CPU and on accelerators, and
for writing, where every step is one token a row."""


@dataclass(frozen=True)
class Answer:
    """What a row was answered with: `value` (label, labels, number, tags or text; None where it was no legal answer),
    the generated `text`, and each label's log-probability (rank) or score (heads)."""

    value: Any
    text: str | None = None
    scores: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """Answers and references of the same rows, in order, and their scores by metric, the headline first."""

    answers: tuple[Answer, ...]
    references: tuple[Any, ...]
    scores: dict[str, metrics.Score]

    @property
    def headline(self) -> metrics.Score:
        """The first metric's score."""
        return next(iter(self.scores.values()))


Prompts = str | Sequence[str] | None
"""The prompt that answers; several that vote; None: the stock model."""


def evaluate(
    model: SoftPromptModel,
    rows: Sequence[Row],
    *,
    prompt: Prompts,
    encoder: ExampleTokenizer | None = None,
    config: EvaluationConfig | None = None,
    seed: int = 0,
    mapping: Mapping[str, str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Answer `rows` and score the answers.

    Args:
        model: The model that answers.
        rows: Rows of one task, with their labels.
        prompt: The prompt that answers, or several that vote on each row; None: the stock model without a prompt.
        encoder: What turns rows into tokens; None: the prompt's own template says it.
        config: How answers are made and scored.
        seed: Of the resampling behind the intervals.
        mapping: What the task's labels are called in `rows`, where these come from another data set (predictions are
            mapped after decoding and before the metric, as in the domain transfer of Lester et al. 2021, section 5).
        progress: Is called with the number of rows done.
    """
    config, mapping = config or EvaluationConfig(), mapping or {}
    encoder = encoder or _encoder_of(model, prompt)
    for label in mapping:
        need_label(encoder.template, label, "the mapped label")
    given: list[Answer] = []
    for one in answers(model, rows, prompt=prompt, encoder=encoder, config=config):
        given.append(one)
        if progress is not None:
            progress(len(given))
    predictions = [mapping.get(a.value, a.value) if isinstance(a.value, str) else a.value for a in given]
    golds = [reference(encoder, row, mapping) for row in rows]
    form = encoder.template
    names = form.metrics or metrics.default_metrics(form.kind)
    positive = mapping.get(form.positive, form.positive) if form.positive is not None else None
    scores = {
        name: metrics.score(
            name, predictions, golds, resamples=config.resamples, seed=seed, positive=positive, kind=form.kind
        )
        for name in names
    }
    return Evaluation(tuple(replace(a, value=p) for a, p in zip(given, predictions, strict=True)), tuple(golds), scores)


def answers(
    model: SoftPromptModel,
    rows: Iterable[Row],
    *,
    prompt: Prompts,
    encoder: ExampleTokenizer | None = None,
    config: EvaluationConfig | None = None,
) -> Iterator[Answer]:
    """The answer to each of `rows`, in order, with memory for a few batches only.

    Prompts that do not depend on the text are computed and read once.

    Args:
        model: The model that answers.
        rows: Taken as they are needed, at most a chunk of them ahead; where taking one fails, those before it are
            answered first.
        prompt: The prompt that answers; None: the stock model. Of several, all answer a row in one batch, and the
            majority's string is the answer; of several strings with as many votes, the one of the first prompt wins
            (Lester et al. 2021, section 6).
        encoder: What turns rows into tokens; None: the prompt's own template says it.
        config: How answers are made.
    """
    encoder = encoder or _encoder_of(model, prompt)
    names = () if prompt is None else (prompt,) if isinstance(prompt, str) else tuple(prompt)
    with torch.no_grad():
        cache = model.prefix_cache(names)
    for part in _chunks(rows):
        yield from _answers(cache, encoder, part, config or EvaluationConfig())


def evaluation_config(artifact: Artifact, **changes: Any) -> EvaluationConfig:
    """How the run that made an artifact evaluated its answers, with the `changes` that are not None."""
    given = {key: value for key, value in changes.items() if value is not None}
    config: EvaluationConfig = parse({**artifact.settings("evaluation"), **given}, EvaluationConfig, "evaluation")
    return config


def _encoder_of(model: SoftPromptModel, prompt: Prompts) -> ExampleTokenizer:
    name = prompt if isinstance(prompt, str) or prompt is None else prompt[0]
    if name is None:
        raise ConfigError("the stock model has no template of its own; give the encoder of a task")
    return model.example_tokenizer(name)


def _chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    part: list[Row] = []
    try:
        for row in rows:
            part.append(row)
            if len(part) == CHUNK:
                yield part
                part = []
    except Exception:
        if part:
            yield part
        raise
    if part:
        yield part


def reference(encoder: ExampleTokenizer, row: Row, mapping: Mapping[str, str] | None = None) -> Any:
    """What `row` should be answered with, in the form the metrics want it."""
    form = encoder.template
    need(form.label, row, "label", form.name)
    value = row[form.label]
    if form.kind == "regression":
        return float(value)
    if form.kind == "span" and isinstance(value, Mapping):
        return list(value.get("text", ()))
    if form.kind not in ("label", "multilabel", "tagging"):
        return answer(form, row)
    names = label_names(value, form.kind)
    for name in names if not mapping else ():
        need_label(form, name, "the row's label")
    return names[0] if form.kind == "label" else list(names)


def by_generation(encoder: ExampleTokenizer, config: EvaluationConfig) -> bool:
    """Whether answers are generated: asked for, or because there are no label words to rank."""
    if encoder.head != "lm":
        return False
    return config.by == "generate" or (config.by == "auto" and encoder.template.kind != "label")


def _answers(
    cache: PrefixCache, encoder: ExampleTokenizer, rows: Sequence[Row], config: EvaluationConfig
) -> list[Answer]:
    if by_generation(encoder, config):
        ask: Callable[..., list[Answer]] = _generated
    else:
        ask = _ranked if encoder.head == "lm" else _from_head
    places = [cache.model.index(name) for name in cache.names] or [0]
    asked = [(row, place) for row in rows for place in places]
    with torch.no_grad():
        each = ask(cache, encoder, asked, config)
    votes = len(places)
    if votes == 1:
        return each
    return [_elect(each[i : i + votes]) for i in range(0, len(each), votes)]


def _elect(ballots: Sequence[Answer]) -> Answer:
    # Votes are cast over strings, so lists of labels and numbers vote by their text.
    cast = [None if ballot.value is None else str(ballot.value) for ballot in ballots]
    return ballots[cast.index(metrics.majority_vote(cast))]


Asked = Sequence[tuple[Row, int]]  # rows with the prompt that answers each


def _batches(
    encoded: Sequence[EncodedExample],
    cache: PrefixCache,
    encoder: ExampleTokenizer,
    config: EvaluationConfig,
    more: int = 0,
    most: int = CHUNK,
) -> Iterator[tuple[list[int], Batch]]:
    """Batches of `encoded` in order of length, each with the indices of its rows.

    more: tokens that are read behind each text; most: rows that a batch may have, whatever the configuration says.
    """
    pad, device = encoder.tokenizer.pad_token_id or 0, cache.model.backbone.device
    usual = TOKENS_WRITTEN if by_generation(encoder, config) else TOKENS if device.type == "cpu" else TOKENS_THERE
    lengths = [len(row.input_ids) + more for row in encoded]
    for index in evaluation_order(lengths, max(1, min(config.batch_size, most)), config.batch_tokens or usual):
        yield index, collate([encoded[i] for i in index], pad).to(device)


def _texts(encoder: ExampleTokenizer, asked: Asked) -> list[EncodedExample]:
    """The rows without answers or labels; a row that several prompts answer is encoded once."""
    found: list[EncodedExample] = []
    for i, (row, task) in enumerate(asked):
        one = found[-1] if i and asked[i - 1][0] is row else replace(encoder.encode(row), labels=None)
        found.append(replace(one, task_id=task))
    return found


def _leading(cache: PrefixCache, encoded: list[EncodedExample]) -> tuple[tuple[int, ...], list[EncodedExample]]:
    """The tokens that all rows begin with, such as a template's words, where they can be read once; and the rest."""
    if not cache.reads_leading or len(encoded) < MIN_ROWS_FOR_LEADING or any(row.prompt_offsets for row in encoded):
        return (), encoded
    low, high = min(row.input_ids for row in encoded), max(row.input_ids for row in encoded)
    count = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    return tuple(low[:count]), [replace(row, input_ids=row.input_ids[count:], instruction_mask=None) for row in encoded]


def _ranked(cache: PrefixCache, encoder: ExampleTokenizer, asked: Asked, config: EvaluationConfig) -> list[Answer]:
    """The label whose words are most probable as a whole (rank classification)."""
    candidates = encoder.candidates()
    labels = list(candidates)
    rank = _continued if encoder.family == "causal" else _filled
    total = rank(cache, encoder, asked, candidates, config)
    if config.normalize:
        total = total / torch.tensor([len(candidates[label]) for label in labels])
    best = total.argmax(1).tolist()
    return [
        Answer(labels[b], scores=dict(zip(labels, row, strict=True)))
        for b, row in zip(best, total.tolist(), strict=True)
    ]


def _continued(
    cache: PrefixCache,
    encoder: ExampleTokenizer,
    asked: Asked,
    candidates: Mapping[str, list[int]],
    config: EvaluationConfig,
) -> Tensor:
    """The log-probability [rows, labels] of each label behind each text, of causal models: one pass for all labels."""
    model, answers = cache.model, list(candidates.values())
    total = torch.empty(len(asked), len(answers), dtype=torch.float64)
    leading, encoded = _leading(cache, _texts(encoder, asked))
    for index, batch in _batches(encoded, cache, encoder, config, more=len(injection.candidate_tree(answers).ids)):
        prompt, prefix = cache.prompts(batch, leading)
        found = injection.continuations(model.backbone, batch, prompt, cache.site, answers, prefix=prefix)
        total[torch.tensor(index)] = found.cpu()
    return total


def _filled(
    cache: PrefixCache,
    encoder: ExampleTokenizer,
    asked: Asked,
    candidates: Mapping[str, list[int]],
    config: EvaluationConfig,
) -> Tensor:
    """The same of encoder-decoder and masked models: labels of one token from one pass, a pass for each longer one."""
    labels = list(candidates)
    total = torch.full((len(asked), len(labels)), -torch.inf, dtype=torch.float64)
    single = [i for i, label in enumerate(labels) if len(candidates[label]) == 1]
    groups = ([single] if single else []) + [[i] for i in range(len(labels)) if i not in single]
    texts = _texts(encoder, asked) if encoder.family == "seq2seq" else []
    most = injection.LOGITS // cache.model.backbone.vocabulary
    for group in groups:
        label = labels[group[0]]
        if encoder.family == "seq2seq":
            encoded = [replace(text, labels=list(candidates[label])) for text in texts]
        else:  # in place of the mask tokens, whose number is the answer's
            word = (encoder.template.verbalizer or {})[label]
            encoded = [replace(encoder.encode(row, word), task_id=task) for row, task in asked]
        for index, batch in _batches(encoded, cache, encoder, config, most=most):
            output = cache.score(batch, logits=group is single)
            assert output.labels is not None
            if group is single:
                assert output.logits is not None
                chances = output.logits.float().log_softmax(-1).double()
                wanted = torch.tensor([candidates[labels[i]][0] for i in group], device=chances.device)
                # Not every row order is the batch's: output.row says which row a score belongs to.
                rows = torch.tensor(index)[output.row.cpu()]
                total[rows[:, None], torch.tensor(group)[None]] = chances[:, wanted].cpu()
            else:
                assert output.nll is not None
                summed = torch.zeros(len(index), dtype=torch.float64, device=output.nll.device)
                total[torch.tensor(index), group[0]] = summed.index_add(0, output.row, -output.nll.double()).cpu()
    return total


def _generated(cache: PrefixCache, encoder: ExampleTokenizer, asked: Asked, config: EvaluationConfig) -> list[Answer]:
    """What the model writes, greedily; only a string that is an answer of the task is a legal one."""
    found: list[Answer] = [Answer(None)] * len(asked)
    new_tokens = config.max_new_tokens
    if encoder.family == "causal":  # what is written takes positions too, at most half of them
        new_tokens = min(new_tokens, max(1, encoder.room // 2))
        encoder = replace(encoder, room=encoder.room - new_tokens)
    model, tokenizer = cache.model, encoder.tokenizer
    for index, batch in _batches(_texts(encoder, asked), cache, encoder, config, more=new_tokens):
        if encoder.family == "causal":  # the stock model (no prompt) continues only what is padded on the left
            left = batch.attention_mask.argsort(dim=1, stable=True)
            words = None if batch.instruction_mask is None else batch.instruction_mask.gather(1, left)
            batch = replace(
                batch,
                input_ids=batch.input_ids.gather(1, left),
                attention_mask=batch.attention_mask.gather(1, left),
                instruction_mask=words,
            )
        ids = generation.generate(
            model.backbone,
            batch,
            model.make_prompts(batch, training=False) if cache.names else None,
            cache.site,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        new = ids[:, batch.input_ids.shape[1] :] if encoder.family == "causal" else ids
        for i, text in zip(index, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
            found[i] = Answer(_parsed(encoder, text), text.strip())
    return found


def _parsed(encoder: ExampleTokenizer, text: str) -> Any:
    """A generated text in the form the metrics want it; None where it is no legal answer."""
    value = decode_answer(encoder.template, text)
    kind = encoder.template.kind
    if value is None:
        return None
    if kind == "regression":
        return float(value)
    if kind not in ("multilabel", "tagging"):
        return value
    return [part for part in value.split(", " if kind == "multilabel" else " ") if part]


def _from_head(cache: PrefixCache, encoder: ExampleTokenizer, asked: Asked, config: EvaluationConfig) -> list[Answer]:
    """What a classification head says."""
    found: list[Answer] = [Answer(None)] * len(asked)
    read = {"sequence": _classes, "token": _tags, "span": _span}[encoder.head]
    texts = _texts(encoder, asked)
    # The other heads look at every token of the text.
    leading, encoded = _leading(cache, texts) if encoder.head == "sequence" else ((), texts)
    for index, batch in _batches(encoded, cache, encoder, config):
        if encoder.head == "token":
            # Every text position is asked for by giving it a label; which one does not matter.
            batch = replace(
                batch, labels=torch.zeros_like(batch.input_ids).masked_fill(batch.attention_mask == 0, IGNORE)
            )
        output = cache.score(batch, leading)
        assert output.logits is not None
        rows = [asked[i][0] for i in index]
        for i, one in zip(index, read(encoder, rows, output.logits.float(), output.row), strict=True):
            found[i] = one
    return found


def _classes(encoder: ExampleTokenizer, rows: Sequence[Row], logits: Tensor, row: Tensor) -> list[Answer]:
    kind, names = encoder.template.kind, classes(encoder.template)
    if kind == "regression":
        return [Answer(value) for value in logits[:, 0].tolist()]
    chances = functional.logsigmoid(logits) if kind == "multilabel" else logits.log_softmax(-1)
    scores = [dict(zip(names, values, strict=True)) for values in chances.tolist()]
    if kind == "multilabel":
        chosen = [[n for n, on in zip(names, line, strict=True) if on] for line in (logits > 0).tolist()]
        return [Answer(value, scores=s) for value, s in zip(chosen, scores, strict=True)]
    return [Answer(names[best], scores=s) for best, s in zip(logits.argmax(1).tolist(), scores, strict=True)]


def _tags(encoder: ExampleTokenizer, rows: Sequence[Row], logits: Tensor, row: Tensor) -> list[Answer]:
    names, by_row = classes(encoder.template), defaultdict(list)
    for r, tag in zip(row.tolist(), logits.argmax(1).tolist(), strict=True):
        by_row[r].append(names[tag])
    found = []
    for i, one in enumerate(rows):
        # A word is what its first token says; words that were cut off, or that have no token, are illegal.
        tags = [by_row[i][at] if at >= 0 else None for at in encoder.first_tokens(one)]
        missing = len(split_words(one[encoder.template.columns[0]])) - len(tags)
        found.append(Answer([*tags, *[None] * missing]))
    return found


def _span(encoder: ExampleTokenizer, rows: Sequence[Row], logits: Tensor, row: Tensor) -> list[Answer]:
    starts, ends = logits.log_softmax(-1).view(2, len(rows), -1)
    both = starts[:, :, None] + ends[:, None, :]
    allowed = torch.ones(both.shape[1:], dtype=torch.bool, device=both.device).triu().tril(MAX_SPAN_TOKENS - 1)
    best = both.masked_fill(~allowed, -torch.inf).flatten(1).argmax(1)
    width = both.shape[2]
    return [
        Answer(encoder.decode_span(one, int(b) // width, int(b) % width)) for one, b in zip(rows, best, strict=True)
    ]
