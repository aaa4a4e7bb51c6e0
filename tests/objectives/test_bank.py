"""Instance discrimination, exact and by NCE, against double loops; the bank's rows against their rule by hand."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from manyviews.objectives import Bank, Population, noise
from manyviews.objectives.bank import BankObjective, ParametricObjective
from manyviews.objectives.noise import Noise, draw, log_sum_over_noise, noise_contrast, normaliser_from_noise

DIM, IMAGES = 5, 12


def build(seed: int = 0, **settings: object) -> BankObjective:
    objective = (
        Bank.model_validate(settings).build(dim=DIM, population=Population(torch.arange(IMAGES)), seed=seed).double()
    )
    assert isinstance(objective, BankObjective)
    return objective


def batch(count: int = 4, views: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(views, count, DIM, dtype=torch.float64, generator=generator).requires_grad_()


def unit(row: Tensor) -> Tensor:
    return row / row.norm()


def noise_of(bank: BankObjective, images: int, step: int) -> Noise:
    """The draw of one step."""
    per_image = None if bank.settings.shared else images
    drawn = draw(IMAGES, bank.settings.negatives, per_image, seed=bank.seed, step=step)
    return Noise(bank.rows, 0, IMAGES, drawn, [images])


def drawn_by(bank: BankObjective, images: int, step: int) -> Tensor:
    """The draws of one step as [images, m]."""
    drawn = noise_of(bank, images, step).ids
    return drawn.expand(images, -1) if drawn.ndim == 1 else drawn


def given(rows: Tensor, drawn: Tensor, images: int) -> Noise:
    """Noise that was not drawn but given."""
    return Noise(rows, 0, len(rows), drawn, [images])


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
@pytest.mark.parametrize("dense", [0, 64], ids=["gathered", "dense"])
def test_nce_loss_and_gradient_equal_the_double_loop(
    views: int, shared: bool, negatives: int, dense: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(noise, "DENSE", dense)
    bank = build(estimator="nce", shared=shared, negatives=negatives, normaliser=30.0)
    ids = torch.tensor([3, 11, 3, 0])
    for step in range(3):
        z = batch(views=views, seed=step)
        found = bank(z, ids, None, step)
        expected = nce_oracle(z, ids, bank.rows, drawn_by(bank, 4, step), 30.0, 0.07)
        torch.testing.assert_close(found.total, expected, rtol=1e-11, atol=1e-11)
        gradients = torch.autograd.grad(found.total, z), torch.autograd.grad(expected, z)
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found.terms["normaliser"].item(), 30.0)
        bank.update(z, ids, None)


@pytest.mark.parametrize("normaliser", ["ema", "exact", "first_batch", 30.0])
@pytest.mark.parametrize("shared", [True, False])
def test_nce_bounds_information_by_the_softmax_over_the_rows_drawn(shared: bool, normaliser: Any) -> None:
    bank = build(estimator="nce", shared=shared, negatives=9, normaliser=normaliser)
    softmax = build(estimator="infonce", shared=shared, negatives=9)
    ids = torch.tensor([3, 11, 3, 0])
    for step in range(4):
        z = batch(seed=step)
        found, expected = bank(z, ids, None, step).terms, softmax(z, ids, None, step)
        drawn = drawn_by(bank, 4, step).view(-1, 9).expand(4, 9).tolist()
        counts = [1 + sum(j != own for j in row) for own, row in zip(ids.tolist(), drawn, strict=True)]
        ceiling = sum(math.log(count) for count in counts) / 4
        for terms in (found, expected.terms):
            assert terms["ceiling"].item() == pytest.approx(ceiling)
            assert terms["information"].item() == pytest.approx(ceiling - expected.total.item())
        for objective in (bank, softmax):
            objective.update(z, ids, None)


def test_nce_where_every_row_is_as_likely_as_noise_has_its_known_value() -> None:
    # P = 1/n for every row: log(1 + m) + m log(1 + 1/m).
    rows, m, n = torch.ones(50, 1, dtype=torch.float64), 16, 50
    anchors, ids = torch.ones(3, 1, dtype=torch.float64), torch.arange(3)
    noise, log_z = torch.arange(10, 10 + m), torch.tensor(1 / 0.5 + math.log(n), dtype=torch.float64)
    found = noise_contrast(anchors, anchors[:, 0], ids, given(rows, noise, 3), log_z, 0.5)
    expected = math.log(1 + m) + m * math.log(1 + 1 / m)
    torch.testing.assert_close(found, torch.full((3,), expected, dtype=torch.float64))


@pytest.mark.parametrize("shared", [True, False])
def test_noise_never_holds_the_own_image(shared: bool) -> None:
    rows = torch.eye(4, dtype=torch.float64)
    anchors, ids = rows.clone(), torch.arange(4)
    for step in range(50):
        drawn = torch.randint(4, (3,) if shared else (4, 3), generator=torch.Generator().manual_seed(step))
        found = noise_contrast(
            anchors, torch.ones(4).double(), ids, given(rows, drawn, 4), torch.tensor(0.0).double(), 0.1
        )
        # All other rows are orthogonal: each counts log(1 + e^(0 − log(m/n))), the own row would count over 10.
        own = drawn == ids[:, None]
        expected = torch.log1p(torch.tensor(0.75 * math.exp(-10))) + (~own).sum(1) * math.log1p(4 / 3)
        torch.testing.assert_close(found, expected.double(), rtol=1e-6, atol=1e-6)


def test_anchors_in_pieces_give_the_same_noise_term(monkeypatch: pytest.MonkeyPatch) -> None:
    z, ids = batch(7), torch.arange(7)
    for shared, estimator in itertools.product((True, False), ("nce", "infonce")):
        bank = build(estimator=estimator, shared=shared, negatives=9)
        whole = bank(z, ids, None, 0).total
        with monkeypatch.context() as patch:
            patch.setattr(noise, "NUMBERS", 20)
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
    noise = given(bank.rows, torch.randint(IMAGES, (20_000,), generator=torch.Generator().manual_seed(0)), 4)
    others = log_sum_over_noise(anchors, ids, noise, 0.5)
    found = normaliser_from_noise(others, positives, noise.own_hits(ids), noise, 0.5)
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


def test_the_moving_normaliser_forgets_with_0_9_in_the_logarithm() -> None:
    moving, fresh = (build(estimator="nce", normaliser="ema", negatives=30) for _ in range(2))
    expected = torch.nan
    for step in range(3):
        z, ids = batch(seed=step), torch.arange(4)
        # What one that has seen no step before makes of the same rows, draws and anchors.
        fresh.rows.copy_(moving.rows)
        fresh.log_normaliser.fill_(torch.nan)
        alone = fresh(z, ids, None, step).terms["normaliser"].log().item()
        expected = 0.9 * expected + 0.1 * alone if step else alone
        assert moving(z, ids, None, step).terms["normaliser"].log().item() == pytest.approx(expected)
        moving.update(z, ids, None)


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
    assert bank.state_dict().keys() == {"rows", "written", "steps", "log_normaliser"}
    restored.load_state_dict(bank.state_dict())
    assert torch.equal(bank(batch(), ids, None, 7).total, restored(batch(), ids, None, 7).total)


def test_draws_depend_on_seed_and_step_alone_and_leave_the_global_generator() -> None:
    state = torch.get_rng_state()
    bank = build(estimator="nce", negatives=50)
    first = noise_of(bank, 4, 3).ids
    assert torch.equal(first, noise_of(bank, 9, 3).ids)
    assert not torch.equal(first, noise_of(bank, 4, 4).ids)
    assert not torch.equal(first, noise_of(build(1, estimator="nce", negatives=50), 4, 3).ids)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(build(0).rows, build(1).rows)


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize("dense", [0, 64], ids=["gathered", "dense"])
def test_the_softmax_over_drawn_rows_equals_the_double_loop(
    views: int, shared: bool, temperature: float, dense: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(noise, "DENSE", dense)
    bank = build(estimator="infonce", shared=shared, negatives=9, temperature=temperature)
    ids = torch.tensor([3, 11, 3, 0])
    for step in range(3):
        z = batch(views=views, seed=step)
        losses = []
        for view in z:
            for embedding, own, drawn in zip(view, ids.tolist(), drawn_by(bank, 4, step).tolist(), strict=True):
                scores = [unit(embedding) @ bank.rows[j] / temperature for j in [own, *(j for j in drawn if j != own)]]
                losses.append(torch.stack(scores).logsumexp(0) - scores[0])
        found, expected = bank(z, ids, None, step), torch.stack(losses).mean()
        torch.testing.assert_close(found.total, expected, rtol=1e-12, atol=1e-12)
        gradients = torch.autograd.grad(found.total, z), torch.autograd.grad(expected, z)
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
        hits = sum(
            j == own for own, row in zip(ids.tolist(), drawn_by(bank, 4, step).tolist(), strict=True) for j in row
        )
        torch.testing.assert_close(found.terms["negatives"].item(), 9 - hits / 4)
        bank.update(z, ids, None)


def test_the_softmax_over_all_rows_drawn_once_is_the_exact_one() -> None:
    z, ids, bank = batch(), torch.tensor([3, 11, 3, 0]), build(temperature=0.2)
    anchors, anchor_ids = (z / z.norm(dim=2, keepdim=True)).flatten(0, 1), ids.repeat(2)
    others = log_sum_over_noise(anchors, anchor_ids, given(bank.rows, torch.arange(IMAGES), 4), 0.2)
    positives = (anchors * bank.rows[anchor_ids]).sum(1) / 0.2
    torch.testing.assert_close((torch.logaddexp(others, positives) - positives).mean(), bank(z, ids, None, 0).total)


def test_an_anchor_whose_noise_is_all_its_own_row_has_no_loss() -> None:
    bank = build(estimator="infonce", negatives=2)
    z, ids = batch(1), torch.tensor([5])
    anchors = (z / z.norm(dim=2, keepdim=True)).flatten(0, 1)
    others = log_sum_over_noise(anchors, ids.repeat(2), given(bank.rows, torch.tensor([5, 5]), 1), 0.1)
    assert others.isneginf().all()
    assert torch.autograd.grad(others.exp().sum(), z)[0].isfinite().all()


@pytest.mark.parametrize("estimator", ["exact", "nce", "infonce"])
def test_the_proximal_term_is_the_squared_distance_to_the_own_row(estimator: str) -> None:
    z, ids = batch(), torch.tensor([3, 11, 3, 0])
    without, with_it = (build(estimator=estimator, proximal=weight, normaliser=30.0) for weight in (0.0, 1.7))
    distances = [(unit(z[v, b]) - without.rows[ids[b]]).square().sum() for v in range(2) for b in range(4)]
    expected = without(z, ids, None, 0).total + 1.7 * torch.stack(distances).mean()
    found = with_it(z, ids, None, 0).total
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, z), torch.autograd.grad(expected, z))


@pytest.mark.parametrize("views", [1, 2])
def test_the_parametric_softmax_equals_the_double_loop_in_embeddings_and_weights(views: int) -> None:
    objective = (
        Bank(estimator="parametric", temperature=0.2)
        .build(dim=DIM, population=Population(torch.arange(IMAGES)), seed=0)
        .double()
    )
    assert isinstance(objective, ParametricObjective)
    with torch.no_grad():
        objective.weight.mul_(torch.linspace(0.5, 3, IMAGES)[:, None])
    z, ids = batch(views=views), torch.tensor([3, 11, 3, 0])
    loss = objective(z, ids, None, 0)
    found, expected = loss.total, exact_oracle(z, ids, objective.weight, 0.2)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    cosines = torch.stack([torch.cosine_similarity(view, objective.weight[ids]) for view in z])
    torch.testing.assert_close(loss.terms["positive_similarity"], cosines.mean())
    wanted = [z, objective.weight]
    torch.testing.assert_close(
        torch.autograd.grad(found, wanted), torch.autograd.grad(expected, wanted), rtol=1e-9, atol=1e-12
    )
    before = objective.weight.detach().clone()
    objective.update(z, ids, None)
    assert torch.equal(objective.weight, before)


def test_the_parametric_softmax_begins_with_the_rows_of_the_bank() -> None:
    parametric = Bank(estimator="parametric").build(dim=DIM, population=Population(torch.arange(IMAGES)), seed=4)
    assert torch.equal(
        parametric.state_dict()["weight"],
        Bank().build(dim=DIM, population=Population(torch.arange(IMAGES)), seed=4).state_dict()["rows"],
    )


@pytest.mark.parametrize("settings", [{"storage": "bfloat16"}, {"proximal": 1.0}])
def test_what_is_for_stored_rows_is_refused_for_learned_ones(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="learns its weights by the optimiser"):
        Bank.model_validate({"estimator": "parametric", **settings})


@pytest.mark.parametrize("estimator", ["exact", "nce", "infonce"])
@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
def test_a_bank_in_16_bits_differs_by_their_rounding_only(estimator: str, storage: str) -> None:
    settings = {"estimator": estimator, "negatives": 20, "normaliser": 30.0, "temperature": 0.2}
    wide, narrow = (
        Bank.model_validate({**settings, "storage": kind}).build(
            dim=DIM, population=Population(torch.arange(IMAGES)), seed=0
        )
        for kind in ("float32", storage)
    )
    assert narrow.state_dict()["rows"].dtype == getattr(torch, storage)
    ids = torch.tensor([3, 11, 3, 0])
    for step in range(4):
        z = batch(seed=step).detach().float().requires_grad_()
        losses = [bank(z, ids, None, step).total for bank in (wide, narrow)]
        torch.testing.assert_close(losses[1], losses[0], rtol=2e-2, atol=2e-2)
        gradients = [torch.autograd.grad(loss, z)[0] for loss in losses]
        assert (gradients[1] - gradients[0]).norm() < 0.05 * gradients[0].norm()
        for bank in (wide, narrow):
            bank.update(z, ids, None)
    norms = narrow.state_dict()["rows"].float().norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(IMAGES), rtol=0, atol=1e-2)


def test_an_exact_normaliser_is_refreshed_every_so_many_steps() -> None:
    bank, ids = build(estimator="nce", normaliser="exact", normaliser_every=3, temperature=0.3), torch.arange(4)
    values = []
    for step in range(7):
        values.append(bank(batch(seed=step), ids, None, step).terms["normaliser"].item())
        bank.update(batch(seed=step), ids, None)
    assert values[0] == pytest.approx(values[1])
    assert values[1] == pytest.approx(values[2])
    assert len({round(value, 6) for value in values}) == 3


def test_staleness_is_the_mean_number_of_steps_since_a_row_was_written() -> None:
    bank, last = build(), [0] * IMAGES
    for step in range(1, 6):
        ids = torch.tensor([step, step + 1, 0, step])
        bank.update(batch(seed=step), ids, None)
        for row in ids.tolist():
            last[row] = step
        expected = sum(step - written for written in last) / IMAGES
        found = bank(batch(), torch.arange(4), None, step).terms["staleness"]
        assert found.item() == pytest.approx(expected)


def test_what_an_anchor_can_learn_is_bounded_by_the_logarithm_of_the_rows() -> None:
    terms = build()(batch(), torch.arange(4), None, 0).terms
    assert terms["ceiling"].item() == pytest.approx(math.log(IMAGES))
    assert terms["negatives"].item() == IMAGES - 1
    loss = build()(batch(), torch.arange(4), None, 0).total.item()
    assert terms["information"].item() == pytest.approx(math.log(IMAGES) - loss)


@pytest.mark.parametrize("ids", [[0, 12], [-1, 3]])
def test_an_id_outside_the_bank_is_refused(ids: list[int]) -> None:
    with pytest.raises(ValueError, match="12 ids, 0 to 11; the batch holds ids from"):
        build()(batch(2), torch.tensor(ids), None, 0)
    with pytest.raises(ValueError, match="ids of all training images"):
        build().update(batch(2), torch.tensor(ids), None)


def test_a_normaliser_is_a_rule_or_a_number() -> None:
    assert Bank.model_validate({"normaliser": 2876934.2}).normaliser == 2876934.2
    with pytest.raises(ValueError, match="normaliser"):
        Bank.model_validate({"normaliser": "last_batch"})
    with pytest.raises(ValueError, match="greater than 0"):
        Bank.model_validate({"normaliser": 0.0})
