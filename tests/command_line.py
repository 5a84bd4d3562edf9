"""What the tests of the commands share: a call in this process, and what a refusal must look like."""

import contextlib
import io
import sys
from typing import NamedTuple
from unittest import mock

from pyro_vae.cli import main

SMALL = ("--hidden", "16", "--latent-dim", "2", "--device", "cpu")


class Result(NamedTuple):
    code: int
    out: str
    err: str


def run(*arguments):
    """Run the command line in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", ["pyro-vae", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
    return Result(code, out.getvalue(), err.getvalue())


def snapshot(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def refused(folder, *arguments, message):
    """Check that a command fails with one clear line and touches nothing."""
    before = snapshot(folder)
    result = run(*arguments)
    assert result.code == 2, result
    assert result.out == ""
    assert result.err.startswith("pyro-vae: ")
    assert result.err.count("\n") == 1
    assert result.err.endswith("\n")
    assert message in result.err
    assert snapshot(folder) == before
