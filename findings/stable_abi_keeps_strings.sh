#!/usr/bin/env bash
# torch 2.13.0: an operator of the stable ABI (torch/csrc/stable) keeps every string it is given: the headers copy it to
# the heap and nobody frees it, 48 bytes a call for a short one. An integer in its place keeps nothing. Mended in the
# headers of 2.14 (pytorch/pytorch#191340). Needs g++.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${FINDINGS_PYTHON:-$work/venv/bin/python}
if [[ -z ${FINDINGS_PYTHON:-} ]]; then
  python3.11 -m venv "$work/venv"
  "$python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
fi
cd "$work"

cat > operator.cpp <<'CPP'
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <string>
torch::stable::Tensor named(torch::stable::Tensor x, std::string) { return x; }
torch::stable::Tensor numbered(torch::stable::Tensor x, int64_t) { return x; }
STABLE_TORCH_LIBRARY(findings, m) {
  m.def("named(Tensor x, str backend) -> Tensor");
  m.def("numbered(Tensor x, int backend) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(findings, CPU, m) {
  m.impl("named", TORCH_BOX(&named));
  m.impl("numbered", TORCH_BOX(&numbered));
}
CPP
include=$("$python" -P -c 'import torch, pathlib; print(pathlib.Path(torch.__file__).parent / "include")')
g++ -std=c++17 -O1 -shared -fPIC -isystem "$include" operator.cpp -o operator.so \
  -Wl,--no-as-needed -L "$include/../lib" -ltorch_cpu -lc10
"$python" -P - <<'PY'
import ctypes
import gc
import os
import sys

import torch

torch.ops.load_library(os.path.abspath("operator.so"))
FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
Heap = type("Heap", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_size_t) for name in FIELDS.split()]})
libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Heap


def kept(operator, argument, calls=20000):
    x = torch.ones(1)
    for _ in range(1000):
        operator(x, argument)
    gc.collect()
    before = libc.mallinfo2().uordblks
    for _ in range(calls):
        operator(x, argument)
    gc.collect()
    return (libc.mallinfo2().uordblks - before) / calls


names, numbers = kept(torch.ops.findings.named, "cpu"), kept(torch.ops.findings.numbered, 1)
print(f"bytes kept for ever by each call: {names:.1f} with a string, {numbers:.1f} with an integer")
surprise = names > 40 and numbers < 4
print("as seen" if surprise else "changed", "with torch", torch.__version__)
sys.exit(not surprise)
PY
