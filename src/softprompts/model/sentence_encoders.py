"""What frozen models make of whole texts: the vectors that a method such as IDPG makes prompts from.

A text is read alone and not beside others, so that not even the last digit of its vector hangs on its neighbors: a run
that is resumed continues bit for bit. It is read once, and its vector is stored.
"""

import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional

from softprompts import assets, injection
from softprompts.backbone import Backbone, loading
from softprompts.errors import BackboneError
from softprompts.injection import Site
from softprompts.types import Batch, Context, pool_states

MODELS = {"minilm": ("minilm-l6", 256)}
"""Encoders of sentences by name: the packaged model, and how many tokens of a text its makers have it read."""

KEPT = 100_000
"""Vectors that are kept; of the default model's states they take 230 MB. Then the oldest go."""

Key = tuple[str, tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class SentenceEncoder:
    """A frozen model of sentences with its own tokenizer; it reads the first `longest` tokens of a text."""

    backbone: Backbone
    longest: int

    def encode(self, text: str) -> Tensor:
        """The mean of all tokens' last hidden states, divided by its norm, `[E]`: as all-MiniLM-L6-v2's card says."""
        tokens = self.backbone.tokenizer(text, truncation=True, max_length=self.longest, return_tensors="pt")
        with torch.no_grad():
            states = self.backbone.model(**tokens.to(self.backbone.device)).last_hidden_state
        return functional.normalize(states[0].mean(0), dim=0)


@dataclass(frozen=True)
class SentenceEncoders:
    """Encoders of whole texts by name, beside the backbone, and the vectors of the texts that were read."""

    encoders: dict[str, SentenceEncoder] = field(default_factory=dict)
    kept: dict[Key, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def widths(self) -> Mapping[str, int]:
        """The width E of each encoder's vectors."""
        return {name: encoder.backbone.output_size for name, encoder in self.encoders.items()}

    def fetch(self, names: Collection[str], backbone: Backbone, say: Callable[[str], None] = lambda line: None) -> None:
        """Load those of `names` that are not here yet, to be used beside `backbone`.

        Raises BackboneError for an unknown encoder, and where nothing turns the backbone's token ids back into words;
        AssetError where an encoder cannot be fetched.
        """
        for name in names:
            if name in self.encoders:
                continue
            if name not in MODELS:
                raise BackboneError(f"no encoder '{name}'; possible: {', '.join(MODELS)}")
            if backbone.tokenizer is None:
                raise BackboneError(
                    f"encoder '{name}' reads words, and the model came without its tokenizer; give it too "
                    f"(SoftPromptModel(model, ..., tokenizer=tokenizer)), or use encoder backbone or static"
                )
            asset, longest = MODELS[name]
            path = assets.fetch(asset, say)
            say(f"loading {asset}")
            model = loading.load(asset, path=path, head="features", dtype="float32", device=str(backbone.device))
            self.encoders[name] = SentenceEncoder(model, longest)

    def context(self, backbone: Backbone, batch: Batch, mask: Tensor, ids_are_text: bool = True) -> Context:
        """What a method may look at.

        Args:
            backbone: The frozen backbone that `batch` is for.
            batch: The rows.
            mask: What of the text the method may use, [B, T].
            ids_are_text: Whether the batch's ids are its text, and not put there for a text that was given as
                embeddings.
        """
        with torch.no_grad():
            embeds = backbone.embed(batch.input_ids) if batch.inputs_embeds is None else batch.inputs_embeds

        @functools.cache
        def encode() -> Tensor:  # once for the methods of all tasks in the batch
            return _states(backbone, replace(batch, labels=None))

        @functools.cache
        def read(name: str) -> Tensor:
            rows = replace(batch, inputs_embeds=embeds)
            return self._read(backbone, rows, mask.bool(), ids_are_text, name)

        return Context(
            input_ids=batch.input_ids,
            inputs_embeds=embeds,
            attention_mask=mask,
            encode=encode,
            sentence_embedding=read,
            instruction_mask=batch.instruction_mask,
        )

    def _read(self, backbone: Backbone, batch: Batch, mask: Tensor, ids_are_text: bool, name: str) -> Tensor:
        """The vectors [B, E] that the encoder `name` computes for each row of `batch`."""
        return torch.stack([self._of_row(backbone, batch, i, mask[i], ids_are_text, name) for i in range(len(mask))])

    def _of_row(
        self, backbone: Backbone, batch: Batch, row: int, mask: Tensor, ids_are_text: bool, name: str
    ) -> Tensor:
        ids = tuple(batch.input_ids[row][mask].tolist())
        types = () if batch.token_type_ids is None else tuple(batch.token_type_ids[row][mask].tolist())
        key = (name, ids, types) if ids_are_text and batch.position_ids is None else None
        if key is None or key not in self.kept:
            if name in self.encoders:
                vector = self._encoded(backbone, name, ids, ids_are_text)
            else:
                vector = _pooled_state(backbone, batch, row, mask, name)
            if key is None:
                return vector
            if len(self.kept) >= KEPT:
                self.kept.pop(next(iter(self.kept)))
            self.kept[key] = vector.float().cpu()
        return self.kept[key].to(batch.input_ids.device)

    def _encoded(self, backbone: Backbone, name: str, ids: tuple[int, ...], ids_are_text: bool) -> Tensor:
        if not ids_are_text:
            raise BackboneError(
                f"encoder '{name}' reads words, and this text was given as inputs_embeds; give input_ids, or use a "
                f"prompt with encoder backbone or static"
            )
        return self.encoders[name].encode(backbone.tokenizer.decode(list(ids), skip_special_tokens=True))


def _pooled_state(backbone: Backbone, batch: Batch, row: int, mask: Tensor, name: str) -> Tensor:
    """The backbone's state of a row's text alone, [H]; `name` says which ("backbone-last")."""
    if not bool(mask.any()):
        return torch.zeros(backbone.output_size, device=mask.device)
    arguments = {
        name: None if value is None else value[row][mask][None]
        for name, value in (
            ("token_type_ids", batch.token_type_ids),
            ("inputs_embeds", batch.inputs_embeds),
            ("position_ids", batch.position_ids),
        )
    }
    ids = batch.input_ids[row][mask][None]
    alone = Batch(ids, torch.ones_like(ids), batch.task_ids[row : row + 1], **arguments)
    return pool_states(_states(backbone, alone), alone.attention_mask, name.removeprefix("backbone-"))[0]


def _states(backbone: Backbone, batch: Batch) -> Tensor:
    """The frozen backbone's last hidden states of the text without a prompt, [B, T, H]."""
    with torch.no_grad():
        states = injection.score(backbone, batch, None, Site(), return_hidden_states=True).hidden_states
    assert states is not None
    return states
