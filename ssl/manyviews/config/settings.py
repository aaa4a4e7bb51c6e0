"""The base class of all settings, and lookups in their annotations: components, plain types, fields."""

import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo


class Settings(BaseModel):
    """Frozen settings of one component; unknown keys, NaN and infinities are refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, validate_default=True
    )

    shorthands: ClassVar[Mapping[str, Callable[[str], dict[str, Any]]]] = {}
    """By field, what a bare value stands for; by default `field=value` means `field.name=value`."""


def as_list(value: object) -> object:
    """Parses a list as typed on a command line: one, or a,b or [a, b]."""
    if isinstance(value, str):
        return [word.strip() for word in value.strip("[]").split(",") if word.strip()]
    return [value] if isinstance(value, int) else value


def members_of(annotation: Any) -> dict[str | None, type[Settings]]:
    """The components that an annotation allows, by name; a single one has the key None."""
    members = [leaf for leaf in _alternatives(annotation) if isinstance(leaf, type) and issubclass(leaf, Settings)]
    if len(members) == 1:
        return {None: members[0]}
    return {settings.model_fields["name"].default: settings for settings in members}


class Choice(NamedTuple):
    """The components that a field allows, as `members_of` returns them, and the name of the default one."""

    members: dict[str | None, type[Settings]]
    default: str | None


def choice_at(model: type[Settings], key: str) -> Choice:
    """The choice at a field, which need not exist."""
    field = model.model_fields.get(key)
    if field is None:
        return Choice({}, None)
    return Choice(members_of(field.annotation), getattr(field.get_default(call_default_factory=True), "name", None))


def leaves_of(annotation: Any) -> set[Any]:
    """The plain types within an annotation: `tuple[float, float] | None` holds float and NoneType."""
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return {type(value) for value in typing.get_args(annotation)}
    if origin is typing.Annotated:
        return leaves_of(typing.get_args(annotation)[0])
    arguments = [argument for argument in typing.get_args(annotation) if argument is not Ellipsis]
    return set().union(*map(leaves_of, arguments)) if arguments else {annotation}


def field_at(model: type[Settings], path: Sequence[str]) -> FieldInfo | None:
    """The field at a dotted path, in whichever member of a union has it."""
    field = model.model_fields.get(path[0])
    if field is None or len(path) == 1:
        return field
    fields = (field_at(settings, path[1:]) for settings in members_of(field.annotation).values())
    return next((field for field in fields if field is not None), None)


def _alternatives(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) is typing.Annotated:
        return _alternatives(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [leaf for argument in typing.get_args(annotation) for leaf in _alternatives(argument)]
    return [annotation]
