"""One encoder for views of several sizes."""

import json
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from manyviews.config import load
from manyviews.encoder.encoder import Encoder, EncoderSettings, PredictorSettings, ProjectorSettings
from manyviews.encoder.timm_format import export
from manyviews.objectives.cost import Sizes
from manyviews.recipe import Recipe
from manyviews.views import StandardView

VIT = "test_vit"


def build(name: str, *, size: int, local_size: int | None, channels: int = 3, **options: object) -> Encoder:
    torch.manual_seed(0)
    settings = EncoderSettings(name=name, projector=ProjectorSettings(hidden=16, dim=8), **options)
    return settings.build(channels=channels, size=size, local_size=local_size)


@pytest.mark.parametrize(
    "name", [VIT, "light_resnet", "resnet18_small", "test_convnext", "swin_tiny_patch4_window7_224"]
)
def test_views_of_each_size_have_the_embeddings_that_they_have_alone(name: str) -> None:
    encoder = build(name, size=64, local_size=32, predictor=PredictorSettings(layers=2)).eval()
    whole, local = torch.randn(2, 3, 3, 64, 64), torch.randn(4, 3, 3, 32, 32)
    together = encoder(whole, local)
    assert together.embeddings.shape == together.projections.shape == (6, 3, 8)
    for part, views in ((slice(0, 2), whole), (slice(2, 6), local)):
        alone = encoder(views)
        torch.testing.assert_close(together.embeddings[part], alone.embeddings, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.projections[part], alone.projections, rtol=1e-4, atol=1e-5)


def test_the_projector_normalises_views_of_all_sizes_together_and_the_backbone_each_size_apart() -> None:
    encoder = build("light_resnet", size=32, local_size=16)
    seen: dict[str, list[int]] = {}
    for name, module in encoder.named_modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.register_forward_pre_hook(
                lambda module, inputs, name=name: seen.setdefault(name, []).append(len(inputs[0]))
            )
    encoder(torch.randn(2, 3, 3, 32, 32), torch.randn(4, 3, 3, 16, 16))
    assert seen.pop("projector.1") == [18]
    assert all(sizes == [6, 12] for sizes in seen.values())


def test_a_vision_transformer_learns_its_positions_from_views_of_both_sizes_and_is_exported_as_without_them(
    tmp_path: Path,
) -> None:
    encoder = build(VIT, size=64, local_size=32)
    assert encoder.state_dict().keys() == build(VIT, size=64, local_size=None).state_dict().keys()
    positions = encoder.backbone.get_parameter("pos_embed")
    (gradient,) = torch.autograd.grad(encoder(torch.randn(1, 2, 3, 32, 32)).embeddings.square().sum(), positions)
    assert bool((gradient.abs().sum(2) > 0).all())
    export(encoder.backbone, tmp_path / "backbone", StandardView(64, 3, 0.5, 0.25).pretrained_cfg)
    assert "dynamic_img_size" not in json.loads((tmp_path / "backbone" / "config.json").read_text())["model_args"]
    images, loaded = torch.randn(2, 3, 64, 64), timm.create_model(f"local-dir:{tmp_path}/backbone", pretrained=True)
    torch.testing.assert_close(loaded.eval()(images), encoder.backbone.eval()(images))


def test_a_backbone_from_a_folder_takes_several_sizes_too(tmp_path: Path) -> None:
    first = build(VIT, size=64, local_size=None)
    export(first.backbone, tmp_path / "backbone", StandardView(64, 3, 0.5, 0.25).pretrained_cfg)
    encoder = build(f"local-dir:{tmp_path}/backbone", size=64, local_size=32, pretrained=True).eval()
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(encoder.backbone(images), first.backbone.eval()(images))
    assert encoder(images[None], images[None, ..., :32, :32]).embeddings.shape == (2, 2, 8)


@pytest.mark.parametrize(
    ("name", "size", "local_size", "said"),
    [
        ("mixer_s32_224", 64, 32, r"cannot take 32 x 32 pixels .*set views\.local_size to what it takes, or"),
        (VIT, 64, 24, r"cannot take 24 x 24 pixels .*set views\.local_size to what it takes, or"),
    ],
)
def test_a_backbone_that_takes_one_size_only_is_refused_before_the_first_step(
    name: str, size: int, local_size: int, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        build(name, size=size, local_size=local_size)


def test_features_of_another_width_at_the_local_size_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Flat(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1)

    monkeypatch.setattr("manyviews.encoder.encoder.create_backbone", lambda *names, **options: Flat())
    with pytest.raises(ValueError, match=r"returns 192 features of 8 pixels and 48 of 4 .*set views\.local=0"):
        build("flat", size=8, local_size=4)


def test_objectives_of_pairs_refuse_local_views_and_name_what_takes_them() -> None:
    with pytest.raises(ValueError, match=r"views\.local=6, but objective=n_pair compares pairs.*objective=in_batch"):
        load(Recipe, None, ["objective=n_pair", "views.local=6"])
    with pytest.raises(ValueError, match=r"views\.num_views=3, but objective=queue contrasts 2 views"):
        load(Recipe, None, ["objective=queue", "views.num_views=3", "views.local=6"])


def test_the_line_of_negatives_counts_the_keys_and_the_products_of_all_views() -> None:
    recipe = load(Recipe, None, ["objective=in_batch", "views.local=6"])
    assert (recipe.keys, load(Recipe, None, ["objective=in_batch"]).keys) == (2, None)
    with_local, without = (
        recipe.objective.cost(Sizes(1000, views, 64, 8, 1, keys)) for views, keys in ((8, 2), (2, None))
    )
    assert str(with_local) == str(without) == "126 per anchor"
    assert with_local.products == 8 * without.products
