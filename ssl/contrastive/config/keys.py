"""Every key of a tree of settings, as `--help` lists them, and the nearest one to a key that does not exist."""

import difflib
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from pydantic.fields import FieldInfo

from contrastive.config.settings import Settings, members_of


class Key(NamedTuple):
    """One key of the command line, as `--help` shows it."""

    key: str
    kind: str
    default: str
    doc: str
    only_for: str
    """The component's name to which the key belongs, where several share the place; else empty."""


def keys(model: type[Settings], prefix: str = "") -> Iterator[Key]:
    """Every key of the tree with its type and bounds, default and one line, in the order of the fields."""
    for name, field in model.model_fields.items():
        key, members = f"{prefix}{name}", members_of(field.annotation)
        if not members:
            yield Key(key, _kind(field), _default(field), field.description or "", "")
        elif set(members) == {None}:
            yield from keys(members[None], f"{key}.")
        else:
            chosen = field.get_default(call_default_factory=True)
            choices = " | ".join(str(member) for member in members)
            yield Key(f"{key}.name", choices, str(getattr(chosen, "name", "null")), field.description or "", "")
            for member, settings in members.items():
                for entry in keys(settings, f"{key}."):
                    if entry.key != f"{key}.name":
                        yield entry._replace(only_for=str(member))


def suggestion_for(model: type[Settings], key: str) -> str:
    """The nearest key that exists, or where the key would belong, as the end of a sentence."""
    known: dict[str, list[str]] = {}
    for entry in keys(model):
        known.setdefault(entry.key, []).append(entry.only_for)
    if key in known:
        place = key.rpartition(".")[0]
        return f" in the chosen {place}; it belongs to {place}.name=" + " or ".join(known[key])
    places = {name.rpartition(".")[0] for name in known} - {""}
    if key in places:
        return f"; did you mean {key}=… ?"
    ends = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    near = ends or difflib.get_close_matches(key, known, 1, 0.6)
    last = {name.rpartition(".")[2]: name for name in known}
    near = near or [last[name] for name in difflib.get_close_matches(key.rpartition(".")[2], last, 1, 0.6)]
    return f"; did you mean {' or '.join(near[:3])}?" if near else "; --help lists every key"


def hint_for(model: type[Settings], path: Sequence[str]) -> str:
    """What the settings at a dotted path say of a key that they do not have."""
    places = [model]
    for part in path[:-1]:
        fields = [place.model_fields[part] for place in places if part in place.model_fields]
        places = [settings for field in fields for settings in members_of(field.annotation).values()]
    found = [place.hints[path[-1]] for place in places if path[-1] in place.hints]
    return f": {found[0]}" if found else ""


def _kind(field: FieldInfo) -> str:
    return _type_name(field.annotation) + _bounds(field.metadata)


def _type_name(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " | ".join(str(value) for value in arguments)
    if origin is typing.Annotated:
        return _type_name(arguments[0]) + _bounds(arguments[1:])
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(_type_name, arguments))
    if origin is tuple:
        return "[" + ", ".join("…" if argument is Ellipsis else _type_name(argument) for argument in arguments) + "]"
    return "null" if annotation is types.NoneType else str(getattr(annotation, "__name__", annotation))


def _bounds(metadata: Iterable[Any]) -> str:
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    flat = [inner for bound in metadata for inner in (bound.metadata if isinstance(bound, FieldInfo) else [bound])]
    return "".join(
        f" {sign} {getattr(bound, name)}" for bound in flat for name, sign in signs.items() if hasattr(bound, name)
    )


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, tuple):
        return str([round(number, 4) if isinstance(number, float) else number for number in value])
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
