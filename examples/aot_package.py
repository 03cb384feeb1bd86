"""A sparse network as an AOTInductor package: one file that runs without Python code of the model.

    python examples/aot_package.py

Compiles on the machine it is meant for (a C++ compiler is needed there, once). The packed weights are in the package.
"""

import tempfile
from pathlib import Path

import torch
from torch import nn

import ddst  # also where a package is loaded: its operators are called by name

torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(128, 256, 3, padding=1), nn.ReLU(), nn.Conv2d(256, 128, 3, padding=1))
net.to(memory_format=torch.channels_last)
dense_bytes = sum(p.nbytes for p in net.parameters())
ddst.sparsify(net, 0.1)
net.eval()  # a network exported in training mode is a mixture
x = torch.randn(4, 128, 16, 16).to(memory_format=torch.channels_last)

with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=256)},))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(Path(folder, "net.pt2")))
    size = Path(package).stat().st_size
    loaded = torch._inductor.aoti_load_package(package)
    more = torch.randn(9, 128, 16, 16).to(memory_format=torch.channels_last)
    off = max(float((loaded(batch) - net(batch)).abs().max()) for batch in (x, more))

print(f"outputs of the package differ by at most {off:.1e}; {size:,} bytes, dense weights alone {dense_bytes:,}")
