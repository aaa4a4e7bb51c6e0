"""Continuous labels of all images, and their distances within a batch."""

import hashlib
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from manyviews.engine import squared_distance_rows
from manyviews.engine.rows import at_least_float32, distinct


class Labels(nn.Module):
    """Continuous labels of all images, on every rank, and their mean squared distance.

    They follow from the recipe and the images, so a checkpoint has only their digest: a run cannot be resumed with
    other labels.
    """

    distinct: Tensor
    kinds: Tensor
    scale: Tensor

    def __init__(self, values: Float[Tensor, "images numbers"]) -> None:
        super().__init__()
        values = at_least_float32(values)
        distinct, kinds = values.unique(dim=0, return_inverse=True)
        self.register_buffer("distinct", distinct, persistent=False)
        self.register_buffer("kinds", kinds, persistent=False)
        self.register_buffer("scale", mean_squared_distance(values), persistent=False)
        digest = hashlib.sha256(values.cpu().contiguous().numpy().data)
        self._digest = torch.tensor(list(digest.digest()), dtype=torch.uint8)

    def between(
        self, first: Int[Tensor, " anchors"], second: Int[Tensor, " candidates"], dtype: torch.dtype
    ) -> Callable[[slice], tuple[Float[Tensor, "rows candidates"], Bool[Tensor, "rows candidates"]]]:
        """Function of a slice of the first images: squared label distances, mask of equal labels.

        Equal labels have distance 0, and an image has the same distance from equal labels, without rounding.
        """
        kinds, others = self.kinds[first], self.kinds[second]
        # Each label once: a matrix product may round equal columns differently.
        present, columns = distinct(others)
        left, right = squared_distance_rows(self.distinct[kinds].to(dtype), self.distinct[present].to(dtype))

        def tile(rows: slice) -> tuple[Tensor, Tensor]:
            equal = kinds[rows, None] == others
            return (left[rows] @ right.T).clamp(min=0)[:, columns].masked_fill(equal, 0), equal

        return tile

    def of_pairs(
        self, first: Int[Tensor, "*#pairs"], second: Int[Tensor, "*#pairs"], dtype: torch.dtype
    ) -> tuple[Float[Tensor, "*pairs"], Bool[Tensor, "*pairs"]]:
        """Squared label distances of pairs of images, and a mask of equal labels."""
        kinds, others = self.kinds[first], self.kinds[second]
        differences = self.distinct[kinds].to(dtype) - self.distinct[others].to(dtype)
        return differences.square().sum(-1), kinds == others

    def get_extra_state(self) -> UInt8[Tensor, " bytes"]:
        """The digest, which is saved in checkpoints."""
        return self._digest

    def set_extra_state(self, state: UInt8[Tensor, " bytes"]) -> None:
        """Compares a saved digest with that of the labels.

        Raises:
            ValueError: if the labels are not those of the checkpoint.
        """
        if not torch.equal(state.cpu(), self._digest):
            raise ValueError(
                "the values differ from those at the start of the run (their file was changed), which changes all "
                "distances; start another run with output=…"
            )


def mean_squared_distance(rows: Float[Tensor, "rows dim"]) -> Float[Tensor, ""]:
    """Mean squared distance of two rows drawn with replacement: twice the sum of the variances."""
    return 2 * (rows - rows.mean(0)).square().sum(1).mean()
