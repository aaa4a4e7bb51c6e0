"""Softmax with an angular margin for the own class: SphereFace, CosFace, ArcFace."""

import math
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from manyviews.engine import log_sum_exp, normalize
from manyviews.engine.rows import at_least_float32
from manyviews.objectives.cost import Cost, Sizes, row_softmax
from manyviews.objectives.losses import average, cross_entropy, float32_island
from manyviews.objectives.objective import Embeddings, Ids, Loss, Objective, Targets
from manyviews.objectives.settings import ObjectiveSettings, Population, Traits
from manyviews.objectives.sharded_rows import LearnedRows, check_ids, fetch
from manyviews.system import distributed

Preset = Literal["norm_face", "sphereface", "cosface", "arcface", "combined_1", "combined_2"]
PRESETS: dict[Preset, dict[str, float | bool | None]] = {
    "norm_face": {"m1": 1.0, "m2": 0.0, "m3": 0.0, "normalized": True, "annealing": None},
    "sphereface": {"m1": 4.0, "m2": 0.0, "m3": 0.0, "normalized": False, "annealing": 0.12},
    "cosface": {"m1": 1.0, "m2": 0.0, "m3": 0.35, "normalized": True, "annealing": None},
    "arcface": {"m1": 1.0, "m2": 0.5, "m3": 0.0, "normalized": True, "annealing": None},
    "combined_1": {"m1": 1.0, "m2": 0.3, "m3": 0.2, "normalized": True, "annealing": None},
    "combined_2": {"m1": 0.9, "m2": 0.4, "m3": 0.15, "normalized": True, "annealing": None},
}


class MarginSoftmax(ObjectiveSettings):
    """Softmax over one unit weight per class, with a margin on the angle θ to the own class.

    The own class' logit is s (cos(m1 θ + m2) − m3), that of any other s cos θ (Deng et al. 2019, equation 4). This
    contains NormFace (Wang et al. 2017), SphereFace (Liu et al. 2017: m1), ArcFace (Deng et al. 2019: m2), CosFace
    (Wang et al. 2018: m3) and their combinations. Classes are the ids: labels with `ids=labels`, or else each image is
    a class of its own. The weights are sharded over the ranks.
    """

    traits: ClassVar[Traits] = Traits(negatives_from="rows", compares_embeddings=True)

    name: Literal["margin_softmax"] = "margin_softmax"
    preset: Preset = "arcface"
    """A paper's m1, m2, m3, normalized and annealing, where they are not given: NormFace, SphereFace (A-Softmax),
    CosFace (LMCL), ArcFace, or two combinations of them."""
    m1: float = Field(1.0, gt=0, le=16)
    """Multiplies the angle to the own class (SphereFace); 1: not at all."""
    m2: float = Field(0.5, ge=0, le=math.pi)
    """Is added to the angle to the own class, in radians (ArcFace)."""
    m3: float = Field(0.0, ge=0, le=2)
    """Is subtracted from the cosine of that angle (CosFace)."""
    scale: float | None = Field(None, gt=0, le=1e4)
    """Multiplies the cosines; null: the least at which an embedding may reach a probability of 0.9999."""
    normalized: bool = True
    """Embeddings of length 1, times the scale; if false, of their own length (SphereFace)."""
    annealing: float | None = Field(None, gt=0, le=1e12)
    """How fast the margin comes in: beside it the cosine has the weight max(5, 1000 / (1 + annealing · step)); null: it
    is there at once, and alone."""

    @model_validator(mode="before")
    @classmethod
    def _start_from_the_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        numbers = next((PRESETS[name] for name in PRESETS if name == values.get("preset", "arcface")), {})
        return {**numbers, **values}

    @model_validator(mode="after")
    def _one_scale(self) -> "MarginSoftmax":
        if self.scale is not None and not self.normalized:
            raise ValueError(
                f"scale={self.scale} is for embeddings of length 1; with normalized=false (preset=sphereface) "
                "their own length takes its place: leave scale out, or set normalized=true"
            )
        return self

    def cost(self, sizes: Sizes) -> Cost:
        """Cost of the softmax without a margin, which is a matter of the anchors' own weights only."""
        return row_softmax(sizes)

    def build(self, *, dim: int, population: Population, seed: int) -> Objective:
        """Builds the objective, with random unit weights by `seed`, equal on any number of ranks."""
        return MarginSoftmaxObjective(self, dim=dim, population=population, seed=seed)


class MarginSoftmaxObjective(LearnedRows):
    """Softmax with a margin and its class weights, free in length and used at length 1."""

    def __init__(self, settings: MarginSoftmax, *, dim: int, population: Population, seed: int) -> None:
        super().__init__(population, dim=dim, seed=seed)
        self.settings = settings
        self.scale = least_scale(self.classes) if settings.scale is None else settings.scale

    @float32_island
    def forward(self, embeddings: Embeddings, ids: Ids, targets: Targets | None, step: int) -> Loss:
        """Cross-entropy of this rank's anchors, averaged over views, over the classes of all ranks.

        Raises:
            ValueError: if an id is not one of the classes (checked on CPU).
        """
        check_ids(ids, self.classes)
        settings, views = self.settings, len(embeddings)
        rows = at_least_float32(embeddings).flatten(0, 1)
        anchors, anchor_ids, weights = normalize(rows), ids.repeat(views), normalize(self.weight)
        own_weights = fetch(weights, self.own.start, ids, distributed.counts(len(ids))).repeat(views, 1)
        angles = angles_between(anchors, own_weights)
        cosines = angles.cos()
        margins = margin_cosine(angles, settings.m1, settings.m2, settings.m3)
        terms = {
            "positive_similarity": cosines.detach().mean(),
            "negatives": torch.full((), float(self.classes - 1), device=ids.device),
            "angle": angles.detach().mean().rad2deg(),
        }
        if settings.annealing is not None:
            weight = annealed(step, settings.annealing)
            margins = (weight * cosines + margins) / (1 + weight)
            terms["lambda"] = torch.full((), weight, device=ids.device)
        if settings.normalized:
            lengths, queries, temperature = torch.full_like(angles, self.scale), anchors, 1 / self.scale
        else:
            lengths, queries, temperature = torch.linalg.vector_norm(rows, dim=1), rows, 1.0
        terms["scale"] = lengths.detach().mean()
        others = log_sum_exp(
            queries,
            weights,
            temperature,
            query_ids=anchor_ids,
            key_ids=self.own_ids(),
            unit=settings.normalized,
            tf32_gradient=settings.normalized,
        )
        return Loss(average(cross_entropy(others, lengths * margins)), terms)


def angles_between(rows: Float[Tensor, "rows dim"], others: Float[Tensor, "rows dim"]) -> Float[Tensor, " rows"]:
    """Angle of each two unit rows, in [0, π], by Kahan's 2 atan2(|a − b|, |a + b|).

    Exact to rounding for every angle, with a gradient of length 1 at most: that of the arc cosine, 1 / sin θ, is
    unbounded near 0 and π, and vanishes where its argument is clamped. The gradient is zero where the rows coincide or
    oppose each other. The angle with a zero row is π / 2.
    """
    difference, total = torch.linalg.vector_norm(rows - others, dim=1), torch.linalg.vector_norm(rows + others, dim=1)
    return 2 * torch.atan2(difference, total)


def margin_cosine(angles: Float[Tensor, "*anchors"], m1: float, m2: float, m3: float) -> Float[Tensor, "*anchors"]:
    """ψ(m1 θ + m2) − m3, with ψ the cosine up to π, and turned over at each π to keep falling.

    ψ(φ) = (−1)ᵏ cos φ − 2k for φ in [kπ, (k + 1)π] (Liu et al. 2017, section 3.2, for φ = m θ): it falls everywhere and
    has a continuous derivative. For m2 the ArcFace paper leaves open θ > π − m2, where the cosine rises again; its
    authors' code continues with cos θ − m2 sin m2 there, which jumps.
    """
    turned = m1 * angles + m2
    folds = (turned.detach() / math.pi).floor()
    signs = 1 - 2 * (folds % 2)
    return signs * turned.cos() - 2 * folds - m3


def annealed(step: int, rate: float) -> float:
    """λ, the weight of the plain cosine: falls from 1,000 as 1 / (1 + rate · step) to 5.

    The target of Liu et al. 2017 is ‖x‖ (λ cos θ + ψ(θ)) / (1 + λ); the numbers, and a rate of 0.12, are those of the
    authors' code.

    Examples:
        >>> annealed(0, 0.12), annealed(100_000, 0.12)
        (1000.0, 5.0)
    """
    return max(5.0, 1000.0 / (1 + rate * step))


def least_scale(classes: int, probability: float = 0.9999) -> float:
    """Smallest s at which an embedding that coincides with its class can have this probability.

    s ≥ (C − 1)/C · ln((C − 1) P / (1 − P)) (Wang et al. 2018, CosFace, section 3.3), for classes as far apart as C
    directions can be, a simplex of cosines −1 / (C − 1).

    Examples:
        >>> round(least_scale(10), 2)
        10.27
    """
    return (classes - 1) / classes * math.log((classes - 1) * probability / (1 - probability))
