"""Flags of a command as a table. Their values reach it together, so that it hands them on to a request as they are."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

Verb = Callable[..., None]
Flag = tuple[Any, Any]  # annotation and default


def flag(kind: Any, help_text: str, default: Any = None, *names: str, **options: Any) -> Flag:
    """An option of a command; names and options as typer.Option() takes them."""
    return Annotated[kind, typer.Option(*names, help=help_text, **options)], default


def takes(flags: Mapping[str, Flag]) -> Callable[[Verb], Verb]:
    """Gives a command these flags, in the place of its parameter `given`, which gets their values by name.

    A command that has a parameter of its own by the name of a flag keeps its own.
    """

    def with_flags(verb: Verb) -> Verb:
        own = inspect.signature(verb, eval_str=True).parameters
        shared = {name: each for name, each in flags.items() if name not in own}
        named, parameters = inspect.Parameter.KEYWORD_ONLY, list[inspect.Parameter]()
        for name, parameter in own.items():
            if name != "given":
                parameters.append(parameter.replace(kind=named))
                continue
            for each, (annotation, default) in shared.items():
                parameters.append(inspect.Parameter(each, named, default=default, annotation=annotation))

        def command(**values: Any) -> None:
            verb(given={name: values.pop(name) for name in shared}, **values)

        command.__doc__, command.__name__ = verb.__doc__, verb.__name__
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return command

    return with_flags
