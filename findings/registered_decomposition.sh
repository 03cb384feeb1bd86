#!/usr/bin/env bash
# torch 2.13.0: a decomposition registered for an operator (torch._decomp.register_decomposition, as the exporters read it)
# has two effects elsewhere. Fake tensors of symbolic sizes take it in place of the operator's own register_fake, strides
# and all. And inductor, which calls an operator that it does not know as it is, raises for this one - but only where the
# environment has the variable CI, as on most build machines: the same program compiles everywhere else.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${FINDINGS_PYTHON:-$work/venv/bin/python}
if [[ -z ${FINDINGS_PYTHON:-} ]]; then
  python3.11 -m venv "$work/venv"
  "$python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
fi
cd "$work"

cat > program.py <<'PY'
import sys

import torch
from torch._decomp import register_decomposition
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv


@torch.library.custom_op("finding::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return (2 * x).contiguous(memory_format=torch.channels_last)


@twice.register_fake
def _(x):
    return torch.empty_like(x, memory_format=torch.channels_last)


def strides(symbolic):
    mode = FakeTensorMode(shape_env=ShapeEnv() if symbolic else None)
    x = mode.from_tensor(torch.randn(2, 3, 5, 7), static_shapes=not symbolic)
    with mode:
        y = torch.ops.finding.twice(x)
    return "channels_last" if y.stride(1) == 1 else "contiguous"


def compiled():
    try:
        torch.compile(lambda x: torch.ops.finding.twice(x) + 1)(torch.randn(2, 3, 5, 7))
    except Exception as error:
        return "raises: a decomposition exists" if "a decomposition exists" in str(error) else repr(error)
    return "compiles"


if sys.argv[1] == "registered":
    register_decomposition(torch.ops.finding.twice.default)(lambda x: 2 * x)
fixed, symbolic = strides(False), strides(True)
print(f"{sys.argv[1]}: fake of fixed sizes {fixed}, of symbolic sizes {symbolic}; torch.compile {compiled()}")
PY

status=0
for ci in "" 1; do
  outcome=$([[ -z $ci ]] && echo compiles || echo "raises: a decomposition exists")
  for expected in "plain: fake of fixed sizes channels_last, of symbolic sizes channels_last; torch.compile compiles" \
    "registered: fake of fixed sizes channels_last, of symbolic sizes contiguous; torch.compile $outcome"; do
    # In processes of their own: what inductor has once taken, it takes again.
    seen=$(env -u CI ${ci:+CI=1} TORCHINDUCTOR_FORCE_DISABLE_CACHES=1 "$python" -P program.py "${expected%%:*}" 2> /dev/null)
    printf 'CI=%-2s %s\n' "$ci" "$seen"
    [[ $seen == "$expected" ]] || status=1
  done
done
[[ $status == 0 ]] && echo "as seen with torch 2.13.0" || echo "changed"
exit $status
