import math
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from manyviews.config import Settings, dump_yaml, keys, load, vocabulary, yaml_text


class Small(Settings):
    """A member of the union."""

    name: Literal["small"] = "small"
    temperature: float = Field(0.5, gt=0)
    """How soft."""


class Large(Settings):
    """Another member of the union."""

    name: Literal["large"] = "large"
    temperature: float = Field(0.07, gt=0)
    rows: int = Field(10, ge=1)
    """How many."""
    limits: tuple[float, float] = (0.0, 1.0)


class Inner(Settings):
    """A single component."""

    rate: float = Field(1e-3, gt=0, le=1)
    title: str = "plain"
    sure: bool = False
    level: Literal["low", "high"] = "low"
    count: Literal["all"] | Annotated[int, Field(ge=1)] = "all"


class Tree(Settings):
    """The whole."""

    part: Annotated[Small | Large, Field(discriminator="name")] = Small()
    inner: Inner = Inner()
    seed: int = 0
    output: str | None = None


@pytest.fixture(autouse=True)
def vocabulary_of_the_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "HINTS", {"inner.speed": "nothing moves here; use inner.rate"})
    monkeypatch.setattr(vocabulary, "KEYS", {"lr": ("rate",), "n": ("part.rows",), "kind": ("part",)})
    monkeypatch.setattr(vocabulary, "VALUES", {"part": {"x_l": "XL is part=large"}})


def yaml(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    return file


def test_later_layers_win(tmp_path: Path) -> None:
    tree = load(Tree, yaml(tmp_path, "inner: {rate: 0.5}\nseed: 3\n"), ["inner.rate=0.25"])
    assert (tree.inner.rate, tree.seed) == (0.25, 3)


def test_a_new_name_drops_what_was_said_of_the_old_component(tmp_path: Path) -> None:
    file = yaml(tmp_path, "part: {name: small, temperature: 0.2}\n")
    assert load(Tree, file, ["part.name=large"]).part == Large()
    assert load(Tree, file, ["part=large", "part.rows=4"]).part == Large(rows=4)
    assert load(Tree, file, ["part.rows=4", "part=large"]).part == Large(rows=4)
    assert load(Tree, file, ["part.name=small"]).part == Small(temperature=0.2)


def test_a_new_name_drops_settings_of_a_component_that_the_file_did_not_name(tmp_path: Path) -> None:
    file = yaml(tmp_path, "part: {temperature: 0.2}\n")
    assert load(Tree, file).part == Small(temperature=0.2)
    assert load(Tree, file, ["part=large"]).part == Large()


def test_scientific_notation_is_a_number_in_files_and_words(tmp_path: Path) -> None:
    from_file, from_word = load(Tree, yaml(tmp_path, "inner: {rate: 1e-4}")), load(Tree, None, ["inner.rate=1e-4"])
    assert from_file.inner.rate == from_word.inner.rate == 1e-4


@pytest.mark.parametrize("text", ["010", "on", "12:30", "1e3", "null2"])
def test_a_text_on_the_command_line_stays_the_text_it_is(text: str) -> None:
    assert load(Tree, None, [f"inner.title={text}"]).inner.title == text


@pytest.mark.parametrize("text", ["on", "0x10", "12:30", "1"])
def test_a_text_in_yaml_that_reads_as_a_number_is_refused_by_key(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=r"inner\.title.*quote"):
        load(Tree, yaml(tmp_path, f"inner: {{title: {text}}}"))


@pytest.mark.parametrize("value", [True, math.nan, math.inf])
@pytest.mark.parametrize("path", [("inner", "rate"), ("seed",), ("part", "temperature")])
def test_numbers_refuse_booleans_and_what_is_not_finite(path: tuple[str, ...], value: Any) -> None:
    args = [f"{'.'.join(path)}={'true' if value is True else '.nan' if math.isnan(value) else '.inf'}"]
    with pytest.raises(ValueError, match=path[-1]):
        load(Tree, None, args)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("inner.ratee=1", r"no key inner\.ratee; did you mean inner\.rate\?"),
        ("rate=1", r"did you mean inner\.rate\?"),
        ("part.rows=3", r"no key part\.rows: it belongs to part=large$"),
        ("lr=3", r"no key lr; did you mean inner\.rate\?"),
        ("inner.LR=3", r"no key inner\.LR; did you mean inner\.rate\?"),
        ("n=3", r"no key n; part\.rows belongs to part=large$"),
        ("kind=large", r"no key kind; did you mean part\?"),
        ("iner.rate=3", r"no key iner\.rate; did you mean inner\.rate\?"),
        ("part=X-L", r"part\.name=X-L is none of small, large; XL is part=large$"),
        ("inner.level=hgih", r"inner\.level=hgih: it must be one of low, high; did you mean high\?"),
        ("inner.count=few", r"^inner\.count=few: it must be all \| int ≥ 1$"),
        ("inner.count=0", r"^inner\.count=0: it must be all \| int ≥ 1$"),
        ("part=lage", r"part\.name=lage is none of small, large; did you mean large\?"),
        ("inner.rate=2", r"inner\.rate=2: it must be less than or equal to 1"),
        ("part.temperature=0", r"part\.temperature=0: it must be greater than 0"),
        ("inner.rate=fast", r"inner\.rate=fast"),
        ("inner.speed=4", r"there is no key inner\.speed: nothing moves here; use inner\.rate"),
        ("seed", r"'seed' is not of the form key=value"),
        ("seed=", r"seed has no value"),
        ("inner.title=${oc.env:HOME}", r"interpolations"),
        ("inner.title=???", r"missing values"),
        ("quux=1", r"--help lists every key"),
    ],
)
def test_a_wrong_word_is_answered_with_the_key_the_bound_and_the_way_out(word: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(Tree, None, [word])


def test_a_repeated_key_is_refused() -> None:
    with pytest.raises(ValueError, match="seed is given twice"):
        load(Tree, None, ["seed=1", "seed=2"])


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n", "!!python/object/apply:os.system ['true']\n", "a: ${b}\n"])
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=r"recipe|interpolations"):
        load(Tree, yaml(tmp_path, text))


LAUGHS = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LAUGHS, "line 1: anchors and aliases .* are not read"),
        ("a: *b", "anchors and aliases"),
        ("seed: &x 3", "anchors and aliases"),
        ("inner: {<<: {rate: 1}}", "merges"),
        ("seed: !!int 3", r"tags \(!\) are not read"),
        ("seed: !!python/object/apply:os.system ['touch planted']", "tags"),
        ("seed: !!python/object/apply:pathlib.Path [x]", "tags"),
        ("[" * 5000, "nested more than 20 deep"),
        ("".join(" " * depth + "a:\n" for depth in range(50)), "nested more than 20 deep"),
        ("a: [" + "1, " * 30_000 + "]", "more than 20,000 keys and values"),
        (f"seed: {'1' * 5000}", "longer than 4,096 letters"),
        (f"{'k' * 5000}: 1", "longer than 4,096 letters"),
        ("seed: " + "1:" * 3000, "longer than 4,096 letters"),
        ("a" * (1 << 20) + "b", "more than 1,048,576 bytes"),
        ("seed: 1\nseed: 2", "found duplicate key seed"),
        # Newer versions of OmegaConf find it themselves.
        ("1: 1\n'1': 2", r"a key stands twice among 1$|Conflicting integer and string keys: 1 and '1'$"),
        ("seed: 1\0", "not YAML that can be read"),
        (b"seed: \xff\xfe", "no text in UTF-8"),
        ("inner: {1: 2}", r"there is no key inner\.1"),
        ("? [a]\n: 1", "not YAML that can be read"),
        ("seed: ${oc.env:HOME}", "interpolations"),
    ],
)
def test_a_hostile_recipe_is_one_sentence_and_takes_a_moment(tmp_path: Path, content: Any, message: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        load(Tree, file)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_recipe_that_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    for path, kind in ((tmp_path / "pipe.yaml", "a pipe"), (tmp_path, "a folder"), (Path("/dev/zero"), "a device")):
        with pytest.raises(ValueError, match=f"is no recipe: .* is {kind} and no file"):
            load(Tree, path)


@pytest.mark.parametrize("text", ["&a [*a]", "!!python/name:os.system", "[" * 100])
def test_a_hostile_word_is_one_sentence(text: str) -> None:
    with pytest.raises(ValueError, match=r"inner\.rate=.* cannot be read"):
        load(Tree, None, [f"inner.rate={text}"])


def test_dumped_settings_load_back_equal(tmp_path: Path) -> None:
    tree = load(Tree, None, ["part=large", "part.limits=[0.25,0.5]", "inner.title=010", "output=null"])
    assert tree.part == Large(limits=(0.25, 0.5))
    assert load(Tree, yaml(tmp_path, dump_yaml(tree))) == tree


def test_help_names_every_key_with_type_default_and_line() -> None:
    listed = {(entry.key, *(name for need in entry.needs for name in need.names)): entry for entry in keys(Tree)}
    assert listed["part.name",].kind == "small | large"
    assert listed["part.name",].default == "small"
    assert listed["part.rows", "large"].kind == "int ≥ 1"
    assert listed["part.rows", "large"].doc == "How many."
    assert listed["part.rows", "large"].needs[0].about == "Another member of the union."
    assert listed["inner.rate",].default == "0.001"
    assert listed["output",].kind == "str | null"
    assert listed["part.limits", "large"].kind == "[float, float]"
    assert listed["part.limits", "large"].default == "[0, 1]"


class Outer(Settings):
    """A choice within a choice."""

    name: Literal["outer"] = "outer"
    part: Annotated[Small | Large, Field(discriminator="name")] = Small()


class Other(Settings):
    """A component without keys."""

    name: Literal["other"] = "other"


class Same(Settings):
    """Two components of the same keys."""

    name: Literal["same"] = "same"
    temperature: float = Field(0.5, gt=0)
    """How soft."""


class Nested(Settings):
    """The whole."""

    choice: Annotated[Outer | Other, Field(discriminator="name")] = Other()
    twice: Annotated[Small | Same, Field(discriminator="name")] = Same()
    thrice: Annotated[Small | Same | Other, Field(discriminator="name")] = Same()


def test_a_key_of_a_nested_component_is_answered_with_the_choices_that_are_missing() -> None:
    with pytest.raises(ValueError, match=r"it belongs to choice=outer, with choice\.part=large$"):
        load(Nested, None, ["choice.part.rows=3"])
    with pytest.raises(ValueError, match=r"it belongs to choice\.part=large$"):
        load(Nested, None, ["choice=outer", "choice.part.rows=3"])


def test_components_with_the_same_keys_share_one_entry() -> None:
    (entry,) = [entry for entry in keys(Nested) if entry.key == "thrice.temperature"]
    assert entry.needs[0].names == ("small", "same")


def test_a_key_of_all_components_depends_on_none() -> None:
    (entry,) = [entry for entry in keys(Nested) if entry.key == "twice.temperature"]
    assert entry.needs == ()


def test_a_small_default_is_shown_as_it_is() -> None:
    class Decays(Settings):
        rates: tuple[float, ...] = (0.0, 1e-6, 1e-3)

    assert next(keys(Decays)).default == "[0, 1e-06, 0.001]"


@pytest.mark.parametrize(("text", "number"), [("010", 8), ("[1, 0012]", 10), ("{a: +017}", 15)])
def test_a_number_that_yaml_would_take_for_octal_is_refused_with_both_ways_to_write_it(text: str, number: int) -> None:
    with pytest.raises(ValueError, match=rf"octal number {number}; write .* or '.*' in quotes"):
        yaml_text.parse(text)


def test_zeros_before_a_number_that_is_the_same_in_both_and_quoted_ones_are_read() -> None:
    assert yaml_text.parse("[02, 007, '010', 08, 0]") == [2, 7, "010", "08", 0]
