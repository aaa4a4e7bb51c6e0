"""Memory bank with one row per image: instance discrimination, exact or estimated."""

import math
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from manyviews.engine import log_sum_exp, normalize
from manyviews.engine.rows import distinct, sum_of_groups
from manyviews.objectives.cost import ID, NUMBER, STEP, Cost, Sizes, row_softmax, softmax_traffic
from manyviews.objectives.losses import average, cross_entropy, float32_island, information, softmax_cross_entropy
from manyviews.objectives.noise import DENSE, Noise, draw, log_sum_over_noise, noise_contrast, normaliser_from_noise
from manyviews.objectives.objective import Embeddings, Ids, Loss, Objective, Taken, Targets
from manyviews.objectives.settings import ObjectiveSettings, Population, Temperature, Traits
from manyviews.objectives.sharded_rows import LearnedRows, Storage, check_ids, fetch, overwrite, owned, unit_rows
from manyviews.system import distributed

NORMALISER_DECAY = 0.9


class Bank(ObjectiveSettings):
    """Non-parametric instance discrimination (Wu et al. 2018), each image a class of its own.

    The defaults are the paper's for ImageNet, except for the estimator: one pass over all rows gives the exact softmax
    and its gradient. The negatives of each anchor are all other rows (exact, parametric) or those drawn as noise (nce,
    infonce), on any number of ranks, which share the rows; they do not grow with gradient accumulation.

    Examples:
        >>> Bank().build(dim=2, population=Population(torch.arange(3)), seed=0).rows.shape
        torch.Size([3, 2])
    """

    name: Literal["bank"] = "bank"
    temperature: Temperature = 0.07
    """Divides the similarities; smaller: harder negatives count more."""
    momentum: float = Field(0.5, ge=0, lt=1)
    """Share of its old value a row keeps when its image was seen."""
    proximal: float = Field(0.0, ge=0, le=1e6)
    """Weight of the squared distance to the image's own row, which slows the embeddings (Wu et al. 2018, 3.3)."""
    storage: Storage = "float32"
    """Number format of the rows; the 16-bit formats halve the memory. Arithmetic is float32 all the same."""
    estimator: Literal["exact", "nce", "infonce", "parametric"] = "exact"
    """Softmax over all rows; noise-contrastive estimation; softmax over rows drawn; or learned weights for rows."""
    negatives: int = Field(4096, gt=0, le=16_777_216)
    """Noise rows per anchor (nce, infonce)."""
    shared: bool = True
    """One draw of noise rows for the whole batch instead of one per image: far cheaper, equal on average."""
    normaliser: Literal["exact", "first_batch", "ema"] | Annotated[float, Field(gt=0, le=1e37)] = "ema"
    """The softmax's denominator Z: over all rows, from the first batch, its moving average, or a number (nce)."""
    normaliser_every: int = Field(1, gt=0, le=1_000_000_000)
    """Steps between two sums over all rows, where the normaliser is exact (nce)."""

    @model_validator(mode="after")
    def _parametric_alone(self) -> "Bank":
        if self.estimator == "parametric" and (self.storage != "float32" or self.proximal):
            raise ValueError(
                f"storage={self.storage} and proximal={self.proximal} are for rows that embeddings move; "
                "estimator=parametric learns its weights by the optimiser: leave both out"
            )
        return self

    @property
    def traits(self) -> Traits:
        """With NCE the scores bound information too, by InfoNCE over the rows that were drawn."""
        return Traits(
            negatives_from="rows",
            images_only="which has one row per image",
            bounds_information=True,
            noise=self.negatives if self.estimator in ("nce", "infonce") else 0,
            one_draw=self.shared,
            follows_images=self.estimator != "parametric",
        )

    def cost(self, sizes: Sizes) -> Cost:
        """Cost of every anchor against all rows, or those drawn; rows are sharded over the ranks."""
        if self.estimator == "parametric":
            return row_softmax(sizes)
        images, batch, dim = sizes.images, sizes.batch, sizes.dim
        anchors, number = sizes.anchors, getattr(torch, self.storage).itemsize
        # The anchors' own rows come from where they are: ids there, rows back. What was seen goes to its rows.
        traffic = batch * (ID + number * dim) + batch * (ID + NUMBER * dim)
        if self.estimator == "exact":
            traffic, products = traffic + softmax_traffic(anchors, dim), 2 * anchors * images * dim
        else:
            traffic, products = traffic + self._noise_traffic(anchors, dim), self._noise_products(sizes)
        negatives = self.traits.noise or images - 1
        return sizes.cost(negatives, traffic=traffic, products=products, rows=images, row_bytes=number * dim + STEP)

    def _noise_traffic(self, anchors: int, dim: int) -> int:
        """Bytes of anchors and ids to the noise rows, and of maxima, sums and weighted rows back."""
        there, home = anchors * (ID + NUMBER * dim), anchors * NUMBER * dim
        logarithm = there + anchors * 3 * NUMBER
        if self.estimator == "infonce":
            return logarithm + home
        # The log-sum over the noise, without gradient, is what the information is bounded by.
        loss = there + anchors * NUMBER + home + logarithm
        averaged = anchors * NUMBER
        if self.normaliser == "exact":
            # Over all rows without exception, and without gradient: neither ids travel, nor rows.
            return loss + averaged + softmax_traffic(anchors, dim) - anchors * ID - home
        return loss + (averaged if self.normaliser == "ema" else 0)

    def _noise_products(self, sizes: Sizes) -> int:
        """Products for scores (with NCE twice) and the weighted mean of the noise rows."""
        # With noise for each image, products with all rows may cost less time than gathering the few.
        dense = not self.shared and -(-sizes.images // sizes.processes) <= DENSE * self.negatives
        scores = sizes.anchors * (sizes.images if dense else self.negatives) * sizes.dim
        if self.estimator == "nce" and self.normaliser == "exact":
            return 3 * scores + sizes.anchors * sizes.images * sizes.dim
        return scores * (3 if self.estimator == "nce" else 2)

    def build(self, *, dim: int, population: Population, seed: int) -> Objective:
        """Builds the objective, with random unit rows by `seed`, equal on any number of ranks."""
        if self.estimator == "parametric":
            return ParametricObjective(self.temperature, dim=dim, population=population, seed=seed)
        return BankObjective(self, dim=dim, num_images=len(population.ids), seed=seed, keys=population.keys)


class BankObjective(Objective):
    """Bank of unit rows, with the step of each row's last update, and log Z (NaN until known).

    Each rank holds the rows of the ids in `distributed.share(num_images)`: anchors travel to all rows, and embeddings
    to the rows that they update.
    """

    rows: Tensor
    written: Tensor
    steps: Tensor
    log_normaliser: Tensor

    def __init__(self, settings: Bank, *, dim: int, num_images: int, seed: int, keys: int | None = None) -> None:
        super().__init__()
        self.settings, self.num_images, self.seed, self.keys = settings, num_images, seed, keys
        self.own = distributed.share(num_images)
        self.register_buffer("rows", unit_rows(self.own, dim, seed=seed, storage=settings.storage))
        self.register_buffer("written", torch.zeros(len(self.rows), dtype=torch.int32))
        self.register_buffer("steps", torch.tensor(0, dtype=torch.int32))
        # The logarithm: at a temperature of 0.01 Z itself would leave float32.
        self.register_buffer("log_normaliser", torch.tensor(math.nan))
        self._pending_log_normaliser: Tensor | None = None
        self._normaliser_known = False

    def shards(self) -> dict[str, int]:
        """The rows and when they were written."""
        return {"rows": self.num_images, "written": self.num_images}

    @float32_island
    def forward(self, embeddings: Embeddings, ids: Ids, targets: Targets | None, step: int) -> Loss:
        """Loss of this rank's anchors, averaged over views, against the rows of the last step.

        Raises:
            ValueError: if an id is not a row of the bank (checked on CPU).
        """
        check_ids(ids, self.num_images)
        settings, views, lengths = self.settings, len(embeddings), distributed.counts(len(ids))
        anchors, anchor_ids = normalize(embeddings).flatten(0, 1), ids.repeat(views)
        own_rows = fetch(self.rows, self.own.start, ids, lengths).to(anchors.dtype).repeat(views, 1)
        positives = (anchors * own_rows).sum(1)
        terms = {"positive_similarity": positives.detach().mean(), "staleness": self.staleness()}
        if settings.estimator == "exact":
            row_ids = torch.arange(self.own.start, self.own.stop, device=ids.device)
            losses = softmax_cross_entropy(anchors, positives, anchor_ids, self.rows, row_ids, settings.temperature)
            negatives, bounding = torch.full_like(positives, self.num_images - 1), losses
        else:
            images = None if settings.shared else sum(lengths)
            drawn = draw(self.num_images, settings.negatives, images, seed=self.seed, step=step)
            noise = Noise(self.rows, self.own.start, self.num_images, drawn, lengths)
            own_hits = noise.own_hits(ids).repeat(views)
            negatives = (settings.negatives - own_hits).to(positives.dtype)
            losses, log_normaliser, others = self._estimated(anchors, positives, anchor_ids, noise, own_hits, step)
            if log_normaliser is not None:
                self._pending_log_normaliser = log_normaliser
                terms["normaliser"] = log_normaliser.exp()
            bounding = losses if others is None else cross_entropy(others, positives.detach() / settings.temperature)
        terms |= information(bounding, 1 + negatives)
        terms["negatives"] = negatives.mean()
        if settings.proximal:
            losses = losses + settings.proximal * (anchors - own_rows).square().sum(1)
        return Loss(average(losses), terms)

    @torch.no_grad()
    def update(self, embeddings: Embeddings, ids: Ids, targets: Targets | None, taken: Taken | None = None) -> None:
        """Moves the rows of all ranks' images towards their embeddings; stores the step's Z.

        row ← normalize(momentum · row + (1 − momentum) · mean of the image's embeddings in this step), over views but
        local ones, repetitions in the batch and ranks.
        """
        check_ids(ids, self.num_images)
        lengths = distributed.counts(len(ids))
        means = distributed.gather_without_gradient(normalize(embeddings[: self.keys]).mean(0), lengths)
        indices = distributed.gather_without_gradient(ids, lengths) - self.own.start
        if indices.device.type == "cpu":
            here = owned(self.rows, indices)
            means, indices = means[here], indices[here]
        self.steps += 1 if taken is None else taken.int()
        if len(self.rows):
            seen, groups = distinct(indices)
            sums = sum_of_groups(means, groups, len(seen))[groups]
            counts = sum_of_groups(means.new_ones(len(means)), groups, len(seen))[groups]
            momentum = self.settings.momentum
            # Once for each image of the batch: those of equal images are equal.
            moved = momentum * self.rows[indices % len(self.rows)].to(sums.dtype)
            moved = normalize(moved + (1 - momentum) * sums / counts.unsqueeze(1))
            overwrite(self.rows, indices, moved.to(self.rows.dtype), taken)
            overwrite(self.written, indices, self.steps.expand(len(indices)), taken)
        if self._pending_log_normaliser is not None:
            fresh, self._pending_log_normaliser = self._pending_log_normaliser, None
            self.log_normaliser.copy_(fresh if taken is None else fresh.where(taken, self.log_normaliser))
            self._normaliser_known = self._normaliser_known or taken is None

    def staleness(self) -> Float[Tensor, ""]:
        """Mean number of steps since this rank's rows were written."""
        return self.steps - self.written.sum(dtype=torch.int64) / max(len(self.written), 1)

    def _estimated(
        self, anchors: Tensor, positives: Tensor, ids: Tensor, noise: Noise, own_hits: Tensor, step: int
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Losses by noise rows; for NCE also log Z, equal on all ranks, and log-sums over noise."""
        temperature, rule = self.settings.temperature, self.settings.normaliser
        if self.settings.estimator == "infonce":
            others = log_sum_over_noise(anchors, ids, noise, temperature)
            return cross_entropy(others, positives / temperature), None, None
        due = step % self.settings.normaliser_every == 0
        with torch.no_grad():
            others = log_sum_over_noise(anchors.detach(), ids, noise, temperature)
            if not isinstance(rule, str):
                log_normaliser = torch.full_like(self.log_normaliser, math.log(rule))
            elif (rule == "first_batch" or (rule == "exact" and not due)) and self._has_normaliser():
                log_normaliser = self.log_normaliser.clone()
            else:
                if rule == "exact":
                    logarithms = log_sum_exp(anchors.detach(), self.rows, temperature, unit=True)
                else:
                    logarithms = normaliser_from_noise(others, positives, own_hits, noise, temperature)
                log_normaliser = self._averaged(logarithms)
        losses = noise_contrast(anchors, positives, ids, noise, log_normaliser, temperature)
        return losses, log_normaliser, others

    def _has_normaliser(self) -> bool:
        """Whether log Z is known; a GPU is waited for only until it is."""
        self._normaliser_known = self._normaliser_known or not bool(self.log_normaliser.isnan())
        return self._normaliser_known

    def _averaged(self, logarithms: Tensor) -> Tensor:
        """Averages the anchors' estimates of log Z over all ranks and, with `ema`, over steps.

        The original keeps the mean over the first batch's scores, positives among them, for ever: right only while the
        rows are random, before the end of the first epoch. The moving average follows the rows, at the cost of one more
        product with the noise. An estimate is precise already, by its anchors times the noise rows: hence the decay of
        0.9. It averages logarithms, which fall as fast as they rise: Z changes by orders of magnitude while the first
        rows replace the random ones.
        """
        stored = self.log_normaliser
        logarithms = distributed.gather_without_gradient(logarithms)
        fresh = (logarithms.logsumexp(0) - math.log(len(logarithms))).to(stored.dtype)
        if self.settings.normaliser != "ema":
            return fresh
        return torch.where(stored.isnan(), fresh, NORMALISER_DECAY * stored + (1 - NORMALISER_DECAY) * fresh)


class ParametricObjective(LearnedRows):
    """Parametric softmax over one learned row per image, with which the bank is compared.

    P(i|f) = exp(wᵢ·f/τ) / Σⱼ exp(wⱼ·f/τ) (Wu et al. 2018, equation 1, with its temperature). The weights start as the
    bank's rows do and are free in length.
    """

    def __init__(self, temperature: float, *, dim: int, population: Population, seed: int) -> None:
        super().__init__(population, dim=dim, seed=seed)
        self.temperature = temperature

    @float32_island
    def forward(self, embeddings: Embeddings, ids: Ids, targets: Targets | None, step: int) -> Loss:
        """Cross-entropy of this rank's anchors, each image its own class, averaged over views.

        Raises:
            ValueError: if an id is not one of the images (checked on CPU).
        """
        check_ids(ids, self.classes)
        views, lengths = len(embeddings), distributed.counts(len(ids))
        anchors, anchor_ids = normalize(embeddings).flatten(0, 1), ids.repeat(views)
        own_weights = fetch(self.weight, self.own.start, ids, lengths).repeat(views, 1)
        products = (anchors * own_weights).sum(1)
        losses = softmax_cross_entropy(
            anchors, products, anchor_ids, self.weight, self.own_ids(), self.temperature, unit=False
        )
        negatives = torch.full((), float(self.classes - 1), device=ids.device)
        similarities = products.detach() / torch.linalg.vector_norm(own_weights.detach(), dim=1).clamp(min=1e-6)
        terms = {"positive_similarity": similarities.mean(), "negatives": negatives}
        return Loss(average(losses), terms | information(losses, 1 + negatives.expand_as(losses)))
