"""How a number of things is said."""

import pytest

from manyviews.config.vocabulary import plain
from manyviews.system.plural import plural


@pytest.mark.parametrize(
    ("count", "noun", "several", "said"),
    [
        (1, "image", "", "1 image"),
        (2000, "image", "", "2,000 images"),
        (0, "class", "classes", "0 classes"),
        (1, "class", "classes", "1 class"),
        (1.0, "epoch", "", "1 epoch"),
        (0.5, "epoch", "", "0.5 epochs"),
    ],
)
def test_one_is_said_in_the_singular(count: int | float, noun: str, several: str, said: str) -> None:
    assert plural(count, noun, several) == said


@pytest.mark.parametrize("name", ["NT-Xent Loss", "nt_xent", "NT-XentLoss", " nt xent "])
def test_a_name_is_looked_up_however_it_is_written(name: str) -> None:
    assert plain(name) == "nt_xent"
