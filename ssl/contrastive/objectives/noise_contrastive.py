"""Learned rows, each told from rows drawn as noise: noise-contrastive estimation, and word2vec's negative sampling."""

import itertools
import math
from functools import partial
from typing import Annotated, Literal

import torch
from jaxtyping import Float, Float64, Int, Int64
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from contrastive import distributed
from contrastive.objectives.gathered import share_of_mean
from contrastive.objectives.learned_rows import LearnedRows
from contrastive.objectives.loss import (
    Loss,
    Objective,
    ObjectiveSettings,
    Population,
    Temperature,
    average,
    float32_island,
)
from contrastive.objectives.shards import fetch, keyed_generator
from contrastive.similarity import normalize, sum_over_tiles
from contrastive.similarity.rows import at_least_float32


class NoiseContrastive(ObjectiveSettings):
    """Is this row the anchor's, or noise? (Gutmann and Hyvärinen 2010; Mikolov et al. 2013), with one row per id.

    With the correction it is noise-contrastive estimation, in which scores go to log P(id | anchor) + log Z. Noise may
    then be the anchor's own id: without it scores would go to the odds. Without the correction it is word2vec's
    negative sampling, in which scores go to the log of the odds over the expected noise: for rare ids, with noise as
    frequent as they are, that is the pointwise mutual information less log k.

    The ids are images or, with `ids=labels`, classes. The rows are learned by the optimiser, where those of `bank`
    follow the embeddings, and are spread over the processes.
    """

    name: Literal["noise_contrastive"] = "noise_contrastive"
    temperature: Temperature = 0.1
    """Divides the products of embeddings and rows; with normalized=false, 1 is the papers'."""
    normalized: bool = True
    """Embeddings and rows of length 1; if false, of their own lengths, as in the papers."""
    negatives: int | None = Field(None, gt=0)
    """Rows drawn as noise, k: with replacement, and once for all anchors, of all processes. Null: 1,024 with the
    correction, which evens them out, and 5 without (as word2vec), where each weighs as much as the anchor's own row."""
    power: float = Field(0.75, ge=0)
    """An id is drawn by its number of images to this power; 0: all alike (word2vec: 0.75)."""
    correction: bool = True
    """Take log Z and the log of the expected noise, k · P(noise is this id), off the scores. If false they count as
    they are, and noise that is the anchor's own id for nothing (negative sampling)."""
    normaliser: Literal["learned"] | Annotated[float, Field(gt=0)] = "learned"
    """The denominator Z, one for all anchors: learned, from the number of ids on, or a number (correction)."""

    @property
    def count(self) -> int:
        """How many rows are drawn as noise."""
        return self.negatives or (1024 if self.correction else 5)

    def build(self, *, dim: int, population: Population, seed: int) -> Objective:
        """The objective, with random unit rows drawn from `seed`: the same on any number of processes.

        Raises:
            ValueError: if there are fewer than two ids.
        """
        return NoiseContrastiveObjective(self, dim=dim, population=population, seed=seed)


class NoiseContrastiveObjective(LearnedRows):
    """The rows, and log Z where it is learned."""

    frequencies: Tensor

    def __init__(self, settings: NoiseContrastive, *, dim: int, population: Population, seed: int) -> None:
        if population.size < 2:
            raise ValueError(
                f"noise is other ids, and there is {population.size} only: give labels of at least 2 classes, or set "
                "ids=images"
            )
        super().__init__(population, dim=dim, seed=seed)
        self.settings, self.seed = settings, seed
        # Known from the images, so no part of a checkpoint.
        self.register_buffer("frequencies", population.frequencies, persistent=False)
        self._cumulative = (population.frequencies.cpu().double() ** settings.power).cumsum(0)
        if settings.correction and settings.normaliser == "learned":
            self.log_normaliser = nn.Parameter(torch.tensor(math.log(self.classes)))

    @float32_island
    def forward(
        self,
        embeddings: Float[Tensor, "views batch dim"],
        ids: Int[Tensor, " batch"],
        targets: Float[Tensor, "views batch dim"] | None,
        step: int,
    ) -> Loss:
        """The loss of this process's anchors against their own rows and the step's noise, the mean over views.

        Raises:
            ValueError: if an id has no row (checked on CPU).
        """
        self.check(ids)
        settings, views, batch = self.settings, len(embeddings), distributed.counts(len(ids))
        measure = normalize if settings.normalized else at_least_float32
        anchors, anchor_ids = measure(embeddings).flatten(0, 1), ids.repeat(views)
        own_rows = measure(fetch(self.weight, self.own.start, ids, batch)).repeat(views, 1)
        products = (anchors * own_rows).sum(1)
        drawn, times = draw(self._cumulative, settings.count, seed=self.seed, step=step).unique(return_counts=True)
        noise_rows, noise_ids = measure(self._noise_rows(drawn)), drawn.to(ids.device)
        log_normaliser = self._log_normaliser(anchors)
        term = partial(
            noise_term,
            ids=None if settings.correction else anchor_ids,
            noise_ids=noise_ids,
            times=times.to(anchors),
            offsets=self._offsets(noise_ids, anchors),
            temperature=settings.temperature,
        )
        total, figures = sum_over_tiles(anchors, noise_rows, term, log_normaliser)
        anchor_count = torch.tensor(len(anchors), device=ids.device)
        own_offsets = log_normaliser + self._offsets(anchor_ids, anchors)
        own = F.softplus(own_offsets - products / settings.temperature, threshold=40)
        terms = {
            "positive_similarity": F.cosine_similarity(anchors.detach(), own_rows.detach()).mean(),
            "negatives": figures[0] / anchor_count.clamp(min=1),
        }
        if log_normaliser.requires_grad:
            terms["normaliser"] = log_normaliser.detach().exp()
        return Loss(average(own) + share_of_mean(total, anchor_count), terms)

    def _noise_rows(self, drawn: Tensor) -> Tensor:
        """The rows of ids in rising order, from the processes that own them and with gradient to them."""
        shares = [distributed.share(self.classes, rank, distributed.size()) for rank in range(distributed.size())]
        edges = torch.searchsorted(drawn, torch.tensor([0, *(share.stop for share in shares)])).tolist()
        rank = distributed.rank()
        places = drawn[edges[rank] : edges[rank + 1]].to(self.weight.device) - self.own.start
        return distributed.gather(self.weight[places], [last - first for first, last in itertools.pairwise(edges)])

    def _log_normaliser(self, like: Tensor) -> Tensor:
        rule = self.settings.normaliser
        if not self.settings.correction:
            return like.new_zeros(())
        return self.log_normaliser if isinstance(rule, str) else like.new_tensor(math.log(rule))

    def _offsets(self, ids: Tensor, like: Tensor) -> Tensor:
        """log(k · P(noise is this id)) of each id; 0 without the correction."""
        settings = self.settings
        if not settings.correction:
            return like.new_zeros(len(ids))
        expected = math.log(settings.count) - math.log(float(self._cumulative[-1]))
        return settings.power * self.frequencies[ids].to(like.dtype).log() + expected


def draw(cumulative: Float64[Tensor, " ids"], count: int, *, seed: int, step: int) -> Int64[Tensor, " count"]:
    """Ids drawn with replacement from the sums of their weights up to each; from the seed and the step alone.

    On the CPU: one draw serves the whole batch, and is then the same on every device.
    """
    numbers = torch.rand(count, generator=keyed_generator(seed, step), dtype=torch.float64)
    return torch.searchsorted(cumulative, numbers * cumulative[-1], right=True).clamp_(max=len(cumulative) - 1)


def noise_term(
    rows: slice,
    products: Float[Tensor, "anchors noise"],
    log_normaliser: Float[Tensor, ""],
    *,
    ids: Int[Tensor, " all"] | None,
    noise_ids: Int[Tensor, " noise"],
    times: Float[Tensor, " noise"],
    offsets: Float[Tensor, " noise"],
    temperature: float,
) -> tuple[Float[Tensor, ""], Float[Tensor, " 1"]]:
    """Σ −log σ(−s) over anchors and noise, with s = product / τ − log Z − offset, and how many there were.

    Each noise row counts as often as it was drawn (`times`), but not for an anchor of its own id where `ids`, those of
    all anchors, are given.
    """
    logits = products / temperature - (log_normaliser + offsets)
    weights = times.expand_as(products)
    if ids is not None:
        weights = weights.masked_fill(ids[rows, None] == noise_ids, 0)
    return (weights * F.softplus(logits, threshold=40)).sum(), weights.sum()[None]
