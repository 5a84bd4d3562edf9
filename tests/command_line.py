"""What the tests of the commands share: a call in this process, a small run, what is a refusal."""

import contextlib
import functools
import io
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import typer
from matplotlib.figure import Figure

from pyro_vae.app.cli import main

SMALL = ("--hidden", "16", "--latent-dim", "2", "--device", "cpu")

# What a run of one or two epochs and a few draws is warned of, and rightly so.
WARNED = [
    pytest.mark.filterwarnings("always:.* data points have Pareto k"),
    pytest.mark.filterwarnings("always:.* data points are not trusted"),
    pytest.mark.filterwarnings("always:grey values under a Bernoulli"),
]

ESTIMATE_KEYS = {
    "log_marginal",
    "standard_error",
    "data_standard_error",
    "expected_bias",
    "pseudo_likelihood",
    "elbo",
    "rate",
    "distortion",
    "num_samples",
    "num_data",
    "num_unreliable",
    "num_annealed",
    "median_ess",
    "acceptance",
    "method",
}
RUN_FILES = [
    "config.json",
    "metrics.json",
    "model.safetensors",
    "reconstructions.png",
    "report.html",
    "samples.png",
    "training.png",
]


render = Figure.savefig


@functools.cache
def blank(kind):
    """Return an empty picture of a kind, such as png, as its file's bytes."""
    content = io.BytesIO()
    render(Figure((1, 1)), content, format=kind)
    return content.getvalue()


def save_blank(figure, to, *, format=None, **options):
    """Write an empty picture in place of a figure."""
    if hasattr(to, "write"):
        to.write(blank(format))
    else:
        Path(to).write_bytes(blank(format or Path(to).suffix[1:]))


def sketching():
    """Leave the pictures of the commands empty: to render them is most of a small run's time."""
    return mock.patch.object(Figure, "savefig", save_blank)


# Typer builds all commands at each call, which takes longer than to refuse one.
get_command = functools.cache(typer.main.get_command)


class Result(NamedTuple):
    code: int
    out: str
    err: str


def run(*arguments):
    """Run the command line in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", ["pyro-vae", *map(str, arguments)]),
        mock.patch.object(typer.main, "get_command", get_command),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
    return Result(code, out.getvalue(), err.getvalue())


def train(*arguments, epochs=2):
    """Train a small run; it must succeed."""
    result = run("train", *SMALL, "--epochs", epochs, *arguments)
    assert result.code == 0, result.err
    return result


def snapshot(folder):
    """Return what is in a folder, to compare it with what is there later."""
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
