"""The kinds of transformer as rows of data, and which row a stock model belongs to."""

from dataclasses import dataclass, replace

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from softprompts.errors import BackboneError


@dataclass(frozen=True)
class Family:
    """What a kind of transformer can do with a prompt.

    Attributes:
        name: causal, seq2seq or masked.
        auto_classes: Head -> the Auto class of transformers that loads it.
        sites: Names of the sites that a prompt may have.
        default_placement: Where in its row a prompt is unless the site says otherwise.
        scores_next_token: Whether a position scores the next label (causal), not its own.
        has_cache: Whether a cache may hold the prompt's keys and values.
    """

    name: str
    auto_classes: dict[str, str]
    sites: tuple[str, ...]
    default_placement: str
    scores_next_token: bool
    has_cache: bool


_HEADS = {
    "sequence": "AutoModelForSequenceClassification",
    "token": "AutoModelForTokenClassification",
    "span": "AutoModelForQuestionAnswering",
    "features": "AutoModel",
}

CAUSAL = Family(
    name="causal",
    auto_classes={"lm": "AutoModelForCausalLM", **_HEADS},
    sites=("input", "layers", "kv"),
    default_placement="first",
    scores_next_token=True,
    has_cache=True,
)
SEQ2SEQ = Family(
    name="seq2seq",
    auto_classes={"lm": "AutoModelForSeq2SeqLM", **_HEADS},
    sites=("input", "decoder", "layers", "kv"),
    default_placement="first",
    scores_next_token=False,
    has_cache=True,
)
MASKED = Family(
    name="masked",
    auto_classes={"lm": "AutoModelForMaskedLM", **_HEADS},
    sites=("input", "layers"),
    default_placement="after_start",
    scores_next_token=False,
    has_cache=False,
)
FAMILIES: dict[str, Family] = {family.name: family for family in (CAUSAL, SEQ2SEQ, MASKED)}

_HEAD_OF_SUFFIX = {
    "ForSequenceClassification": "sequence",
    "ForTokenClassification": "token",
    "ForQuestionAnswering": "span",
}


def family_of(model: PreTrainedModel) -> Family:
    """Which row of FAMILIES a stock model belongs to.

    Raises:
        BackboneError: The model is for something else than text (vision models have no row yet).
    """
    config = model.config
    is_decoder = getattr(config, "is_decoder", False)
    if config.is_encoder_decoder and hasattr(model.base_model, "decoder"):
        return SEQ2SEQ
    if type(config) in modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING and not is_decoder:
        # An encoder alone (T5 with a token head): no special token in front.
        return replace(MASKED, default_placement="first")
    if type(config) in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING and not is_decoder:
        return MASKED
    if type(config) in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING:
        return CAUSAL
    raise BackboneError(
        f"{type(model).__name__} is neither a causal, an encoder-decoder nor a masked language model; "
        f"families: {', '.join(FAMILIES)}"
    )


def head_of(model: PreTrainedModel) -> str:
    """The head a stock model carries: lm, sequence, token, span or features."""
    name = type(model).__name__
    for suffix, head in _HEAD_OF_SUFFIX.items():
        if name.endswith(suffix):
            return head
    return "lm" if model.get_output_embeddings() is not None else "features"


def family_of_config(config: PreTrainedConfig) -> Family:
    """Which row of FAMILIES a model of this configuration will belong to."""
    if config.is_encoder_decoder:
        return SEQ2SEQ
    return MASKED if type(config) in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING else CAUSAL
