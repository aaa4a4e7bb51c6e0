"""A backbone in timm's own format, written, and read as far as what its config.json says is believed.

A config.json may name weights anywhere on the network, pickles among them, and any argument of any model. Here it says
which of timm's models it is and what its input was, and the weights are those of model.safetensors beside it.
"""

import copy
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
"""What a name begins with that is no timm model's."""
CONFIG, WEIGHTS = "config.json", "model.safetensors"
DESCRIPTION = ("architecture", "fixed_input_size", "first_conv", "classifier")
"""What an exported backbone keeps of timm's description."""
SECONDS = 5.0
"""How long the hub may take to answer, once, before its local cache alone is looked at."""
SET_HERE = {"in_chans", "num_classes", "img_size", "drop_rate", "drop_path_rate", "pretrained"}
"""Arguments that follow from the images and the recipe, whatever the folder says."""
BELIEVED: dict[str, type] = {"global_pool": str, "class_token": bool, "dynamic_img_size": bool}
"""Arguments that change what the weights are read by, and not how many there are."""

Channels = Annotated[int, Field(strict=True, ge=1, le=64)]
Side = Annotated[int, Field(strict=True, ge=1, le=4096)]
Number = Annotated[float, Field(gt=-1e4, lt=1e4)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.]{1,200}$")]


class Described(BaseModel):
    """What is believed of a model's `pretrained_cfg`."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    input_size: tuple[Channels, Side, Side]
    mean: tuple[Number, ...] = Field((0.485, 0.456, 0.406), min_length=1, max_length=64)
    std: tuple[Annotated[Number, Field(gt=0)], ...] = Field((0.229, 0.224, 0.225), min_length=1, max_length=64)
    interpolation: Annotated[str, Field(max_length=20)] = "bicubic"
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
        """What `timm.create_model` is to be told beside the architecture."""
        source = {"file": str(self.folder / WEIGHTS)} if pretrained else {}
        return {"pretrained": pretrained, "pretrained_cfg": self.described.model_dump() | source, **self.arguments}


def read_folder(folder: Path) -> TimmFolder:
    """Reads the config.json of a folder in timm's format.

    Raises:
        ValueError: if there is none, it is damaged, or it describes a model as no folder is believed to.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise ValueError(f"{shown(folder)} is no folder in timm's format: it holds no {CONFIG}")
    content = read_json(file)
    # Older folders have both in one.
    described, arguments = content.get("pretrained_cfg", content), content.get("model_args") or {}
    try:
        found = Described.model_validate(described)
        named = TimmFolder(
            folder=folder, architecture=content.get("architecture", ""), described=found, arguments=arguments
        )
    except ValidationError as problem:
        first = problem.errors()[0]
        place = ".".join(map(str, first["loc"])) or "pretrained_cfg"
        raise ValueError(f"{shown(file)} is damaged: {shown(place)}: {first['msg']}") from None
    believed = {name: value for name, value in arguments.items() if name not in SET_HERE and value is not None}
    for name, value in believed.items():
        if type(value) is not BELIEVED.get(name) or len(str(value)) > 20:
            raise ValueError(
                f"{shown(file)} asks for {shown(named.architecture)} with {shown(name)}={shown(value)}, which is not "
                "read from a folder; only timm's models as they are named are"
            )
    return named.model_copy(update={"arguments": believed})


def hub_folder(name: str) -> Path:
    """The local copy of a model on the hub, its config.json and model.safetensors alone, downloaded where missing.

    Args:
        name: hf-hub:OWNER/NAME, with @REVISION where it is not the newest.

    Raises:
        ValueError: if it cannot be had.
    """
    owner, _, revision = name.partition(":")[2].partition("@")
    with from_hub(name):
        files = [Path(hf_hub_download(owner, file, revision=revision or None)) for file in (CONFIG, WEIGHTS)]
    return files[0].parent


@contextmanager
def from_hub(wanted: str, way_out: str = "") -> Iterator[None]:
    """Hugging Face's hub, where it answers within seconds, else its local cache alone; without lines of its own.

    The client tries each file again and again for most of a minute, and says so each time.

    Args:
        wanted: what is read there, for messages.
        way_out: the end of the message where it cannot be had.

    Raises:
        ValueError: saying why it cannot be had, whatever but a TypeError is raised within.
    """
    unreachable, verbosity, offline = "", get_verbosity(), constants.HF_HUB_OFFLINE
    address = urlsplit(constants.ENDPOINT)
    # What a proxy reaches is its affair.
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
        cure = f"and {constants.HF_HUB_CACHE} does not hold them; with {CONFIG} and {WEIGHTS} of the model in a folder"
        said = f"({reason}), {cure}, its name is {LOCAL}FOLDER"
        if not reason:
            said = f"({type(problem).__name__}: {shown(problem)}); look whether the hub has a {WEIGHTS} of that name"
        raise ValueError(f"{shown(wanted)} cannot be had {said}{way_out}") from problem
    finally:
        constants.HF_HUB_OFFLINE = offline
        set_verbosity(verbosity)


def other_weights(folder: Path, architecture: str, model: Mapping[str, Any], found: Collection[str]) -> str:
    """What a folder's weights lack for the model that its config.json names, or have beside it; empty where nothing."""
    lacking, beside = [key for key in model if key not in found], [key for key in found if key not in model]
    if not lacking and not beside:
        return ""
    parts = [f"it lacks {len(lacking):,} ({some(lacking)}) of {len(model):,} keys"] if lacking else []
    parts += [f"it has {len(beside):,} ({some(beside)}) that the model does not"] if beside else []
    return (
        f"{shown(folder / WEIGHTS)} does not hold the weights of {shown(architecture)}, which {CONFIG} names: "
        f"{' and '.join(parts)}; both files must be of one model, as timm's save_for_hf and RUN/backbone have them"
    )


def export(
    backbone: nn.Module,
    folder: Path,
    *,
    channels: int,
    size: int,
    mean: float | tuple[float, ...],
    std: float | tuple[float, ...],
    classes: Sequence[str] = (),
    background: tuple[int, int, int] | None = None,
) -> None:
    """Writes a backbone in timm's own format: `timm.create_model("local-dir:FOLDER", pretrained=True)` reads it.

    The folder gets `config.json`, with the input it was trained on (channels, size, and the mean and standard deviation
    that values in [0, 1] are normalised by), and `model.safetensors`. A backbone that is a classifier has the names of
    its classes in `config.json` too, and `background` is the colour that transparent pixels were shown before. The
    interpolation is that by which files are decoded. Weights that layers share are written under each of their names.
    """
    # A copy: timm wants the description on the model.
    model = copy.deepcopy(backbone).cpu()
    source = cast("dict[str, Any]", backbone.pretrained_cfg)
    # Only what describes the model: tag, licence and address are those of weights that these no longer are.
    description = {name: source[name] for name in DESCRIPTION if name in source}
    changed = {
        "input_size": (channels, size, size),
        "mean": mean if isinstance(mean, tuple) else (mean,) * channels,
        "std": std if isinstance(std, tuple) else (std,) * channels,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "num_classes": len(classes),
    }
    model.__dict__["pretrained_cfg"] = description | changed
    root = folder.parent
    make_folder(folder, root)
    for left in folder.glob(".*.partial"):
        remove(left, root)
    # Each in memory of its own, and not channels_last: safetensors refuses tensors that are shared or not contiguous.
    state = model.state_dict()
    with replacing(folder / WEIGHTS, root) as (path, _):
        save_file({name: value.clone(memory_format=torch.contiguous_format) for name, value in state.items()}, path)
    shown_before = {} if background is None else {"background": list(background)}
    with replacing(folder / CONFIG, root) as (path, _):
        _write_config(model, path, {"label_names": list(classes), **shown_before})


def _write_config(model: nn.Module, file: Path, more: dict[str, Any]) -> None:
    """Writes the description that `timm.create_model` reads; timm's own function for it differs between versions."""
    described = cast("dict[str, Any]", model.pretrained_cfg)
    channels, *side = described["input_size"]
    arguments = {"in_chans": channels, "num_classes": model.num_classes}
    arguments |= {"img_size": side} if described.get("fixed_input_size") else {}
    content = {"architecture": described["architecture"], "num_classes": model.num_classes, "model_args": arguments}
    named = {name: value for name, value in more.items() if value}
    file.write_text(json.dumps({**content, "pretrained_cfg": described, **named}, indent=2))
