"""Patches of views, and contexts that see no row below their own."""

from itertools import pairwise
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from manyviews.encoder.context import AttentiveContext, Context, ContextSettings, RecurrentContext
from manyviews.encoder.encoder import Encoder, EncoderSettings, ProjectorSettings

Kind = Literal["gru", "mean", "attention"]
KINDS: tuple[Kind, ...] = ("gru", "mean", "attention")


def context(name: Kind, *, patches: int = 4, dim: int = 6) -> Context:
    torch.manual_seed(0)
    return ContextSettings(name=name, patches=patches).build(size=28, dim=dim).double()


def drawn(patches: int = 4, dim: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(patches**2, 3, dim, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", KINDS)
def test_a_context_depends_on_its_row_and_those_above_alone(name: Kind) -> None:
    z = drawn().requires_grad_()
    contexts = context(name)(z).view(4, 4, 3, 6)
    for row in range(4):
        for column in range(4):
            (gradient,) = torch.autograd.grad(contexts[row, column].sum(), z, retain_graph=True)
            of_rows = gradient.view(4, 4, 3, 6)
            assert not of_rows[row + 1 :].any()
            assert all(above[column].any() for above in of_rows[: row + 1])
            others = of_rows[:, [other for other in range(4) if other != column]]
            assert others.any() == (name == "attention")


@pytest.mark.parametrize("name", KINDS)
def test_images_have_their_own_contexts(name: Kind) -> None:
    module, z = context(name), drawn()
    torch.testing.assert_close(module(z)[:, 1:2], module(z[:, 1:2]), rtol=1e-12, atol=1e-12)


def test_the_recurrent_context_is_a_gru_over_every_column() -> None:
    module, z = context("gru"), drawn()
    assert isinstance(module, RecurrentContext)
    whole = nn.GRU(6, 6).double()
    whole.load_state_dict({f"{name}_l0": value for name, value in module.cell.state_dict().items()})
    expected = torch.stack([whole(column)[0] for column in z.view(4, 4, 3, 6).unbind(1)], 1)
    torch.testing.assert_close(module(z), expected.view(16, 3, 6), rtol=1e-12, atol=1e-12)


def test_the_mean_context_is_the_mean_of_a_column_down_to_a_patch() -> None:
    z = drawn().view(4, 4, 3, 6)
    expected = [z[: row + 1, column].mean(0) for row in range(4) for column in range(4)]
    torch.testing.assert_close(context("mean")(z.flatten(0, 1)), torch.stack(expected), rtol=1e-12, atol=1e-12)


def test_the_attentive_context_attends_to_the_patches_of_its_row_and_those_above() -> None:
    module, z = context("attention"), drawn()
    assert isinstance(module, AttentiveContext)
    queries, keys, values = module.inputs(module.norm(z + module.positions[:, None])).chunk(3, -1)
    expected = []
    for place in range(16):
        seen = range((place // 4 + 1) * 4)
        weights = torch.stack([(queries[place] * keys[other]).sum(-1) / 6**0.5 for other in seen]).softmax(0)
        attended = sum(weights[other, :, None] * values[other] for other in seen)
        expected.append(z[place] + module.output(attended))
    torch.testing.assert_close(module(z), torch.stack(expected), rtol=1e-12, atol=1e-12)


def test_the_papers_image_is_cut_into_seven_by_seven_patches_that_overlap_by_half() -> None:
    grid = ContextSettings().grid(256)
    assert grid == (7, 64)
    views = torch.arange(256.0**2).view(1, 1, 1, 256, 256)
    patches = grid.cut(views).view(7, 7, 64, 64)
    for row in range(7):
        for column in range(7):
            y, x = 32 * row, 32 * column
            assert torch.equal(patches[row, column], views[0, 0, 0, y : y + 64, x : x + 64])


@pytest.mark.parametrize("size", [28, 32, 96, 224])
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.75])
def test_patches_cover_a_view_of_any_size_from_edge_to_edge(size: int, overlap: float) -> None:
    grid = ContextSettings(overlap=overlap).grid(size)
    assert grid.patches == (7 if size >= 64 else 4)
    rows = torch.arange(float(size)).view(1, 1, 1, size, 1).expand(1, 1, 1, size, size)
    cut = grid.cut(rows).view(grid.patches, grid.patches, grid.side, grid.side)
    starts = cut[:, 0, 0, 0].tolist()
    assert starts[0] == 0
    assert starts[-1] + grid.side == size
    # Neighbours are apart what does not overlap, but for rounding.
    assert all(abs(after - before - grid.side * (1 - overlap)) <= 1.5 for before, after in pairwise(starts))


def test_in_training_each_patch_has_a_contrast_and_a_brightness_of_its_own() -> None:
    module = ContextSettings(jitter=0.5).build(size=28, dim=6)
    views = torch.randn(1, 64, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    plain = module.grid.cut(views)
    assert torch.equal(module.eval().patches_of(views), plain)
    torch.manual_seed(3)
    found = module.train().patches_of(views)
    torch.manual_seed(3)
    assert torch.equal(module.patches_of(views), found)
    flat, jittered = plain.flatten(2), found.flatten(2)
    contrast = jittered.std(2) / flat.std(2)
    brightness = jittered.mean(2) - contrast * flat.mean(2)
    torch.testing.assert_close(jittered, contrast[..., None] * flat + brightness[..., None], rtol=1e-4, atol=1e-4)
    for drawn_values in (contrast.log(), brightness):
        assert drawn_values.abs().max() < 0.501
        # Uniform, over patches and over images.
        assert abs(drawn_values.mean()) < 0.05
        assert abs(drawn_values.std() - 0.5 / 3**0.5) < 0.02
        assert min(drawn_values.std(0).min(), drawn_values.std(1).min()) > 0.1
    assert torch.equal(ContextSettings(jitter=0).build(size=28, dim=6).patches_of(views), plain)


def build(**options: object) -> Encoder:
    torch.manual_seed(0)
    return EncoderSettings(projector=ProjectorSettings(hidden=16, dim=8), **options).build(channels=1, size=28)


def test_the_encoder_returns_the_projections_of_all_patches_then_their_contexts() -> None:
    encoder, views = build(context=ContextSettings()).eval(), torch.randn(1, 3, 1, 28, 28)
    assert encoder.per_image(1) == 32
    embeddings, projections = encoder(views)
    assert embeddings.shape == (32, 3, 8)
    assert encoder.context is not None
    torch.testing.assert_close(embeddings[:16], projections)
    torch.testing.assert_close(embeddings[16:], encoder.context(projections))
    # The second row's last patch.
    alone = encoder.projector(encoder.backbone.forward_summary(views[0, :, :, 6:17, 17:28]))
    torch.testing.assert_close(projections[7], alone, rtol=1e-4, atol=1e-5)
    assert torch.equal(encoder.of_images(embeddings)[0], projections.mean(0))


def test_a_context_changes_no_other_weight_and_no_context_changes_nothing() -> None:
    plain, cut = build(), build(context=ContextSettings())
    state = {name: value for name, value in cut.state_dict().items() if not name.startswith("context.")}
    assert state.keys() == plain.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())
    embeddings = torch.randn(2, 3, 8)
    assert plain.of_images(embeddings) is embeddings
    assert plain.per_image(5) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patches": 20}, r"patches=20 with encoder\.context\.overlap=0\.5 makes patches of 3 pixels of a view of 28"),
        ({"patches": 64, "overlap": 0.0}, r"makes patches of 0 pixels of a view of 28.*a larger views\.size"),
    ],
)
def test_a_view_too_small_for_the_grid_is_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(context=ContextSettings(**options))


def test_a_backbone_that_cannot_take_patches_is_refused_with_the_key_of_their_number() -> None:
    with pytest.raises(ValueError, match=r"13 x 13 pixels.*set encoder\.context\.patches"):
        EncoderSettings(name="test_vit", context=ContextSettings()).build(channels=1, size=32)


@pytest.mark.parametrize("words", [{"predictor": {"layers": 2}}, {"batch_norm_splits": 2}], ids=str)
def test_a_predictor_or_split_batch_norms_are_refused_beside_a_context(words: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"context=gru.*set (predictor\.layers=0|batch_norm_splits=1)"):
        EncoderSettings.model_validate({"context": {"name": "gru"}, **words})
