"""Reads and writes backbones in timm's own format.

A config.json may name weights anywhere on the network, pickles among them, and any argument of any model. Only the
architecture and the input are read from it; weights come from model.safetensors in the same folder.
"""

import json
import logging
import socket
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, cast
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.utils.logging import get_verbosity, set_verbosity
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import save_file
from torch import nn

from manyviews.system.files import read_json, shown
from manyviews.system.names import some
from manyviews.system.writing import make_folder, remove, replacing

LOCAL, HUB = "local-dir:", ("hf-hub:", "hf_hub:")
SOURCES = (LOCAL, *HUB)
"""Prefixes of names that are not timm models."""
CONFIG, WEIGHTS = "config.json", "model.safetensors"
DESCRIPTION = ("architecture", "fixed_input_size", "first_conv", "classifier")
"""What an exported backbone keeps of timm's description."""
SECONDS = 5.0
"""Timeout of the connection to the hub; after it only the local cache is used."""
SET_HERE = {"in_chans", "num_classes", "img_size", "drop_rate", "drop_path_rate", "pretrained"}
"""Arguments that follow from the images and the recipe; those of the folder are ignored."""
ACCEPTED: dict[str, type] = {"global_pool": str, "class_token": bool, "dynamic_img_size": bool}
"""Accepted arguments and their types: they do not change the shapes of the weights."""

Channels = Annotated[int, Field(strict=True, ge=1, le=64)]
Side = Annotated[int, Field(strict=True, ge=1, le=4096)]
Number = Annotated[float, Field(gt=-1e4, lt=1e4)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.]{1,200}$")]


class Described(BaseModel):
    """The validated part of a model's `pretrained_cfg`."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    input_size: tuple[Channels, Side, Side]
    mean: tuple[Number, ...] = Field((0.485, 0.456, 0.406), min_length=1, max_length=64)
    std: tuple[Annotated[Number, Field(gt=0)], ...] = Field((0.229, 0.224, 0.225), min_length=1, max_length=64)
    interpolation: Annotated[str, Field(max_length=20)] = "bicubic"
    crop_pct: Annotated[float, Field(gt=0, le=10)] | None = None
    crop_mode: Annotated[str, Field(max_length=20)] | None = None
    num_classes: int = Field(1000, strict=True, ge=0, le=1_000_000)
    fixed_input_size: bool = False
    first_conv: Name | tuple[Name, ...] | None = None
    classifier: Name | tuple[Name, ...] | None = None


class TimmFolder(BaseModel):
    """A folder with a backbone in timm's format."""

    model_config = ConfigDict(frozen=True)

    folder: Path
    architecture: Name
    described: Described
    arguments: dict[str, Any]

    def options(self, *, pretrained: bool) -> dict[str, Any]:
        """Keyword arguments of `timm.create_model`."""
        source = {"file": str(self.folder / WEIGHTS)} if pretrained else {}
        return {"pretrained": pretrained, "pretrained_cfg": self.described.model_dump() | source, **self.arguments}


def read_folder(folder: Path) -> TimmFolder:
    """Reads the config.json of a folder in timm's format.

    Raises:
        ValueError: it is missing or damaged, or has model arguments that are not accepted.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise ValueError(f"{shown(folder)} is no folder in timm's format: it has no {CONFIG}")
    content = read_json(file)
    # Older folders have both in one.
    described, arguments = content.get("pretrained_cfg", content), content.get("model_args") or {}
    try:
        model = TimmFolder(
            folder=folder,
            architecture=content.get("architecture", ""),
            described=Described.model_validate(described),
            arguments=arguments,
        )
    except ValidationError as problem:
        first = problem.errors()[0]
        key = ".".join(map(str, first["loc"])) or "pretrained_cfg"
        raise ValueError(f"{shown(file)} is damaged: {shown(key)}: {first['msg']}") from None
    accepted = {name: value for name, value in arguments.items() if name not in SET_HERE and value is not None}
    for name, value in accepted.items():
        if type(value) is not ACCEPTED.get(name) or len(str(value)) > 20:
            raise ValueError(
                f"{shown(file)} asks for {shown(model.architecture)} with {shown(name)}={shown(value)}, which is not "
                f"read from a folder; only {', '.join(ACCEPTED)} are"
            )
    return model.model_copy(update={"arguments": accepted})


def local_name(name: str, *, pretrained: bool) -> str:
    """Replaces hf-hub:OWNER/NAME[@REVISION] by local-dir: and its downloaded copy.

    Raises:
        ValueError: without `pretrained`, or if the files are neither in the cache nor on the hub.
    """
    if not name.startswith(HUB):
        return name
    if not pretrained:
        raise ValueError(f"{shown(name)} is looked up on a network, which takes pretrained=true")
    owner, _, revision = name.partition(":")[2].partition("@")
    with from_hub(name):
        files = [Path(hf_hub_download(owner, file, revision=revision or None)) for file in (CONFIG, WEIGHTS)]
    return f"{LOCAL}{files[0].parent}"


@contextmanager
def from_hub(wanted: str, way_out: str = "") -> Iterator[None]:
    """Context with Hugging Face's hub, or only its local cache if it does not answer in seconds.

    The client alone would retry each file for most of a minute, with a log line each time. `wanted` and `way_out` are
    the beginning and the end of the message.

    Raises:
        ValueError: for every exception in the context but a TypeError.
    """
    unreachable, verbosity, offline = "", get_verbosity(), constants.HF_HUB_OFFLINE
    address = urlsplit(constants.ENDPOINT)
    # A proxy may reach the hub where this process cannot.
    if not offline and address.scheme not in getproxies() and "all" not in getproxies():
        try:
            port = address.port or (80 if address.scheme == "http" else 443)
            socket.create_connection((address.hostname or "", port), timeout=SECONDS).close()
        except OSError as refused:
            unreachable = f"{constants.ENDPOINT} cannot be reached: {refused.strerror or refused}"
    try:
        constants.HF_HUB_OFFLINE = offline or bool(unreachable)
        set_verbosity(logging.ERROR)
        yield
    except TypeError:
        raise
    except Exception as problem:  # of the network, of the hub, of the name
        reason = "HF_HUB_OFFLINE is set" if offline else unreachable
        why = (
            f"({reason}), and {constants.HF_HUB_CACHE} does not hold them; with {CONFIG} and {WEIGHTS} of the model "
            f"in a folder, use {LOCAL}FOLDER"
            if reason
            else f"({type(problem).__name__}: {shown(problem)}); check that the hub has a {WEIGHTS} of that name"
        )
        raise ValueError(f"{shown(wanted)} cannot be had {why}{way_out}") from problem
    finally:
        constants.HF_HUB_OFFLINE = offline
        set_verbosity(verbosity)


def other_weights(folder: Path, architecture: str, model: Mapping[str, Any], stored: Collection[str]) -> str:
    """Message on missing and unexpected keys of a folder's weights; empty if there are none."""
    missing, unexpected = [key for key in model if key not in stored], [key for key in stored if key not in model]
    if not missing and not unexpected:
        return ""
    parts = [f"it lacks {len(missing):,} ({some(missing)}) of {len(model):,} keys"] if missing else []
    parts += [f"it has {len(unexpected):,} ({some(unexpected)}) that the model does not"] if unexpected else []
    return (
        f"{shown(folder / WEIGHTS)} does not hold the weights of {shown(architecture)}, which {CONFIG} names: "
        f"{' and '.join(parts)}; both files must be of one model, as written by timm's save_for_hf or in RUN/backbone"
    )


def export(
    backbone: nn.Module,
    folder: Path,
    view: Mapping[str, Any],
    *,
    classes: Sequence[str] = (),
    background: tuple[int, int, int] | None = None,
) -> None:
    """Writes a backbone that `timm.create_model("local-dir:FOLDER", pretrained=True)` reads.

    The folder gets `model.safetensors` and `config.json`: the entries of `pretrained_cfg` from which timm makes the
    `view` of the backbone, of a classifier the names of its `classes`, and the `background` colour behind transparent
    pixels. Weights that layers share are written under each of their names.
    """
    source = cast("dict[str, Any]", backbone.pretrained_cfg)
    # Only what describes the model: tag, licence and address are those of weights that these no longer are.
    description = {name: source[name] for name in DESCRIPTION if name in source}
    description |= {**view, "num_classes": len(classes)}
    channels, *sides = view["input_size"]
    root = folder.parent
    make_folder(folder, root)
    for left in folder.glob(".*.partial"):
        remove(left, root)
    # Each in memory of its own, and not channels_last: safetensors refuses tensors that are shared or not contiguous.
    state = {
        name: value.cpu().clone(memory_format=torch.contiguous_format) for name, value in backbone.state_dict().items()
    }
    with replacing(folder / WEIGHTS, root) as (path, _):
        save_file(state, path)
    # Not by timm's own function, which differs between versions.
    content: dict[str, Any] = {
        "architecture": source["architecture"],
        "num_classes": len(classes),
        "model_args": {"in_chans": channels, "num_classes": len(classes)},
        "pretrained_cfg": description,
    }
    content["model_args"] |= {"img_size": sides} if source.get("fixed_input_size") else {}
    content |= {"label_names": list(classes)} if classes else {}
    content |= {"background": list(background)} if background is not None else {}
    with replacing(folder / CONFIG, root) as (path, _):
        path.write_text(json.dumps(content, indent=2))
