"""What tasks take beside features: relevances of rankings, thresholds of clusters, pairs of a metric."""

from itertools import chain
from pathlib import Path

import torch

from manyviews.data.labels import values_of
from manyviews.data.relations import RelationTable, read_relations
from manyviews.evaluation.job import Job
from manyviews.evaluation.record import EVALUATION, evaluation_of, records_in
from manyviews.evaluators.distance import MetricPairs
from manyviews.evaluators.protocol import Gallery
from manyviews.evaluators.relevance import Lists, Relevance, Triplets, near_values, same_class
from manyviews.evaluators.results.measurement import THRESHOLD
from manyviews.linear_metrics import MMC
from manyviews.linear_metrics.mmc import check_similarities
from manyviews.system.files import read_json, shown
from manyviews.system.plural import plural


def relevance_of(job: Job, gallery: Gallery) -> Relevance:
    """Returns what a run's rankings are judged by: a file of relations, values, or classes.

    Raises:
        ValueError: if the file cannot be read or has pairs or sets, images have no class or value, or all have the
            same.
    """
    settings, images = job.settings.protocol.ranking, job.shown
    if job.settings.relations is not None:
        others = [] if job.split.test is None else job.split.train.names
        path = Path(job.settings.relations).expanduser()
        table = read_relations(path, images.names, others, key="relations")
        for note in table.notes:
            job.console.warn(f"{shown(path)}: {note}")
        return relevance_in(path, table)
    by = settings.by or job.recipe.values or "class"
    if by != "class":
        if settings.by is None and by.endswith(".npy") and job.split.test is not None:
            raise ValueError(
                f"the run's values={by} has a row for each training image, and none for those held out; name a .csv "
                "with theirs by protocol.ranking.by=FILE, or rank by protocol.ranking.by=class"
            )
        return near_values(values_of(images, by, torch.float64), gallery.images, by)
    labels = images.labels
    classes = 0 if labels is None else len(labels[gallery.images][labels[gallery.images] >= 0].unique())
    if labels is None or classes < 2:
        raise ValueError(
            f"ranking by class takes images of 2 classes or more, and these have {classes}; rank by continuous labels, "
            "protocol.ranking.by=pixels or a .csv file, or by relations=FILE"
        )
    return same_class(labels, gallery.images)


def relevance_in(path: Path, table: RelationTable) -> Lists | Triplets:
    """Returns the relevances in a file of relations.

    Raises:
        ValueError: if they are pairs or sets, which order nothing.
    """
    if table.kind == "triplets":
        return Triplets(table.ids, f"triplets of {shown(path.name)}")
    if table.kind == "ranked":
        queries, counts = table.ids[:, 0].unique_consecutive(return_counts=True)
        return Lists(queries, counts, table.ids[:, 1], table.numbers, shown(path.name))
    way_out = {
        "pairs": "judge pairs by tasks=verification pairs=FILE",
        "sets": "judge sets as classes, with data.labels=FILE and protocol.ranking.by=class",
    }
    raise ValueError(
        f"relations={shown(path)} has {table.kind}, which put no images into an order; {way_out[table.kind]}, or give "
        "ranked lists (query,item,relevance) or triplets (anchor,positive,negative)"
    )


def metric_pairs_of(job: Job, gallery: Gallery) -> MetricPairs | None:
    """Reads the pairs of metric.relations, those of training images that are not to stay unseen; None without.

    Raises:
        ValueError: if the file cannot be read or holds no pairs, or those that can be used are all similar, or all
            dissimilar.
    """
    metric, split = job.settings.metric, job.split
    if not isinstance(metric, MMC) or metric.relations is None:
        return None
    path = Path(metric.relations).expanduser()
    held_out = () if split.test is None else split.test.names
    others = chain(held_out, split.left_out, (name for name, _ in split.unreadable))
    table = read_relations(path, split.train.names, others, key="metric.relations")
    if table.kind != "pairs":
        raise ValueError(
            f"metric.relations={shown(path)} holds no pairs: metric=mmc is fitted on pairs of images (a,b,same)"
        )
    usable = torch.isin(table.ids, gallery.fitting).all(1)
    for note in table.notes:
        job.console.warn(f"{shown(path)}: {note}")
    if dropped := int((~usable).sum()):
        job.console.warn(
            f"{shown(path)}: {plural(dropped, 'pair')} of classes that are to stay unseen left out of metric=mmc"
        )
    check_similarities(table.numbers[usable])
    return MetricPairs(table.ids[usable], table.numbers[usable])


def thresholds_of(job: Job) -> dict[str, float]:
    """Reads the thresholds of an earlier verification with these weights and metric, by kind of features."""
    folder = job.output or job.pretrained.folder
    assert folder is not None
    metric = None if job.settings.metric is None else job.settings.metric.model_dump(mode="json")
    try:
        for record, _ in records_in(read_json(folder / EVALUATION)):
            if (record.get("weights"), record.get("metric")) == (dict(job.pretrained.origin), metric):
                measured = evaluation_of(record).of("verification", metric=THRESHOLD)
                if thresholds := {own.features: own.value for own in measured}:
                    return thresholds
    except (OSError, ValueError):
        pass
    return {}
