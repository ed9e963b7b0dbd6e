"""Fixtures that several test files share."""

import io
import os
import sys

import pytest
from studies import __main__ as studies

from softprompts import cli
from softprompts.backbone import devices

HAS_DEVICE = bool(os.environ.get("SOFTPROMPTS_TEST_DEVICE")) or devices.available_devices() != ["cpu"]
"""Whether there is an accelerator, or a device that a person names, for the tests of devices."""

collect_ignore = [] if HAS_DEVICE else ["test_gpu.py"]


def pytest_report_header():
    """Say why the tests of devices are missing."""
    return [] if HAS_DEVICE else ["test_gpu.py is not collected: torch sees neither CUDA nor MPS here"]


def calling(monkeypatch, capsys, name, command):
    """A function that runs a command in this process: (exit status, standard output, standard error)."""

    def run(*arguments, stdin=""):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        status = 0
        try:
            command()
        except SystemExit as stop:
            status = stop.code or 0
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


@pytest.fixture
def call(monkeypatch, capsys):
    """The command `softprompts`."""
    return calling(monkeypatch, capsys, "softprompts", cli.main)


@pytest.fixture
def call_study(monkeypatch, capsys):
    """The command `python -m studies`."""
    return calling(monkeypatch, capsys, "studies", lambda: cli.main(studies.app))


LONGEST_FIRST = ("test_docs.py", "test_processes.py", "test_recipe_multitask.py", "test_train.py")
"""Files that no test process may be left alone with at the end."""


def pytest_collection_modifyitems(items):
    """Each file is run by one process, in the order of the files: the longest go first, so that none ends alone."""
    rank = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))
