import gzip
import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from pydantic import TypeAdapter

from manyviews.data import CIFAR10, CIFAR100, STL10, Data, FashionMNIST, Folder, Images, Sample, select

RANDOM = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def no_download(monkeypatch):
    def refuse(*arguments, **options):
        raise RuntimeError("no network in tests")

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", refuse)
    for module in ("mnist", "cifar", "stl10"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.download_and_extract_archive", refuse)


def idx(values: np.ndarray) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes() + values.tobytes()


def fashion_files(folder: Path, *, compress: bool) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True)
    made = {}
    for stem, count in (("train", 7), ("t10k", 5)):
        made[stem] = RANDOM.integers(0, 256, (count, 28, 28), np.uint8)
        for what, values in (("images-idx3", made[stem]), ("labels-idx1", np.arange(count, dtype=np.uint8))):
            data = idx(values)
            path = folder / f"{stem}-{what}-ubyte{'.gz' if compress else ''}"
            path.write_bytes(gzip.compress(data) if compress else data)
    return made


@pytest.mark.parametrize(("below", "compress"), [("FashionMNIST/raw", False), ("FashionMNIST/raw", True), (".", True)])
def test_fashion_mnist_is_read_in_torchvisions_and_in_debians_layout(tmp_path, below, compress):
    made = fashion_files(tmp_path / "data" / below, compress=compress)
    split = FashionMNIST(path=str(tmp_path / "data")).build()
    for images, values in ((split.train, made["train"]), (split.test, made["t10k"])):
        assert isinstance(images, Images)
        assert images.read(torch.tensor([3, 1])).squeeze(1).tolist() == values[[3, 1]].tolist()
        assert images.labels.tolist() == list(range(len(values)))
    assert split.train.names[6] == "train/00006"
    assert split.train.classes[9] == "Ankle boot"


def test_a_damaged_idx_file_is_named(tmp_path):
    fashion_files(tmp_path / "data", compress=False)
    path = tmp_path / "data/train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="train-images-idx3-ubyte is not an idx file of bytes, or is cut short"):
        FashionMNIST(path=str(tmp_path / "data")).build()


def test_missing_files_that_cannot_be_downloaded_say_where_to_put_them(tmp_path):
    for source in (FashionMNIST, CIFAR10, CIFAR100, STL10):
        with pytest.raises(ValueError, match=rf"is not in {tmp_path} and could not be downloaded .*data.path=FOLDER"):
            source(path=str(tmp_path)).build()


def fabricated(monkeypatch, source: type, folder: Path, label: str, meta: dict) -> np.ndarray:
    """Tiny pickles in torchvision's layout, with their checksums told to torchvision."""
    folder.mkdir()
    data = RANDOM.integers(0, 256, (6, 3072), np.uint8)

    def write(name: str, content: dict) -> str:
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    lists = {}
    for which, rows in (("train_list", slice(0, 4)), ("test_list", slice(4, 6))):
        digest = write(which, {"data": data[rows], label: list(range(6))[rows]})
        lists[which] = [[which, digest]]
    for which, value in lists.items():
        monkeypatch.setattr(source, which, value)
    key = next(iter(meta))
    monkeypatch.setattr(source, "meta", {"filename": "meta", "key": key, "md5": write("meta", meta)})
    return data.reshape(6, 3, 32, 32)


@pytest.mark.parametrize(("settings", "label"), [(CIFAR10, "labels"), (CIFAR100, "fine_labels")])
def test_cifar_is_read_in_torchvisions_layout(tmp_path, monkeypatch, settings, label):
    source = getattr(torchvision.datasets, settings.__name__)
    data = fabricated(monkeypatch, source, tmp_path / source.base_folder, label, {"names": list("abcdef")})
    split = settings(path=str(tmp_path)).build()
    assert torch.equal(split.train.read(torch.arange(4)), torch.from_numpy(data[:4]))
    assert torch.equal(split.test.read(torch.arange(2)), torch.from_numpy(data[4:]))
    assert split.test.labels.tolist() == [4, 5]
    assert split.train.classes == tuple("abcdef")
    assert (split.train.channels, split.train.size) == (3, 32)


class Planted:
    """Unpickled, it leaves a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.file,)


def test_a_pickle_of_cifar_that_is_not_the_published_one_is_never_opened(tmp_path, monkeypatch):
    source = torchvision.datasets.CIFAR10
    fabricated(monkeypatch, source, tmp_path / source.base_folder, "labels", {"names": list("abcdef")})
    file = tmp_path / source.base_folder / "train_list"
    file.write_bytes(pickle.dumps({"data": Planted(tmp_path / "planted")}))
    with pytest.raises(ValueError, match="could not be downloaded"):
        CIFAR10(path=str(tmp_path)).build()
    # Even with the right checksum nothing but arrays is made.
    digest = hashlib.md5(file.read_bytes()).hexdigest()
    monkeypatch.setattr(source, "train_list", [["train_list", digest]])
    with pytest.raises(ValueError, match=r"train_list is no file of CIFAR: it names pathlib\.Path\.touch"):
        CIFAR10(path=str(tmp_path)).build()
    assert not (tmp_path / "planted").exists()


@pytest.mark.parametrize("damage", ["three bytes", "cut", "flipped", "bomb"])
def test_a_damaged_compressed_file_is_a_sentence(tmp_path, damage):
    fashion_files(tmp_path / "data", compress=True)
    path = tmp_path / "data/train-images-idx3-ubyte.gz"
    content = path.read_bytes()
    path.write_bytes(
        {
            "three bytes": gzip.compress(b"\0\0\x08"),
            "cut": content[:-20],
            "flipped": content[:60] + bytes(40) + content[100:],
            "bomb": gzip.compress(bytes(1 << 27), 1),
        }[damage]
    )
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz (cannot be read|is not an idx file)"):
        FashionMNIST(path=str(tmp_path / "data")).build()


def test_stl10_learns_from_labelled_and_unlabelled_images(tmp_path):
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    made = {name: RANDOM.integers(0, 256, (count, 3, 96, 96), np.uint8) for name, count in STL_COUNTS.items()}
    for name, values in made.items():
        values.transpose(0, 1, 3, 2).tofile(folder / f"{name}_X.bin")
    np.array([10, 1, 2], np.uint8).tofile(folder / "train_y.bin")
    np.array([5, 6], np.uint8).tofile(folder / "test_y.bin")
    (folder / "class_names.txt").write_text("\n".join("abcdefghij") + "\n")
    split = STL10(path=str(tmp_path)).build()
    assert split.train.labels.tolist() == [9, 0, 1, -1, -1, -1, -1]
    assert split.test.labels.tolist() == [4, 5]
    whole = torch.from_numpy(np.concatenate([made["train"], made["unlabeled"]]))
    ids = torch.tensor([6, 0, 3, 2, 3])
    assert torch.equal(split.train.read(ids), whole[ids])
    assert split.train.names[3] == "unlabeled/00000"
    assert isinstance(split.train, Images)
    part = select(split.train, torch.tensor([5, 1, 3]))
    assert torch.equal(part.read(torch.tensor([2, 0, 1])), whole[[3, 5, 1]])
    assert (list(part.names), part.labels.tolist()) == (
        ["unlabeled/00002", "train/00001", "unlabeled/00000"],
        [-1, 0, -1],
    )
    assert part.fingerprint != split.train.fingerprint
    (folder / "train_y.bin").write_bytes(b"\1")
    with pytest.raises(ValueError, match=r"train_y\.bin holds 1 labels for 3 images"):
        STL10(path=str(tmp_path)).build()


STL_COUNTS = {"train": 3, "unlabeled": 4, "test": 2}


def test_equal_data_has_equal_fingerprints_and_other_data_another(tmp_path):
    fashion_files(tmp_path / "a", compress=False)
    fashion_files(tmp_path / "b", compress=False)
    marks = [FashionMNIST(path=str(tmp_path / name)).build().train.fingerprint for name in ("a", "a", "b")]
    assert marks[0] == marks[1] != marks[2]


def test_the_union_is_chosen_by_name():
    data = TypeAdapter(Data)
    assert isinstance(data.validate_python({"name": "sample"}), Sample)
    assert isinstance(data.validate_python({"name": "folder", "path": "x"}), Folder)
    with pytest.raises(ValueError, match="Input tag"):
        data.validate_python({"name": "mnist"})
