"""From the arguments of a stock model to a Batch: which row is of which task, what is text, what is a label."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from softprompts.backbone import SEQ2SEQ, Backbone
from softprompts.errors import ConfigError
from softprompts.types import Batch, mask_before_labels

Names = Sequence[str] | str | None
Places = Tensor | Sequence[int] | None


def places(
    names: Names,
    ids: Places,
    count: int,
    loaded: Sequence[str],
    index: Callable[[str], int],
    active: Callable[[], str],
) -> Tensor:
    """Each row's place among the loaded tasks, [B]: by names, by places, or the active task for all.

    Args:
        names: A name for all rows, or one for each.
        ids: Places instead of names.
        count: B, the number of rows.
        loaded: The names of the prompts.
        index: Gives the place of a name.
        active: Gives the name for rows that say none.
    """
    if names is not None and ids is not None:
        raise ConfigError("give either tasks or task_ids, not both")
    if ids is None:
        row_names = [names or active()] if names is None or isinstance(names, str) else list(names)
        indices = torch.tensor([index(str(name)) for name in row_names])
    else:
        indices = torch.as_tensor(ids).reshape(-1).long().cpu()
        if bool(((indices < 0) | (indices >= len(loaded))).any()):
            here = ", ".join(f"{i} {name}" for i, name in enumerate(loaded)) or "none"
            raise ConfigError(f"task_ids {indices.tolist()} name prompts that are not loaded; loaded: {here}")
    if len(indices) not in (1, count):
        raise ConfigError(f"{len(indices)} tasks are named for {count} rows; name one, or one for each row")
    return indices.expand(count)


def batch(backbone: Backbone, arguments: Mapping[str, Any], place: Callable[[int], Tensor]) -> Batch:
    """The arguments of a stock model as a batch; `place` gives the tasks of that many rows."""
    text, embeds, mask = arguments["input_ids"], arguments["inputs_embeds"], arguments["attention_mask"]
    if (text is None) == (embeds is None):
        raise ConfigError("give either input_ids or inputs_embeds")
    shape = (text if embeds is None else embeds).shape[:2]
    mask = torch.ones(shape, dtype=torch.long) if mask is None else mask
    for name, value in (("attention_mask", mask), ("words", arguments["words"])):
        if value is not None and value.shape != shape:
            raise ConfigError(f"{name} must be [rows, tokens] as the text, {list(shape)}, not {list(value.shape)}")
    decoding = backbone.family is SEQ2SEQ and backbone.head == "lm"
    wanted = labels(arguments) if decoding else None
    if decoding and "labels" in arguments and wanted is None and arguments["decoder_input_ids"] is None:
        raise ConfigError("an encoder-decoder model needs labels or decoder_input_ids")
    return Batch(
        torch.full(shape, -1) if text is None else text,  # -1: no token, so that whoever looks it up notices
        mask,
        place(shape[0]),
        labels=wanted,
        token_type_ids=arguments.get("token_type_ids"),
        inputs_embeds=embeds,
        prompt_offsets=arguments.get("prompt_places"),
        position_ids=arguments.get("position_ids"),
        decoder_input_ids=arguments["decoder_input_ids"],
        decoder_attention_mask=arguments["decoder_attention_mask"],
        instruction_mask=arguments["words"],
    ).to(backbone.device)


def labels(arguments: Mapping[str, Any]) -> Tensor | None:
    """Labels as the stock head takes them; of spans starts and ends, [B, 2]."""
    start, end = arguments.get("start_positions"), arguments.get("end_positions")
    if start is None or end is None:
        token_labels: Tensor | None = arguments.get("labels")
        return token_labels
    return torch.stack([start.reshape(-1), end.reshape(-1)], 1)


def text_mask(ids: Tensor, options: Mapping[str, Any], config: Any) -> Tensor:
    """What transformers' generate takes for text where nobody says: padding is none, unless it also ends texts."""

    def setting(name: str) -> Any:
        values = [options.get(name), getattr(options.get("generation_config"), name, None), getattr(config, name, None)]
        return next((value for value in values if value is not None), None)

    padding, end = setting("pad_token_id"), setting("eos_token_id")
    ends = end if isinstance(end, list) else [end]
    return torch.ones_like(ids) if padding is None or padding in ends else (ids != padding).long()


def readable(backbone: Backbone, mask: Tensor, token_labels: Tensor | None) -> Tensor:
    """What of the text a prompt may be made from, [B, T]: where the model scores its own text, no label."""
    scored = backbone.head == "lm" and backbone.family.scores_next_token
    return mask_before_labels(mask, token_labels if scored else None)


def without_none(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a caller gave."""
    return {name: value for name, value in arguments.items() if value is not None}
