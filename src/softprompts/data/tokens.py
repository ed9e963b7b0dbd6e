"""From texts to tokens, and the one rule by which answers are tokenised."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from softprompts.config import Head
from softprompts.data.task import Format
from softprompts.data.template import MASK, DataError, filled, has_words, mask_count

Family = Literal["causal", "seq2seq", "masked"]

Place = tuple[int, int]  # from one character to another
Filled = tuple[str, list[Place]]  # a text, and where in it stands what was filled in

ANCHORS = ("\n", ":", "a")
"""What an answer is tokenised behind, so that it gets the tokens of a continuation and not those of a text's start."""

SENTINEL = "\ue000"
"""A character that no chat template writes: it shows where the user's words begin."""


@dataclass(frozen=True)
class Tokens:
    """Tokenised text: ids, types, and of each token (segment, start, end) in characters.

    Segment 0 is the text, 1 the second text of a pair, -1 what the tokenizer added; spans are there where the head
    needs them. place: how many tokens stand before the prompt, None where the family decides; words: 1 for tokens of
    the template's own words, None where it has none or nobody can say.
    """

    ids: list[int]
    types: list[int] | None = None
    spans: list[tuple[int, int, int]] | None = None
    place: int | None = None
    words: list[int] | None = None


@dataclass(frozen=True)
class Speller:
    """Spells texts and answers of one format in the tokens of one tokenizer, as a family of models reads them."""

    format: Format
    tokenizer: Any
    family: Family
    head: Head

    def answer(self, answer: str) -> list[int]:
        """The tokens of `answer`: a pure function of it, the same in training, scoring and generation.

        Causal models: continuation tokens of `separator + answer` (of the answer alone in a chat, or where the template
        is empty), then the end token. Masked models: the same without the end token. Encoder-decoder models: what the
        tokenizer makes of a target text, with the end token.
        """
        if self.family == "seq2seq":
            ids = list(self.tokenizer(text_target=answer, verbose=False)["input_ids"])
            return ids if self.end is None or ids[-1:] == [self.end] else [*ids, self.end]
        bare = self.format.chat or not self.format.template
        ids = self._continuation(answer if bare else self.format.separator + answer)
        return ids if self.family == "masked" or self.end is None else [*ids, self.end]

    @cached_property
    def end(self) -> int | None:
        """The token that ends an answer: the tokenizer's end token, or its separator in encoders used as decoders."""
        found = self.tokenizer.eos_token_id
        return int(found) if found is not None else self.tokenizer.sep_token_id

    @cached_property
    def _begin(self) -> list[int]:
        """What the tokenizer puts before a single text, such as the begin token; nothing it puts behind it."""
        whole, bare = self.tokenizer("a")["input_ids"], self.plain("a")
        found = [at for at in range(len(whole) - len(bare) + 1) if whole[at : at + len(bare)] == bare]
        return list(whole[: found[0]]) if found else []

    def plain(self, text: str) -> list[int]:
        """The tokens of `text` alone, without special ones."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def starts(self, text: str) -> list[int]:
        """The character at which each token of `text` begins; every character where the tokenizer cannot say."""
        if not self.tokenizer.is_fast:
            return list(range(len(text)))
        return [start for _, start, _ in self._spelt(text)[1]]

    def _continuation(self, text: str) -> list[int]:
        """`text` tokenised behind the first anchor that it does not merge with.

        Byte-level pieces keep their leading space that way, and SentencePiece adds no second one.
        """
        for anchor in ANCHORS:
            before, whole = self.plain(anchor), self.plain(anchor + text)
            if whole[: len(before)] == before and len(whole) > len(before):
                return whole[len(before) :]
        return self.plain(text)

    def text(self, values: dict[str, str], masks: int) -> Tokens:
        """The template (and the pair's) with `values` filled in, and `masks` mask tokens where the answer belongs."""
        form = self.format
        template, pair = form.template, form.pair
        if masks and not mask_count(template) + mask_count(pair or ""):
            template += form.separator + "{" + MASK + "}"
        filler = (self.tokenizer.mask_token or "") * masks
        first = filled(template, values, filler)
        second = None if pair is None else filled(pair, values, filler)
        if self.family == "causal":
            return self._causal(first, second)
        wants = self.head in ("token", "span")
        texts = (first[0], None if second is None else second[0])
        found = self.tokenizer(*texts, return_offsets_mapping=wants or self._marks, verbose=False)
        spans = words = None
        if wants or self._marks:
            both = zip(found.sequence_ids(0), found["offset_mapping"], strict=True)
            spans = [(-1 if segment is None else segment, start, end) for segment, (start, end) in both]
            words = self._own(spans, [first] if second is None else [first, second])
        return Tokens(list(found["input_ids"]), found.get("token_type_ids"), spans if wants else None, words=words)

    @cached_property
    def _marks(self) -> bool:
        """Whether the template has words of its own and the tokenizer can say which tokens these are."""
        return bool(self.tokenizer.is_fast) and (has_words(self.format.template) or has_words(self.format.pair))

    def _own(self, spans: Sequence[tuple[int, int, int]], texts: Sequence[Filled]) -> list[int] | None:
        """1 for each token that is of the template's own words and of nothing else, by segments; space is no word."""
        if not self._marks:
            return None
        return [
            int(
                segment >= 0
                and bool(texts[segment][0][start:end].strip())
                and not any(start < b and end > a for a, b in texts[segment][1])
            )
            for segment, start, end in spans
        ]

    def _spelt(self, text: str) -> tuple[list[int], list[tuple[int, int, int]]]:
        """The tokens of `text` alone, and where in it each stands, as spans of segment 0; a slow tokenizer has none."""
        if not self.tokenizer.is_fast:
            return self.plain(text), []
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return list(found["input_ids"]), [(0, start, end) for start, end in found["offset_mapping"]]

    def _causal(self, first: Filled, second: Filled | None) -> Tokens:
        # tokenizers of causal models do not separate pairs, so the second text gets a line of its own
        shift = len(first[0]) + 1
        whole, given = first[0], first[1]
        if second is not None:
            whole = f"{whole}\n{second[0]}"
            given = [*given, (shift - 1, shift), *((a + shift, b + shift) for a, b in second[1])]
        if self.format.chat:
            return self._chat(whole, given)
        wants = self.head in ("token", "span")
        ids, spans = self._spelt(whole) if wants or self._marks else (self.plain(whole), [])
        spans = [(-1, 0, 0)] * len(self._begin) + spans
        words = self._own(spans, [(whole, given)])
        parts = [(1, a - shift, b - shift) if a >= shift else (s, a, b) for s, a, b in spans] if wants else None
        return Tokens([*self._begin, *ids], None, parts, 0, words)

    def _chat(self, content: str, given: list[Place]) -> Tokens:
        text, bare = self._rendered(content), content.strip()
        # What the chat template writes around the user's message, or makes of it, is no part of the task's words.
        at = text.find(bare) - content.find(bare) if bare in text else len(text)
        around = [(0, at), *((a + at, b + at) for a, b in given), (at + len(content), len(text))]
        ids, spans = self._spelt(text)
        if self.format.chat_place == "start":
            return Tokens(ids, place=0, words=self._own(spans, [(text, around)]))
        begin = len(self._opening)
        if not text.startswith(self._opening):
            raise DataError(f"{self.format.name}: the chat template does not begin the same for every row, so that "
                            "chat_place 'user' is not defined; use chat_place: start")  # fmt: skip
        if self.tokenizer.is_fast:
            place = next((i for i, (_, _, end) in enumerate(spans) if end > begin), len(ids))
            if place == len(ids) or spans[place][1] >= begin:
                return Tokens(ids, place=place, words=self._own(spans, [(text, around)]))
        # a token reaches across the place where the prompt enters: the two sides are tokenised on their own
        before, (ids, spans) = self.plain(self._opening), self._spelt(text[begin:])
        spans = [(-1, 0, 0)] * len(before) + [(s, a + begin, b + begin) for s, a, b in spans]
        return Tokens([*before, *ids], place=len(before), words=self._own(spans, [(text, around)]))

    @cached_property
    def _opening(self) -> str:
        """What the chat template writes before the user's words."""
        before, found, _ = self._rendered(SENTINEL).partition(SENTINEL)
        if not found:
            raise DataError(f"{self.format.name}: the chat template hides the user's words; use chat_place: start")
        return before

    def _rendered(self, content: str) -> str:
        system = [{"role": "system", "content": self.format.system}] if self.format.system else []
        messages = [*system, {"role": "user", "content": content}]
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # a chat template is a program that raises what it likes
            raise DataError(f"{self.format.name}: the chat template refuses the messages: {error}") from None
