"""Training images in memory, and a sampler whose position is part of a checkpoint."""

from ddst.data.image_set import DataError, ImageSet
from ddst.data.images import EMBEDDED, load_images
from ddst.data.sampler import Sampler

__all__ = ["EMBEDDED", "DataError", "ImageSet", "Sampler", "load_images"]
