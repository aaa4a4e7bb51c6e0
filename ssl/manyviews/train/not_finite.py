"""Skips steps with a non-finite loss or gradient, without a trace, and reports them."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from jaxtyping import Bool, Int64
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from manyviews.run.checkpoints import not_finite, way_on
from manyviews.run.folder import CHECKPOINTS
from manyviews.system import distributed
from manyviews.system.background import HostCopy
from manyviews.system.writing import write_json
from manyviews.train.kept_buffers import Kept, KeptBuffers

REPORT = "not_finite.json"
MOST_IN_A_ROW = 20
"""Skipped steps in a row after which a run ends: it would not recover."""
MOST_NAMED = 64
"""Images, and tensors, that the report names for each rank."""


class SkippedStep(NamedTuple):
    """What was not finite on this rank in a skipped step; empty if that was on another rank."""

    step: int
    epoch: int
    loss: dict[str, float]
    """The loss and all its terms."""
    gradients: tuple[str, ...]
    """Parameters with a non-finite gradient."""
    weights: tuple[str, ...]
    """Non-finite parameters."""
    ids: tuple[int, ...]
    """Images of the step."""
    views: tuple[bool, ...]
    """Whether the views of each image were finite."""
    embeddings: tuple[bool, ...]
    """Whether the embeddings of each image were finite."""


class Guard:
    """Leaves out one step if its loss or a gradient is not finite on any rank.

    `modules` have gradients; the buffers of the modules in `passed` are restored when the step is left out. If `late`,
    that is decided on the device and the host does not wait: `taken` is then a tensor, by which state is updated.
    """

    taken: Bool[Tensor, ""] | None = None

    def __init__(
        self,
        accelerator: Accelerator,
        optimiser: Any,
        modules: Mapping[str, nn.Module],
        *passed: nn.Module | None,
        late: bool = False,
    ) -> None:
        self._accelerator, self._optimiser, self._modules, self._late = accelerator, optimiser, modules, late
        self._buffers, self._norms = KeptBuffers(*passed), dict[str, Tensor]()

    def gradient_norm(self, loss: Tensor) -> Tensor | None:
        """The gradient norm of the first module; None if the step must be skipped; collective.

        Waits for the device, once, unless `late`: norms and loss of all ranks are judged on it.
        """
        if self._late:
            return self._judge(loss)
        # Unscales fp16; otherwise does nothing.
        self._accelerator.unscale_gradients(self._optimiser)
        norms = [_norm(module, loss.device) for module in self._modules.values()]
        # All ranks skip together: the collectives of the next step must match.
        return None if int(_unsound(loss, norms)) else norms[0]

    def _judge(self, loss: Tensor) -> Tensor:
        scaler, norms = self._accelerator.scaler, list[Tensor]()
        for owner, module in self._modules.items():
            named = module.named_parameters()
            gradients = {f"{owner}.{name}": value.grad for name, value in named if value.grad is not None}
            self._norms |= dict(zip(gradients, norms_of([*gradients.values()]), strict=True))
            own = [self._norms[name] for name in gradients]
            norms.append(torch.linalg.vector_norm(torch.stack(own)) if own else loss.new_zeros(()))
        self.taken = _unsound(loss, norms) == 0
        if scaler is not None:
            # The scaler judges by gradients, and each rank for itself.
            next(self._gradients()).masked_fill_(~self.taken, torch.nan)
            norms[0] = norms[0] / scaler.scale(torch.ones_like(norms[0]))
        self._accelerator.unscale_gradients(self._optimiser)
        return norms[0]

    def step(self) -> None:
        """Takes the optimiser's step and drops the gradients; if `late`, nothing changes in a step that is left out."""
        if self.taken is None:
            self._optimiser.step()
        else:
            self._step_on_device(self.taken)
            self._buffers.restore(~self.taken)
        self._optimiser.zero_grad(set_to_none=True)

    def _step_on_device(self, taken: Tensor) -> None:
        optimiser = getattr(self._optimiser, "optimizer", self._optimiser)
        for group in optimiser.param_groups:
            for parameter in group["params"] if group.get("momentum") else ():
                if parameter.grad is not None and "momentum_buffer" not in optimiser.state[parameter]:
                    # A first step that is left out would leave memory that was never written.
                    optimiser.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        if self._accelerator.scaler is not None:
            self._optimiser.step()
        elif all(group.get("fused") for group in optimiser.param_groups):
            # Read by torch's fused optimisers; torch.amp.GradScaler sets it likewise.
            optimiser.found_inf = (~taken).float()
            self._optimiser.step()
            del optimiser.found_inf
        else:
            moved = (parameter for group in optimiser.param_groups for parameter in group["params"])
            with self.undone((*moved, *(value for state in optimiser.state.values() for value in state.values()))):
                self._optimiser.step()

    @contextmanager
    def undone(self, tensors: Iterable[Tensor]) -> Iterator[None]:
        """Undoes, if the step is left out and `late`, what the body changes in tensors."""
        kept = Kept(tensors) if self.taken is not None else None
        yield
        if kept is not None and self.taken is not None:
            kept.restore(~self.taken)

    def skipped(self, skip: Callable[[], SkippedStep]) -> Callable[[], SkippedStep | None]:
        """A function that returns None if the step was taken, else what `skip` returns; its first call may wait."""
        copy = None if self.taken is None else HostCopy(self.taken)

        @cache
        def look() -> SkippedStep | None:
            return None if copy is None or bool(copy.read()[0]) else skip()

        return look

    def skip(
        self,
        step: int,
        epoch: int,
        ids: Int64[Tensor, " batch"],
        views: Bool[Tensor, " batch"],
        embeddings: Bool[Tensor, " batch"],
        loss: Mapping[str, Tensor],
    ) -> SkippedStep:
        """Drops the step with its gradients, if that has not happened on the device.

        `views` and `embeddings` mark the images whose views and embeddings are finite; `loss` holds total and terms.
        """
        modules = self._modules.items()
        parameters = {
            f"{owner}.{name}": value for owner, module in modules for name, value in module.named_parameters()
        }
        gradients = not_finite(self._norms or {name: value.grad for name, value in parameters.items()})
        numbers = {name: float(value) for name, value in loss.items()}
        images = (tuple(values.tolist()) for values in (ids, views, embeddings))
        if self.taken is None:
            self._buffers.restore()
            scaler = self._accelerator.scaler
            if scaler is not None:
                # As the scaler's own step does: in fp16 a scale that is too high is the usual reason.
                scaler.update(scaler.get_scale() * scaler.get_backoff_factor())
            self._optimiser.zero_grad(set_to_none=True)
        return SkippedStep(step, epoch, numbers, tuple(gradients), tuple(not_finite(parameters)), *images)

    def _gradients(self) -> Iterator[Tensor]:
        for group in self._optimiser.param_groups:
            yield from (parameter.grad for parameter in group["params"] if parameter.grad is not None)


class SkippedSteps:
    """Counts skipped steps, warns of the 1st, 10th, 100th …; too many in a row end a run.

    The report in the run folder has the `names` of images by id; the error message advises to try the `cure`. `total`
    counts the steps before a resume.
    """

    def __init__(
        self, folder: Path, names: Sequence[str], warn: Callable[[str], None], *, cure: str, total: int = 0
    ) -> None:
        self._folder, self._names, self._warn, self._cure = folder, names, warn, cure
        self.total, self._in_a_row = total, 0

    def count(self, skipped: SkippedStep | None) -> None:
        """Counts a skipped step, or with None one that was not skipped; collective.

        Raises:
            ValueError: on all ranks, after too many skipped steps in a row, naming the report.
        """
        if skipped is None:
            self._in_a_row = 0
            return
        self._in_a_row, self.total = self._in_a_row + 1, self.total + 1
        if str(self.total).strip("0") == "1":
            reason = f"step {skipped.step + 1:,} was skipped: {describe(skipped)} not finite"
            self._warn(f"{reason}; {self.total:,} skipped so far")
        if self._in_a_row < MOST_IN_A_ROW:
            return
        reason, report = describe(skipped), _write_report(self._folder, skipped, self._in_a_row, self._names)
        see = f"see {report}, which names the images" if report else "the report could not be written"
        raise ValueError(
            f"{self._in_a_row} steps in a row were skipped, up to step {skipped.step + 1:,}: {reason} not finite; "
            f"{see}; {way_on(self._folder / CHECKPOINTS)} with {self._cure}"
        )


def describe(skipped: SkippedStep) -> str:
    """What was not finite on any rank; collective."""
    own = [name for name, value in skipped.loss.items() if not math.isfinite(value)]
    everywhere = zip(*distributed.all_gather_object((own, skipped.gradients, skipped.weights)), strict=True)
    # Each name once, whichever rank it comes from.
    terms, gradients, weights = (list(dict.fromkeys(chain.from_iterable(part))) for part in everywhere)
    parts = [f"the loss ({', '.join(terms)})"] if terms else []
    for names, what in ((gradients, "the gradient"), (weights, "the weights")):
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        parts += [f"{what} of {names[0]}{others}"] if names else []
    return " and ".join(parts or ["the norm of the gradient"]) + " " + ("are" if len(parts) > 1 else "is")


def _write_report(folder: Path, skipped: SkippedStep, in_a_row: int, names: Sequence[str]) -> Path | None:
    """Writes what is known of the last skipped step; None if it cannot be written; collective."""
    # Images that are not finite come first.
    images = sorted(
        zip(skipped.ids, skipped.views, skipped.embeddings, strict=True), key=lambda image: image[1] and image[2]
    )
    own = {
        "process": distributed.rank(),
        # JSON has no NaN.
        "loss": {name: value if math.isfinite(value) else str(value) for name, value in skipped.loss.items()},
        "gradients": _some(skipped.gradients),
        "weights": _some(skipped.weights),
        "images_of_the_step": len(images),
        "images": [
            {"id": number, "name": names[number], "views_finite": views, "embeddings_finite": embeddings}
            for number, views, embeddings in images[:MOST_NAMED]
        ],
    }
    processes = distributed.all_gather_object(own)
    content = {"step": skipped.step, "epoch": skipped.epoch, "skipped_in_a_row": in_a_row, "processes": processes}
    written = False
    if distributed.rank() == 0:
        with suppress(OSError):
            write_json(folder / REPORT, content)
            written = True
    return folder / REPORT if distributed.any_over_ranks(written) else None


def _some(names: Sequence[str]) -> list[str]:
    rest = len(names) - MOST_NAMED
    return [*names[:MOST_NAMED], *([f"and {rest} more"] if rest > 0 else [])]


def norms_of(gradients: Sequence[Tensor]) -> Sequence[Tensor]:
    """The norm of each gradient; in one launch where torch has a function for it."""
    together = getattr(torch, "_foreach_norm", None)
    if together is None or not gradients:
        return [torch.linalg.vector_norm(gradient) for gradient in gradients]
    norms: Sequence[Tensor] = together(gradients)
    return norms


def _norm(module: nn.Module, device: torch.device) -> Tensor:
    """The norm of the gradient; finite if all numbers are, up to 1e19."""
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    return get_total_norm(gradients) if gradients else torch.zeros((), device=device)


def _unsound(loss: Tensor, norms: Sequence[Tensor]) -> Tensor:
    """The number of ranks on which the loss or a norm is not finite; collective."""
    finite = torch.stack([loss.detach(), *norms]).isfinite().all()
    return distributed.total(finite.logical_not().int())
