"""Lower bounds of a recipe's steps and memory, checked before anything is built."""

from manyviews.encoder.backbone import weight_count
from manyviews.encoder.encoder import EncoderSettings
from manyviews.objectives.cost import ID, NUMBER, Sizes
from manyviews.recipe import Recipe, TrainSettings
from manyviews.system import hardware
from manyviews.system.files import shown

MOST_STEPS = 10**9 - 1
"""Largest step that fits into the name of a checkpoint's folder."""
COPIES = 3
"""Fewest numbers in memory per weight: itself, its gradient and one average."""
PREVIEW_EPOCHS = 4


def check_steps(settings: TrainSettings, steps_per_epoch: int) -> None:
    """Raises ValueError if the budget has more steps than a run may have."""
    if settings.minutes is None and (steps := settings.steps(steps_per_epoch)) > MOST_STEPS:
        raise ValueError(
            f"train.epochs={settings.epochs:g} is {steps:,} steps, and a run has at most {MOST_STEPS:,}; name fewer "
            "epochs, or train.minutes"
        )


def check_views(recipe: Recipe, *, images: int, channels: int, stored: int, processes: int) -> None:
    """Raises ValueError if views do not fit in memory; `stored` is the images' side in pixels."""
    views, train = recipe.views.resolve(size=stored, channels=channels), recipe.train
    assert views.size is not None
    local, size, picture = train.batch_size // processes, views.size, channels * views.size**2 * NUMBER
    of_an_image = views.num_views * picture + views.local * channels * (views.local_size or 0) ** 2 * NUMBER
    # With auto, what does not fit is tried.
    part = 1 if train.chunk == "auto" else min(train.part or local, local)
    of_images = f"of {channels} × {size} × {size} pixels"
    and_local = f" and {views.local} local ones" if views.local else ""
    _check(
        part * of_an_image,
        f"{part:,} × {views.num_views} views {of_images}{and_local}, by train.batch_size, views.num_views and "
        "views.size,",
        "lower one of them, or set train.chunk to fewer images",
    )
    pictured = min(train.preview, images)
    _check(
        pictured * (picture + PREVIEW_EPOCHS * of_an_image),
        f"the picture of views, for train.preview={train.preview} images {of_images},",
        "lower it, or set train.preview=0",
    )


def check_encoder(settings: EncoderSettings, *, channels: int, size: int) -> None:
    """Raises ValueError if the encoder's weights, gradients and averages do not fit in memory."""
    random = settings.model_copy(update={"pretrained": False})
    count = weight_count(lambda: random.build(channels=channels, size=size)) or 0
    _check(
        COPIES * NUMBER * count,
        f"the {count:,} weights of encoder.name={shown(settings.name)}, its projector and predictor, with their "
        "gradients and averages,",
        "choose a smaller encoder, or lower hidden and dim of encoder.projector and encoder.predictor",
    )


def check_objective(recipe: Recipe, *, ids: int, embeddings: int, dim: int, processes: int) -> None:
    """Raises ValueError if the objective's rows, or those drawn in a step, do not fit in memory.

    `ids` is the number of images, or of classes where these are the ids; `embeddings` that of an image in a step, of
    `dim` dimensions.
    """
    settings, batch = recipe.objective, recipe.train.batch_size
    cost = settings.cost(Sizes(ids, embeddings, batch, dim, processes, recipe.keys))
    length = "objective.size, " if "size" in type(settings).model_fields else ""
    _check(
        cost.memory,
        f"the {cost.rows:,} rows of {dim:,} numbers that objective={settings.name} keeps on each process",
        f"lower {length}encoder.projector.dim, or start more processes",
    )
    noise, together = settings.traits.noise, settings.traits.one_draw
    _check(
        noise * (NUMBER * dim + ID * (1 if together else batch)),
        f"objective.negatives={noise:,} rows of {dim:,} numbers{'' if together else ' for each image'}",
        f"lower objective.negatives{'' if together else ', or set objective.shared=true'}",
    )


def _check(needed: int, what: str, cure: str) -> None:
    there = hardware.device()
    if needed > there:
        raise ValueError(
            f"{what} take at least {hardware.gigabytes(needed)}, and there are {hardware.gigabytes(there)} of memory; "
            f"{cure}"
        )
