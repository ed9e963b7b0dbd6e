"""A measurement in a separate process, without other modules and without memory of earlier measurements."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


class FreshError(RuntimeError):
    """A measurement's process failed; its output is on the terminal."""


def environment(threads: int) -> dict[str, str]:
    """What decides about threads and looks for nothing on the network; allocator settings are the caller's own."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # as the command sets it
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }


def call(
    run: str, arguments: Mapping[str, Any], threads: int, changes: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What `runs.<run>(**arguments)` gives in a new process; `changes` are variables of its environment.

    Raises FreshError when the process fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        words = [sys.executable, "-m", "benchmarks", "one", run, json.dumps(dict(arguments)), str(file)]
        done = subprocess.run(
            words,
            cwd=ROOT,
            env={**os.environ, **environment(threads), **(changes or {})},
            stdout=subprocess.DEVNULL,
            check=False,
        )
        if done.returncode:
            raise FreshError(f"the process of measurement '{run}' ended with status {done.returncode}; see above")
        result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return result
