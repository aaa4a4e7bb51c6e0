import hashlib
import time
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from manyviews.data import FashionMNIST, Sample
from manyviews.data.sample.make import make

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
needs_source = pytest.mark.skipif(not DEBIAN.is_dir(), reason="compares with Debian's dataset-fashion-mnist")


@pytest.mark.parametrize(
    ("split", "per_class", "digest"),
    [
        ("train", 1000, "8ecf81334cd5b6b0cdacb954afcc61e4761fac0f7ec72fb3c4059ee634646737"),
        ("test", 200, "a6bbdf6560830b845b283e64a5716cf56a2b78805663b99b489fe4a330e532e3"),
    ],
)
def test_the_sample_is_balanced_and_lossless(split, per_class, digest):
    images = getattr(Sample().build(), split)
    assert images.labels.bincount().tolist() == [per_class] * 10
    assert len(images) == len(images.names) == 10 * per_class
    assert (images.channels, images.size) == (1, 28)
    names = "\n".join(images.names).encode()
    data = images.pixels.numpy().tobytes() + images.labels.numpy().astype("<i8").tobytes() + names
    assert hashlib.sha256(data).hexdigest() == digest


def test_the_sample_loads_at_once_and_weighs_about_five_megabytes():
    started = time.process_time()
    Sample().build()
    assert time.process_time() - started < 1.0
    folder = Path(str(files("manyviews.data.sample")))
    assert sum(path.stat().st_size for path in folder.iterdir() if path.suffix in {".png", ".csv"}) < 5.6e6
    assert "Copyright © 2017 Zalando SE" in (folder / "LICENSE").read_text(encoding="utf-8")


@needs_source
def test_the_sample_holds_the_images_that_its_names_say():
    sample, whole = Sample().build(), FashionMNIST(path=str(DEBIAN)).build()
    for part, full in [(sample.train, whole.train), (sample.test, whole.test)]:
        ids = torch.tensor([int(name.split("/")[1]) for name in part.names])
        assert torch.equal(ids, ids.unique())
        assert torch.equal(full.read(ids), part.pixels)
        assert torch.equal(full.labels[ids], part.labels)


@pytest.mark.slow
@needs_source
def test_the_script_makes_the_files_again(tmp_path, monkeypatch):
    make(DEBIAN, tmp_path)
    for name in ("train.csv", "test.csv"):
        assert (tmp_path / name).read_bytes() == files("manyviews.data.sample").joinpath(name).read_bytes()
    shipped = Sample().build()
    # Another zlib may compress otherwise, so what is read from the PNG is compared, not its bytes.
    monkeypatch.setattr("manyviews.data.sources.fashion_mnist.files", lambda package: tmp_path)
    again = Sample().build()
    assert again.train.fingerprint == shipped.train.fingerprint
    assert again.test.fingerprint == shipped.test.fingerprint
