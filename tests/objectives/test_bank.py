"""Instance discrimination, exact and by NCE, against double loops; the bank's rows against their rule by hand."""

import math

import pytest
import torch
from torch import Tensor

from contrastive.objectives import Bank
from contrastive.objectives.bank import BankObjective
from contrastive.objectives.noise import noise_contrast, normaliser_from_noise

DIM, IMAGES = 5, 12


def build(seed: int = 0, **settings: object) -> BankObjective:
    objective = Bank.model_validate(settings).build(dim=DIM, num_images=IMAGES, seed=seed).double()
    assert isinstance(objective, BankObjective)
    return objective


def batch(count: int = 4, views: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(views, count, DIM, dtype=torch.float64, generator=generator).requires_grad_()


def unit(row: Tensor) -> Tensor:
    return row / row.norm()


def noise_of(bank: BankObjective, batch_size: int, step: int) -> Tensor:
    """The draws of one step as [batch, m]."""
    drawn = bank._noise_ids(batch_size, step)
    return drawn.expand(batch_size, -1) if drawn.ndim == 1 else drawn


def exact_oracle(embeddings: Tensor, ids: Tensor, rows: Tensor, temperature: float) -> Tensor:
    losses = []
    for view in embeddings:
        for embedding, own in zip(view, ids, strict=True):
            exponentials = torch.stack([torch.exp(unit(embedding) @ row / temperature) for row in rows])
            losses.append(-torch.log(exponentials[own] / exponentials.sum()))
    return torch.stack(losses).mean()


def nce_oracle(embeddings: Tensor, ids: Tensor, rows: Tensor, noise: Tensor, z: float, temperature: float) -> Tensor:
    """As the paper writes it: J = −log h(i) − Σ log(1 − h(noise)), h = P / (P + m / n)."""
    share, losses = noise.shape[1] / len(rows), []
    for view in embeddings:
        for embedding, own, drawn in zip(view, ids, noise, strict=True):
            probability = {
                j: torch.exp(unit(embedding) @ rows[j] / temperature) / z for j in {*drawn.tolist(), int(own)}
            }
            loss = -torch.log(probability[int(own)] / (probability[int(own)] + share))
            for j in drawn.tolist():
                if j != own:
                    loss = loss - torch.log(share / (probability[j] + share))
            losses.append(loss)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_exact_loss_and_gradient_equal_the_double_loop(views: int, temperature: float) -> None:
    bank, ids = build(temperature=temperature), torch.tensor([3, 11, 3, 0])
    for seed in range(3):
        z = batch(views=views, seed=seed)
        found, expected = bank(z, ids, None, seed).total, exact_oracle(z, ids, bank.rows, temperature)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            torch.autograd.grad(found, z), torch.autograd.grad(expected, z), rtol=1e-9, atol=1e-12
        )
        bank.update(z, ids, None)


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("negatives", [1, 9, 40])
def test_nce_loss_and_gradient_equal_the_double_loop(views: int, shared: bool, negatives: int) -> None:
    bank = build(estimator="nce", shared=shared, negatives=negatives, normaliser=30.0)
    ids = torch.tensor([3, 11, 3, 0])
    for step in range(3):
        z = batch(views=views, seed=step)
        found = bank(z, ids, None, step)
        expected = nce_oracle(z, ids, bank.rows, noise_of(bank, 4, step), 30.0, 0.07)
        torch.testing.assert_close(found.total, expected, rtol=1e-11, atol=1e-11)
        gradients = torch.autograd.grad(found.total, z), torch.autograd.grad(expected, z)
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found.terms["normaliser"].item(), 30.0)
        bank.update(z, ids, None)


def test_nce_where_every_row_is_as_likely_as_noise_has_its_known_value() -> None:
    # P = 1/n for every row: log(1 + m) + m log(1 + 1/m).
    rows, m, n = torch.ones(50, 1, dtype=torch.float64), 16, 50
    anchors, ids = torch.ones(3, 1, dtype=torch.float64), torch.arange(3)
    noise, log_z = torch.arange(10, 10 + m), torch.tensor(1 / 0.5 + math.log(n), dtype=torch.float64)
    found = noise_contrast(anchors, anchors[:, 0], ids, rows, noise, log_z, 0.5)
    expected = math.log(1 + m) + m * math.log(1 + 1 / m)
    torch.testing.assert_close(found, torch.full((3,), expected, dtype=torch.float64))


@pytest.mark.parametrize("shared", [True, False])
def test_noise_never_holds_the_own_image(shared: bool) -> None:
    rows = torch.eye(4, dtype=torch.float64)
    anchors, ids = rows.clone(), torch.arange(4)
    for step in range(50):
        drawn = torch.randint(4, (3,) if shared else (4, 3), generator=torch.Generator().manual_seed(step))
        found = noise_contrast(anchors, torch.ones(4).double(), ids, rows, drawn, torch.tensor(0.0).double(), 0.1)
        # All other rows are orthogonal: each counts log(1 + e^(0 − log(m/n))), the own row would count over 10.
        own = drawn == ids[:, None]
        expected = torch.log1p(torch.tensor(0.75 * math.exp(-10))) + (~own).sum(1) * math.log1p(4 / 3)
        torch.testing.assert_close(found, expected.double(), rtol=1e-6, atol=1e-6)


def test_anchors_in_pieces_give_the_same_noise_term(monkeypatch: pytest.MonkeyPatch) -> None:
    from contrastive.objectives import noise

    z, ids = batch(7), torch.arange(7)
    for shared in (True, False):
        bank = build(estimator="nce", shared=shared, negatives=9)
        whole = bank(z, ids, None, 0).total
        with monkeypatch.context() as patch:
            patch.setattr(noise, "SCORES", 20)
            pieces = bank(z, ids, None, 0).total
        torch.testing.assert_close(pieces, whole)
        torch.testing.assert_close(torch.autograd.grad(pieces, z), torch.autograd.grad(whole, z))


def test_the_exact_normaliser_is_the_mean_sum_over_all_rows() -> None:
    bank, z, ids = build(estimator="nce", normaliser="exact", temperature=0.2), batch(), torch.tensor([3, 11, 3, 0])
    found = bank(z, ids, None, 0).terms["normaliser"]
    sums = [sum(torch.exp(unit(row) @ other / 0.2) for other in bank.rows) for row in z.flatten(0, 1)]
    torch.testing.assert_close(found, torch.stack(sums).mean().detach())


def test_the_normaliser_from_noise_is_right_on_average() -> None:
    bank, z = build(temperature=0.5), batch(views=1).detach()
    anchors = z[0] / z[0].norm(dim=1, keepdim=True)
    ids = torch.tensor([3, 11, 3, 0])
    positives = (anchors * bank.rows[ids]).sum(1)
    drawn = torch.randint(IMAGES, (20_000,), generator=torch.Generator().manual_seed(0))
    found = normaliser_from_noise(anchors, positives, ids, bank.rows, drawn, 0.5)
    torch.testing.assert_close(found, (anchors @ bank.rows.T / 0.5).logsumexp(1), rtol=0, atol=0.02)


def test_the_first_normaliser_is_kept_and_the_moving_one_follows() -> None:
    kept, moving = (build(estimator="nce", normaliser=rule, negatives=30) for rule in ("first_batch", "ema"))
    for bank in (kept, moving):
        assert bank.log_normaliser.isnan()
        values = []
        for step in range(3):
            z = batch(seed=step)
            values.append(bank(z, torch.arange(4), None, step).terms["normaliser"].log().item())
            bank.update(z, torch.arange(4), None)
            assert bank.log_normaliser.item() == pytest.approx(values[-1])
        assert (values[0] == pytest.approx(values[1])) == (bank is kept)


def test_a_step_that_was_not_taken_leaves_everything_as_it_was() -> None:
    bank = build(estimator="nce")
    bank(batch(), torch.arange(4), None, 0)
    assert bank.log_normaliser.isnan()
    torch.testing.assert_close(bank.rows, build(estimator="nce").rows)


def test_rows_move_by_the_rule_with_an_image_that_comes_twice_averaged_first() -> None:
    bank, z, ids = build(momentum=0.3), batch(), torch.tensor([3, 11, 3, 0])
    before = bank.rows.clone()
    bank.update(z, ids, None)
    for row in range(IMAGES):
        seen = [unit(z[v, b]) for v in range(2) for b in range(4) if ids[b] == row]
        expected = unit(0.3 * before[row] + 0.7 * torch.stack(seen).mean(0)) if seen else before[row]
        torch.testing.assert_close(bank.rows[row], expected.detach(), rtol=1e-12, atol=1e-12)


def test_the_loss_comes_from_the_rows_before_the_update() -> None:
    bank, z, ids = build(), batch(), torch.arange(4)
    loss, expected = bank(z, ids, None, 0).total, bank(z, ids, None, 0).total
    bank.update(z, ids, None)  # even before backward
    assert bank(z, ids, None, 0).total < loss
    torch.testing.assert_close(
        torch.autograd.grad(loss, z), torch.autograd.grad(exact_oracle(z, ids, build().rows, 0.07), z)
    )
    torch.testing.assert_close(loss, expected)


def test_all_rows_have_length_one_at_the_start_and_after_updates() -> None:
    bank, ones = build(), torch.ones(IMAGES, dtype=torch.float64)
    torch.testing.assert_close(bank.rows.norm(dim=1), ones, rtol=1e-6, atol=1e-6)
    for seed in range(10):
        bank.update(batch(seed=seed), torch.tensor([3, 11, 3, 0]), None)
    torch.testing.assert_close(bank.rows.norm(dim=1), ones, rtol=1e-6, atol=1e-6)


def test_buffers_are_changed_in_place_and_saved_whole() -> None:
    bank, restored = (build(seed, estimator="nce") for seed in (1, 1))
    addresses = {name: value.data_ptr() for name, value in bank.named_buffers()}
    ids = torch.tensor([3, 11, 3, 0])
    for step in range(3):
        bank(batch(seed=step), ids, None, step)
        bank.update(batch(seed=step), ids, None)
    assert {name: value.data_ptr() for name, value in bank.named_buffers()} == addresses
    assert bank.state_dict().keys() == {"rows", "log_normaliser"}
    restored.load_state_dict(bank.state_dict())
    assert torch.equal(bank(batch(), ids, None, 7).total, restored(batch(), ids, None, 7).total)


def test_draws_depend_on_seed_and_step_alone_and_leave_the_global_generator() -> None:
    state = torch.get_rng_state()
    bank = build(estimator="nce", negatives=50)
    first = bank._noise_ids(4, 3)
    bank._noise_ids(4, 4)
    assert torch.equal(first, bank._noise_ids(9, 3))
    assert not torch.equal(first, bank._noise_ids(4, 4))
    assert not torch.equal(first, build(1, estimator="nce", negatives=50)._noise_ids(4, 3))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(build(0).rows, build(1).rows)


@pytest.mark.parametrize("settings", [{}, {"estimator": "nce"}, {"estimator": "nce", "shared": False, "negatives": 8}])
def test_low_temperature_and_zero_rows_stay_finite(settings: dict[str, object]) -> None:
    bank, z = build(temperature=0.01, **settings).float(), torch.zeros(2, 4, DIM, requires_grad=True)
    for step in range(3):
        loss = bank(z, torch.arange(4), None, step).total
        assert loss.isfinite()
        assert torch.autograd.grad(loss, z)[0].isfinite().all()
        bank.update(z, torch.arange(4), None)


@pytest.mark.parametrize("estimator", ["exact", "nce"])
def test_autocast_changes_nothing(estimator: str) -> None:
    bank, z = build(estimator=estimator).float(), batch().detach().float()
    plain = bank(z, torch.arange(4), None, 0).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = bank(z, torch.arange(4), None, 0).total
    assert inside.dtype == torch.float32
    assert torch.equal(plain, inside)


@pytest.mark.parametrize("ids", [[0, 12], [-1, 3]])
def test_an_id_outside_the_bank_is_refused(ids: list[int]) -> None:
    with pytest.raises(ValueError, match="ids 0 to 11; the batch holds ids from"):
        build()(batch(2), torch.tensor(ids), None, 0)
    with pytest.raises(ValueError, match="number of training images"):
        build().update(batch(2), torch.tensor(ids), None)


def test_a_normaliser_is_a_rule_or_a_number() -> None:
    assert Bank.model_validate({"normaliser": 2876934.2}).normaliser == 2876934.2
    with pytest.raises(ValueError, match="normaliser"):
        Bank.model_validate({"normaliser": "last_batch"})
    with pytest.raises(ValueError, match="greater than 0"):
        Bank.model_validate({"normaliser": 0.0})
