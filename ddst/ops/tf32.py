"""How torch wants float32 to be multiplied on CUDA devices."""

from __future__ import annotations

import torch


def is_tf32_allowed(*, linear: bool) -> bool:
    """Whether float32 may be multiplied in TF32: by linear layers, or by convolutions.

    That is ``torch.backends.cuda.matmul.allow_tf32`` and ``torch.backends.cudnn.allow_tf32``, or the settings
    ``fp32_precision`` that have taken their place.
    """
    settings = torch.backends.cuda.matmul if linear else torch.backends.cudnn.conv  # type: ignore[attr-defined]
    return bool(settings.fp32_precision == "tf32")
