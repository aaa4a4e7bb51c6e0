"""What a component's settings are, and which types, components and fields their annotations speak of."""

import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo


class Settings(BaseModel):
    """A frozen description of one component: unknown keys, NaN and infinities are refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, validate_default=True
    )

    shorthands: ClassVar[Mapping[str, Callable[[str], dict[str, Any]]]] = {}
    """What a bare value stands for, by field; `field=value` means `field.name=value` where nothing is said."""
    hints: ClassVar[Mapping[str, str]] = {}
    """What to say to whoever looks for a key that does not exist, in place of the nearest key that does."""
    synonyms: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Of a tree's root: what other libraries call a key, in lower case, and the ends of the keys that mean it here."""
    value_synonyms: ClassVar[Mapping[str, Mapping[str, str]]] = {}
    """By field: what others call a component, in lower case with underscores, and a sentence with its name here."""


def as_list(value: object) -> object:
    """Several words as a person types them, for a field that takes a list: one, or a,b or [a, b]."""
    if isinstance(value, str):
        return [word.strip() for word in value.strip("[]").split(",") if word.strip()]
    return [value] if isinstance(value, int) else value


def members_of(annotation: Any) -> dict[str | None, type[Settings]]:
    """The components that may stand at a place, by name; a single nameless component stands under None."""
    found = [leaf for leaf in _ordered_leaves(annotation) if isinstance(leaf, type) and issubclass(leaf, Settings)]
    if len(found) == 1 and not _is_literal_name(found[0]):
        return {None: found[0]}
    return {settings.model_fields["name"].default: settings for settings in found}


class Choice(NamedTuple):
    """The components that may stand at a field, as `members_of` has them, and the name of the default one."""

    members: dict[str | None, type[Settings]]
    default: str | None


def choice_at(model: type[Settings], key: str) -> Choice:
    """The components that may stand at a field, which need not exist."""
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
    found = (field_at(settings, path[1:]) for settings in members_of(field.annotation).values())
    return next((inner for inner in found if inner is not None), None)


def _ordered_leaves(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) is typing.Annotated:
        return _ordered_leaves(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [leaf for argument in typing.get_args(annotation) for leaf in _ordered_leaves(argument)]
    return [annotation]


def _is_literal_name(settings: type[Settings]) -> bool:
    field = settings.model_fields.get("name")
    annotation = field.annotation if field else None
    return typing.get_origin(annotation) is typing.Literal and len(typing.get_args(annotation)) == 1
