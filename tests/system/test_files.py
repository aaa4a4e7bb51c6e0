"""What a stranger may have put in a file's place, and what may be in the file."""

import io
import json
import os
import pickle
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from manyviews.system.arrays import mapped_array, read_tensors
from manyviews.system.files import check_links, open_beneath, open_lines, open_regular, read_json, read_text, shown


class Planted:
    """Unpickled, it leaves a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.file,)


def others(folder: Path) -> dict[str, Path]:
    """What is no file, by what it is called."""
    os.mkfifo(folder / "pipe")
    (folder / "folder").mkdir()
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(folder / "socket"))
    listening.close()
    return {name: folder / name for name in ("pipe", "folder", "socket")} | {"device": Path("/dev/zero")}


def test_only_regular_files_are_opened_and_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    for kind, path in others(tmp_path).items():
        with pytest.raises(ValueError, match=f"is a {kind} and no file"):
            open_regular(path)
        (tmp_path / "link").symlink_to(path)
        with pytest.raises(ValueError, match=f"is a {kind} and no file"):
            open_regular(tmp_path / "link")
        (tmp_path / "link").unlink()
        with pytest.raises(ValueError, match=f"is a {kind} and no file"):
            open_beneath(path.parent, path.name)


def test_no_link_is_followed_beneath_a_folder_and_no_name_leads_out(tmp_path: Path) -> None:
    (tmp_path / "root/in").mkdir(parents=True)
    (tmp_path / "root/in/file").write_bytes(b"inside")
    (tmp_path / "outside").write_bytes(b"outside")
    (tmp_path / "root/file").symlink_to(tmp_path / "outside")
    (tmp_path / "root/loop").symlink_to("loop")
    (tmp_path / "root/up").symlink_to(tmp_path)
    (tmp_path / "way").symlink_to(tmp_path / "root")
    with open_beneath(tmp_path / "way", "in/file") as file:
        assert file.read() == b"inside"
    for name in ("file", "loop", "up/outside"):
        with pytest.raises(ValueError, match="is a symbolic link, or lies behind one"):
            open_beneath(tmp_path / "root", name)
    for name in ("../outside", "in/../../outside", str(tmp_path / "outside"), "", "in//file"):
        with pytest.raises(ValueError, match="leads out of its folder"):
            open_beneath(tmp_path / "root", name)
    with pytest.raises(FileNotFoundError):
        open_beneath(tmp_path / "root", "in/none")


def test_links_out_of_a_folder_are_found_and_those_within_are_not_minded(tmp_path: Path) -> None:
    (tmp_path / "run/deep").mkdir(parents=True)
    (tmp_path / "run/file").touch()
    (tmp_path / "run/deep/link").symlink_to("../file")
    (tmp_path / "way").symlink_to(tmp_path / "run")
    check_links(tmp_path / "way")
    for place in (tmp_path, "../../elsewhere", "nowhere"):
        (tmp_path / "run/deep/out").symlink_to(place)
        with pytest.raises(ValueError, match=r"deep/out is a symbolic link out of .*run"):
            check_links(tmp_path / "run")
        (tmp_path / "run/deep/out").unlink()


def test_names_are_shown_as_one_line_that_no_terminal_obeys() -> None:
    assert shown("grün/ß 1.png") == "grün/ß 1.png"
    assert shown("a\nb\x1b[31m\udcff\u202e\ud800") == r"a\nb\x1b[31m\xff\u202e\ud800"
    assert shown("Größe 靴 a/b c.png") == "Größe 靴 a/b c.png"
    assert len(shown("a" * 10**6)) < 1100


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "nested too deep"),
        (b'{"a":' * 100_000, "nested too deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is damaged"),
        (b"[1]", "it holds a list and no object"),
        (b"{", "is damaged"),
        (b"\xff\xfe{}", "text in UTF-16; save it as UTF-8"),
        (b"{\xff}", "no text in UTF-8"),
        (b'{"a": "' + b"a" * 2000 + b'"}', "more than 1,000 bytes"),
    ],
)
def test_json_that_is_none_is_refused_in_a_sentence(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_json(tmp_path / "x.json", 1000 if "bytes" in message else 1 << 20)


def test_a_text_without_line_breaks_does_not_fill_the_memory(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"a\r\nb\rc\n" + b"d" * 1000)
    with open_lines(tmp_path / "x", longest=100) as lines:
        assert [next(lines) for _ in range(3)] == ["a\r\n", "b\r", "c\n"]
        with pytest.raises(ValueError, match="line 4: it is longer"):
            next(lines)
    (tmp_path / "x").write_bytes(b"\xef\xbb\xbfa\xff")
    with open_lines(tmp_path / "x") as lines:
        assert list(lines) == ["a\udcff"]
    with pytest.raises(ValueError, match="no text in UTF-8: invalid start byte at byte"):
        read_text(tmp_path / "x", 10)


def header(text: str, data: bytes = b"", length: int | None = None) -> bytes:
    return (len(text) if length is None else length).to_bytes(8, "little") + text.encode() + data


def tensor(shape: list[int], offsets: list[int], dtype: str = "F32") -> str:
    return json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}})


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        header("{}", length=2**63),
        header("{}", length=100_000_000),
        header("[" * 10_000),
        header("no JSON"),
        header(tensor([2], [0, 8])),
        header(tensor([2**62, 8], [0, 8]), bytes(8)),
        header(tensor([2], [8, 0]), bytes(8)),
        header(tensor([1], [0, 8]), bytes(8)),
        header(tensor([2], [0, 8], "OBJECT"), bytes(8)),
        header('{"a": null}'),
    ],
)
def test_tensors_whose_header_is_not_true_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.safetensors is damaged"):
        read_tensors(tmp_path / "x.safetensors")


def test_sound_tensors_and_arrays_are_read(tmp_path: Path) -> None:
    save_file({"a": torch.arange(3.0), "b": torch.zeros(0, 2)}, tmp_path / "x.safetensors")
    assert {name: list(value.shape) for name, value in read_tensors(tmp_path / "x.safetensors").items()} == {
        "a": [3],
        "b": [0, 2],
    }
    for array in (np.arange(6.0).reshape(2, 3), np.zeros((0, 3), np.float32), np.array([True])):
        np.save(tmp_path / "x.npy", array)
        assert np.array_equal(mapped_array(tmp_path / "x.npy"), array)


def test_arrays_that_could_run_code_or_are_shorter_than_they_say_are_refused(tmp_path: Path) -> None:
    file, planted = tmp_path / "x.npy", tmp_path / "planted"
    np.save(file, np.array([Planted(planted)], object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"x\.npy is damaged, or no array of numbers"):
        mapped_array(file)
    file.write_bytes(pickle.dumps(Planted(planted)))
    with pytest.raises(ValueError, match=r"is no \.npy file"):
        mapped_array(file)
    content = io.BytesIO()
    np.savez(content, a=np.zeros(3))
    file.write_bytes(content.getvalue())
    with pytest.raises(ValueError, match=r"is no \.npy file"):
        mapped_array(file)
    for shape in ("(10**15,)", "(999999999,)", "(-3,)", "(" * 90, "3", "None", "(2**64,)", "[3]", "(True,)"):
        text = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
        file.write_bytes(b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text.encode() + bytes(0))
        with pytest.raises(ValueError, match="is damaged, or no array of numbers"):
            mapped_array(file)
    np.save(file, np.array(["a"]))
    with pytest.raises(ValueError, match="holds <U1, and no real numbers"):
        mapped_array(file)
    assert not planted.exists()
