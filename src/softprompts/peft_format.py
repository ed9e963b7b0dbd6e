"""PEFT's prompt-tuning files as data: which artefacts PEFT can reproduce, what its two files hold, what they mean.

Written and read as PEFT 0.21 does. Nothing here touches a disk, and PEFT itself is not needed.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
LAYOUT = "0.21.2"  # the release of PEFT whose 17 keys are written

_PROMPT = "prompt_embeddings"
_PREFIX = "base_model."  # prompt learning wraps the model itself, so a head is base_model.<its key in the model>
_LM = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "masked": "FEATURE_EXTRACTION"}
_HEADS = {"sequence": "SEQ_CLS", "token": "TOKEN_CLS", "span": "QUESTION_ANS", "features": "FEATURE_EXTRACTION"}
_READ = {  # task_type -> family, head; a head that several families have does not say which
    "CAUSAL_LM": ("causal", "lm"),
    "SEQ_2_SEQ_LM": ("seq2seq", "lm"),
    **{task_type: (None, head) for head, task_type in _HEADS.items()},
}


class Adapter(NamedTuple):
    """What a PEFT directory says: prompt [P, D] as stored, heads keyed as in the model's state_dict."""

    prompt: Tensor
    heads: dict[str, Tensor]
    family: str | None
    head: str
    backbone: str
    revision: str | None


def obstacle(site: str, place: str, family: str | None, head: str, heads: Mapping[str, Tensor]) -> str | None:
    """Why PEFT cannot reproduce such a prompt, or None where it can."""
    if site != "input":
        return f"site {site}: PEFT's prompt tuning enters at the input embeddings only"
    if place != "first":
        return f"place {place}: PEFT puts the prompt before [CLS]"
    if head == "lm" and family is None:
        return "family unknown: PEFT's task_type needs it"
    if family == "seq2seq" and head in ("sequence", "span"):
        return f"head {head} of an encoder-decoder: its forward takes no input embeddings from PEFT"
    if head in ("sequence", "token", "span") and not heads:
        return f"head {head} without a trained copy: PEFT loads this task only with one"
    return None


def config(
    shape: tuple[int, int],
    family: str | None,
    head: str,
    heads: Mapping[str, Tensor],
    backbone: str,
    revision: str | None,
    architecture: Mapping[str, Any],
) -> dict[str, Any]:
    """The 17 keys of `adapter_config.json` for a prompt of `shape` (P, D).

    A masked language model is written as FEATURE_EXTRACTION: PEFT has no task of that name, and without a task_type it
    loads the prompt and then ignores it. Heads and layers are copied from `architecture` where it uses transformers'
    names; null lets PEFT ask the model.
    """
    return {
        "auto_mapping": None,
        "base_model_name_or_path": backbone or None,
        "inference_mode": True,
        "modules_to_save": sorted({key.split(".")[0] for key in heads}) or None,
        "num_attention_heads": architecture.get("num_attention_heads"),
        "num_layers": architecture.get("num_hidden_layers"),
        "num_transformer_submodules": 1,  # PEFT's default for seq2seq is 2, of which it trains and reads the first half
        "num_virtual_tokens": shape[0],
        "peft_type": "PROMPT_TUNING",
        "peft_version": LAYOUT,
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "revision": revision,
        "task_type": _LM[family] if head == "lm" and family else _HEADS[head],
        "token_dim": shape[1],
        "tokenizer_kwargs": None,
        "tokenizer_name_or_path": None,
    }


def tensors(prompt: Tensor, heads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `adapter_model.safetensors` under PEFT's names."""
    return {_PROMPT: prompt, **{_PREFIX + key: value for key, value in heads.items()}}


def read(values: Mapping[str, Any], stored: Mapping[str, Tensor]) -> Adapter:
    """What the two files of a PEFT directory mean; of a seq2seq prompt of 2P rows, the first P (PEFT reads no others).

    Raises ValueError for another peft_type, for values of a wrong type, for shapes that contradict them and for
    tensors that are neither the prompt nor a saved head.
    """
    peft_type = values.get("peft_type")
    if peft_type != "PROMPT_TUNING":
        raise ValueError(f"peft_type {peft_type!r} is not a soft prompt of one matrix; only PROMPT_TUNING loads")
    task_type = values.get("task_type")
    if not isinstance(task_type, str) or task_type not in _READ:
        hint = " (PEFT ignores the prompt of such a directory)" if task_type is None else ""
        raise ValueError(f"task_type {task_type!r}{hint}; set it to one of {', '.join(sorted(_READ))}")
    family, head = _READ[task_type]
    backbone, revision = (_optional(values, key, str) for key in ("base_model_name_or_path", "revision"))
    if _PROMPT not in stored:
        raise ValueError(f"no tensor '{_PROMPT}' in {TENSORS}; found: {', '.join(sorted(stored)) or 'none'}")
    prompt, heads = _prompt(values, stored[_PROMPT], family), _heads(values, stored)
    return Adapter(prompt, heads, family, head, backbone or "", revision)


def _prompt(values: Mapping[str, Any], rows: Tensor, family: str | None) -> Tensor:
    if not rows.is_floating_point():
        raise ValueError(f"{_PROMPT} must be floating point, found {rows.dtype}")
    length, width = _optional(values, "num_virtual_tokens", int), _optional(values, "token_dim", int)
    if length is None:
        raise ValueError("num_virtual_tokens is missing")
    copies = _optional(values, "num_transformer_submodules", int) or (2 if family == "seq2seq" else 1)
    if copies != 1 and family != "seq2seq":
        raise ValueError(f"num_transformer_submodules is {copies}, which only SEQ_2_SEQ_LM can have")
    expected = (length * copies, rows.shape[-1] if width is None and rows.ndim else width)
    if tuple(rows.shape) != expected:
        raise ValueError(
            f"{_PROMPT} has shape {list(rows.shape)}, but num_virtual_tokens {length} x num_transformer_submodules "
            f"{copies} and token_dim {width} make {list(expected)}"
        )
    return rows[:length]


def _heads(values: Mapping[str, Any], stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    modules = _optional(values, "modules_to_save", list) or []
    heads = {}
    for name, value in stored.items():
        if name == _PROMPT:
            continue
        parts = name.removeprefix(_PREFIX).split(".")
        owners = [".".join(parts[:end]) for end in range(1, len(parts))]
        # PEFT matches module names by their end, and so does this
        if not name.startswith(_PREFIX) or not any(owner.endswith(str(m)) for owner in owners for m in modules):
            raise ValueError(f"tensor '{name}' belongs neither to the prompt nor to modules_to_save {modules}")
        heads[".".join(parts)] = value
    return heads


def _optional(values: Mapping[str, Any], key: str, kind: type) -> Any:
    value = values.get(key)
    if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
        raise ValueError(f"{key} must be {kind.__name__}, found {type(value).__name__}")
    return value
