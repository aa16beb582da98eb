"""Options that are said elsewhere: choices of tables, and the fields of a config."""

import dataclasses
import inspect
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import wraps
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from ssd.train.config import field_choices, field_docs


@dataclass(frozen=True)
class OneOf:
    """In an option's annotation: it takes one of these names, as they are when the command is made."""

    names: Collection[str]


@dataclass(frozen=True)
class FieldsOf:
    """In the annotation of ``**choices``: an option for each field of a dataclass; None where not given."""

    config: type


def with_choices(function: Callable[..., Any]) -> Callable[..., Any]:
    """A verb's function with the signature that typer is to read: `OneOf` and `FieldsOf` spelt out."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    hints = get_type_hints(function, include_extras=True)
    parameters = [
        each
        for parameter in inspect.signature(function).parameters.values()
        for each in _spelt_out(parameter.replace(annotation=hints[parameter.name]))
    ]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


def _spelt_out(parameter: inspect.Parameter) -> Iterator[inspect.Parameter]:
    for mark in getattr(parameter.annotation, "__metadata__", ()):
        if isinstance(mark, FieldsOf):
            yield from _options_of(mark.config)
            return
        if isinstance(mark, OneOf):
            kind, *rest = get_args(parameter.annotation)
            names: Any = Literal[tuple(mark.names)]
            names = names | None if type(None) in get_args(kind) else names
            options = [each for each in rest if each is not mark]
            yield parameter.replace(annotation=Annotated[(names, *options)])
            return
    yield parameter


def _options_of(config: type) -> Iterator[inspect.Parameter]:
    hints, docs = get_type_hints(config), field_docs(config)
    for field in dataclasses.fields(config):
        if field.metadata.get("hidden"):
            continue
        kind = hints[field.name]
        flags = [field.metadata["flags"]] if "flags" in field.metadata else []
        shown = "" if field.default is None else _text(field.default)
        option = typer.Option(
            *flags, help=docs.get(field.name, "").replace("`", ""), show_default=shown or False
        )
        if get_origin(kind) is tuple:
            kind, option.parser, option.metavar = str, _numbers, "NUMBERS"
        elif known := field_choices(kind):  # the config itself refuses others, as it does in Python
            kind, option.metavar = str, f"[{'|'.join(known)}]"
        yield inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[kind | None, option],
        )


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(f"{number:.3g}" for number in value)
    return str(value)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(each) for each in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"{error}; give numbers, as 0.66,0.83") from error
