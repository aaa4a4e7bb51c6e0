"""A memory bank with one row per image: instance discrimination by the exact softmax over all rows, or by NCE."""

import hashlib
import math
from typing import Annotated, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from contrastive import distributed
from contrastive.objectives.loss import Loss, Objective, ObjectiveSettings, Temperature, cross_entropy, float32_island
from contrastive.objectives.noise import log_mean_exp, noise_contrast, normaliser_from_noise
from contrastive.similarity import log_sum_exp, normalize

NORMALISER_DECAY = 0.9


class Bank(ObjectiveSettings):
    """Non-parametric instance discrimination (Wu et al. 2018), each image a class of its own.

    The defaults are the paper's for ImageNet, but for the estimator: one pass over all rows gives the exact softmax
    and its gradient, at less than the cost of gathering 4,096 rows per image, so NCE is an option and not a need.
    """

    name: Literal["bank"] = "bank"
    temperature: Temperature = 0.07
    """Divides the similarities; smaller: harder negatives count more."""
    momentum: float = Field(0.5, ge=0, lt=1)
    """Share of its old value a row keeps when its image was seen."""
    estimator: Literal["exact", "nce"] = "exact"
    """Softmax over all rows, or noise-contrastive estimation of it from a few."""
    negatives: int = Field(4096, gt=0)
    """Noise rows per anchor (nce)."""
    normaliser: Literal["exact", "first_batch", "ema"] | Annotated[float, Field(gt=0)] = "ema"
    """The softmax's denominator Z: over all rows, from the first batch, its moving average, or a number (nce)."""
    shared: bool = True
    """One draw of noise rows for the whole batch instead of one per image: far cheaper, equal on average (nce)."""

    def build(self, *, dim: int, num_images: int, seed: int) -> Objective:
        """The objective, with a bank of `num_images` random unit rows drawn from `seed`: the same on every process."""
        return BankObjective(self, dim=dim, num_images=num_images, seed=seed)


class BankObjective(Objective):
    """The bank's state: one unit row per image, and log Z (NaN until the first update, for NCE only).

    Every process holds the same whole bank: each applies the embeddings of all processes, in rank order.
    """

    rows: Tensor
    log_normaliser: Tensor
    row_ids: Tensor

    def __init__(self, settings: Bank, *, dim: int, num_images: int, seed: int) -> None:
        super().__init__()
        self.settings = settings
        self.seed = seed
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("rows", normalize(torch.randn(num_images, dim, generator=generator)))
        # The logarithm: at a temperature of 0.01 Z itself would leave float32.
        self.register_buffer("log_normaliser", torch.tensor(math.nan))
        self.register_buffer("row_ids", torch.arange(num_images), persistent=False)
        self._pending_log_normaliser: Tensor | None = None

    @float32_island
    def forward(
        self,
        embeddings: Float[Tensor, "views batch dim"],
        ids: Int[Tensor, " batch"],
        targets: Float[Tensor, "views batch dim"] | None,
        step: int,
    ) -> Loss:
        """The loss of this process's anchors, the mean over views, against the rows as the last step left them.

        Raises:
            ValueError: if an id is not a row of the bank (checked on CPU; a GPU would have to wait for it).
        """
        self._check(ids)
        anchors, anchor_ids = normalize(embeddings).flatten(0, 1), ids.repeat(len(embeddings))
        positives = (anchors * self.rows[anchor_ids]).sum(1)
        terms = {"positive_similarity": positives.detach().mean()}
        if self.settings.estimator == "exact":
            losses = instance_softmax(
                anchors, positives, anchor_ids, self.rows, self.row_ids, self.settings.temperature
            )
        else:
            noise = self._noise_ids(len(ids), step).to(ids.device)
            log_normaliser = self._estimate(anchors.detach(), positives.detach(), anchor_ids, noise)
            self._pending_log_normaliser = log_normaliser
            losses = noise_contrast(
                anchors, positives, anchor_ids, self.rows, noise, log_normaliser, self.settings.temperature
            )
            terms["normaliser"] = log_normaliser.exp()
        return Loss(losses.mean(), terms)

    @torch.no_grad()
    def update(
        self,
        embeddings: Float[Tensor, "views batch dim"],
        ids: Int[Tensor, " batch"],
        targets: Float[Tensor, "views batch dim"] | None,
    ) -> None:
        """Moves the rows of the images seen, by all processes, towards this step's embeddings; keeps the step's Z.

        row ← normalize(momentum · row + (1 − momentum) · mean of the image's embeddings in this step). An image that
        comes more than once, in views, in the batch or on several processes, is averaged first.
        """
        self._check(ids)
        means = distributed.gather_without_gradient(normalize(embeddings).mean(0)).to(self.rows.dtype)
        seen, places = torch.unique(distributed.gather_without_gradient(ids), return_inverse=True)
        # index_put_ adds repeated places in a fixed order on every device; index_add_ on a GPU would not.
        sums = means.new_zeros(len(seen), means.shape[1]).index_put_((places,), means, accumulate=True)
        counts = means.new_zeros(len(seen)).index_put_((places,), means.new_ones(len(places)), accumulate=True)
        momentum = self.settings.momentum
        moved = momentum * self.rows[seen] + (1 - momentum) * sums / counts.unsqueeze(1)
        self.rows.index_copy_(0, seen, normalize(moved))
        if self._pending_log_normaliser is not None:
            self.log_normaliser.copy_(self._pending_log_normaliser)
            self._pending_log_normaliser = None

    def _check(self, ids: Tensor) -> None:
        if ids.device.type == "cpu" and len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < len(self.rows):
            raise ValueError(
                f"the bank has one row per image, ids 0 to {len(self.rows) - 1}; the batch holds ids from "
                f"{int(ids.min())} to {int(ids.max())}; build the bank with the number of training images"
            )

    def _noise_ids(self, batch: int, step: int) -> Tensor:
        """The step's noise, uniform over all rows with replacement: one draw for all, or this process's part."""
        key = hashlib.blake2b(f"{self.seed} {step}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key, "big") >> 1)
        count = self.settings.negatives
        if self.settings.shared:
            return torch.randint(len(self.rows), (count,), generator=generator)
        # The whole batch's draws on every process, so that an image's noise does not depend on their number.
        drawn = torch.randint(len(self.rows), (distributed.size() * batch, count), generator=generator)
        return drawn[distributed.rank() * batch : (distributed.rank() + 1) * batch]

    @torch.no_grad()
    def _estimate(self, anchors: Tensor, positives: Tensor, ids: Tensor, noise: Tensor) -> Tensor:
        """The step's log Z by the chosen rule; the same on every process.

        The original takes the mean over the first batch's scores, positives among them, and keeps it for ever: right
        only while the rows are random, before the first epoch is over. The moving average is the default: it follows
        the rows, at the cost of one more product with the noise. A batch's estimate rests on its anchors times the
        noise rows and is precise already, so it forgets with 0.9, and in the logarithm, which falls as fast as it
        rises: Z grows and shrinks by orders of magnitude while the first rows replace the random ones.
        """
        rule, temperature, stored = self.settings.normaliser, self.settings.temperature, self.log_normaliser
        if not isinstance(rule, str):
            return torch.full_like(stored, math.log(rule))
        if rule == "exact":
            logarithms = log_sum_exp(anchors, self.rows, temperature)
        else:
            logarithms = normaliser_from_noise(anchors, positives, ids, self.rows, noise, temperature)
        local = log_mean_exp(logarithms).to(stored.dtype)
        fresh = log_mean_exp(distributed.gather_without_gradient(local.reshape(1)))
        if rule == "exact":
            return fresh
        kept = stored if rule == "first_batch" else NORMALISER_DECAY * stored + (1 - NORMALISER_DECAY) * fresh
        return torch.where(stored.isnan(), fresh, kept)


def instance_softmax(
    anchors: Float[Tensor, "anchors dim"],
    positives: Float[Tensor, " anchors"],
    ids: Int[Tensor, " anchors"],
    rows: Float[Tensor, "rows dim"],
    row_ids: Int[Tensor, " rows"],
    temperature: float,
) -> Float[Tensor, " anchors"]:
    """Cross-entropy of the softmax over all rows (Wu et al. 2018, equation 2), the anchor's own row as its class.

    `positives` are the products of the anchors with their own rows.
    """
    others = log_sum_exp(anchors, rows, temperature, query_ids=ids, key_ids=row_ids)
    return cross_entropy(others, positives / temperature)
