"""Lists of pairs: tables and LFW's layout, and what is wrong in one is told with its line."""

import unicodedata
from pathlib import Path

import pytest

from manyviews.evaluators.pair_lists import read_pairs
from manyviews.evaluators.verification import Pairs, VerificationSettings

NAMES = [f"p{person}/p{person}_{number:04d}.png" for person in range(6) for number in range(1, 5)]
IDS = {name: index for index, name in enumerate(NAMES)}
TWO = VerificationSettings(folds=2)
LISTED = [
    ("p0/p0_0001.png", "p0/p0_0002.png", 1),
    ("p0/p0_0001.png", "p1/p1_0001.png", 0),
    ("p2/p2_0003.png", "p2/p2_0004.png", 1),
    ("p3/p3_0001.png", "p2/p2_0002.png", 0),
]


def read(folder: Path, text: str, settings: VerificationSettings = TWO, *, seed: int = 0) -> Pairs:
    file = folder / "pairs.csv"
    file.write_bytes(text.encode())
    return read_pairs(str(file), NAMES, settings, seed=seed)


def table(delimiter: str = ",", more: tuple[str, ...] = ("", "", "", "")) -> str:
    lines = [
        delimiter.join([*map(str, row), *([extra] * bool(extra))]) for row, extra in zip(LISTED, more, strict=True)
    ]
    return "\n".join(lines) + "\n"


def check(pairs: Pairs) -> None:
    assert pairs.images.tolist() == [[IDS[first], IDS[second]] for first, second, _ in LISTED]
    assert pairs.same.tolist() == [True, False, True, False]
    assert pairs.folds[pairs.same].sort().values.tolist() == pairs.folds[~pairs.same].sort().values.tolist() == [0, 1]
    assert pairs.source == "pairs.csv"


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("header", ["", "a,b,same\n", "A,B,Same\n"])
def test_a_table_is_read_with_any_delimiter_with_a_header_or_none(tmp_path: Path, delimiter: str, header: str) -> None:
    check(read(tmp_path, header.replace(",", delimiter) + table(delimiter)))
    check(read(tmp_path, (header.replace(",", delimiter) + table(delimiter)).replace("\n", "\r\n")))


def test_folds_are_those_of_the_list_in_the_order_of_their_first_lines(tmp_path: Path) -> None:
    more = ("z", "z", "a", "a")
    for text in (table(more=more), "a,b,same,fold\n" + table(more=more)):
        pairs = read(tmp_path, text)
        check(pairs)
        assert pairs.folds.tolist() == [0, 0, 1, 1]
    noted = read(tmp_path, "a,b,same,note,fold\n" + table(more=("x,1", "x,1", "x,2", "x,2")))
    assert noted.folds.tolist() == [0, 0, 1, 1]


def test_without_folds_each_kind_is_dealt_evenly_and_by_the_seed(tmp_path: Path) -> None:
    lines = [f"{NAMES[4 * person]},{NAMES[4 * person + step]},1" for person in range(6) for step in (1, 2)]
    lines += [
        f"{NAMES[4 * person]},{NAMES[(4 * person + 4 + step) % 24]},0" for person in range(6) for step in (1, 2, 3)
    ]
    settings = VerificationSettings(folds=4)
    drawn = {tuple(read(tmp_path, "\n".join(lines), settings, seed=seed).folds.tolist()) for seed in (0, 0, 1)}
    assert len(drawn) == 2
    pairs = read(tmp_path, "\n".join(lines), settings)
    assert pairs.folds[pairs.same].bincount().tolist() == [3, 3, 3, 3]
    assert sorted(pairs.folds[~pairs.same].bincount().tolist()) == [4, 4, 5, 5]


def test_accents_match_in_either_form_and_the_first_of_equal_names_is_meant(tmp_path: Path) -> None:
    names = [unicodedata.normalize("NFD", "café/1.jpg"), "b/2.jpg", "c/3.jpg", "c/3.jpg", "b/4.jpg"]
    (tmp_path / "pairs.csv").write_text(
        "café/1.jpg,b/2.jpg,1\nc/3.jpg,b/4.jpg,0\ncafé/1.jpg,c/3.jpg,1\nb/2.jpg,b/4.jpg,0\n"
    )
    assert read_pairs(str(tmp_path / "pairs.csv"), names, TWO).images.tolist() == [[0, 1], [2, 4], [0, 2], [1, 4]]


def lfw(folds: int, each: int, delimiter: str = "\t") -> str:
    lines = [[str(folds), str(each)] if folds > 1 else [str(each)]]
    for fold in range(folds):
        lines += [[f"p{fold}", "1", str(2 + index)] for index in range(each)]
        lines += [[f"p{fold}", "1", f"p{fold + 1}", str(2 + index)] for index in range(each)]
    return "\n".join(map(delimiter.join, lines)) + "\n"


@pytest.mark.parametrize("delimiter", ["\t", " "])
def test_the_layout_of_lfw_is_read_with_its_folds(tmp_path: Path, delimiter: str) -> None:
    pairs = read(tmp_path, lfw(5, 2, delimiter), VerificationSettings())
    assert pairs.folds.tolist() == [fold for fold in range(5) for _ in range(4)]
    assert pairs.same.tolist() == [True, True, False, False] * 5
    assert pairs.images[:4].tolist() == [
        [IDS["p0/p0_0001.png"], IDS["p0/p0_0002.png"]],
        [IDS["p0/p0_0001.png"], IDS["p0/p0_0003.png"]],
        [IDS["p0/p0_0001.png"], IDS["p1/p1_0002.png"]],
        [IDS["p0/p0_0001.png"], IDS["p1/p1_0003.png"]],
    ]


def test_the_first_view_of_lfw_has_no_folds_and_is_dealt(tmp_path: Path) -> None:
    pairs = read(tmp_path, lfw(1, 3), VerificationSettings(folds=3))
    assert (
        pairs.folds[pairs.same].sort().values.tolist() == pairs.folds[~pairs.same].sort().values.tolist() == [0, 1, 2]
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            table().replace("p2_0003", "p2_0009"),
            r"line 3: 'p2/p2_0009.png' is not among the 24 images; did you mean p2",
        ),
        (table().replace("p0/p0_0001.png", "p0/x.png", 1), r"line 1: 'p0/x.png' is not among .* a header is a,b,same"),
        (
            "x,y,label\n" + table(),
            r"line 1: 'x' is not among the 24 images; names are those below .* header is a,b,same",
        ),
        (table().replace(",1\n", ",0.7\n", 1), r"line 1: same is '0.7'; write 1 for images of one class, 0"),
        (table() + "p0/p0_0002.png,p0/p0_0001.png,0\n", r"line 5: .* are different, and in line 1 they are not"),
        (table() + "p0/p0_0002.png,p0/p0_0002.png,0\n", r"line 5: p0/p0_0002.png is paired with itself"),
        (table() + "p0/p0_0002.png,p0/p0_0001.png\n", r"line 5: 2 columns, where the first line has 3"),
        ("p0/p0_0001.png,p0/p0_0002.png\n", r"line 1: two columns, where a,b,same"),
        ("a,b,same\n", r"has no pairs; it must have lines a,b,same"),
        ("", r"its first line has no columns"),
        (table().replace(",0\n", ",1\n"), r"has no pairs of different classes; a threshold takes pairs of both kinds"),
        (table(more=("1", "1", "1", "1")), r"has one fold, 1; give 2 or more"),
        (table(more=("1", "2", "1", "2")), r"fold 2 has no pairs of one class, and each"),
        ("a,b,same,fold\n" + table(more=("1", "1", " ", "2")), r"line 4: its fold is empty"),
        (table().partition("p2")[0], r"has 1 pair of one class, fewer than the 2 folds; give more; 2 are the fewest"),
        (lfw(5, 2) + "p1\t1\t4\n", r"has 21 pairs, where its first line names 5 × 2 × 2"),
        (lfw(5, 2).replace("p3\t1\t3", "p3\t1\t7"), r"line 15: 'p3/p3_0007' is not among .* did you mean p3/p3_0004\?"),
        (lfw(5, 2).replace("p3\t1\t3", "p3\tone\t3"), r"line 15: 'one' is no number of an image"),
        (lfw(5, 2).replace("p3\t1\t3", "p3"), r"line 15: 1 column; it must have name n1 n2"),
    ],
)
def test_what_is_wrong_is_told_with_its_line_and_a_way_out(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, text)


def test_too_few_pairs_for_the_folds_name_a_number_that_works(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"2 pairs of one class, fewer than the 10 folds; .*folds=2"):
        read(tmp_path, table(), VerificationSettings())


def test_a_missing_file_and_a_folder_are_told(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text(table())
    with pytest.raises(ValueError, match=r"pears.csv does not exist; .* holds pairs.csv"):
        read_pairs(str(tmp_path / "pears.csv"), NAMES)
    with pytest.raises(ValueError, match="is a folder; name a file"):
        read_pairs(str(tmp_path), NAMES)
