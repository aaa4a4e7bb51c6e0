"""Reads the pairs that a metric is fitted on in place of classes."""

from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from manyviews.data import Split, read_relations
from manyviews.evaluators.distance import Metric, MetricPairs
from manyviews.linear_metrics import MMC
from manyviews.linear_metrics.mmc import check_similarities
from manyviews.system.console import Console
from manyviews.system.files import shown
from manyviews.system.first_rank import from_first
from manyviews.system.plural import plural


def metric_pairs(metric: Metric | None, split: Split, fitting: Tensor, console: Console) -> MetricPairs | None:
    """Pairs of the file of metric.relations, of training images with ids in `fitting`; None without; collective.

    Raises:
        ValueError: if the file cannot be read or holds no pairs, or those that can be used are all similar, or all
            dissimilar.
    """
    if not isinstance(metric, MMC) or metric.relations is None:
        return None
    path = Path(metric.relations).expanduser()
    held_out = () if split.test is None else split.test.names
    others = chain(held_out, split.left_out, (name for name, _ in split.unreadable))
    table = from_first(partial(read_relations, path, split.train.names, others, option="metric.relations"))
    if table.kind != "pairs":
        raise ValueError(
            f"metric.relations={shown(path)} holds no pairs: metric=mmc is fitted on pairs of images (a,b,same)"
        )
    usable = torch.isin(table.ids, fitting).all(1)
    ids, same = table.ids[usable], table.numbers[usable]
    for note in table.notes:
        console.warn(f"{path}: {note}")
    if (dropped := int((~usable).sum())) > 0:
        console.warn(f"{path}: {plural(dropped, 'pair')} of classes that are to stay unseen left out of metric=mmc")
    check_similarities(same)
    return MetricPairs(ids, same)
