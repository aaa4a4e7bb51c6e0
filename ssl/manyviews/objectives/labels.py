"""Continuous labels: how far the images of a batch are from each other in what is known of them."""

import hashlib
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from manyviews.engine import squared_distance_rows
from manyviews.engine.rows import at_least_float32


class Labels(nn.Module):
    """The labels of all images, on every rank, which images have equal ones, and their mean squared distance.

    They follow from the recipe and the images, so that a checkpoint holds no more than their digest: a run goes on
    with the labels it was begun with, or not at all.
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
        """A function of a slice of the first images: squared distances of their labels, and where these are equal.

        The distances of equal labels are 0, and those of an image from equal labels the same, without any rounding.
        """
        kinds, others = self.kinds[first], self.kinds[second]
        # Each label once: a product of matrices may round equal columns differently.
        present, columns = others.unique(return_inverse=True)
        left, right = squared_distance_rows(self.distinct[kinds].to(dtype), self.distinct[present].to(dtype))

        def tile(rows: slice) -> tuple[Tensor, Tensor]:
            equal = kinds[rows, None] == others
            return (left[rows] @ right.T).clamp(min=0)[:, columns].masked_fill(equal, 0), equal

        return tile

    def get_extra_state(self) -> UInt8[Tensor, " bytes"]:
        """The digest, which is what is saved."""
        return self._digest

    def set_extra_state(self, state: UInt8[Tensor, " bytes"]) -> None:
        """Compares a saved digest with that of the labels.

        Raises:
            ValueError: if they are other labels.
        """
        if not torch.equal(state.cpu(), self._digest):
            raise ValueError(
                "the values are not those that the run was begun with (their file was changed), so that distances "
                "would mean something else; start another run with output=…"
            )


def mean_squared_distance(rows: Float[Tensor, "rows dim"]) -> Float[Tensor, ""]:
    """The mean squared distance of two rows, drawn with replacement: twice the sum of the variances."""
    return 2 * (rows - rows.mean(0)).square().sum(1).mean()
