"""From texts to tokens, and the one rule by which answers are tokenized."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

from softprompts.config import Head
from softprompts.data.task import TaskTemplate
from softprompts.data.templates import (
    MASK,
    CharRange,
    FilledText,
    fill_template,
    has_words,
    mask_count,
    split_slots,
)
from softprompts.errors import DataError

Family = Literal["causal", "seq2seq", "masked"]

ANCHORS = ("\n", ":", "a")
"""An answer is tokenized behind one of these: it gets the tokens of a continuation, not those of a text's start."""

SENTINELS = tuple(map(chr, range(0xE000, 0xF900)))
"""Characters that no chat template writes: one marks the begin of the user's words, or the slots."""


class TokenSpan(NamedTuple):
    """The characters of a token.

    segment     0: the text; 1: the second text of a pair; -1: the tokenizer added the token
    start, end  the characters [start, end) in that text
    """

    segment: int
    start: int
    end: int


class SpannedTokens(NamedTuple):
    """The tokens of a text, and the span of each; a slow tokenizer has no spans."""

    ids: list[int]
    spans: list[TokenSpan]


class _Frame(NamedTuple):
    """Special tokens around texts.

    ids        the tokens before a text, or behind the last one
    types      their token types, where the tokenizer has these
    text_type  the token type of the text behind them
    """

    ids: list[int]
    types: list[int] | None = None
    text_type: int = 0


@dataclass(frozen=True)
class TokenizedText:
    """A row's text as tokens, without an answer.

    input_ids         [T] the tokens
    token_type_ids    [T] where the tokenizer has them
    spans             [T] the characters of each token, where the head needs them
    prompt_offsets    how many tokens come before the prompt, or before each slot; None lets the family decide
    instruction_mask  [T] 1 for tokens of the template's own words; None: it has none, or the tokenizer is a slow one
    """

    input_ids: list[int]
    token_type_ids: list[int] | None = None
    spans: list[TokenSpan] | None = None
    prompt_offsets: int | tuple[int, ...] | None = None
    instruction_mask: list[int] | None = None


@dataclass(frozen=True)
class TextTokenizer:
    """Tokenizes texts and answers of one task for one tokenizer, in the way that a family of models reads them.

    template   the task's template
    tokenizer  the tokenizer of transformers
    family     the family of models
    head       the head of the model
    has_slots  whether `<prompt>` in the templates is a slot for the prompt; else it is text like other
    """

    template: TaskTemplate
    tokenizer: Any
    family: Family
    head: Head
    has_slots: bool = False

    def answer(self, answer: str) -> list[int]:
        """Tokenize an answer: a pure function of it, the same in training, scoring and generation.

        Causal models: the continuation tokens of `separator + answer` (of the answer alone in a chat, or where the
        template is empty), then the end token. Masked models: the same without the end token. Encoder-decoder models:
        the tokenizer's tokens for a target text, with the end token.

        Args:
            answer: The answer.

        Returns:
            Its tokens.
        """
        if self.family == "seq2seq":
            ids = list(self.tokenizer(text_target=answer, verbose=False)["input_ids"])
            return ids if self.end_token is None or ids[-1:] == [self.end_token] else [*ids, self.end_token]
        needs_separator = self.template.template and not self.template.chat
        ids = self._tokenize_continuation(self.template.separator + answer if needs_separator else answer).ids
        return ids if self.family == "masked" or self.end_token is None else [*ids, self.end_token]

    def text(self, values: dict[str, str], masks: int) -> TokenizedText:
        """Tokenize a row's text.

        Args:
            values: The text of each column.
            masks: The number of mask tokens for the answer.

        Returns:
            The tokens of the filled template, and of the pair's.
        """
        template, pair = self.template.template, self.template.pair
        if masks and not mask_count(template) + mask_count(pair or ""):
            template += self.template.separator + "{" + MASK + "}"
        mask_text = (self.tokenizer.mask_token or "") * masks
        if self.has_slots:
            texts: list[list[FilledText]] = []
            for whole in [template] if pair is None else [template, pair]:
                texts.append([fill_template(piece, values, mask_text) for piece in split_slots(whole)[0]])
            return self._tokenize_around_slots(texts)
        first = fill_template(template, values, mask_text)
        second = None if pair is None else fill_template(pair, values, mask_text)
        if self.family == "causal":
            return self._tokenize_causal(first, second)
        return self._tokenize_bidirectional(first, second)

    def tokenize(self, text: str) -> list[int]:
        """The tokens of `text` alone, without special ones."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def token_starts(self, text: str) -> list[int]:
        """The character at which each token of `text` begins; every character where the tokenizer is a slow one."""
        if not self.tokenizer.is_fast:
            return list(range(len(text)))
        return [span.start for span in self._tokenize_with_spans(text).spans]

    @cached_property
    def end_token(self) -> int | None:
        """The token that ends an answer: the tokenizer's end token, or its separator in encoders used as decoders."""
        end_token = self.tokenizer.eos_token_id
        return int(end_token) if end_token is not None else self.tokenizer.sep_token_id

    @cached_property
    def _begin_tokens(self) -> list[int]:
        """The tokens that the tokenizer puts before a single text, such as the begin token."""
        ids, bare = list(self.tokenizer("a")["input_ids"]), self.tokenize("a")
        begin = _find_tokens(bare, ids, 0)
        return [] if begin is None else ids[:begin]

    def _tokenize_with_spans(self, text: str) -> SpannedTokens:
        """The tokens of `text` alone, with spans of segment 0."""
        if not self.tokenizer.is_fast:
            return SpannedTokens(self.tokenize(text), [])
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return SpannedTokens(
            list(encoding["input_ids"]), [TokenSpan(0, start, end) for start, end in encoding["offset_mapping"]]
        )

    def _tokenize_continuation(self, text: str) -> SpannedTokens:
        """Tokenize `text` behind the first anchor that it does not merge with.

        Byte-level tokens keep their leading space that way, and SentencePiece adds no second one.
        """
        for anchor in ANCHORS:
            anchor_ids = self.tokenize(anchor)
            ids, spans = self._tokenize_with_spans(anchor + text)
            if ids[: len(anchor_ids)] == anchor_ids and len(ids) > len(anchor_ids):
                return SpannedTokens(ids[len(anchor_ids) :], _shift(spans[len(anchor_ids) :], -len(anchor)))
        return self._tokenize_with_spans(text)

    @cached_property
    def _marks_instruction(self) -> bool:
        """Whether the template has words beside its columns and the tokenizer can say which tokens these are."""
        for template in (self.template.template, self.template.pair):
            pieces = split_slots(template)[0] if self.has_slots else [template]
            if any(map(has_words, pieces)):
                return bool(self.tokenizer.is_fast)
        return False

    def _instruction_mask(self, spans: Sequence[TokenSpan], texts: Sequence[FilledText]) -> list[int] | None:
        """1 for each token that holds the template's own words only; space is no word.

        Args:
            spans: The spans of the tokens.
            texts: The text of each segment.

        Returns:
            The mask; None where the template has no words, or the tokenizer is a slow one.
        """
        if not self._marks_instruction:
            return None
        mask: list[int] = []
        for segment, start, end in spans:
            is_instruction = False
            if segment >= 0 and texts[segment].text[start:end].strip():
                inserted = texts[segment].inserted
                is_instruction = not any(start < range_end and end > begin for begin, range_end in inserted)
            mask.append(int(is_instruction))
        return mask

    # Templates without slots

    def _tokenize_bidirectional(self, first: FilledText, second: FilledText | None) -> TokenizedText:
        """Tokenize a text, or a pair, as masked and encoder-decoder models read it."""
        needs_spans = self.head in ("token", "span")
        encoding = self.tokenizer(
            first.text,
            second and second.text,
            return_offsets_mapping=needs_spans or self._marks_instruction,
            verbose=False,
        )
        spans = instruction_mask = None
        if needs_spans or self._marks_instruction:
            spans = []
            for segment, (start, end) in zip(encoding.sequence_ids(0), encoding["offset_mapping"], strict=True):
                spans.append(TokenSpan(-1 if segment is None else segment, start, end))
            instruction_mask = self._instruction_mask(spans, [first] if second is None else [first, second])
        return TokenizedText(
            list(encoding["input_ids"]),
            encoding.get("token_type_ids"),
            spans if needs_spans else None,
            instruction_mask=instruction_mask,
        )

    def _tokenize_causal(self, first: FilledText, second: FilledText | None) -> TokenizedText:
        """Tokenize a text as causal models read it, or a chat.

        Tokenizers of causal models do not separate pairs, so the second text has a separate line.
        """
        whole = first if second is None else _two_lines(first, second)
        if self.template.chat:
            return self._tokenize_chat(whole)
        needs_spans = self.head in ("token", "span")
        if needs_spans or self._marks_instruction:
            ids, text_spans = self._tokenize_with_spans(whole.text)
        else:
            ids, text_spans = self.tokenize(whole.text), []
        spans = [TokenSpan(-1, 0, 0)] * len(self._begin_tokens) + text_spans
        return TokenizedText(
            [*self._begin_tokens, *ids],
            spans=_split_lines(spans, len(first.text) + 1) if needs_spans else None,
            prompt_offsets=0,
            instruction_mask=self._instruction_mask(spans, [whole]),
        )

    def _tokenize_chat(self, content: FilledText) -> TokenizedText:
        """Tokenize a chat of the system message and the user's words `content`."""
        text = self._render_chat(content.text, self.template.system)
        whole = _locate_message(text, content)
        ids, spans = self._tokenize_with_spans(text)
        if self.template.chat_placement == "start":
            return TokenizedText(ids, prompt_offsets=0, instruction_mask=self._instruction_mask(spans, [whole]))
        begin = len(self._chat_opening)
        if not text.startswith(self._chat_opening):
            raise DataError(
                f"{self.template.name}: the chat template does not begin the same for every row, so that "
                "chat_placement 'user' is not defined; use chat_placement: start"
            )
        if self.tokenizer.is_fast:
            offset = next((number for number, span in enumerate(spans) if span.end > begin), len(ids))
            if offset == len(ids) or spans[offset].start >= begin:
                mask = self._instruction_mask(spans, [whole])
                return TokenizedText(ids, prompt_offsets=offset, instruction_mask=mask)
        # A token reaches across the prompt's place: the two sides are tokenized on their own.
        opening_ids = self.tokenize(self._chat_opening)
        ids, spans = self._tokenize_with_spans(text[begin:])
        spans = [TokenSpan(-1, 0, 0)] * len(opening_ids) + _shift(spans, begin)
        return TokenizedText(
            [*opening_ids, *ids],
            prompt_offsets=len(opening_ids),
            instruction_mask=self._instruction_mask(spans, [whole]),
        )

    @cached_property
    def _chat_opening(self) -> str:
        """The text of the chat template before the user's words."""
        opening, sentinel, _ = self._render_chat(SENTINELS[0], self.template.system).partition(SENTINELS[0])
        if not sentinel:
            raise DataError(
                f"{self.template.name}: the chat template hides the user's words; use chat_placement: start"
            )
        return opening

    def _render_chat(self, content: str, system: str | None) -> str:
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": content})
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # a chat template is a program that raises anything
            raise DataError(f"{self.template.name}: the chat template refuses the messages: {error}") from None

    # Templates with slots for the prompt

    def _tokenize_around_slots(self, texts: list[list[FilledText]]) -> TokenizedText:
        """Tokenize the pieces around the slots, each on its own.

        The tokens of a piece depend neither on the other side of a slot nor on the prompt. The first piece with words
        is tokenized as the start of a text, the others as continuations.

        Args:
            texts: The pieces of the text, and of the second text of a pair.

        Returns:
            The tokens, and how many come before each slot.
        """
        if self.family == "causal":
            pieces = texts[0] if len(texts) == 1 else _join_pieces(*texts)
            texts = [self._render_chat_pieces(pieces) if self.template.chat else pieces]
        ids: list[int] = []
        types: list[int] = []
        mask: list[int] = []
        offsets: list[int] = []
        for frame, pieces in zip(self._frames, [*texts, []], strict=True):
            ids += frame.ids
            types += frame.types or [0] * len(frame.ids)
            mask += [0] * len(frame.ids)
            begin = next((number for number, piece in enumerate(pieces) if piece.text), 0)
            for number, piece in enumerate(pieces):
                if number:
                    offsets.append(len(ids))
                if number <= begin:
                    piece_ids, spans = self._tokenize_with_spans(piece.text)
                else:
                    piece_ids, spans = self._tokenize_continuation(piece.text)
                ids += piece_ids
                types += [frame.text_type] * len(piece_ids)
                mask += self._instruction_mask(spans, [piece]) or []
        return TokenizedText(
            ids,
            token_type_ids=None if self._frames[0].types is None else types,
            prompt_offsets=tuple(offsets),
            instruction_mask=mask if self._marks_instruction else None,
        )

    @cached_property
    def _frames(self) -> list[_Frame]:
        """The special tokens before each text, and those behind the last."""
        if self.family == "causal":
            return [_Frame([] if self.template.chat else self._begin_tokens), _Frame([])]
        texts = ("a",) if self.template.pair is None else ("a", "b")
        encoding = self.tokenizer(*texts, verbose=False)
        ids, types = list(encoding["input_ids"]), encoding.get("token_type_ids")
        frames: list[_Frame] = []
        end = 0
        for text in texts:
            text_ids = self.tokenize(text)
            begin = _find_tokens(text_ids, ids, end)
            if begin is None:
                raise DataError(f"{self.template.name}: the tokenizer writes a text in another way beside special "
                                "tokens, so slots for the prompt have no place; take <prompt> out")  # fmt: skip
            frames.append(_Frame(ids[end:begin], types and list(types[end:begin]), types[begin] if types else 0))
            end = begin + len(text_ids)
        return [*frames, _Frame(ids[end:], types and list(types[end:]))]

    def _render_chat_pieces(self, pieces: list[FilledText]) -> list[FilledText]:
        """The chat's text around the slots of the system message and of the user's words `pieces`."""
        system = split_slots(self.template.system)[0]
        contents = [piece.text for piece in pieces]
        all_text = "".join([*system, *contents])
        mark = next(sentinel for sentinel in SENTINELS if sentinel not in all_text)
        texts = self._render_chat(mark.join(contents), mark.join(system)).split(mark)
        if len(texts) != len(system) + len(pieces) - 1:
            raise DataError(f"{self.template.name}: the chat template leaves a slot for the prompt out or repeats it; "
                            "put <prompt> into another message")  # fmt: skip
        user_begin = len(system) - 1
        rendered = [FilledText(text, [(0, len(text))]) for text in texts[:user_begin]]
        for number, (text, piece) in enumerate(zip(texts[user_begin:], pieces, strict=True)):
            rendered.append(_locate_message(text, piece, last=len(pieces) > 1 and number == 0))
        return rendered


def _find_tokens(part: Sequence[int], whole: Sequence[int], start: int) -> int | None:
    """The first index from `start` at which `whole` has the tokens `part`."""
    for index in range(start, len(whole) - len(part) + 1):
        if whole[index : index + len(part)] == part:
            return index
    return None


def _shift(spans: Sequence[TokenSpan], by: int) -> list[TokenSpan]:
    return [TokenSpan(segment, start + by, end + by) for segment, start, end in spans]


def _shift_ranges(ranges: Sequence[CharRange], by: int) -> list[CharRange]:
    return [(start + by, end + by) for start, end in ranges]


def _split_lines(spans: Sequence[TokenSpan], second: int) -> list[TokenSpan]:
    """Count tokens from the character `second` on as segment 1, from its start."""
    split: list[TokenSpan] = []
    for span in spans:
        split.append(TokenSpan(1, span.start - second, span.end - second) if span.start >= second else span)
    return split


def _two_lines(first: FilledText, second: FilledText) -> FilledText:
    begin = len(first.text) + 1
    inserted = [*first.inserted, (begin - 1, begin), *_shift_ranges(second.inserted, begin)]
    return FilledText(f"{first.text}\n{second.text}", inserted)


def _join_pieces(first: list[FilledText], second: list[FilledText]) -> list[FilledText]:
    """The pieces of two texts in two lines."""
    return [*first[:-1], _two_lines(first[-1], second[0]), *second[1:]]


def _locate_message(text: str, content: FilledText, last: bool = False) -> FilledText:
    """Find a message in the text that a chat template wrote around it.

    Args:
        text: The text of the chat template.
        content: The message, or a piece of one.
        last: Whether the message is the last of equal words in `text`, as before a slot; else it is the first.

    Returns:
        `text`; all around the message, and all that was filled into it, counts as inserted.
    """
    bare = content.text.strip()
    position = text.rfind(bare) if last else text.find(bare)
    begin = position - content.text.find(bare) if bare in text else len(text)
    end = begin + len(content.text)
    return FilledText(text, [(0, begin), *_shift_ranges(content.inserted, begin), (end, len(text))])
