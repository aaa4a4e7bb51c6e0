"""Backbones from timm, by name or from a folder in timm's format, and what is checked before one is built."""

import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import timm
import torch
from jaxtyping import Float
from torch import Tensor, nn

import manyviews.encoder.small_models  # noqa: F401  (for its registrations with timm)
from manyviews.encoder.timm_format import (
    HUB,
    LOCAL,
    WEIGHTS,
    TimmFolder,
    from_hub,
    hub_folder,
    other_weights,
    read_folder,
)
from manyviews.system.arrays import read_tensors
from manyviews.system.files import shown
from manyviews.system.names import did_you_mean

ADAPTED = 1 << 26
"""Weights by which a model may be larger than those that it is given: of other channels, or of larger images."""


def create_backbone(
    name: str,
    *,
    channels: int,
    size: int,
    pretrained: bool = False,
    drop_path: float = 0.0,
    key: str = "pretrained",
) -> nn.Module:
    """A timm model without classifier, for square images of this size and number of channels.

    Of a folder, and of a model on the hub, config.json is believed as `timm_folder` tells, and weights come from
    model.safetensors alone. Without `pretrained` no network is used; `key` is what asks for it, for messages.

    Raises:
        ValueError: timm does not know the name, or the model has no such option, or its weights cannot be had.
    """
    if name.startswith(HUB):
        if not pretrained:
            raise ValueError(f"{shown(name)} is looked up on a network, which takes pretrained=true")
        name = f"{LOCAL}{hub_folder(name)}"
    options: dict[str, Any] = {"pretrained": pretrained, "in_chans": channels, "num_classes": 0, "img_size": size}
    options |= {"drop_path_rate": drop_path} if drop_path else {}
    local = name.startswith(LOCAL)
    folder = read_folder(Path(name.removeprefix(LOCAL)).expanduser()) if local else None
    model = name if folder is None else folder.architecture
    if not timm.is_model(model.split(".")[0]):
        raise ValueError(f"timm has no model {shown(repr(model))}{did_you_mean(model, timm.list_models(), 3)}")
    published = timm.get_pretrained_cfg(name) if folder is None else None
    description = published if folder is None else folder.described
    if description is None or not description.fixed_input_size:
        del options["img_size"]
    try:
        if folder is not None:
            return _of_folder(folder, name, options, key)
        if pretrained and not (published is not None and published.has_weights):
            raise ValueError(f"there are no published weights of {shown(name)}; {key}=false begins with random ones")
        if not pretrained:
            return timm.create_model(name, **options)
        with from_hub(f"the weights of {name}", f"; {key}=false begins with random weights"):
            return timm.create_model(name, **options)
    except TypeError as problem:
        raise ValueError(f"{shown(name)} does not take {', '.join(options)}: {problem}") from problem


def _of_folder(found: TimmFolder, name: str, options: dict[str, Any], key: str) -> nn.Module:
    file, pretrained = found.folder / WEIGHTS, options["pretrained"]
    options |= found.options(pretrained=pretrained)
    if pretrained:
        if not file.is_file():
            raise ValueError(
                f"{shown(found.folder)} holds no {WEIGHTS}, in which alone weights are read; {key}=false begins "
                f"with random ones of {shown(found.architecture)}"
            )
        # Looked at before timm does: a damaged file is then told in words.
        read_tensors(file)
    if file.is_file():
        bare = {**options, "pretrained": False}
        check_count(shown(name), file.stat().st_size, lambda: timm.create_model(found.architecture, **bare))
    try:
        return timm.create_model(found.architecture, **options)
    except TypeError:
        raise
    except Exception as problem:
        said = (
            f"{shown(found.folder)} does not make {shown(found.architecture)} ({type(problem).__name__}: "
            f"{shown(problem)}); its {WEIGHTS} and config.json must be of one model"
        )
        plain = {**options, "pretrained": False, "num_classes": found.described.num_classes}
        with suppress(Exception):  # the model itself cannot be made as the folder describes it
            model = timm.create_model(found.architecture, **plain).state_dict()
            said = other_weights(found.folder, found.architecture, model, read_tensors(file)) or said
        raise ValueError(said) from problem


def weight_count(build: Callable[[], nn.Module]) -> int | None:
    """How many weights a module has, which is built without memory; None where that cannot be."""
    try:
        # The meta device knows shapes alone.
        with torch.device("meta"), torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"):
            return sum(parameter.numel() for parameter in build().parameters())
    except Exception:
        # What is wrong with it is said where it is built in earnest.
        return None


def check_count(name: str, held: int, build: Callable[[], nn.Module]) -> None:
    """Refuses a model of more weights than the bytes that hold them, before it is built: its description is not theirs.

    Args:
        name: of the model.
        held: bytes; a weight has one at least.
        build: makes the model.

    Raises:
        ValueError: with both.
    """
    count = weight_count(build) or 0
    # Channels and size may be others here than those of the weights.
    if count > held + ADAPTED:
        raise ValueError(
            f"{name} describes a model of {count:,} weights, and those beside it have {held:,} bytes: they are not of "
            "each other"
        )


def summary(backbone: nn.Module, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch _"]:
    """What the projector reads: the backbone's features, or what the backbone has for the purpose."""
    read: Tensor = getattr(backbone, "forward_summary", backbone)(images)
    return read


@torch.no_grad()
def widths(backbone: nn.Module, *, channels: int, size: int) -> tuple[int, int]:
    """Widths of the backbone's features and of what the projector reads, by a look: `num_features` is not always true.

    Raises:
        ValueError: The backbone cannot take such images.
    """
    training, images = backbone.training, torch.zeros(1, channels, size, size)
    # Not inference mode: a tensor that the model caches on its first pass could never carry a gradient.
    backbone.eval()
    try:
        found = [backbone(images), summary(backbone, images)]
    except (RuntimeError, AssertionError, ValueError) as problem:
        raise ValueError(
            f"{type(backbone).__name__} cannot take {size} x {size} pixels of {channels} channels: {problem}; "
            "set views.size to what it takes, or choose another encoder.name"
        ) from problem
    finally:
        backbone.train(training)
    for features in found:
        if features.ndim != 2:
            raise ValueError(
                f"{type(backbone).__name__} returns {list(features.shape)}, not one vector per image; "
                "choose another encoder.name"
            )
    return found[0].shape[1], found[1].shape[1]
