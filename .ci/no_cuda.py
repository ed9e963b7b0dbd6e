"""Fail when CI installed CUDA libraries: gigabytes that a CPU never uses. Users may have them."""

import re
import sys
from collections.abc import Iterable
from importlib.metadata import distributions


def cuda_packages(names: Iterable[str]) -> list[str]:
    """The names of NVIDIA's libraries among the names of distributions, sorted."""
    return sorted({name for name in names if re.match("nvidia[-_.]", name.lower())})


def main() -> int:
    """Print the CUDA packages of this environment, if there are any.

    Returns:
        0 without CUDA packages, otherwise 1.
    """
    packages = cuda_packages(distribution.metadata["Name"] or "" for distribution in distributions())
    if packages:
        print(
            f"CI installed {len(packages)} CUDA packages: {', '.join(packages)}.\n"
            "CI needs the CPU build of torch: set TORCH_INDEX to an index that serves it and remove .venv.",
            file=sys.stderr,
        )
    return 1 if packages else 0


if __name__ == "__main__":
    sys.exit(main())
