"""Seeded damage to bytes, texts and JSON: the same draw makes the same file."""

import copy
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

NUMBERS = (
    0,
    1,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0x8000,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    2**40,
    2**63 - 1,
    2**64 - 1,
)
WORDS = (
    *("-1", "0", "1e999", "-1e999", "NaN", "Infinity", "null", "true", "9" * 400, "9" * 5000, "0x10", "1:2:3", "~", ""),
    *(
        "../../../etc/passwd",
        "/etc/passwd",
        "/dev/zero",
        "a" * 5000,
        "\\ud800",
        "\u202e",
        "\x00",
        "\x1b[31m",
        "${oc.env:HOME}",
    ),
    *("[" * 3000, "{" * 3000, '{"a":' * 3000, "- " * 1000, "]", "}", ",", ":", '"', "'", "\n", "\r", "\t", "???"),
    *(
        "&a [*a, *a]",
        "*a",
        "&a ",
        "<<: {}",
        "!!python/object/apply:os.system ['true']",
        "!!binary x",
        "? ",
        "|",
        ">",
        "%",
        "@",
    ),
    *("\ufeff", "é", "=1+1", '"""', "#", "__class__", "step-000000001", "model.safetensors"),
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 0.5, 1e308, float("nan"), float("inf"), 2**31, 2**63, 2**64, 10**30, 10**400),
    *("", "x", "../x", "/etc/passwd", "\ud800", "\x00", "a" * 5000, [], {}, [[]], [None], {"": None}, [0] * 1000),
)


def damaged(samples: Sequence[bytes], draw: random.Random, *, text: bool) -> bytes:
    """One of some samples with one to five wounds; of a JSON text, sometimes with other values in its places."""
    content = bytearray(draw.choice(samples))
    if text and draw.random() < 0.5 and (changed := _other_values(bytes(content), draw)) is not None:
        return changed
    wounds: list[Callable[[bytearray, random.Random, Sequence[bytes]], None]] = [_flip, _cut, _number, _remove, _repeat]
    wounds += [_splice] + ([_word] * 6 if text else [_noise])
    for _ in range(draw.choice((1, 1, 1, 2, 3, 5))):
        draw.choice(wounds)(content, draw, samples)
    return bytes(content)


def _place(content: bytearray, draw: random.Random) -> int:
    # Headers decide most, and lie at the beginning.
    return draw.randrange(min(len(content), 64) + 1 if draw.random() < 0.4 else len(content) + 1)


def _flip(content: bytearray, draw: random.Random, _: Sequence[bytes]) -> None:
    for _ in range(draw.choice((1, 2, 8))):
        place = _place(content, draw)
        if place < len(content):
            content[place] ^= 1 << draw.randrange(8)


def _cut(content: bytearray, draw: random.Random, _: Sequence[bytes]) -> None:
    del content[_place(content, draw) :]


def _number(content: bytearray, draw: random.Random, _: Sequence[bytes]) -> None:
    width, place = draw.choice((1, 2, 4, 8)), _place(content, draw)
    number = draw.choice(NUMBERS) % (1 << 8 * width)
    content[place : place + width] = number.to_bytes(width, "big" if draw.random() < 0.5 else "little")


def _remove(content: bytearray, draw: random.Random, _: Sequence[bytes]) -> None:
    place = _place(content, draw)
    del content[place : place + draw.choice((1, 4, 32, 256))]


def _repeat(content: bytearray, draw: random.Random, _: Sequence[bytes]) -> None:
    place, length = _place(content, draw), draw.choice((1, 4, 32, 256))
    content[place:place] = content[place : place + length] * draw.choice((1, 2, 100))


def _splice(content: bytearray, draw: random.Random, samples: Sequence[bytes]) -> None:
    other = draw.choice(samples)
    content[_place(content, draw) :] = other[draw.randrange(len(other) + 1) :]


def _noise(content: bytearray, draw: random.Random, _: Sequence[bytes]) -> None:
    place = _place(content, draw)
    content[place : place + 16] = draw.randbytes(draw.choice((1, 16, 300)))


def _word(content: bytearray, draw: random.Random, _: Sequence[bytes]) -> None:
    place, word = _place(content, draw), draw.choice(WORDS).encode("utf-8", "surrogatepass")
    content[place : place + draw.choice((0, 0, 1, 8))] = word


def _other_values(content: bytes, draw: random.Random) -> bytes | None:
    """A JSON text, or a line of JSON lines, with other values or names in some of its places."""
    lines = content.splitlines(keepends=True)
    chosen = draw.randrange(len(lines)) if lines else 0
    for whole in (True, False):
        try:
            tree = [json.loads(content if whole else lines[chosen])]
        except (ValueError, IndexError):
            continue
        for _ in range(draw.choice((1, 1, 2, 4))):
            _replace(tree, draw)
        changed = json.dumps(tree[0]).encode()
        return changed if whole else b"".join([*lines[:chosen], changed + b"\n", *lines[chosen + 1 :]])
    return None


def _replace(tree: Any, draw: random.Random) -> None:
    """Goes down from a list or dictionary that holds the whole, and changes what it comes to."""
    place = draw.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
    value = tree[place]
    if isinstance(value, dict | list) and value and draw.random() < 0.85:
        _replace(value, draw)
    elif isinstance(tree, dict) and draw.random() < 0.3:
        del tree[place]
        tree |= {draw.choice(WORDS)[:100]: value} if draw.random() < 0.5 else {}
    else:
        tree[place] = copy.deepcopy(draw.choice(VALUES))
