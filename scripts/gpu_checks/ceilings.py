"""Stage 1: what the machine can do at best: products of matrices, copies on the device and to it."""

from collections.abc import Iterator

import torch

from gpu_checks.measure import Row, Setup
from manyviews.system.precision import tf32

GIGABYTE = 1e9


def rows(setup: Setup) -> Iterator[Row]:
    """Measures products in three precisions, the copy of a large array, and the copy from pinned memory."""
    for name in ("bf16", "TF32", "fp32"):
        yield Row(f"product, {name}", gemm(setup, name) / 1e12, "TFLOP/s")
    count = setup.pick(2**30, 2**22)
    source = torch.empty(count, dtype=torch.uint8, device=setup.device)
    target = torch.empty_like(source)
    seconds = setup.seconds(lambda: target.copy_(source))
    yield Row("copy on the device, read and written", 2 * count / seconds / GIGABYTE, "GB/s")
    if setup.cuda:
        pinned = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
        part = target[: len(pinned)]
        seconds = setup.seconds(lambda: part.copy_(pinned, non_blocking=True))
        yield Row("copy from pinned memory", len(pinned) / seconds / GIGABYTE, "GB/s")


def gemm(setup: Setup, precision: str = "bf16") -> float:
    """Operations per second of a product of two large square matrices."""
    side = setup.pick(8192, 256)
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    left, right = (torch.randn(side, side, device=setup.device, dtype=kind) for _ in range(2))
    result = torch.empty_like(left)
    several = setup.pick(4, 1)

    def work() -> None:
        for _ in range(several):
            torch.mm(left, right, out=result)

    with tf32(precision == "TF32"):
        return several * 2 * side**3 / setup.seconds(work)
