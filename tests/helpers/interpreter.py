"""Makes Triton's interpreter work with new versions of numpy, at import; tests/conftest.py lets kernels run in it."""

from __future__ import annotations

import numpy as np
from triton.runtime import interpreter

_patch_lang_tensor = interpreter._patch_lang_tensor


def _with_index(tensor: type, scope: interpreter._LangPatchScope) -> None:
    """numpy >= 2.4 refuses int() of a one-element array, so that range(tl.load(...)) raises (triton issue 9171)."""
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).reshape(-1)[0]))


interpreter._patch_lang_tensor = _with_index
