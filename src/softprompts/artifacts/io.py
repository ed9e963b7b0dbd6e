"""Safe files: tensors as safetensors, values as strict JSON, written whole or not at all, each fault in one line.

The only module that imports safetensors. Nothing is unpickled, nothing is executed.
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
    """Writes a safetensors file in one step: a reader, or a crash, sees the old file or the new one.

    Raises ArtifactError for what safetensors cannot hold and for a disk that does not take it.
    """
    _write(Path(path), pack(tensors, metadata, Path(path)))


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; raises ArtifactError for a file that is missing, cut or no such."""
    return unpack(read_bytes(path), Path(path))


def write_json(path: str | Path, value: Any) -> None:
    """Writes strict JSON in one step, as `write_tensors` does; raises ArtifactError for what JSON cannot hold."""
    _write(Path(path), dump(value, Path(path)))


def read_json(path: str | Path) -> Any:
    """The value of a JSON file; raises ArtifactError for a file that is missing or is not JSON."""
    data = read_bytes(path)
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is not valid JSON: {_line(error)}") from None


def read_bytes(path: str | Path) -> bytes:
    """The whole file; raises ArtifactError where the system refuses."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {_reason(error)}") from None


def pack(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> bytes:
    """The bytes of a safetensors file; `path` is for the message of the ArtifactError it may raise."""
    try:
        # a copy each, because safetensors refuses tensors that share memory and strides that are not plain
        copies = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
        # None, because an empty map beside no tensors comes out as broken JSON (safetensors 0.8)
        return safetensors.torch.save(copies, dict(metadata) or None)
    except (safetensors.SafetensorError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ArtifactError(f"{path}: safetensors cannot hold these tensors: {_line(error)}") from None


def unpack(data: bytes, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, in the order of their names, and metadata in the bytes of a safetensors file.

    path: for the message of the ArtifactError.
    """
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (safetensors.SafetensorError, KeyError, RuntimeError, TypeError, ValueError) as error:
        # asked only now: the header of a sound file may begin with the same bytes as a pickle
        if data[:4] == b"PK\x03\x04" or data[:1] == b"\x80":
            raise ArtifactError(f"{path} is a pickle under a safetensors name; it was not opened") from None
        raise ArtifactError(f"{path} is cut short or is not safetensors: {_line(error)}") from None
    # safetensors gives them in another order each time, and what is computed over all of them must be the same.
    return dict(sorted(tensors.items())), header.get("__metadata__", {})


def plain(value: Any, where: str) -> Any:
    """`value` as strict JSON holds it: tuples as lists, numpy numbers as numbers.

    Raises ArtifactError that names the place of anything else, such as NaN, a path or a key that is no string.
    """
    if isinstance(value, Mapping):
        if strange := [key for key in value if not isinstance(key, str)]:
            raise ArtifactError(f"{where}: the key {strange[0]!r} is not a string; JSON has no other keys")
        return {plain(key, where): plain(part, f"{where}.{key}") for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part, f"{where}.{index}") for index, part in enumerate(value)]
    value = number(value)
    if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
        raise ArtifactError(f"{where}: {value!r} is not valid Unicode")
    if isinstance(value, float) and not math.isfinite(value):
        raise ArtifactError(f"{where} is {value}; JSON has no such number")
    if value is not None and not isinstance(value, str | int | float):
        raise ArtifactError(f"{where} is a {type(value).__name__}; JSON cannot hold it")
    return value


def number(value: Any) -> Any:
    """A numpy or torch scalar as Python's number; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def dump(value: Any, path: Path) -> bytes:
    """The bytes of a JSON file; keys keep their order (that of a verbalizer is the order of the classes)."""
    return (json.dumps(plain(value, str(path)), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def replace_directory(
    target: Path, contents: Mapping[str, bytes], known: Collection[str], marks: Collection[str]
) -> None:
    """Puts a directory with the files of `contents` in the place of `target`, in one step.

    An existing target must be empty or hold a file of `marks`. Its files of `known` names go, all others stay.
    Raises ArtifactError, with the target as it was, when that is not so or the disk does not take it.
    """
    real = Path(os.path.realpath(target))  # a link to a directory stays a link
    token = secrets.token_hex(4)
    new, old = real.with_name(f".{real.name}.new-{token}"), real.with_name(f".{real.name}.old-{token}")
    try:
        if real.exists() and not real.is_dir():
            raise ArtifactError(f"{target} is a file; give a directory")
        if real.exists() and any(real.iterdir()) and not any((real / name).is_file() for name in marks):
            raise ArtifactError(f"{target} is not empty and is not an artifact; give another directory")
        try:
            new.mkdir(parents=True)
            for name, data in contents.items():
                _write_through(new / name, data)
            _sync(new)
            if real.exists():
                os.rename(real, old)
            os.rename(new, real)
        except BaseException:
            if old.exists() and not real.exists():
                os.rename(old, real)
            shutil.rmtree(new, ignore_errors=True)
            raise
        _sync(real.parent)
    except OSError as error:
        raise ArtifactError(f"{target} cannot be written: {_reason(error)}") from None
    if old.exists():
        _clear(old, real, known)


def _clear(old: Path, real: Path, known: Collection[str]) -> None:
    try:
        for entry in list(old.iterdir()):
            if entry.name not in known:
                os.rename(entry, real / entry.name)
    except OSError as error:
        raise ArtifactError(f"{real} is saved, but its other files are still in {old}: {_reason(error)}") from None
    shutil.rmtree(old, ignore_errors=True)


def _write(path: Path, data: bytes) -> None:
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
    """Makes renames in a directory survive a power cut, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _no_constant(name: str) -> Any:
    raise ValueError(f"it has no number {name}")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _reason(error: OSError) -> str:
    return error.strerror or _line(error)
