"""Backbones for small images; importing this module registers them with `timm.create_model`."""

import itertools
from typing import Any

import torch
from jaxtyping import Float
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["LightResNet", "SmallResNet"]


class SmallResNet(ResNet):
    """timm's ResNet with a 3 x 3 stem of stride 1 and no max-pooling, for 32 pixels.

    Chen et al. 2020, appendix B.9. The first stage sees the image at full size, the last one at an eighth.
    """

    def __init__(self, *, in_chans: int = 3, **options: Any) -> None:
        super().__init__(in_chans=in_chans, **options)
        stem = nn.Conv2d(in_chans, 64, 3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
        self.add_module("conv1", stem)
        self.add_module("maxpool", nn.Identity())
        reductions = (1, 1, 2, 4, 8)
        self.feature_info = [
            info | {"reduction": reduction} for info, reduction in zip(self.feature_info, reductions, strict=True)
        ]


class LightResNet(nn.Module):
    """A ResNet for 28 to 32 pixels on a CPU, with one convolution and residual per stage.

    Its features are the last stage but one, pooled to 4 x 4 positions, and the mean of the last stage. The square root
    is taken of each part (as Perronnin et al. 2010, section 3.2, do with Fisher vectors: a few strong activations then
    do not dominate a cosine), and each has unit length. A projector reads `forward_summary`, the last stage's mean
    alone: trained on both parts, the embeddings and the features were worse.
    """

    def __init__(
        self, *, in_chans: int = 3, num_classes: int = 1000, widths: tuple[int, ...] = (32, 64, 128), grid: int = 4
    ) -> None:
        super().__init__()
        self.in_chans, self.widths, self.grid = in_chans, tuple(widths), grid
        self.stem = _convolution(in_chans, widths[0], kernel=4, stride=2)
        stages = [
            nn.Sequential(_convolution(before, width, kernel=3, stride=2), _Residual(width))
            for before, width in itertools.pairwise(widths)
        ]
        self.stages = nn.ModuleList(stages)
        self.num_features = self.head_hidden_size = widths[-2] * grid**2 + widths[-1]
        self.feature_info = [
            {"num_chs": width, "reduction": 2 ** (index + 1), "module": f"stages.{index - 1}" if index else "stem"}
            for index, width in enumerate(widths)
        ]
        self.reset_classifier(num_classes)

    def forward_features(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> tuple[Float[Tensor, "batch earlier rows columns"], Float[Tensor, "batch last _ _"]]:
        """The maps of the last two stages, for `forward_head`."""
        x = self.stem(x)
        for stage in self.stages[:-1]:
            x = stage(x)
        return x, self.stages[-1](x)

    def forward_summary(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch last"]:
        """The mean of the last stage."""
        return self.forward_features(x)[1].mean((2, 3))

    def forward_head(
        self,
        x: tuple[Float[Tensor, "batch earlier rows columns"], Float[Tensor, "batch last _ _"]],
        pre_logits: bool = False,
    ) -> Float[Tensor, "batch _"]:
        """Features of both stages or, unless `pre_logits`, the classifier's output on them."""
        earlier, last = (maps.float() for maps in x)
        parts = [F.adaptive_avg_pool2d(earlier, self.grid).flatten(1), last.mean((2, 3))]
        features = torch.cat([_rooted_unit(part) for part in parts], 1)
        return features if pre_logits else self.head(features)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch _"]:
        """Logits, or the features if there are no classes."""
        return self.forward_head(self.forward_features(x))

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Regular expressions of the layers, for timm's layer-wise learning rates."""
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"}

    def get_classifier(self) -> nn.Module:
        """The classification layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classification layer; `global_pool` is ignored."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)) + x, inplace=True)


def _convolution(before: int, width: int, *, kernel: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(before, width, kernel, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True))


def _rooted_unit(features: Tensor) -> Tensor:
    # Rectified maps are often 0, where a root has no derivative: shifted, it has one, and 0 still goes to 0.
    shift = 1e-5
    return F.normalize((features + shift).sqrt() - shift**0.5, dim=1, eps=1e-6)


def _description(**options: Any) -> dict[str, Any]:
    return {"url": "", "num_classes": 1000, "input_size": (3, 32, 32), "pool_size": (4, 4), "crop_pct": 1.0,
            "interpolation": "bilinear", "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), **options}  # fmt: skip


default_cfgs = generate_default_cfgs(
    {
        "resnet18_small.untrained": _description(first_conv="conv1", classifier="fc"),
        "resnet50_small.untrained": _description(first_conv="conv1", classifier="fc"),
        "light_resnet.untrained": _description(first_conv="stem.0", classifier="head"),
    }
)


@register_model
def resnet18_small(pretrained: bool = False, **options: Any) -> nn.Module:
    """ResNet-18 with a 3 x 3 stem of stride 1 and no max-pooling."""
    options |= {"block": BasicBlock, "layers": (2, 2, 2, 2)}
    return build_model_with_cfg(SmallResNet, "resnet18_small", pretrained, **options)


@register_model
def resnet50_small(pretrained: bool = False, **options: Any) -> nn.Module:
    """ResNet-50 with a 3 x 3 stem of stride 1 and no max-pooling."""
    options |= {"block": Bottleneck, "layers": (3, 4, 6, 3)}
    return build_model_with_cfg(SmallResNet, "resnet50_small", pretrained, **options)


@register_model
def light_resnet(pretrained: bool = False, **options: Any) -> nn.Module:
    """The light ResNet for 28 to 32 pixels on a CPU; see `LightResNet`."""
    return build_model_with_cfg(LightResNet, "light_resnet", pretrained, **options)
