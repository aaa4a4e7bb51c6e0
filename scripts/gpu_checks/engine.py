"""Stage 6: NT-Xent of ever more embeddings and the bank of ImageNet, beside products, plain torch and lightly."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks import bank, infonce
from benchmarks.harness import RivalMissingError
from gpu_checks.ceilings import gemm
from gpu_checks.measure import Row, Setup, at_least

SIZES = tuple(2**power for power in range(11, 18))
OURS, RIVALS = "manyviews", (infonce.PLAIN, "lightly NTXentLoss")
FASTER, OF_PRODUCTS = 4.0, 0.4
"""Goals at 16,384 embeddings: times the speed of plain torch, and the share of the products' own time."""
STEPS = ("exact softmax, float32 bank", "exact softmax, bfloat16 bank", "NCE, 4,096 shared noise rows", bank.PLAIN)


def rows(setup: Setup) -> Iterator[Row]:
    """Measures forward and backward passes; what does not fit the memory or is not installed says so."""
    rate = gemm(setup)
    for size in setup.pick(SIZES, (64, 128)):
        # Half a matrix of scores in forward; in backward again, and two products with it.
        yield from _beside(
            setup, f"NT-Xent of {size:,}", OURS, RIVALS, infonce.prepare, size, 4 * size**2 * infonce.DIM / rate
        )
    count = setup.pick(bank.SIZES[-1], 500)
    for queries in setup.pick((256, 1024), (8,)):
        limit = 4 * queries * count * bank.DIM / rate
        name = f"bank of {count:,}, {queries:,} anchors"
        yield from _beside(setup, name, STEPS[0], STEPS[1:], bank.prepare, count, limit, queries)


def _beside(
    setup: Setup,
    title: str,
    ours: str,
    others: tuple[str, ...],
    prepare: Callable[..., Callable[[], object]],
    size: int,
    limit: float,
    *more: int,
) -> Iterator[Row]:
    """Rows of our time, with the share of the products in it, and of the others as times of ours."""
    own = _measured(setup, partial(prepare, ours, size, *more, setup.device.type))
    if isinstance(own, str):
        yield Row(f"{title}: {ours}", None, note=own)
        return
    seconds, memory = own
    yield Row(f"{title}: {ours}", 1e3 * seconds, "ms", note=f"products alone {1e3 * limit:.3g} ms{memory}")
    at_goal = size == 16_384
    share = limit / seconds
    what = f"{title}: the products' share of the time"
    yield at_least(what, share, OF_PRODUCTS) if at_goal else Row(what, share)
    for name in others:
        other = _measured(setup, partial(prepare, name, size, *more, setup.device.type))
        if isinstance(other, str):
            yield Row(f"{title}: {name}", None, note=other)
            continue
        ratio, note = other[0] / seconds, f"{1e3 * other[0]:.3g} ms{other[1]}"
        if at_goal and name == infonce.PLAIN:
            yield at_least(f"{title}: {name}", ratio, FASTER, "× our time", note)
        else:
            yield Row(f"{title}: {name}", ratio, "× our time", note=note)


def _measured(setup: Setup, prepare: Callable[[], Callable[[], object]]) -> tuple[float, str] | str:
    """Seconds and a note on the peak memory; or why there are none."""
    try:
        work = prepare()
        seconds = setup.seconds(work, repetitions=5, most=1.0)
        peak = setup.peak(work)
        return seconds, "" if peak is None else f", {1024 * peak:,.0f} MiB"
    except RivalMissingError as problem:
        return str(problem)
    except torch.OutOfMemoryError:
        return "out of memory"
    finally:
        if setup.cuda:
            torch.cuda.empty_cache()
