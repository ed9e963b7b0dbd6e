"""Fixtures that several test files share."""

import io
import sys

import pytest

from softprompts import cli


@pytest.fixture
def call(monkeypatch, capsys):
    """Run the command in this process: (exit status, standard output, standard error)."""

    def run(*arguments, stdin=""):
        monkeypatch.setattr(sys, "argv", ["softprompts", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        status = 0
        try:
            cli.main()
        except SystemExit as stop:
            status = stop.code or 0
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


LONGEST_FIRST = ("test_docs.py", "test_processes.py", "test_recipe_multitask.py", "test_train.py")
"""Files that no test process may be left alone with at the end."""


def pytest_collection_modifyitems(items):
    """Each file is run by one process, in the order of the files: the longest go first, so that none ends alone."""
    rank = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))
