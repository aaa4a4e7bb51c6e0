"""What the system says of files reaches a person in words, and a folder that cannot be written to is refused first."""

import errno
import os
import re
from pathlib import Path

import pytest

from manyviews import cli
from manyviews.system.disk import WORDS, check_writable, in_words


@pytest.mark.parametrize("number", sorted(WORDS))
def test_an_error_of_the_system_names_the_file_and_no_number(number: int) -> None:
    said = in_words(OSError(number, os.strerror(number), "/some/file"))
    assert said.startswith("/some/file ")
    assert "Errno" not in said


def test_an_error_without_words_or_file_keeps_its_own() -> None:
    assert "Broken pipe" in in_words(OSError(errno.EPIPE, "Broken pipe"))
    assert in_words(OSError("no reason but this")) == "no reason but this"


def cases(folder: Path) -> dict[str, str]:
    (folder / "file").write_text("")
    return {
        str(folder / "file"): "file is a file",
        str(folder / "file" / "below"): "file is a file",
        str(folder / ("x" * 300)): "too long a name: a part of a path has at most 255 bytes",
        str(folder / ("é" * 150) / "below"): "too long a name",
    }


def test_a_folder_that_cannot_be_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    for place, message in cases(tmp_path).items():
        with pytest.raises(ValueError, match=re.escape(message)):
            check_writable(Path(place))
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    check_writable(tmp_path / "new" / "newer")


def test_a_folder_without_the_right_to_write_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # a test may run as root
    with pytest.raises(ValueError, match="may not be written to; name another folder"):
        check_writable(tmp_path / "new")


@pytest.mark.parametrize("command", ["pretrain", "extract", "finetune"])
def test_each_command_says_in_words_that_its_output_cannot_be(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    first = {"pretrain": ["quickstart"], "extract": ["resnet18", "pretrained=false"]}
    words = [*first.get(command, ["light_resnet", "pretrained=false", "data=sample"]), f"output={tmp_path}/file/x"]
    assert cli.COMMANDS[command](words) == 2
    printed = capsys.readouterr().err
    assert f"{tmp_path}/file is a file; name a folder" in printed
    assert "Errno" not in printed
