"""Steps whose loss or gradient is not finite: they leave no trace, on any process, and are told of."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from test_step import NORMED, QUEUE, components, own
from torch import Tensor

from manyviews.data.images import Pictures
from manyviews.system import distributed
from manyviews.train.components import Components
from manyviews.train.not_finite import MOST_IN_A_ROW, MOST_NAMED, SkippedStep, SkippedSteps, describe
from manyviews.train.pretrain import train_step
from manyviews.train.step import StepResult
from processes import launched

ADAM = ["optim.name=adamw", "optim.rate=0.01"]
OBJECTIVES = {
    "in_batch": ["objective=in_batch"],
    "queue": [*QUEUE, "objective.symmetric=true"],
    "split": [*QUEUE, "encoder.batch_norm_splits=2"],
    "chunks": [*QUEUE, "train.chunk=4"],
    "bank": ["objective=bank"],
    "nce": ["objective=bank", "objective.estimator=nce", "objective.negatives=9", "objective.normaliser=exact"],
    "parametric": ["objective=bank", "objective.estimator=parametric"],
    "nearest": ["objective=nearest_neighbours", "objective.size=20"],
    "margin": ["objective=margin", "ids=labels"],
    "noise_contrastive": ["objective=noise_contrastive", "objective.negatives=9"],
}


@contextmanager
def infinite_loss(built: Components) -> Iterator[None]:
    def infinite(*arguments: Any) -> Any:
        loss = forward(*arguments)
        return loss._replace(total=loss.total * torch.inf, terms=loss.terms | {"spoiled": torch.tensor(torch.nan)})

    forward = built.objective.forward
    built.objective.forward = infinite
    yield
    del built.objective.forward


@contextmanager
def infinite_value(built: Components) -> Iterator[None]:
    """Of the loss alone: its gradient is finite, so that DDP spreads nothing to the other processes."""

    def infinite(*arguments: Any) -> Any:
        loss = forward(*arguments)
        return loss._replace(total=loss.total + torch.inf, terms=loss.terms | {"spoiled": torch.tensor(torch.nan)})

    forward = built.objective.forward
    built.objective.forward = infinite
    yield
    del built.objective.forward


@contextmanager
def views_of_image_3_are_nan(built: Components) -> Iterator[None]:
    def spoiled(pictures: Pictures, ids: Tensor, epoch: int) -> tuple[Tensor, ...]:
        made: tuple[Tensor, ...] = forward(pictures, ids, epoch)
        made[0][0].masked_fill_((ids == 3)[:, None, None, None], torch.nan)
        return made

    forward = built.views.forward
    built.views.forward = spoiled
    yield
    del built.views.forward


@contextmanager
def infinite_gradient_of_the_encoder(built: Components) -> Iterator[None]:
    hook = next(built.encoder.parameters()).register_hook(lambda gradient: gradient * torch.inf)
    yield
    hook.remove()


SPOILS = {"loss": infinite_loss, "views": views_of_image_3_are_nan, "gradient": infinite_gradient_of_the_encoder}
CASES = [(name, "loss") for name in OBJECTIVES] + [("chunks", "views"), ("split", "gradient"), ("nce", "gradient")]


def state(built: Components) -> dict[str, Tensor]:
    """Everything that a step moves."""
    found = {f"encoder.{name}": value for name, value in built.encoder.state_dict().items()}
    found |= {f"objective.{name}": value for name, value in built.objective.state_dict().items()}
    if built.twin is not None:
        found |= {f"twin.{name}": value for name, value in built.twin.state_dict().items()}
    for index, values in built.optimiser.state_dict()["state"].items():
        found |= {f"optimiser.{index}.{name}": torch.as_tensor(value) for name, value in values.items()}
    return {name: value.clone() for name, value in found.items()}


def differing(one: dict[str, Tensor], two: dict[str, Tensor]) -> list[str]:
    assert one.keys() == two.keys()
    return [name for name in one if not torch.equal(one[name].nan_to_num(7), two[name].nan_to_num(7))]


def step(built: Components, number: int) -> StepResult | SkippedStep:
    """A step on twelve images, with image 3 among them."""
    ids = torch.tensor(sorted({3, *((7 * number + 5 * place) % 30 for place in range(11))}))
    return train_step(built, *own(ids), 0, number)


@pytest.mark.parametrize(("name", "spoil"), CASES)
def test_a_step_that_is_skipped_leaves_no_trace(name: str, spoil: str) -> None:
    words = [*NORMED, *ADAM, *OBJECTIVES[name]]
    left_out, spoiled = components(*words), components(*words)
    for built in (left_out, spoiled):
        assert isinstance(step(built, 0), StepResult)
    before = state(spoiled)
    with SPOILS[spoil](spoiled):
        assert isinstance(step(spoiled, 1), SkippedStep)
    assert differing(before, state(spoiled)) == []
    assert all(parameter.grad is None for parameter in spoiled.encoder.parameters())
    for built in (left_out, spoiled):
        assert isinstance(step(built, 2), StepResult)
    assert differing(before, state(spoiled)) != []
    assert differing(state(left_out), state(spoiled)) == []


def test_what_was_not_finite_is_said() -> None:
    built, said = components(*NORMED, *OBJECTIVES["parametric"]), {}
    for name, spoil in SPOILS.items():
        with spoil(built):
            found = step(built, 4)
        assert isinstance(found, SkippedStep)
        said[name] = describe(found)
        assert found.weights == ()
        healthy = {image: (view, embedding) for image, view, embedding in zip(*found[-3:], strict=True)}
        assert healthy.keys() >= {3}
        # Batch norms spread what is not finite over all images, but views are each image's own.
        assert [image for image, (view, _) in healthy.items() if not view] == ([3] if name == "views" else [])
        assert any(embedding for _, embedding in healthy.values()) == (name != "views")
    first = next(name for name, _ in built.encoder.named_parameters())
    assert said["loss"].startswith("the loss (loss, spoiled) and the gradient of encoder.")
    assert said["views"].startswith("the loss (loss, positive_similarity, information) and the gradient of encoder.")
    assert said["gradient"] == f"the gradient of encoder.{first} is"


def test_weights_that_are_not_finite_are_named() -> None:
    built = components(*NORMED)
    built.encoder.projector[0].weight.data[0, 0] = torch.nan
    found = step(built, 0)
    assert isinstance(found, SkippedStep)
    assert found.weights == ("encoder.projector.0.weight",)
    assert "the weights of encoder.projector.0.weight are not finite" in f"{describe(found)} not finite"


def unhealthy(**changes: Any) -> SkippedStep:
    count = 2 * MOST_NAMED
    alright = tuple(number != 100 for number in range(count))
    given = {"loss": {"loss": float("nan"), "ceiling": 2.5}, "gradients": ("a",) * 99, "weights": ()}
    given |= {"ids": tuple(range(count)), "views": (True,) * count, "embeddings": alright}
    return SkippedStep(41, 3, **(given | changes))


def test_skipped_steps_are_told_of_and_too_many_in_a_row_end_the_run_with_a_report(tmp_path: Path) -> None:
    said: list[str] = []
    names = [f"image {number}" for number in range(2 * MOST_NAMED)]

    def many(skips: SkippedSteps) -> None:
        for _ in range(MOST_IN_A_ROW):
            skips.count(unhealthy())

    skips = SkippedSteps(tmp_path, names, said.append, cure="a lower rate")
    for _ in range(101):
        skips.count(unhealthy())
        skips.count(None)
    assert skips.total == 101
    assert len(said) == 3
    assert said[0] == ("step 42 was skipped: the loss (loss) and the gradient of a are not finite; 1 skipped so far")
    assert not list(tmp_path.iterdir())
    with pytest.raises(
        ValueError,
        match=rf"{MOST_IN_A_ROW} steps in a row .*step 42.*not_finite\.json.*no checkpoint to resume.* a lower rate$",
    ):
        many(skips)
    report = json.loads((tmp_path / "not_finite.json").read_text())
    assert (report["step"], report["epoch"], report["skipped_in_a_row"]) == (41, 3, MOST_IN_A_ROW)
    (process,) = report["processes"]
    assert process["loss"] == {"loss": "nan", "ceiling": 2.5}
    assert process["gradients"][-1] == f"and {99 - MOST_NAMED} more"
    assert len(process["images"]) == MOST_NAMED
    assert process["images"][0] == {
        "id": 100,
        "name": "image 100",
        "views_finite": True,
        "embeddings_finite": False,
    }
    with pytest.raises(ValueError, match="could not be written"):
        many(SkippedSteps(tmp_path / "not" / "there", names, said.append, cure="a lower rate", total=200))


def test_a_scale_of_fp16_that_is_too_high_falls_until_steps_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    built, scaler = components(*NORMED, *ADAM), torch.amp.GradScaler("cpu", init_scale=2.0**16)
    built = built._replace(optimiser=AcceleratedOptimizer(built.optimiser.optimizer, False, scaler))
    monkeypatch.setattr(built.accelerator, "scaler", scaler)
    monkeypatch.setattr(built.accelerator, "unscale_gradients", lambda wrapped: scaler.unscale_(wrapped.optimizer))
    weight = next(built.encoder.parameters())
    weight.register_hook(lambda gradient: gradient * torch.inf if scaler.get_scale() > 2.0**13 else gradient)
    assert [type(step(built, number)) for number in range(4)] == [SkippedStep, SkippedStep, SkippedStep, StepResult]
    assert scaler.get_scale() == 2.0**13


# Two processes


def work(folder: str) -> None:
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name, spoil in (("queue", infinite_loss), ("parametric", infinite_loss), ("in_batch", infinite_value)):
        built = components(*NORMED, *ADAM, *OBJECTIVES[name])
        kinds = [type(step(built, 0)).__name__]
        before = state(built)
        with spoil(built) if distributed.rank() == 1 else nullcontext():
            skipped = step(built, 1)
        assert isinstance(skipped, SkippedStep)
        changed = differing(before, state(built))
        said = describe(skipped)
        kinds += [type(skipped).__name__, type(step(built, 2)).__name__]
        found[name] = {
            "kinds": kinds,
            "changed": changed,
            "said": said,
            "own": [key for key, value in skipped.loss.items() if not math.isfinite(value)],
        }
        try:
            skips = SkippedSteps(Path(folder), ["x"] * 30, lambda text: None, cure="a lower rate")
            for _ in range(MOST_IN_A_ROW):
                skips.count(skipped)
        except ValueError as problem:
            found[name]["problem"] = str(problem)
    (Path(folder) / f"{distributed.rank()}.json").write_text(json.dumps(found))
    distributed.barrier()


def test_what_is_not_finite_on_one_process_is_skipped_by_all_and_the_report_names_the_process(tmp_path: Path) -> None:
    launched(work, str(tmp_path))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    for name, found in first.items():
        assert found["kinds"] == second[name]["kinds"] == ["StepResult", "SkippedStep", "StepResult"]
        assert found["changed"] == second[name]["changed"] == []
        assert found["said"] == second[name]["said"]
        assert found["problem"] == second[name]["problem"]
        assert "spoiled" in found["said"]
        assert (found["own"], second[name]["own"]) == ([], ["loss", "spoiled"])
    report = json.loads((tmp_path / "not_finite.json").read_text())
    assert [process["process"] for process in report["processes"]] == [0, 1]
    assert [process["loss"].get("spoiled") for process in report["processes"]] == [None, "nan"]
