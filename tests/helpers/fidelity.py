"""All of torch-fidelity where torchvision cannot be imported, to compare with, and made weights of the published form.

torch-fidelity imports torchvision for data sets, which nothing here uses; a wheel of torchvision fits one build of
torch and does not load beside another. ddst itself imports the module of the network only.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import torch


def import_fidelity() -> None:
    """Makes torch_fidelity importable: with torchvision where it can be had, else with names in its place."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        for name in ("", ".datasets", ".transforms", ".transforms.functional"):
            sys.modules[f"torchvision{name}"] = ModuleType(f"torchvision{name}")
            # Others ask importlib whether there is one.
            sys.modules[f"torchvision{name}"].__spec__ = ModuleSpec(f"torchvision{name}", None)
        vision, functional = sys.modules["torchvision"], sys.modules["torchvision.transforms.functional"]
        vision.transforms = sys.modules["torchvision.transforms"]
        vision.transforms.functional = functional
        for name in ("CIFAR10", "CIFAR100", "STL10"):
            setattr(sys.modules["torchvision.datasets"], name, type(name, (), {}))
    import torch_fidelity  # noqa: F401


def inception_weights(path: Path) -> Path:
    """Random weights under the published names, without the counters that older files lack."""
    from ddst.metrics.inception import _blank_network

    torch.manual_seed(0)
    network = _blank_network()
    state = {}
    for name, value in network.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        if name.endswith("running_var"):
            value = torch.rand(value.shape) + 0.5
        elif value.dim() > 1:
            value = torch.randn(value.shape) * (2 / value[0].numel()) ** 0.5
        state[name] = value
    torch.save(state, path)
    return path
