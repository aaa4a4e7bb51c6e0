"""Images that cannot be told from each other, found before a run has spent hours on them."""

from collections.abc import Iterator

import torch

from manyviews.data.images import Images, Split
from manyviews.system.plural import plural

LOOKED_AT = 64
"""Images whose pixels are compared, spread evenly over all."""
SAME = 2.0
"""Mean difference of pixels, of 255, up to which two images are one to an encoder."""
COPIES = 0.1
"""Share of copies among the images from which they are told of."""


def alike(split: Split) -> Iterator[str]:
    """Sentences on images to learn from that are copies of others, or that all look the same; called by one process."""
    if split.inventory is not None and split.inventory.readable:
        digests = split.inventory.readable[0][1]
        copies = len(digests) - len({row.tobytes() for row in digests})
        if copies >= COPIES * len(digests) and copies:
            yield (
                f"{copies:,} of {plural(len(digests), 'image')} to learn from are copies of others, byte for byte: as "
                "negatives of each other they can never be told apart; remove them, or make sure that it is meant"
            )
    if all_the_same(split.train):
        yield (
            "the images all look the same, so that nothing can be learned from them and the loss will stay at log N; "
            "look at them, and at data.size and data.background, by which they are decoded"
        )


def all_the_same(images: Images) -> bool:
    """Whether the pixels of 64 images, spread over all, are nearly those of the first."""
    if len(images) < 2:
        return False
    ids = torch.linspace(0, len(images) - 1, min(LOOKED_AT, len(images))).long()
    try:
        pixels = images.read(ids).float()
    except (OSError, ValueError):  # of files that are broken by now, which the first batch will tell of
        return False
    return bool((pixels - pixels[:1]).abs().flatten(1).mean(1).max() <= SAME)
