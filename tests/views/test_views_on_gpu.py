"""Views on a pretend GPU: those of the CPU, without a wait of the host, by few launches."""

from typing import Any

import pytest
import torch

from manyviews.data.images import Pictures
from manyviews.features.backbone import open_model
from manyviews.train.finetune.settings import GentleViews
from manyviews.train.finetune.task import model_input
from manyviews.views import StandardView, Views, ViewsSettings
from pretend_cuda import PretendTensor, pretend_cuda

GPU = torch.device("cuda", 0)
FULL: dict[str, Any] = {
    "rotation": 10, "translation": 0.1, "shear": 5, "blur": 0.5, "solarize": 0.2, "erase": 0.3, "gamma": 0.5,
    "vertical_flip": 0.2, "erase_fill": 0.3,
}  # fmt: skip


def both(views: Views, channels: int, size: int, most_launches: int) -> None:
    draw = torch.Generator().manual_seed(1)
    images, ids = torch.randint(0, 256, (6, channels, size, size), dtype=torch.uint8, generator=draw), torch.arange(6)
    (expected,) = views(images, ids, 3)
    with pretend_cuda() as log:
        views, images, ids = views.to(GPU), images.to(GPU), ids.to(GPU)
        # The basis of the chroma is copied once.
        views(images, ids, 0)
        log.clear()
        (made,) = views(images, ids, 3)
        assert log.waits.total() == 0, log
        assert log.launches.total() <= most_launches, log
    assert isinstance(made, PretendTensor)
    torch.testing.assert_close(made.numbers, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "channels", "view", "settings", "most_launches"),
    [(96, 3, None, {}, 170), (28, 1, None, {}, 120), (32, 3, None, {}, 150), (224, 3, 96, {}, 180),
     (224, 3, 96, FULL, 280), (32, 3, None, FULL, 270)],
)  # fmt: skip
def test_no_view_makes_the_host_wait(
    size: int, channels: int, view: int | None, settings: dict[str, Any], most_launches: int
) -> None:
    made = ViewsSettings(size=view, **settings).build(size=size, channels=channels, seed=5)
    both(made, channels, size, most_launches)


def test_the_view_for_fine_tuning_and_its_scale_make_the_host_wait_once_for_all_steps() -> None:
    both(GentleViews().build(size=96, channels=3, seed=5), 3, 96, 130)
    opened = open_model("resnet18", pretrained=False)
    views = torch.randn(2, 3, 8, 8)
    expected = model_input(opened, views)
    with pretend_cuda() as log:
        given = views.to(GPU)
        model_input(opened, given)
        log.clear()
        made = model_input(opened, given)
        assert log.waits.total() == 0, log
    assert torch.equal(made.numbers, expected)


def test_the_view_for_evaluation_makes_the_host_wait_once_for_all_batches() -> None:
    images = torch.randint(0, 256, (4, 3, 40, 40), dtype=torch.uint8)
    scale: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    view, aspects = StandardView(32, 3, **scale, crop_pct=0.9), torch.tensor([0.5, 1, 1.5, 3])
    expected = view(Pictures((images,), aspects))
    with pretend_cuda() as log:
        given = Pictures((images,), aspects).to(torch.device(GPU))
        view(given)
        log.clear()
        made = view(given)
        assert log.waits.total() == 0, log
    assert torch.equal(made.numbers, expected)
