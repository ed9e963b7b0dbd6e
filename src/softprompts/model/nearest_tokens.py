"""What a learned prompt resembles: the words nearest to its rows (Lester et al. 2021, section 7)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from softprompts.backbone import Backbone


@dataclass(frozen=True)
class NearestTokens:
    """The words nearest to prompt row `row` by cosine, nearest first, and the row's norm."""

    row: int
    norm: float
    words: tuple[tuple[str, float], ...]


def nearest_tokens(backbone: Backbone, prompt: Tensor, count: int = 5) -> list[NearestTokens]:
    """The `count` words of the embedding table with the highest cosine to each row of `prompt [P, features]`.

    Raises ValueError for prompts of another width, such as those of sites layers and kv.
    """
    if prompt.shape[1] != backbone.embedding_size:
        raise ValueError(
            f"prompt rows of width {prompt.shape[1]} are no word embeddings (width {backbone.embedding_size}); "
            f"nearest words exist at sites input and decoder only"
        )
    tokenizer = backbone.tokenizer
    known = min(backbone.vocab_size, len(tokenizer))
    with torch.no_grad():
        rows = functional.normalize(prompt.float().to(backbone.device), dim=1)
        cosines = torch.cat(
            [
                rows @ functional.normalize(backbone.embed(ids).float(), dim=1).T
                for ids in torch.arange(known, device=backbone.device).split(8192)
            ],
            1,
        )
        best = cosines.topk(min(count, known), dim=1)
    return [
        NearestTokens(
            i,
            float(prompt[i].float().norm()),
            tuple(
                (tokenizer.decode([index]), round(float(value), 4)) for index, value in zip(ids, values, strict=True)
            ),
        )
        for i, (ids, values) in enumerate(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    ]
