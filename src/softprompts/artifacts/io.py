"""Safe files: tensors as safetensors, values as strict JSON, written whole or not at all, each fault in one line.

This is the only module of artifacts that imports safetensors. It unpickles nothing and executes nothing.
"""

import contextlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from softprompts.errors import ArtifactError


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file in one step: a reader, or a crash, sees the old file or the new one.

    Args:
        path: The file.
        tensors: Tensors of any shape and dtype, by name.
        metadata: Texts for the header of the file.

    Raises:
        ArtifactError: safetensors cannot hold the tensors, or the disk does not take the file.
    """
    write_bytes(Path(path), encode_tensors(tensors, metadata, Path(path)))


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file.

    Raises:
        ArtifactError: The file is missing, cut short or not safetensors.
    """
    return decode_tensors(read_bytes(path), Path(path))


def write_json(path: str | Path, value: Any) -> None:
    """Write strict JSON in one step, as `write_tensors` does.

    Raises:
        ArtifactError: JSON cannot hold the value, or the disk does not take the file.
    """
    write_bytes(Path(path), encode_json(value, Path(path)))


def read_json(path: str | Path) -> Any:
    """The value of a JSON file.

    Raises:
        ArtifactError: The file is missing or is not strict JSON.
    """
    data = read_bytes(path)
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is not valid JSON: {_one_line(error)}") from None


def read_bytes(path: str | Path) -> bytes:
    """The whole file.

    Raises:
        ArtifactError: The system refuses to read it.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {_reason(error)}") from None


def encode_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> bytes:
    """The bytes of a safetensors file.

    Args:
        tensors: Tensors of any shape and dtype, by name.
        metadata: Texts for the header of the file.
        path: The file, for messages.

    Raises:
        ArtifactError: safetensors cannot hold the tensors.
    """
    try:
        # safetensors refuses tensors that share memory or have strides, so each is copied.
        copies = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
        # safetensors 0.8 writes broken JSON for an empty map beside no tensors, so None replaces it.
        return safetensors.torch.save(copies, dict(metadata) or None)
    except (safetensors.SafetensorError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ArtifactError(f"{path}: safetensors cannot hold these tensors: {_one_line(error)}") from None


def decode_tensors(data: bytes, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, in the order of their names, and the metadata in the bytes of a safetensors file.

    Args:
        data: The bytes.
        path: The file, for messages.

    Raises:
        ArtifactError: The bytes are a pickle, are cut short or are not safetensors.
    """
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (safetensors.SafetensorError, KeyError, RuntimeError, TypeError, ValueError) as error:
        # A sound file may begin with the bytes of a pickle, so only a file that fails is tested for them.
        if data[:4] == b"PK\x03\x04" or data[:1] == b"\x80":
            raise ArtifactError(f"{path} is a pickle under a safetensors name; it was not opened") from None
        raise ArtifactError(f"{path} is cut short or is not safetensors: {_one_line(error)}") from None
    # safetensors returns tensors in a random order, and sums over all of them must not depend on it.
    return dict(sorted(tensors.items())), header.get("__metadata__", {})


def add_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, with `prefix` in front of their names."""
    return {f"{prefix}{name}": value for name, value in tensors.items()}


def take_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def to_json(value: Any, name: str) -> Any:
    """The value as strict JSON holds it: tuples as lists, scalars of numpy and torch as numbers.

    Args:
        value: The value.
        name: What messages call it.

    Raises:
        ArtifactError: JSON cannot hold a part of it, such as NaN, a path or a key that is not a string.
    """
    if isinstance(value, Mapping):
        mapping = {}
        for key, item in value.items():
            if not isinstance(key, str):
                raise ArtifactError(f"{name}: the key {key!r} is not a string; JSON has no other keys")
            mapping[to_json(key, name)] = to_json(item, f"{name}.{key}")
        return mapping
    if isinstance(value, list | tuple):
        return [to_json(item, f"{name}.{index}") for index, item in enumerate(value)]
    value = to_number(value)
    if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
        raise ArtifactError(f"{name}: {value!r} is not valid Unicode")
    if isinstance(value, float) and not math.isfinite(value):
        raise ArtifactError(f"{name} is {value}; JSON has no such number")
    if value is not None and not isinstance(value, str | int | float):
        raise ArtifactError(f"{name} is a {type(value).__name__}; JSON cannot hold it")
    return value


def to_number(value: Any) -> Any:
    """A scalar of numpy or torch as a number of Python; any other value as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def encode_json(value: Any, path: Path) -> bytes:
    """The bytes of a JSON file. Keys keep their order, because a verbalizer's order is that of the classes.

    Raises:
        ArtifactError: JSON cannot hold the value.
    """
    return (json.dumps(to_json(value, str(path)), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def replace_directory(
    target: Path, contents: Mapping[str, bytes], known: Collection[str], marks: Collection[str]
) -> None:
    """Replace a directory in one step by one with new files; other files of the old directory are moved across.

    Args:
        target: The directory.
        contents: The new files, by name.
        known: The names of files that are not moved across.
        marks: A directory with none of these files is only replaced where it is empty.

    Raises:
        ArtifactError: The target is a file or holds something else, or the disk does not take the files. The target
            is then as it was.
    """
    resolved = Path(os.path.realpath(target))  # a link to a directory stays a link
    token = secrets.token_hex(4)
    new = resolved.with_name(f".{resolved.name}.new-{token}")
    old = resolved.with_name(f".{resolved.name}.old-{token}")
    try:
        if resolved.exists() and not resolved.is_dir():
            raise ArtifactError(f"{target} is a file; give a directory")
        if resolved.exists() and any(resolved.iterdir()) and not any((resolved / name).is_file() for name in marks):
            raise ArtifactError(f"{target} is not empty and is not an artifact; give another directory")
        try:
            new.mkdir(parents=True)
            for name, data in contents.items():
                _write_through(new / name, data)
            _sync(new)
            if resolved.exists():
                os.rename(resolved, old)
            os.rename(new, resolved)
        except BaseException:
            if old.exists() and not resolved.exists():
                os.rename(old, resolved)
            shutil.rmtree(new, ignore_errors=True)
            raise
        _sync(resolved.parent)
    except OSError as error:
        raise ArtifactError(f"{target} cannot be written: {_reason(error)}") from None
    if old.exists():
        _move_other_files(old, resolved, known)


def _move_other_files(old: Path, new: Path, known: Collection[str]) -> None:
    try:
        for entry in list(old.iterdir()):
            if entry.name not in known:
                os.rename(entry, new / entry.name)
    except OSError as error:
        raise ArtifactError(f"{new} is saved, but its other files are still in {old}: {_reason(error)}") from None
    shutil.rmtree(old, ignore_errors=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file in one step, as `write_tensors` does.

    Raises:
        ArtifactError: The disk does not take the file.
    """
    new = path.with_name(f".{path.name}.new-{secrets.token_hex(4)}")
    try:
        try:
            _write_through(new, data)
            os.replace(new, path)
        except BaseException:
            with contextlib.suppress(OSError):
                new.unlink()
            raise
        _sync(path.parent)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be written: {_reason(error)}") from None


def _write_through(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(directory: Path) -> None:
    """Make renames in a directory survive a power cut, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"it has no number {name}")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _reason(error: OSError) -> str:
    return error.strerror or _one_line(error)
