"""Text that leaves the program: names of any kind, to consoles, files and pictures of any kind."""

import io
import json
import logging
import os
import sys
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich import box
from rich.table import Table
from safetensors.torch import save_file

from manyviews import cli
from manyviews.config import dump_yaml, load
from manyviews.data.images import InMemory, Names
from manyviews.data.labels import read_labels, values_of
from manyviews.data.sources.paths import same_spelling
from manyviews.data.subset import of_classes
from manyviews.evaluators import lettering
from manyviews.evaluators.confusion import as_pixels, confusion_picture, mistakes_picture
from manyviews.recipe import Recipe
from manyviews.report import plots
from manyviews.run.checkpoints.checkpoint import Manifest, read_manifest
from manyviews.system.arrays import read_tensors
from manyviews.system.console import INSTEAD, Console
from manyviews.system.files import shown, spelled
from manyviews.system.path_bytes import restored, storable

RAW = b"caf\xe9".decode("utf-8", "surrogateescape")
ESCAPE = "\x1b]0;owned\x07\x1b[2J\x9b"


class Stream:
    """A stream of some encoding in place of standard output or error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, encoding: str) -> None:
        self._bytes = io.BytesIO()
        self._stream = io.TextIOWrapper(self._bytes, encoding, "strict", write_through=True)
        monkeypatch.setattr(sys, name, self._stream)

    def text(self) -> str:
        return self._bytes.getvalue().decode(self._stream.encoding)


# Consoles


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1", "cp437", "utf-8"])
def test_no_letter_ends_a_message_or_a_table_on_any_console(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    stream = Stream(monkeypatch, "stdout", encoding)
    console = Console()
    console.say(f"3 × 32 → λ – {RAW} 中 \ud800")
    console.warn("100 ± 2")
    console.update("“x”", 0.5, "√β")
    table = Table("features", "chosen", box=box.HEAVY_HEAD)
    table.add_row("learned", "λ 3")
    console.rich.print(table)
    said = stream.text()
    assert r"caf\xe9" in said
    assert "learned" in said
    if encoding == "utf-8":
        assert "3 × 32 → λ" in said
        assert "┏" in said
    else:
        assert r"\u4e2d" in said
        assert "->" in said
    if encoding == "ascii":
        assert "3 x 32 -> lambda - " in said
        assert "lambda 3" in said
        assert "+-" in said


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_help_and_errors_reach_any_console(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    out, error = Stream(monkeypatch, "stdout", encoding), Stream(monkeypatch, "stderr", encoding)
    for ask in (cli.pretrain, cli.evaluate, cli.extract, cli.finetune):
        assert ask(["--help"]) == 0
        assert ask([f"{RAW}→{ESCAPE}=1"]) == cli.WRONG_USE
    assert "usage" in out.text()
    assert error.text().count("error: ") >= 4
    assert r"caf\xe9" in error.text()
    assert not any(letter in error.text() for letter in ESCAPE if not letter.isprintable())


def test_control_characters_are_spelled_in_messages_bars_and_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(monkeypatch, "stdout", "utf-8")
    console = Console()
    console.say(f"a{ESCAPE}\nb\tc")
    console.warn(ESCAPE)
    monkeypatch.setattr("manyviews.system.console.SECONDS_BETWEEN_LINES", 0.0)
    console.update(f"d{ESCAPE}", 0.5, ESCAPE)
    table = Table(f"e{ESCAPE}")
    table.add_row(ESCAPE)
    console.rich.print(table)
    said = stream.text()
    assert not any(letter in said for letter in "\x1b\x07\x9b\u202e")
    assert said.count(r"\x1b]0;owned\x07\x1b[2J\x9b") == 4
    assert said.count(r"\x1b]0;owned\x1b[2J\x9b") == 2


def test_what_rich_itself_tells_a_terminal_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Stream(monkeypatch, "stdout", "utf-8")
    Console().warn(f"yellow{ESCAPE}")
    assert "\x1b[33mwarning: yellow\\x1b]0" in stream.text()


def test_every_letter_of_our_own_messages_can_be_written_in_ascii() -> None:
    package = Path(cli.__file__).parent
    for letter, instead in INSTEAD.items():
        assert not letter.isascii()
        assert instead.isascii()
    code = "".join(file.read_text("utf-8") for file in package.rglob("*.py"))
    for word in ("→", "×", "λ", "–", "…", "±", "≥", "≤", "√", "·"):
        assert word in code
        assert word in INSTEAD


# Records


@pytest.mark.parametrize("text", [RAW, "café", "\udc80\udcff", "\udc80é\udcff中", ESCAPE, "a\\udce9", "😀"])
def test_paths_that_are_no_utf8_come_back_from_a_recipe_and_from_a_manifest(tmp_path: Path, text: str) -> None:
    recipe = load(Recipe, None, ["data.name=folder", f"data.path=/{text}", f"output=/x/{text}"])
    file = tmp_path / "config.yaml"
    file.write_text(dump_yaml(recipe), "utf-8")
    assert load(Recipe, file) == recipe
    metadata = {"recipe": recipe.model_dump(mode="json"), text: [text]}
    folder = tmp_path / "step-000000001"
    folder.mkdir()
    given = Manifest(step=1, processes=1, shards={}, files={}, facts=metadata)
    (folder / "manifest.json").write_text(given.text(), "utf-8")
    assert read_manifest(folder).metadata == metadata
    assert restored(storable(metadata)) == metadata
    json.dumps(storable(metadata), ensure_ascii=False).encode()


def test_tensors_are_read_from_a_folder_whose_name_is_no_utf8(tmp_path: Path) -> None:
    folder = tmp_path / RAW
    folder.mkdir()
    save_file({"a": torch.arange(3)}, folder / "t.safetensors")
    before = len(os.listdir("/proc/self/fd"))
    assert read_tensors(folder / "t.safetensors")["a"].tolist() == [0, 1, 2]
    assert len(os.listdir("/proc/self/fd")) == before


def test_bytes_that_are_no_utf8_are_spelled_as_bytes() -> None:
    assert spelled(f"{RAW} é 中\n") == r"caf\xe9 é 中\n"
    assert spelled("é 中", ascii_only=True) == r"\xe9 \u4e2d"
    assert len(shown("\x1b" * 1000)) == 1001


# Names in tables


NFC, NFD = "été", unicodedata.normalize("NFD", "été")


def images(*names: str, classes: tuple[str, ...] = ()) -> InMemory:
    labels = torch.arange(len(names)) % len(classes) if classes else None
    pixels = torch.zeros(len(names), 1, 8, 8, dtype=torch.uint8)
    return InMemory(pixels, Names(names), labels, classes, "0" * 64)


def test_names_are_looked_up_by_their_letters_where_these_tell_them_apart() -> None:
    one, both = same_spelling([NFD, "b"]), same_spelling([NFC, NFD])
    assert (one(NFC), one(NFD), one("b"), one("c")) == (NFD, NFD, "b", None)
    assert (both(NFC), both(NFD)) == (NFC, NFD)
    # The third spelling of two names is neither.
    mixed = f"{NFC[0]}{NFD[2:]}"
    assert unicodedata.normalize("NFC", mixed) == NFC
    assert both(mixed) is None


def test_composed_names_of_a_table_are_those_of_decomposed_files_and_the_other_way_round(tmp_path: Path) -> None:
    for kept, given in ((NFC, NFD), (NFD, NFC)):
        table = tmp_path / "labels.csv"
        table.write_text(f"name,label\n{given}/1.png,{given}\n{given}/2.png,{kept}\n", "utf-8")
        assert read_labels(table, [f"{kept}/1.png", f"{kept}/2.png"]) == {f"{kept}/1.png": NFC, f"{kept}/2.png": NFC}
        values = tmp_path / "values.csv"
        values.write_text(f"name,x\n{given}/2.png,2\n{given}/1.png,0\n", "utf-8")
        found = values_of(images(f"{kept}/1.png", f"{kept}/2.png"), str(values))
        assert found.flatten().tolist() == [-1, 1]
        assert of_classes(images("1", "2", "3", classes=("a", kept)), [given]).tolist() == [1]


def test_files_that_differ_by_composition_alone_are_two(tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    table.write_text(f"name,label\n{NFC}.png,a\n{NFD}.png,b\n", "utf-8")
    assert read_labels(table, [f"{NFC}.png", f"{NFD}.png"]) == {f"{NFC}.png": "a", f"{NFD}.png": "b"}
    table.write_text(f"name,label\n{NFC}.png,a\n{NFD}.png,b\n", "utf-8")
    with pytest.raises(ValueError, match=r"line 3: .* stands in line 2 already"):
        read_labels(table, [f"{NFD}.png"])


def test_tables_in_another_encoding_are_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = tmp_path / "labels.csv"
    table.write_text("name,label\ncafé.png,tea\n", "latin-1")
    with pytest.raises(ValueError, match=r"not in UTF-8.*CSV UTF-8"):
        read_labels(table, ["café.png"])
    table.write_text("name,label\na.png,café\n", "latin-1")
    assert read_labels(table, ["a.png"]) == {"a.png": RAW}
    assert "CSV UTF-8" in caplog.text
    for encoding in ("utf-16", "utf-16-be"):
        table.write_bytes((b"\xfe\xff" if encoding == "utf-16-be" else b"") + "name,label\na.png,b\n".encode(encoding))
        with pytest.raises(ValueError, match=r"UTF-16.*CSV UTF-8"):
            read_labels(table, ["a.png"])
    table.write_text("name,label\nä.png,b\n", "utf-8-sig")
    assert read_labels(table, ["ä.png"]) == {"ä.png": "b"}
    values = tmp_path / "values.csv"
    values.write_text("name,x\ncafé.png,1\n", "latin-1")
    with pytest.raises(ValueError, match="CSV UTF-8"):
        values_of(images("café.png", "b.png"), str(values))


# Pictures


NAMES = [RAW, "a$x$", "$", r"\frac{", "中文", "مرحبا", "_hidden", "line\nbreak", "\ud800", "é" * 40]


def test_names_of_any_kind_are_drawn_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    matrix = torch.eye(len(NAMES), dtype=torch.int64)
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        confusion_picture(matrix, NAMES)
        mistakes_picture(torch.zeros(len(NAMES), 3, 8, 8, dtype=torch.uint8), [(name, name) for name in NAMES])
        figure = plots.scatter(torch.rand(3, 2), ["#ff0000"] * 3, dict.fromkeys(NAMES, "#ff0000"))
        as_pixels(figure)
    assert not caplog.records
    legend = figure.axes[0].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == list(map(lettering.shortened, NAMES))


def test_a_letter_that_no_font_has_is_spelled_and_one_that_another_font_has_is_drawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lettering._families.cache_clear()
    monkeypatch.setattr(lettering, "_letters", {"DejaVu Sans": set(map(ord, "a\\u4e2d"))}.get)
    monkeypatch.setattr(lettering, "_files", lambda: {"DejaVu Sans": ""})
    assert lettering.legible("a中") == r"a\u4e2d"
    lettering._families.cache_clear()
    fonts = {"DejaVu Sans": set(map(ord, "ab\\")), "One": set(map(ord, "é")), "Two": set(map(ord, "中é"))}
    monkeypatch.setattr(lettering, "_letters", fonts.get)
    monkeypatch.setattr(lettering, "_files", lambda: dict.fromkeys(fonts, ""))
    assert lettering.legible("a中é") == "a中é"
    assert lettering._families(frozenset("a中é")) == ("One", "Two")
    assert lettering._families(frozenset("ab")) == ()
    lettering._families.cache_clear()


def test_dollars_are_drawn_as_dollars() -> None:
    matrix = torch.eye(2, dtype=torch.int64)
    assert not torch.equal(confusion_picture(matrix, ["$a$", "b"]), confusion_picture(matrix, ["a", "b"]))


# All commands


def test_all_commands_work_where_no_path_and_no_class_is_utf8(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    root, draw = tmp_path / RAW, np.random.default_rng(0)
    for name in (RAW, "$h$\udcff", ESCAPE):
        folder = root / "images" / name
        folder.mkdir(parents=True)
        for number in range(8):
            Image.fromarray(draw.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / f"b\udcfc{number}.png")
    data, alone = [f"data={root}/images", "data.size=8"], ["workers=0", "threads=1"]
    run = f"{root}/run"
    small = ["train.batch_size=8", "train.epochs=1", "train.threads=1", "train.workers=0"]
    assert cli.pretrain(["quickstart", *data, *small, f"output={run}"]) == 0
    assert cli.pretrain(["resume=true", f"output={run}"]) == 0
    assert cli.evaluate([run, "tasks=knn", "workers=0"]) == 0
    assert cli.extract([run, *data, f"output={root}/features", *alone]) == 0
    tune = ["min_steps=2", "epochs=1", "batch_size=8", "checks=1", "held_out=0"]
    assert cli.finetune([run, f"output={root}/tuned", *tune, *alone]) == 0
    assert cli.finetune([run, f"output={root}/tuned", "resume=true"]) == 0
    result = json.loads((root / "tuned" / "result.json").read_text("utf-8"))
    assert set(result["classes"]) == {RAW, "$h$\udcff", ESCAPE}
    for record in ("run/report.html", "run/config.yaml", "tuned/config.yaml", "run/evaluation.json"):
        (root / record).read_text("utf-8")
    said = b"".join(capfdbinary.readouterr())
    assert rb"caf\xe9" in said
    assert b"\x1b" not in said
