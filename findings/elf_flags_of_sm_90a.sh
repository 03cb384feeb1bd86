#!/usr/bin/env bash
# ptxas 13.0: the ELF flags of a cubin for sm_90 and of one for sm_90a are equal, so they no longer tell whether a cubin
# needs the architecture's own instructions. Up to 12.8 (the ptxas in Triton 3.6.0's wheel) they differed; what tells
# them apart since stands in a section, .nv.compat.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${FINDINGS_PYTHON:-$work/venv/bin/python}
if [[ -z ${FINDINGS_PYTHON:-} ]]; then
  python3.11 -m venv "$work/venv"
  "$python" -m pip install --quiet --disable-pip-version-check triton==3.6.0 nvidia-cuda-nvcc==13.0.88
fi
cd "$work"

"$python" -P - <<'PY'
import importlib.metadata
import re
import struct
import subprocess
import sys

PTX = ".version 8.0\n.target {0}\n.address_size 64\n.visible .entry kernel() {{ ret; }}\n"


def tools():
    for package in ("triton", "nvidia-cuda-nvcc"):
        for file in importlib.metadata.files(package):
            if file.name == "ptxas":
                yield package, str(file.locate())


flags = {}
for package, ptxas in tools():
    version = re.search(r"V(\d+)\.(\d+)", subprocess.check_output([ptxas, "--version"], text=True)).groups()
    for arch in ("sm_90", "sm_90a"):
        with open("kernel.ptx", "w") as file:
            file.write(PTX.format(arch))
        subprocess.check_call([ptxas, f"-arch={arch}", "kernel.ptx", "-o", "kernel.cubin"])
        with open("kernel.cubin", "rb") as file:
            flags[version[0], arch] = struct.unpack_from("<I", file.read(), 48)[0]
        print(f"{package}'s ptxas {'.'.join(version)}: {arch} has the ELF flags {flags[version[0], arch]:#x}")
surprise = flags["12", "sm_90"] != flags["12", "sm_90a"] and flags["13", "sm_90"] == flags["13", "sm_90a"]
print("as seen" if surprise else "changed")
sys.exit(not surprise)
PY
