"""What the evaluators work on: one feature vector per image, computed once."""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from itertools import islice
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from manyviews.data.decoding.files import Files
from manyviews.data.images import Images, Readable
from manyviews.system import distributed
from manyviews.system.distributed import raise_on_all_ranks

Precision = Literal["fp32", "bf16", "fp16"]
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Stopped(Exception):  # noqa: N818  (no error: it was asked for)
    """The work was asked to end before it was done."""


def extract(
    backbone: nn.Module,
    images: Images,
    *,
    prepare: Callable[[Tensor], Tensor],
    device: torch.device | str = "cpu",
    ids: Int[Tensor, " chosen"] | None = None,
    batch_size: int = 512,
    precision: Precision = "fp32",
    workers: int = 2,
    stopped: Callable[[], bool] | None = None,
) -> Float[Tensor, "chosen width"]:
    """The features of all images, or of those that `ids` names, in that order: float32 on the CPU.

    Over several processes each computes its share and every process gets the whole; no image counts twice. The
    backbone leaves as it came: modules in evaluation mode only meanwhile, each then back in its own mode; neither its
    buffers nor the global random generators move.

    Args:
        backbone: any module from [batch, channels, height, width] to [batch, width].
        images: a split.
        prepare: from a uint8 batch on the device to the backbone's input: the evaluation view.
        device: where the backbone is.
        ids: distinct ids, the same on every process; all images without.
        batch_size: images per forward pass of each process; bounds the memory.
        precision: bf16 and fp16 run the backbone under autocast.
        workers: threads that read ahead.
        stopped: asked before each batch whether to end; all processes together, which must answer alike.

    Raises:
        ValueError: if there is no image, an id is named twice, or features are not finite or not one vector per image;
            what one process raises, all do, the others as an OSError or a RuntimeError.
        Stopped: on all processes, once `stopped` says so.
    """
    device = torch.device(device)
    chosen = torch.arange(len(images)) if ids is None else ids.cpu()
    if not len(chosen):
        raise ValueError("there is no image to extract features of")
    if len(torch.unique(chosen)) != len(chosen):
        raise ValueError("an id is named twice among those to extract features of; name each once")
    # A last share may be empty, yet its process must know how wide the features are: it computes one that is dropped.
    # Shares are whole batches: whatever the number of processes, an image has the same company.
    batches = torch.split(chosen, batch_size)
    rounds = max(1, -(-len(batches) // distributed.world_size()))
    batches = batches[distributed.share(len(batches))]
    own = torch.cat([chosen[:0], *batches])
    batches = batches or (chosen[:1],)
    passes = encoded(backbone, images, batches, prepare=prepare, device=device, precision=precision, workers=workers)
    local = torch.empty(0)
    done = 0
    problem: Exception | None = None
    with closing(passes):
        # All processes go as many rounds as the one with the most batches, so that they are asked together.
        for _ in range(rounds):
            if stopped is not None and stopped():
                raise Stopped
            try:
                for ids_of_batch, rows in islice(passes, 1):
                    if not done:
                        # Whole from the first: joined at the end, all batches would take the memory twice.
                        local = torch.empty(max(len(own), 1), rows.shape[1])
                    local[done : done + len(ids_of_batch)] = rows
                    done += len(ids_of_batch)
            except Exception as raised:
                # It still takes part in the questions of the others, who would wait for it; then all raise.
                problem = problem or raised
    with raise_on_all_ranks():
        if problem is not None:
            raise problem
    local = local[: len(own)]
    if distributed.world_size() > 1:
        local = _gather_by_id(local.to(device), own.to(device), chosen)
    check_finite(local)
    return local


def encoded(
    module: nn.Module,
    images: Readable,
    batches: Sequence[Int[Tensor, " _"]],
    *,
    prepare: Callable[[Tensor], Tensor],
    device: torch.device | str = "cpu",
    precision: Precision = "fp32",
    workers: int = 2,
) -> Generator[tuple[Int[Tensor, " _"], Any]]:
    """What a module makes of batches of images: their ids, and float32 vectors on the CPU.

    The module returns a tensor or a dictionary of tensors, and so does this. It leaves as it came, as `extract` says.
    `batches` are ids; the other arguments are those of `extract`.

    Raises:
        ValueError: if the module does not give one vector per image.
    """
    device = torch.device(device)
    previous: tuple[Tensor, Any] | None = None
    cast = partial(torch.autocast, device.type, dtype=AUTOCAST.get(precision), enabled=precision in AUTOCAST)
    with evaluation_mode(module):
        for ids, pixels in zip(batches, _read_ahead(images, batches, workers), strict=True):
            # Not around the loop: a generator's context would rule its caller between two batches.
            with torch.inference_mode(), cast():
                made = module(prepare(pixels.to(device, non_blocking=True)))
            # What a device computes arrives when the next batch is under way there.
            if previous is not None:
                yield previous[0], _of_each(_arrived, previous[1])
            _of_each(partial(_check_vectors, len(ids)), made)
            previous = ids, made
        if previous is not None:
            yield previous[0], _of_each(_arrived, previous[1])


def raw_pixels(images: Images, size: int, *, batch_size: int = 1024) -> Float[Tensor, "images width"]:
    """The baseline that has learned nothing: the pixels in [0, 1], resized to a square of `size` and flattened."""
    pieces = []
    for ids in torch.split(torch.arange(len(images)), batch_size):
        pixels = images.read(ids).float().div_(255)
        if pixels.shape[-2:] != (size, size):
            pixels = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True)
        pieces.append(pixels.flatten(1))
    return torch.cat(pieces)


def _gather_by_id(local: Tensor, own: Tensor, chosen: Tensor) -> Tensor:
    features = distributed.gather_without_gradient(local).cpu()
    arrived = distributed.gather_without_gradient(own).cpu()
    assert len(arrived) == len(chosen), f"{len(arrived)} features for {len(chosen)} images"
    ordered, places = chosen.sort()
    assert torch.equal(arrived.sort().values, ordered), "an image was computed twice or not at all"
    gathered = torch.empty_like(features)
    gathered[places[torch.searchsorted(ordered, arrived)]] = features
    return gathered


def check_finite(features: Tensor) -> None:
    """Raises a ValueError where a feature is not a finite number."""
    # One pass that makes nothing: what is not finite leaves its mark on the sum.
    if bool(features.sum().isfinite()):
        return
    broken = int((~features.isfinite().all(1)).sum())
    if broken:
        raise ValueError(
            f"the features of {broken} of {len(features)} images are not finite; the backbone has diverged, or its "
            "precision is too low (try fp32)"
        )


def _of_each(function: Callable[[Tensor], Any], made: Any) -> Any:
    return {name: function(rows) for name, rows in made.items()} if isinstance(made, dict) else function(made)


def _arrived(made: Tensor) -> Tensor:
    return made.float().cpu()


def _check_vectors(count: int, made: Tensor) -> None:
    if made.ndim != 2 or len(made) != count:
        raise ValueError(
            f"the backbone gives {list(made.shape)} for {count} images, not one vector for each; pool its output"
        )


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """The module and all in it in evaluation mode while it is open; then each in its own mode again."""
    modes = {child: child.training for child in module.modules()}
    module.eval()
    try:
        yield
    finally:
        # Each on its own: `module.train()` would also wake what was frozen on purpose.
        for child, mode in modes.items():
            child.training = mode


def _read_ahead(images: Readable, batches: Sequence[Tensor], workers: int) -> Iterator[Tensor]:
    # What lies in memory is read in no time, and threads would only take the cores from the backbone.
    if workers < 1 or not isinstance(images, Files):
        yield from map(images.read, batches)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[Tensor]] = deque()
        for ids in batches:
            waiting.append(pool.submit(images.read, ids))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
