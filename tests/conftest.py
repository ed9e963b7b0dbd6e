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
