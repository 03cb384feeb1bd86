"""How good and how varied generated images are: Fréchet distance and class shares."""

from ddst.metrics.classifier import DigitClassifier, load_classifier, nearest_resolution
from ddst.metrics.frechet import Quality, evaluate_digits, frechet_distance, real_floor

__all__ = [
    "DigitClassifier",
    "Quality",
    "evaluate_digits",
    "frechet_distance",
    "load_classifier",
    "nearest_resolution",
    "real_floor",
]
