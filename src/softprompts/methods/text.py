"""The check that methods which make prompts from text share."""

import torch

from softprompts.errors import PromptError
from softprompts.types import Context


def require_text(context: Context) -> None:
    """Refuse to learn from a batch without text, because prompts that answer always have text to be made from.

    Args:
        context: The batch; `attention_mask [B, T]` is 1 for the tokens that a prompt may be made from.

    Raises:
        PromptError: Prompts are being learned, and no row has such a token.
    """
    mask = context.attention_mask if context.batch_mask is None else context.batch_mask
    if torch.is_grad_enabled() and not bool(mask.any()):
        raise PromptError(
            "no row of the batch has text before its labels, and this method computes prompts from text; "
            "give a template with text before the answer, or use a method that does not read the text"
        )
