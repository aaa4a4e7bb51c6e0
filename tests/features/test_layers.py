import pytest
import timm
import torch
from torch import nn

from manyviews.encoder.encoder import EncoderSettings
from manyviews.features.layers import Layers, OneLayer, widths_of

IMAGES = torch.randn(3, 3, 32, 32)


def by_hand(model: nn.Module) -> dict[str, torch.Tensor]:
    """A ResNet's stages, run one after the other."""
    maps = model.act1(model.bn1(model.conv1(IMAGES)))
    found = {"bn1": model.bn1(model.conv1(IMAGES)).mean((2, 3))}
    maps = model.maxpool(maps)
    for name in ("layer1", "layer2", "layer3", "layer4"):
        maps = getattr(model, name)(maps)
        found[name] = maps.mean((2, 3))
    return found | {"backbone": maps.mean((2, 3))}


@torch.no_grad()
def test_maps_of_a_resnet_are_averaged_over_their_places() -> None:
    model = timm.create_model("resnet18_small", num_classes=0).eval()
    expected = by_hand(model)
    found = Layers(model, ("layer2", "backbone", "bn1"))(IMAGES)
    # In the order of the names; and bn1's output as it was, though the next module works in place.
    assert list(found) == ["layer2", "backbone", "bn1"]
    for name, rows in found.items():
        torch.testing.assert_close(rows, expected[name])
    assert widths_of(Layers(model, ("layer2", "bn1")), IMAGES[:1]) == {"layer2": 128, "bn1": 64}
    assert not model.layer2._forward_hooks


@torch.no_grad()
def test_vectors_are_kept_as_they_were_though_the_next_module_works_in_place() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.ReLU(inplace=True))
    images = torch.randn(5, 1, 2, 2)
    assert torch.equal(Layers(model, ("1",))(images)["1"], model[1](images.flatten(1)))


@torch.no_grad()
def test_tokens_are_averaged_over_the_patches() -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, depth=2).eval()
    tokens = model.forward_features(IMAGES)
    found = Layers(model, ("norm", "backbone"))(IMAGES)
    torch.testing.assert_close(found["norm"], tokens[:, 1:].mean(1))
    torch.testing.assert_close(found["backbone"], tokens[:, 0])


@torch.no_grad()
def test_a_transformer_whose_maps_have_channels_last_is_averaged_over_places_too() -> None:
    options = {"img_size": 32, "window_size": 2, "depths": (1, 1), "embed_dim": 24, "num_heads": (2, 2)}
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, **options).eval()
    maps = model.layers(model.patch_embed(IMAGES))
    torch.testing.assert_close(Layers(model, ("layers",))(IMAGES)["layers"], maps.mean((1, 2)))


@pytest.mark.parametrize("name", ["light_resnet", "resnet18_small"])
@torch.no_grad()
def test_the_projector_reads_what_it_was_trained_on(name: str) -> None:
    encoder = EncoderSettings(name=name).build(channels=3, size=32).eval()
    found = Layers(encoder.backbone, ("projector", "backbone"), {"projector": encoder.projector})(IMAGES)
    torch.testing.assert_close(found["projector"], encoder(IMAGES.unsqueeze(0)).projections[0])
    torch.testing.assert_close(found["backbone"], encoder.backbone(IMAGES))
    torch.testing.assert_close(OneLayer(Layers(encoder.backbone, ("backbone",)))(IMAGES), encoder.backbone(IMAGES))


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.twice, self.never, self.pair = nn.Linear(4, 4), nn.Linear(4, 4), nn.LSTM(4, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        vectors = images.flatten(1)
        return self.pair(self.twice(self.twice(vectors)))[0]


def test_layers_that_cannot_be_kept_are_refused() -> None:
    for names, words in {
        ("twcie",): "the backbone has no 'twcie'; did you mean twice",
        ("zzz",): "the backbone has no 'zzz'; it has twice, never, pair",
        ("twice", "twice"): "there are duplicates",
        ("projector",): "there is no projector",
    }.items():
        with pytest.raises(ValueError, match=words):
            Layers(Odd(), names)
    for name, words in {
        "twice": "twice runs several times",
        "never": "never does not run",
        "pair": "pair returns tuple",
    }.items():
        with pytest.raises(ValueError, match=words):
            Layers(Odd(), (name,))(torch.randn(2, 1, 2, 2))
