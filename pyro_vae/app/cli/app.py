"""The application that the commands join, and how their errors are told."""

from __future__ import annotations

import inspect
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import typer

from pyro_vae.app.cli.options import CommandFunction, refuse_without_effect, with_parameters
from pyro_vae.errors import InputError

app = typer.Typer(
    help="Variational autoencoders in Pyro: train, measure log p(x), look at what was learned.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_CONTEXT = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
_DEBUG = inspect.Parameter(
    "debug",
    inspect.Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[
        bool, typer.Option("--debug", help="Show where in the code an error was raised.")
    ],
)


def command(*, unless: str | None = None) -> Callable[[CommandFunction], CommandFunction]:
    """Add a function to the application as the command of its name, with an option ``--debug``.

    An option without effect is refused before the function is called.

    Args:
        unless: an option that decides itself which others it goes with: given, nothing is refused.
    """

    def decorate(function: CommandFunction) -> CommandFunction:
        own = dict(inspect.signature(function, eval_str=True).parameters)

        def checked(*, context: typer.Context, debug: bool, **values: Any) -> None:
            try:
                if unless is None or values[unless] is None:
                    refuse_without_effect(context, own)
                function(**values, **({"context": context} if "context" in own else {}))
            except (InputError, OSError):
                if debug:
                    traceback.print_exc()
                raise

        shown = {"context": _CONTEXT, **own, "debug": _DEBUG}
        return app.command()(with_parameters(checked, function, shown.values()))

    return decorate


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
