"""All embeddings in one order; with several processes the objectives' parity tests look at it too."""

import torch

from manyviews.objectives.losses import gather_views, share_of_mean


def test_one_process_has_its_own_views_in_their_order() -> None:
    embeddings = torch.randn(3, 4, 5, requires_grad=True)
    found = gather_views(embeddings, torch.tensor([7, 7, 2, 9]))
    assert torch.equal(found.rows, embeddings.flatten(0, 1))
    assert found.ids.tolist() == [7, 7, 2, 9] * 3
    assert found.own.tolist() == list(range(12))
    assert torch.equal(torch.autograd.grad(found.rows.sum(), embeddings)[0], torch.ones(3, 4, 5))


def test_a_mean_of_nothing_is_zero_with_a_zero_gradient() -> None:
    total = torch.tensor(0.0, requires_grad=True)
    mean = share_of_mean(total * 3, torch.tensor(0))
    assert mean == 0
    assert share_of_mean(torch.tensor(6.0), torch.tensor(4)) == 1.5
