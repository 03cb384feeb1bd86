"""How good and how varied generated images are: Fréchet distances, neighbours, inception score, class shares."""

from ddst.metrics.classifier import EmbeddedClassifier, load_classifier, nearest_resolution
from ddst.metrics.frechet import Quality, evaluate_embedded, frechet_distance, frechet_of_moments, real_floor
from ddst.metrics.prdc import Manifolds, prdc
from ddst.metrics.statistics import Moments, Origin, read_reference, write_statistics

__all__ = [
    "EmbeddedClassifier",
    "Manifolds",
    "Moments",
    "Origin",
    "Quality",
    "evaluate_embedded",
    "frechet_distance",
    "frechet_of_moments",
    "load_classifier",
    "nearest_resolution",
    "prdc",
    "read_reference",
    "real_floor",
    "write_statistics",
]
