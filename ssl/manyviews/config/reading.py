"""Loads settings from defaults, a YAML file and `key=value` arguments."""

import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from manyviews.config import vocabulary
from manyviews.config.settings import Settings, choice_at, field_at, kind, leaves_of, members_of, suggestion_for
from manyviews.config.yaml_text import MAX_YAML_BYTES, dump, parse, refuse_interpolation
from manyviews.system.files import read_text, shown
from manyviews.system.names import did_you_mean

S = TypeVar("S", bound=Settings)


def load(
    model: type[S], file: Path | None = None, args: Sequence[str] = (), *, base: Mapping[str, Any] | None = None
) -> S:
    """Merges defaults, `base`, a YAML file and `key=value` arguments, and validates them.

    A layer that changes a component's `name` drops the earlier settings of that component: the temperature of one
    objective is not that of another. Interpolations such as `${oc.env:HOME}` are refused.

    Raises:
        ValueError: naming the key, the value, the bound, and the nearest key that exists.

    Examples:
        >>> from manyviews.optim import OptimSettings
        >>> load(OptimSettings, None, ["rate=0.1", "name=sgd"]).peak_rate(batch_size=512)
        0.2
    """
    tree: dict[str, Any] = dict(base or {})
    if file is not None:
        tree = _merge(model, tree, _expand(model, _read_yaml(file)))
    tree = _merge(model, tree, _parse_args(model, args))
    return validate(model, tree)


def validate(model: type[S], tree: Mapping[str, Any]) -> S:
    """Validates a nested dictionary; raises ValueError as `load` does."""
    named = _named(model, tree)
    try:
        return model.model_validate(named)
    except ValidationError as problem:
        # A union of plain types has one error per member.
        lines = {".".join(_path(model, error)): _explain(model, tree, error) for error in problem.errors()}
        raise ValueError("\n".join(lines.values())) from None


def dump_yaml(settings: Settings) -> str:
    """All settings as YAML text that `load` reads back to equal ones."""
    return dump(settings.model_dump(mode="json"))


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        text = read_text(file, MAX_YAML_BYTES)
        if not text.strip():
            raise ValueError("it is empty")
        tree = parse(text)
    except ValueError as problem:
        raise ValueError(f"{shown(file)} is no recipe: {problem}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{shown(file)} holds a {type(tree).__name__}; a recipe holds `key: value`, one on each line")
    return tree


def _parse_args(model: type[Settings], args: Sequence[str]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    seen: set[str] = set()
    for arg in args:
        key, equals, text = arg.partition("=")
        key = key.strip().lstrip("-")
        if not equals or not key:
            raise ValueError(f"{arg!r} is not of the form key=value{suggestion_for(model, arg, tree)}")
        if text == "":
            raise ValueError(f"{key} has no value; {_none(field_at(model, key.split('.')), key)}")
        if key in seen:
            raise ValueError(f"{key} is given twice; keep one of them")
        seen.add(key)
        branch: dict[str, Any] = {}
        leaf = branch
        *parents, last = key.split(".")
        for parent in parents:
            leaf = leaf.setdefault(parent, {})
        leaf[last] = _value(field_at(model, key.split(".")), key, text)
        tree = _merge(model, tree, _expand(model, branch), same_layer=True)
    return tree


def _value(field: FieldInfo | None, key: str, text: str) -> Any:
    """Parses a value as YAML, unless its field takes text: a folder called 010 stays 010."""
    leaves = leaves_of(field.annotation) if field else set()
    if text == "null" and types.NoneType in leaves:
        return None
    if field is not None and (members_of(field.annotation) or leaves <= {str, Path, types.NoneType}):
        refuse_interpolation(text)
        return text.strip("'\"") if text[:1] in "'\"" else text
    # A list needs no brackets: 0.2,1 is [0.2, 1].
    listed = field is not None and _is_list(field.annotation) and "," in text and text[:1] != "["
    try:
        return cast("dict[str, Any]", parse(f"value: [{text}]" if listed else f"value: {text}"))["value"]
    except ValueError as problem:
        raise ValueError(f"{key}={shown(text)} cannot be read: {problem}") from None


def _is_list(annotation: Any) -> bool:
    return typing.get_origin(annotation) is tuple or any(map(_is_list, typing.get_args(annotation)))


def _none(field: FieldInfo | None, key: str) -> str:
    if field is None or types.NoneType in leaves_of(field.annotation):
        return f"write {key}=null for none"
    return f"write {key}=[] for none" if _is_list(field.annotation) else f"it must be {kind(field)}"


def _scalars(tree: Any) -> Iterator[Any]:
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, list):
        yield tree
        return
    for branch in tree:
        yield from _scalars(branch)


def _expand(model: type[Settings], tree: Mapping[str, Any]) -> dict[str, Any]:
    """Expands bare values of components to dictionaries."""
    expanded: dict[str, Any] = {}
    for key, value in tree.items():
        members, _ = choice_at(model, key)
        if members and isinstance(value, str | int | float) and not isinstance(value, bool):
            shorthand = model.shorthands.get(key)
            expanded[key] = shorthand(str(value)) if shorthand else {"name": value}
        elif members and isinstance(value, dict):
            # Another layer may name the component: any that has these keys will do.
            fitting = (settings for settings in members.values() if value.keys() <= settings.model_fields.keys())
            settings = members.get(value.get("name"), next(fitting, next(iter(members.values()))))
            expanded[key] = _expand(settings, value)
        else:
            expanded[key] = value
    return expanded


def _merge(
    model: type[Settings], base: Mapping[str, Any], layer: Mapping[str, Any], *, same_layer: bool = False
) -> dict[str, Any]:
    merged = dict(base)
    for key, value in layer.items():
        before = merged.get(key)
        if not isinstance(value, dict) or not isinstance(before, dict):
            merged[key] = value
            continue
        members, default = choice_at(model, key)
        earlier = before.get("name", default)
        name = value.get("name", earlier)
        if not same_layer and name != earlier:
            before = {}
        inner = members.get(name, members.get(None, Settings))
        merged[key] = _merge(inner, before, value, same_layer=same_layer)
    return merged


def _named(model: type[Settings], tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Adds the default name to components without one; refuses booleans for numbers."""
    named = dict(tree)
    for key, value in tree.items():
        field, (members, default) = model.model_fields.get(key), choice_at(model, key)
        if members and isinstance(value, dict):
            if None not in members and "name" not in value:
                value = {"name": default, **value}
            settings = members.get(value.get("name"), members.get(None, Settings))
            named[key] = _named(settings, value, f"{prefix}{key}.")
        elif field and bool not in leaves_of(field.annotation) and bool in map(type, _scalars(value)):
            # Python's True is the integer 1: without this, `temperature: on` would train with a temperature of 1.
            raise ValueError(
                f"{prefix}{key}={value}: YAML reads on, off, yes, no, true and false as booleans, and none belongs "
                "here; if you meant the word itself, quote it"
            )
    return named


def _explain(model: type[Settings], tree: Mapping[str, Any], error: ErrorDetails) -> str:
    path, value = _path(model, error), error["input"]
    key, field = ".".join(path), field_at(model, path) if path else None
    match error["type"]:
        case "extra_forbidden":
            # Of a whole branch that does not exist, its first key says more: trian.epochs is like train.epochs.
            while not (hint := vocabulary.HINTS.get(".".join(path))) and isinstance(value, dict) and value:
                path.append(str(next(iter(value))))
                value = value[path[-1]]
            key = ".".join(path)
            if path[-1] == "name" and (above := field_at(model, path[:-1])) is not None:
                parts = [name for settings in members_of(above.annotation).values() for name in settings.model_fields]
                return (
                    f"{key.removesuffix('.name')}={value}: it has no kinds to choose from; set its {', '.join(parts)}"
                )
            for depth in range(1, len(path)):
                above = field_at(model, path[:depth])
                if above is not None and path[depth] in members_of(above.annotation):
                    name = f"{'.'.join(path[:depth])}.name={path[depth]}"
                    return f"there is no key {key}: {path[depth]} is a kind; write {name}, and its keys beside the name"
            return f"there is no key {key}{f': {hint}' if hint else suggestion_for(model, key, tree)}"
        case "missing":
            return f"{key} is required: write {key}=…"
        case "union_tag_invalid" if error["ctx"]["tag"] == "None":
            part = next(iter(value.keys() - {"name"}), "name")
            return f"{key}.{part} is a part of {key}, but no {key} is chosen: write {key}=… too"
        case "union_tag_invalid":
            choices = str(error["ctx"]["expected_tags"]).replace("'", "").split(", ")
            return f"{key}.name={error['ctx']['tag']} is none of {', '.join(choices)}" + _nearest(
                str(error["ctx"]["tag"]), choices, vocabulary.VALUES.get(key, {})
            )
        case "string_type" if isinstance(value, bool | int | float):
            return f"{key} is a text, but YAML reads {value!r} there; quote it: {key}: '…'"
        case "tuple_type" if field is not None:
            return f"{key}={value}: it must be a list, {kind(field)}; write it as {key}=[a,b]"
        case "float_parsing" | "float_type" | "int_parsing" | "int_type" | "bool_parsing" | "bool_type" if field:
            about = (field.description or "").partition(".")[0].partition("\n")[0].partition(":")[0].strip()
            return f"{key}={value}: it must be {kind(field)}" + (f" ({about})" if about else "")
        case "value_error" if isinstance(value, dict) and path:
            return f"{key}: {error['ctx']['error']}"
        case "value_error":
            return f"{key}={value}: {error['ctx']['error']}" if path else str(error["ctx"]["error"])
        case _ if field is not None and (str(error["loc"][-1]) != path[-1] or error["type"] == "int_parsing_size"):
            return f"{key}={value}: it must be {kind(field)}"
        case "literal_error":
            choices = re.findall(r"'([^']*)'", error["ctx"]["expected"])
            return f"{key}={value}: it must be one of {', '.join(choices)}" + _nearest(
                str(value), choices, vocabulary.VALUES.get(key, {})
            )
        case _:
            message = error["msg"].removeprefix("Input ").replace("should", "must")
            return f"{key}={value}: it {message}" if message.startswith("must") else f"{key}={value}: {message}"


def _path(model: type[Settings], error: ErrorDetails) -> list[str]:
    """The dotted key of an error as a user types it, without pydantic's parts for unions."""
    path: list[str] = []
    here: Mapping[str | None, type[Settings]] = {None: model}
    skip = False
    for part in error["loc"]:
        # pydantic puts the member's name into the path of a discriminated union; a user never types it.
        if skip and part in here:
            here, skip = {None: here[str(part)]}, False
            continue
        # Nor the members of a union of plain types, such as literal['ema'] and constrained-float.
        if not here and not isinstance(part, int):
            continue
        path.append(str(part))
        fields = next(iter(here.values())).model_fields if here else {}
        here = members_of(fields[str(part)].annotation) if str(part) in fields else {}
        skip = bool(here) and None not in here
    return path


def _nearest(name: str, choices: Sequence[str], synonyms: Mapping[str, str]) -> str:
    """Ends an error message about an unknown choice: its name here, or the nearest one."""
    plain = vocabulary.plain(name)
    if answer := synonyms.get(plain) or {key.replace("_", ""): text for key, text in synonyms.items()}.get(plain):
        return f"; {answer}"
    return did_you_mean(name, choices, 1, 0.5)
