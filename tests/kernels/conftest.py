"""Kernels run in Triton's interpreter here, in which tests/conftest.py lets them."""

from __future__ import annotations

from helpers import interpreter as interpreter
