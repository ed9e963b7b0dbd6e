"""The file that results are kept in, and the facts of the machine that made them."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from benchmarks.fresh import ROOT
from softprompts import __version__
from softprompts.artifacts.io import write_json

VERSION = 1


class StoreError(ValueError):
    """Results that cannot be read or gone on with."""


def read(file: Path) -> dict[str, Any]:
    """The results in `file`.

    Raises StoreError when there are none that this version understands.
    """
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"no results in {file}: {error}; make some with `python -m benchmarks`") from None
    if found.get("version") != VERSION:
        raise StoreError(f"{file} has version {found.get('version')} of the format, known is {VERSION}; measure anew")
    return found


def begin(file: Path, settings: dict[str, Any], resume: bool) -> dict[str, Any]:
    """The results to add to: those in `file` when resuming and there are some, else none yet.

    Raises StoreError when results were made on another machine, with other versions or other settings.
    """
    fresh: dict[str, Any] = {
        "version": VERSION,
        "settings": settings,
        "machine": machine(settings["threads"]),
        "results": {},
    }
    if not (resume and file.exists()):
        return fresh
    kept = read(file)
    for part in ("settings", "machine"):
        changed = [key for key in fresh[part] if kept[part].get(key) != fresh[part][key]]
        if changed:
            was, now = kept[part].get(changed[0]), fresh[part][changed[0]]
            raise StoreError(
                f"{file} was made with {changed[0]} {was}, now it is {now}: the times do not compare; "
                f"leave --resume out or choose another file with --out"
            )
    return kept


def add(file: Path, results: dict[str, Any], name: str, value: dict[str, Any]) -> None:
    """Keep one measurement; whoever reads the file at any time sees whole results."""
    results["results"][name] = value
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, results)


def machine(threads: int) -> dict[str, Any]:
    """What the times depend on."""
    able: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": threads,
        "bfloat16": {name: bool(able.get(name)) for name in ("avx512_bf16", "amx_bf16", "bf16")},
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "allocator": os.environ.get("LD_PRELOAD") or "the system's",
        "versions": {
            "softprompts": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
    }


def load() -> float | None:
    """Processes that wanted to run during the last minute: whether the machine was quiet."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def commit() -> str | None:
    """The state of the checkout that is measured, where git can say."""
    words = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
