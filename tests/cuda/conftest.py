"""The fused half block's passes that CUDA C++ leaves to Triton run in its interpreter here."""

from __future__ import annotations

from helpers import interpreter as interpreter
