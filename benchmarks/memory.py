"""Peak memory above a loaded model, on Linux from the kernel's own counters, on CUDA from torch's."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import torch

MIB = 2**20
STATUS = Path("/proc/self/status")


def watch(device: str) -> Callable[[], dict[str, float]]:
    """Begin to watch this process; the answer gives MiB when it is called.

    `above`: VmHWM now minus VmRSS at the beginning; `of_steps`: the same with the high-water mark lowered at the
    beginning, where the kernel lets us, so that a peak of loading is left out. On CUDA both are the allocator's.
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()

        def allocated() -> dict[str, float]:
            above = (torch.cuda.max_memory_allocated() - held) / MIB
            return {"above": above, "of_steps": above, "before": held / MIB}

        return allocated
    resident, loading = read("VmRSS"), read("VmHWM")
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
