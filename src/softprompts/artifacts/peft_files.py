"""PEFT's prompt-tuning files as data: which artifacts PEFT can load, and what its two files hold and mean.

The files are those of PEFT 0.21. Nothing here touches a disk, and PEFT itself is not needed.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softprompts.artifacts.io import add_prefix

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PEFT_SITE = "input"
"""The only site whose prompts PEFT's files hold."""

PICKLE = "adapter_model.bin"

PEFT_VERSION = "0.21.2"
"""The release of PEFT whose 17 keys (multitask prompts: 21) are written."""

MULTITASK = "multitask-prompt-tuning"

MULTITASK_STATE = ("shared.prompt", "columns", "rows")
"""The names of that method's tensors for one task: the shared prompt, the task's columns and its rows."""

_PROMPT, _COLUMNS, _ROWS = "prompt_embeddings", "prefix_task_cols", "prefix_task_rows"
_PEFT_TYPES = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING")

_PREFIX = "base_model."
"""Prompt learning wraps the model itself, so PEFT's name of a head's tensor is this and its key in the model."""

_LM_TYPES = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "masked": "FEATURE_EXTRACTION"}
_HEAD_TYPES = {"sequence": "SEQ_CLS", "token": "TOKEN_CLS", "span": "QUESTION_ANS", "features": "FEATURE_EXTRACTION"}

_FAMILY_AND_HEAD: dict[str, tuple[str | None, str]] = {
    "CAUSAL_LM": ("causal", "lm"),
    "SEQ_2_SEQ_LM": ("seq2seq", "lm"),
    **{task_type: (None, head) for head, task_type in _HEAD_TYPES.items()},
}
"""task_type -> family and head; the family is None where several families have the head."""


class PeftAdapter(NamedTuple):
    """The contents of a PEFT directory.

    Attributes:
        prompt: The plain prompt, [P, D].
        heads: The tensors of a head, keyed as in the model's state_dict.
        family: causal or seq2seq; None where PEFT's files do not say.
        head: lm, sequence, token, span or features.
        backbone: The model's name; empty where PEFT's files do not say.
        revision: The model's revision.
        method: The method's name in this library.
        options: The method's options.
        state: The method's tensors, under their names in this library.
        task: The name of the task where several share a prompt.
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


class MultitaskTensors(NamedTuple):
    """The prompts of K tasks that share one, in float32.

    Attributes:
        shared: The shared prompt, [R, D].
        columns: Each task's columns, [K, R, r].
        rows: Each task's rows, [K, r, D].
    """

    shared: Tensor
    columns: Tensor
    rows: Tensor


def why_peft_cannot_load(
    site: str,
    placement: str,
    family: str | None,
    head: str,
    heads: Mapping[str, Tensor],
    template: Mapping[str, Any] | None,
) -> str | None:
    """Why PEFT cannot load such a prompt, in one line; None where it can.

    Args:
        site: Where the prompt enters.
        placement: Where in the row the prompt is.
        family: The model's family; None where it is not known.
        head: The model's head.
        heads: The task's copy of a classification head.
        template: The task's `TaskTemplate`, as JSON.
    """
    if site != PEFT_SITE:
        return f"site {site}: PEFT's prompt tuning enters at the input embeddings only"
    if placement != "first":
        first = "[CLS]" if placement == "after_start" else "the text"
        return f"placement {placement}: PEFT puts the prompt before {first}"
    if template is not None and template.get("chat") and template.get("chat_placement") == "user":
        return "chat_placement user: PEFT puts the prompt before the whole chat"
    if head == "lm" and family is None:
        return "family unknown: PEFT's task_type needs it"
    if family == "seq2seq" and head in ("sequence", "span"):
        return f"head {head} of an encoder-decoder: its forward takes no input embeddings from PEFT"
    if head in ("sequence", "token", "span") and not heads:
        return f"head {head} without a trained copy: PEFT loads this task only with one"
    return None


def adapter_config(
    shape: tuple[int, int],
    family: str | None,
    head: str,
    heads: Mapping[str, Tensor],
    backbone: str,
    revision: str | None,
    architecture: Mapping[str, Any],
) -> dict[str, Any]:
    """The 17 keys of `adapter_config.json` for one prompt.

    A masked language model has the task type FEATURE_EXTRACTION. PEFT has no task type for it, and without one it loads
    the prompt and then ignores it.

    Args:
        shape: (P, D) of the prompt.
        family: The model's family.
        head: The model's head.
        heads: The task's copy of a classification head.
        backbone: The model's name.
        revision: The model's revision.
        architecture: Facts of the model. Its numbers of heads and layers are copied where they have transformers'
            names; without them PEFT asks the model.
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
        "peft_version": PEFT_VERSION,
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "revision": revision,
        "task_type": _LM_TYPES[family] if head == "lm" and family else _HEAD_TYPES[head],
        "token_dim": shape[1],
        "tokenizer_kwargs": None,
        "tokenizer_name_or_path": None,
    }


def adapter_tensors(prompt: Tensor, heads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `adapter_model.safetensors` under PEFT's names, for one prompt [P, D]."""
    return {_PROMPT: prompt, **add_prefix(_PREFIX, heads)}


def multitask_config(single: Mapping[str, Any], tasks: int, ranks: int) -> dict[str, Any]:
    """The 21 keys of `adapter_config.json` for tasks that share a prompt. No key names a file for PEFT to open.

    Args:
        single: The 17 keys for one prompt.
        tasks: K, the number of tasks.
        ranks: r, the rank of each task's columns and rows.
    """
    config = {
        **single,
        "num_ranks": ranks,
        "num_tasks": tasks,
        "peft_type": "MULTITASK_PROMPT_TUNING",
        "prompt_tuning_init_state_dict_path": None,
        "prompt_tuning_init_task": 0,
    }
    return dict(sorted(config.items()))


def multitask_tensors(states: Sequence[Mapping[str, Tensor]], heads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `adapter_model.safetensors` for tasks that share a prompt.

    Args:
        states: The state of each task, with the names in MULTITASK_STATE.
        heads: The head that all tasks share.
    """
    shared, columns, rows = MULTITASK_STATE
    return {
        **adapter_tensors(states[0][shared], heads),
        _COLUMNS: torch.stack([state[columns] for state in states]),
        _ROWS: torch.stack([state[rows] for state in states]),
    }


def read_adapter(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], task: int | str | None = None
) -> PeftAdapter:
    """The contents of a PEFT directory. Of a seq2seq prompt of 2P rows the first P are the encoder's, and are taken.

    Args:
        config: The values of `adapter_config.json`.
        tensors: The tensors of `adapter_model.safetensors`.
        task: The position of the task, where several share a prompt.

    Raises:
        ValueError: A peft_type or task_type that does not load here, a value of a wrong type, a shape that contradicts
            the configuration, a tensor of no known module, or a task that is missing or not named.
    """
    peft_type = config.get("peft_type")
    if peft_type not in _PEFT_TYPES:
        possible = ", ".join(_PEFT_TYPES)
        raise ValueError(f"peft_type {peft_type!r} is not a soft prompt that loads here; possible: {possible}")
    task_type = config.get("task_type")
    if not isinstance(task_type, str) or task_type not in _FAMILY_AND_HEAD:
        hint = " (PEFT ignores the prompt of such a directory)" if task_type is None else ""
        raise ValueError(f"task_type {task_type!r}{hint}; set it to one of {', '.join(sorted(_FAMILY_AND_HEAD))}")
    family, head = _FAMILY_AND_HEAD[task_type]
    backbone = _optional(config, "base_model_name_or_path", str)
    revision = _optional(config, "revision", str)
    if _PROMPT not in tensors:
        raise ValueError(f"no tensor '{_PROMPT}' in {TENSORS}; found: {', '.join(sorted(tensors)) or 'none'}")
    prompt = _read_prompt(config, tensors[_PROMPT], family)
    adapter = PeftAdapter(
        prompt=prompt,
        heads=_read_heads(config, tensors),
        family=family,
        head=head,
        backbone=backbone or "",
        revision=revision,
    )
    if peft_type == "PROMPT_TUNING":
        _task_position(task, 1)
        return adapter
    every = read_multitask(config, tensors)
    count, length = len(every.columns), len(prompt)
    position = _task_position(task, count)
    shared = every.shared[:length].clone()
    columns = every.columns[position, :length].clone()
    rows = every.rows[position].clone()
    return adapter._replace(
        prompt=shared * (columns @ rows),
        method=MULTITASK,
        options={"ranks": columns.shape[1]},
        state=dict(zip(MULTITASK_STATE, (shared, columns, rows), strict=True)),
        task=None if count == 1 else str(position),
    )


def read_multitask(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> MultitaskTensors:
    """The tensors of tasks that share a prompt.

    Args:
        config: The values of `adapter_config.json`; empty for a tensor file without one.
        tensors: The tensors of `adapter_model.safetensors`.

    Raises:
        ValueError: A tensor is missing or is not floating point, or a shape contradicts another one, num_tasks or
            num_ranks.
    """
    for name in (_PROMPT, _COLUMNS, _ROWS):
        if name not in tensors:
            raise ValueError(f"no tensor '{name}', which a multitask prompt has; found: {', '.join(sorted(tensors))}")
        if not tensors[name].is_floating_point():
            raise ValueError(f"{name} must be floating point, found {tensors[name].dtype}")
    shared, columns, rows = tensors[_PROMPT].float(), tensors[_COLUMNS].float(), tensors[_ROWS].float()
    if not _shapes_fit(shared, columns, rows):
        raise ValueError(
            f"{_PROMPT} {list(shared.shape)}, {_COLUMNS} {list(columns.shape)} and {_ROWS} {list(rows.shape)} do not "
            f"fit each other: [R, D], [K, R, r] and [K, r, D] are needed"
        )
    for key, size in (("num_tasks", len(columns)), ("num_ranks", columns.shape[2])):
        configured = _optional(config, key, int)
        if configured not in (None, size):
            raise ValueError(f"{key} is {configured}, but {_COLUMNS} has shape {list(columns.shape)}")
    return MultitaskTensors(shared, columns, rows)


def _shapes_fit(shared: Tensor, columns: Tensor, rows: Tensor) -> bool:
    if (shared.ndim, columns.ndim, rows.ndim) != (2, 3, 3) or 0 in (*shared.shape, *columns.shape):
        return False
    tasks, length, ranks = columns.shape
    return tuple(rows.shape) == (tasks, ranks, shared.shape[1]) and length == len(shared)


def count_prompt_copies(config: Mapping[str, Any]) -> int:
    """The number of prompts in the rows: 2 where PEFT made one each for encoder and decoder."""
    configured: int | None = _optional(config, "num_transformer_submodules", int)
    return configured or (2 if config.get("task_type") == "SEQ_2_SEQ_LM" else 1)


def count_tasks(config: Any) -> int:
    """The number of tasks in the JSON value of `adapter_config.json`; 1 where it is not a multitask prompt's."""
    if not isinstance(config, Mapping) or config.get("peft_type") != "MULTITASK_PROMPT_TUNING":
        return 1
    tasks = config.get("num_tasks")
    return tasks if isinstance(tasks, int) else 1


def _task_position(task: int | str | None, count: int) -> int:
    """The position that `task` names among `count` tasks."""
    names = list(map(str, range(count)))
    if task is None and count == 1:
        return 0
    if task is None or isinstance(task, bool) or str(task) not in names:
        advice = f"there is no task {task!r}"
        if task is None:
            advice = "say which is meant (task=0), or load all with SoftPromptModel.load_prompts"
        raise ValueError(f"holds the prompts of {count} tasks, {', '.join(names)}; {advice}")
    return int(task)


def _read_prompt(config: Mapping[str, Any], rows: Tensor, family: str | None) -> Tensor:
    """The first P of the rows, [P, D]."""
    if not rows.is_floating_point():
        raise ValueError(f"{_PROMPT} must be floating point, found {rows.dtype}")
    length, width = _optional(config, "num_virtual_tokens", int), _optional(config, "token_dim", int)
    if length is None:
        raise ValueError("num_virtual_tokens is missing")
    copies = count_prompt_copies(config)
    if copies != 1 and family != "seq2seq":
        raise ValueError(f"num_transformer_submodules is {copies}, which only SEQ_2_SEQ_LM can have")
    expected = (length * copies, rows.shape[-1] if width is None and rows.ndim else width)
    if tuple(rows.shape) != expected:
        raise ValueError(
            f"{_PROMPT} has shape {list(rows.shape)}, but num_virtual_tokens {length} x num_transformer_submodules "
            f"{copies} and token_dim {width} make {list(expected)}"
        )
    return rows[:length]


def _read_heads(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the modules in `modules_to_save`, keyed as in the model's state_dict."""
    modules = _optional(config, "modules_to_save", list) or []
    prompt_names = (_PROMPT,) if config.get("peft_type") == "PROMPT_TUNING" else (_PROMPT, _COLUMNS, _ROWS)
    heads = {}
    for name, value in tensors.items():
        if name in prompt_names:
            continue
        if not name.startswith(_PREFIX) or not _belongs_to(name.removeprefix(_PREFIX), modules):
            raise ValueError(f"tensor '{name}' belongs neither to the prompt nor to modules_to_save {modules}")
        heads[name.removeprefix(_PREFIX)] = value
    return heads


def _belongs_to(key: str, modules: Sequence[Any]) -> bool:
    """Whether a tensor is inside one of the modules. As in PEFT, a module's name counts by its end."""
    parts = key.split(".")
    owners = [".".join(parts[:end]) for end in range(1, len(parts))]
    endings = tuple(map(str, modules))
    return any(owner.endswith(endings) for owner in owners)


def _optional(config: Mapping[str, Any], key: str, kind: type) -> Any:
    """The value of a key, or None; ValueError for a value of another type."""
    value = config.get(key)
    if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
        raise ValueError(f"{key} must be {kind.__name__}, found {type(value).__name__}")
    return value
