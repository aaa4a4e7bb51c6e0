"""One learned row for each id, spread over the processes: what objectives with class weights have in common."""

import torch
from jaxtyping import Int
from torch import Tensor, nn

from manyviews.objectives.cost import ID, NUMBER, Cost, Sizes, softmax_traffic
from manyviews.objectives.objective import Objective, Population
from manyviews.objectives.sharded_rows import unit_rows
from manyviews.system import distributed


class LearnedRows(Objective):
    """An objective whose state is one row for each id, in `weight`; each process holds those of its share of the ids.

    The rows begin as random unit rows and are moved by the optimiser; their gradient on each process is the sum over
    the processes' losses.
    """

    def __init__(self, population: Population, *, dim: int, seed: int) -> None:
        super().__init__()
        self.classes = population.size
        self.own = distributed.share(self.classes)
        self.weight = nn.Parameter(unit_rows(self.own, dim, seed=seed))

    def shards(self) -> dict[str, int]:
        """The rows."""
        return {"weight": self.classes}

    def check(self, ids: Int[Tensor, " batch"]) -> None:
        """Refuses ids that have no row; on CPU only, as a GPU would have to wait for it.

        Raises:
            ValueError: naming the ids and the bound.
        """
        if ids.device.type == "cpu" and len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.classes:
            raise ValueError(
                f"there is one row for each of {self.classes} ids, 0 to {self.classes - 1}; the batch holds ids from "
                f"{int(ids.min())} to {int(ids.max())}; build the objective with the ids of all training images"
            )

    def own_ids(self) -> Int[Tensor, " rows"]:
        """The ids whose rows this process holds."""
        return torch.arange(self.own.start, self.own.stop, device=self.weight.device)


def class_softmax_cost(sizes: Sizes) -> Cost:
    """The cost of a softmax over learned rows, one for each image or class, with each anchor's own row.

    Not counted, as they are the optimiser's: the gradient of the rows and its averages.
    """
    images, _, batch, dim, _ = sizes
    # The anchors' own rows come from where they are: ids there, rows back.
    traffic = batch * (ID + NUMBER * dim) + softmax_traffic(sizes.anchors, dim)
    # In backward the losses' gradients go to all rows, and those of the anchors' own rows home.
    traffic += sizes.anchors * NUMBER + batch * NUMBER * dim
    products = 4 * sizes.anchors * images * dim
    return sizes.cost(images - 1, traffic=traffic, products=products, rows=images, row_bytes=NUMBER * dim)
