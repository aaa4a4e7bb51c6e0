"""Contrastive predictive coding's patches of an image, and the context of those above."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from manyviews.config import Settings

FINE = 64
"""Side of a view in pixels from which it is cut into as many patches as in the paper."""
SMALLEST = 4
"""Side of the smallest patch in pixels."""


class Grid(NamedTuple):
    """Square patches of a square view, evenly spaced from edge to edge."""

    patches: int
    """On a side."""
    side: int
    """Of a patch, in pixels."""

    def cut(self, views: Float[Tensor, "views batch channels size size"]) -> Float[Tensor, "_ batch channels _ _"]:
        """Cuts every view into its patches, row by row from the top: [patches² · views, batch, channels, side, side].

        Where the space between the first and the last patch does not divide evenly, positions are rounded to pixels.
        """
        rest = views.shape[-1] - self.side
        starts = [round(index * rest / (self.patches - 1)) for index in range(self.patches)]
        parts = [views[..., y : y + self.side, x : x + self.side] for y in starts for x in starts]
        return torch.stack(parts).flatten(0, 1)


class ContextSettings(Settings):
    """The patches of a view, and the network that sums up those above a patch (CPC, van den Oord et al. 2018).

    Section 3.3 of the paper cuts 256 pixels into 7 x 7 patches of 64 that overlap by half. Its context is a PixelCNN;
    here it is one of three smaller networks.
    """

    name: Literal["gru", "mean", "attention"] = "gru"
    """The context of a patch: a GRU down its column, the mean of its column down to it, or a layer of self-attention
    over all patches of its row and of those above. encoder.context=null, the default: views are whole."""
    patches: int | None = Field(None, ge=2, le=64)
    """Patches on a side of a view; null: 7, or 4 of views below 64 pixels."""
    overlap: float = Field(0.5, ge=0, lt=1)
    """Share of a patch's side that the next one shows too."""
    jitter: float = Field(0.7, ge=0, le=10)
    """Strength x: in training each patch has a contrast and a brightness of its own, its pixels times e^u plus v, with
    u and v uniform in -x to x. Drawn as dropout is, by step and process; 0: none."""

    def grid(self, size: int) -> Grid:
        """The patches of a view of this side.

        Raises:
            ValueError: if they would be too small.

        Examples:
            >>> ContextSettings().grid(256)
            Grid(patches=7, side=64)
        """
        patches = self.patches or (7 if size >= FINE else 4)
        side = round(size / (1 + (patches - 1) * (1 - self.overlap)))
        if side < SMALLEST:
            raise ValueError(
                f"encoder.context.patches={patches} with encoder.context.overlap={self.overlap:g} makes patches of "
                f"{side} pixels of a view of {size}, and they need {SMALLEST}; use fewer patches, a larger overlap, or "
                "a larger views.size"
            )
        return Grid(patches, side)

    def build(self, *, size: int, dim: int) -> "Context":
        """Builds the network for views of this side and patches of `dim` numbers; raises as `grid`."""
        kinds: dict[str, Callable[[Grid, int, float], Context]] = {
            "gru": RecurrentContext,
            "mean": MeanContext,
            "attention": AttentiveContext,
        }
        return kinds[self.name](self.grid(size), dim, self.jitter)


class Context(nn.Module, ABC):
    """The contexts c = g(z) of patches: each of its own row and those above alone.

    van den Oord et al. 2018, section 2.2, with rows as time steps (section 3.3).

    Examples:
        >>> context = ContextSettings(patches=4).build(size=28, dim=8)
        >>> context(torch.zeros(16, 5, 8)).shape
        torch.Size([16, 5, 8])
    """

    def __init__(self, grid: Grid, dim: int, jitter: float = 0.0) -> None:
        super().__init__()
        self.grid, self.jitter = grid, jitter

    def patches_of(
        self, views: Float[Tensor, "views batch channels size size"]
    ) -> Float[Tensor, "_ batch channels _ _"]:
        """The patches of views, as `Grid.cut`; in training each with a contrast and a brightness of its own.

        As in CPC v2 (Hénaff et al. 2020), what patches have in common must not be their light alone.
        """
        patches = self.grid.cut(views)
        if not self.training or not self.jitter:
            return patches
        shape = 2, *patches.shape[:2], 1, 1, 1
        contrast, brightness = self.jitter * (2 * torch.rand(shape, device=patches.device) - 1)
        varied: Tensor = patches * contrast.exp() + brightness
        return varied

    def forward(self, patches: Float[Tensor, "patches batch dim"]) -> Float[Tensor, "patches batch dim"]:
        """The context of every patch of a grid, row by row."""
        return self.contexts(patches.unflatten(0, (self.grid.patches, -1))).flatten(0, 1)

    @abstractmethod
    def contexts(self, z: Float[Tensor, "rows columns batch dim"]) -> Float[Tensor, "rows columns batch dim"]:
        """As `forward`, with the grid as two axes."""


class RecurrentContext(Context):
    """A GRU that runs down every column, with the same weights."""

    def __init__(self, grid: Grid, dim: int, jitter: float = 0.0) -> None:
        super().__init__(grid, dim, jitter)
        self.cell = nn.GRUCell(dim, dim)

    def contexts(self, z: Float[Tensor, "rows columns batch dim"]) -> Float[Tensor, "rows columns batch dim"]:
        """The state of the GRU after each row."""
        states: list[Tensor] = []
        for row in z.flatten(1, 2):
            states.append(self.cell(row, states[-1] if states else None))
        return torch.stack(states).view_as(z)


class MeanContext(Context):
    """The mean of the patches of a column, down to each; it has no weights."""

    def contexts(self, z: Float[Tensor, "rows columns batch dim"]) -> Float[Tensor, "rows columns batch dim"]:
        """The running mean over the rows."""
        numbers = torch.arange(1, len(z) + 1, device=z.device).view(-1, 1, 1, 1)
        return z.cumsum(0) / numbers


class AttentiveContext(Context):
    """A layer of self-attention, added to its input, over the patches of a row and of those above."""

    def __init__(self, grid: Grid, dim: int, jitter: float = 0.0) -> None:
        super().__init__(grid, dim, jitter)
        self.positions = nn.Parameter(0.02 * torch.randn(grid.patches**2, dim))
        self.norm = nn.LayerNorm(dim)
        self.inputs, self.output = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay."""
        return {"positions"}

    def contexts(self, z: Float[Tensor, "rows columns batch dim"]) -> Float[Tensor, "rows columns batch dim"]:
        """The sum of each patch and what it attends to."""
        patches = z.flatten(0, 1).transpose(0, 1)
        rows = torch.arange(patches.shape[1], device=z.device) // z.shape[1]
        queries, keys, values = self.inputs(self.norm(patches + self.positions)).chunk(3, -1)
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=rows[:, None] >= rows)
        contexts: Tensor = (patches + self.output(attended)).transpose(0, 1).reshape(z.shape)
        return contexts
