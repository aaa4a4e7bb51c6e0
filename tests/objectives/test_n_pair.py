"""N-pair losses against the paper's sums in float64, against another library, and at their limits."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from triples import rival

from manyviews.objectives import Population
from manyviews.objectives.n_pair import Form, NPair, n_pair, pairs_of

LABELS = {"distinct": range(7), "repeated": [4, 4, 9, 4, 1, 0, 9], "one class": [3] * 7}
FORMS: tuple[Form, ...] = ("multi_class", "one_vs_one")


def embeddings(views: int = 2, batch: int = 7, dim: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(views)
    return torch.randn(views, batch, dim, dtype=torch.float64, generator=generator).requires_grad_()


def loss(
    z: Tensor, ids: Tensor, form: Form = "multi_class", *, symmetric: bool = False, penalty: float = 0.0
) -> Tensor:
    return n_pair(z, ids, form=form, symmetric=symmetric, norm_penalty=penalty).total


def by_hand(z: Tensor, ids: Tensor) -> list[tuple[int, Tensor, Tensor]]:
    """The pairs of each id: its first embedding with its second, its third with its fourth."""
    found: dict[int, list[Tensor]] = {}
    for row, label in zip(z.flatten(0, 1), ids.repeat(len(z)).tolist(), strict=True):
        found.setdefault(label, []).append(row)
    return [(label, own[i], own[i + 1]) for label, own in found.items() for i in range(0, len(own) - 1, 2)]


def oracle(pairs: list[tuple[int, Tensor, Tensor]], form: Form) -> Tensor:
    losses = []
    for label, anchor, positive in pairs:
        differences = [anchor @ other - anchor @ positive for its, _, other in pairs if its != label]
        if form == "multi_class":
            losses.append(torch.log(1 + sum((d.exp() for d in differences), torch.zeros(()).double())))
        else:
            losses.append(sum((torch.log(1 + d.exp()) for d in differences), 0 * (anchor @ positive)))
    return torch.stack(losses).mean()


@pytest.mark.parametrize(
    ("views", "kind"),
    # One view of distinct images makes no pair.
    [(views, kind) for views in (1, 2, 3) for kind in LABELS if (views, kind) != (1, "distinct")],
)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_loss_and_gradient_equal_the_double_loop(views: int, kind: str, form: Form, symmetric: bool) -> None:
    z, ids = embeddings(views), torch.tensor(list(LABELS[kind]))
    pairs = by_hand(z, ids)
    expected = oracle(pairs, form)
    if symmetric:
        expected = (expected + oracle([(label, positive, anchor) for label, anchor, positive in pairs], form)) / 2
    lengths = torch.stack([row.square().sum() for _, *pair in pairs for row in pair])
    found = loss(z, ids, form, symmetric=symmetric, penalty=0.2)
    expected = expected + 0.1 * lengths.mean()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(found, z), torch.autograd.grad(expected, z), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("views", [1, 2])
def test_both_ways_round_is_the_mean_of_one_way_and_the_other(form: Form, views: int) -> None:
    z, ids = embeddings(views, 8), torch.arange(8) // (3 - views)
    # What is exchanged are the views, or the two images of each class.
    other = z.flip(0) if views == 2 else z[:, torch.tensor([1, 0, 3, 2, 5, 4, 7, 6])]
    found = n_pair(z, ids, form=form, symmetric=True, norm_penalty=0.1)
    ways = [n_pair(one, ids, form=form, symmetric=False, norm_penalty=0.1) for one in (z, other)]
    torch.testing.assert_close(found.total, (ways[0].total + ways[1].total) / 2, rtol=1e-12, atol=0)
    for name, term in found.terms.items():
        torch.testing.assert_close(term, (ways[0].terms[name] + ways[1].terms[name]) / 2, rtol=1e-12, atol=1e-12)


def test_both_ways_round_is_clips_loss() -> None:
    z = embeddings(batch=20, dim=16)
    logits = z[0] @ z[1].T
    expected = (F.cross_entropy(logits, torch.arange(20)) + F.cross_entropy(logits.T, torch.arange(20))) / 2
    torch.testing.assert_close(loss(z, torch.arange(20), symmetric=True), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_softmax_says_how_much_information_it_shows(symmetric: bool) -> None:
    z, ids = embeddings(), torch.tensor([1, 1, 4, 5, 6, 7, 7])
    found = n_pair(z, ids, form="multi_class", symmetric=symmetric, norm_penalty=0.3)
    plain = loss(z, ids, symmetric=symmetric)
    ceiling = (4 * math.log(6) + 3 * math.log(7)) / 7
    assert found.terms["ceiling"].item() == pytest.approx(ceiling)
    assert found.terms["information"].item() == pytest.approx(ceiling - plain.item())
    assert "information" not in n_pair(z, ids, form="one_vs_one", symmetric=symmetric, norm_penalty=0.3).terms


@pytest.mark.parametrize("form", FORMS)
def test_one_pair_of_each_id_is_the_papers_batch(form: Form) -> None:
    z = embeddings()
    anchors, positives = z
    differences = anchors @ positives.T - (anchors * positives).sum(1, keepdim=True)
    exponentials = differences.exp() * (1 - torch.eye(7))
    inside = 1 + exponentials.sum(1) if form == "multi_class" else (1 + exponentials).prod(1)
    torch.testing.assert_close(loss(z, torch.arange(7), form), inside.log().mean(), rtol=1e-12, atol=0)


def test_two_images_of_a_class_are_the_same_batch_as_two_views_of_an_image() -> None:
    z = embeddings()
    mixed = torch.stack([z[0, 0], z[0, 1], z[1, 1], z[1, 0], *z[0, 2:], *z[1, 2:].flip(0)])
    ids = torch.tensor([0, 1, 1, 0, *range(2, 7), *reversed(range(2, 7))])
    for form in FORMS:
        found, expected = loss(mixed.unsqueeze(0), ids, form), loss(z, torch.arange(7), form)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_the_softmax_over_pairs_equals_pytorch_metric_learning() -> None:
    losses = rival("pytorch_metric_learning.losses")
    distances = rival("pytorch_metric_learning.distances")
    # Its default normalises the embeddings, which the paper warns of; it takes the first pair of each class.
    oracle = losses.NPairsLoss(distance=distances.DotProductSimilarity(normalize_embeddings=False))
    z = embeddings(batch=20, dim=16)
    found, expected = loss(z, torch.arange(20)), oracle(z.flatten(0, 1), torch.arange(20).repeat(2))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.autograd.grad(found, z), torch.autograd.grad(expected, z), rtol=1e-4, atol=1e-8)


def test_pairs_are_made_of_neighbours_of_the_same_id() -> None:
    pairs = pairs_of(torch.tensor([3, 1, 3, 3, 1, 2, 3, 3]))
    assert list(zip(*map(Tensor.tolist, pairs[:2]), strict=True)) == [(1, 4), (0, 2), (3, 6)]
    assert [part.tolist() for part in pairs_of(torch.arange(3).repeat(2))[:2]] == [[0, 1, 2], [3, 4, 5]]
    assert [len(part) for part in (*pairs_of(torch.tensor([7])), *pairs_of(torch.arange(0)))] == [0] * 6


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_without_any_pair_has_no_loss_and_no_gradient(form: Form) -> None:
    z = embeddings(views=1)
    for batch in (7, 1):
        found = n_pair(z[:, :batch], torch.arange(batch), form=form, symmetric=True, norm_penalty=0.1)
        assert found.total == 0
        assert not any(found.terms.values())
        assert not torch.autograd.grad(found.total, z)[0].any()


@pytest.mark.parametrize("form", FORMS)
def test_pairs_of_one_id_alone_have_no_negative_and_no_loss(form: Form) -> None:
    z = embeddings()
    found = loss(z, torch.zeros(7, dtype=torch.int64), form)
    assert found == 0
    assert not torch.autograd.grad(found, z)[0].any()


def test_terms_say_what_the_anchors_meet() -> None:
    z, ids = embeddings(), torch.tensor([1, 1, 4, 5, 6, 7, 7])
    terms = n_pair(z, ids, form="multi_class", symmetric=False, norm_penalty=0.0).terms
    pairs = by_hand(z, ids)
    similarities = [torch.cosine_similarity(anchor, positive, dim=0) for _, anchor, positive in pairs]
    torch.testing.assert_close(terms["positive_similarity"], torch.stack(similarities).mean().detach())
    assert terms["negatives"].item() == pytest.approx((4 * 5 + 3 * 6) / 7)


def test_equal_embeddings_cost_the_logarithm_of_the_pairs() -> None:
    z = torch.ones(2, 16, 4, dtype=torch.float64)
    assert loss(z, torch.arange(16)).item() == pytest.approx(math.log(16))
    assert loss(z, torch.arange(16), "one_vs_one").item() == pytest.approx(15 * math.log(2))


@pytest.mark.parametrize(
    "given", [{}, {"form": "one_vs_one"}, {"symmetric": True}, {"norm_penalty": 0.5}], ids=lambda given: str(given)
)
def test_the_module_passes_its_settings_on(given: dict[str, Any]) -> None:
    z, ids = embeddings(), torch.arange(7) % 4
    module = NPair(**given).build(dim=5, population=Population(torch.arange(7)), seed=0)
    options = {"form": "multi_class", "symmetric": False, "norm_penalty": 3e-3} | given
    assert torch.equal(module(z, ids, None, 0).total, n_pair(z, ids, **options).total)
