"""Windows of the views of one size: drawn, cropped from the files, looked through."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from manyviews.data.images import Crops
from manyviews.views.geometry import RandomWindow, crop_boxes, resample, window_matrix, within


class Windows(NamedTuple):
    """The windows of the views of one size."""

    numbers: range
    """The numbers of these views among all of an image."""
    window: RandomWindow

    def draw(
        self, draws: Float[Tensor, "draws views batch"], aspects: Float[Tensor, " batch"] | None
    ) -> dict[str, Tensor]:
        """Parameters from the draws of all views, one for each view and image, views first."""
        own = draws[:, self.numbers.start : self.numbers.stop]
        return self.window.interpret(own.flatten(1), None if aspects is None else aspects.repeat(len(self.numbers)))

    def crops(self, params: dict[str, Tensor]) -> Crops:
        """The boxes that windows see."""
        boxes = crop_boxes(window_matrix(params), self.window.flags["padding_mode"])
        side = self.window.side if self.window.turns else self.window.size
        return Crops(boxes.unflatten(0, (len(self.numbers), -1)), side, exact=False)

    def look(
        self, pixels: Float[Tensor, "batch channels side side"], params: dict[str, Tensor], *, cropped: bool
    ) -> Float[Tensor, "batch channels size size"]:
        """Views of whole images or, if `cropped`, of the boxes that windows see."""
        # The transform itself, without kornia's bookkeeping around it, which would take a tenth of the time.
        if not cropped:
            return self.window.apply_transform(pixels, params, self.window.flags)
        if not self.window.turns:
            return self.window.flipped(pixels, params)
        matrix, padding = window_matrix(params), self.window.flags["padding_mode"]
        matrix = within(matrix, crop_boxes(matrix, padding)).to(pixels)
        return resample(pixels, matrix, self.window.size, padding=padding)
