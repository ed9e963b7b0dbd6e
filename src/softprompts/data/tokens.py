"""From texts to tokens, and the one rule by which answers are tokenised."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from softprompts.config import Head
from softprompts.data.task import Format
from softprompts.data.template import MASK, DataError, mask_count, render, split_slots

Family = Literal["causal", "seq2seq", "masked"]

ANCHORS = ("\n", ":", "a")
"""What an answer is tokenised behind, so that it gets the tokens of a continuation and not those of a text's start."""

SENTINELS = tuple(map(chr, range(0xE000, 0xF900)))
"""Characters that no chat template writes: one shows where the user's words begin, or where the slots are."""


@dataclass(frozen=True)
class Tokens:
    """Tokenised text: ids, types, and of each token (segment, start, end) in characters.

    Segment 0 is the text, 1 the second text of a pair, -1 what the tokenizer added; spans are there where the head
    needs them. place: how many tokens stand before the prompt, or before each slot of the template; None where the
    family decides.
    """

    ids: list[int]
    types: list[int] | None = None
    spans: list[tuple[int, int, int]] | None = None
    place: int | tuple[int, ...] | None = None


@dataclass(frozen=True)
class Speller:
    """Spells texts and answers of one format in the tokens of one tokenizer, as a family of models reads them.

    slotted: whether `<prompt>` in the format's templates is a slot for the prompt; else it is text like other.
    """

    format: Format
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
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [start for start, _ in found["offset_mapping"]]

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
        if self.slotted:
            texts = [template] if pair is None else [template, pair]
            return self._around([[render(piece, values, filler) for piece in split_slots(one)[0]] for one in texts])
        text = render(template, values, filler)
        second = None if pair is None else render(pair, values, filler)
        if self.family == "causal":
            return self._causal(text, second)
        wants = self.head in ("token", "span")
        found = self.tokenizer(text, second, return_offsets_mapping=wants, verbose=False)
        spans = None
        if wants:
            both = zip(found.sequence_ids(0), found["offset_mapping"], strict=True)
            spans = [(-1 if segment is None else segment, start, end) for segment, (start, end) in both]
        return Tokens(list(found["input_ids"]), found.get("token_type_ids"), spans)

    def _causal(self, text: str, second: str | None) -> Tokens:
        # tokenizers of causal models do not separate pairs, so the second text gets a line of its own
        whole = text if second is None else f"{text}\n{second}"
        if self.format.chat:
            return self._chat(whole)
        wants = self.head in ("token", "span")
        found = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=wants, verbose=False)
        spans = None
        if wants:
            shift = len(text) + 1
            parts = [(1, a - shift, b - shift) if a >= shift else (0, a, b) for a, b in found["offset_mapping"]]
            spans = [(-1, 0, 0)] * len(self._begin) + parts
        return Tokens([*self._begin, *found["input_ids"]], None, spans, 0)

    def _chat(self, content: str) -> Tokens:
        text = self._rendered(content, self.format.system)
        if self.format.chat_place == "start":
            return Tokens(self.plain(text), place=0)
        if not text.startswith(self._opening):
            raise DataError(f"{self.format.name}: the chat template does not begin the same for every row, so that "
                            "chat_place 'user' is not defined; use chat_place: start")  # fmt: skip
        if self.tokenizer.is_fast:
            found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            ids, offsets, at = list(found["input_ids"]), found["offset_mapping"], len(self._opening)
            place = next((i for i, (_, end) in enumerate(offsets) if end > at), len(ids))
            if place == len(ids) or offsets[place][0] >= at:
                return Tokens(ids, place=place)
        # a token reaches across the place where the prompt enters: the two sides are tokenised on their own
        before = self.plain(self._opening)
        return Tokens([*before, *self.plain(text[len(self._opening) :])], place=len(before))

    @cached_property
    def _opening(self) -> str:
        """What the chat template writes before the user's words."""
        before, found, _ = self._rendered(SENTINELS[0], self.format.system).partition(SENTINELS[0])
        if not found:
            raise DataError(f"{self.format.name}: the chat template hides the user's words; use chat_place: start")
        return before

    def _rendered(self, content: str, system: str | None) -> str:
        first = [{"role": "system", "content": system}] if system else []
        messages = [*first, {"role": "user", "content": content}]
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # a chat template is a program that raises what it likes
            raise DataError(f"{self.format.name}: the chat template refuses the messages: {error}") from None

    # Templates with slots for the prompt

    def _around(self, texts: list[list[str]]) -> Tokens:
        """The pieces around the slots of one text or two, and how many tokens stand before each slot.

        Each piece is tokenised on its own, so that its tokens hang neither on what stands on the slot's other side nor
        on the prompt: the first one with words as a text begins, the others as a text goes on.
        """
        if self.family == "causal":
            first, *rest = texts
            second = rest[0] if rest else None
            pieces = first if second is None else [*first[:-1], f"{first[-1]}\n{second[0]}", *second[1:]]
            frame = Tokens([]) if self.format.chat else Tokens(self._begin)
            texts, frames = [self._turns(pieces) if self.format.chat else pieces], [frame, Tokens([])]
            inside: list[int | None] = [None]
        else:
            frames, inside = self._frames
        ids: list[int] = []
        types: list[int] = []
        places: list[int] = []
        for before, pieces, kind in zip(frames, texts, inside, strict=False):
            ids, types = ids + before.ids, types + (before.types or [])
            for number, tokens in enumerate(self._pieces(pieces)):
                if number:
                    places.append(len(ids))
                ids, types = ids + tokens, types + [kind or 0] * len(tokens)
        ids, types = ids + frames[-1].ids, types + (frames[-1].types or [])
        return Tokens(ids, None if inside[0] is None else types, None, tuple(places))

    def _pieces(self, pieces: list[str]) -> list[list[int]]:
        begin = next((number for number, piece in enumerate(pieces) if piece), 0)
        return [self.plain(piece) if at <= begin else self._continuation(piece) for at, piece in enumerate(pieces)]

    @cached_property
    def _frames(self) -> tuple[list[Tokens], list[int | None]]:
        """What the tokenizer puts before, between and behind texts; and the token type of each text, None without."""
        texts = ("a",) if self.format.pair is None else ("a", "b")
        whole = self.tokenizer(*texts, verbose=False)
        ids, types = list(whole["input_ids"]), whole.get("token_type_ids")
        frames, inside, at = [], [], 0
        for text in texts:
            own = self.plain(text)
            begin = next((i for i in range(at, len(ids) - len(own) + 1) if ids[i : i + len(own)] == own), None)
            if begin is None:
                raise DataError(f"{self.format.name}: the tokenizer writes a text in another way beside special "
                                "tokens, so slots for the prompt have no place; take <prompt> out")  # fmt: skip
            frames.append(Tokens(ids[at:begin], types and list(types[at:begin])))
            inside.append(types and types[begin])
            at = begin + len(own)
        return [*frames, Tokens(ids[at:], types and list(types[at:]))], inside

    def _turns(self, pieces: list[str]) -> list[str]:
        """What the chat template writes around the slots of the system message and of the user's words `pieces`."""
        system = split_slots(self.format.system)[0]
        every = "".join([*system, *pieces])
        mark = next(one for one in SENTINELS if one not in every)
        found = self._rendered(mark.join(pieces), mark.join(system)).split(mark)
        if len(found) != len(system) + len(pieces) - 1:
            raise DataError(f"{self.format.name}: the chat template leaves a slot for the prompt out or repeats it; "
                            "put <prompt> into another message")  # fmt: skip
        return found
