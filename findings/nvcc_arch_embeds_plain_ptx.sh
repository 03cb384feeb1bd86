#!/usr/bin/env bash
# nvcc 13.0: `-arch=sm_90a` compiles a program twice, for sm_90a and as PTX for plain compute_90, where the
# architecture's own instructions (wgmma, setmaxnreg) do not assemble. So a kernel that uses one does not compile by
# `-arch=sm_90a`, but does by `-arch=sm_90a -cubin`, or by `-gencode=arch=compute_90a,code=sm_90a`.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${FINDINGS_PYTHON:-$work/venv/bin/python}
if [[ -z ${FINDINGS_PYTHON:-} ]]; then
  python3.11 -m venv "$work/venv"
  "$python" -m pip install --quiet --disable-pip-version-check nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 \
    nvidia-cuda-crt==13.0.88
fi
cd "$work"

"$python" -P - <<'PY'
import importlib.metadata
import re
import subprocess
import sys

nvcc = next(str(f.locate()) for f in importlib.metadata.files("nvidia-cuda-nvcc") if f.name == "nvcc")
with open("empty.cu", "w") as file:
    file.write("int main() { return 0; }\n")


def images(*options):
    """What nvcc would compile for: (kind, architecture) of each image; nothing is compiled."""
    done = subprocess.run([nvcc, *options, "--dryrun", "empty.cu"], capture_output=True, text=True, check=True)
    return sorted(set(re.findall(r"--image3=kind=(\w+),sm=(\w+)", done.stderr)))


version = re.search(r"V([\d.]+)", subprocess.check_output([nvcc, "--version"], text=True)).group(1)
short, long = images("-arch=sm_90a"), images("-gencode=arch=compute_90a,code=sm_90a")
print(f"nvcc {version}: -arch=sm_90a makes {short}")
print(f"nvcc {version}: -gencode=arch=compute_90a,code=sm_90a makes {long}")
surprise = ("ptx", "90") in short and ("elf", "90a") in short and long == [("elf", "90a")]
print("as seen" if surprise else "changed")
sys.exit(not surprise)
PY
