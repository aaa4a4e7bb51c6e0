"""Maps of a run's features for the report."""

from torch import Tensor

from manyviews.data import sample_ids
from manyviews.evaluation.run_tasks import Job, Kinds
from manyviews.evaluators.map import flat_map
from manyviews.system import distributed
from manyviews.system.plural import plural

FEWEST, MOST = 3, 2_000
"""Images on a map: more would take longer and show no more."""


def maps(job: Job, kinds: Kinds) -> dict[str, tuple[Tensor, Tensor]]:
    """Computes maps of some of the images shown, by the first kind of features; on rank 0 alone."""
    leading, (_, rows) = next(iter(kinds.items()))
    seed = job.settings.protocol.seed
    if len(rows) < FEWEST or distributed.rank() > 0:
        return {}
    ids = sample_ids(len(rows), MOST, seed=seed)
    points: dict[str, tuple[Tensor, Tensor]] = {}
    for method in job.settings.maps:
        job.console.say(f"map of {plural(len(ids), 'image')}: {method}")
        try:
            points[method] = ids, flat_map(rows[ids], method, seed=seed)
        except Exception as problem:
            job.on_failure(f"the map {method}", leading, problem)
    return points
