"""PEFT's prompt-tuning files as data: which artifacts PEFT can reproduce, what its two files hold, what they mean.

Written and read as PEFT 0.21 does. Nothing here touches a disk, and PEFT itself is not needed.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
LAYOUT = "0.21.2"  # the release of PEFT whose 17 keys (multitask prompts: 21) are written
MULTITASK = "multitask-prompt-tuning"
STATE = ("shared.prompt", "columns", "rows")  # what that method holds for one task

_PROMPT, _COLUMNS, _ROWS = "prompt_embeddings", "prefix_task_cols", "prefix_task_rows"
_TYPES = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING")
_PREFIX = "base_model."  # prompt learning wraps the model itself, so a head is base_model.<its key in the model>
_LM = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "masked": "FEATURE_EXTRACTION"}
_HEADS = {"sequence": "SEQ_CLS", "token": "TOKEN_CLS", "span": "QUESTION_ANS", "features": "FEATURE_EXTRACTION"}
_READ = {  # task_type -> family, head; a head that several families have does not say which
    "CAUSAL_LM": ("causal", "lm"),
    "SEQ_2_SEQ_LM": ("seq2seq", "lm"),
    **{task_type: (None, head) for head, task_type in _HEADS.items()},
}


class Adapter(NamedTuple):
    """What a PEFT directory says: prompt [P, D], heads keyed as in the model's state_dict; method, options and state as
    this library has them; task, the name of one of several.
    """

    prompt: Tensor
    heads: dict[str, Tensor]
    family: str | None
    head: str
    backbone: str
    revision: str | None
    method: str = "prompt-tuning"
    options: Mapping[str, Any] = MappingProxyType({})
    state: Mapping[str, Tensor] = MappingProxyType({})
    task: str | None = None


class Multitask(NamedTuple):
    """The prompts of K tasks that share one: shared [R, D], columns [K, R, r], rows [K, r, D], in float32."""

    shared: Tensor
    columns: Tensor
    rows: Tensor


def obstacle(
    site: str,
    place: str,
    family: str | None,
    head: str,
    heads: Mapping[str, Tensor],
    form: Mapping[str, Any] | None,
) -> str | None:
    """Why PEFT cannot reproduce such a prompt, or None where it can; `form`: the task's data format, as JSON."""
    if site != "input":
        return f"site {site}: PEFT's prompt tuning enters at the input embeddings only"
    if place != "first":
        return f"place {place}: PEFT puts the prompt before {'[CLS]' if place == 'after_start' else 'the text'}"
    if form is not None and form.get("chat") and form.get("chat_place") == "user":
        return "chat_placement user: PEFT puts the prompt before the whole chat"
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


def shared_config(single: Mapping[str, Any], tasks: int, ranks: int) -> dict[str, Any]:
    """The 21 keys for `tasks` tasks that share a prompt, from the 17 of one; no path that loading would open again."""
    more = {
        "num_ranks": ranks,
        "num_tasks": tasks,
        "peft_type": "MULTITASK_PROMPT_TUNING",
        "prompt_tuning_init_state_dict_path": None,
        "prompt_tuning_init_task": 0,
    }
    return dict(sorted({**single, **more}.items()))


def shared_tensors(states: Sequence[Mapping[str, Tensor]], heads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `adapter_model.safetensors` for tasks that share a prompt, from the state of each."""
    shared, columns, rows = STATE
    return {
        **tensors(states[0][shared], heads),
        _COLUMNS: torch.stack([state[columns] for state in states]),
        _ROWS: torch.stack([state[rows] for state in states]),
    }


def read(values: Mapping[str, Any], stored: Mapping[str, Tensor], task: int | str | None = None) -> Adapter:
    """What the two files of a PEFT directory mean; of a seq2seq prompt of 2P rows, the first P, those of the encoder.

    task: which one of several that share a prompt, by place.
    Raises ValueError for another peft_type, for values of a wrong type, for shapes that contradict them, for tensors
    that are neither the prompt nor a saved head and for a task that is not there, or not named where there are several.
    """
    peft_type = values.get("peft_type")
    if peft_type not in _TYPES:
        raise ValueError(f"peft_type {peft_type!r} is not a soft prompt that loads here; possible: {', '.join(_TYPES)}")
    task_type = values.get("task_type")
    if not isinstance(task_type, str) or task_type not in _READ:
        hint = " (PEFT ignores the prompt of such a directory)" if task_type is None else ""
        raise ValueError(f"task_type {task_type!r}{hint}; set it to one of {', '.join(sorted(_READ))}")
    family, head = _READ[task_type]
    backbone, revision = (_optional(values, key, str) for key in ("base_model_name_or_path", "revision"))
    if _PROMPT not in stored:
        raise ValueError(f"no tensor '{_PROMPT}' in {TENSORS}; found: {', '.join(sorted(stored)) or 'none'}")
    prompt, heads = _prompt(values, stored[_PROMPT], family), _heads(values, stored)
    found = Adapter(prompt, heads, family, head, backbone or "", revision)
    if peft_type == "PROMPT_TUNING":
        _place(task, 1)
        return found
    every = multitask(values, stored)
    place = _place(task, len(every.columns))
    length = len(prompt)
    shared, columns, rows = (part.clone() for part in (every.shared[:length], every.columns[place], every.rows[place]))
    state = dict(zip(STATE, (shared, columns[:length], rows), strict=True))
    options = {"ranks": columns.shape[1]}
    name = None if len(every.columns) == 1 else str(place)
    return found._replace(
        prompt=shared * (columns[:length] @ rows), method=MULTITASK, options=options, state=state, task=name
    )


def multitask(values: Mapping[str, Any], stored: Mapping[str, Tensor]) -> Multitask:
    """The tensors of tasks that share a prompt; `values` is empty for a file without its configuration.

    Raises ValueError for tensors that are missing or are no numbers, and for shapes that contradict each other or
    num_tasks and num_ranks.
    """
    for name in (_PROMPT, _COLUMNS, _ROWS):
        if name not in stored:
            raise ValueError(f"no tensor '{name}', which a multitask prompt has; found: {', '.join(sorted(stored))}")
        if not stored[name].is_floating_point():
            raise ValueError(f"{name} must be floating point, found {stored[name].dtype}")
    shared, columns, rows = (stored[name].float() for name in (_PROMPT, _COLUMNS, _ROWS))
    if not _fit(shared, columns, rows):
        raise ValueError(
            f"{_PROMPT} {list(shared.shape)}, {_COLUMNS} {list(columns.shape)} and {_ROWS} {list(rows.shape)} do not "
            f"fit each other: [R, D], [K, R, r] and [K, r, D] are wanted"
        )
    for key, size in (("num_tasks", len(columns)), ("num_ranks", columns.shape[2])):
        if (given := _optional(values, key, int)) not in (None, size):
            raise ValueError(f"{key} is {given}, but {_COLUMNS} has shape {list(columns.shape)}")
    return Multitask(shared, columns, rows)


def _fit(shared: Tensor, columns: Tensor, rows: Tensor) -> bool:
    if (shared.ndim, columns.ndim, rows.ndim) != (2, 3, 3) or 0 in (*shared.shape, *columns.shape):
        return False
    tasks, length, ranks = columns.shape
    return tuple(rows.shape) == (tasks, ranks, shared.shape[1]) and length == len(shared)


def copies(values: Mapping[str, Any]) -> int:
    """How many prompts stand behind each other in the rows: 2 where PEFT made one for encoder and decoder each."""
    given: int | None = _optional(values, "num_transformer_submodules", int)
    return given or (2 if values.get("task_type") == "SEQ_2_SEQ_LM" else 1)


def count(values: Any) -> int:
    """Number of tasks that a configuration speaks of; 1 where it is no multitask prompt's."""
    tasks = values.get("num_tasks") if isinstance(values, Mapping) else None
    multitask = isinstance(values, Mapping) and values.get("peft_type") == "MULTITASK_PROMPT_TUNING"
    return tasks if multitask and isinstance(tasks, int) else 1


def _place(task: int | str | None, count: int) -> int:
    names = [str(place) for place in range(count)]
    if task is None and count == 1:
        return 0
    if task is None or isinstance(task, bool) or str(task) not in names:
        asked = "say which is meant (task=0), or load all with SoftPromptModel.load_prompts"
        asked = asked if task is None else f"there is no task {task!r}"
        raise ValueError(f"holds the prompts of {count} tasks, {', '.join(names)}; {asked}")
    return int(task)


def _prompt(values: Mapping[str, Any], rows: Tensor, family: str | None) -> Tensor:
    if not rows.is_floating_point():
        raise ValueError(f"{_PROMPT} must be floating point, found {rows.dtype}")
    length, width = _optional(values, "num_virtual_tokens", int), _optional(values, "token_dim", int)
    if length is None:
        raise ValueError("num_virtual_tokens is missing")
    parts = copies(values)
    if parts != 1 and family != "seq2seq":
        raise ValueError(f"num_transformer_submodules is {parts}, which only SEQ_2_SEQ_LM can have")
    expected = (length * parts, rows.shape[-1] if width is None and rows.ndim else width)
    if tuple(rows.shape) != expected:
        raise ValueError(
            f"{_PROMPT} has shape {list(rows.shape)}, but num_virtual_tokens {length} x num_transformer_submodules "
            f"{parts} and token_dim {width} make {list(expected)}"
        )
    return rows[:length]


def _heads(values: Mapping[str, Any], stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    modules = _optional(values, "modules_to_save", list) or []
    heads = {}
    for name, value in stored.items():
        if name == _PROMPT or (name in (_COLUMNS, _ROWS) and values.get("peft_type") != "PROMPT_TUNING"):
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
