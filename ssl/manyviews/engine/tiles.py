"""Sums over all pairs of anchors and candidates, tile by tile, differentiated on the way."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from manyviews.engine.rows import slices, tile_numbers
from manyviews.engine.threads import on_all_cores

Term = Callable[..., tuple[Tensor, Tensor]]
"""Called with a slice of the anchors, their products with all candidates, and the parameters; see `sum_over_tiles`."""

NUMBERS = 1 << 18
"""Products of a tile on a CPU: 1 MiB, so that a tile and its intermediate results stay in the cache of a core."""
FEW = 1 / 16
"""Share of a tile's pairs up to which adding the rows of each is faster than a product with all."""


def sum_over_tiles(
    anchors: Float[Tensor, "anchors dim"], candidates: Float[Tensor, "candidates dim"], term: Term, *parameters: Tensor
) -> tuple[Float[Tensor, ""], Float[Tensor, " figures"]]:
    """Sums a term over tiles of the products of anchors and candidates, in little memory.

    Each call `term(rows, products, *parameters)` is for a slice of the anchors and all candidates: `products` are
    anchors[rows] @ candidates.T. It returns a scalar, and figures in one dimension without gradient, which are summed
    too. It may be any differentiable function: each tile is differentiated as soon as it is computed, in the memory of
    some tiles and of the gradient. Gradients reach the anchors, the candidates and the parameters.

    Products are in float32 on a GPU too, never in TF32: where embeddings are near each other, so are the terms that
    they are pulled and pushed by, and their difference would be lost.

    On a CPU the term is called in several threads at once, so it must be a pure function. Without any anchor it is
    called once, with an empty tile, for the number of figures.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]], requires_grad=True)
        >>> total, _ = sum_over_tiles(x, x, lambda rows, products: (products.sum(), products.new_zeros(1)))
        >>> total.item(), torch.autograd.grad(total, x)[0].tolist()
        (5.0, [[2.0, 4.0], [2.0, 4.0]])
    """
    total, figures = _Sum.apply(term, anchors, candidates, *parameters)
    return total, figures


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, term: Term, anchors: Tensor, candidates: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        needed = any(ctx.needs_input_grad)
        gradient = torch.zeros_like(anchors) if needed else None
        height = max(1, tile_numbers(anchors.device, NUMBERS) // max(len(candidates), 1))
        tiles = list(slices(0, len(anchors), height)) or [slice(0, 0)]
        threads = min(torch.get_num_threads(), len(tiles)) if anchors.device.type == "cpu" else 1
        # Tiles go to parts in turn and parts are added in order: the result depends on the number of threads alone.
        works = [
            partial(_part, tiles[part::threads], term, anchors, candidates, parameters, gradient)
            for part in range(threads)
        ]
        parts = on_all_cores(works, anchors.device)
        total, figures, *others = (torch.stack(sums).sum(0) for sums in zip(*parts, strict=True))
        if needed:
            ctx.save_for_backward(gradient, *others)
        ctx.mark_non_differentiable(figures)
        return total, figures

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        wanted = zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True)
        return None, *(saved * gradients[0] if need else None for saved, need in wanted)


def _part(
    tiles: list[slice],
    term: Term,
    anchors: Tensor,
    candidates: Tensor,
    parameters: tuple[Tensor, ...],
    gradient: Tensor | None,
) -> list[Tensor]:
    """Total, figures and gradients of some tiles; adds the one in anchors to `gradient`."""
    leaves = [parameter.detach().requires_grad_(gradient is not None) for parameter in parameters]
    others = [torch.zeros_like(tensor) for tensor in (candidates, *parameters)] if gradient is not None else []
    totals, figures = [], []
    for rows in tiles:
        products = (anchors[rows].detach() @ candidates.detach().T).requires_grad_(gradient is not None)
        with torch.set_grad_enabled(gradient is not None):
            total, terms = term(rows, products, *leaves)
        totals.append(total.detach())
        figures.append(terms.detach().to(anchors.dtype))
        if gradient is None or not total.requires_grad:
            continue
        weights, *moved = torch.autograd.grad(total, [products, *leaves], allow_unused=True)
        if weights is not None:
            _add_products(weights, anchors[rows], candidates, gradient[rows], others[0])
        for kept, new in zip(others[1:], moved, strict=True):
            if new is not None:
                kept += new
    return [torch.stack(totals).sum(), torch.stack(figures).sum(0), *others]


def _add_products(weights: Tensor, anchors: Tensor, candidates: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds weights @ candidates to `left`, and weights.T @ anchors to `right`."""
    # Where pairs were sampled nearly all weights are zero. A GPU would have to wait for their number.
    if weights.device.type == "cpu" and int(weights.count_nonzero()) <= FEW * weights.numel():
        rows, columns = weights.nonzero(as_tuple=True)
        values = weights[rows, columns].unsqueeze(1)
        left.index_add_(0, rows, values * candidates[columns])
        right.index_add_(0, columns, values * anchors[rows])
    else:
        left.addmm_(weights, candidates)
        right.addmm_(weights.T, anchors)
