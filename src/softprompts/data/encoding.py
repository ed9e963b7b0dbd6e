"""From a row to token ids and labels, for every kind of model and head."""

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
from softprompts.data.tokenization import Family, TextTokenizer, Tokens
from softprompts.errors import DataError
from softprompts.types import IGNORE, Row

Labels = list[int] | list[float] | int | float | None

KINDS = {"sequence": ("label", "multilabel", "regression"), "token": ("tagging",), "span": ("span",)}
"""The kinds of task that each head but the language model's can be trained on."""


@dataclass(frozen=True)
class EncodedExample:
    """One row as tokens, not padded.

    ids     the text, and for causal models the answer behind it
    labels  language models: a list, aligned with ids (encoder-decoder: the target ids); token heads: a list aligned
            with ids; a class; a value; multi-hot floats; [start, end] of a span; None where nothing is scored
    types   token types, where the tokenizer has them
    place   how many tokens stand before the prompt, or before each of its segments; None lets the family decide
    task    index of the task
    text_tokens  how many of ids are text and not answer
    cut     how many tokens of the row's columns were cut away
    words   for each of ids whether it is of the template's own words, 1 or 0; None where the template has none, or the
            tokenizer cannot say (it is a slow one)
    segments  how many prompt tokens each segment has, where the template has slots for them
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
    """Encodes rows of one task for one tokenizer, family of model and head.

    `room` is the number of tokens that a row may have: the model's context less the prompt. The answer's tokens depend
    on `separator + answer` alone, never on the row: they are the same in training, scoring and generation. `slots` are
    the prompt tokens of each `<prompt>` in the templates (see `slot_sizes`); without them that is text like other.

    Raises DataError for a format that the family or the head cannot use.
    """

    template: TaskTemplate
    tokenizer: Any
    family: Family
    head: Head
    room: int
    task_id: int = 0
    segment_lengths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        form, name = self.template, self.template.name
        if self.head in KINDS and form.kind not in KINDS[self.head]:
            raise DataError(
                f"{name}: head '{self.head}' is for kind {' or '.join(KINDS[self.head])}, not '{form.kind}'"
            )
        masks = mask_count(form.template) + mask_count(form.pair or "")
        if masks and (self.family, self.head) != ("masked", "lm"):
            raise DataError(f"{name}: {{{MASK}}} in the template is for the lm head of masked models; remove it")
        if (self.family, self.head) == ("masked", "lm") and self.tokenizer.mask_token is None:
            raise DataError(f"{name}: the tokenizer has no mask token, so it is not one of a masked model")
        if masks > 1:
            raise DataError(f"{name}: the template may have one {{{MASK}}}; an answer of n pieces gets n mask tokens")
        if form.chat and (self.family, self.head) != ("causal", "lm"):
            raise DataError(f"{name}: chat is for the lm head of causal models; set chat: false")
        if form.chat and not getattr(self.tokenizer, "chat_template", None):
            raise DataError(f"{name}: the tokenizer has no chat template; set chat: false or use an instruction model")
        if self.segment_lengths and self.head in ("token", "span"):
            raise DataError(f"{name}: head '{self.head}' cannot have a slot for the prompt in its template; take "
                            "<prompt> out and set prompt.placement: first, after_start or suffix")  # fmt: skip
        if self.segment_lengths and not form.columns:
            raise DataError(f"{name}: the template has a slot for the prompt, but none for the text; write the column "
                            f"in braces too, as in '{form.template}{{text}}'")  # fmt: skip
        if self.head == "token" and (
            form.pair or len(template_columns(form.template)) != 1 or form.template[:1] != "{"
        ):
            raise DataError(f"{name}: a tagging template is the column of words alone, such as '{{tokens}}'")
        if self.head == "span" and (
            len(template_columns(form.pair)) != 1 or form.pair != f"{{{template_columns(form.pair)[0]}}}"
        ):
            raise DataError(f"{name}: a span task needs pair, the column of the context alone, such as '{{context}}'")
        if self.head in ("token", "span") and not self.tokenizer.is_fast:
            raise DataError(f"{name}: head '{self.head}' needs a fast tokenizer, one that knows character offsets")

    def encode(self, row: Row, answer: str | None = None) -> EncodedExample:
        """`row` as tokens; a language model is also given `answer`, which is then what is scored.

        With `answer=None` a language model gets the text alone, to continue it; the other heads take their label from
        the row where it has one. Text is cut to what `room` and `max_length` leave, the longest column first, from its
        end; neither the template nor the answer loses a token.

        Raises DataError for missing columns, unknown labels, and when template and answer alone do not fit.
        """
        if self.head == "token":
            return self._tagged(row)
        if self.head == "span":
            return self._span(row)
        if self.head == "lm":
            return self._language(row, answer)
        tokens, cut = self._fit(row, 0)
        return self._encoded(tokens, self._class(row) if self.head == "sequence" else None, cut)

    def example(self, row: Row) -> EncodedExample:
        """`row` with its own answer, as it is trained on."""
        return self.encode(row, answer_text(self.template, row) if self.head == "lm" else None)

    def candidates(self) -> dict[str, list[int]]:
        """The answer's token ids for each label, to be scored behind the text.

        All end with the end token if one is the beginning of another, as the shorter one would never lose; else none.

        Raises DataError for a task without classes, and when two labels have the same tokens.
        """
        return self._candidates

    def answer_ids(self, answer: str) -> list[int]:
        """The tokens of `answer` as they are trained on; see `Speller.answer`."""
        return self._speller.answer(answer)

    def first_tokens(self, row: Row) -> list[int]:
        """Token head: where in ids each word of `row` begins; words that were cut off have no entry."""
        return self._words(row)[1]

    def decode_span(self, row: Row, start: int, end: int) -> str:
        """Span head: the text of the context from token `start` to token `end`, both counted in ids and included.

        Empty when either is no token of the context or the end stands before the start.
        """
        tokens, _ = self._fit(row, 0)
        spans = tokens.spans or []
        if not (0 <= start <= end < len(spans)) or spans[start][0] != 1 or spans[end][0] != 1:
            return ""
        context = cell_text(row[template_columns(self.template.pair)[0]])
        return context[spans[start][1] : spans[end][2]].strip()

    @property
    def budget(self) -> int:
        """How many tokens a row may have: `room`, or `max_length` where that is less."""
        return min(self.room, self.template.max_length or self.room)

    @cached_property
    def _speller(self) -> TextTokenizer:
        return TextTokenizer(self.template, self.tokenizer, self.family, self.head, bool(self.segment_lengths))

    @cached_property
    def _candidates(self) -> dict[str, list[int]]:
        form = self.template
        if not form.verbalizer or form.kind != "label":
            raise DataError(
                f"{form.name}: kind '{form.kind}' has no candidate answers to compare; evaluate by generating"
            )
        ended = self.family != "masked" and self._speller.end is not None
        found = {label: self.answer_ids(word) for label, word in form.verbalizer.items()}
        bare = {label: ids[:-1] if ended else ids for label, ids in found.items()}
        for label, ids in bare.items():
            twin = next((other for other in bare if other != label and bare[other] == ids), None)
            if twin or not ids:
                raise DataError(f"{form.name}: the answers for '{label}' and '{twin}' are the same tokens {ids}")
        clash = any(a != b and bare[b][: len(bare[a])] == bare[a] for a in bare for b in bare)
        return found if clash else bare

    @cached_property
    def _longest(self) -> int:
        """Room kept for the answer, the same whichever answer follows, so that all are scored behind the same text."""
        if not self.template.verbalizer or self.template.kind != "label":
            return 0
        return max(len(self.answer_ids(word)) for word in self.template.verbalizer.values())

    # How a row is cut to fit

    def _values(self, row: Row) -> dict[str, str]:
        for column in self.template.columns:
            require_column(column, row, "template", self.template.name)
        values = {column: cell_text(row[column]) for column in self.template.columns}
        if self.head == "lm" and self.family == "masked":  # a mask token in the text would be taken for the answer
            values = {column: text.replace(self.tokenizer.mask_token, " ") for column, text in values.items()}
        return values

    def _fit(self, row: Row, reserve: int, masks: int = 0) -> tuple[Tokens, int]:
        """The text of `row` in the budget less `reserve`, and how many tokens were cut away."""
        values = self._values(row)
        tokens = self._speller.text(values, masks)
        whole = len(tokens.ids)
        while len(tokens.ids) + reserve > self.budget:
            shorter = self._shorten(values, len(tokens.ids) + reserve - self.budget)
            if shorter == values:
                raise self._no_room(len(tokens.ids) + reserve)
            values = shorter
            tokens = self._speller.text(values, masks)
        return tokens, whole - len(tokens.ids)

    def _no_room(self, needed: int) -> DataError:
        why = "max_length is" if self.budget < self.room else "the prompt leaves room for"
        return DataError(f"{self.template.name}: template and answer alone take {needed} tokens, but {why} "
                         f"{self.budget}; use a shorter prompt, a larger max_length or a shorter template")  # fmt: skip

    def _shorten(self, values: dict[str, str], over: int) -> dict[str, str]:
        """`values` with `over` tokens less, taken from the end of whichever column is longest."""
        pieces = {
            c: self._speller.starts(text)
            for c, text in values.items()
            if c in self.template.truncatable_columns and text
        }
        keep = {column: len(starts) for column, starts in pieces.items()}
        for _ in range(min(over, sum(keep.values()))):
            keep[max(keep, key=keep.__getitem__)] -= 1
        shorter = dict(values)
        for column, starts in pieces.items():
            if keep[column] < len(starts):
                shorter[column] = values[column][: min(starts[keep[column]], len(values[column]) - 1)].rstrip()
            elif not starts:  # nothing but space
                shorter[column] = ""
        return shorter

    # The heads

    def _encoded(self, tokens: Tokens, labels: Labels, cut: int) -> EncodedExample:
        text = len(tokens.ids)
        return EncodedExample(
            tokens.ids,
            labels,
            tokens.types,
            tokens.place,
            self.task_id,
            text,
            cut,
            tokens.words,
            segment_lengths=self.segment_lengths,
        )

    def _language(self, row: Row, answer: str | None) -> EncodedExample:
        ids = [] if answer is None else self.answer_ids(answer)
        if self.family == "seq2seq":
            tokens, cut = self._fit(row, 0)
            return self._encoded(tokens, None if answer is None else ids, cut)
        if self.family == "masked":
            return self._masked(row, ids)
        lost = 0
        if self.template.label in self.template.truncatable_columns:
            free = max(1, self.budget - len(self._speller.text(dict.fromkeys(self.template.columns, ""), 0).ids))
            ids, lost = ids[:free], max(0, len(ids) - free)
        tokens, cut = self._fit(row, max(len(ids), self._longest))
        labels: Labels = None if answer is None else [IGNORE] * len(tokens.ids) + ids
        words = None if tokens.words is None else tokens.words + [0] * len(ids)
        return replace(self._encoded(tokens, labels, cut + lost), input_ids=tokens.ids + ids, instruction_mask=words)

    def _masked(self, row: Row, ids: list[int]) -> EncodedExample:
        masks = len(ids) or self._longest or 1
        tokens, cut = self._fit(row, max(0, self._longest - masks), masks)
        if not ids:
            return self._encoded(tokens, None, cut)
        pieces = iter(ids)
        mask = self.tokenizer.mask_token_id
        labels: Labels = [next(pieces) if token == mask else IGNORE for token in tokens.ids]
        return self._encoded(tokens, labels, cut)

    def _class(self, row: Row) -> Labels:
        form = self.template
        if form.label not in row or is_missing(row[form.label]):
            return None
        if form.kind == "regression":
            return float(row[form.label])
        names = label_names(row[form.label], form.kind)
        for name in names:
            require_label(form, name)
        if form.kind == "multilabel":
            return [float(name in names) for name in classes(form)]
        return classes(form).index(names[0])

    def _words(self, row: Row) -> tuple[Tokens, list[int], int]:
        """The words of a row that fit, where each begins, and how many tokens were cut away."""
        column = template_columns(self.template.template)[0]
        require_column(column, row, "template", self.template.name)
        words = split_words(row[column])
        tokens = self._speller.text({column: " ".join(words)}, 0)
        whole = len(tokens.ids)
        while True:
            firsts = _first_tokens(words, tokens)
            over = len(tokens.ids) - self.budget
            if over <= 0:
                return tokens, firsts, whole - len(tokens.ids)
            if not words:
                raise self._no_room(len(tokens.ids))
            added = sum(segment < 0 for segment, _, _ in tokens.spans or [])
            words = words[: max(0, min(len(words) - 1, sum(at <= self.budget - added for at in firsts)))]
            tokens = self._speller.text({column: " ".join(words)}, 0)

    def _tagged(self, row: Row) -> EncodedExample:
        tokens, firsts, cut = self._words(row)
        form = self.template
        if form.label not in row or is_missing(row[form.label]):
            return self._encoded(tokens, None, cut)
        words = split_words(row[template_columns(form.template)[0]])
        tags = label_names(row[form.label], "tagging")
        if len(words) != len(tags):
            raise DataError(f"{form.name}: a row has {len(words)} words but {len(tags)} tags: {' '.join(words)[:60]!r}")
        labels = [IGNORE] * len(tokens.ids)
        for at, tag in zip(firsts, tags, strict=False):  # the words that were cut off have no place
            require_label(form, tag)
            if at >= 0:
                labels[at] = classes(form).index(tag)
        return self._encoded(tokens, labels, cut)

    def _span(self, row: Row) -> EncodedExample:
        tokens, cut = self._fit(row, 0)
        found = answer_offsets(row.get(self.template.label), self.template.name)
        if found is None:
            return self._encoded(tokens, None, cut)
        start, end = found
        if end <= start:  # no answer: the first token, as in SQuAD 2
            return self._encoded(tokens, [0, 0], cut)
        inside = [i for i, (s, a, b) in enumerate(tokens.spans or []) if s == 1 and a < end and b > start]
        last = max((b for s, _, b in tokens.spans or [] if s == 1), default=0)
        if not inside or (cut and last < end):  # the answer was cut off: the row is not scored
            return self._encoded(tokens, [IGNORE, IGNORE], cut)
        return self._encoded(tokens, [inside[0], inside[-1]], cut)


def _first_tokens(words: Sequence[str], tokens: Tokens) -> list[int]:
    """Where in `tokens` each of `words`, joined by spaces, begins; -1 for a word that the tokenizer drops."""
    owner: list[int] = []
    for index, word in enumerate(words):
        owner += [index] * (len(word) + 1)  # the space belongs to the word before it, and no token ends with one
    firsts = [-1] * len(words)
    for at, (segment, start, end) in enumerate(tokens.spans or []):
        if segment == 0 and end > start and firsts[owner[end - 1]] < 0:
            firsts[owner[end - 1]] = at
    return firsts
