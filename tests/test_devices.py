"""Which device, number format and thread count are chosen, from given facts."""

import pytest
import torch

from softprompts.backbone import devices
from softprompts.errors import BackboneError


@pytest.mark.parametrize(
    ("allowed", "siblings", "quota", "expected"),
    [
        (range(8), {}, None, 8),  # nothing known about cores: a processor is one
        (range(8), {i: str(i % 4) for i in range(8)}, None, 4),  # two processors a core
        ({0, 1, 4, 5}, {i: str(i % 4) for i in range(8)}, None, 2),  # bound to two cores
        ({0, 1, 2}, {0: "0,1", 1: "0,1"}, None, 2),  # known for some only
        (range(64), {}, 3.5, 3),
        (range(2), {}, 3.5, 2),
        (range(4), {}, 0.5, 1),
        ((), {}, None, 1),
    ],
)
def test_usable_cores(allowed, siblings, quota, expected):
    assert devices.usable_cores(allowed, siblings, quota) == expected


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        (  # the narrowest of the group and those around it
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/cpu.max": "400000 100000\n",
                "sys/fs/cgroup/a/cpu.max": "200000 100000\n",
                "sys/fs/cgroup/other/cpu.max": "100000 100000\n",
            },
            2.0,
        ),
        (  # a path of the host, mounted as the container's own
            {"proc/self/cgroup": "0::/docker/1f\n", "sys/fs/cgroup/cpu.max": "300000 100000\n"},
            3.0,
        ),
        (  # version 1
            {
                "proc/self/cgroup": "4:memory:/m\n3:cpu,cpuacct:/job\n0::/\n",
                "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "250000\n",
                "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/memory/m/cpu.cfs_quota_us": "1\n",
                "sys/fs/cgroup/memory/m/cpu.cfs_period_us": "1\n",
            },
            2.5,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "nonsense\n"}, None),
    ],
)
def test_the_quota_of_control_groups(tmp_path, files, expected):
    assert devices.read_quota(write(tmp_path, files)) == expected


def test_the_processors_of_a_core(tmp_path):
    at = "sys/devices/system/cpu"
    files = {
        f"{at}/cpu0/topology/core_cpus_list": "0,2\n",
        f"{at}/cpu0/topology/thread_siblings_list": "wrong\n",
        f"{at}/cpu2/topology/thread_siblings_list": "0,2\n",
    }
    assert devices.read_siblings([0, 1, 2], write(tmp_path, files)) == {0: "0,2", 2: "0,2"}


@pytest.fixture
def threads(monkeypatch):
    """What torch was told, without telling it."""
    told = []
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: told[-1] if told else 99)
    monkeypatch.setattr(devices.os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(devices, "read_siblings", lambda _: dict.fromkeys(range(4), "all"))
    monkeypatch.setattr(devices, "read_quota", lambda: None)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return told


def test_threads_are_the_cores_unless_somebody_says_otherwise(threads, monkeypatch):
    assert devices.choose_threads(None) == 1
    assert devices.choose_threads(3) == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    threads.clear()
    assert devices.choose_threads(None) == 99  # torch has read the variable itself
    assert devices.choose_threads(2) == 2
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.delattr(devices.os, "sched_getaffinity")
    threads.clear()
    assert devices.choose_threads(None) == 99


def accelerators(monkeypatch, cuda=0, mps=False):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


def test_devices_name_accelerators_first(monkeypatch):
    accelerators(monkeypatch)
    assert devices.available_devices() == ["cpu"]
    accelerators(monkeypatch, cuda=2)
    assert devices.available_devices() == ["cuda:0", "cuda:1", "cpu"]
    accelerators(monkeypatch, mps=True)
    assert devices.available_devices() == ["mps", "cpu"]


def test_a_device_is_taken_by_name(monkeypatch):
    accelerators(monkeypatch)
    assert devices.choose_device("auto") == torch.device("cpu")
    asked = []

    class Made:
        device = "there"

    accelerators(monkeypatch, cuda=2)
    monkeypatch.setattr(torch, "empty", lambda _, device: asked.append(device) or Made)
    assert [devices.choose_device(name) for name in ("auto", "cuda:1", 1)] == ["there"] * 3
    assert asked == ["cuda:0", "cuda:1", 1]


@pytest.mark.parametrize("name", ["cuda:7", "gpu", "npu"])
def test_a_device_that_is_not_here_is_refused(name):
    with pytest.raises(BackboneError, match=rf"device '{name}' cannot be used here \(.*\); possible: auto, .*cpu"):
        devices.choose_device(name)


def test_number_formats(monkeypatch):
    cpu = torch.device("cpu")
    assert devices.choose_dtype("float16", cpu) == torch.float16
    for facts, native in (
        ({}, False),
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
        ({"bf16": True}, True),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda facts=facts: facts, raising=False)
        # A CUDA card beside it says nothing about the CPU.
        monkeypatch.setattr(torch.cuda, "is_available", lambda native=native: not native)
        assert devices.native_bf16(cpu) is native
        assert devices.choose_dtype("auto", cpu) == (torch.bfloat16 if native else torch.float32)
    assert devices.choose_dtype("auto", torch.device("mps")) == torch.float32
