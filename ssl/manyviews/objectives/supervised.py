"""Supervised contrast: all embeddings of one id are each other's positives."""

from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from manyviews.engine import log_sum_exp, normalize
from manyviews.engine.rows import distinct, sum_of_groups
from manyviews.objectives.cost import ID, NUMBER, Cost, Sizes, batch_softmax
from manyviews.objectives.losses import float32_island, information, share_of_mean
from manyviews.objectives.objective import Embeddings, Ids, Loss, Objective, Stateless
from manyviews.objectives.settings import ObjectiveSettings, Population, Temperature, Traits
from manyviews.system import distributed


class Supervised(ObjectiveSettings):
    """SupCon (Khosla et al. 2020, equation 2, L_out); `ids=labels` makes classes the positives.

    With images as ids and two views it is NT-Xent.
    """

    traits: ClassVar[Traits] = Traits(compares_embeddings=True, bounds_information=True)

    name: Literal["supervised"] = "supervised"
    temperature: Temperature = 0.1
    """Divides the similarities; smaller: harder negatives count more."""

    def cost(self, sizes: Sizes) -> Cost:
        """Cost of the in-batch loss, and of gathering sums of classes, one row per id and rank.

        On a GPU the in-batch loss has twice as many products, and each rank gathers a row per image.
        """
        traffic, products = batch_softmax(sizes)
        traffic += sizes.batch * (2 * ID + 2 * NUMBER * sizes.dim)
        return sizes.cost(sizes.negatives, traffic=traffic, products=products)

    def build(self, *, dim: int, population: Population, seed: int) -> Objective:
        """Builds the objective; it has no state."""
        return Stateless(lambda z, ids, _: supervised_contrast(z, ids, self.temperature, keys=population.keys))


@float32_island
def supervised_contrast(embeddings: Embeddings, ids: Ids, temperature: float, *, keys: int | None = None) -> Loss:
    """Mean over positives of −log(e^(s/τ) / Σ e^(s/τ)), with the mean outside the logarithm.

    An anchor's positives are all other embeddings of its id, on every rank; the sum is over all embeddings but the
    anchor itself. Anchors without a positive are left out of the mean over anchors: the authors' code divides by zero
    there (a later version by one, which counts them with a loss of zero), and it multiplies the loss by τ / 0.07.

    Each positive with all candidates is InfoNCE of two images of an id, as random draws may be of the same id too: the
    terms have its bound, which P positives keep below log N − log P.

    The similarities with all embeddings of a class add up to that with their sum: memory and traffic are linear, one
    row for each id of each rank.

    With `keys` only the first so many views are compared with, as positives and in the sum.

    Examples:
        >>> z = torch.tensor([[[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]]])
        >>> supervised_contrast(z, torch.tensor([0, 0, 1]), temperature=0.5).total
        tensor(0.3485)
    """
    views, batch, _ = embeddings.shape
    embeddings = normalize(embeddings)
    compared, anchors = embeddings if keys is None else embeddings[:keys], embeddings.flatten(0, 1)
    rows = distributed.counts(len(compared) * batch)
    first = sum(rows[: distributed.rank()])
    own_rows = torch.arange(first, first + len(compared) * batch, device=ids.device)
    others, numbers = (None, None) if keys is None else (compared.flatten(0, 1), own_rows)
    # An anchor that is no key is none of the rows.
    query_ids = F.pad(own_rows, (0, len(anchors) - len(own_rows)), value=-1)
    candidates = log_sum_exp(anchors, others, temperature, query_ids=query_ids, key_ids=numbers, unit=True)
    candidates = candidates.view(views, batch)
    sums, members = class_sums(compared, ids)
    # An anchor that is a key is a member of its class, but not its own positive.
    itself = (torch.arange(views, device=ids.device) < len(compared)).long()[:, None]
    own = compared if keys is None else F.pad(compared, (0, 0, 0, 0, 0, views - keys))
    positives = (members - itself).to(anchors.dtype)
    similarities = (embeddings * (sums - own)).sum(2) / positives.clamp(min=1)
    contrasted = positives > 0
    losses = (candidates - similarities / temperature).where(contrasted, 0)
    total = share_of_mean(losses.sum(), contrasted.sum())
    terms = {
        "positive_similarity": similarities.detach().where(contrasted, 0).sum() / contrasted.sum().clamp(min=1),
        "negatives": (sum(rows) - members).to(anchors.dtype).mean(),
    }
    terms |= information(
        losses.flatten(),
        (sum(rows) - itself).to(losses.dtype).expand_as(losses).flatten(),
        positives=positives.flatten(),
        counted=contrasted.flatten(),
    )
    return Loss(total, terms)


def class_sums(embeddings: Embeddings, ids: Ids) -> tuple[Float[Tensor, "batch dim"], Int[Tensor, " batch"]]:
    """Sum, with gradient, and number of all ranks' embeddings that have each id; collective."""
    own, groups = distinct(ids)
    local = sum_of_groups(embeddings.sum(0), groups, len(own))
    counts = sum_of_groups(torch.full_like(ids, len(embeddings)), groups, len(own))
    lengths = distributed.counts(len(own))
    classes, groups = distinct(distributed.gather_without_gradient(own, lengths))
    sums = sum_of_groups(distributed.gather(local, lengths), groups, len(classes))
    members = sum_of_groups(distributed.gather_without_gradient(counts, lengths), groups, len(classes))
    index = torch.searchsorted(classes, ids)
    return sums[index], members[index]
