"""Learned rows against noise: noise-contrastive estimation, word2vec's negative sampling."""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Annotated, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int, Int64
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from manyviews.engine import normalize, sum_over_tiles
from manyviews.engine.rows import at_least_float32
from manyviews.objectives.cost import ID, NUMBER, Cost, Sizes
from manyviews.objectives.losses import average, cross_entropy, float32_island, share_of_mean, softplus
from manyviews.objectives.objective import Embeddings, Ids, Loss, Objective, Targets
from manyviews.objectives.relations import Lists
from manyviews.objectives.settings import ObjectiveSettings, Population, Temperature, Traits
from manyviews.objectives.sharded_rows import LearnedRows, check_ids, fetch
from manyviews.system import distributed
from manyviews.system.keyed_random import send, torch_generator


class NoiseContrastive(ObjectiveSettings):
    """NCE (Gutmann and Hyvärinen 2010; Mikolov et al. 2013) with one learned row per id.

    With the correction it is noise-contrastive estimation: scores converge to log P(id | anchor) + log Z. Noise may
    then be the anchor's own id: without it scores would converge to the odds. Without the correction it is word2vec's
    negative sampling: scores converge to the log of the odds over the expected noise, which for rare ids, with noise as
    frequent as they are, is the pointwise mutual information minus log k.

    Ids are images or, with `ids=labels`, classes. The rows are learned by the optimizer, where those of `bank` follow
    the embeddings, and are sharded over the ranks.

    Given pairs of images are the real pairs: the embedding of one and the row of the other, as word and context are
    (Mikolov et al. 2013, equation 4), and the other way round. A pair that is not the same is one more noise row; one
    of similarity s is real by s and noise by 1 − s. An image is as frequent as it has pairs; the others are no noise,
    unless the recipe has them as negatives: then as if each were in one pair.
    """

    name: Literal["noise_contrastive"] = "noise_contrastive"
    temperature: Temperature = 0.1
    """Divides the products of embeddings and rows; with normalized=false, 1 is the papers'."""
    normalized: bool = True
    """Embeddings and rows of length 1; if false, of their own lengths, as in the papers."""
    negatives: int | None = Field(None, gt=0, le=16_777_216)
    """Rows drawn as noise, k: with replacement. Null: 1,024 with the correction, which evens them out, and 5 without
    (as word2vec), where each weighs as much as the anchor's own row."""
    shared: bool | None = None
    """One draw of k for all anchors, of all ranks, instead of one for each anchor. Null: shared with the
    correction, for which it is far cheaper and equal on average, and not without (word2vec: k for each pair)."""
    power: float = Field(0.75, ge=0, le=100)
    """An id is drawn by its number of images to this power; 0: all alike (word2vec: 0.75)."""
    correction: bool = True
    """Take log Z and the log of the expected noise, k · P(noise is this id), off the scores. If false they count as
    they are, and noise that is the anchor's own id for nothing (negative sampling)."""
    normaliser: Literal["learned"] | Annotated[float, Field(gt=0, le=1e37)] = "learned"
    """The denominator Z, one for all anchors: learned, from the number of ids on, or a number (correction)."""

    @property
    def traits(self) -> Traits:
        """Information is bounded by InfoNCE over the own row and the noise."""
        return Traits(
            negatives_from="rows",
            noise=self.negatives or (1024 if self.correction else 5),
            one_draw=self.correction if self.shared is None else self.shared,
            relations=("pairs",),
            bounds_information=True,
        )

    def cost(self, sizes: Sizes) -> Cost:
        """Cost of every anchor against the noise, assumed distinct and evenly spread over the ranks."""
        images, batch, dim, processes = sizes.images, sizes.batch, sizes.dim, sizes.processes
        noise = self.traits.noise
        # Ids go to the anchors' own rows, and these back. Then come the noise rows: of one draw all of them, else those
        # of the rank's own anchors. In backward come the gradients.
        traffic = batch * (ID + 2 * NUMBER * dim)
        if self.traits.one_draw:
            drawn = min(noise, images)
            traffic += 2 * processes * -(-drawn // processes) * NUMBER * dim
        else:
            # The products are with the noise of all anchors of a rank.
            drawn = min(noise * -(-sizes.anchors // processes), images)
            traffic += processes * drawn * (ID + 2 * NUMBER * dim)
        products = 3 * sizes.anchors * drawn * dim
        return sizes.cost(noise, traffic=traffic, products=products, rows=images, row_bytes=NUMBER * dim)

    def build(self, *, dim: int, population: Population, seed: int) -> Objective:
        """Builds the objective, with random unit rows by `seed`, equal on any number of ranks."""
        return NoiseContrastiveObjective(self, dim=dim, population=population, seed=seed)


class NoiseContrastiveObjective(LearnedRows):
    """Noise-contrastive loss with its rows, and log Z where it is learned."""

    frequencies: Tensor

    def __init__(self, settings: NoiseContrastive, *, dim: int, population: Population, seed: int) -> None:
        super().__init__(population, dim=dim, seed=seed)
        self.settings, self.seed, self.lists = settings, seed, population.lists
        frequencies = population.ids.bincount()
        if self.lists is not None:
            frequencies = self.lists.related_to(self.classes).clamp(min=int(self.lists.others))
        # Follows from the images, so no part of a checkpoint.
        self.register_buffer("frequencies", frequencies, persistent=False)
        frequencies = frequencies.cpu().double()
        weights = (frequencies**settings.power).where(frequencies > 0, 0)
        self._cumulative = weights.cumsum(0)
        # KL divergence of the ids' frequencies from the noise, Σ p log(p / q): InfoNCE bounds information beyond it.
        shares = frequencies / frequencies.sum()
        self._divergence = float(torch.xlogy(shares, shares * self._cumulative[-1] / weights).sum())
        if settings.correction and settings.normaliser == "learned":
            self.log_normaliser = nn.Parameter(torch.tensor(math.log(self.classes)))

    @float32_island
    def forward(self, embeddings: Embeddings, ids: Ids, targets: Targets | None, step: int) -> Loss:
        """Loss of this rank's anchors against own rows and the step's noise, averaged over views.

        Raises:
            ValueError: if an id has no row (checked on CPU).
        """
        check_ids(ids, self.classes)
        settings, views = self.settings, len(embeddings)
        pairs = None if self.lists is None else pairs_of(embeddings, ids, self.lists)
        if pairs is not None:
            embeddings, ids = pairs.embeddings, pairs.ids
        batch = distributed.counts(len(ids))
        measure = normalize if settings.normalized else at_least_float32
        anchors, anchor_ids = measure(embeddings).flatten(0, 1), ids.repeat(views)
        own_rows = measure(fetch(self.weight, self.own.start, ids, batch)).repeat(views, 1)
        products = (anchors * own_rows).sum(1)
        noise_ids, noise_rows, times = self._noise(batch, views, step, anchors)
        log_normaliser = self._log_normaliser(anchors)
        own_offsets = log_normaliser + self._offsets(anchor_ids, anchors)
        own_logits = products / settings.temperature - own_offsets
        term = partial(
            noise_term,
            ids=None if settings.correction else anchor_ids,
            noise_ids=noise_ids,
            times=times,
            offsets=self._offsets(noise_ids, anchors),
            own_logits=own_logits.detach(),
            temperature=settings.temperature,
            real=None if pairs is None else pairs.same,
        )
        total, figures = sum_over_tiles(anchors, measure(noise_rows), term, log_normaliser)
        anchor_count = torch.full((), len(anchors), device=ids.device)
        cosines = F.cosine_similarity(anchors.detach(), own_rows.detach())
        if pairs is None:
            loss = average(softplus(-own_logits)) + share_of_mean(total, anchor_count)
            similarity = cosines.mean()
        else:
            own = pairs.same * softplus(-own_logits) + (1 - pairs.same) * softplus(own_logits)
            loss = share_of_mean(own.where(pairs.there, 0).sum() + total, pairs.there.sum())
            similarity = share_of_mean((cosines * pairs.same).sum(), pairs.same.sum())
        terms = {"positive_similarity": similarity, "negatives": figures[0] / anchor_count.clamp(min=1)}
        if log_normaliser.requires_grad:
            terms["normaliser"] = log_normaliser.detach().exp()
        # Too few noise rows, too unlike the ids, give no bound.
        if pairs is None and self._divergence < math.log1p(settings.traits.noise):
            terms["information"], terms["ceiling"] = share_of_mean(figures[1:], anchor_count) - self._divergence
        return Loss(loss, terms)

    def _noise(
        self, batch: list[int], views: int, step: int, like: Tensor
    ) -> tuple[Tensor, Tensor, Callable[[slice], Tensor]]:
        """Noise ids of the step, their rows with gradient, and how often anchors drew each.

        If each anchor has its own noise, it depends on the index of its image in the whole batch, and on its view.
        """
        count, key = self.settings.traits.noise, {"seed": self.seed, "step": step}
        if self.settings.traits.one_draw:
            drawn, number = draw(self._cumulative, count, **key).unique(return_counts=True)
            times = send(number.to(like.dtype), like.device)
            return send(drawn, like.device), self._shared_rows(drawn), lambda rows: times
        whole = draw(self._cumulative, sum(batch) * views * count, **key).view(sum(batch), views, count)
        own = whole.split(batch)[distributed.rank()].transpose(0, 1).flatten(0, 1)
        drawn, indices = (send(part, like.device) for part in own.unique(return_inverse=True))
        fetched = fetch(self.weight, self.own.start, drawn, distributed.counts(len(drawn)))

        def times_of(rows: slice) -> Tensor:
            ones = like.new_ones(1, 1).expand_as(indices[rows])
            return like.new_zeros(len(ones), len(drawn)).scatter_add_(1, indices[rows], ones)

        return drawn, fetched, times_of

    def _shared_rows(self, drawn: Tensor) -> Tensor:
        """Rows of ids in rising order, gathered from the ranks that own them, with gradient."""
        rank, world_size = distributed.rank(), distributed.world_size()
        stops = [distributed.share(self.classes, other, world_size).stop for other in range(world_size)]
        edges = torch.searchsorted(drawn, torch.tensor([0, *stops])).tolist()
        own = send(drawn[edges[rank] : edges[rank + 1]], self.weight.device) - self.own.start
        return distributed.gather(self.weight[own], [last - first for first, last in itertools.pairwise(edges)])

    def _log_normaliser(self, like: Tensor) -> Tensor:
        rule = self.settings.normaliser
        if not self.settings.correction:
            return like.new_zeros(())
        return self.log_normaliser if isinstance(rule, str) else like.new_full((), math.log(rule))

    def _offsets(self, ids: Tensor, like: Tensor) -> Tensor:
        """log(k · P(noise is this id)); 0 without the correction."""
        settings = self.settings
        if not settings.correction:
            return like.new_zeros(len(ids))
        expected = math.log(settings.traits.noise) - math.log(float(self._cumulative[-1]))
        return settings.power * self.frequencies[ids].to(like.dtype).log() + expected


class Pairs(NamedTuple):
    """Both embeddings of each pair of queries and items, in the order of the lists."""

    embeddings: Float[Tensor, "views pairs dim"]
    ids: Int[Tensor, " pairs"]
    """Of the other one of each pair."""
    same: Float[Tensor, " all"]
    """How similar the pairs are, of all views."""
    there: Bool[Tensor, " all"]
    """Mask of the pairs that exist."""


def pairs_of(embeddings: Embeddings, ids: Ids, lists: Lists) -> Pairs:
    """Pairs the queries with the items of their lists, and the items with the queries."""
    by_list = torch.arange(len(ids), device=ids.device).view(len(ids) // lists.size, lists.size)
    queries, items = torch.broadcast_tensors(by_list[:, None, :1], by_list[:, None, 1:])
    own, others = torch.cat([queries, items], 1).flatten(), torch.cat([items, queries], 1).flatten()
    same, there = (
        part[:, None].expand(-1, 2, -1).flatten().repeat(len(embeddings)) for part in lists.relevances(ids[by_list])
    )
    return Pairs(embeddings[:, own], ids[others], same.to(at_least_float32(embeddings).dtype), there)


def draw(cumulative: Float64[Tensor, " ids"], count: int, *, seed: int, step: int) -> Int64[Tensor, " count"]:
    """Draws ids by cumulated weights, from seed and step alone; on the CPU for all devices."""
    numbers = torch.rand(count, generator=torch_generator(seed, step), dtype=torch.float64)
    return torch.searchsorted(cumulative, numbers * cumulative[-1], right=True).clamp_(max=len(cumulative) - 1)


def noise_term(
    rows: slice,
    products: Float[Tensor, "anchors noise"],
    log_normaliser: Float[Tensor, ""],
    *,
    ids: Int[Tensor, " all"] | None,
    noise_ids: Int[Tensor, " noise"],
    times: Callable[[slice], Tensor],
    offsets: Float[Tensor, " noise"],
    own_logits: Float[Tensor, " all"],
    temperature: float,
    real: Float[Tensor, " all"] | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, " 3"]]:
    """Σ −log σ(−s) with s = product / τ − log Z − offset, and three sums over the anchors.

    Each noise row counts as often as it was drawn (`times`), but not for an anchor of its own id if `ids`, those of all
    anchors, are given. The losses of each anchor are weighted by `real`, if given. The sums, which are not, are of the
    noise rows N − 1 that counted, of log N minus the InfoNCE loss of the same scores, with `own_logits` those of the
    anchors' own rows, and of log N.
    """
    logits = products / temperature - (log_normaliser + offsets)
    weights = times(rows).expand_as(products)
    if ids is not None:
        weights = weights.masked_fill(ids[rows, None] == noise_ids, 0)
    with torch.no_grad():
        counts = weights.sum(1)
        losses = cross_entropy((logits + weights.log()).logsumexp(1), own_logits[rows])
        highest = counts.log1p()
        figures = torch.stack([counts.sum(), (highest - losses).sum(), highest.sum()])
    if real is not None:
        weights = weights * real[rows, None]
    return (weights * softplus(logits)).sum(), figures
