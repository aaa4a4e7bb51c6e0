"""The base class of settings, lookups in their annotations, keys and suggestions."""

import json
import os
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo

from manyviews.config import vocabulary
from manyviews.system.names import closest


class Settings(BaseModel):
    """Frozen settings of one component; unknown keys, NaN and infinities are refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, validate_default=True
    )

    shorthands: ClassVar[Mapping[str, Callable[[str], dict[str, Any]]]] = {}
    """By field, what a bare value stands for; by default `field=value` means `field.name=value`."""


class Need(NamedTuple):
    """The components of a field that have a key, such as objective=queue or bank."""

    field: str
    names: tuple[str, ...]
    about: str
    """The first line of the component's docstring; empty for several."""


class Key(NamedTuple):
    """One key of a command line."""

    key: str
    kind: str
    default: str
    doc: str
    needs: tuple[Need, ...] = ()
    """The components that the key depends on, outermost first."""


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


def choice_at(model: type[Settings], key: str) -> tuple[dict[str | None, type[Settings]], str | None]:
    """The components at a field, which need not exist, and the name of the default one."""
    field = model.model_fields.get(key)
    if field is None:
        return {}, None
    return members_of(field.annotation), getattr(field.get_default(call_default_factory=True), "name", None)


def leaves_of(annotation: Any) -> set[Any]:
    """The plain types in an annotation: float and NoneType of `tuple[float, float] | None`."""
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


def keys(model: type[Settings], prefix: str = "") -> Iterator[Key]:
    """Yields every key once, in the order of the fields; components share equal keys, those of all come first."""
    for name, field in model.model_fields.items():
        key, members = f"{prefix}{name}", members_of(field.annotation)
        if not members:
            yield Key(key, kind(field), _default(field), field.description or "")
        elif set(members) == {None}:
            yield from keys(members[None], f"{key}.")
        else:
            chosen = field.get_default(call_default_factory=True)
            choices = " | ".join(str(member) for member in members)
            yield Key(f"{key}.name", choices, str(getattr(chosen, "name", "null")), field.description or "")
            listed = {member: [*keys(settings, f"{key}.")] for member, settings in members.items()}
            listed = {member: [own for own in all_ if own.key != f"{key}.name"] for member, all_ in listed.items()}
            shared = [own for own in next(iter(listed.values())) if all(own in others for others in listed.values())]
            yield from shared
            groups: dict[tuple[Key, ...], list[str]] = {}
            for member, own_keys in listed.items():
                groups.setdefault(tuple(own for own in own_keys if own not in shared), []).append(str(member))
            for entries, names in groups.items():
                about = (members[names[0]].__doc__ or "").strip().partition("\n")[0] if len(names) == 1 else ""
                need = Need(key, tuple(names), about)
                yield from (entry._replace(needs=(need, *entry.needs)) for entry in entries)


def help_text(usage: str, about: str, model: type[Settings]) -> str:
    """Lists every key with its type, default and description."""
    lines = [f"usage: {usage}", "", *textwrap.wrap(about, 110), ""]
    above: tuple[Need, ...] = ()
    for entry in keys(model):
        for depth, need in enumerate(entry.needs):
            if need not in above[: depth + 1]:
                choice = f"with {need.field}={' | '.join(need.names)}: {need.about}".rstrip(": ")
                lines += textwrap.wrap(
                    choice, 110, initial_indent="  " * (depth + 1), subsequent_indent="  " * (depth + 2)
                )
        above = entry.needs
        indent = "  " * (len(above) + 1)
        lines.append(f"{indent}{entry.key:<28} {entry.kind}, default {entry.default}")
        lines += textwrap.wrap(entry.doc, 100, initial_indent=f"{indent}    ", subsequent_indent=f"{indent}    ")
    return "\n".join(lines)


def suggestion_for(model: type[Settings], key: str, tree: Mapping[str, Any]) -> str:
    """Ends an error message about an unknown key: the nearest key, or its component.

    `tree` holds the settings so far, by which components are chosen.
    """
    entries = list(keys(model))
    usable = list(dict.fromkeys(entry.key for entry in entries if not _missing(model, tree, entry)))
    if belongs := _belongs(model, tree, [entry for entry in entries if entry.key == key]):
        return f": it belongs to {belongs}"
    if any(name.startswith(f"{key}.") for name in usable):
        return f"; did you mean {key}=… ?"
    parent, _, last = key.rpartition(".")
    synonyms = vocabulary.KEYS.get(last.lower(), ())
    for end in (last, *synonyms):
        if near := _ending(usable, end, parent):
            return f"; did you mean {' or '.join(near[:3])}?"
    siblings = {name.rpartition(".")[2]: name for name in usable if name.rpartition(".")[0] == parent}
    lasts = {name.rpartition(".")[2]: name for name in usable}
    close = [siblings[name] for name in _close(last, siblings)] or _close(key, usable)
    close = close or [lasts[name] for name in _close(last, lasts)]
    # Before what is only spelled like it: `alpha` is a margin, whichever objective is chosen.
    others = []
    for end in (*synonyms, *(() if close else (last,))):
        elsewhere = [entry for entry in entries if _ends(entry.key, end)]
        if belongs := _belongs(model, tree, elsewhere):
            others.append(f"{elsewhere[0].key} belongs to {belongs}")
    if others:
        return f"; {', '.join(others)}"
    return f"; did you mean {close[0]}?" if close else "; --help lists every key"


def kind(field: FieldInfo) -> str:
    """The type of a field with its bounds, for help and error messages."""
    return _type_name(field.annotation) + _bounds(field.metadata)


def _missing(model: type[Settings], tree: Mapping[str, Any], entry: Key) -> tuple[Need, ...]:
    """The choices that an entry depends on and that `tree` does not make."""
    made = [_chosen(model, tree, need.field) in need.names for need in entry.needs]
    return entry.needs[made.index(False) :] if False in made else ()


def _chosen(model: type[Settings], tree: Mapping[str, Any], path: str) -> str | None:
    name = None
    for part in path.split("."):
        if part not in model.model_fields:
            return None
        members, default = choice_at(model, part)
        value = tree.get(part) if isinstance(tree, Mapping) else None
        tree = value if isinstance(value, Mapping) else {}
        name = (value if isinstance(value, str) else tree.get("name")) or default
        model = members.get(name) or members.get(None) or Settings
    return name


def _belongs(model: type[Settings], tree: Mapping[str, Any], entries: Sequence[Key]) -> str:
    """The fewest choices that make one of the keys valid, as a user types them."""
    missing = [_missing(model, tree, entry) for entry in entries]
    fewest = min(map(len, missing), default=0)
    names: dict[str, dict[str, None]] = {}
    for needs in missing:
        for need in needs if len(needs) == fewest else ():
            names.setdefault(need.field, {}).update(dict.fromkeys(need.names))
    return ", with ".join(f"{field}={' or '.join(choices)}" for field, choices in names.items())


def _ends(key: str, end: str) -> bool:
    return key in (end, f"{end}.name") or key.endswith(f".{end}")


def _ending(known: Sequence[str], end: str, parent: str) -> list[str]:
    ending = [end if name == f"{end}.name" else name for name in known if _ends(name, end)]
    return [name for name in ending if parent and name.startswith(f"{parent}.")] or ending


def _close(name: str, known: Iterable[str]) -> list[str]:
    # Two or three letters have half of theirs in common with anything.
    return closest(name, known, 1, 0.6 if len(name) > 3 else 0.8)


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
        return "[" + ", ".join(f"{item:.4g}" if isinstance(item, float) else str(item) for item in value) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def to_args(settings: Mapping[str, Any]) -> list[str]:
    """The `key=value` arguments that mean the same as nested settings, or as settings objects among them.

    Examples:
        >>> to_args({"data": "photos", "train": {"epochs": 10, "chunk": None}, "tasks": ["knn", "linear"]})
        ['data=photos', 'train.epochs=10', 'train.chunk=null', 'tasks=[knn,linear]']
    """
    args: list[str] = []
    for key, value in settings.items():
        if isinstance(value, Mapping | Settings):
            nested = value.model_dump(mode="json") if isinstance(value, Settings) else value
            args += [f"{key}.{arg}" for arg in to_args(nested)]
        elif isinstance(value, str | os.PathLike):
            args.append(f"{key}={os.fspath(value)}")
        elif isinstance(value, list | tuple) and all(isinstance(part, str) for part in value):
            args.append(f"{key}=[{','.join(value)}]")
        else:
            try:
                args.append(f"{key}={json.dumps(value)}")
            except TypeError:
                raise ValueError(f"{key}={value!r} is not a setting: {type(value).__name__} has no text") from None
    return args
