"""Options that commands share: one list of them in ``names``, gathered into one settings object."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Mapping
from dataclasses import Field, fields
from typing import Annotated, Any, get_type_hints

import typer

__all__ = ["gathers"]

_Command = Callable[..., None]


def gathers(
    kind: type, *, without: Container[str] = (), defaults: Mapping[str, Any] | None = None
) -> Callable[[_Command], _Command]:
    """Give a command one option per field of a settings class, handed to it as one object.

    The options take the place of the command's parameter that is annotated with the class.

    Args:
        kind: a dataclass whose fields are declared by :func:`pyro_vae.names.option`.
        without: fields that are no options of this command and keep their defaults.
        defaults: defaults of this command that differ from the class's.
    """
    hints = get_type_hints(kind)
    options = {
        declared.name: _parameter(declared, hints[declared.name], defaults or {})
        for declared in fields(kind)
        if declared.name not in without
    }

    def decorate(command: _Command) -> _Command:
        signature = inspect.signature(command, eval_str=True)
        parameters = signature.parameters.values()
        target = next(each.name for each in parameters if each.annotation is kind)

        def gathering(**values: Any) -> None:
            settings = kind(**{name: values.pop(name) for name in options})
            command(**values, **{target: settings})

        shown: list[inspect.Parameter] = []
        for each in parameters:
            shown += options.values() if each.name == target else [each]
        # Typer reads names, types and defaults from here; by keyword their order is free.
        by_keyword = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in shown]
        gathering.__signature__ = signature.replace(parameters=by_keyword)  # type: ignore[attr-defined]
        gathering.__annotations__ = {each.name: each.annotation for each in by_keyword}
        gathering.__name__, gathering.__doc__ = command.__name__, command.__doc__
        return gathering

    return decorate


def _parameter(declared: Field[Any], hint: Any, defaults: Mapping[str, Any]) -> inspect.Parameter:
    flag = [f"--{declared.name.replace('_', '-')}"] if hint is bool else []
    described = typer.Option(*flag, help=declared.metadata["help"])
    return inspect.Parameter(
        declared.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=defaults.get(declared.name, declared.default),
        annotation=Annotated[hint, described],
    )
