"""The application that the commands join, the options they share, and how errors are told."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from pyro_vae.errors import InputError

__all__ = ["DataRoot", "Device", "Picture", "Run", "app", "main", "one_of"]

app = typer.Typer(
    help="Variational autoencoders in Pyro: train, measure log p(x), look at what was learned.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Run = Annotated[Path, typer.Argument(help="Run folder written by `pyro-vae train`.")]
DataRoot = Annotated[str | None, typer.Option(help="Folder of the data set; default: the run's.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Picture = Annotated[Path | None, typer.Option(help="Picture to write: .png, .svg or .pdf.")]


def one_of(names: Iterable[str]) -> str:
    """Return the help text of an option that takes one of these names."""
    return ", ".join(names)


def main() -> None:
    """Run the command line.

    A user's mistake, and a file that can't be read or written, is one line on standard error and exit
    code 2; a warning is one line on standard error.
    """
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: _tell(f"warning: {message}")
        try:
            app()
        except InputError as error:
            _tell(str(error))
            sys.exit(2)
        except OSError as error:
            where = error.filename or "the output"
            _tell(f"expected to read or write {where}, got: {error.strerror}")
            sys.exit(2)


def _tell(text: str) -> None:
    sys.stderr.write(f"pyro-vae: {text}\n")
