"""What this machine can do: which device, which number format, how many threads; the only file that names a device."""

import contextlib
import ctypes
import math
import os
import platform
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from softprompts.errors import BackboneError


def available_devices() -> list[str]:
    """The devices that torch can use here, accelerators first."""
    names = []
    if torch.cuda.is_available():
        names += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        names.append("mps")
    return [*names, "cpu"]


def choose_device(name: str | int) -> torch.device:
    """The device called `name` (`cuda:1` or its number 1); auto is the first accelerator torch sees, else the CPU.

    Raises:
        BackboneError: This machine does not have the device.
    """
    try:
        return torch.empty(0, device=available_devices()[0] if name == "auto" else name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise BackboneError(
            f"device '{name}' cannot be used here ({reason}); possible: auto, {', '.join(available_devices())}"
        ) from None


def native_bf16(device: torch.device) -> bool:
    """Whether `device` multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False  # torch cannot tell which of Apple's chips do and which only emulate it
    capabilities = _cpu_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))


def _cpu_capabilities() -> dict[str, Any]:
    """What torch knows about the CPU; nothing in versions of torch that cannot tell."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return capabilities


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The torch dtype called `name`; auto is bfloat16 where it is native on `device`, else float32."""
    if name == "auto":
        return torch.bfloat16 if native_bf16(device) else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def choose_threads(threads: int | None) -> int:
    """Set and return torch's thread count.

    Args:
        threads: None takes the cores that this process may really use. torch's own choice stays where OMP_NUM_THREADS
            is set, and where the system does not tell which processors these are.
    """
    if threads is None and "OMP_NUM_THREADS" not in os.environ and hasattr(os, "sched_getaffinity"):
        processors = os.sched_getaffinity(0)
        threads = usable_cores(processors, read_siblings(processors), read_quota())
    if threads is not None:
        torch.set_num_threads(threads)
    return torch.get_num_threads()


# loky's and joblib's cpu_count do not fit: beside an affinity or a quota they count hyperthreads as cores, round a
# quota up, and read the limit of the outermost control group only. Each makes threads wait for each other.
def usable_cores(processors: Collection[int], siblings: Mapping[int, str], quota: float | None) -> int:
    """How many threads pay: the physical cores among `processors`, within `quota`; at least one.

    Args:
        processors: Numbers of the logical processors that this process may use.
        siblings: For each processor, a name that the processors of one core have in common. A processor that is
            missing counts as a core.
        quota: Processor seconds a second; None: nothing limits them. It is rounded down: the system would hold back
            one of the threads beyond it, and the others would wait.
    """
    cores = len({siblings.get(number, f"processor {number}") for number in processors})
    if quota is not None:
        cores = min(cores, math.floor(quota))
    return max(1, cores)


def read_siblings(processors: Collection[int], root: Path = Path("/")) -> dict[int, str]:
    """The core of each processor, as Linux names it; what cannot be read is left out."""
    siblings = {}
    for number in processors:
        topology = root / f"sys/devices/system/cpu/cpu{number}/topology"
        for name in ("core_cpus_list", "thread_siblings_list"):  # newer and older kernels
            with contextlib.suppress(OSError):
                siblings[number] = (topology / name).read_text(encoding="ascii").strip()
                break
    return siblings


def read_quota(root: Path = Path("/")) -> float | None:
    """Processor seconds a second that this process's control groups (version 2 or 1) allow; None: without limit.

    The narrowest of the group and all groups around it counts.
    """
    quotas = []
    for folder in _control_groups(root):
        for quota in (_read_quota_v2(folder), _read_quota_v1(folder)):
            if quota is not None:
                quotas.append(quota)
    return min(quotas, default=None)


def _control_groups(root: Path) -> Iterator[Path]:
    """The folders of the process's control groups that may hold a limit, and of all groups around them."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mounts = [controllers, "cpu", "cpu,cpuacct", "cpuacct,cpu"] if controllers else ["", "unified"]
        for mount in dict.fromkeys(mounts):
            mount_point = (root / "sys/fs/cgroup" / mount).absolute()
            group = (mount_point / path.lstrip("/")).absolute()
            # In a container the path may be the host's, while the mounted folder is already the container's own.
            yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(mount_point))


def _read_quota_v2(folder: Path) -> float | None:
    try:
        limit, period = (folder / "cpu.max").read_text(encoding="ascii").split()
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        return None


def _read_quota_v1(folder: Path) -> float | None:
    try:
        limit = int((folder / "cpu.cfs_quota_us").read_text(encoding="ascii"))
        return None if limit <= 0 else limit / int((folder / "cpu.cfs_period_us").read_text(encoding="ascii"))
    except (OSError, ValueError, ZeroDivisionError):
        return None


def return_memory() -> None:
    """Return freed memory to the system; glibc otherwise keeps what lies between blocks in use."""
    with contextlib.suppress(OSError, TypeError, AttributeError):  # other C libraries
        ctypes.CDLL(None).malloc_trim(0)


def chip_name(device: torch.device) -> str:
    """The name of the chip that computes on `device`: measured times hold for this chip only."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.machine()} {_cpu_capabilities().get('cpu_name', '')}".strip()


def synchronize(device: torch.device) -> None:
    """Wait until `device` has done all that it was asked to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
