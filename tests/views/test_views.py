import math

import kornia
import pytest
import torch
from kornia.augmentation import AugmentationSequential
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as TF

from manyviews.data.images import Pictures
from manyviews.system.keyed_random import uniform_sequences
from manyviews.views import MEAN, STD, RandomColour, RandomWindow, StandardView, ViewsSettings
from manyviews.views.colour import adjust, blur, chroma_matrix, erase, look_up, random_gamma, solarize
from manyviews.views.geometry import box_extents, resample, window_matrix

EVERYTHING = {
    "rotation": 10.0, "translation": 0.1, "shear": 5.0, "vertical_flip": 0.5, "gamma": 0.3, "greyscale": 0.3,
    "hue": 0.1, "saturation": 0.4, "blur": 0.5, "solarize": 0.3, "erase": 0.5, "num_views": 3,
}  # fmt: skip


def pictures(num, channels=3, size=32, seed=0):
    """Smooth random images: noise would make every comparison of resamplings meaningless."""
    noise = torch.rand(num, channels, 6, 6, generator=torch.Generator().manual_seed(seed))
    smooth = F.interpolate(noise, (size, size), mode="bicubic").clamp(0, 1)
    return (smooth * 255).round().to(torch.uint8)


def window(extent, centre, **more):
    return {"extent": torch.tensor([extent]), "centre": torch.tensor([centre]), **more}


# Draws


def test_draws_are_pinned():
    # These numbers are part of every run's meaning: whoever changes them changes all views of all runs.
    drawn = uniform_sequences(torch.tensor([0, 7, 2**40]), [(3, 2, 0), (3, 2, 1)], torch.tensor([0, 30]))
    expected = [
        splitmix(finish(key(3, 2, view) + id_), parameter)
        for parameter in (1, 31)
        for view in (0, 1)
        for id_ in (0, 7, 2**40)
    ]
    assert drawn.flatten().tolist() == expected


def test_draws_are_uniform_and_independent_along_every_axis():
    drawn, other_epoch, other_seed = (
        uniform_sequences(torch.arange(4096), [(*key, view) for view in range(4)], torch.arange(8))
        for key in ((0, 0), (0, 1), (1, 0))
    )
    assert drawn.min() >= 0
    assert drawn.max() < 1
    counts = torch.histc(drawn, 64, 0, 1)
    expected = drawn.numel() / 64
    # Chi-squared with 63 degrees of freedom: mean 63, standard deviation 11.2.
    assert (counts - expected).square().sum() / expected < 63 + 5 * 11.2
    pairs = [(drawn[:-1], drawn[1:]), (drawn[:, :-1], drawn[:, 1:]), (drawn[..., :-1], drawn[..., 1:]),
             (drawn, other_epoch), (drawn, other_seed), (other_epoch, other_seed)]  # fmt: skip
    for one, other in pairs:
        correlation = torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]
        assert correlation.abs() < 5 / math.sqrt(one.numel())


def splitmix(state, steps):
    return (finish(state + steps * 0x9E3779B97F4A7C15) >> 40) / 2**24


def key(*args):
    state = 0
    for word in args:
        state = finish(state + word + 0x9E3779B97F4A7C15)
    return state


def finish(z):
    z %= 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


# Views as a whole


@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32), (3, 72)])
def test_a_view_is_the_same_in_any_batch(channels, size):
    settings = EVERYTHING | ({} if channels == 3 else {"greyscale": 0.0, "hue": 0.0, "saturation": 0.0})
    views = ViewsSettings(**settings).build(size=size, channels=channels, seed=5)
    images, ids = pictures(12, channels, size), torch.randperm(1000)[:12]
    (whole,) = views(images, ids, 3)
    order = torch.randperm(12)
    assert torch.allclose(views(images[order], ids[order], 3)[0], whole[:, order], atol=1e-5)
    for part in (slice(0, 1), slice(1, 6), slice(6, 12)):
        assert torch.allclose(views(images[part], ids[part], 3)[0], whole[:, part], atol=1e-5)


def test_views_differ_between_images_views_epochs_and_seeds():
    images = pictures(1).expand(64, -1, -1, -1)
    build = ViewsSettings(**EVERYTHING).build
    views = [
        build(size=32, channels=3, seed=seed)(images, torch.arange(64), epoch)[0]
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    every = torch.cat(views).flatten(0, 1).flatten(1)
    assert len(every.unique(dim=0)) == len(every) == 3 * 3 * 64


def test_one_augmentation_does_not_change_the_draws_of_another():
    images, ids = pictures(4), torch.arange(4)
    plainly = {"erase": 0.0, "gamma": 0.0, "saturation": 0.0, "hue": 0.0, "greyscale": 0.0}
    without, with_ = (
        ViewsSettings(**plainly | more).build(size=32, channels=3, seed=0)(images, ids, 0)[0]
        for more in ({}, {"erase": 1.0, "erase_scale": (0.1, 0.1)})
    )
    assert ((without - with_).abs() < 1e-5).float().mean() > 0.85


def test_the_number_of_views_does_not_change_the_first_ones():
    images, ids = pictures(4), torch.arange(4)
    few, many = (ViewsSettings(num_views=n).build(size=32, channels=3, seed=0)(images, ids, 0)[0] for n in (2, 5))
    assert torch.allclose(many[:2], few, atol=1e-5)


def test_views_leave_the_random_state_and_the_images_alone():
    images = pictures(4)
    before, state = images.clone(), torch.get_rng_state()
    views = ViewsSettings(**EVERYTHING).build(size=32, channels=3, seed=0)
    (first,) = views(images, torch.arange(4), 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(images, before)
    torch.rand(7)
    assert torch.equal(views(images, torch.arange(4), 0)[0], first)
    assert not views.state_dict()


def test_views_are_float32_in_range_and_the_same_under_autocast():
    views = ViewsSettings(**EVERYTHING).build(size=32, channels=3, seed=0)
    (plainly,) = views(pictures(8), torch.arange(8), 0)
    with torch.autocast("cpu", torch.bfloat16):
        (automatic,) = views(pictures(8), torch.arange(8), 0)
    assert torch.equal(automatic, plainly)
    assert plainly.dtype == torch.float32
    assert plainly.shape == (3, 8, 3, 32, 32)
    assert plainly.is_contiguous()
    assert plainly.amin() >= (0 - MEAN) / STD - 1e-5
    assert plainly.amax() <= (1 - MEAN) / STD + 1e-5


def test_without_augmentation_a_view_is_the_plain_image():
    nothing = dict.fromkeys(("flip", "brightness", "contrast", "saturation", "hue", "greyscale", "blur"), 0.0)
    views = ViewsSettings(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), **nothing).build(size=32, channels=3, seed=0)
    images = pictures(3)
    (view,) = views(images, torch.arange(3), 0)
    assert torch.allclose(view, StandardView(32, 3)(Pictures((images,))).expand(2, -1, -1, -1, -1), atol=1e-4)
    assert torch.allclose(StandardView(32, 3)(Pictures((images,))) * STD + MEAN, images / 255, atol=1e-6)


def test_the_plain_view_resizes_with_antialiasing():
    # A one-pixel chessboard is grey at half the size; without antialiasing it is black, white or a new pattern.
    board = ((torch.arange(64)[:, None] + torch.arange(64)) % 2 * 255).to(torch.uint8).expand(1, 1, 64, 64)
    assert (StandardView(24, 1)(Pictures((board,))) * STD + MEAN - 0.5).abs().amax() < 0.05


@pytest.mark.parametrize("size", [8, 32, 96, 224])
def test_any_size_can_be_blurred(size):
    views = ViewsSettings(blur=1.0).build(size=size, channels=3, seed=0)
    assert views(pictures(2, size=size), torch.arange(2), 0)[0].isfinite().all()


def test_views_may_be_smaller_or_larger_than_the_images():
    for size in (24, 96):
        views = ViewsSettings(size=size).build(size=48, channels=3, seed=0)
        assert views(pictures(2, size=48), torch.arange(2), 0)[0].shape == (2, 2, 3, size, size)


# Settings


def test_presets_follow_size_and_channels():
    grey, small, large, huge = (
        ViewsSettings().resolve(size=size, channels=channels)
        for size, channels in ((28, 1), (32, 3), (96, 3), (224, 3))
    )
    open_ones = {name for name, value in grey.model_dump().items() if value is None}
    assert open_ones == {"local_size", "local_scale"}
    assert ViewsSettings(local=1).resolve(size=224, channels=3).local_size == 96
    assert (grey.crop_scale, small.crop_scale, large.crop_scale, huge.crop_scale) == (
        (0.6, 1),
        (0.2, 1),
        (0.2, 1),
        (0.08, 1),
    )
    assert (grey.blur, small.blur, large.blur) == (0, 0, 0.5)
    assert (grey.saturation, grey.hue, grey.greyscale) == (0, 0, 0)
    assert (grey.gamma, grey.contrast, small.gamma, small.contrast) == (0.7, 0, 0, 0.4)
    assert (small.hue, large.hue, small.brightness, large.brightness) == (0.1, 0.2, 0.4, 0.8)
    assert grey.resolve(size=28, channels=1) == grey


def test_presets_follow_the_size_of_the_views_not_of_the_images():
    resolved = ViewsSettings(size=28).resolve(size=224, channels=3)
    assert (resolved.size, resolved.blur) == (28, 0)


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("name", ["saturation", "hue", "greyscale"])
def test_colours_are_refused_where_there_are_none(channels, name):
    with pytest.raises(ValueError, match=rf"views\.{name} is 0\.1, but images of {channels} channel"):
        ViewsSettings(**{name: 0.1}).build(size=32, channels=channels, seed=0)


@pytest.mark.parametrize("channels", [1, 4])
def test_any_number_of_channels_is_viewed(channels):
    views = ViewsSettings(gamma=0.5, erase=0.5).build(size=32, channels=channels, seed=0)
    assert views(pictures(3, channels), torch.arange(3), 0)[0].shape == (2, 3, channels, 32, 32)


@pytest.mark.parametrize(
    "wrong",
    [
        {"crop_scale": (0.0, 1.0)},
        {"crop_scale": (0.5, 0.2)},
        {"crop_scale": (0.5, 1.5)},
        {"erase_scale": (0.5, 2.0)},
    ],
)
def test_ranges_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match="must be \\[smallest, largest\\] between"):
        ViewsSettings(**wrong)


# Geometry


def test_crops_have_the_stated_distribution_and_stay_inside():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(11, 20000, generator=generator)
    made = RandomWindow(8, scale=(0.2, 1.0)).interpret(drawn)
    area = made["extent"].prod(1)
    ratio = made["extent"][:, 0] / made["extent"][:, 1]
    assert torch.allclose(
        area.quantile(torch.tensor([0.0, 0.25, 0.5, 0.75])), torch.tensor([0.2, 0.4, 0.6, 0.8]), atol=0.01
    )
    assert ratio.min() >= 3 / 4 - 1e-4
    assert ratio.max() <= 4 / 3 + 1e-4
    assert ratio.log().mean().abs() < 0.01
    assert ((made["centre"].abs() + made["extent"]) <= 1 + 1e-5).all()
    assert abs(made["flip"][:, 0].float().mean() - 0.5) < 0.02
    assert not made["flip"][:, 1].any()


@pytest.mark.parametrize("aspect", [1.0, 2.0, 0.25])
def test_boxes_fit_into_elongated_images(aspect):
    area, ratio = torch.rand(2, 1000, generator=torch.Generator().manual_seed(0))
    extent = box_extents(area, ratio, (0.5, 1.0), (3 / 4, 4 / 3), torch.full((1000,), aspect))
    assert extent.amax() <= 1
    assert torch.allclose(extent.prod(1), 0.5 + area / 2, atol=1e-5)


@pytest.mark.parametrize("flip", [False, True])
def test_crop_and_flip_match_kornia(flip):
    images = pictures(1) / 255
    # Pixels 4 to 19 along x and 8 to 31 along y.
    x0, y0, width, height = 4, 8, 16, 24
    params = window([width / 32, height / 32], [(2 * x0 + width) / 32 - 1, (2 * y0 + height) / 32 - 1],
                    flip=torch.tensor([[flip, False]]))  # fmt: skip
    ours = resample(images, window_matrix(params), 32)
    crop = kornia.augmentation.RandomResizedCrop((32, 32), align_corners=False, cropping_mode="slice")
    corners = [[x0, y0], [x0 + width - 1, y0], [x0 + width - 1, y0 + height - 1], [x0, y0 + height - 1]]
    outer = [[0, 0], [31, 0], [31, 31], [0, 31]]
    fixed = {"src": torch.tensor([corners]).float(), "dst": torch.tensor([outer]).float()}
    theirs = crop(images, params=fixed | {"forward_input_shape": torch.tensor(images.shape)})
    theirs = kornia.geometry.hflip(theirs) if flip else theirs
    # At its rim our window sees the neighbouring pixels of the image, kornia's crop repeats its own last ones.
    assert torch.allclose(ours[..., 2:-2, 2:-2], theirs[..., 2:-2, 2:-2], atol=1e-5)
    assert (ours - theirs).abs().max() < 0.1


def test_rotation_matches_kornia():
    images = pictures(1) / 255
    params = window([1.0, 1.0], [0.0, 0.0], angle=torch.tensor([17.0]))
    ours = resample(images, window_matrix(params), 32, padding="zeros")
    theirs = kornia.geometry.rotate(images, torch.tensor([17.0]), align_corners=False)
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_translation_moves_the_content_right_and_down_even_when_flipped():
    images = torch.zeros(1, 1, 16, 16)
    images[..., 4, 4] = 1
    for flip, column in ((False, 4), (True, 11)):
        params = window(
            [1.0, 1.0], [0.0, 0.0], translation=torch.tensor([[2 / 16, 3 / 16]]), flip=torch.tensor([[flip, False]])
        )
        moved = resample(images, window_matrix(params), 16, padding="zeros")
        assert moved[0, 0].argmax() == 7 * 16 + column + 2


def test_the_window_works_as_a_kornia_augmentation():
    images = pictures(4) / 255
    marks = torch.tensor([[[10.0, 20.0], [15.0, 12.0]]]).expand(4, -1, -1)
    augment = AugmentationSequential(
        RandomWindow(24, scale=(0.5, 1.0), rotation=20.0, shear=5.0, translation=0.1), RandomColour(brightness=0.2),
        data_keys=["input", "keypoints"],
    )  # fmt: skip
    torch.manual_seed(0)
    views, points = augment(images, marks)
    assert views.shape == (4, 3, 24, 24)
    # A keypoint is still where its pixel went: the coordinates of the image itself, resampled, say where that is.
    coordinates = (
        kornia.geometry.create_meshgrid(32, 32, normalized_coordinates=False).permute(0, 3, 1, 2).expand(4, -1, -1, -1)
    )
    where = augment[0](coordinates, params=augment[0]._params)
    for row in range(4):
        for point, mark in zip(points[row], marks[row], strict=True):
            column, line = point.round().int().tolist()
            if 1 <= column < 23 and 1 <= line < 23:
                assert (where[row, :, line, column] - mark).abs().max() < 1.5
    again = AugmentationSequential(*augment.children(), data_keys=["input"])
    assert torch.allclose(again(images, params=augment._params), views)


@pytest.mark.parametrize("factor", [1.5, 2, 3, 4, 7])
def test_no_stripes_survive_a_reduction_that_cannot_show_them(factor):
    # Stripes of one pixel: bilinear sampling every `factor` pixels without reduction makes coarse stripes of them.
    size = 24
    side = round(size * factor)
    stripes = (torch.arange(side) % 2).float().expand(1, 1, side, side) - 0.5
    whole = window_matrix(window([1.0, 1.0], [0.0, 0.0]))
    contrast = resample(stripes, whole, size).abs().max()
    naive = (
        F.grid_sample(stripes, F.affine_grid(whole, [1, 1, size, size], align_corners=False), align_corners=False)
        .abs()
        .max()
    )
    assert contrast <= naive + 1e-5
    if factor > 2:
        assert contrast < 0.01


def test_only_windows_that_need_it_are_reduced():
    images = pictures(2, size=128) / 255
    windows = torch.cat([window_matrix(window([share, share], [0.0, 0.0])) for share in (1.0, 0.25)])
    mixed = resample(images, windows, 32)
    alone = resample(images[1:, :, 48:80, 48:80], window_matrix(window([1.0, 1.0], [0.0, 0.0])), 32)
    assert torch.allclose(mixed[1:], alone, atol=1e-5)
    assert torch.allclose(mixed[:1], F.interpolate(images[:1], (32, 32), mode="area"), atol=0.01)


# Colour


@pytest.mark.parametrize(
    ("name", "factor", "reference"),
    [
        ("brightness", 0.7, TF.adjust_brightness),
        ("contrast", 0.6, TF.adjust_contrast),
        ("saturation", 0.3, TF.adjust_saturation),
        ("saturation", 0.0, lambda images, _: TF.rgb_to_grayscale(images, 3)),
        ("saturation", 0.3, kornia.enhance.adjust_saturation_with_gray_subtraction),
        ("contrast", 1.4, kornia.enhance.adjust_contrast_with_mean_subtraction),
        ("brightness", 1.4, kornia.enhance.adjust_brightness_accumulative),
    ],
)
def test_each_colour_change_matches_torchvision_and_kornia(name, factor, reference):
    images = pictures(4) / 255
    ours = adjust(images, {name: torch.full((4,), factor)})
    assert torch.allclose(ours, reference(images, factor), atol=2e-4)


@pytest.mark.parametrize(
    ("name", "reference"),
    [("brightness", TF.adjust_brightness), ("contrast", TF.adjust_contrast)],
)
def test_one_channel_is_changed_as_torchvision_does(name, reference):
    images = pictures(4, channels=1) / 255
    ours = adjust(images, {name: torch.full((4,), 1.3)})
    assert torch.allclose(ours, torch.stack([reference(image, 1.3) for image in images]), atol=2e-4)


def test_without_clamping_the_fused_matrix_is_the_chain_in_any_order():
    # Mild factors on mid-grey images: nothing leaves [0, 1], and torchvision's steps in both orders give the same.
    images = pictures(4) / 255 * 0.4 + 0.3
    factors = {"brightness": 1.1, "contrast": 0.8, "saturation": 0.7}
    ours = adjust(images, {name: torch.full((4,), factor) for name, factor in factors.items()})
    steps = [getattr(TF, f"adjust_{name}") for name in factors]
    for order in (steps, steps[::-1]):
        theirs = images
        for step in order:
            theirs = step(theirs, factors[step.__name__.removeprefix("adjust_").removesuffix("_image")])
        assert torch.allclose(ours, theirs, atol=1e-3)


def test_hue_keeps_the_luma_and_turns_red_towards_green():
    red = torch.tensor([1.0, 0.0, 0.0])
    third, back = chroma_matrix(torch.ones(2), torch.tensor([1 / 3, -1 / 3])) @ red
    assert third.argmax() == 1
    assert back.argmax() == 2
    luma = torch.tensor([0.299, 0.587, 0.114])
    assert torch.allclose(torch.stack([third, back]) @ luma, (red @ luma).expand(2), atol=1e-5)
    assert torch.allclose(chroma_matrix(torch.ones(1), torch.zeros(1))[0], torch.eye(3), atol=1e-6)
    grey = chroma_matrix(torch.ones(1), torch.tensor([0.2]))[0] @ torch.ones(3)
    assert torch.allclose(grey, torch.ones(3), atol=1e-5)


def test_colour_parameters_stay_in_their_ranges_and_spare_the_stated_share():
    drawn = torch.rand(6, 20000, generator=torch.Generator().manual_seed(0))
    colour = RandomColour(brightness=0.4, contrast=1.5, saturation=0.3, hue=0.1,
                          jitter_probability=0.8, greyscale_probability=0.2)  # fmt: skip
    made = colour.interpret(drawn)
    ranges = {"brightness": (0.6, 1.4, 1), "contrast": (0, 2.5, 1), "hue": (-0.1, 0.1, 0)}
    for name, (low, high, neutral) in ranges.items():
        values = made[name]
        assert low - 1e-5 <= values.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < values.max() <= high + 1e-5
        assert abs((values == neutral).float().mean() - 0.2) < 0.01
    assert abs((made["saturation"] == 0).float().mean() - 0.2) < 0.01


# Tone


def test_the_tone_matches_torchvision():
    images = pictures(4)
    exponents = torch.tensor([[0.5, 1.0, 1.7, 2.0], [1.0, 1.0, 0.7, 3.0]])
    toned = look_up(images, exponents)
    for view in range(2):
        for row in range(4):
            expected = TF.adjust_gamma(images[row] / 255, exponents[view, row].item()) * 255
            assert torch.allclose(toned[view, row], expected, atol=1e-3)


def test_the_exponents_are_log_uniform_and_spare_the_stated_share():
    grey = torch.full((20000, 1, 1, 1), 128, dtype=torch.uint8)
    drawn = torch.rand(2, 1, 20000, generator=torch.Generator().manual_seed(0))
    toned = random_gamma(grey, drawn, 0.5, 0.8)[0, :, 0, 0, 0]
    exponents = (toned / 255).log() / math.log(128 / 255)
    spared = (exponents - 1).abs() < 1e-4
    assert abs(spared.float().mean() - 0.2) < 0.01
    quartiles = exponents[~spared].log().quantile(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
    assert torch.allclose(quartiles, torch.tensor([-0.5, -0.25, 0.0, 0.25, 0.5]), atol=0.01)


# Effects


def test_blur_is_per_image_and_spares_the_others():
    images = pictures(4) / 255
    applied, sigma = torch.tensor([True, False, True, False]), torch.tensor([0.5, 1.0, 2.0, 1.0])
    blurred = blur(images, applied, sigma, 5)
    assert torch.equal(blurred[[1, 3]], images[[1, 3]])
    for row in (0, 2):
        reference = TF.gaussian_blur(images[row], [5, 5], [sigma[row].item()] * 2)
        assert torch.allclose(blurred[row], reference, atol=1e-5)
    assert torch.equal(blur(images, torch.zeros(4, dtype=torch.bool), sigma, 5), images)


def test_solarize_matches_torchvision():
    images = pictures(2) / 255
    ours = solarize(images, torch.tensor([True, False]), 0.5)
    assert torch.allclose(ours[0], TF.solarize(images[0], 0.5), atol=1e-6)
    assert torch.equal(ours[1], images[1])


def test_erase_fills_exactly_the_box():
    images = torch.ones(2, 3, 16, 16)
    # Columns 4 to 7 and rows 8 to 15.
    erased = erase(
        images, torch.tensor([True, False]), torch.tensor([[0.25, 0.5]] * 2), torch.tensor([[-0.25, 0.5]] * 2), 0.2
    )
    expected = torch.ones(3, 16, 16)
    expected[:, 8:16, 4:8] = 0.2
    assert torch.equal(erased[0], expected)
    assert torch.equal(erased[1], torch.ones(3, 16, 16))


def test_erased_boxes_have_the_stated_share_and_lie_inside():
    settings = ViewsSettings(
        erase=1.0, erase_scale=(0.1, 0.3), erase_fill=1.0, crop_scale=(1.0, 1.0), brightness=0.0, contrast=0.0
    )
    build = settings.build(size=64, channels=1, seed=0)
    (views,) = build(torch.zeros(500, 1, 64, 64, dtype=torch.uint8), torch.arange(500), 0)
    share = (views > 0).float().mean((2, 3, 4))
    assert 0.08 < share.min() < 0.12
    assert 0.28 < share.max() < 0.32
