"""Peak memory above a loaded model, on Linux from the kernel's own counters, on CUDA from torch's."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import torch

MIB = 2**20
STATUS = Path("/proc/self/status")


def watch(device: str) -> Callable[[], dict[str, float]]:
    """Begin to watch the memory of this process.

    Returns:
        A function that gives MiB: `above` is VmHWM now minus VmRSS at the beginning. `of_steps` is the same with the
        high-water mark reset at the beginning, where the kernel permits it, so that it excludes a peak of loading. On
        CUDA both are the allocator's. `before` is the memory at the beginning.
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        loaded = torch.cuda.memory_allocated()

        def allocated() -> dict[str, float]:
            above = (torch.cuda.max_memory_allocated() - loaded) / MIB
            return {"above": above, "of_steps": above, "before": loaded / MIB}

        return allocated
    resident = read("VmRSS")
    loading = read("VmHWM")
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def counted() -> dict[str, float]:
        high = read("VmHWM")
        return {"above": max(high, loading) - resident, "of_steps": high - resident, "before": resident}

    return counted


def read(field: str) -> float:
    """A field of this process's status in MiB."""
    for line in STATUS.read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / MIB
    raise KeyError(f"{STATUS} has no {field}; peak memory is measured on Linux and on CUDA only")
