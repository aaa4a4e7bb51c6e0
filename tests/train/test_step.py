"""One update: in one piece or in chunks, on one process or on several, with and without batch norm."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from manyviews.config import load
from manyviews.data import InMemory
from manyviews.data.images import Pictures
from manyviews.encoder.batch_norm import Shuffle
from manyviews.encoder.encoder import EncoderSettings
from manyviews.encoder.sync_batch_norm import synchronise_batch_norms
from manyviews.objectives import Population
from manyviews.recipe import Recipe
from manyviews.system import distributed
from manyviews.system.launch import start
from manyviews.train import pretrain, step
from manyviews.train.components import Components, batches, build, cautions, label_names
from manyviews.train.pretrain import gradient, train_step, warm_up
from manyviews.train.step import StepResult, num_chunks
from processes import launched

SMALL = [
    "train.batch_size=12",
    "train.precision=fp32",
    "train.threads=1",
    "encoder.projector.dim=8",
    "encoder.projector.hidden=16",
    "optim.name=sgd",
    "optim.rate=0.5",
    "optim.scale=none",
]
SMOOTH = ["encoder.name=test_vit", "views.size=32", "encoder.projector.batch_norm=false"]
NORMED = ["encoder.name=light_resnet"]
QUEUE = ["objective=queue", "objective.size=20", "objective.momentum=0.9"]
OBJECTIVES = {
    "in_batch": ["objective=in_batch"],
    "queue": QUEUE,
    "queue, symmetric": [*QUEUE, "objective.symmetric=true"],
    "bank": ["objective=bank"],
    "nce": ["objective=bank", "objective.estimator=nce", "objective.negatives=9"],
    "parametric": ["objective=bank", "objective.estimator=parametric"],
    "labels": ["objective=queue", "objective.size=20", "ids=labels"],
    "margin": ["objective=margin", "ids=labels"],
    "margin_softmax": ["objective=margin_softmax", "ids=labels"],
    "bilinear": ["objective=in_batch", "objective.score=bilinear"],
}
# timm resizes positions in float32, so that a ViT of several sizes is not to be had in float64.
LOCAL = ["encoder.name=test_convnext", "views.size=48", "views.local=3", "views.local_size=32"]
CPC = [
    *("objective=cpc", "views.num_views=1", "encoder.name=test_convnext", "views.size=48"),
    *("encoder.context=attention", "encoder.context.patches=2", "encoder.context.jitter=0"),
]
PREDICTED = ["encoder.predictor.layers=2", "encoder.predictor.batch_norm=false"]
OBJECTIVES |= {
    "in_batch, local": [*OBJECTIVES["in_batch"], *LOCAL],
    "supervised, local": ["objective=supervised", "ids=labels", *LOCAL],
    "queue, local": [*QUEUE, *LOCAL],
    "queue, symmetric, local": [*OBJECTIVES["queue, symmetric"], *LOCAL],
    "bank, local": [*OBJECTIVES["bank"], *LOCAL],
    "nearest_neighbours, local": ["objective=nearest_neighbours", "objective.size=20", *PREDICTED, *LOCAL],
    "triplet, local": ["objective=triplet", *LOCAL],
    "cpc": CPC,
}


def images(labelled: bool = True) -> InMemory:
    pixels = torch.randint(0, 256, (30, 1, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    # Kinds of images that differ: what a process forgets of the others shows.
    pixels[:15] //= 4
    labels = torch.arange(30) % 7 - 1
    names = [str(index) for index in range(30)]
    return InMemory(pixels, names, labels if labelled else None, tuple("abcdef") if labelled else (), "f")


def components(*words: str) -> Components:
    # Of a key that comes twice, the last one.
    given = {word.split("=")[0]: word for word in (*SMALL, *words)}
    recipe = load(Recipe, None, list(given.values()))
    recipe = recipe.model_copy(update={"views": recipe.views.resolve(size=28, channels=1)})
    built = build(recipe, start(recipe.train.batch_size, recipe.train.precision, 1), images())
    built.forward.train()
    return built


class Precise(nn.Module):
    """Views in float64, which an encoder in float64 takes."""

    def __init__(self, views: nn.Module) -> None:
        super().__init__()
        self.views = views

    def forward(self, *arguments: Any) -> tuple[Tensor, ...]:
        return tuple(group.double() for group in self.views(*arguments))


@pytest.fixture
def precise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EncoderSettings, "build", in_float64)


original = EncoderSettings.build


def in_float64(self: EncoderSettings, **options: Any) -> Any:
    return original(self, **options).double()


def precise_machine(*words: str) -> Components:
    built = components(*words)
    return built._replace(views=Precise(built.views), objective=built.objective.double())


def read(ids: Tensor) -> Pictures:
    return Pictures((images().read(ids),))


def own(ids: Tensor) -> tuple[Pictures, Tensor]:
    """This process's part of a batch."""
    part = ids[distributed.share(len(ids))]
    return read(part), part


def gradients(built: Components, ids: Tensor) -> dict[str, Tensor]:
    taken = gradient(built, *own(ids), 0, 0)
    found = {f"encoder.{name}": value.grad for name, value in built.encoder.named_parameters()}
    found |= {f"objective.{name}": value.grad for name, value in built.objective.named_parameters()}
    found = {name: value for name, value in found.items() if value is not None}
    built.optimiser.zero_grad()
    return found | {"loss": taken.loss.total}


def difference(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    """The largest over the tensors of one, relative to the largest number among all of them."""
    assert one.keys() == two.keys()
    largest = max(value.abs().max().item() for name, value in one.items() if name != "loss")
    return max((one[name] - two[name]).abs().max().item() for name in one) / largest


# Chunks


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.usefixtures("precise")
def test_the_gradient_in_chunks_is_that_of_the_whole_batch(name: str) -> None:
    ids = torch.tensor([3, 8, 20, 27, 1, 14, 9, 29, 0, 16, 22])
    whole = gradients(precise_machine(*SMOOTH, *OBJECTIVES[name]), ids)
    for chunk in (1, 4, 10):
        assert (
            difference(gradients(precise_machine(*SMOOTH, *OBJECTIVES[name], f"train.chunk={chunk}"), ids), whole)
            < 1e-10
        )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_gradient_in_chunks_is_that_of_the_whole_batch_in_fewer_digits(precision: str) -> None:
    ids, words = torch.arange(12), [*SMOOTH, *OBJECTIVES["queue"], f"train.precision={precision}"]
    whole = gradients(components(*words), ids)
    assert (
        difference(gradients(components(*words, "train.chunk=4"), ids), whole) < {"fp32": 1e-5, "bf16": 0.02}[precision]
    )


def test_a_loss_that_is_scaled_for_fp16_scales_the_gradient_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, words = torch.arange(12), [*SMOOTH, *OBJECTIVES["parametric"]]
    plain = gradients(components(*words), ids)
    monkeypatch.setattr(Accelerator, "backward", lambda self, loss: (loss * 1024).backward())
    for chunk in ("null", "4"):
        scaled = gradients(components(*words, f"train.chunk={chunk}"), ids)
        expected = {name: value * (1 if name == "loss" else 1024) for name, value in plain.items()}
        assert difference(scaled, expected) < 1e-5


class Recorded(nn.Module):
    """An encoder, and what it has made."""

    def __init__(self, forward: nn.Module) -> None:
        super().__init__()
        self.inner = forward
        self.outputs: list[Tensor] = []

    def forward(self, *views: Tensor) -> Any:
        embedded = self.inner(*views)
        self.outputs.append(embedded.embeddings.detach().clone())
        return embedded


def recorded(built: Components) -> tuple[Components, list[Tensor]]:
    forward = Recorded(built.forward)
    return built._replace(forward=forward), forward.outputs


def check_that_dropout_is_drawn_alike(*words: str) -> None:
    built, outputs = recorded(components(*SMOOTH, *QUEUE, "encoder.drop_path=0.5", "train.chunk=4", *words))
    same = torch.zeros(12, dtype=torch.int64)
    train_step(built, read(same), same, 0, 5)
    assert len(outputs) == 6
    for chunk in range(3):
        assert torch.equal(outputs[chunk], outputs[chunk + 3])
    assert not torch.equal(outputs[0], outputs[1])


def test_a_chunk_draws_its_dropout_alike_in_both_passes_and_unlike_the_other_chunks() -> None:
    check_that_dropout_is_drawn_alike()


def compiling(built: Components) -> Components:
    train = built.recipe.train.model_copy(update={"compile": True})
    return built._replace(recipe=built.recipe.model_copy(update={"train": train}))


def test_dropout_follows_from_the_seed_the_step_the_rank_and_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    same = torch.zeros(12, dtype=torch.int64)

    def drawn(number: int, rank: int = 0, *words: str) -> list[Tensor]:
        built, outputs = recorded(components(*SMOOTH, "encoder.drop_path=0.5", "train.chunk=6", *words))
        # In a step alone: the engine would wait for the other processes.
        monkeypatch.setattr(step, "distributed", SimpleNamespace(**vars(distributed) | {"rank": lambda: rank}))
        gradient(built, read(same), same, 0, number)
        monkeypatch.undo()
        return outputs[:2]

    first = drawn(5)
    assert all(torch.equal(one, other) for one, other in zip(first, drawn(5), strict=True))
    others = [*drawn(6), *drawn(5, 1), first[1]]
    assert not any(torch.equal(first[0], other) for other in others)
    # Another seed has other weights too, so that it is the generator that is looked at.
    keys: list[int] = []
    built = components(*SMOOTH)
    monkeypatch.setattr(torch, "manual_seed", keys.append)
    for seed in (0, 1):
        recipe = built.recipe.model_copy(update={"seed": seed})
        gradient(built._replace(recipe=recipe), read(same), same, 0, 5)
    assert keys[-1] != keys[-2]


@pytest.mark.parametrize("momentum", [0.25, 0.875])
def test_the_twin_follows_with_the_momentum_of_the_recipe(momentum: float) -> None:
    built = components(*SMOOTH, *QUEUE[:2], f"objective.momentum={momentum}")
    assert built.twin is not None
    before = {name: value.clone() for name, value in built.twin.encoder.named_parameters()}
    train_step(built, *own(torch.arange(12)), 0, 0)
    moved = dict(built.encoder.named_parameters())
    for name, value in built.twin.encoder.named_parameters():
        torch.testing.assert_close(value, momentum * before[name] + (1 - momentum) * moved[name], msg=name)
    assert any(not torch.equal(before[name], moved[name]) for name in before)


@pytest.mark.parametrize("name", ["in_batch", "queue, symmetric", "bank", "margin_softmax"])
def test_compiling_before_the_first_step_leaves_no_trace(name: str) -> None:
    def state(built: Components) -> dict[str, Tensor]:
        parts = {"encoder": built.encoder, "objective": built.objective}
        parts |= {} if built.twin is None else {"twin": built.twin}
        return {f"{part}.{key}": value.clone() for part, of in parts.items() for key, value in of.state_dict().items()}

    ids, built, other = torch.arange(12), components(*OBJECTIVES[name], *NORMED), components(*OBJECTIVES[name], *NORMED)
    before = state(built)
    warm_up(compiling(built), images(), batches(built.recipe, images(), 1))
    torch.testing.assert_close(state(built), before, rtol=0, atol=0, equal_nan=True)
    assert all(parameter.grad is None for parameter in (*built.encoder.parameters(), *built.objective.parameters()))
    for one in (built, other):
        train_step(one, read(ids), ids, 0, 0)
    torch.testing.assert_close(state(built), state(other), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        (TorchDynamoException("backend='inductor' raised:\nRuntimeError: no Triton"), "backend='inductor' raised:"),
        (PermissionError(13, "Permission denied", "/cache"), r"\[Errno 13\] Permission denied: '/cache'"),
        (TorchDynamoException(), "TorchDynamoException"),
    ],
)
def test_what_cannot_be_compiled_is_said_before_the_first_step(
    monkeypatch: pytest.MonkeyPatch, problem: Exception, said: str
) -> None:
    def broken(*arguments: Any) -> None:
        raise problem

    built = components()
    monkeypatch.setattr(pretrain, "gradient", broken)
    order = batches(built.recipe, images(), 1)
    warm_up(built, images(), order)
    with pytest.raises(ValueError, match=rf"compiled here \({said}\); it takes a C\+\+ compiler .* leave train"):
        warm_up(compiling(built), images(), order)


def in_a_process_of_its_own(call: str) -> None:
    """Runs a function of this file where no annotations are checked: torch.compile does not see through that."""
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    code = f"import sys; sys.path[:0] = {paths!r}; import test_step; test_step.{call}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_chunk_draws_its_dropout_alike_when_compiled() -> None:
    in_a_process_of_its_own("check_that_dropout_is_drawn_alike('train.compile=true')")


def check_that_a_run_compiles_nothing(*words: str) -> None:
    graphs: list[int] = []

    def counted(graph: Any, inputs: list[Tensor]) -> Any:
        graphs.append(len(inputs))
        return graph.forward

    compile_ = torch.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda module, **options: compile_(module, backend=counted, **options))
        built = components("train.compile=true", "train.batch_size=12", "train.drop_last=false", *words)
    order = batches(built.recipe, images(), 1)
    assert [len(order.batch(number)[1]) for number in range(3)] == [12, 12, 6]
    warm_up(built, images(), order)
    before = len(graphs)
    assert before >= 2
    for number in range(6):
        epoch, ids = order.batch(number)
        train_step(built, read(ids), ids, epoch, number)
    assert len(graphs) == before


LOCAL_OF_SMALL = ("train.chunk=5", "views.local=2", "views.local_size=16")


@pytest.mark.parametrize(
    "words",
    [
        pytest.param((), marks=pytest.mark.slow),
        pytest.param(("train.chunk=5",), marks=pytest.mark.slow),
        LOCAL_OF_SMALL,
    ],
    ids=["whole", "chunks", "chunks and local views"],
)
def test_a_run_compiles_nothing_after_its_start(words: tuple[str, ...]) -> None:
    # Of the last batch of an epoch, and of unequal chunks, too.
    in_a_process_of_its_own(f"check_that_a_run_compiles_nothing(*{words!r})")


def test_views_that_are_kept_and_views_that_are_made_again_give_the_same_bits() -> None:
    found = []
    for keep in ("true", "false"):
        built = components(*NORMED, *OBJECTIVES["queue"], "train.chunk=4", f"train.keep_views={keep}")
        for number in range(2):
            train_step(built, *own(torch.arange(number, number + 12)), 0, number)
        found.append(built.encoder.state_dict() | built.objective.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_running_statistics_move_once_for_each_chunk() -> None:
    built, other = (components(*NORMED, "train.chunk=4") for _ in range(2))
    before = other.encoder.state_dict()["backbone.stem.1.running_mean"].clone()
    ids = torch.arange(12)
    gradient(built, *own(ids), 0, 0)
    for part in ids.split(4):
        other.forward(*other.views(read(part), part, 0))
    assert not torch.equal(before, other.encoder.state_dict()["backbone.stem.1.running_mean"])
    for (name, one), (_, two) in zip(built.encoder.named_buffers(), other.encoder.named_buffers(), strict=True):
        torch.testing.assert_close(one, two, msg=name)


@pytest.mark.parametrize(
    ("words", "chunk", "batch", "sizes"),
    [
        (SMOOTH, 4, 12, [4, 4, 4]),
        (SMOOTH, 5, 12, [4, 4, 4]),
        (SMOOTH, 11, 12, [6, 6]),
        (SMOOTH, 12, 12, [12]),
        (SMOOTH, 100, 12, [12]),
        (SMOOTH, 1, 3, [1, 1, 1]),
        (NORMED, 4, 9, [3, 3, 3]),
        (NORMED, 2, 3, [3]),
        (NORMED, 2, 5, [3, 2]),
        ([*NORMED, *QUEUE, "encoder.batch_norm_splits=2"], 4, 11, [6, 5]),
    ],
)
def test_chunks_are_of_equal_size_and_none_is_too_small_for_batch_norm(
    words: list[str], chunk: int, batch: int, sizes: list[int]
) -> None:
    built, outputs = recorded(components(*words, f"train.chunk={chunk}"))
    assert num_chunks(built, batch) == len(sizes)
    gradient(built, *own(torch.arange(batch)), 0, 0)
    assert [output.shape[1] for output in outputs] == (sizes * 2 if len(sizes) > 1 else sizes)


def test_a_chunk_too_small_for_batch_norm_is_refused_with_one_that_is_not() -> None:
    with pytest.raises(ValueError, match=r"train\.chunk=1: .*at least 2 images.*train\.chunk=2"):
        components(*NORMED, "train.chunk=1")
    with pytest.raises(ValueError, match=r"train\.chunk=3: .*at least 4 images.*train\.chunk=4"):
        components(*NORMED, *QUEUE, "encoder.batch_norm_splits=2", "train.chunk=3")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([*NORMED, "train.chunk=4"], "batch norms normalise each chunk by its own statistics"),
        ([*SMOOTH, "train.chunk=12"], "train.chunk=12 changes nothing: a process has no more than 12 images"),
        ([*NORMED, *QUEUE], "encoder and its twin normalise the same batch.*batch_norm_splits=2"),
        ([*NORMED, *QUEUE, "encoder.batch_norm_splits=2"], None),
        ([*SMOOTH, *QUEUE, "train.chunk=4"], None),
        (NORMED, None),
    ],
)
def test_what_should_be_known_before_a_run_is_said(words: list[str], said: str | None) -> None:
    found = [line for line in cautions(components(*words)) if not line.startswith("views.size")]
    assert len(found) == (said is not None)
    if said is not None:
        with pytest.raises(UserWarning, match=said):
            raise UserWarning(found[0])


@pytest.mark.parametrize(("size", "larger"), [(28, False), (20, False), (32, True)])
def test_views_larger_than_the_stored_images_are_said(size: int, larger: bool) -> None:
    said = [line for line in cautions(components(*NORMED, f"views.size={size}")) if line.startswith("views.size")]
    assert len(said) == larger
    assert all("from 28 to 32 pixels" in line and "data.size" in line for line in said)


# What the encoder, the twin and the objective see


def test_the_encoder_sees_one_view_and_the_twin_the_other_where_the_objective_asks_for_it() -> None:
    for words, shapes in (([], ((1, 12, 8), (1, 12, 8))), (["objective.symmetric=true"], ((2, 12, 8), (2, 12, 8)))):
        taken = train_step(components(*SMOOTH, *QUEUE, *words), *own(torch.arange(12)), 0, 0)
        assert isinstance(taken, StepResult)
        assert taken.targets is not None
        assert (taken.embeddings.shape, taken.targets.shape) == shapes


@pytest.mark.parametrize("chunk", ["null", "5"])
def test_targets_are_the_projections_where_there_is_a_predictor_and_no_twin(chunk: str) -> None:
    ids, words = torch.arange(12), [*SMOOTH, f"train.chunk={chunk}"]
    assert gradient(components(*words), *own(ids), 0, 0).targets is None
    built = components(*words, *PREDICTED)
    embedded = built.encoder(*built.views(*own(ids), 0))
    taken = gradient(built, *own(ids), 0, 0)
    assert taken.targets is not None
    assert not taken.targets.requires_grad
    torch.testing.assert_close(taken.targets, embedded.projections)
    torch.testing.assert_close(taken.embeddings, embedded.embeddings)
    assert all(parameter.grad is not None for parameter in built.encoder.predictor.parameters())


def test_images_of_a_label_share_an_id_and_images_without_one_have_their_own() -> None:
    found = label_names(images())
    labels = images().labels
    assert labels is not None
    assert torch.equal(found[labels >= 0], labels[labels >= 0])
    alone = found[labels < 0]
    assert len(alone.unique()) == len(alone) == 5
    assert alone.min() > labels.max()
    built = components(*SMOOTH, "ids=labels", "objective=supervised")
    taken = train_step(built, *own(torch.tensor([29, 1, 8, 7])), 0, 0)
    assert isinstance(taken, StepResult)
    assert taken.ids.tolist() == found[[29, 1, 8, 7]].tolist()


def test_labels_that_are_not_there_are_refused_as_ids() -> None:
    with pytest.raises(ValueError, match=r"these images have no labels.*ids=images"):
        label_names(images(labelled=False))


@pytest.mark.parametrize("name", ["bank", "in_batch", "nearest_neighbours"])
def test_objectives_that_know_images_only_refuse_labels_as_ids_and_name_those_that_take_them(name: str) -> None:
    with pytest.raises(ValueError, match=f"ids=labels does not go with objective={name}, (whose|which)") as raised:
        load(Recipe, None, ["ids=labels", f"objective={name}"])
    ways = re.findall(r"objective=(\w+) \(", str(raised.value))
    assert ways == ["supervised", "queue"]
    for way in ways:
        assert load(Recipe, None, ["ids=labels", f"objective={way}"]).objective.name == way


CLASSES = "supervised queue contrastive triplet margin n_pair ranking margin_softmax noise_contrastive"


@pytest.mark.parametrize("name", CLASSES.split())
def test_images_of_a_label_attract_each_other_where_labels_are_taken_as_ids(name: str) -> None:
    settings, ids = load(Recipe, None, ["ids=labels", f"objective={name}"]).objective, torch.tensor([0, 0, 1, 1])
    built = settings.build(dim=8, population=Population(ids), seed=0).double()
    if hasattr(built, "weight"):
        # What brings the images of a class together is its row.
        built.weight.data.copy_(torch.eye(8)[4:6])
    # One view of four images at right angles: what is a positive can only be another image.
    z = torch.eye(8, dtype=torch.float64)[None, :4].clone()
    targets = None if settings.traits.twin_momentum is None else z.clone()
    built.update(z, ids, targets)
    z.requires_grad_()
    (gradient,) = torch.autograd.grad(built(z, ids, targets, 0).total, z)
    rows = torch.nn.functional.normalize((z - 0.1 * gradient).detach()[0], dim=1)
    cosines = rows @ rows.T
    assert min(cosines[0, 1], cosines[2, 3]) > max(cosines[:2, 2:].max(), 0) + 1e-7


def several(count: int) -> InMemory:
    return InMemory(torch.zeros(count, 1, 2, 2, dtype=torch.uint8), [""] * count, None, (), "f")


def test_a_last_batch_is_kept_where_each_process_gets_two_images() -> None:
    words = [*SMALL, "train.batch_size=12"][1:]
    kept = load(Recipe, None, [*words, "train.drop_last=false"])
    steps = [
        [batches(kept, several(count), processes).steps_per_epoch for count in (24, 25, 26, 27, 28)]
        for processes in (1, 2)
    ]
    assert steps == [[2, 2, 3, 3, 3], [2, 2, 2, 2, 3]]
    split = load(Recipe, None, [*words, "train.drop_last=false", "encoder.batch_norm_splits=2"])
    assert [batches(split, several(count), 1).steps_per_epoch for count in (27, 28)] == [2, 3]
    assert batches(load(Recipe, None, words), several(35), 1).steps_per_epoch == 2
    assert batches(kept, several(28), 2, begun_on=1).steps_per_epoch == 3
    with pytest.raises(ValueError, match=r"2 images.*either 1 processes, .* or 2, .*resume it on 1"):
        batches(kept, several(26), 2, begun_on=1)


@pytest.mark.parametrize("key", ["accumulate", "gradient_accumulation_steps"])
def test_whoever_looks_for_gradient_accumulation_is_told_of_chunks(key: str) -> None:
    with pytest.raises(ValueError, match=rf"there is no key train\.{key}: .*adds no negatives.*train\.chunk="):
        load(Recipe, None, [f"train.{key}=4"])


# Local views


def test_local_views_are_the_encoders_alone_and_come_after_the_others() -> None:
    for words, shapes in (
        (QUEUE, ((4, 12, 8), (1, 12, 8))),
        (OBJECTIVES["queue, symmetric"], ((5, 12, 8), (2, 12, 8))),
        (OBJECTIVES["in_batch"], ((5, 12, 8), None)),
    ):
        built = components(*SMOOTH, *words, *LOCAL)
        views = built.views(*own(torch.arange(12)), 0)
        assert [group.shape for group in views] == [(2, 12, 1, 48, 48), (3, 12, 1, 32, 32)]
        taken = gradient(built, *own(torch.arange(12)), 0, 0)
        assert (taken.embeddings.shape, taken.targets if taken.targets is None else taken.targets.shape) == shapes
        local = built.encoder(views[1]).embeddings
        torch.testing.assert_close(taken.embeddings[-3:], local, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["queue, local", "in_batch, local"])
@pytest.mark.parametrize("keep", ["true", "false"])
def test_local_views_that_are_kept_or_made_again_give_the_gradient_of_the_whole(name: str, keep: str) -> None:
    ids, words = torch.arange(12), [*SMOOTH, *OBJECTIVES[name]]
    words += ["encoder.name=test_vit", "views.size=32", "views.local_size=16"]
    found = gradients(components(*words, "train.chunk=4", f"train.keep_views={keep}"), ids)
    assert difference(found, gradients(components(*words), ids)) < 1e-5


@pytest.mark.parametrize("words", [(), QUEUE, [*QUEUE, "encoder.batch_norm_splits=2"]], ids=str)
def test_batch_norms_of_the_backbone_see_the_views_of_each_size_apart(words: list[str]) -> None:
    built = components(*NORMED, *words, "views.local=3", "views.local_size=16")
    seen: list[list[int]] = []
    norm = dict(built.encoder.backbone.named_modules())["stem.1"]
    norm.register_forward_pre_hook(lambda module, inputs: seen.append(list(inputs[0].shape[::3])))
    assert isinstance(train_step(built, *own(torch.arange(12)), 0, 0), StepResult)
    assert seen == [[12 if words else 24, 14], [36, 8]]
    assert norm.get_buffer("num_batches_tracked") == 2


def test_a_step_with_a_local_view_that_is_not_finite_names_its_image() -> None:
    built = components(*SMOOTH, *OBJECTIVES["in_batch, local"])
    views = built.views

    class Broken(nn.Module):
        def forward(self, pictures: Pictures, ids: Tensor, epoch: int) -> tuple[Tensor, ...]:
            whole, local = views(pictures, ids, epoch)
            local[1, (ids == 7).nonzero().flatten()] = torch.nan
            return whole, local

    skipped = train_step(built._replace(views=Broken()), *own(torch.arange(12)), 0, 0)
    assert not isinstance(skipped, StepResult)
    assert [one for one, finite in zip(skipped.ids, skipped.views, strict=True) if not finite] == [7]


# Two processes


def steps_of(*words: str) -> dict[str, Tensor]:
    """A few steps, the second on an odd batch; then what all processes know together."""
    built = precise_machine(*SMOOTH, *words)
    taken = [
        train_step(built, *own(ids), 0, number)
        for number, ids in enumerate([torch.arange(12), torch.arange(5, 16), torch.arange(18, 30)])
    ]
    losses = torch.stack([distributed.mean(one.loss.total) for one in taken])
    state = {"losses": losses, **built.encoder.state_dict()}
    shards = built.objective.shards()
    for name, value in built.objective.state_dict().items():
        state[f"objective.{name}"] = distributed.gather_without_gradient(value) if name in shards else value
    return {name: value.detach().clone() for name, value in state.items()}


def shuffled() -> dict[str, Any]:
    """What an exchange does to the samples of this process, and the places where the twin saw them."""
    rank = distributed.rank()
    found = {}
    for name, count in (("even", 6), ("odd", 5 + rank), ("few", 1 + 2 * rank)):
        local = 100.0 * rank + torch.arange(count * 2.0).view(count, 2)
        shuffle = Shuffle.draw(count, (3, 7, 0))
        away = shuffle.away(local)
        found[name] = {"local": local, "away": away, "home": shuffle.home(away)}
    found["again"] = Shuffle.draw(6, (3, 7, 0)).away(torch.arange(6.0) + 10 * rank)
    found["other"] = Shuffle.draw(6, (3, 8, 0)).away(torch.arange(6.0) + 10 * rank)
    built = components(*NORMED, *QUEUE)
    kinds = {type(module) for module in built.encoder.modules()}
    assert built.twin is not None
    seen: list[Tensor] = []
    built.twin.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    ids = torch.arange(12)
    taken = train_step(built, *own(ids), 0, 0)
    assert isinstance(taken, StepResult)
    (views,) = built.views(*own(ids), 0)
    alone = components(*NORMED, *QUEUE, "objective.shuffle=false")
    chunked = components(*NORMED, *QUEUE, "objective.symmetric=true", "train.chunk=4")
    assert chunked.twin is not None
    sizes: list[list[int]] = []
    chunked.twin.register_forward_pre_hook(lambda module, inputs: sizes.append(list(inputs[0].shape[:2])))
    assert isinstance(train_step(chunked, *own(torch.arange(11)), 0, 0), StepResult)
    found["chunks"] = sizes
    found["twin"] = {"views": views[1:], "seen": seen[0], "targets": taken.targets, "kinds": kinds}
    found["cautions"] = [cautions(built), cautions(alone)]
    found["shuffled"] = [built.shuffled, alone.shuffled, components(*SMOOTH, *QUEUE).shuffled]
    return found


def work(folder: Path) -> None:
    torch.set_num_threads(1)
    EncoderSettings.build = in_float64
    found: dict[str, Any] = {}
    for name, words in OBJECTIVES.items():
        for chunk in ("null", "2"):
            found[f"{name}, {chunk}"] = steps_of(*words, f"train.chunk={chunk}")
    EncoderSettings.build = original
    found["shuffle"] = shuffled()
    torch.save(found, folder / f"{distributed.rank()}.pt")
    distributed.barrier()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    launched(work, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("chunk", ["null", "2"])
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.usefixtures("precise")
def test_two_processes_in_chunks_or_not_do_what_one_does_also_on_an_odd_batch(
    name: str, chunk: str, ranks: list[dict[str, Any]]
) -> None:
    alone = steps_of(*OBJECTIVES[name])
    for rank in ranks:
        found = rank[f"{name}, {chunk}"]
        assert found.keys() == alone.keys()
        for key, value in alone.items():
            torch.testing.assert_close(found[key], value, rtol=1e-10, atol=1e-10, equal_nan=True, msg=key)


@pytest.mark.parametrize("case", ["even", "odd", "few"])
def test_a_shuffle_and_its_way_home_return_the_input(case: str, ranks: list[dict[str, Any]]) -> None:
    found = [rank["shuffle"][case] for rank in ranks]
    for one in found:
        assert torch.equal(one["home"], one["local"])
        assert one["away"].shape == one["local"].shape
    there = torch.cat([one["away"] for one in found])
    assert sorted(there.tolist()) == torch.cat([one["local"] for one in found]).tolist()


def test_a_shuffle_mixes_the_processes_by_its_key(ranks: list[dict[str, Any]]) -> None:
    again, other = ([rank["shuffle"][name] for rank in ranks] for name in ("again", "other"))
    for rank, (one, two) in enumerate(zip(again, other, strict=True)):
        assert 0 < (one >= 10).sum() < 6, rank
        assert not torch.equal(one, two)


def test_the_twins_group_is_another_than_the_encoders_and_its_targets_come_home(ranks: list[dict[str, Any]]) -> None:
    found = [rank["shuffle"]["twin"] for rank in ranks]
    views, seen = (torch.cat([one[name] for one in found], 1) for name in ("views", "seen"))
    # The twin starts as the encoder is: as built here, and split as the processes were.
    built = components(*NORMED, *QUEUE)
    assert built.twin is not None
    places = [(views[0] == view).flatten(1).all(1).nonzero().item() for view in seen[0]]
    assert sorted(places) == list(range(12))
    assert set(places[:6]) != set(range(6))
    with torch.no_grad():
        expected = torch.cat([built.twin(half) for half in seen.chunk(2, 1)], 1)
    targets = torch.cat([one["targets"] for one in found], 1)
    torch.testing.assert_close(targets[:, places], expected, rtol=1e-4, atol=1e-5)


def test_each_chunk_is_shuffled_for_itself(ranks: list[dict[str, Any]]) -> None:
    assert [rank["shuffle"]["chunks"] for rank in ranks] == [[[2, 3], [2, 2]], [[2, 3], [2, 3]]]


def test_shuffled_batch_norms_stay_local_and_where_they_are_not_shuffled_it_is_said(
    ranks: list[dict[str, Any]],
) -> None:
    for rank in ranks:
        assert nn.SyncBatchNorm not in rank["shuffle"]["twin"]["kinds"]
        assert rank["shuffle"]["shuffled"] == [True, False, False]
        with_it, without = rank["shuffle"]["cautions"]
        assert with_it == []
        assert "normalise the same batch" in without[0]
        assert "objective.shuffle=true" in without[0]


def test_synchronised_batch_norms_keep_the_activation_inside_them() -> None:
    module = nn.Sequential(nn.Conv2d(1, 4, 3), BatchNormAct2d(4), nn.BatchNorm2d(4))
    images = torch.randn(8, 1, 6, 6)
    expected = module.eval()(images)
    converted = synchronise_batch_norms(module)
    assert [type(child).__name__ for child in converted[1:]] == ["SyncBatchNormAct", "SyncBatchNorm"]
    assert torch.equal(converted.eval()(images), expected)
