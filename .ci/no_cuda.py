"""Fail when the environment holds CUDA libraries that nobody asked for: gigabytes that a CPU never uses."""

import os
import re
import sys
from collections.abc import Iterable
from importlib.metadata import distributions


def cuda_packages(names: Iterable[str]) -> list[str]:
    """Those of the installed distributions' names that are NVIDIA's libraries, sorted."""
    return sorted({name for name in names if re.match("nvidia[-_.]", name.lower())})


def message(found: list[str]) -> str:
    """What was installed and what to do about it."""
    return (
        f"This environment came with {len(found)} CUDA packages: {', '.join(found)}.\n"
        "softprompts is set up with a CPU build of torch. Name an index that has one:\n"
        "    make env TORCH_INDEX=<address of an index of CPU builds of torch>    (the README says how)\n"
        "or keep the CUDA build on purpose:\n"
        "    make env ALLOW_CUDA=1"
    )


def main() -> int:
    """0 when there are none or ALLOW_CUDA is set, otherwise 1 and a message."""
    found = cuda_packages(one.metadata["Name"] or "" for one in distributions())
    if not found or os.environ.get("ALLOW_CUDA", "") not in ("", "0"):
        return 0
    print(message(found), file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
