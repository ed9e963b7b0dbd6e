"""From texts to tokens, and the one rule by which answers are tokenized."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from softprompts.config import Head
from softprompts.data.task import TaskTemplate
from softprompts.data.templates import MASK, fill_template, has_words, mask_count, split_slots
from softprompts.errors import DataError

Family = Literal["causal", "seq2seq", "masked"]

Place = tuple[int, int]  # from one character to another
Filled = tuple[str, list[Place]]  # a text, and where in it stands what was filled in
Span = tuple[int, int, int]  # of which text, and from one character to another
Spelt = tuple[list[int], list[Span]]  # tokens of a text, and where in it each stands

ANCHORS = ("\n", ":", "a")
"""What an answer is tokenized behind, so that it gets the tokens of a continuation and not those of a text's start."""

SENTINELS = tuple(map(chr, range(0xE000, 0xF900)))
"""Characters that no chat template writes: one shows where the user's words begin, or where the slots are."""


@dataclass(frozen=True)
class Tokens:
    """Tokenized text: ids, types, and of each token (segment, start, end) in characters.

    Segment 0 is the text, 1 the second text of a pair, -1 what the tokenizer added; spans are there where the head
    needs them. place: how many tokens stand before the prompt, or before each slot of the template; None where the
    family decides. words: 1 for tokens of the template's own words, None where it has none or nobody can say.
    """

    ids: list[int]
    types: list[int] | None = None
    spans: list[Span] | None = None
    place: int | tuple[int, ...] | None = None
    words: list[int] | None = None


@dataclass(frozen=True)
class TextTokenizer:
    """Spells texts and answers of one format in the tokens of one tokenizer, as a family of models reads them.

    slotted: whether `<prompt>` in the format's templates is a slot for the prompt; else it is text like other.
    """

    template: TaskTemplate
    tokenizer: Any
    family: Family
    head: Head
    slotted: bool = False

    def answer(self, answer: str) -> list[int]:
        """The tokens of `answer`: a pure function of it, the same in training, scoring and generation.

        Causal models: continuation tokens of `separator + answer` (of the answer alone in a chat, or where the template
        is empty), then the end token. Masked models: the same without the end token. Encoder-decoder models: what the
        tokenizer makes of a target text, with the end token.
        """
        if self.family == "seq2seq":
            ids = list(self.tokenizer(text_target=answer, verbose=False)["input_ids"])
            return ids if self.end is None or ids[-1:] == [self.end] else [*ids, self.end]
        bare = self.template.chat or not self.template.template
        ids = self._continuation(answer if bare else self.template.separator + answer)
        return ids if self.family == "masked" or self.end is None else [*ids, self.end]

    @cached_property
    def end(self) -> int | None:
        """The token that ends an answer: the tokenizer's end token, or its separator in encoders used as decoders."""
        end_id = self.tokenizer.eos_token_id
        return int(end_id) if end_id is not None else self.tokenizer.sep_token_id

    @cached_property
    def _begin(self) -> list[int]:
        """What the tokenizer puts before a single text, such as the begin token; nothing it puts behind it."""
        whole, bare = self.tokenizer("a")["input_ids"], self.plain("a")
        positions = [at for at in range(len(whole) - len(bare) + 1) if whole[at : at + len(bare)] == bare]
        return list(whole[: positions[0]]) if positions else []

    def plain(self, text: str) -> list[int]:
        """The tokens of `text` alone, without special ones."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def starts(self, text: str) -> list[int]:
        """The character at which each token of `text` begins; every character where the tokenizer cannot say."""
        if not self.tokenizer.is_fast:
            return list(range(len(text)))
        return [start for _, start, _ in self._spelt(text)[1]]

    def _continuation(self, text: str) -> list[int]:
        """`text` tokenized behind the first anchor that it does not merge with.

        Byte-level pieces keep their leading space that way, and SentencePiece adds no second one.
        """
        return self._continued(text)[0]

    def _continued(self, text: str) -> Spelt:
        for anchor in ANCHORS:
            before, (whole, spans) = self.plain(anchor), self._spelt(anchor + text)
            if whole[: len(before)] == before and len(whole) > len(before):
                return whole[len(before) :], _moved(spans[len(before) :], -len(anchor))
        return self._spelt(text)

    def text(self, values: dict[str, str], masks: int) -> Tokens:
        """The template (and the pair's) with `values` filled in, and `masks` mask tokens where the answer belongs."""
        form = self.template
        template, pair = form.template, form.pair
        if masks and not mask_count(template) + mask_count(pair or ""):
            template += form.separator + "{" + MASK + "}"
        filler = (self.tokenizer.mask_token or "") * masks
        if self.slotted:
            texts = [template] if pair is None else [template, pair]
            return self._around(
                [[fill_template(piece, values, filler) for piece in split_slots(one)[0]] for one in texts]
            )
        first = fill_template(template, values, filler)
        second = None if pair is None else fill_template(pair, values, filler)
        if self.family == "causal":
            return self._causal(first, second)
        wants = self.head in ("token", "span")
        both = (first[0], second and second[0])
        encoding = self.tokenizer(*both, return_offsets_mapping=wants or self._marks, verbose=False)
        spans = words = None
        if wants or self._marks:
            each = zip(encoding.sequence_ids(0), encoding["offset_mapping"], strict=True)
            spans = [(-1 if segment is None else segment, start, end) for segment, (start, end) in each]
            words = self._own(spans, [first] if second is None else [first, second])
        return Tokens(
            list(encoding["input_ids"]), encoding.get("token_type_ids"), spans if wants else None, words=words
        )

    @cached_property
    def _marks(self) -> bool:
        """Whether the template has words of its own and the tokenizer can say which tokens these are."""
        texts = [self.template.template, self.template.pair]
        pieces = [piece for text in texts for piece in split_slots(text)[0]] if self.slotted else texts
        return bool(self.tokenizer.is_fast) and any(map(has_words, pieces))

    def _own(self, spans: Sequence[Span], texts: Sequence[Filled]) -> list[int] | None:
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

    def _spelt(self, text: str) -> Spelt:
        """The tokens of `text` alone, and where in it each stands, as spans of segment 0; a slow tokenizer has none."""
        if not self.tokenizer.is_fast:
            return self.plain(text), []
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return list(encoding["input_ids"]), [(0, start, end) for start, end in encoding["offset_mapping"]]

    def _causal(self, first: Filled, second: Filled | None) -> Tokens:
        # tokenizers of causal models do not separate pairs, so the second text gets a line of its own
        whole, shift = first if second is None else _two_lines(first, second), len(first[0]) + 1
        if self.template.chat:
            return self._chat(whole)
        wants = self.head in ("token", "span")
        ids, spans = self._spelt(whole[0]) if wants or self._marks else (self.plain(whole[0]), [])
        spans = [(-1, 0, 0)] * len(self._begin) + spans
        words = self._own(spans, [whole])
        parts = [(1, a - shift, b - shift) if a >= shift else (s, a, b) for s, a, b in spans] if wants else None
        return Tokens([*self._begin, *ids], None, parts, 0, words)

    def _chat(self, content: Filled) -> Tokens:
        text = self._rendered(content[0], self.template.system)
        whole = _inside(text, content)
        ids, spans = self._spelt(text)
        if self.template.chat_placement == "start":
            return Tokens(ids, place=0, words=self._own(spans, [whole]))
        begin = len(self._opening)
        if not text.startswith(self._opening):
            raise DataError(f"{self.template.name}: the chat template does not begin the same for every row, so that "
                            "chat_placement 'user' is not defined; use chat_placement: start")  # fmt: skip
        if self.tokenizer.is_fast:
            place = next((i for i, (_, _, end) in enumerate(spans) if end > begin), len(ids))
            if place == len(ids) or spans[place][1] >= begin:
                return Tokens(ids, place=place, words=self._own(spans, [whole]))
        # a token reaches across the place where the prompt enters: the two sides are tokenized on their own
        before, (ids, spans) = self.plain(self._opening), self._spelt(text[begin:])
        spans = [(-1, 0, 0)] * len(before) + _moved(spans, begin)
        return Tokens([*before, *ids], place=len(before), words=self._own(spans, [whole]))

    @cached_property
    def _opening(self) -> str:
        """What the chat template writes before the user's words."""
        before, separator, _ = self._rendered(SENTINELS[0], self.template.system).partition(SENTINELS[0])
        if not separator:
            raise DataError(
                f"{self.template.name}: the chat template hides the user's words; use chat_placement: start"
            )
        return before

    def _rendered(self, content: str, system: str | None) -> str:
        first = [{"role": "system", "content": system}] if system else []
        messages = [*first, {"role": "user", "content": content}]
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # a chat template is a program that raises what it likes
            raise DataError(f"{self.template.name}: the chat template refuses the messages: {error}") from None

    # Templates with slots for the prompt

    def _around(self, texts: list[list[Filled]]) -> Tokens:
        """The pieces around the slots of one text or two, and how many tokens stand before each slot.

        Each piece is tokenized on its own, so that its tokens hang neither on what stands on the slot's other side nor
        on the prompt: the first one with words as a text begins, the others as a text goes on.
        """
        if self.family == "causal":
            first, *rest = texts
            second = rest[0] if rest else None
            pieces = first if second is None else [*first[:-1], _two_lines(first[-1], second[0]), *second[1:]]
            frame = Tokens([]) if self.template.chat else Tokens(self._begin)
            texts, frames = [self._turns(pieces) if self.template.chat else pieces], [frame, Tokens([])]
            inside: list[int | None] = [None]
        else:
            frames, inside = self._frames
        ids: list[int] = []
        types: list[int] = []
        words: list[int] = []
        places: list[int] = []
        for before, pieces, kind in zip(frames, texts, inside, strict=False):
            ids, types, words = ids + before.ids, types + (before.types or []), words + [0] * len(before.ids)
            begin = next((number for number, (piece, _) in enumerate(pieces) if piece), 0)
            for number, piece in enumerate(pieces):
                if number:
                    places.append(len(ids))
                tokens, spans = self._spelt(piece[0]) if number <= begin else self._continued(piece[0])
                ids, types = ids + tokens, types + [kind or 0] * len(tokens)
                words += self._own(spans, [piece]) or []
        ids, types = ids + frames[-1].ids, types + (frames[-1].types or [])
        words += [0] * len(frames[-1].ids)
        return Tokens(ids, None if inside[0] is None else types, None, tuple(places), words if self._marks else None)

    @cached_property
    def _frames(self) -> tuple[list[Tokens], list[int | None]]:
        """What the tokenizer puts before, between and behind texts; and the token type of each text, None without."""
        texts = ("a",) if self.template.pair is None else ("a", "b")
        whole = self.tokenizer(*texts, verbose=False)
        ids, types = list(whole["input_ids"]), whole.get("token_type_ids")
        frames, inside, at = [], [], 0
        for text in texts:
            plain_tokens = self.plain(text)
            begin = next(
                (
                    i
                    for i in range(at, len(ids) - len(plain_tokens) + 1)
                    if ids[i : i + len(plain_tokens)] == plain_tokens
                ),
                None,
            )
            if begin is None:
                raise DataError(f"{self.template.name}: the tokenizer writes a text in another way beside special "
                                "tokens, so slots for the prompt have no place; take <prompt> out")  # fmt: skip
            frames.append(Tokens(ids[at:begin], types and list(types[at:begin])))
            inside.append(types and types[begin])
            at = begin + len(plain_tokens)
        return [*frames, Tokens(ids[at:], types and list(types[at:]))], inside

    def _turns(self, pieces: list[Filled]) -> list[Filled]:
        """What the chat template writes around the slots of the system message and of the user's words `pieces`."""
        system = split_slots(self.template.system)[0]
        contents = [content for content, _ in pieces]
        every = "".join([*system, *contents])
        mark = next(sentinel for sentinel in SENTINELS if sentinel not in every)
        turns = self._rendered(mark.join(contents), mark.join(system)).split(mark)
        if len(turns) != len(system) + len(pieces) - 1:
            raise DataError(f"{self.template.name}: the chat template leaves a slot for the prompt out or repeats it; "
                            "put <prompt> into another message")  # fmt: skip
        before = len(system) - 1
        inside = [
            _inside(text, piece, last=len(pieces) > 1 and number == 0)
            for number, (text, piece) in enumerate(zip(turns[before:], pieces, strict=True))
        ]
        return [*((text, [(0, len(text))]) for text in turns[:before]), *inside]


def _moved(spans: Sequence[Span], by: int) -> list[Span]:
    return [(segment, start + by, end + by) for segment, start, end in spans]


def _two_lines(first: Filled, second: Filled) -> Filled:
    at = len(first[0]) + 1
    return f"{first[0]}\n{second[0]}", [*first[1], (at - 1, at), *((a + at, b + at) for a, b in second[1])]


def _inside(text: str, content: Filled, last: bool = False) -> Filled:
    """`text`, which a chat template made of a message or a piece of one, with the message's own places.

    What the template writes around the message, or makes of it, is no part of the task's words. last: where the same
    words stand several times in `text`, the message is the last of them, as before a slot; else the first.
    """
    bare = content[0].strip()
    start = text.rfind(bare) if last else text.find(bare)
    at = start - content[0].find(bare) if bare in text else len(text)
    return text, [(0, at), *((a + at, b + at) for a, b in content[1]), (at + len(content[0]), len(text))]
