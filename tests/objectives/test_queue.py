"""The queue's loss against a double loop, and its contents against a list."""

from typing import Any

import pytest
import torch
from torch import Tensor

from manyviews.objectives import Loss, Population, Queue
from manyviews.objectives.queue import QueueObjective

DIM = 5


def build(size: int = 10, *, seed: int = 0, symmetric: bool = False, temperature: float = 0.2) -> QueueObjective:
    settings = Queue(size=size, symmetric=symmetric, temperature=temperature)
    objective = settings.build(dim=DIM, population=Population(torch.arange(100)), seed=seed).double()
    assert isinstance(objective, QueueObjective)
    return objective


def batch(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    online, twin = torch.randn(2, 2, count, DIM, dtype=torch.float64, generator=generator)
    return online.requires_grad_(), twin


def seen(queue: QueueObjective, online: Tensor, twin: Tensor) -> tuple[Tensor, Tensor]:
    """What encoder and twin see: both views with symmetry, else one each."""
    return (online, twin) if queue.settings.symmetric else (online[:1], twin[1:])


def call(queue: QueueObjective, online: Tensor, ids: Tensor, twin: Tensor, step: int = 0) -> Loss:
    embeddings, targets = seen(queue, online, twin)
    loss = queue(embeddings, ids, targets, step)
    assert isinstance(loss, Loss)
    return loss


def update(queue: QueueObjective, online: Tensor, ids: Tensor, twin: Tensor) -> None:
    embeddings, targets = seen(queue, online, twin)
    queue.update(embeddings, ids, targets)


def unit(row: Tensor) -> Tensor:
    return row / row.norm()


def oracle(
    online: Tensor, twin: Tensor, ids: Tensor, queue: QueueObjective, directions: list[tuple[int, int]]
) -> Tensor:
    losses = []
    for query_view, key_view in directions:
        for i, own in enumerate(ids):
            query = unit(online[query_view, i])
            positive = torch.exp(query @ unit(twin[key_view, i]) / queue.settings.temperature)
            negatives = [
                torch.exp(query @ row / queue.settings.temperature)
                for row, other in zip(queue.queue.rows, queue.queue.ids, strict=True)
                if other != own
            ]
            losses.append(-torch.log(positive / (positive + sum(negatives))))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("temperature", [0.07, 0.2])
def test_loss_and_gradient_equal_the_double_loop(symmetric: bool, temperature: float) -> None:
    queue = build(symmetric=symmetric, temperature=temperature)
    ids = torch.tensor([3, 8, 3, 5])
    for seed in range(4):
        online, twin = batch(4, seed)
        directions = [(0, 1), (1, 0)] if symmetric else [(0, 1)]
        found, expected = call(queue, online, ids, twin, seed).total, oracle(online, twin, ids, queue, directions)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        gradients = torch.autograd.grad(found, online), torch.autograd.grad(expected, online)
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
        update(queue, online, ids + seed, twin)


def labelled(size: int = 10, **settings: Any) -> QueueObjective:
    """A queue for images of which several have one id."""
    objective = Queue(size=size, **settings).build(dim=DIM, population=Population(torch.arange(100) % 9), seed=0)
    assert isinstance(objective, QueueObjective)
    return objective.double()


def supervised_oracle(
    online: Tensor, twin: Tensor, ids: Tensor, queue: QueueObjective, directions: list[tuple[int, int]]
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and of each anchor the candidates and the positives."""
    losses, candidates, positives = [], [], []
    for query_view, key_view in directions:
        for i, own in enumerate(ids):
            query = unit(online[query_view, i])
            keys = [(own, unit(twin[key_view, i])), *zip(queue.queue.ids, queue.queue.rows, strict=True)]
            logits = torch.stack([query @ key / queue.settings.temperature for _, key in keys])
            same = torch.tensor([bool(other == own) for other, _ in keys])
            losses.append(-logits.log_softmax(0)[same].mean())
            candidates.append(len(keys))
            positives.append(int(same.sum()))
    return torch.stack(losses).mean(), torch.tensor(candidates).double(), torch.tensor(positives).double()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("temperature", [0.07, 0.2])
def test_keys_of_the_same_label_are_positives(symmetric: bool, temperature: float) -> None:
    queue, ids = labelled(symmetric=symmetric, temperature=temperature), torch.tensor([3, 8, 3, 5])
    most = 0.0
    for seed in range(4):
        online, twin = batch(4, seed)
        directions = [(0, 1), (1, 0)] if symmetric else [(0, 1)]
        found = call(queue, online, ids, twin, seed)
        expected, candidates, positives = supervised_oracle(online, twin, ids, queue, directions)
        torch.testing.assert_close(found.total, expected, rtol=1e-12, atol=1e-12)
        gradients = torch.autograd.grad(found.total, online), torch.autograd.grad(expected, online)
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
        ceiling = (candidates / positives).log().mean()
        torch.testing.assert_close(found.terms["ceiling"], ceiling)
        torch.testing.assert_close(found.terms["information"], candidates.log().mean() - expected.detach())
        torch.testing.assert_close(found.terms["negatives"], (candidates - positives).mean())
        most = max(most, positives.mean().item())
        update(queue, online, (ids + seed) % 9, twin)
    assert most > 1.5


def test_a_queue_that_holds_the_batch_is_supervised_contrast_of_keys() -> None:
    # Queries that are the keys, and a queue of the other keys of their batch: SupCon over one view of the batch.
    queue, keys = labelled(size=5), torch.randn(6, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ids, losses = torch.tensor([0, 0, 1, 1, 0, 2]), []
    for anchor in range(6):
        others = [row for row in range(6) if row != anchor]
        queue.queue.enqueue(keys[others], ids[others])
        losses.append(
            call(queue, keys[None, [anchor]].repeat(2, 1, 1), ids[[anchor]], keys[None, [anchor]].repeat(2, 1, 1))
        )
    logits = torch.stack([unit(key) for key in keys]) @ torch.stack([unit(key) for key in keys]).T / 0.2
    same = (ids[:, None] == ids).double()
    expected = -(logits.log_softmax(1) * same).sum(1) / same.sum(1)
    torch.testing.assert_close(torch.stack([loss.total for loss in losses]), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
def test_positives_in_a_queue_in_16_bits_differ_by_their_rounding_only(storage: str) -> None:
    losses = []
    for kind in ("float32", storage):
        queue = Queue.model_validate({"size": 64, "storage": kind}).build(
            dim=DIM, population=Population(torch.arange(100) % 3), seed=0
        )
        online, twin = (views.detach().float() for views in batch(6))
        queue.update(online[:1], torch.arange(6) % 3, twin[1:])
        losses.append(queue(online[:1], torch.arange(6) % 3, twin[1:], 1).total)
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=5e-3)


@pytest.mark.parametrize(
    ("size", "counts"), [(10, [4, 4, 4]), (10, [10, 3]), (3, [8, 1, 5]), (7, [7, 7]), (5, [1] * 12)]
)
def test_the_queue_wraps_at_any_batch_size(size: int, counts: list[int]) -> None:
    queue = build(size)
    expected_rows, expected_ids = list(queue.queue.rows.clone()), [-1] * size
    place = received = 0
    for seed, count in enumerate(counts):
        online, twin = batch(count, seed)
        ids = torch.arange(count) + 100 * seed
        update(queue, online, ids, twin)
        for key, number in zip(twin[1], ids.tolist(), strict=True):
            expected_rows[place], expected_ids[place] = unit(key), number
            place, received = (place + 1) % size, received + 1
        torch.testing.assert_close(queue.queue.rows, torch.stack(expected_rows))
        assert queue.queue.ids.tolist() == expected_ids
        assert queue.queue.pointer == place
        assert queue.queue.filled == min(received, size)


@pytest.mark.parametrize("symmetric", [False, True])
def test_what_is_enqueued_is_the_twins_view_1(symmetric: bool) -> None:
    queue, (online, twin) = build(symmetric=symmetric), batch(3)
    update(queue, online, torch.tensor([4, 5, 6]), twin)
    keys = torch.stack([unit(key) for key in twin[1]])
    stored = {int(key): row for key, row in zip(queue.queue.ids, queue.queue.rows, strict=True)}
    torch.testing.assert_close(torch.stack([stored[number] for number in (4, 5, 6)]), keys)


def test_all_rows_have_length_one_at_the_start_and_after_updates() -> None:
    queue = build(20)
    assert (queue.queue.ids == -1).all()
    torch.testing.assert_close(queue.queue.rows.norm(dim=1), torch.ones(20, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    for seed in range(10):
        online, twin = batch(6, seed)
        update(queue, online, torch.arange(6), twin)
    torch.testing.assert_close(queue.queue.rows.norm(dim=1), torch.ones(20, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_a_stored_key_of_the_same_image_is_no_negative() -> None:
    queue = build(4)
    online, twin = batch(4)
    update(queue, online, torch.tensor([1, 2, 3, 4]), twin)
    known, unknown = (
        call(queue, online, torch.tensor([1, 2, 3, 4]), twin, 0),
        call(queue, online, torch.tensor([5, 6, 7, 8]), twin, 0),
    )
    assert known.total < unknown.total
    torch.testing.assert_close(known.total, oracle(online, twin, torch.tensor([1, 2, 3, 4]), queue, [(0, 1)]))


def test_the_loss_sees_the_old_queue_and_changes_nothing() -> None:
    queue = build(symmetric=True)
    before = {name: value.clone() for name, value in queue.state_dict().items()}
    online, twin = batch(4)
    loss = call(queue, online, torch.arange(4), twin, 0).total
    assert all(torch.equal(before[name], value) for name, value in queue.state_dict().items())
    expected = torch.autograd.grad(call(queue, online, torch.arange(4), twin, 0).total, online)
    update(queue, online, torch.arange(4), twin)  # even before backward
    torch.testing.assert_close(torch.autograd.grad(loss, online), expected)


def test_the_twin_receives_no_gradient() -> None:
    online, twin = batch(4)
    twin.requires_grad_()
    call(build(), online, torch.arange(4), twin).total.backward()
    assert twin.grad is None
    assert online.grad is not None


def test_buffers_are_changed_in_place_and_saved_whole() -> None:
    queue, restored = build(seed=1), build(seed=2)
    addresses = {name: value.data_ptr() for name, value in queue.named_buffers()}
    for seed in range(3):
        online, twin = batch(4, seed)
        update(queue, online, torch.arange(4), twin)
    assert {name: value.data_ptr() for name, value in queue.named_buffers()} == addresses
    restored.load_state_dict(queue.state_dict())
    assert {"queue.rows", "queue.ids", "queue.pointer", "queue.filled"} == queue.state_dict().keys()
    for objective in (queue, restored):
        update(objective, batch(4, 9)[0], torch.arange(4), batch(4, 9)[1])
    assert all(torch.equal(value, restored.state_dict()[name]) for name, value in queue.state_dict().items())


def test_missing_targets_and_another_number_of_views_are_refused() -> None:
    online, twin = batch(4)
    with pytest.raises(ValueError, match="momentum twin"):
        build()(online, torch.arange(4), None, 0)
    with pytest.raises(ValueError, match="1 of the encoder and 1 of the twin are not 2 and 2"):
        build(symmetric=True)(online[:1], torch.arange(4), twin[:1], 0)


def test_with_a_size_for_each_process_one_process_has_that_size() -> None:
    assert (
        len(
            Queue(size=7, per_process=True)
            .build(dim=DIM, population=Population(torch.arange(9)), seed=0)
            .state_dict()["queue.rows"]
        )
        == 7
    )


@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
def test_a_queue_in_16_bits_differs_by_their_rounding_only(storage: str) -> None:
    settings = {"size": 64, "symmetric": True}
    wide, narrow = (
        Queue.model_validate({**settings, "storage": kind}).build(
            dim=DIM, population=Population(torch.arange(100)), seed=0
        )
        for kind in ("float32", storage)
    )
    assert isinstance(wide, QueueObjective)
    assert isinstance(narrow, QueueObjective)
    assert narrow.queue.rows.dtype == getattr(torch, storage)
    for seed in range(3):
        online, twin = (views.detach().float() for views in batch(6, seed))
        losses = [call(queue, online, torch.arange(6), twin).total for queue in (wide, narrow)]
        torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=5e-3)
        update(wide, online, torch.arange(6), twin)
        update(narrow, online, torch.arange(6), twin)
