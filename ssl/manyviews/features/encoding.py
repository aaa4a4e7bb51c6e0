"""Encodes images by a backbone: one feature vector per image, computed over all ranks."""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, ClassVar, Literal, Protocol

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from manyviews.config import Settings
from manyviews.data import AnyData, Batch, Data, Split, shorthand, with_sets
from manyviews.data.decoding.files import Files
from manyviews.data.images import Cropper, Images, Pictures
from manyviews.data.loader import copied_ahead
from manyviews.data.pictures import pictures
from manyviews.features.backbone import PretrainedBackbone
from manyviews.features.placing import fits, placed_on_all_ranks
from manyviews.system import distributed
from manyviews.system.background import HostCopy
from manyviews.system.console import Console
from manyviews.system.distributed import raise_on_all_ranks
from manyviews.system.hardware import decoders
from manyviews.system.precision import tf32
from manyviews.views import StandardView, enlarged

Precision = Literal["fp32", "bf16", "fp16"]
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class EncodeSettings(Settings):
    """Settings of the commands that encode images by a backbone."""

    shorthands: ClassVar[Mapping[str, Callable[[str], dict[str, Any]]]] = {"data": shorthand}

    data: Data | None = None
    """The images; null: the run's own, or for a timm model the bundled sample."""
    batch_size: int = Field(256, ge=1, le=1_048_576)
    """Images encoded at once by each process; the features depend on it by rounding alone."""
    precision: Precision = "fp32"
    """Arithmetic of the backbone: bf16 and fp16 are faster where the device is built for them; the files are fp32. On a
    GPU fp32 multiplies in TF32, with 10 bits behind the point, and adds in float32."""
    workers: int | None = Field(None, ge=0, le=1024)
    """Threads that decode images, for each process; null: 2, or with a GPU its share of the cores."""

    def data_of(self, opened: PretrainedBackbone) -> AnyData | None:
        """The data of the settings, or else of the run."""
        return self.data or (opened.recipe.data if opened.recipe is not None else None)


def images_of(opened: PretrainedBackbone, settings: EncodeSettings, console: Console) -> Split:
    """Reads the images of the settings or the run; raises ValueError for too many channels."""
    data = settings.data_of(opened)
    if data is None:
        raise ValueError(
            f"{opened.name} has no images of its own; say which with data=FOLDER, or the name of a data set"
        )
    with console.bar():
        split = with_sets(data.build(workers=settings.workers, report=console.report), data)
    # Fewer channels are fine: the view repeats them.
    if split.train.channels > opened.channels:
        raise ValueError(
            f"the images have {split.train.channels} channels, but {opened.name} was trained on {opened.channels}: for "
            f"a folder, use data.channels={opened.channels}"
        )
    if split.layout:
        console.say(f"images     {split.layout}")
    if (larger := enlarged(opened.size, split.train, data)) is not None:
        console.warn(larger)
    return split


class View(Cropper, Protocol):
    """Chooses what is read of each image, and makes a backbone's input of it: `StandardView`."""

    def __call__(self, pictures: Pictures, /) -> Float[Tensor, "batch channels size size"]:
        """The input, on the device of the pictures."""


class Stopped(Exception):  # noqa: N818  (not an error)
    """The `stopped` callback of `extract` ended the work."""


def extract(
    backbone: nn.Module,
    images: Images,
    *,
    view: View,
    device: torch.device | str = "cpu",
    ids: Int[Tensor, " chosen"] | None = None,
    batch_size: int = 512,
    precision: Precision = "fp32",
    workers: int | None = None,
    stopped: Callable[[], bool] | None = None,
    report: Callable[[int, int], object] | None = None,
    keep: bool = False,
) -> Float[Tensor, "chosen width"]:
    """Features of all images, or of those in `ids`, in that order: float32 on the CPU.

    Each rank computes its share and gets the whole. The backbone is in evaluation mode meanwhile, and unchanged
    afterwards: the mode of each module, its buffers and the global random generators.

    Args:
        backbone: any module from [batch, channels, height, width] to [batch, width], on the device.
        images: the split that `ids` refer to.
        view: what the backbone sees of an image.
        device: that of the backbone.
        ids: distinct ids, the same on every rank.
        batch_size: images per forward pass of each rank.
        precision: bf16 and fp16 run the backbone under autocast.
        workers: threads that read files ahead; None: as many as the machine has cores for.
        stopped: called on all ranks before each batch, with the same result; true ends the work.
        report: called after each batch with the number of images that are done, and of all.
        keep: leave the features on a GPU where they fit: then the host waits for no batch.

    Raises:
        ValueError: no image, an id given twice, features not finite or not one vector per image; the other ranks then
            raise an OSError or a RuntimeError.
        Stopped: on all ranks, once `stopped` is true.
    """
    device = torch.device(device)
    chosen = torch.arange(len(images)) if ids is None else ids.cpu()
    if not len(chosen):
        raise ValueError("there is no image to extract features from")
    if len(torch.unique(chosen)) != len(chosen):
        raise ValueError("ids has duplicates; pass each id once")
    # A share may be empty, yet its rank must learn the width of the features: it computes one that is dropped.
    # Shares are whole batches: batches are the same for any world size.
    batches = torch.split(chosen, batch_size)
    rounds = max(1, -(-len(batches) // distributed.world_size()))
    batches = batches[distributed.share(len(batches))]
    count = sum(map(len, batches))
    batches = batches or (chosen[:1],)
    given: Any = {"view": view, "device": device, "precision": precision, "workers": workers, "keep": keep}
    passes = encoded(backbone, images, batches, **given)
    local = torch.empty(0)
    done = 0
    problem: Exception | None = None
    with closing(passes):
        # All ranks take as many rounds as the one with the most batches, to call `stopped` together.
        for _ in range(rounds):
            if stopped is not None and stopped():
                raise Stopped
            try:
                for ids_of_batch, rows in islice(passes, 1):
                    if not done:
                        # Allocated once: concatenated at the end, all batches would take the memory twice.
                        stays = rows.device.type == "cuda" and fits(count * rows[:1].nbytes, rows.device)
                        local = torch.empty(max(count, 1), rows.shape[1], device=rows.device if stays else "cpu")
                    local[done : done + len(ids_of_batch)] = rows
                    done += len(ids_of_batch)
                    if report is not None:
                        report(min(done * distributed.world_size(), len(chosen)), len(chosen))
            except Exception as raised:
                # This rank still calls `stopped` with the others, which would wait for it; then all raise.
                problem = problem or raised
    with raise_on_all_ranks():
        if problem is not None:
            raise problem
    local = local[:count]
    if distributed.world_size() > 1:
        # Shares are consecutive: the rank order is that of the ids.
        local = distributed.gather_without_gradient(placed_on_all_ranks(local, len(chosen), device))
        assert len(local) == len(chosen), f"{len(local)} features for {len(chosen)} images"
    check_finite(local)
    return local if keep else local.cpu()


def encoded(
    module: nn.Module,
    images: Images,
    batches: Sequence[Int[Tensor, " _"]],
    *,
    view: View,
    device: torch.device | str = "cpu",
    precision: Precision = "fp32",
    workers: int | None = None,
    keep: bool = False,
) -> Generator[tuple[Int[Tensor, " _"], Any]]:
    """Yields ids and outputs per batch: float32 vectors on the CPU, or a dictionary of such.

    `batches` are ids; the other arguments, and what stays unchanged, are those of `extract`. With `keep` the outputs
    stay on the device; else the host waits once for each batch, when the next one has been started there.

    Raises:
        ValueError: the module does not return one vector per image.
    """
    device = torch.device(device)
    previous: tuple[Tensor, Any] | None = None

    def arrived(outputs: Any) -> Any:
        return outputs if keep else _map_tensors(lambda copy: copy.read()[0], outputs)

    cast = partial(torch.autocast, device.type, dtype=AUTOCAST.get(precision), enabled=precision in AUTOCAST)
    with evaluation_mode(module):
        for ids, pixels in _batches_on_device(images, batches, view, workers, device):
            # Not around the loop: the mode would hold in the caller between two batches.
            with torch.inference_mode(), cast():
                inputs = view(pixels)
                with tf32(precision == "fp32"):
                    outputs = module(inputs)
            outputs = _map_tensors(Tensor.float, outputs)
            # The copy follows the batch at once, and arrives while the next one is computed.
            copies = outputs if keep else _map_tensors(HostCopy, outputs)
            if previous is not None:
                yield previous[0], arrived(previous[1])
            _map_tensors(partial(_check_vectors, len(ids)), outputs)
            previous = ids, copies
        if previous is not None:
            yield previous[0], arrived(previous[1])


def raw_pixels(images: Images, view: StandardView, *, batch_size: int = 1024) -> Float[Tensor, "images width"]:
    """The baseline without learning: the pixels of a view in [0, 1], resized bilinearly and flattened.

    Examples:
        >>> from manyviews.data import Sample
        >>> raw_pixels(Sample().build().test, StandardView(28, 1)).shape
        torch.Size([2000, 784])
    """
    view = replace(view, channels=images.channels, mean=(0.0,), std=(1.0,), interpolation="bilinear")
    batches = torch.split(torch.arange(len(images)), batch_size)
    return torch.cat([view(pictures(images, ids, view)).flatten(1) for ids in batches])


def check_finite(features: Tensor) -> None:
    """Raises a ValueError if a feature is not finite."""
    # One pass without a copy: a value that is not finite makes the sum so.
    if bool(features.sum().isfinite()):
        return
    broken = int((~features.isfinite().all(1)).sum())
    if broken:
        raise ValueError(
            f"the features of {broken} of {len(features)} images are not finite; the backbone has diverged, or its "
            "precision is too low (try fp32)"
        )


def _map_tensors(function: Callable[[Any], Any], outputs: Any) -> Any:
    return {name: function(rows) for name, rows in outputs.items()} if isinstance(outputs, dict) else function(outputs)


def _check_vectors(count: int, rows: Tensor) -> None:
    if rows.ndim != 2 or len(rows) != count:
        raise ValueError(
            f"the backbone returns {list(rows.shape)} for {count} images, not one vector for each; pool its output"
        )


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Context with a module in evaluation mode; restores the mode of each submodule."""
    modes = {child: child.training for child in module.modules()}
    module.eval()
    try:
        yield
    finally:
        # Not `module.train()`: submodules may have been frozen on purpose.
        for child, mode in modes.items():
            child.training = mode


def _batches_on_device(
    images: Images, batches: Sequence[Tensor], cropper: Cropper, workers: int | None, device: torch.device
) -> Generator[tuple[Tensor, Pictures]]:
    """Yields the ids of batches and their pixels on the device, on a GPU copied ahead."""
    pixels = _read_ahead(images, batches, cropper, decoders(workers))
    if device.type != "cuda":
        yield from ((ids, rows.to(device)) for ids, rows in zip(batches, pixels, strict=True))
        return
    pinned = (Batch(rows.pin_memory(), ids, 0) for ids, rows in zip(batches, pixels, strict=True))
    for ids, batch in zip(batches, copied_ahead(pinned, device), strict=True):
        yield ids, batch.images


def _read_ahead(images: Images, batches: Sequence[Tensor], cropper: Cropper, workers: int) -> Iterator[Pictures]:
    # Images in memory need no threads, which would take the cores from the backbone.
    if workers < 1 or not isinstance(images, Files):
        yield from (pictures(images, ids, cropper) for ids in batches)
        return
    # Each batch is decoded by threads of its own.
    ahead = max(workers // max(images.workers, 1), min(workers, 2))
    with ThreadPoolExecutor(ahead) as pool:
        waiting: deque[Future[Pictures]] = deque()
        for ids in batches:
            waiting.append(pool.submit(pictures, images, ids, cropper))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
