"""Reads the pictures of images: crops where they are decoded as they are needed, else whole ones."""

from jaxtyping import Float, Int64
from torch import Tensor

from manyviews.data.decoding.files import Files
from manyviews.data.images import Cropper, Images, Pictures


def pictures(images: Images, ids: Int64[Tensor, " batch"], cropper: Cropper, epoch: int = 0) -> Pictures:
    """Reads images by their ids: crops where they are decoded as needed, else whole ones."""
    if isinstance(images, Files) and not images.whole:
        return Pictures(images.crop(ids, cropper, epoch), aspects_of(images, ids), cropped=True)
    return Pictures((images.read(ids),), aspects_of(images, ids))


def aspects_of(images: Images, ids: Int64[Tensor, " batch"]) -> Float[Tensor, " batch"] | None:
    """Width over height of these images, in float32; None if all of the set are square."""
    return None if images.aspects is None else images.aspects[ids].float()


def reads_crops(images: Images) -> bool:
    """Whether crops of images are decoded as they are needed, instead of whole images."""
    return isinstance(images, Files) and not images.whole
