"""Relations between images from files: four kinds, and every line checked."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from manyviews.data.relations import RelationTable, read_relations

NAMES = [f"{letter}.png" for letter in "abcdefgh"]


def read(folder: Path, text: str, suffix: str = "csv", others: tuple[str, ...] = ()) -> RelationTable:
    path = folder / f"relations.{suffix}"
    path.write_text(text)
    return read_relations(path, NAMES, others)


def rows(table: RelationTable) -> list[tuple[list[int], float]]:
    return list(zip(table.ids.tolist(), table.numbers.tolist(), strict=True))


def test_pairs_are_read_once_each_in_the_order_of_the_images(tmp_path: Path) -> None:
    table = read(tmp_path, "a,b,same\nc.png,a.png,1\nb.png,d.png,0.25\na.png,c.png,1\n")
    assert table.kind == "pairs"
    assert rows(table) == [([0, 2], 1.0), ([1, 3], 0.25)]
    assert table.notes == ()


def test_triplets_and_ranked_lists_are_read(tmp_path: Path) -> None:
    table = read(tmp_path, "anchor,positive,negative\nb.png,a.png,c.png\na.png,b.png,c.png\n")
    assert (table.kind, rows(table)) == ("triplets", [([0, 1, 2], 1.0), ([1, 0, 2], 1.0)])
    table = read(tmp_path, "query,item,relevance\na.png,c.png,2.5\na.png,b.png,0\n")
    assert (table.kind, rows(table)) == ("ranked", [([0, 1], 0.0), ([0, 2], 2.5)])


def test_items_in_order_have_falling_relevances_down_to_one(tmp_path: Path) -> None:
    table = read(tmp_path, "query,items,,\na.png,d.png,c.png,b.png\nb.png,a.png,,\n")
    assert rows(table) == [([0, 1], 1.0), ([0, 2], 2.0), ([0, 3], 3.0), ([1, 0], 1.0)]


def test_sets_are_numbered_by_their_names(tmp_path: Path) -> None:
    table = read(tmp_path, "name,set\nc.png,zebra\na.png,ape\nb.png,zebra\na.png,ape\n")
    assert (table.kind, table.sets) == ("sets", ("ape", "zebra"))
    assert rows(table) == [([0], 0.0), ([1], 1.0), ([2], 1.0)]


LINES: dict[str, list[list[str | float]]] = {
    "a,b,same": [["a.png", "b.png", 1], ["c.png", "b.png", 0.5]],
    "a,b,similarity": [["a.png", "b.png", 1], ["c.png", "b.png", 0.5]],
    "anchor,positive,negative": [["a.png", "b.png", "c.png"]],
    "query,item,relevance": [["a.png", "b.png", 3]],
    "name,set": [["a.png", "x"], ["b.png", "y"]],
}


@pytest.mark.parametrize("header", LINES)
def test_any_delimiter_order_of_columns_and_json_lines_mean_the_same(header: str, tmp_path: Path) -> None:
    lines = LINES[header]
    columns: list[str | float] = [*header.split(",")]
    expected = read(tmp_path, "\n".join([header, *(",".join(map(str, line)) for line in lines)]))
    for delimiter in ",;\t|":
        turned = [delimiter.join(map(str, line[::-1])) for line in [columns, *lines]]
        again = read(tmp_path, "\ufeff" + "\r\n\r\n".join(turned) + "\r\n", "tsv")
        assert rows(again) == rows(expected)
    objects = [json.dumps(dict(zip(columns, line, strict=True))) for line in lines]
    assert rows(read(tmp_path, "\n\n".join(objects), "jsonl")) == rows(expected)


def test_items_in_order_are_a_list_in_json_lines(tmp_path: Path) -> None:
    table = read(
        tmp_path, '{"query": "a.png", "items": ["c.png", "b.png"]}\n{"items": ["a.png"], "query": "b.png"}', "jsonl"
    )
    assert rows(table) == [([0, 1], 1.0), ([0, 2], 2.0), ([1, 0], 1.0)]


def test_the_order_of_the_lines_does_not_matter(tmp_path: Path) -> None:
    lines = ["a.png,b.png,c.png", "c.png,b.png,a.png", "a.png,c.png,d.png"]
    forth, back = (read(tmp_path, "\n".join(["anchor,positive,negative", *part])) for part in (lines, lines[::-1]))
    assert rows(forth) == rows(back)


def test_names_match_in_either_composition_of_accents(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("a,b,same\ncafe\u0301.png, b.png ,1\n")
    assert read_relations(path, ["b.png", "caf\u00e9.png"]).ids.tolist() == [[0, 1]]


def test_numbers_that_differ_are_averaged_and_told_with_their_lines(tmp_path: Path) -> None:
    table = read(tmp_path, "a,b,same\na.png,b.png,1\nc.png,d.png,1\nb.png,a.png,0\na.png,b.png,1\n")
    assert rows(table) == [([0, 1], pytest.approx(2 / 3)), ([2, 3], 1.0)]
    assert table.notes == (
        "several numbers for 1 pair, such as a.png, b.png: 1 (line 2) and 0 (line 4); their mean is used",
    )
    table = read(tmp_path, "query,item,relevance\na.png,b.png,3\na.png,b.png,1\nb.png,a.png,1\n")
    assert rows(table) == [([0, 1], 2.0), ([1, 0], 1.0)]
    assert "several numbers for 1 item, such as a.png, b.png: 3 (line 2) and 1 (line 3)" in table.notes[0]


def test_cycles_of_preferences_are_counted_by_anchor(tmp_path: Path) -> None:
    lines = ["a.png,b.png,c.png", "a.png,c.png,d.png", "a.png,d.png,b.png", "a.png,b.png,e.png", "b.png,c.png,a.png"]
    text = "\n".join(["anchor,positive,negative", *lines])
    note = read(tmp_path, text).notes[0]
    assert note.startswith("contradictions among 3 of 5 triplets, such as those of a.png in lines 2, 3, 4,")
    assert len(read(tmp_path, text).ids) == 5
    # Of two anchors, the same two images may be in either order.
    assert not read(tmp_path, "anchor,positive,negative\na.png,b.png,c.png\nd.png,c.png,b.png\n").notes


def test_relations_with_images_that_are_held_out_are_counted_and_left_out(tmp_path: Path) -> None:
    text = "anchor,positive,negative\na.png,b.png,c.png\na.png,held.png,c.png\n"
    table = read(tmp_path, text, others=("held.png",))
    assert rows(table) == [([0, 1, 2], 1.0)]
    assert "left out 1 of 2 relations" in table.notes[0]
    assert "held.png in line 3" in table.notes[0]
    with pytest.raises(ValueError, match=r"no relation of images to learn from: left out 1 of 1 relation,"):
        read(tmp_path, "a,b,same\na.png,held.png,1\n", others=("held.png",))


PAIRS, TRIPLETS, RANKED, ORDER = "a,b,same\n", "anchor,positive,negative\n", "query,item,relevance\n", "query,items\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"first line has the columns \(none\), and must have those .* a,b,same .* anchor,positive,negative"),
        ("a.png,b.png,1\n", r"columns a.png, b.png, 1, and must .* query,items .* name,set"),
        ("anchor,positive\na.png,b.png\n", "negative is missing beside anchor, positive"),
        (PAIRS, "no relation .* below the header there must be a line for each"),
        (PAIRS + "a.png,b.png\n", "line 2: 2 columns, where the header has 3"),
        (PAIRS + "a.png,b.png,1,2\n", "line 2: 4 columns, where the header has 3"),
        (PAIRS + "a.png,b.png,\n", "line 2: same is empty"),
        (PAIRS + "a.png,b.png,1\n\na.png,,1\n", "line 4: b is empty"),
        (PAIRS + "a.png,b.png,1.5\n", "line 2: same is 1.5, and must be 0, 1 or a number between"),
        (PAIRS + "a.png,b.png,nan\n", "line 2: same is nan"),
        (PAIRS + "a.png,b.png,yes\n", "line 2: 'yes' in column 'same' is no number"),
        (PAIRS + 'a.png,b.png,"0,5"\n', "write 0.5"),
        (PAIRS + "a.png,b.pgn,1\n", r"line 2: 'b.pgn' is not among the 8 images; did you mean b.png\?"),
        (PAIRS + "a.png,a.png,1\n", "line 2: a.png stands twice in one relation"),
        (TRIPLETS + "a.png,b.png,b.png\n", "line 2: b.png stands twice"),
        (RANKED + "a.png,b.png,-1\n", "line 2: relevance is -1, and must be 0 or more"),
        (RANKED + "a.png,b.png,inf\n", "line 2: relevance is inf"),
        (ORDER + "a.png\n", "line 2: a query and the names of its items"),
        (ORDER + "a.png,b.png,,c.png\n", "line 2: a query and the names of its items"),
        (ORDER + "a.png,b.png,b.png\n", "line 2: b.png stands twice"),
        (ORDER + "a.png,b.png\nb.png,c.png\na.png,c.png\n", "line 4: the items of a.png stand in line 2"),
        ("items,query\nb.png,a.png\n", "items is the last column"),
        (
            "name,set\na.png,x\nb.png,y\na.png,y\n",
            "line 4: a.png is in the set 'y', and by line 2 in 'x'; .* give pairs",
        ),
        ("name,set\na.png,\n", "line 2: set is empty"),
    ],
)
def test_what_is_wrong_in_a_table_is_an_error_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "first line has the keys"),
        ('{"a": "a.png"', "line 1 is damaged"),
        ("[1]", "line 1 is damaged: it holds a list"),
        (
            '{"a": "a.png", "b": "b.png", "same": 1}\n{"a": "a.png", "b": "b.png"}',
            "line 2: its keys are a, b; they must",
        ),
        ('{"a": "a.png", "b": 3, "same": 1}', "line 1: 3 is no text"),
        ('{"a": "a.png", "b": "b.png", "same": null}', "line 1: 'None' in column 'same' is no number"),
        ('{"a": "a.png", "b": "b.png", "same": 2}', "line 1: same is 2, and must be"),
        ('{"query": "a.png", "items": "b.png"}', "line 1: items must be a list of names, not b.png"),
        ('{"query": "a.png", "items": []}', "line 1: items must be a list"),
    ],
)
def test_what_is_wrong_in_json_lines_is_an_error_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, text, "jsonl")


def test_true_and_false_are_numbers_in_json(tmp_path: Path) -> None:
    text = '{"a": "a.png", "b": "b.png", "same": true}\n{"a": "a.png", "b": "c.png", "same": false}'
    assert rows(read(tmp_path, text, "jsonl")) == [([0, 1], 1.0), ([0, 2], 0.0)]


def _folder(path: Path) -> None:
    path.mkdir()


def _utf16(path: Path) -> None:
    path.write_text("a,b,same\na.png,b.png,1\n", encoding="utf-16")


def _latin1(path: Path) -> None:
    path.write_bytes("a,b,same\ncafé.png,b.png,1\n".encode("latin-1"))


@pytest.mark.parametrize(
    ("make", "message"),
    [(lambda path: None, "does not exist"), (_folder, "is a folder"), (_utf16, "UTF-16"), (_latin1, "not in UTF-8")],
)
def test_a_file_that_cannot_be_read_is_an_error(make: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    make(tmp_path / "pairs.csv")
    with pytest.raises(ValueError, match=message):
        read_relations(tmp_path / "pairs.csv", NAMES)
