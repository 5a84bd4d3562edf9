"""How commands get their options: shared ones, gathered ones, and ones that belong to another."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import Field, fields
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_type_hints

import typer

from pyro_vae.app.names import EvaluateSettings, TrainSettings
from pyro_vae.errors import InputError

CommandFunction = Callable[..., None]

Run = Annotated[Path, typer.Argument(help="Run folder written by `pyro-vae train`.")]


class OnlyWith(NamedTuple):
    """Marks an option that has an effect only with some values of another option.

    It stands in the annotation:
    ``Annotated[int, typer.Option(), OnlyWith("method", ("annealed", "both"))]``.
    """

    option: str
    values: tuple[str, ...]


_NAMED = OnlyWith("dataset", ("mnist", "fashion-mnist", "kmnist", "omniglot"))
_SAMPLING = OnlyWith("method", ("importance", "both"))
_ANNEALING = OnlyWith("method", ("annealed", "both"))

# Which settings have an effect only with some values of another, by their class.
_CONDITIONS: Mapping[type, Mapping[str, OnlyWith]] = {
    TrainSettings: {
        "data_root": _NAMED,
        "download": _NAMED,
        "num_components": OnlyWith("prior", ("gaussian-mixture", "vamp")),
        "sigma": OnlyWith("likelihood", ("gaussian",)),
    },
    EvaluateSettings: {
        "num_samples": _SAMPLING,
        "target_standard_error": _SAMPLING,
        "num_chains": _ANNEALING,
        "num_steps": _ANNEALING,
    },
}


def gathers(
    kind: type, *, without: Container[str] = (), defaults: Mapping[str, Any] | None = None
) -> Callable[[CommandFunction], CommandFunction]:
    """Give a command one option per field of a settings class, handed to it as one object.

    The options take the place of the command's parameter that is annotated with the class.

    Args:
        kind: a dataclass whose fields have a default and, as metadata, the option's ``help``.
        without: fields that are no options of this command and keep their defaults.
        defaults: defaults of this command that differ from the class's.
    """
    hints, conditions = get_type_hints(kind), _CONDITIONS.get(kind, {})
    options = {
        declared.name: _parameter(
            declared,
            hints[declared.name],
            default=(defaults or {}).get(declared.name, declared.default),
            condition=conditions.get(declared.name),
        )
        for declared in fields(kind)
        if declared.name not in without
    }

    def decorate(command: CommandFunction) -> CommandFunction:
        parameters = inspect.signature(command, eval_str=True).parameters.values()
        target = next(each.name for each in parameters if each.annotation is kind)

        def gathering(**values: Any) -> None:
            settings = kind(**{name: values.pop(name) for name in options})
            command(**values, **{target: settings})

        shown: list[inspect.Parameter] = []
        for each in parameters:
            shown += options.values() if each.name == target else [each]
        return with_parameters(gathering, command, shown)

    return decorate


def with_parameters(
    wrapper: CommandFunction, command: CommandFunction, parameters: Iterable[inspect.Parameter]
) -> CommandFunction:
    """Give a wrapper of a command the name, the help and the parameters that Typer is to read."""
    # By keyword their order is free: options with a default may stand before those without.
    shown = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in parameters]
    wrapper.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {each.name: each.annotation for each in shown}
    wrapper.__name__, wrapper.__doc__ = command.__name__, command.__doc__
    return wrapper


def is_given(context: typer.Context, name: str) -> bool:
    """Say whether an option stands on the command line, be it with its default value."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def refuse_without_effect(
    context: typer.Context, parameters: Mapping[str, inspect.Parameter]
) -> None:
    """Refuse an option that was given although the value of another one takes its effect away.

    Args:
        context: the call of the command.
        parameters: those of the command, marked by :class:`OnlyWith` where that applies.

    Raises:
        InputError: such an option.
    """
    for name, parameter in parameters.items():
        for mark in getattr(parameter.annotation, "__metadata__", ()):
            if isinstance(mark, OnlyWith) and is_given(context, name):
                _check_effect(context, name, mark)


def _check_effect(context: typer.Context, name: str, condition: OnlyWith) -> None:
    option = condition.option
    if option not in context.params:
        option += "s"  # of a command that takes several, between commas
    given = str(context.params[option])
    if not {part.strip() for part in given.split(",")} & set(condition.values):
        *others, last = condition.values
        needed = f"{', '.join(others)} or {last}" if others else last
        raise InputError(
            f"expected {_flag(name)} with {_flag(option)} {needed}, got it with {given}, where it "
            "has no effect: leave it out"
        )


def _parameter(
    declared: Field[Any], hint: Any, *, default: Any, condition: OnlyWith | None
) -> inspect.Parameter:
    # A flag has no negation: it is left out instead.
    names = [_flag(declared.name)] if hint is bool else []
    marks: list[Any] = [typer.Option(*names, help=declared.metadata["help"])]
    if condition is not None:
        marks.append(condition)
    return inspect.Parameter(
        declared.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[hint, *marks],
    )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
