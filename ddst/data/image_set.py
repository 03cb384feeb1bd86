"""Images of one size in memory, or mapped into it, and what is known of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor


class DataError(ValueError):
    """The images asked for cannot be had; the message is one line that says which and why."""


@dataclass(frozen=True)
class ImageSet:
    """x = 2 · stored / top − 1: N images of one size, kept as they were stored (a byte a channel for files).

    Attributes:
        name: "digits", "shapes" or the path of the data.
        stored: `[N, channels, resolution, resolution]`, uint8 for files, float32 for digits. Nobody writes to it.
        top: the stored value that stands for white (255, or 16 for digits).
        labels: `[N]` int64 class of every image, or None where there are no classes.
        left_out: reason -> number of files and folders that were not read (:func:`ddst.data.files.find_images`).
        note: one line on what was left out and what was laid over white; empty where there is nothing to say.
        took: one line on which form of data set was found, what of it is read and where it is kept.
    """

    name: str
    stored: Tensor
    top: float
    labels: Tensor | None = None
    left_out: Mapping[str, int] = field(default_factory=dict)
    note: str = ""
    took: str = ""

    def __len__(self) -> int:
        return self.stored.shape[0]

    @property
    def channels(self) -> int:
        return self.stored.shape[1]

    @property
    def resolution(self) -> int:
        return self.stored.shape[2]

    def batch(self, indices: Tensor | slice) -> Tensor:
        """Images at `indices` in torch's default dtype (float32), in [-1, 1], laid out channels_last.

        Indices from N to 2·N − 1 are the same images mirrored left to right: image `i − N`.

        Example:
            >>> images = ImageSet("one", torch.tensor([[[[0, 255]]]], dtype=torch.uint8), 255.0)
            >>> images.batch(torch.tensor([0, 1])).flatten(1).tolist()
            [[-1.0, 1.0], [1.0, -1.0]]
        """
        if isinstance(indices, slice):
            chosen = self.stored[indices]
        else:
            mirrored = indices >= len(self)
            chosen = self.stored[torch.where(mirrored, indices - len(self), indices)]
            if mirrored.any():
                chosen[mirrored] = chosen[mirrored].flip(-1)
        images = chosen.to(torch.get_default_dtype()) * (2.0 / self.top) - 1.0
        return images.contiguous(memory_format=torch.channels_last)

    def fingerprint(self) -> str:
        """SHA-256 over shape and contents: tells a resumed run whether it sees the same images. Computed once."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256(repr((tuple(self.stored.shape), str(self.stored.dtype), self.top)).encode())
        digest.update(self.stored.numpy().data)
        return digest.hexdigest()
