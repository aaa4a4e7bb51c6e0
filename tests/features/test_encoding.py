from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from manyviews.features.encoding import extract, raw_pixels
from manyviews.system.distributed import all_gather_object, any_over_ranks
from manyviews.views import StandardView
from processes import start


class Grid:
    """Thirteen small images."""

    names = tuple(f"image {number}" for number in range(13))
    labels = torch.arange(13) % 3
    classes = ("a", "b", "c")
    channels, size, aspects, fingerprint = 1, 8, None, "0" * 64

    def __len__(self) -> int:
        return 13

    def read(self, ids: Tensor) -> Tensor:
        images = torch.arange(13 * 64, dtype=torch.int64).mul(37).remainder(251).to(torch.uint8)
        return images.view(13, 1, 8, 8)[ids]


VIEW = StandardView(8, 1, mean=(0.0,), std=(1.0,))


def prepare(images: Tensor) -> Tensor:
    return images.float() / 255


def backbone() -> nn.Module:
    torch.manual_seed(0)
    convolution = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))
    return nn.Sequential(convolution, nn.AdaptiveAvgPool2d(2), nn.Flatten())


def test_features_are_those_of_one_pass_in_evaluation_mode_for_any_batch_size():
    module = backbone()
    whole = module.eval()(prepare(Grid().read(torch.arange(13))))
    for batch_size, workers in ((1, 0), (5, 2), (13, 1), (100, 3)):
        features = extract(module, Grid(), view=VIEW, batch_size=batch_size, workers=workers)
        assert features.dtype == torch.float32
        torch.testing.assert_close(features, whole.detach(), atol=1e-6, rtol=1e-6)


def test_chosen_ids_come_in_the_order_they_were_named():
    module, ids = backbone(), torch.tensor([7, 0, 12, 3])
    every = extract(module, Grid(), view=VIEW)
    torch.testing.assert_close(extract(module, Grid(), view=VIEW, ids=ids, batch_size=3), every[ids])


def test_training_is_not_touched():
    module = backbone().train()
    module[0][1].eval()  # frozen on purpose
    modes = [child.training for child in module.modules()]
    state = {name: value.clone() for name, value in module.state_dict().items()}
    generators = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    first = extract(module, Grid(), view=VIEW, batch_size=4)
    assert [child.training for child in module.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert torch.equal(generators[0], torch.random.get_rng_state())
    assert (generators[1] == np.random.get_state()[1]).all()
    assert torch.equal(first, extract(module, Grid(), view=VIEW, batch_size=4))


def test_modes_return_even_when_the_backbone_fails():
    module = nn.Sequential(nn.Dropout(), nn.Linear(3, 3)).train()
    with pytest.raises(RuntimeError):
        extract(module, Grid(), view=VIEW)
    assert all(child.training for child in module.modules())


def test_half_precision_stays_inside():
    features = extract(backbone(), Grid(), view=VIEW, precision="bf16")
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, extract(backbone(), Grid(), view=VIEW), atol=2e-2, rtol=2e-2)


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="pool its output"):
        extract(nn.Identity(), Grid(), view=VIEW)
    with pytest.raises(ValueError, match="features of 13 of 13 images are not finite"):
        extract(nn.Flatten(), Grid(), view=replace(VIEW, mean=(float("nan"),)))
    with pytest.raises(ValueError, match="ids has duplicates"):
        extract(backbone(), Grid(), view=VIEW, ids=torch.tensor([1, 1]))
    with pytest.raises(ValueError, match="no image"):
        extract(backbone(), Grid(), view=VIEW, ids=torch.tensor([], dtype=torch.int64))


def _share(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    every = extract(backbone(), Grid(), view=VIEW, batch_size=3)
    few = extract(backbone(), Grid(), view=VIEW, ids=torch.tensor([9, 2]), batch_size=3)
    torch.save((every, few), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_thirteen_images_on_two_processes_equal_one(tmp_path: Path):
    start(_share, (2, str(tmp_path)), count=2)
    alone = extract(backbone(), Grid(), view=VIEW, batch_size=3)
    for rank in range(2):
        every, few = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert every.shape == alone.shape
        torch.testing.assert_close(every, alone, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(few, alone[[9, 2]], atol=1e-6, rtol=1e-6)


class OnOne(torch.nn.Module):
    """A backbone that fails on one process, at its second batch."""

    calls = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if torch.distributed.get_rank() == 1 and self.calls == 2:
            raise torch.OutOfMemoryError("no room")
        return images.flatten(1)


def _fails_on_one(rank: int, world: int, folder: str) -> None:
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    asked = []

    def stopped() -> bool:
        asked.append(0)
        return any_over_ranks(False)

    with pytest.raises(RuntimeError, match="no room"):
        extract(OnOne(), Grid(), view=VIEW, batch_size=2, stopped=stopped)
    assert len(asked) == 4
    # The processes are still of one mind.
    assert all_gather_object(rank) == [0, 1]
    torch.distributed.destroy_process_group()


def test_what_fails_on_one_process_is_raised_on_all_and_none_waits(tmp_path: Path):
    start(_fails_on_one, (2, str(tmp_path)), count=2)


def test_raw_pixels_are_the_pixels():
    pixels = raw_pixels(Grid(), VIEW, batch_size=5)
    assert torch.equal(pixels, prepare(Grid().read(torch.arange(13))).flatten(1))
    smaller = raw_pixels(Grid(), replace(VIEW, size=4))
    assert smaller.shape == (13, 16)
    assert smaller.min() >= 0
    assert smaller.max() <= 1
