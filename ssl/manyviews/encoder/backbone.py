"""Creates timm backbones by name or from a folder in timm's format."""

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
    LOCAL,
    WEIGHTS,
    Described,
    TimmFolder,
    from_hub,
    local_name,
    other_weights,
    read_folder,
)
from manyviews.system.arrays import read_tensors
from manyviews.system.files import shown
from manyviews.system.names import did_you_mean

ADAPTED = 1 << 26
"""Weights that a model may have beyond those in its file: for more channels or larger images."""


def create_backbone(
    name: str,
    *,
    channels: int,
    size: int,
    pretrained: bool = False,
    drop_path: float = 0.0,
    several_sizes: bool = False,
    key: str = "pretrained",
) -> nn.Module:
    """Creates a timm model without classifier, for square images.

    Of a folder or a model on the hub only what `read_folder` accepts of config.json is used, and model.safetensors.
    Without `pretrained` no network is used; `key` is the setting that asks for it, for messages. For images of
    `several_sizes` beside `size` it gets timm's dynamic_img_size, if it has that.

    Examples:
        >>> create_backbone("light_resnet", channels=1, size=28).num_features
        1152

    Raises:
        ValueError: unknown name, an option that the model does not take, or weights that cannot be loaded.
    """
    name = local_name(name, pretrained=pretrained)
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
    elif several_sizes:
        options["dynamic_img_size"] = True
    try:
        if folder is not None:
            return _create_from_folder(folder, name, options, key)
        if pretrained and not (published is not None and published.has_weights):
            raise ValueError(f"there are no published weights of {shown(name)}; {key}=false starts from random ones")
        if not pretrained:
            return timm.create_model(name, **options)
        with from_hub(f"the weights of {name}", f"; {key}=false starts from random weights"):
            return timm.create_model(name, **options)
    except TypeError as problem:
        if "dynamic_img_size" in options:
            return create_backbone(
                name, channels=channels, size=size, pretrained=pretrained, drop_path=drop_path, key=key
            )
        raise ValueError(f"{shown(name)} does not take {', '.join(options)}: {problem}") from problem


def _create_from_folder(folder: TimmFolder, name: str, options: dict[str, Any], key: str) -> nn.Module:
    file, architecture, dynamic = folder.folder / WEIGHTS, folder.architecture, "dynamic_img_size" in options
    options |= folder.options(pretrained=options["pretrained"]) | ({"dynamic_img_size": True} if dynamic else {})
    bare = {**options, "pretrained": False}
    if options["pretrained"]:
        if not file.is_file():
            raise ValueError(
                f"{shown(folder.folder)} has no {WEIGHTS}, the only file that weights are read from; {key}=false "
                f"starts from random ones of {shown(architecture)}"
            )
        # Before timm: its message on a damaged file does not name the file.
        read_tensors(file)
    if file.is_file():
        check_count(shown(name), file.stat().st_size, lambda: timm.create_model(architecture, **bare))
    try:
        return timm.create_model(architecture, **options)
    except TypeError:
        raise
    except Exception as problem:
        message = (
            f"{shown(folder.folder)} does not make {shown(architecture)} ({type(problem).__name__}: "
            f"{shown(problem)}); its {WEIGHTS} and config.json must be of one model"
        )
        with suppress(Exception):  # timm cannot build the model that the folder describes
            bare["num_classes"] = folder.described.num_classes
            model = timm.create_model(architecture, **bare).state_dict()
            message = other_weights(folder.folder, architecture, model, read_tensors(file)) or message
        raise ValueError(message) from problem


def description_of(name: str) -> Described:
    """Reads the input that the published weights of a model were trained with; `name` is as of `local_name`.

    Raises:
        ValueError: it has no description.
    """
    if name.startswith(LOCAL):
        return read_folder(Path(name.removeprefix(LOCAL)).expanduser()).described
    try:
        description = timm.get_pretrained_cfg(name)
    except Exception as problem:
        known = timm.list_pretrained(f"{name.partition('.')[0]}.*")
        hint = f"; it has {', '.join(known)}" if known else ""
        raise ValueError(f"{shown(name)} cannot be had ({type(problem).__name__}: {shown(problem)}){hint}") from problem
    if description is None:
        raise ValueError(f"timm does not describe the input of {shown(name)}; choose another model")
    return Described.model_validate(description, from_attributes=True)


def weight_count(build: Callable[[], nn.Module]) -> int | None:
    """Number of weights of a module, built on the meta device; None if it cannot be built."""
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"):
            return sum(parameter.numel() for parameter in build().parameters())
    except Exception:  # raised again, with a message, where the module is really built
        return None


def check_count(name: str, held: int, build: Callable[[], nn.Module]) -> None:
    """Raises ValueError, before it is built, if a model has more weights than `held` bytes."""
    count = weight_count(build) or 0
    # The file may be of fewer channels or smaller images.
    if count > held + ADAPTED:
        raise ValueError(
            f"{name} describes a model of {count:,} weights, and those beside it have {held:,} bytes: they are not of "
            "one model"
        )


def summary(backbone: nn.Module, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch _"]:
    """The projector's input: the backbone's `forward_summary` if it has one, else its features."""
    features: Tensor = getattr(backbone, "forward_summary", backbone)(images)
    return features


@torch.no_grad()
def widths(backbone: nn.Module, *, channels: int, size: int, key: str = "views.size") -> tuple[int, int]:
    """Measures the widths of the features and of `summary`; `num_features` may be wrong.

    `key` is the setting of the size, for messages.

    Raises:
        ValueError: the backbone cannot take such images, or does not return one vector per image.
    """
    training, images = backbone.training, torch.zeros(1, channels, size, size)
    # Not inference mode: a tensor that the model caches on its first pass could never carry a gradient.
    backbone.eval()
    try:
        outputs = [backbone(images), summary(backbone, images)]
    except (RuntimeError, AssertionError, ValueError) as problem:
        raise ValueError(
            f"{type(backbone).__name__} cannot take {size} x {size} pixels of {channels} channels: {problem}; "
            f"set {key} to what it takes, or choose another encoder.name"
        ) from problem
    finally:
        backbone.train(training)
    for features in outputs:
        if features.ndim != 2:
            raise ValueError(
                f"{type(backbone).__name__} returns {list(features.shape)}, not one vector per image; "
                "choose another encoder.name"
            )
    return outputs[0].shape[1], outputs[1].shape[1]
