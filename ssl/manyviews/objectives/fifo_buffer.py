"""A first-in-first-out memory of embeddings, spread over the processes."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from manyviews.engine import normalize
from manyviews.objectives.sharded_rows import Storage, unit_rows
from manyviews.system import distributed


class Ring(nn.Module):
    """The last `size` embeddings that were put in, over all processes, with the ids of their images.

    Slot s is the same slot on any number of processes: each owns consecutive ones, and the batch of all processes is
    written in rank order, so that the content does not depend on their number. Slots that have not been written yet
    hold random unit rows of id −1, which no image has.
    """

    rows: Tensor
    ids: Tensor
    pointer: Tensor
    filled: Tensor

    def __init__(self, size: int, dim: int, *, seed: int, storage: Storage = "float32") -> None:
        super().__init__()
        self.size, self.own = size, distributed.share(size)
        self.register_buffer("rows", unit_rows(self.own, dim, seed=seed, storage=storage))
        self.register_buffer("ids", torch.full((len(self.rows),), -1))
        self.register_buffer("pointer", torch.tensor(0))
        self.register_buffer("filled", torch.tensor(0))

    @torch.no_grad()
    def enqueue(self, embeddings: Float[Tensor, "batch dim"], ids: Int[Tensor, " batch"]) -> None:
        """Overwrites the oldest slots with the embeddings, made unit rows, of all processes; any batch size wraps."""
        lengths = distributed.counts(len(ids))
        keys = distributed.gather_without_gradient(normalize(embeddings).to(self.rows.dtype), lengths)
        key_ids = distributed.gather_without_gradient(ids, lengths)
        # Of a batch larger than the ring the last keys remain, where one after the other would have left them.
        skipped = max(len(keys) - self.size, 0)
        places = (self.pointer + torch.arange(skipped, len(keys), device=keys.device)) % self.size - self.own.start
        owned = (places >= 0) & (places < len(self.rows))
        self.rows.index_copy_(0, places[owned], keys[skipped:][owned])
        self.ids.index_copy_(0, places[owned], key_ids[skipped:][owned])
        self.pointer.add_(len(keys)).remainder_(self.size)
        self.filled.add_(len(keys)).clamp_(max=self.size)

    def occupied(self) -> Tensor:
        """Which of the own slots have been written, bool [own slots]: they fill from the first on."""
        slots = torch.arange(self.own.start, self.own.stop, device=self.rows.device)
        return slots.less(self.filled)

    def shards(self) -> dict[str, int]:
        """What is spread over the processes, and its length over all of them."""
        return {"rows": self.size, "ids": self.size}
