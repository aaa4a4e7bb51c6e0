"""What an objective costs on each process: the sizes it follows from, the record, and what the formulas share.

The formulas stand in `cost` of each objective's settings. Traffic is what a process receives in a step, forward,
backward and update, as `distributed.traffic` counts it: of what all processes gather, or add up for one of them, a ring
brings it all but its own W-th part. Left out is what does not grow: the agreements on how many images each process has,
8 bytes from every other process, a dozen times at most.

Throughout, anchors are the embeddings of a step that have a loss, over all processes: its views of its images.
"""

from typing import Literal, NamedTuple

import torch

from manyviews.system.plural import plural

NUMBER, ID, STEP = 4, 8, 4
"""Bytes of a float32, of an id, and of the step at which a row was written."""


class Cost(NamedTuple):
    """What a step of an objective costs each process, and what it gets for it."""

    negatives: int
    """Embeddings that each anchor is contrasted with, in one step; where classes are the ids, at most."""
    rows: int
    """Rows of a bank or slots of a queue that a process holds, the most that any of them does."""
    memory: int
    """Bytes that these take, with their ids or steps."""
    traffic: int
    """Bytes that a process receives from the others in a step."""
    products: int
    """Multiplications, each with an addition, in a process's matrix products of a step."""

    def __str__(self) -> str:
        """One line, as the log has it."""
        parts = [f"{self.negatives:,} per anchor"]
        if self.rows:
            parts.append(f"{plural(self.rows, 'row')} on each process ({amount(self.memory)})")
        if self.traffic:
            parts.append(f"{amount(self.traffic)} received by each process per step")
        return ", ".join(parts)


class Sizes(NamedTuple):
    """What the cost of a step follows from, beside the objective's settings."""

    images: int
    """How many there are to train on, N; for class weights, how many classes."""
    views: int
    """Of each image in a step, V."""
    batch: int
    """Images of a step over all processes, B."""
    dim: int
    """Of the embeddings, D."""
    processes: int
    """W."""

    @property
    def anchors(self) -> int:
        """Embeddings of a step, V · B."""
        return self.views * self.batch

    def cost(self, negatives: int, *, traffic: int, products: int, rows: int = 0, row_bytes: int = 0) -> Cost:
        """The cost of each process.

        Args:
            negatives: of each anchor.
            traffic: bytes that all processes gather, or add up for one of them.
            products: multiplications of all processes.
            rows: that all processes keep.
            row_bytes: of each of them.
        """
        kept = -(-rows // self.processes)
        received = traffic * (self.processes - 1) // self.processes
        return Cost(negatives, kept, kept * row_bytes, received, products // self.processes)


def all_pairs(sizes: Sizes, distance: Literal["cosine", "euclidean"], *, passes: int = 3) -> Cost:
    """Every embedding against all of the batch, each process for its own; the distances of labels are not counted.

    The products are those of a GPU: on a CPU the gradient of a few sampled pairs takes none, which leaves a third.
    """
    # Squared distances are products of longer rows.
    width = sizes.dim if distance == "cosine" else sizes.dim + 2
    products = passes * sizes.anchors**2 * width
    return sizes.cost(sizes.views * (sizes.batch - 1), traffic=gathered_traffic(sizes), products=products)


def softmax_traffic(anchors: int, dim: int) -> int:
    """Anchors and their ids go to all rows, the sums to all processes, and the weighted rows home."""
    return anchors * (ID + NUMBER * dim + 2 * NUMBER + NUMBER * dim)


def gathered_traffic(sizes: Sizes) -> int:
    """Embeddings and the ids of images go to all, and the embeddings' gradients home."""
    return sizes.batch * ID + sizes.anchors * 2 * NUMBER * sizes.dim


def number_bytes(storage: str) -> int:
    """Bytes of a number of a format, such as bfloat16."""
    number: torch.dtype = getattr(torch, storage)
    return number.itemsize


def amount(count: int) -> str:
    """Bytes as a person writes them: 7 bytes, 15.5 MB, 266 kB."""
    if count < 1000:
        return f"{count} bytes"
    power = min((len(str(count)) - 1) // 3, 4)
    number = count / 1000**power
    return f"{number:,.{0 if number >= 100 else 1}f} {('kB', 'MB', 'GB', 'TB')[power - 1]}"
