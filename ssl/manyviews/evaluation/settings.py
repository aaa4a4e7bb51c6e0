"""Settings of an evaluation, and the tasks and layers that follow from them."""

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_args

from pydantic import BeforeValidator, Field

from manyviews.config import as_list
from manyviews.evaluators.distance import Metric
from manyviews.evaluators.fractions import FractionSettings
from manyviews.evaluators.map import Method
from manyviews.evaluators.protocol import WITHOUT_LABELS, ProtocolSettings
from manyviews.evaluators.results.measurement import EMBEDDED, GROUPING, LEARNED, Task
from manyviews.features.backbone import PretrainedBackbone
from manyviews.features.encoding import EncodeSettings
from manyviews.features.layers import BACKBONE, EMBEDDING
from manyviews.recipe import Recipe
from manyviews.system.files import sha256
from manyviews.system.names import did_you_mean

AnyTask = Literal[Task, "geometry"]


def _task_list(value: object) -> object:
    names = as_list(value)
    known = [name for part in get_args(AnyTask) for name in get_args(part) or (part,)]
    for name in names if isinstance(names, list | tuple) else ():
        if name not in known:
            raise ValueError(f"{name!r} is none of {', '.join(known)}{did_you_mean(str(name), known, cutoff=0.5)}")
    return names


class EvaluateSettings(EncodeSettings):
    """What is measured of a run, and how."""

    baselines: bool = True
    """Measure random weights and raw pixels too."""
    layer: Literal["backbone", "embedding", "both"] | None = None
    """The layer that is measured: the backbone's features, or the embedding that the objective compares (the
    projector's output, or the predictor's if there is one). Null: both, if the objective trains embeddings to be
    compared (triplet, margin, margin_softmax, …) or images are compared with each other; else the backbone. The verdict
    on retrieval, ranking, clustering, verification and few_shot is then of the layer that the objective trains for it,
    and on kNN and probes of the backbone."""
    tasks: Annotated[tuple[AnyTask, ...] | None, BeforeValidator(_task_list)] = Field(None, min_length=1)
    """What is measured, one or several with commas: knn, linear, fractions (the probe from few labels), augmented (the
    probe as papers train it, on new crops in every epoch: minutes, not seconds), retrieval, ranking (NDCG and rank
    correlations, with relevance by class, continuous labels or relations=FILE), clustering, verification, few_shot,
    geometry; null: knn, linear, fractions and geometry, retrieval if the run has unseen classes, ranking if it has
    values or there are relations, and verification if there are pairs; without labels geometry, and ranking and
    verification likewise. Ranking, clustering and verification of pairs need no labels."""
    classes: Annotated[tuple[int | str, ...] | None, BeforeValidator(as_list)] = Field(None, min_length=1)
    """Classes, by name or number, whose test images are compared with each other (retrieval, ranking, clustering,
    verification, few_shot); null: those that the run left out of training (its unseen), or else all."""
    pairs: str | None = None
    """A file of pairs for verification: lines a,b,same or a,b,same,fold (same is 1 or 0), or LFW's pairs.txt; no labels
    are needed. Null: pairs drawn of those images."""
    relations: str | None = None
    """A file that rankings are judged by (csv, tsv or jsonl): ranked lists, query,item,relevance or query,items in
    order; or triplets, anchor,positive,negative."""
    metric: Metric | None = None
    """The distance by which neighbours are searched; null: the cosine, and for the embedding of an objective that
    trains Euclidean distances (log_ratio; triplet and contrastive with normalized=false) that one. All but cosine and
    euclidean are fitted on labelled training images, without those of the classes named or unseen, for each kind of
    features, and saved in OUTPUT/metrics. metric=mmc metric.relations=FILE is fitted on given pairs of them."""
    protocol: ProtocolSettings = ProtocolSettings()
    few: FractionSettings = FractionSettings()
    """The numbers of labels of the task fractions."""
    output: str | None = None
    """The folder that evaluation.json, report.html, features and fitted metrics are written to; null: the run's."""
    cache: bool = True
    """Save features in OUTPUT/features, and read them from there, or from RUN/features, while weights, images and
    transform are the same."""
    report: bool = True
    """Write report.html and its pictures for TensorBoard."""
    maps: Annotated[tuple[Method, ...], BeforeValidator(as_list)] = ("tsne", "pca")
    """Maps of the features in the report, the first shown first: pca, tsne, umap (needs umap-learn); [] for none."""
    comparison: str | None = None
    """A JSON file that the comparison of several runs is written to."""


class Layers(NamedTuple):
    """The kinds of a run's features that are measured."""

    kinds: tuple[str, ...]
    """Images are compared with each other by the first."""
    reason: str = ""
    """Why that one, in a sentence; empty if there is no other."""
    missing: str = ""
    """Why the embedding is not measured, if it should be."""


def recipe_of(pretrained: PretrainedBackbone) -> Recipe:
    """Returns the recipe of a run."""
    assert pretrained.recipe is not None, "only runs are measured"
    return pretrained.recipe


def planned_tasks(settings: EvaluateSettings, recipe: Recipe, *, labelled: bool) -> tuple[AnyTask, ...]:
    """Returns the tasks of the settings, by default those that the images allow.

    Raises:
        ValueError: if a task takes labels and there are none, or a file of pairs or relations is given for no task.
    """
    by_pairs: tuple[AnyTask, ...] = ("verification",) if settings.pairs is not None else ()
    if settings.tasks is None:
        retrieval: tuple[AnyTask, ...] = ("retrieval",) if recipe.unseen else ()
        by_classes: tuple[AnyTask, ...] = ("knn", "linear", "fractions", *retrieval) if labelled else ()
        by_files: tuple[AnyTask, ...] = ("ranking",) if recipe.values is not None or settings.relations else ()
        return (*by_classes, *by_files, *by_pairs, "geometry")
    for key, file, task in (("pairs", settings.pairs, "verification"), ("relations", settings.relations, "ranking")):
        if file is not None and task not in settings.tasks:
            raise ValueError(
                f"{key}={file} is for tasks={task}, and tasks={','.join(settings.tasks)}; add it, or leave {key} out"
            )
    if not labelled and not set(settings.tasks) <= {"geometry", *WITHOUT_LABELS, *by_pairs}:
        raise ValueError(
            f"tasks={','.join(settings.tasks)} takes labels and held-out images, and there are none: give "
            "data=/a/folder that has one sub-folder per class, or tasks=geometry; clustering, ranking, and "
            "verification of pairs=FILE need none"
        )
    return settings.tasks


def pairs_mark(settings: EvaluateSettings) -> str | None:
    """Returns the name and the hash of the file of pairs; None without one; OSError if it cannot be read."""
    return _mark(settings.pairs)


def relations_mark(settings: EvaluateSettings) -> str | None:
    """Returns the name and the hash of the file of relations; None without one; OSError if it cannot be read."""
    return _mark(settings.relations)


def _mark(file: str | None) -> str | None:
    if file is None:
        return None
    path = Path(file).expanduser()
    return f"{path.name} sha256:{sha256(path)[:16]}"


def measured_layers(pretrained: PretrainedBackbone, settings: EvaluateSettings, tasks: Collection[str]) -> Layers:
    """Returns the layers of the settings, by default those that the tasks are about; collective.

    By default both are measured if the objective trains embeddings to be compared, or a task compares images with each
    other, and the embedding can be loaded; else the backbone alone.

    Raises:
        ValueError: if the embedding was asked for and cannot be loaded.
    """
    objective = recipe_of(pretrained).objective
    by_default = settings.layer is None
    if settings.layer == BACKBONE or (
        by_default and not (objective.traits.compares_embeddings or GROUPING & set(tasks))
    ):
        return Layers((LEARNED,))
    try:
        pretrained.head(EMBEDDING)
    except ValueError as problem:
        if not by_default:
            raise
        return Layers((LEARNED,), missing=f"only the backbone is measured, and not the embedding: {problem}")
    if settings.layer == EMBEDDING:
        return Layers((EMBEDDED,))
    if objective.traits.compares_embeddings:
        return Layers(
            (EMBEDDED, LEARNED),
            f"Images are compared by the embedding, because objective={objective.name} trains it to be compared; "
            "the backbone is listed beside it. kNN and probes are of the backbone.",
        )
    return Layers(
        (LEARNED, EMBEDDED),
        f"Images are compared by the backbone, because objective={objective.name} trains a backbone; the embedding is "
        "listed beside it.",
    )
