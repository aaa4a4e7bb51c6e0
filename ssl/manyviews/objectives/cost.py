"""Cost of an objective on each rank: its inputs, its record, and parts of the formulas.

The formulas stand in `cost` of each objective's settings. Traffic is what a rank receives in a step, forward, backward
and update, as `distributed.traffic` counts it: of what all ranks gather, or add up for one of them, a ring brings it
all but its own W-th part. Left out is what does not grow: the exchanges of how many images each rank has, 8 bytes from
every other rank, a dozen times at most, and without local views.

Throughout, anchors are the embeddings of a step that have a loss, over all ranks: its views of its images. Batches of
relations cost less: only queries are anchors, and of the other images only those that are items too are compared.
"""

from typing import Literal, NamedTuple

from manyviews.system.plural import plural

Distance = Literal["cosine", "euclidean"]

NUMBER, ID, STEP = 4, 8, 4
"""Bytes of a float32, of an id, and of the step at which a row was written."""


class Cost(NamedTuple):
    """What a step of an objective costs each rank, and the negatives that it provides."""

    negatives: int
    """Embeddings that each anchor is contrasted with in one step; an upper bound where classes are the ids."""
    rows: int
    """Rows of a bank or slots of a queue on a rank, at most."""
    memory: int
    """Bytes of these rows with their ids or steps."""
    traffic: int
    """Bytes that a rank receives from the others in a step."""
    products: int
    """Multiply-adds in a rank's matrix products of a step."""

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
    """N, the images to train on; for class weights, the number of classes."""
    views: int
    """V, the views of each image in a step, local ones among them."""
    batch: int
    """B, the images of a step over all ranks."""
    dim: int
    """D, of the embeddings."""
    processes: int
    """W."""
    keys: int | None = None
    """K, the views that embeddings are compared with; None: all."""

    @property
    def anchors(self) -> int:
        """Embeddings of a step, V · B."""
        return self.views * self.batch

    @property
    def compared(self) -> int:
        """Embeddings of a step that anchors are compared with, K · B."""
        return (self.views if self.keys is None else self.keys) * self.batch

    @property
    def negatives(self) -> int:
        """Embeddings of other images that anchors are compared with."""
        return self.compared - self.compared // self.batch

    def cost(self, negatives: int, *, traffic: int, products: int, rows: int = 0, row_bytes: int = 0) -> Cost:
        """Cost of each rank from sums over all; `traffic` is what they gather, or add up for one."""
        kept = -(-rows // self.processes)
        received = traffic * (self.processes - 1) // self.processes
        return Cost(negatives, kept, kept * row_bytes, received, products // self.processes)


def all_pairs(sizes: Sizes, distance: Distance, *, passes: int = 3) -> Cost:
    """Cost of every embedding against all of the batch, without the distances of labels.

    The products are those of a GPU: on a CPU the gradient of a few sampled pairs takes none, which leaves a third.
    """
    # Squared distances are products of longer rows.
    width = sizes.dim if distance == "cosine" else sizes.dim + 2
    products = passes * sizes.anchors * sizes.compared * width
    return sizes.cost(sizes.negatives, traffic=gathered_traffic(sizes), products=products)


def batch_softmax(sizes: Sizes) -> tuple[int, int]:
    """Traffic and products of a softmax of every anchor over the batch.

    If all views are compared with all, a pair's product serves two anchors, on a CPU: ids, embeddings and sums go to
    all ranks, and backward the sums' gradients to all and the embeddings' home. Else the anchors go to the keys, and
    backward the sums' gradients to all keys, whose own gradient stays.
    """
    anchors, dim = sizes.anchors, sizes.dim
    if sizes.keys is None:
        return anchors * (ID + 2 * NUMBER * dim + 3 * NUMBER), 2 * anchors**2 * dim
    return softmax_traffic(anchors, dim) + anchors * NUMBER, 4 * anchors * sizes.compared * dim


def row_softmax(sizes: Sizes) -> Cost:
    """Cost of a softmax over one learned row per image or class, and of each anchor's own row.

    Not counted, as they are the optimizer's: the gradient of the rows and its averages.
    """
    images, batch, dim = sizes.images, sizes.batch, sizes.dim
    # The anchors' own rows come from where they are: ids there, rows back.
    traffic = batch * (ID + NUMBER * dim) + softmax_traffic(sizes.anchors, dim)
    # In backward the losses' gradients go to all rows, and those of the anchors' own rows home.
    traffic += sizes.anchors * NUMBER + batch * NUMBER * dim
    products = 4 * sizes.anchors * images * dim
    return sizes.cost(images - 1, traffic=traffic, products=products, rows=images, row_bytes=NUMBER * dim)


def softmax_traffic(anchors: int, dim: int) -> int:
    """Anchors and their ids go to all rows, the sums to all ranks, and the weighted rows home."""
    return anchors * (ID + NUMBER * dim + 2 * NUMBER + NUMBER * dim)


def gathered_traffic(sizes: Sizes) -> int:
    """Embeddings and the ids of images go to all ranks, and the embeddings' gradients home."""
    return sizes.batch * ID + sizes.compared * 2 * NUMBER * sizes.dim


def amount(count: int) -> str:
    """Bytes in the unit that suits them: 7 bytes, 15.5 MB, 266 kB."""
    if count < 1000:
        return f"{count} bytes"
    power = min((len(str(count)) - 1) // 3, 4)
    number = count / 1000**power
    return f"{number:,.{0 if number >= 100 else 1}f} {('kB', 'MB', 'GB', 'TB')[power - 1]}"
