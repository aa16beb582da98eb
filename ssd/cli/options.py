"""Options that are said elsewhere: choices of tables, and the fields of a config."""

import dataclasses
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
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
    tables: Mapping[str, Collection[str]] = field(default_factory=dict)
    """Of fields that name a row of a table, its names."""


def with_choices(function: Callable[..., Any]) -> Callable[..., Any]:
    """A verb's function with the signature that typer is to read: `OneOf` and `FieldsOf` spelt out."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    parameters = [
        each
        # Not by get_type_hints, which in Python 3.10 hides what stands beside a default of None.
        for parameter in inspect.signature(function, eval_str=True).parameters.values()
        for each in _spelt_out(parameter)
    ]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


def _spelt_out(parameter: inspect.Parameter) -> Iterator[inspect.Parameter]:
    for mark in getattr(parameter.annotation, "__metadata__", ()):
        if isinstance(mark, FieldsOf):
            yield from _options_of(mark)
            return
        if isinstance(mark, OneOf):
            kind, *rest = get_args(parameter.annotation)
            names: Any = Literal[tuple(mark.names)]
            names = names | None if type(None) in get_args(kind) else names
            options = [each for each in rest if each is not mark]
            yield parameter.replace(annotation=Annotated[(names, *options)])
            return
    yield parameter


def _options_of(fields: FieldsOf) -> Iterator[inspect.Parameter]:
    hints, docs = get_type_hints(fields.config), field_docs(fields.config)
    for each in dataclasses.fields(fields.config):
        kind = hints[each.name]
        flags = [each.metadata["flags"]] if "flags" in each.metadata else []
        shown = "" if each.default is None else _text(each.default)
        option = typer.Option(
            *flags, help=docs.get(each.name, "").replace("`", ""), show_default=shown or False
        )
        known = field_choices(kind) or fields.tables.get(each.name)
        if get_origin(kind) is tuple:
            kind, option.parser, option.metavar = str, _numbers, "NUMBERS"
        elif known:  # the config itself refuses others, as it does in Python
            kind, option.metavar = str, f"[{'|'.join(known)}]"
        yield inspect.Parameter(
            each.name,
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
