"""What is measured, and how: the same for every kind of features."""

from typing import Literal, NamedTuple

from jaxtyping import Int64
from pydantic import Field
from torch import Tensor

from manyviews.config import Settings
from manyviews.evaluators.augmented import AugmentedSettings
from manyviews.evaluators.clustering import ClusteringSettings
from manyviews.evaluators.knn import KnnSettings
from manyviews.evaluators.linear import LinearSettings
from manyviews.evaluators.retrieval import RetrievalSettings
from manyviews.evaluators.verification import VerificationSettings

Task = Literal["knn", "linear", "augmented", "retrieval", "clustering", "verification"]
PROBES: tuple[Task, ...] = ("knn", "linear", "augmented")
"""Tasks that predict the classes of test images; the others compare test images with each other."""


class ProtocolSettings(Settings):
    """How features are measured: the same for every kind of features, and without a look at the test labels."""

    knn: KnnSettings = KnnSettings()
    linear: LinearSettings = LinearSettings()
    augmented: AugmentedSettings = AugmentedSettings()
    retrieval: RetrievalSettings = RetrievalSettings()
    clustering: ClusteringSettings = ClusteringSettings()
    verification: VerificationSettings = VerificationSettings()
    held_out: float = Field(0.2, gt=0, lt=1)
    """Share of the training images, of each class alike, on which k, temperature and regularisation are chosen."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Of the draw of that share, of the starts of k-means and of the pairs of verification."""


class Gallery(NamedTuple):
    """The test images that retrieval, clustering and verification compare with each other."""

    images: Int64[Tensor, " gallery"]
    """Their ids among the test images."""
    origin: str
    """What is to be said of their classes: never seen in training, say."""
    fitting: Int64[Tensor, " fitting"]
    """Ids of the training images that a metric may be fitted on: of other classes, where these are to be unseen."""
