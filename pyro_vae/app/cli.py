"""The command line: every command with its options; the work is imported when a command is called."""

import io
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, get_args

import typer

from pyro_vae.app import names
from pyro_vae.app.options import CommandFunction, as_command, is_given, tell, tell_interruption
from pyro_vae.errors import InputError, first_line
from pyro_vae.version import __version__

app = typer.Typer(
    help="Variational autoencoders in Pyro: train, measure log p(x), look at what they learned.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Run = Annotated[Path, typer.Argument(help="Run folder written by `pyro-vae train`.")]
StudyFolder = Annotated[Path, typer.Option(help="Folder to write; it goes on where it stopped.")]
_BETAS = "Weights of the KL term, separated by commas, in training order."
Betas = Annotated[str, typer.Option(help=_BETAS)]
WarmStart = Annotated[bool, typer.Option(help="Start each run from the weights of the one before.")]
_LOSS = "Loss of the autoencoder: mse or bce; default: bce for data in [0, 1], else mse."
Loss = Annotated[str | None, typer.Option(help=_LOSS)]


def main() -> None:
    """Run the command line.

    A user's mistake, and a file that can't be read or written, is one line on standard error and exit
    code 2; a warning is one line on standard error.
    """
    with warnings.catch_warnings(), ExitStack() as at_end:
        # Where nobody else has said what SIGTERM does, it ends a command as an interruption does.
        before = signal.getsignal(signal.SIGTERM)
        if before == signal.SIG_DFL and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _interrupt)
            at_end.callback(signal.signal, signal.SIGTERM, before)
        try:
            _open_closed_streams()
            if sys.flags.optimize > 1:
                raise InputError("expected Python with docstrings, which Pyro reads, got -OO: use -O")
            app()
        except (KeyboardInterrupt, SystemExit) as end:
            # Typer ends by itself what is interrupted before the command begins.
            cause = getattr(end.__context__, "__cause__", end)
            if not isinstance(cause, KeyboardInterrupt):
                raise
            sys.exit(tell_interruption(cause))
        except InputError as error:
            tell(str(error))
            sys.exit(2)
        except (MemoryError, RuntimeError, ImportError) as error:
            if not re.search("(can't|to) (allocate|map)|(out of|not enough) memory", str(error)):
                raise
            tell(f"expected work that fits in memory, got: {first_line(error)}; ask for less at once")
            sys.exit(2)
        except OSError as error:
            tell(f"expected to read or write {error.filename or 'the output'}, got: {error.strerror}")
            sys.exit(2)


def _open_closed_streams() -> None:
    """Point closed streams at the null device, and let the others show any name."""
    # The next file would get a closed one's number, and with it what C code prints.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, io.StringIO())
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(number)


def command(example: str, **how: Any) -> Callable[[CommandFunction], CommandFunction]:
    """Add a function to the application, see :func:`pyro_vae.app.options.as_command`."""
    shown = f"Example: pyro-vae {example}"
    return lambda function: app.command(epilog=shown)(as_command(function, **how))


def _tell_version(asked: bool) -> None:
    if asked:
        typer.echo(f"pyro_vae {__version__}")
        raise typer.Exit


_VERSION = typer.Option("--version", callback=_tell_version, is_eager=True, help="Show it and exit.")


@app.callback()
def _begin(version: Annotated[bool, _VERSION] = False) -> None: ...


@command("train --dataset digits --output my-run", unless="resume")
def train(context: typer.Context, settings: names.TrainSettings, files: names.RunFiles) -> None:
    """Train a VAE, estimate log p(x) on its test data, write a run folder with a page to read."""
    from pyro_vae.app import train as work
    from pyro_vae.app.run_folder import Checkpointing
    from pyro_vae.distributed import join_processes

    if files.resume is None:
        when = Checkpointing(files.checkpoint_every, files.checkpoint_minutes)
        with join_processes(settings.device):
            work.train(settings, files.output, checkpointing=when)
        return
    for name in ("output", "checkpoint_every", "checkpoint_minutes"):
        if is_given(context, name):
            flag = name.replace("_", "-")
            raise InputError(f"expected --resume without --{flag}: the run folder has it")
    told = (each.name for each in fields(settings))
    given = {name: getattr(settings, name) for name in told if is_given(context, name)}
    with join_processes(settings.device):
        work.resume(files.resume, given)


@command("evaluate my-run --num-data 100")
def evaluate(run: Run, how: names.EvaluateSettings, files: names.EvaluateFiles) -> None:
    """Estimate log p(x) of a run's test part, and say how much of it can be trusted."""
    from pyro_vae.app import evaluate as work
    from pyro_vae.distributed import join_processes

    with join_processes(files.device) as processes:
        work.evaluate(run, how, files if processes.is_first else replace(files, picture=None))


@command(
    "compare --guides mean-field,iaf --seeds 3 --output families",
    without={
        names.EvaluateSettings: ("seed", "target_standard_error"),
        names.TrainSettings: ("prior", "likelihood", "guide"),
    },
    defaults={names.EvaluateSettings: {"num_samples": 1000}, names.TrainSettings: {"epochs": 60}},
)
def compare(
    *, output: StudyFolder, combined: names.CompareSettings, settings: names.TrainSettings,
    how: names.EvaluateSettings,
) -> None:  # fmt: skip
    """Train every combination with several seeds; write tables, figures and a page to compare."""
    from pyro_vae.app.compare import compare_families

    compare_families(settings, how, combined, output)


@command("sweep --betas 0.5,1,2 --output betas", without={names.TrainSettings: ("beta",)})
def sweep(
    *, output: StudyFolder, betas: Betas = "0.25,0.5,1,2,4", warm_start: WarmStart = False,
    settings: names.TrainSettings,
) -> None:  # fmt: skip
    """Train a series of runs over beta; write its rate-distortion table, picture and page."""
    from pyro_vae.app import sweep as work

    work.sweep(settings, betas, warm_start=warm_start, output=output)


# The autoencoder's training has no schedule, no clipping and no precision, and it is given x alone.
_OF_VAE = {"prior", "num_components", "guide", "beta", "schedule", "gradient_clip", "precision"}
_OF_VAE |= {"missing", "condition", "size_factor"}


@command("autoencoder --output baseline", without={names.TrainSettings: _OF_VAE})
def autoencoder(*, output: StudyFolder, settings: names.TrainSettings, loss: Loss = None) -> None:
    """Train an autoencoder and a VAE on the same data; compare them in a table and a picture."""
    from pyro_vae.app import autoencoder as work

    work.autoencoder(settings, loss, output=output)


def _add_picture(kind: type) -> None:
    """Add the command that draws one kind of picture, with its class's name, help and options."""

    def draw(run: Run, *, what: Any, settings: names.PictureSettings) -> None:
        from pyro_vae.app import pictures as work
        from pyro_vae.app.output import print_line

        print_line(str(work.draw(run, what, settings)))

    draw.__name__, draw.__doc__ = kind.__name__.lower(), kind.__doc__
    draw.__annotations__["what"] = kind
    command(f"{draw.__name__} my-run")(draw)


for _kind in get_args(names.Picture):
    _add_picture(_kind)
