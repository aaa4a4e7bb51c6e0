"""A safe subset of YAML, bounded in size, without tags, anchors and interpolations."""

import io
import re
from collections.abc import Iterator
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from manyviews.system.files import shown
from manyviews.system.path_bytes import restored, storable

MAX_YAML_BYTES = 1 << 20
MOST_VALUES = 20_000
"""Keys and values of a text; PyYAML is slow."""
DEEPEST = 20
LONGEST_VALUE = 4096
OCTAL = re.compile(r"[-+]?0[0-7]+")
"""An octal number of YAML 1.1, such as the folder name 010."""


def parse(text: str) -> Any:
    """Parses YAML into dictionaries with string keys, lists and plain values.

    Raises:
        ValueError: for anchors, aliases, tags, merges, interpolations such as `${oc.env:HOME}` and duplicate keys, and
            for text that is no YAML, too long or too deep.
    """
    try:
        kinds = [type(event) for event in _checked_events(text)]
        if yaml.ScalarEvent in kinds and kinds[kinds.index(yaml.DocumentStartEvent) + 1] is yaml.ScalarEvent:
            return text.strip()
        return restored(_with_string_keys(OmegaConf.to_container(OmegaConf.load(io.StringIO(text)))))
    except yaml.MarkedYAMLError as problem:
        raise ValueError(_explain(problem, text)) from None
    except yaml.YAMLError as problem:
        raise ValueError(f"it is not YAML that can be read: {shown(problem)}") from None
    except OmegaConfBaseException as problem:
        # The other lines are about OmegaConf's internals.
        raise ValueError(f"it is not YAML that can be read: {str(problem).partition(chr(10))[0]}") from None


def dump(tree: Any) -> str:
    """YAML text that `parse` reads back to an equal tree."""
    return OmegaConf.to_yaml(OmegaConf.create(storable(tree)))


def refuse_interpolation(value: str) -> None:
    """Raises ValueError for OmegaConf's interpolations and missing values."""
    if "${" in value or value == "???":
        raise ValueError(
            f"{shown(repr(value))}: interpolations and missing values are not read; write the value itself"
        )


def _checked_events(text: str) -> Iterator[yaml.Event]:
    """Parses without building anything; raises ValueError for what a recipe must not have."""
    depth = count = 0
    # Not the C parser, which not every PyYAML has.
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        count += isinstance(event, yaml.NodeEvent)
        if depth > DEEPEST:
            raise ValueError(f"{_line(event)}it is nested more than {DEEPEST} deep")
        if count > MOST_VALUES:
            raise ValueError(f"{_line(event)}it has more than {MOST_VALUES:,} keys and values")
        _check(event)
        yield event


def _check(event: yaml.Event) -> None:
    if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
        raise ValueError(f"{_line(event)}anchors and aliases (& and *) are not read; write the values out")
    if isinstance(event, yaml.NodeEvent) and getattr(event, "tag", None) is not None:
        raise ValueError(f"{_line(event)}tags (!) are not read; write the value itself")
    if isinstance(event, yaml.ScalarEvent):
        if len(event.value) > LONGEST_VALUE:
            raise ValueError(f"{_line(event)}a value is longer than {LONGEST_VALUE:,} letters")
        if event.value == "<<" and event.implicit[0]:
            raise ValueError(f"{_line(event)}merges (<<) are not read; write the values out")
        if event.implicit[0] and OCTAL.fullmatch(event.value) and int(event.value, 8) != int(event.value):
            raise ValueError(
                f"{_line(event)}{event.value} would be read as the octal number {int(event.value, 8)}; write "
                f"{int(event.value)} for the number, or '{event.value}' in quotes for a name"
            )
        refuse_interpolation(event.value)


def _line(event: yaml.Event) -> str:
    return "" if event.start_mark is None else f"line {event.start_mark.line + 1}: "


def _explain(problem: yaml.MarkedYAMLError, text: str) -> str:
    mark = problem.problem_mark or problem.context_mark
    line = "" if mark is None else f"line {mark.line + 1}: "
    own = text.splitlines()[mark.line] if mark is not None and mark.line < len(text.splitlines()) else ""
    if own[: len(own) - len(own.lstrip())].count("\t"):
        return f"{line}a tab cannot indent a line of YAML; use spaces"
    return f"{line}it is not YAML that can be read: {shown(problem.problem or problem.context or '')}"


def _with_string_keys(tree: Any) -> Any:
    if isinstance(tree, dict):
        named = {str(key): _with_string_keys(value) for key, value in tree.items()}
        if len(named) < len(tree):
            raise ValueError(f"a key stands twice among {shown(', '.join(named))}")
        if dotted := next((key for key in named if "." in key), None):
            outer, _, inner = dotted.partition(".")
            raise ValueError(
                f"the key {shown(dotted)} has a dot, as on a command line; in a recipe it is nested, "
                f"{shown(outer)}: {{{shown(inner)}: …}}"
            )
        return named
    return [_with_string_keys(value) for value in tree] if isinstance(tree, list) else tree
