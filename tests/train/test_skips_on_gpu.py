"""Steps that a GPU skips by itself, on a pretend one: nothing changes, nothing waits, and the host learns it later."""

import json
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from test_gpu_run import lines, run
from test_not_finite import ADAM, OBJECTIVES, SPOILS, differing, infinite_value, state
from test_step import NORMED, components, own
from torch import Tensor

from manyviews.run.folder import read_metrics
from manyviews.system import distributed
from manyviews.train import kept_buffers, not_finite
from manyviews.train import pretrain as loop
from manyviews.train.components import Components
from manyviews.train.not_finite import MOST_IN_A_ROW, SkippedStep, describe
from manyviews.train.pretrain import train_step
from manyviews.train.step import StepResult
from pretend_cuda import LOG, pretend_cuda
from processes import launched

OPTIMISERS = {
    "adamw": ADAM,
    "sgd": ["optim.name=sgd"],
    "lars": ["optim.name=lars"],
    "clipped": [*ADAM, "optim.clip=0.1"],
    "fp16": [*ADAM, "train.precision=fp16"],
}
SPOILED = {**SPOILS, "value": infinite_value}
CASES = [
    *((name, "adamw", "loss") for name in OBJECTIVES),
    *(("queue", optimiser, "gradient") for optimiser in OPTIMISERS),
    *(("parametric", optimiser, "views") for optimiser in ("sgd", "lars")),
    # Its gradients are finite, so that a scaler would take the step.
    ("queue", "fp16", "value"),
    ("chunks", "adamw", "views"),
    ("margin", "sgd", "gradient"),
    ("nce", "adamw", "gradient"),
]
FAST = {("bank", "adamw", "loss"), ("queue", "sgd", "gradient"), ("queue", "clipped", "gradient"), CASES[-4]}
"""What is tried by default."""


def step(built: Components, number: int) -> StepResult | SkippedStep:
    """A step on this process's part of twelve images, with image 3 among them."""
    ids = torch.tensor(sorted({3, *((7 * number + 5 * place) % 30 for place in range(11))}))
    return train_step(built, *(part.to(built.accelerator.device) for part in own(ids)), 0, number)


def seen(result: StepResult | SkippedStep) -> SkippedStep | None:
    """What the host learns of a step."""
    return result if isinstance(result, SkippedStep) else result.skipped()


def content(built: Components) -> dict[str, Tensor]:
    """All state, on the CPU; what an optimiser has not seen yet is zero."""
    return {name: value.cpu() for name, value in state(built).items() if bool(value.cpu().any())}


@pytest.mark.parametrize("first", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["later step", "first step"])
@pytest.mark.parametrize(
    ("name", "optimiser", "spoil"),
    [case if case in FAST else pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
)
def test_a_gpu_skips_what_the_cpu_skips_without_a_trace_and_without_a_wait(
    name: str, optimiser: str, spoil: str, first: bool
) -> None:
    words = [*NORMED, *OPTIMISERS[optimiser], *OBJECTIVES[name]]
    with pretend_cuda():
        left_out, spoiled = components(*words), components(*words)
        for built in (left_out, spoiled):
            if not first:
                assert seen(step(built, 0)) is None
        before = content(spoiled)
        with SPOILED[spoil](spoiled):
            LOG.clear()
            result = step(spoiled, 1)
            assert not [line for line in LOG.waits if line.startswith(("train/", "encoder/"))], str(LOG)
            skipped = seen(result)
        assert differing(before, content(spoiled)) == []
        assert all(parameter.grad is None for parameter in spoiled.encoder.parameters())
        for built in (left_out, spoiled):
            if optimiser == "fp16":
                # Its scale has fallen.
                built.accelerator.scaler.scale(torch.ones((), device="cuda"))
                built.accelerator.scaler.update(2.0**10)
            assert seen(step(built, 2)) is None
        assert differing(before, {key: content(spoiled)[key] for key in before}) != []
        assert differing(content(left_out), content(spoiled)) == []
    if optimiser == "fp16":
        return
    alone = components(*words)
    if not first:
        step(alone, 0)
    with SPOILED[spoil](alone):
        expected = seen(step(alone, 1))
    assert skipped is not None
    assert expected is not None
    assert (skipped.ids, skipped.views, skipped.weights) == (expected.ids, expected.views, expected.weights)
    assert (skipped.embeddings, skipped.gradients) == (expected.embeddings, expected.gradients)
    assert skipped.loss == pytest.approx(expected.loss, rel=2e-3, nan_ok=True)


def test_an_overflow_of_fp16_lowers_the_scale_on_the_gpu_until_steps_are_taken() -> None:
    with pretend_cuda() as log:
        built = components(*NORMED, *ADAM, "train.precision=fp16")
        scaler = built.accelerator.scaler
        scale = scaler.scale(torch.ones((), device="cuda"))
        assert float(scale) == 2.0**16
        weight = next(built.encoder.parameters())
        weight.register_hook(
            lambda gradient: gradient.masked_fill(scaler.scale(torch.ones_like(gradient)) > 2.0**13, torch.inf)
        )
        log.clear()
        results = [step(built, number) for number in range(4)]
        assert not [line for line in log.waits if line.startswith("train/")], str(log)
        assert [seen(result) is None for result in results] == [False, False, False, True]
        assert scaler.get_scale() == 2.0**13


class Without:
    """torch without one of its functions."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, name: str) -> Any:
        if name == self.name:
            raise AttributeError(name)
        return getattr(torch, name)


@pytest.mark.parametrize(("module", "name"), [(kept_buffers, "_foreach_copy_"), (not_finite, "_foreach_norm")])
def test_functions_that_torch_may_drop_are_replaced_by_ones_that_do_the_same(
    module: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = []
    for of_torch in (torch, Without(name)):
        monkeypatch.setattr(module, "torch", of_torch)
        with pretend_cuda():
            built = components(*NORMED, *OPTIMISERS["lars"], *OBJECTIVES["queue"])
            step(built, 0)
            with SPOILS["gradient"](built):
                skipped = seen(step(built, 1))
            step(built, 2)
            assert skipped is not None
            states.append((skipped.gradients, content(built)))
    assert states[0][0] == states[1][0] != ()
    assert differing(states[0][1], states[1][1]) == []


# Whole runs


@contextmanager
def bad_steps(numbers: range) -> Iterator[None]:
    """Makes the loss of some steps infinite."""

    def spoiled(built: Components, *arguments: Any) -> Any:
        with infinite_value(built) if arguments[-1] in numbers else nullcontext():
            return train_step(built, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", spoiled)
        yield


def test_skipped_steps_are_in_the_lines_and_warnings_of_a_run_as_on_the_cpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = []
    # The last one too, which is looked at before the last checkpoint.
    for name, device in (("cpu", nullcontext()), ("gpu", pretend_cuda())):
        context: AbstractContextManager[Any] = device
        with context:
            with bad_steps(range(2, 4)):
                loop.pretrain(run(tmp_path / name, "train.monitor=0", steps=4))
            output = " ".join("".join(capsys.readouterr()).split())
            told += re.findall(r"step \d+ was skipped: .*? skipped so far", output)
    found, expected = lines(tmp_path / "gpu"), lines(tmp_path / "cpu")
    assert [line["skipped"] for line in found] == [line["skipped"] for line in expected] == [0, 0]
    assert told == [told[0], told[0]]
    assert told[0].startswith("step 3 was skipped: the loss (loss, spoiled) is not finite; 1")


def test_too_many_steps_in_a_row_end_a_run_on_a_gpu_with_a_report(tmp_path: Path) -> None:
    many = rf"{MOST_IN_A_ROW} steps in a row were skipped, up to step 21: the loss"
    with pretend_cuda(), bad_steps(range(1, 99)), pytest.raises(ValueError, match=many):
        loop.pretrain(run(tmp_path / "run", "train.monitor=0", steps=40))
    report = json.loads((tmp_path / "run" / "not_finite.json").read_text())
    assert (report["step"], report["skipped_in_a_row"]) == (20, MOST_IN_A_ROW)
    assert len(report["processes"][0]["images"]) == 32
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1]


# Two processes


def work(folder: str) -> None:
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with pretend_cuda(devices=2):
        for name in ("queue", "bank", "parametric", "nearest"):
            built = components(*NORMED, *ADAM, *OBJECTIVES[name])
            kinds = [seen(step(built, 0)) is None]
            before = content(built)
            with infinite_value(built) if distributed.rank() == 1 else nullcontext():
                LOG.clear()
                result = step(built, 1)
                # DDP's buckets are copied: to it a pretend GPU is no CUDA device.
                waits = [line for line in LOG.waits if "blocking copy" not in line]
                skipped = seen(result)
            assert skipped is not None
            changed = differing(before, content(built))
            kinds.append(seen(step(built, 2)) is None)
            found[name] = {"kinds": kinds, "changed": changed, "said": describe(skipped), "waits": waits}
    (Path(folder) / f"{distributed.rank()}.json").write_text(json.dumps(found))
    distributed.barrier()


def test_what_is_not_finite_on_one_gpu_is_skipped_by_all_without_a_trace(tmp_path: Path) -> None:
    launched(work, str(tmp_path))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    for found in first.values():
        assert (found["kinds"], found["changed"], found["waits"]) == ([True, True], [], [])
        assert "spoiled" in found["said"]
