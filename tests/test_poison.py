"""The fixture `poison_outputs` reaches memory that C++ allocates through torch's stable ABI, as ddst's kernels do."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch

SOURCE = """
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
using torch::stable::Tensor;
static Tensor unwritten(const Tensor& like, int64_t how) {
  if (how == 0) return torch::stable::empty({64}, like.scalar_type());
  if (how == 1) return torch::stable::new_empty(like, {64});
  return torch::stable::empty_like(like);
}
STABLE_TORCH_LIBRARY(ddst_test_poison, m) { m.def("unwritten(Tensor like, int how) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(ddst_test_poison, CPU, m) { m.impl("unwritten", TORCH_BOX(&unwritten)); }
"""


@pytest.fixture(scope="module")
def unwritten(tmp_path_factory: pytest.TempPathFactory) -> torch._ops.OpOverloadPacket:
    """An op that returns memory it never wrote: by `empty`, `new_empty` or `empty_like`."""
    folder = tmp_path_factory.mktemp("poison")
    (folder / "unwritten.cpp").write_text(SOURCE)
    home = Path(torch.__file__).parent
    compiler = [os.environ.get("CXX", "c++"), "-std=c++17", "-O1", "-fPIC", "-shared"]
    headers = ["-DTORCH_TARGET_VERSION=0x020a000000000000", f"-isystem{home / 'include'}"]
    libraries = [f"-L{home / 'lib'}", "-Wl,--no-as-needed", "-ltorch_cpu"]
    command = [*compiler, *headers, "unwritten.cpp", "-o", "unwritten.so", *libraries]
    subprocess.run(command, cwd=folder, check=True)
    torch.ops.load_library(folder / "unwritten.so")
    return torch.ops.ddst_test_poison.unwritten


@pytest.mark.usefixtures("poison_outputs")
@pytest.mark.parametrize("how", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_unwritten_outputs_are_nan(unwritten: torch._ops.OpOverloadPacket, how: int, dtype: torch.dtype) -> None:
    assert unwritten(torch.zeros(64, dtype=dtype), how).isnan().all()
    assert torch.empty(64, dtype=dtype).isnan().all()


def test_poison_ends_with_the_test() -> None:
    assert not torch.are_deterministic_algorithms_enabled()
