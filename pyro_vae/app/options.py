"""How a function becomes a command: its options, and those of the settings that it takes."""

import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Container, Mapping
from dataclasses import Field, fields, is_dataclass
from inspect import Parameter, Signature, signature
from typing import Annotated, Any, get_type_hints

import typer

from pyro_vae.app import names
from pyro_vae.app.names import OnlyWith
from pyro_vae.errors import InputError, printable

CommandFunction = Callable[..., None]


def as_command(
    function: CommandFunction, *, unless: str | None = None,
    without: Mapping[type, Container[str]] | None = None,
    defaults: Mapping[type, Mapping[str, Any]] | None = None,
) -> CommandFunction:  # fmt: skip
    """Return a function in the form that Typer reads, with an option ``--debug``.

    A parameter that is annotated with a settings class, a dataclass of
    :func:`pyro_vae.app.names.option`, becomes one option per field, and the function is handed the
    settings as one object. An option without effect is refused before the function is called, unless
    the option named by ``unless`` is given, which decides itself which others it goes with. Fields in
    ``without`` are no options and keep their defaults; ``defaults`` differ from the class's.
    """
    without, defaults = without or {}, defaults or {}
    own = signature(function, eval_str=True).parameters
    options: dict[str, Parameter] = {"context": _as_keyword("context", typer.Context)}
    gathered: dict[str, list[Field[Any]]] = {}
    for parameter in own.values():
        kind = parameter.annotation
        if not is_dataclass(kind):
            options[parameter.name] = parameter
            continue
        assert isinstance(kind, type)
        chosen = [each for each in fields(kind) if each.name not in without.get(kind, ())]
        hints, changed = get_type_hints(kind), defaults.get(kind, {})
        for each in chosen:
            default = changed.get(each.name, each.default)
            options[each.name] = _as_keyword(each.name, _annotate(each, hints[each.name]), default)
        gathered[parameter.name] = chosen
    declared = [each for part in gathered.values() for each in part]

    def command(*, context: typer.Context, debug: bool, **values: Any) -> None:
        own_names = frozenset(options)
        said = "warning: {}".format
        warnings.showwarning = lambda text, *_, **__: tell(said(in_options(str(text), own_names)))
        try:
            if unless is None or values[unless] is None:
                _refuse_without_effect(context, declared)
            for name, part in gathered.items():
                chosen = {each.name: values.pop(each.name) for each in part}
                values[name] = own[name].annotation(**chosen)
                names.check_values(values[name])
            function(**values, **({"context": context} if "context" in own else {}))
        except (InputError, OSError) as error:
            if debug:
                traceback.print_exc()
            if isinstance(error, InputError):
                error.args = (in_options(str(error), own_names),)
            raise
        except KeyboardInterrupt as interruption:
            raise typer.Exit(tell_interruption(interruption)) from None

    # By keyword their order is free: options with a default may stand before those without.
    told = "Show the traceback of an error."
    debugging = typer.Option("--debug", help=told, rich_help_panel=panel_of("debug"))
    options["debug"] = _as_keyword("debug", Annotated[bool, debugging], False)
    shown = [each.replace(kind=Parameter.KEYWORD_ONLY) for each in options.values()]
    command.__signature__ = Signature(shown)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in shown}
    command.__name__, command.__doc__ = function.__name__, function.__doc__
    return command


def in_options(text: str, own: Container[str] | None = None) -> str:
    """Return a message of the library with options and their values in place of Python's.

    ``own`` are the options of the command; one of ``evaluate`` alone is shown with its command.
    """
    settings = (names.TrainSettings, names.EvaluateSettings, names.CompareSettings, names.Complete)
    known = {each.name for kind in settings for each in fields(kind)}
    known |= {"checkpoint_every", "checkpoint_minutes"}

    def spoken(found: re.Match[str]) -> str:
        name, value = (*found.groups(), "True")[:2]
        told = names.flag(name) + ("" if value == "True" else f" {value}")
        return told if own is None or name in own else f"`pyro-vae evaluate RUN {told}`"

    # Not where it is a part of a path or of another word.
    before, words = r"(?<![\w/.'\"`-])", sorted(known, key=len, reverse=True)
    text = re.sub(rf"{before}({'|'.join(words)})=[\"']?([\w-]+)[\"']?", spoken, text)
    apart = "|".join(word for word in words if "_" in word)
    text = re.sub(rf"{before}({apart})(?![\w/=.'])", spoken, text)
    families = {python: told for told, python in names.FAMILIES.items()}
    classes = f"({'|'.join(families)})"
    advised = re.search(rf"\buse {classes}( or {classes})*$", text)
    if advised:
        told = re.sub(classes, lambda found: families[found[0]], advised[0].removeprefix("use "))
        text = f"{text[: advised.start()]}use --guide {told}"
    for python, told in names.SPOKEN.items():
        text = text.replace(python, told)
    return text


def tell(text: str) -> None:
    """Write one line on standard error."""
    sys.stderr.write(f"pyro-vae: {printable(text)}\n")


def tell_interruption(interruption: KeyboardInterrupt) -> int:
    """Say how to resume after an interruption; return the exit code, 128 and the signal's number."""
    told = [*getattr(interruption, "__notes__", ()), "the same command"]
    tell(f"interrupted: resume with {told[0]}")
    numbers = [getattr(interruption, "number", None), *interruption.args, signal.SIGINT]
    return 128 + next(each for each in numbers if isinstance(each, int))


def is_given(context: typer.Context, name: str) -> bool:
    """Say whether an option was given, even with its default value."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _refuse_without_effect(context: typer.Context, declared: list[Field[Any]]) -> None:
    """Refuse an option that the value of another one leaves without effect."""
    for each in declared:
        condition: OnlyWith | None = each.metadata["only_with"]
        if condition is None or not is_given(context, each.name):
            continue
        option = condition.option
        if option not in context.params:
            option += "s"  # of a command that takes several, between commas
        given = str(context.params[option])
        if {part.strip() for part in given.split(",")} & set(condition.values):
            continue
        *others, last = condition.values
        needed = f"{', '.join(others)} or {last}" if others else last
        wanted = f"{names.flag(each.name)} with {names.flag(option)} {needed}"
        got = f"it with {given}, where it has no effect"
        raise InputError(f"expected {wanted}, got {got}: leave it out")


def _annotate(declared: Field[Any], hint: Any) -> Any:
    """Return the annotation from which Typer makes an option for a field."""
    flags = declared.metadata["flags"]
    if flags is None and hint is bool:
        flags = names.flag(declared.name)  # a flag has no negation: it is left out instead
    shown = {name: declared.metadata[name] for name in ("help", "show_default")}
    shown["rich_help_panel"] = panel_of(declared.name)
    return Annotated[hint, typer.Option(*([] if flags is None else [flags]), **shown)]


def panel_of(name: str) -> str | None:
    """Return the panel of the help that an option stands in; None for the first."""
    return next((panel for panel, own in names.PANELS.items() if name in own.split()), None)


def _as_keyword(name: str, annotation: Any, default: Any = Parameter.empty) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
