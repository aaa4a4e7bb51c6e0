"""No objective of a recipe makes the host wait for a GPU."""

import pytest
import test_waits
from test_waits import SMALL, log_and_results

from manyviews import recipe
from manyviews.config import load


@pytest.mark.parametrize("name", recipe.names())
def test_no_objective_makes_the_host_wait(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if load(recipe.Recipe, recipe.find(name)).ids == "labels":
        # A batch of 24 images of four classes has 6 of each, no more than the 8 that bound them.
        small = [setting.replace("images_per_class=null", "images_per_class=8") for setting in SMALL]
        monkeypatch.setattr(test_waits, "SMALL", small)
    log, _ = log_and_results(name)
    assert not [line for line in log.waits if line.startswith(("objectives/", "engine/"))], str(log)
