"""Runs the Triton kernels in Triton's interpreter: they are decorated at import, so the switch comes first."""

from __future__ import annotations

import os
import sys

assert "ddst.kernels" not in sys.modules, "ddst.kernels was imported before TRITON_INTERPRET=1: no other part may do so"
os.environ["TRITON_INTERPRET"] = "1"

import numpy as np  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

_patch_lang_tensor = interpreter._patch_lang_tensor


def _with_index(tensor: type, scope: interpreter._LangPatchScope) -> None:
    """numpy >= 2.4 refuses int() of a one-element array, so that range(tl.load(...)) raises (triton issue 9171)."""
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).reshape(-1)[0]))


interpreter._patch_lang_tensor = _with_index
