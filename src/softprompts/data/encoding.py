"""From a row to token ids and labels, for every kind of model and head."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from softprompts.config import Head
from softprompts.data.task import TaskTemplate, answer_text, classes, require_label
from softprompts.data.templates import (
    MASK,
    answer_offsets,
    cell_text,
    is_missing,
    label_names,
    mask_count,
    require_column,
    split_words,
    template_columns,
)
from softprompts.data.tokenization import Family, TextTokenizer, TokenizedText
from softprompts.errors import DataError
from softprompts.types import IGNORE, Row

Labels = list[int] | list[float] | int | float | None

HEAD_KINDS = {"sequence": ("label", "multilabel", "regression"), "token": ("tagging",), "span": ("span",)}
"""The kinds of task that train each head but the language model's."""


@dataclass(frozen=True)
class EncodedExample:
    """One row as tokens, not padded.

    input_ids         [T] the text, and for causal models the answer behind it
    labels            language models: [T], or the target tokens [S] of an encoder-decoder; token heads: [T]; else a
                      class, a value, multi-hot floats [C] or the tokens [start, end] of a span; None: nothing is scored
    token_type_ids    [T] where the tokenizer has them
    prompt_offsets    how many tokens come before the prompt, or before each of its segments; None lets the family
                      decide
    task_id           index of the task
    text_tokens       how many of the tokens are text and not answer
    truncated_tokens  how many tokens of the row's columns were cut away
    instruction_mask  [T] 1 for tokens of the template's own words; None: it has none, or the tokenizer is a slow one
    segment_lengths   how many prompt tokens each segment has, where the template has slots for them
    """

    input_ids: list[int]
    labels: Labels = None
    token_type_ids: list[int] | None = None
    prompt_offsets: int | tuple[int, ...] | None = None
    task_id: int = 0
    text_tokens: int = 0
    truncated_tokens: int = 0
    instruction_mask: list[int] | None = None
    segment_lengths: tuple[int, ...] = ()


@dataclass(frozen=True)
class ExampleTokenizer:
    """Encodes the rows of one task for one tokenizer, family of models and head.

    The answer's tokens depend on `separator + answer` alone, never on the row: they are the same in training, scoring
    and generation.

    template         the task's template
    tokenizer        the tokenizer of transformers
    family           the family of models
    head             the head of the model
    room             how many tokens a row may have: the model's context less the prompt
    task_id          index of the task
    segment_lengths  the prompt tokens of each `<prompt>` in the templates (see `slot_sizes`); without them `<prompt>`
                     is text like other

    Raises DataError for a template that the family or the head cannot use.
    """

    template: TaskTemplate
    tokenizer: Any
    family: Family
    head: Head
    room: int
    task_id: int = 0
    segment_lengths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Check that the family and the head can use the template."""
        self._check_kind()
        self._check_mask()
        self._check_chat()
        self._check_slots()
        self._check_offsets()

    def encode(self, row: Row, answer: str | None = None) -> EncodedExample:
        """Encode a row.

        Text is cut to `budget` tokens, the longest column first, from its end. Neither the template nor the answer
        loses a token.

        Args:
            row: The row.
            answer: The answer that a language model is scored on; None: the text alone, to continue it. Other heads
                take their label from the row where it has one.

        Returns:
            The row as tokens.

        Raises:
            DataError: A column is missing, a label is unknown, or template and answer alone do not fit.
        """
        if self.head == "token":
            return self._encode_tags(row)
        if self.head == "span":
            return self._encode_span(row)
        if self.head == "lm":
            return self._encode_language(row, answer)
        text, truncated = self._fit(row, 0)
        return self._make_example(text, self._class_label(row) if self.head == "sequence" else None, truncated)

    def example(self, row: Row) -> EncodedExample:
        """Encode a row with its own answer, for training."""
        return self.encode(row, answer_text(self.template, row) if self.head == "lm" else None)

    def candidates(self) -> dict[str, list[int]]:
        """The answer tokens of each label, to be scored behind the text.

        Returns:
            The tokens by label. All end with the end token if one answer is the beginning of another, because the
            shorter one would never lose; else none does.

        Raises:
            DataError: The task has no classes, or two labels have the same tokens.
        """
        return self._candidates

    def answer_ids(self, answer: str) -> list[int]:
        """The tokens of `answer` in training; see `TextTokenizer.answer`."""
        return self._text_tokenizer.answer(answer)

    def first_tokens(self, row: Row) -> list[int]:
        """Token head: the index of each word's first token in `input_ids`; words that were cut off have no entry."""
        return self._fit_words(row)[1]

    def decode_span(self, row: Row, start: int, end: int) -> str:
        """Span head: the text of the context between two tokens.

        Args:
            row: The row.
            start: Index of the first token in `input_ids`.
            end: Index of the last token, included.

        Returns:
            The text; empty when either is no token of the context, or the end comes before the start.
        """
        spans = self._fit(row, 0)[0].spans or []
        if not (0 <= start <= end < len(spans)) or spans[start].segment != 1 or spans[end].segment != 1:
            return ""
        context = cell_text(row[template_columns(self.template.pair)[0]])
        return context[spans[start].start : spans[end].end].strip()

    @property
    def budget(self) -> int:
        """How many tokens a row may have: `room`, or `max_length` where that is less."""
        return min(self.room, self.template.max_length or self.room)

    @cached_property
    def _text_tokenizer(self) -> TextTokenizer:
        return TextTokenizer(self.template, self.tokenizer, self.family, self.head, bool(self.segment_lengths))

    @cached_property
    def _candidates(self) -> dict[str, list[int]]:
        name, verbalizer = self.template.name, self.template.verbalizer
        if not verbalizer or self.template.kind != "label":
            raise DataError(
                f"{name}: kind '{self.template.kind}' has no candidate answers to compare; evaluate by generating"
            )
        has_end = self.family != "masked" and self._text_tokenizer.end_token is not None
        with_end = {label: self.answer_ids(answer) for label, answer in verbalizer.items()}
        bare = {label: ids[:-1] if has_end else ids for label, ids in with_end.items()}
        for label, ids in bare.items():
            twin = next((other for other in bare if other != label and bare[other] == ids), None)
            if twin or not ids:
                raise DataError(f"{name}: the answers for '{label}' and '{twin}' are the same tokens {ids}")
        for shorter, longer in itertools.permutations(bare.values(), 2):
            if longer[: len(shorter)] == shorter:
                return with_end
        return bare

    @cached_property
    def _longest_answer(self) -> int:
        """Room for the answer, the same for every answer, so that all are scored behind the same text."""
        if not self.template.verbalizer or self.template.kind != "label":
            return 0
        return max(len(self.answer_ids(answer)) for answer in self.template.verbalizer.values())

    # Checks of the template

    def _check_kind(self) -> None:
        kinds = HEAD_KINDS.get(self.head)
        if kinds and self.template.kind not in kinds:
            raise DataError(
                f"{self.template.name}: head '{self.head}' is for kind {' or '.join(kinds)}, not '{self.template.kind}'"
            )

    def _check_mask(self) -> None:
        template, name = self.template, self.template.name
        masks = mask_count(template.template) + mask_count(template.pair or "")
        fills_masks = self.family == "masked" and self.head == "lm"
        if masks and not fills_masks:
            raise DataError(f"{name}: {{{MASK}}} in the template is for the lm head of masked models; remove it")
        if fills_masks and self.tokenizer.mask_token is None:
            raise DataError(f"{name}: the tokenizer has no mask token, so it is not one of a masked model")
        if masks > 1:
            raise DataError(f"{name}: the template may have one {{{MASK}}}; an answer of n pieces gets n mask tokens")

    def _check_chat(self) -> None:
        name = self.template.name
        if not self.template.chat:
            return
        if self.family != "causal" or self.head != "lm":
            raise DataError(f"{name}: chat is for the lm head of causal models; set chat: false")
        if not getattr(self.tokenizer, "chat_template", None):
            raise DataError(f"{name}: the tokenizer has no chat template; set chat: false or use an instruction model")

    def _check_slots(self) -> None:
        template, name = self.template, self.template.name
        if not self.segment_lengths:
            return
        if self.head in ("token", "span"):
            raise DataError(f"{name}: head '{self.head}' cannot have a slot for the prompt in its template; take "
                            "<prompt> out and set prompt.placement: first, after_start or suffix")  # fmt: skip
        if not template.columns:
            raise DataError(f"{name}: the template has a slot for the prompt, but none for the text; write the column "
                            f"in braces too, as in '{template.template}{{text}}'")  # fmt: skip

    def _check_offsets(self) -> None:
        """Check the heads that look at single tokens."""
        template, name = self.template, self.template.name
        columns, pair_columns = template_columns(template.template), template_columns(template.pair)
        if self.head == "token" and (template.pair or len(columns) != 1 or template.template[:1] != "{"):
            raise DataError(f"{name}: a tagging template is the column of words alone, such as '{{tokens}}'")
        if self.head == "span" and (len(pair_columns) != 1 or template.pair != f"{{{pair_columns[0]}}}"):
            raise DataError(f"{name}: a span task needs pair, the column of the context alone, such as '{{context}}'")
        if self.head in ("token", "span") and not self.tokenizer.is_fast:
            raise DataError(f"{name}: head '{self.head}' needs a fast tokenizer, one that knows character offsets")

    # How a row is cut to fit

    def _fit(self, row: Row, reserve: int, masks: int = 0) -> tuple[TokenizedText, int]:
        """Tokenize the text of a row within the budget.

        Args:
            row: The row.
            reserve: The tokens of the budget that stay free for the answer.
            masks: The number of mask tokens for the answer.

        Returns:
            The text, and how many tokens were cut away.
        """
        values = self._column_texts(row)
        text = self._text_tokenizer.text(values, masks)
        full_length = len(text.input_ids)
        while len(text.input_ids) + reserve > self.budget:
            shorter = self._shorten(values, len(text.input_ids) + reserve - self.budget)
            if shorter == values:
                raise self._no_room(len(text.input_ids) + reserve)
            values = shorter
            text = self._text_tokenizer.text(values, masks)
        return text, full_length - len(text.input_ids)

    def _column_texts(self, row: Row) -> dict[str, str]:
        for column in self.template.columns:
            require_column(column, row, "template", self.template.name)
        texts = {column: cell_text(row[column]) for column in self.template.columns}
        if self.head == "lm" and self.family == "masked":  # a mask token in the text would be taken for the answer
            texts = {column: text.replace(self.tokenizer.mask_token, " ") for column, text in texts.items()}
        return texts

    def _shorten(self, values: dict[str, str], excess: int) -> dict[str, str]:
        """Cut `excess` tokens from `values`, each from the end of the column that is longest then."""
        token_starts: dict[str, list[int]] = {}
        for column, text in values.items():
            if column in self.template.truncatable_columns and text:
                token_starts[column] = self._text_tokenizer.token_starts(text)
        lengths = {column: len(starts) for column, starts in token_starts.items()}
        for _ in range(min(excess, sum(lengths.values()))):
            lengths[max(lengths, key=lengths.__getitem__)] -= 1
        shorter = dict(values)
        for column, starts in token_starts.items():
            if lengths[column] < len(starts):
                # At least one character goes, also where the token has no characters.
                end = min(starts[lengths[column]], len(values[column]) - 1)
                shorter[column] = values[column][:end].rstrip()
            elif not starts:  # nothing but space
                shorter[column] = ""
        return shorter

    def _no_room(self, needed: int) -> DataError:
        limit = "max_length is" if self.budget < self.room else "the prompt leaves room for"
        return DataError(f"{self.template.name}: template and answer alone take {needed} tokens, but {limit} "
                         f"{self.budget}; use a shorter prompt, a larger max_length or a shorter template")  # fmt: skip

    def _fit_words(self, row: Row) -> tuple[TokenizedText, list[int], int]:
        """Tokenize the words of a row within the budget, for the token head.

        Args:
            row: The row.

        Returns:
            The text, the index of each word's first token, and how many tokens were cut away.
        """
        column = template_columns(self.template.template)[0]
        require_column(column, row, "template", self.template.name)
        words = split_words(row[column])
        text = self._text_tokenizer.text({column: " ".join(words)}, 0)
        full_length = len(text.input_ids)
        while True:
            first_tokens = _first_tokens(words, text)
            if len(text.input_ids) <= self.budget:
                return text, first_tokens, full_length - len(text.input_ids)
            if not words:
                raise self._no_room(len(text.input_ids))
            special_tokens = sum(span.segment < 0 for span in text.spans or [])
            fitting = sum(index <= self.budget - special_tokens for index in first_tokens)
            words = words[: max(0, min(len(words) - 1, fitting))]
            text = self._text_tokenizer.text({column: " ".join(words)}, 0)

    # The heads

    def _make_example(self, text: TokenizedText, labels: Labels, truncated: int) -> EncodedExample:
        return EncodedExample(
            input_ids=text.input_ids,
            labels=labels,
            token_type_ids=text.token_type_ids,
            prompt_offsets=text.prompt_offsets,
            task_id=self.task_id,
            text_tokens=len(text.input_ids),
            truncated_tokens=truncated,
            instruction_mask=text.instruction_mask,
            segment_lengths=self.segment_lengths,
        )

    def _encode_language(self, row: Row, answer: str | None) -> EncodedExample:
        """Encode a row for a language model: the answer follows the text, fills its masks, or is the target."""
        ids = [] if answer is None else self.answer_ids(answer)
        if self.family == "seq2seq":
            text, truncated = self._fit(row, 0)
            return self._make_example(text, None if answer is None else ids, truncated)
        if self.family == "masked":
            return self._encode_masked(row, ids)
        truncated_answer = 0
        if self.template.label in self.template.truncatable_columns:
            empty_text = self._text_tokenizer.text(dict.fromkeys(self.template.columns, ""), 0)
            free = max(1, self.budget - len(empty_text.input_ids))
            truncated_answer = max(0, len(ids) - free)
            ids = ids[:free]
        text, truncated = self._fit(row, max(len(ids), self._longest_answer))
        mask = text.instruction_mask
        return replace(
            self._make_example(text, None, truncated + truncated_answer),
            input_ids=text.input_ids + ids,
            labels=None if answer is None else [IGNORE] * len(text.input_ids) + ids,
            instruction_mask=None if mask is None else mask + [0] * len(ids),
        )

    def _encode_masked(self, row: Row, ids: list[int]) -> EncodedExample:
        masks = len(ids) or self._longest_answer or 1
        text, truncated = self._fit(row, max(0, self._longest_answer - masks), masks)
        if not ids:
            return self._make_example(text, None, truncated)
        answer = iter(ids)
        mask = self.tokenizer.mask_token_id
        labels: Labels = [next(answer) if token == mask else IGNORE for token in text.input_ids]
        return self._make_example(text, labels, truncated)

    def _class_label(self, row: Row) -> Labels:
        """The label of the sequence head; None where the row has none."""
        template = self.template
        if template.label not in row or is_missing(row[template.label]):
            return None
        if template.kind == "regression":
            return float(row[template.label])
        names = label_names(row[template.label], template.kind)
        for name in names:
            require_label(template, name)
        if template.kind == "multilabel":
            return [float(name in names) for name in classes(template)]
        return classes(template).index(names[0])

    def _encode_tags(self, row: Row) -> EncodedExample:
        text, first_tokens, truncated = self._fit_words(row)
        template = self.template
        if template.label not in row or is_missing(row[template.label]):
            return self._make_example(text, None, truncated)
        words = split_words(row[template_columns(template.template)[0]])
        tags = label_names(row[template.label], "tagging")
        if len(words) != len(tags):
            raise DataError(
                f"{template.name}: a row has {len(words)} words but {len(tags)} tags: {' '.join(words)[:60]!r}"
            )
        labels = [IGNORE] * len(text.input_ids)
        for index, tag in zip(first_tokens, tags, strict=False):  # words that were cut off have no first token
            require_label(template, tag)
            if index >= 0:
                labels[index] = classes(template).index(tag)
        return self._make_example(text, labels, truncated)

    def _encode_span(self, row: Row) -> EncodedExample:
        text, truncated = self._fit(row, 0)
        offsets = answer_offsets(row.get(self.template.label), self.template.name)
        if offsets is None:
            return self._make_example(text, None, truncated)
        start, end = offsets
        if end <= start:  # no answer: the first token, as in SQuAD 2
            return self._make_example(text, [0, 0], truncated)
        answer_tokens: list[int] = []
        context_end = 0
        for index, span in enumerate(text.spans or []):
            if span.segment != 1:
                continue
            context_end = max(context_end, span.end)
            if span.start < end and span.end > start:
                answer_tokens.append(index)
        if not answer_tokens or (truncated and context_end < end):  # the answer was cut off: the row is not scored
            return self._make_example(text, [IGNORE, IGNORE], truncated)
        return self._make_example(text, [answer_tokens[0], answer_tokens[-1]], truncated)


def _first_tokens(words: Sequence[str], text: TokenizedText) -> list[int]:
    """The index of each word's first token, of words that spaces join; -1 for a word that the tokenizer drops."""
    word_of_character: list[int] = []
    for number, word in enumerate(words):
        # The space belongs to the word before it, and no token ends with one.
        word_of_character += [number] * (len(word) + 1)
    first_tokens = [-1] * len(words)
    for index, (segment, start, end) in enumerate(text.spans or []):
        if segment == 0 and end > start and first_tokens[word_of_character[end - 1]] < 0:
            first_tokens[word_of_character[end - 1]] = index
    return first_tokens
