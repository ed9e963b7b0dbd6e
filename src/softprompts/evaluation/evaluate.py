"""Evaluation: answers by ranking label words, by generating, or by a classification head; then scores."""

import itertools
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
    answer_text,
    classes,
    collate,
    decode_answer,
    evaluation_order,
)
from softprompts.data.task import require_label
from softprompts.data.templates import label_names, require_column, split_words
from softprompts.errors import ConfigError
from softprompts.evaluation import metrics
from softprompts.injection import continuations, generation
from softprompts.model import SoftPromptModel
from softprompts.model.prefix_cache import PrefixCache
from softprompts.types import IGNORE, Batch

MAX_SPAN_TOKENS = 30
"""Most tokens of an extracted answer, as in SQuAD's baselines."""

CHUNK = 512
"""Rows that are encoded and sorted by length together."""

MIN_ROWS_FOR_LEADING = 16
"""Fewest rows for which it pays to compute the tokens that all of them begin with only once."""

CPU_BATCH_TOKENS = 1024
"""Tokens of a batch on a CPU, unless the configuration sets them: where full speed begins."""

ACCELERATOR_BATCH_TOKENS = 8192
"""The same on an accelerator."""

GENERATION_BATCH_TOKENS = 4096
"""The same when answers are generated, where every step is one token a row."""


@dataclass(frozen=True)
class Answer:
    """The answer to a row.

    Attributes:
        value: A label, labels, a number, tags or a text; None where the output was no legal answer.
        text: The generated text.
        scores: The log-probability of each label (ranking) or its score (classification heads).
    """

    value: Any
    text: str | None = None
    scores: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """Answers and references of rows, in the order of the rows, and scores by metric, the headline first."""

    answers: tuple[Answer, ...]
    references: tuple[Any, ...]
    scores: dict[str, metrics.Score]

    @property
    def headline(self) -> metrics.Score:
        """The first metric's score."""
        return next(iter(self.scores.values()))


Prompts = str | Sequence[str] | None
"""The prompt that answers, or several that vote; None: the stock model."""


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
        encoder: Turns rows into tokens; None: by the prompt's own template.
        config: How rows are answered and answers scored.
        seed: Seed of the resampling behind the intervals.
        mapping: The names that the task's labels have in `rows`, where these come from another data set. Predictions
            are mapped after decoding and before the metric, as in the domain transfer of Lester et al. 2021, section 5.
        progress: Called with the number of rows done.

    Returns:
        The answers, the references, and the scores.

    Raises:
        ConfigError: There is no prompt and no encoder.
        DataError: A row has no label, or one that the task does not know.
    """
    config = config or EvaluationConfig()
    mapping = mapping or {}
    encoder = encoder or _default_encoder(model, prompt)
    for label in mapping:
        require_label(encoder.template, label, "the mapped label")
    mapped_answers: list[Answer] = []
    for answer in answers(model, rows, prompt=prompt, encoder=encoder, config=config):
        if isinstance(answer.value, str):
            answer = replace(answer, value=mapping.get(answer.value, answer.value))
        mapped_answers.append(answer)
        if progress is not None:
            progress(len(mapped_answers))
    predictions = [answer.value for answer in mapped_answers]
    references = [reference(encoder, row, mapping) for row in rows]
    template = encoder.template
    positive = mapping.get(template.positive, template.positive) if template.positive is not None else None
    scores = {}
    for name in template.metrics or metrics.default_metrics(template.kind):
        scores[name] = metrics.score(
            name,
            predictions,
            references,
            resamples=config.resamples,
            seed=seed,
            positive=positive,
            kind=template.kind,
        )
    return Evaluation(tuple(mapped_answers), tuple(references), scores)


def answers(
    model: SoftPromptModel,
    rows: Iterable[Row],
    *,
    prompt: Prompts,
    encoder: ExampleTokenizer | None = None,
    config: EvaluationConfig | None = None,
) -> Iterator[Answer]:
    """Yield the answer to each of `rows`, in order, with memory for a few batches only.

    The model computes a prompt that does not depend on the text once.

    Args:
        model: The model that answers.
        rows: Taken as they are needed, at most a chunk of them ahead. Where taking one fails, those before it are
            answered first.
        prompt: The prompt that answers; None: the stock model. Several prompts answer a row in one batch, and the
            majority's string is the answer; on a tie the string of the first prompt wins (Lester et al. 2021,
            section 6).
        encoder: Turns rows into tokens; None: by the prompt's own template.
        config: How rows are answered.

    Raises:
        ConfigError: There is no prompt and no encoder.
    """
    encoder = encoder or _default_encoder(model, prompt)
    names = () if prompt is None else (prompt,) if isinstance(prompt, str) else tuple(prompt)
    with torch.no_grad():
        cache = model.prefix_cache(names)
    for chunk in _chunks(rows):
        yield from _answer_chunk(cache, encoder, chunk, config or EvaluationConfig())


def evaluation_config(artifact: Artifact, **changes: Any) -> EvaluationConfig:
    """The evaluation settings of the run that made an artifact, with the `changes` that are not None."""
    values = dict(artifact.settings("evaluation"))
    values |= {key: value for key, value in changes.items() if value is not None}
    config: EvaluationConfig = parse(values, EvaluationConfig, "evaluation")
    return config


def _default_encoder(model: SoftPromptModel, prompt: Prompts) -> ExampleTokenizer:
    name = prompt if isinstance(prompt, str) or prompt is None else prompt[0]
    if name is None:
        raise ConfigError("the stock model has no template; give the encoder of a task")
    return model.example_tokenizer(name)


def _chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    chunk: list[Row] = []
    try:
        for row in rows:
            chunk.append(row)
            if len(chunk) == CHUNK:
                yield chunk
                chunk = []
    except Exception:
        if chunk:
            yield chunk
        raise
    if chunk:
        yield chunk


def reference(encoder: ExampleTokenizer, row: Row, mapping: Mapping[str, str] | None = None) -> Any:
    """The right answer to `row`, in the form that metrics take.

    Args:
        encoder: The task's tokenizer, which has its template.
        row: A row with its label.
        mapping: As in `evaluate`; with it, labels that the task does not know are allowed.

    Raises:
        DataError: The row has no label, or one that the task does not know.
    """
    template = encoder.template
    require_column(template.label, row, "label", template.name)
    value = row[template.label]
    if template.kind == "regression":
        return float(value)
    if template.kind == "span" and isinstance(value, Mapping):
        return list(value.get("text", ()))
    if template.kind not in ("label", "multilabel", "tagging"):
        return answer_text(template, row)
    names = label_names(value, template.kind)
    for name in names if not mapping else ():
        require_label(template, name, "the row's label")
    return names[0] if template.kind == "label" else list(names)


def by_generation(encoder: ExampleTokenizer, config: EvaluationConfig) -> bool:
    """Whether answers are generated: because the configuration says so, or because there are no label words to rank."""
    if encoder.head != "lm":
        return False
    return config.by == "generate" or (config.by == "auto" and encoder.template.kind != "label")


PromptedRow = tuple[Row, int]
"""A row with the index of the prompt that answers it."""

AnswerRows = Callable[[PrefixCache, ExampleTokenizer, Sequence[PromptedRow], EvaluationConfig], list[Answer]]


def _answer_chunk(
    cache: PrefixCache, encoder: ExampleTokenizer, rows: Sequence[Row], config: EvaluationConfig
) -> list[Answer]:
    """The answers to rows; of several prompts the majority decides."""
    answer_rows: AnswerRows
    if by_generation(encoder, config):
        answer_rows = _generate
    elif encoder.head == "lm":
        answer_rows = _rank
    else:
        answer_rows = _classify
    prompt_indices = [cache.model.index(name) for name in cache.names] or [0]
    prompted_rows = list(itertools.product(rows, prompt_indices))
    with torch.no_grad():
        ballots = answer_rows(cache, encoder, prompted_rows, config)
    votes = len(prompt_indices)
    if votes == 1:
        return ballots
    return [_majority_answer(ballots[first : first + votes]) for first in range(0, len(ballots), votes)]


def _majority_answer(ballots: Sequence[Answer]) -> Answer:
    # The vote compares strings, so lists of labels and numbers vote by their text.
    strings = [None if ballot.value is None else str(ballot.value) for ballot in ballots]
    return ballots[strings.index(metrics.majority_vote(strings))]


def _batches(
    examples: Sequence[EncodedExample],
    cache: PrefixCache,
    encoder: ExampleTokenizer,
    config: EvaluationConfig,
    *,
    extra_tokens: int = 0,
    max_rows: int = CHUNK,
) -> Iterator[tuple[list[int], Batch]]:
    """Yield batches of examples in order of length, each with the indices of its examples.

    Args:
        examples: The examples.
        cache: Names the device.
        encoder: Names the padding token.
        config: The batch size in rows and in tokens.
        extra_tokens: Tokens that the model reads or writes behind each text.
        max_rows: Most rows of a batch, whatever the configuration sets.
    """
    pad = encoder.tokenizer.pad_token_id or 0
    device = cache.model.backbone.device
    if by_generation(encoder, config):
        default_tokens = GENERATION_BATCH_TOKENS
    else:
        default_tokens = CPU_BATCH_TOKENS if device.type == "cpu" else ACCELERATOR_BATCH_TOKENS
    lengths = [len(example.input_ids) + extra_tokens for example in examples]
    batch_size = max(1, min(config.batch_size, max_rows))
    for indices in evaluation_order(lengths, batch_size, config.batch_tokens or default_tokens):
        yield indices, collate([examples[index] for index in indices], pad).to(device)


def _encode_texts(encoder: ExampleTokenizer, prompted_rows: Sequence[PromptedRow]) -> list[EncodedExample]:
    """The rows without answers or labels; a row that several prompts answer is encoded once."""
    examples: list[EncodedExample] = []
    previous_row: Row | None = None
    for row, prompt_index in prompted_rows:
        example = examples[-1] if row is previous_row else replace(encoder.encode(row), labels=None)
        examples.append(replace(example, task_id=prompt_index))
        previous_row = row
    return examples


def _split_leading(cache: PrefixCache, examples: list[EncodedExample]) -> tuple[tuple[int, ...], list[EncodedExample]]:
    """Split off the tokens that all examples begin with, such as a template's words, where the cache can share them.

    Returns:
        The shared tokens, and the examples without them.
    """
    too_few = len(examples) < MIN_ROWS_FOR_LEADING
    if not cache.reads_leading or too_few or any(example.prompt_offsets for example in examples):
        return (), examples
    # All sequences share the beginning that the smallest and the largest of them share.
    token_ids = [example.input_ids for example in examples]
    smallest = min(token_ids)
    largest = max(token_ids)
    length = min(len(smallest), len(largest))
    while smallest[:length] != largest[:length]:
        length -= 1
    rest = []
    for example in examples:
        rest.append(replace(example, input_ids=example.input_ids[length:], instruction_mask=None))
    return tuple(smallest[:length]), rest


def _rank(
    cache: PrefixCache, encoder: ExampleTokenizer, prompted_rows: Sequence[PromptedRow], config: EvaluationConfig
) -> list[Answer]:
    """Answer with the label whose words are most probable as a whole (rank classification)."""
    candidates = encoder.candidates()
    log_probs_of = _causal_log_probs if encoder.family == "causal" else _filled_log_probs
    log_probs = log_probs_of(cache, encoder, prompted_rows, candidates, config)
    if config.normalize:
        log_probs = log_probs / torch.tensor(list(map(len, candidates.values())))
    return _best_labels(list(candidates), log_probs)


def _best_labels(labels: Sequence[str], log_probs: Tensor) -> list[Answer]:
    """Answer each row with the most probable of the labels; log_probs [rows, labels]."""
    answers = []
    for best, scores in zip(log_probs.argmax(1).tolist(), log_probs.tolist(), strict=True):
        answers.append(Answer(labels[best], scores=dict(zip(labels, scores, strict=True))))
    return answers


def _causal_log_probs(
    cache: PrefixCache,
    encoder: ExampleTokenizer,
    prompted_rows: Sequence[PromptedRow],
    candidates: Mapping[str, list[int]],
    config: EvaluationConfig,
) -> Tensor:
    """The log-probability [rows, labels] of each label behind each text, of causal models: one pass for all labels."""
    model = cache.model
    labels = list(candidates.values())
    log_probs = torch.empty(len(prompted_rows), len(labels), dtype=torch.float64)
    leading, examples = _split_leading(cache, _encode_texts(encoder, prompted_rows))
    label_tokens = len(continuations.candidate_tree(labels).token_ids)
    for indices, batch in _batches(examples, cache, encoder, config, extra_tokens=label_tokens):
        prompt, prefix = cache.prompts(batch, leading)
        scores = continuations.score_continuations(model.backbone, batch, prompt, cache.site, labels, prefix=prefix)
        log_probs[torch.tensor(indices)] = scores.cpu()
    return log_probs


def _filled_log_probs(
    cache: PrefixCache,
    encoder: ExampleTokenizer,
    prompted_rows: Sequence[PromptedRow],
    candidates: Mapping[str, list[int]],
    config: EvaluationConfig,
) -> Tensor:
    """The log-probability [rows, labels] of each label, of encoder-decoder and masked models.

    All labels of one token come from one pass. Each longer label has a separate pass.
    """
    labels = list(candidates)
    log_probs = torch.full((len(prompted_rows), len(labels)), -torch.inf, dtype=torch.float64)
    single: list[int] = []
    groups = [single]
    for index, token_ids in enumerate(candidates.values()):
        if len(token_ids) == 1:
            single.append(index)
        else:
            groups.append([index])
    texts = _encode_texts(encoder, prompted_rows) if encoder.family == "seq2seq" else []
    max_rows = injection.MAX_LOGITS // cache.model.backbone.vocab_size
    for group in filter(None, groups):
        label = labels[group[0]]
        if encoder.family == "seq2seq":
            examples = [replace(text, labels=list(candidates[label])) for text in texts]
        else:  # the label's tokens replace as many mask tokens
            word = (encoder.template.verbalizer or {})[label]
            examples = [replace(encoder.encode(row, word), task_id=index) for row, index in prompted_rows]
        for indices, batch in _batches(examples, cache, encoder, config, max_rows=max_rows):
            output = cache.score(batch, return_logits=group is single)
            assert output.labels is not None
            if group is single:
                assert output.logits is not None
                token_log_probs = output.logits.float().log_softmax(-1).double()
                tokens = torch.tensor([candidates[labels[index]][0] for index in group], device=token_log_probs.device)
                # Scores need not be in the batch's order: output.batch_rows names the row of each.
                rows = torch.tensor(indices)[output.batch_rows.cpu()]
                log_probs[rows[:, None], torch.tensor(group)[None]] = token_log_probs[:, tokens].cpu()
            else:
                assert output.nll is not None
                sums = torch.zeros(len(indices), dtype=torch.float64, device=output.nll.device)
                sums = sums.index_add(0, output.batch_rows, -output.nll.double())
                log_probs[torch.tensor(indices), group[0]] = sums.cpu()
    return log_probs


def _generate(
    cache: PrefixCache, encoder: ExampleTokenizer, prompted_rows: Sequence[PromptedRow], config: EvaluationConfig
) -> list[Answer]:
    """Answer with greedily generated text; only a string that is an answer of the task is a legal one."""
    answers: list[Answer] = [Answer(None)] * len(prompted_rows)
    new_tokens = config.max_new_tokens
    if encoder.family == "causal":  # generated tokens take positions too, at most half of them
        new_tokens = min(new_tokens, max(1, encoder.room // 2))
        encoder = replace(encoder, room=encoder.room - new_tokens)
    model = cache.model
    tokenizer = encoder.tokenizer
    examples = _encode_texts(encoder, prompted_rows)
    for indices, batch in _batches(examples, cache, encoder, config, extra_tokens=new_tokens):
        if encoder.family == "causal":  # the stock model (no prompt) continues only rows that are padded on the left
            batch = _pad_left(batch)
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
        new_ids = ids[:, batch.input_ids.shape[1] :] if encoder.family == "causal" else ids
        texts = tokenizer.batch_decode(new_ids, skip_special_tokens=True)
        for index, text in zip(indices, texts, strict=True):
            answers[index] = Answer(_parse_answer(encoder, text), text.strip())
    return answers


def _pad_left(batch: Batch) -> Batch:
    """The batch with its padding on the left."""
    order = batch.attention_mask.argsort(dim=1, stable=True)
    instruction_mask = batch.instruction_mask
    return replace(
        batch,
        input_ids=batch.input_ids.gather(1, order),
        attention_mask=batch.attention_mask.gather(1, order),
        instruction_mask=None if instruction_mask is None else instruction_mask.gather(1, order),
    )


def _parse_answer(encoder: ExampleTokenizer, text: str) -> Any:
    """A generated text in the form that metrics take; None where it is no legal answer."""
    value = decode_answer(encoder.template, text)
    kind = encoder.template.kind
    if value is None:
        return None
    if kind == "regression":
        return float(value)
    if kind not in ("multilabel", "tagging"):
        return value
    return [part for part in value.split(", " if kind == "multilabel" else " ") if part]


def _classify(
    cache: PrefixCache, encoder: ExampleTokenizer, prompted_rows: Sequence[PromptedRow], config: EvaluationConfig
) -> list[Answer]:
    """Answer with the output of a classification head."""
    answers: list[Answer] = [Answer(None)] * len(prompted_rows)
    decode = {"sequence": _decode_classes, "token": _decode_tags, "span": _decode_spans}[encoder.head]
    texts = _encode_texts(encoder, prompted_rows)
    # The other heads look at every token of the text.
    leading, examples = _split_leading(cache, texts) if encoder.head == "sequence" else ((), texts)
    for indices, batch in _batches(examples, cache, encoder, config):
        if encoder.head == "token":
            # A label asks for the scores of a text position; its value does not matter.
            labels = torch.zeros_like(batch.input_ids).masked_fill(batch.attention_mask == 0, IGNORE)
            batch = replace(batch, labels=labels)
        output = cache.score(batch, leading)
        assert output.logits is not None
        rows = [prompted_rows[index][0] for index in indices]
        decoded = decode(encoder, rows, output.logits.float(), output.batch_rows)
        for index, answer in zip(indices, decoded, strict=True):
            answers[index] = answer
    return answers


def _decode_classes(
    encoder: ExampleTokenizer, rows: Sequence[Row], logits: Tensor, row_indices: Tensor
) -> list[Answer]:
    """The answers of a sequence head with logits [rows, classes]."""
    kind = encoder.template.kind
    if kind == "regression":
        return [Answer(value) for value in logits[:, 0].tolist()]
    names = classes(encoder.template)
    if kind != "multilabel":
        return _best_labels(names, logits.log_softmax(-1))
    answers = []
    for positive, scores in zip((logits > 0).tolist(), functional.logsigmoid(logits).tolist(), strict=True):
        answers.append(Answer(list(itertools.compress(names, positive)), scores=dict(zip(names, scores, strict=True))))
    return answers


def _decode_tags(encoder: ExampleTokenizer, rows: Sequence[Row], logits: Tensor, row_indices: Tensor) -> list[Answer]:
    """The answers of a token head with logits [tokens, tags]; `row_indices` [tokens] names the row of each."""
    names = classes(encoder.template)
    tags_of_tokens = defaultdict(list)
    for row_index, tag in zip(row_indices.tolist(), logits.argmax(1).tolist(), strict=True):
        tags_of_tokens[row_index].append(names[tag])
    answers = []
    for row_index, row in enumerate(rows):
        # The first token of a word decides its tag; words that were cut off, or that have no token, are illegal.
        tags: list[str | None] = []
        for token in encoder.first_tokens(row):
            tags.append(tags_of_tokens[row_index][token] if token >= 0 else None)
        missing = len(split_words(row[encoder.template.columns[0]])) - len(tags)
        answers.append(Answer([*tags, *[None] * missing]))
    return answers


def _decode_spans(encoder: ExampleTokenizer, rows: Sequence[Row], logits: Tensor, row_indices: Tensor) -> list[Answer]:
    """The answers of a span head: the most probable pair of start and end of at most MAX_SPAN_TOKENS tokens."""
    starts, ends = logits.log_softmax(-1).view(2, len(rows), -1)
    log_probs = starts[:, :, None] + ends[:, None, :]
    allowed = torch.ones(log_probs.shape[1:], dtype=torch.bool, device=log_probs.device)
    allowed = allowed.triu().tril(MAX_SPAN_TOKENS - 1)
    best = log_probs.masked_fill(~allowed, -torch.inf).flatten(1).argmax(1)
    answers = []
    for row, pair in zip(rows, best.tolist(), strict=True):
        start, end = divmod(pair, log_probs.shape[2])
        answers.append(Answer(encoder.decode_span(row, start, end)))
    return answers
