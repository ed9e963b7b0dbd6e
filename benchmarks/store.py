"""The file of the results, with the facts of the machine that measured them."""

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
    """Results that cannot be read or continued."""


def read(file: Path) -> dict[str, Any]:
    """The results in `file`.

    Raises:
        StoreError: The file has no results of this version of the format.
    """
    try:
        results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"no results in {file}: {error}; make some with `python -m benchmarks`") from None
    if results.get("version") != VERSION:
        raise StoreError(f"{file} has version {results.get('version')} of the format, known is {VERSION}; measure anew")
    return results


def begin(file: Path, settings: dict[str, Any], resume: bool) -> dict[str, Any]:
    """The results to add to: those in `file` when resuming, else none yet.

    Raises:
        StoreError: The results come from another machine, other versions or other settings.
    """
    fresh: dict[str, Any] = {
        "version": VERSION,
        "settings": settings,
        "machine": machine(settings["threads"]),
        "results": {},
    }
    if not (resume and file.exists()):
        return fresh
    stored = read(file)
    for part in ("settings", "machine"):
        changed = [key for key in fresh[part] if stored[part].get(key) != fresh[part][key]]
        if changed:
            was = stored[part].get(changed[0])
            now = fresh[part][changed[0]]
            raise StoreError(
                f"{file} was made with {changed[0]} {was}, now it is {now}: the times do not compare; "
                f"leave --resume out or choose another file with --out"
            )
    return stored


def add(file: Path, results: dict[str, Any], name: str, value: dict[str, Any]) -> None:
    """Write one measurement; the file is complete at any time."""
    results["results"][name] = value
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, results)


def machine(threads: int) -> dict[str, Any]:
    """The facts that times depend on: CPU, threads, accelerator, versions."""
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
    """The load average of the last minute, which tells whether the machine was quiet."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def commit() -> str | None:
    """The commit of the measured checkout, where git knows it."""
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
