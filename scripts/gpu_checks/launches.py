"""A part of stage 2: encoders, precisions, a forced overflow of fp16, and all collectives with one process."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from gpu_checks.loops import images_in_memory, prepared
from gpu_checks.measure import Row, Setup, agreement, attempted, error
from manyviews.data.images import Pictures
from manyviews.encoder.encoder import EncoderSettings
from manyviews.train.components import Components
from manyviews.train.not_finite import SkippedStep
from manyviews.train.pretrain import train_step
from manyviews.train.step import StepResult

BATCH = 64
ENCODERS = {"light_resnet": 28, "resnet18_small": 32, "test_vit": 160}
OVERFLOW, MODERATE = 2.0**40, 2.0**8
"""Scales of fp16: with the first no gradient is finite, with the second all are."""


def rows(setup: Setup) -> Iterator[Row]:
    """Compares encoders with the CPU's and precisions with fp32; calls every collective."""
    for name in setup.pick([*ENCODERS], ["light_resnet"]):
        yield from attempted(f"encoder {name}", partial(_encoder, setup, name))
    yield from attempted("training in 16 bits", partial(_precisions, setup))
    yield from attempted("fp16 with an overflow", partial(_overflow, setup))
    yield from attempted("collectives", partial(_collectives, setup))


def _encoder(setup: Setup, name: str) -> Iterator[Row]:
    expected, actual = (_encoded(setup, name, device) for device in (torch.device("cpu"), setup.device))
    # cuDNN's convolutions have ten bits by torch's default.
    yield agreement(f"encoder {name}: embeddings", error(actual[0], expected[0]), 2e-2)
    yield agreement(f"encoder {name}: gradient", error(actual[1], expected[1]), 5e-2)


def _precisions(setup: Setup) -> Iterator[Row]:
    exact = _loss(setup, "fp32")
    for precision in ("bf16", "fp16") if setup.cuda else ("bf16",):
        yield agreement(f"training in {precision}: loss beside fp32", error(_loss(setup, precision), exact), 2e-2)


def _encoded(setup: Setup, name: str, device: torch.device) -> tuple[Tensor, Tensor]:
    size, count = setup.pick(ENCODERS[name], 12), setup.pick(32, 4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = EncoderSettings(name=name).build(channels=3, size=size).to(device)
    views = torch.randn(2, count, 3, size, size, generator=torch.Generator().manual_seed(1))
    embeddings = encoder(views.to(device)).embeddings
    embeddings.square().mean().backward()
    gradients = [own.grad.flatten().cpu() for own in encoder.backbone.parameters() if own.grad is not None]
    return embeddings, torch.cat(gradients)


def _begun(setup: Setup, precision: str) -> tuple[Components, Callable[[int], StepResult | SkippedStep]]:
    """The components of the quickstart, and its step by number."""
    batch = setup.pick(BATCH, 8)
    images = images_in_memory(4 * batch, setup.pick(28, 12), 1)
    args = [f"train.precision={precision}", f"train.batch_size={batch}", "optim.warmup=0", "optim.rate=1e-4"]
    components = prepared("quickstart", args, images)
    components.forward.train()

    def step(number: int) -> StepResult | SkippedStep:
        ids = (torch.arange(batch) + number * batch) % len(images)
        device = setup.device
        return train_step(components, Pictures((images.read(ids),)).to(device), ids.to(device), 0, number)

    return components, step


def _skipped(result: StepResult | SkippedStep) -> bool:
    return isinstance(result, SkippedStep) or result.skipped() is not None


def _loss(setup: Setup, precision: str) -> Tensor:
    """The loss of the first step; one that is left out, as in fp16 until the scale has settled, has a loss too."""
    _, step = _begun(setup, precision)
    result = step(0)
    return torch.tensor(result.loss["loss"] if isinstance(result, SkippedStep) else float(result.loss.total))


def _overflow(setup: Setup) -> Iterator[Row]:
    if not setup.cuda:
        yield Row("fp16: a step that overflows is left out", None, note="takes a GPU")
        return
    components, step = _begun(setup, "fp16")
    scaler = components.accelerator.scaler
    step(0)
    before = [own.detach().clone() for own in components.encoder.parameters()]
    scaler.update(OVERFLOW)
    skipped = _skipped(step(1))
    same = all(torch.equal(old, new) for old, new in zip(before, components.encoder.parameters(), strict=True))
    yield Row("fp16: a step that overflows is left out", str(skipped and same), holds=skipped and same, check=True)
    scaler.update(MODERATE)
    taken = not _skipped(step(2))
    moved = not all(torch.equal(old, new) for old, new in zip(before, components.encoder.parameters(), strict=True))
    yield Row("fp16: the next step is taken", str(taken and moved), holds=taken and moved, check=True)


def _collectives(setup: Setup) -> Iterator[Row]:
    """Every collective of the package with one process, on tensors of each device: what comes is what went."""
    setup.folder.mkdir(parents=True, exist_ok=True)
    store = setup.folder / "store"
    store.unlink(missing_ok=True)
    backend = "cpu:gloo,cuda:nccl" if setup.cuda else "cpu:gloo"
    if setup.cuda:
        torch.cuda.set_device(0)
    dist.init_process_group(backend, init_method=f"file://{store}", rank=0, world_size=1)
    try:
        for device in dict.fromkeys([torch.device("cpu"), setup.device]):
            for kind in (torch.float32, torch.bfloat16, torch.int64):
                sent = torch.arange(12, device=device).view(4, 3).to(kind)
                wrong = [name for name, came in _calls(sent).items() if not torch.equal(came, sent)]
                what = f"collectives of {str(kind).removeprefix('torch.')} on {device.type}"
                yield Row(what, ", ".join(wrong) or "equal", holds=not wrong, check=True)
        objects: list[object] = [None]
        dist.all_gather_object(objects, {"value": 1})
        dist.barrier()
        yield Row("collective of objects", str(objects[0]), holds=objects == [{"value": 1}], check=True)
    finally:
        dist.destroy_process_group()


def _calls(sent: Tensor) -> dict[str, Tensor]:
    # The names since torch 2.14, where the older ones warn.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    came = {name: torch.zeros_like(sent) for name in ("all-gather", "reduce-scatter", "all-to-all")}
    came |= {name: sent.clone() for name in ("sum", "maximum", "broadcast")}
    gather(came["all-gather"], sent)
    scatter(came["reduce-scatter"], sent.clone())
    dist.all_to_all_single(came["all-to-all"], sent, [len(sent)], [len(sent)])
    dist.all_reduce(came["sum"])
    dist.all_reduce(came["maximum"], op=dist.ReduceOp.MAX)
    dist.broadcast(came["broadcast"], src=0)
    return came
