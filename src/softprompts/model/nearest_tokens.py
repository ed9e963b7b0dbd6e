"""What a learned prompt resembles: the words nearest to its rows (Lester et al. 2021, section 7)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from softprompts.backbone import Backbone
from softprompts.errors import ConfigError


@dataclass(frozen=True)
class NearestTokens:
    """The words nearest to prompt row `row` by cosine, nearest first, and the row's norm."""

    row: int
    norm: float
    words: tuple[tuple[str, float], ...]


def nearest_tokens(backbone: Backbone, prompt: Tensor, count: int = 5) -> list[NearestTokens]:
    """The `count` words of the embedding table with the highest cosine to each row of `prompt [P, features]`.

    Raises ConfigError for prompts of another width, such as those of sites layers and kv.
    """
    if prompt.shape[1] != backbone.embedding_size:
        raise ConfigError(
            f"prompt rows of width {prompt.shape[1]} are no word embeddings (width {backbone.embedding_size}); "
            f"nearest words exist at sites input and decoder only"
        )
    tokenizer = backbone.tokenizer
    known = min(backbone.vocab_size, len(tokenizer))
    with torch.no_grad():
        rows = functional.normalize(prompt.float().to(backbone.device), dim=1)
        cosines = []
        for ids in torch.arange(known, device=backbone.device).split(8192):
            cosines.append(rows @ functional.normalize(backbone.embed(ids).float(), dim=1).T)
        best = torch.cat(cosines, 1).topk(min(count, known), dim=1)
    nearest = []
    for row, (indices, values) in enumerate(zip(best.indices.tolist(), best.values.tolist(), strict=True)):
        words = []
        for index, value in zip(indices, values, strict=True):
            words.append((tokenizer.decode([index]), round(value, 4)))
        nearest.append(NearestTokens(row, float(prompt[row].float().norm()), tuple(words)))
    return nearest
