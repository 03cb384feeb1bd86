"""Runs layers and whole GAN iterations of one build on request; started by `against.py`, once for each build.

Uses torch and ddst's public Python only (layers, `sparsify`, `set_block_mask`, `ddst.models`, autograd), so that it
runs with builds of any revision, whatever the arguments of their operators are: ``against_worker.py ANSWERS THREADS
CLOCK``. A request is a line of JSON on standard input, its answer a line on the file descriptor ANSWERS:

* ``{"do": "hello"}``: where the build lies.
* ``{"do": "layer", ...}`` and ``{"do": "gan", ...}`` make what is to be measured, check it against dense arithmetic or
  the reference backend, and answer with what is wrong and the names of the programs.
* ``{"do": "peak", "file": ...}``: the most bytes that a GAN iteration holds; the file is this build's
  ``ddst/peak_memory.py``, which the other may not have, and which imports torch only.
* ``{"do": "time", "program": NAME, "calls": N}``: seconds per call, of N in a row.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ddst

PEAK: dict[str, Callable[[str], int]] = {}  # of the GAN that was asked for last
Programs = dict[str, Callable[[], object]]

EXCHANGED = 0.3  # share of the active blocks that one exchange moves
TOLERANCE = {"float32": 1e-4, "float64": 1e-10}
GAN_TOLERANCE = 1e-3  # of a gradient that went through both networks


def layer_programs(request: dict[str, Any]) -> tuple[list[str], Programs]:
    """What is wrong with a layer, and its passes and step."""
    torch.manual_seed(0)
    kernel, stride, size = request["kernel"], request["stride"], request["size"]
    padding, dtype, device = request["padding"], getattr(torch, request["dtype"]), request["device"]
    given = {"bias": False, "device": device, "dtype": dtype}
    given |= {"block": tuple(request["block"]), "density": request["density"]}
    into, out = request["in_channels"], request["out_channels"]
    layer: Any
    if size:
        layer = ddst.SparseConv2d(into, out, kernel, stride, padding, **given)
        layer.channels_last = request["channels_last"]
    else:
        layer = ddst.SparseLinear(into, out, **given)
    mask = torch.zeros(layer.block_mask.shape, dtype=torch.bool).flatten()
    mask[torch.tensor(request["active"])] = True
    layer.set_block_mask(mask.view(layer.block_mask.shape).to(device))
    exchange([layer], request["exchanges"])
    layer.reset_parameters()

    x = laid_out(torch.randn([request["batch"], into, *[size] * (2 if size else 0)]), request).to(device, dtype)
    with torch.no_grad():
        gy = laid_out(torch.randn_like(layer(x)), request)
    wanted = x.detach().clone().requires_grad_()
    layer.values.requires_grad_(False)
    for_input = layer(wanted)
    layer.values.requires_grad_()
    for_weight = layer(x)

    def forward() -> Tensor:
        with torch.no_grad():
            return layer(x)

    def input_gradient() -> Tensor:
        return torch.autograd.grad(for_input, wanted, gy, retain_graph=True)[0]

    def weight_gradient() -> Tensor:
        return torch.autograd.grad(for_weight, layer.values, gy, retain_graph=True)[0]

    def step() -> object:
        return torch.autograd.grad(layer(wanted), [wanted, layer.values], gy)

    def dense(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, None, stride, padding) if size else F.linear(x, weight)

    packed = layer.dense_weight()
    exact = [x.detach().double().requires_grad_(), packed.detach().double().requires_grad_()]
    y = dense(*exact)
    gx, gw = torch.autograd.grad(y, exact, gy.double())
    expected = [y, gx, torch.autograd.grad(packed, layer.values, gw.to(dtype))[0]]
    programs: Programs = {"forward": forward, "dgrad": input_gradient, "wgrad": weight_gradient, "step": step}
    results = [forward(), input_gradient(), weight_gradient()]
    errors = {name: error_of(r, e) for name, r, e in zip(programs, results, expected, strict=False)}
    tolerance = TOLERANCE[request["dtype"]]
    return [f"{name} (error {error:.1e})" for name, error in errors.items() if not error < tolerance], programs


def gan_programs(request: dict[str, Any]) -> tuple[list[str], Programs]:
    """What is wrong with the gradients of two networks, and a whole iteration: D steps, a G step, optimizers."""
    from ddst.models import Discriminator, Generator

    torch.manual_seed(0)
    size, latent, batch, device = request["resolution"], request["latent"], request["batch"], request["device"]
    nets = Generator(size, request["width_g"], 3, latent), Discriminator(size, request["width_d"], 3)
    generator, discriminator = (net.to(device, memory_format=torch.channels_last).train() for net in nets)
    for net in (generator, discriminator):
        ddst.sparsify(net, request["density"], block=tuple(request["block"]))
        exchange(sparse_layers(net), request["exchanges"])
        if hasattr(ddst, "fuse"):  # builds of before have none
            ddst.fuse(net)
    betas = tuple(request["betas"])
    adam_g = torch.optim.Adam(generator.parameters(), lr=request["lr"], betas=betas)
    adam_d = torch.optim.Adam(discriminator.parameters(), lr=request["lr_d"], betas=betas)
    reals = [torch.rand(batch, 3, size, size, device=device) * 2 - 1 for _ in range(request["d_steps"])]
    reals = [real.contiguous(memory_format=torch.channels_last) for real in reals]

    def noise() -> Tensor:
        return torch.randn(batch, latent, device=device)

    def iteration() -> None:
        for real in reals:
            with torch.no_grad():
                fake = generator(noise())
            scores = discriminator(torch.cat([real, fake]))
            adam_d.zero_grad()
            (F.relu(1.0 - scores[:batch]).mean() + F.relu(1.0 + scores[batch:]).mean()).backward()
            adam_d.step()
        discriminator.requires_grad_(False)
        adam_g.zero_grad()
        (-discriminator(generator(noise())).mean()).backward()
        adam_g.step()
        discriminator.requires_grad_(True)

    def peak(file: str) -> int:
        spec = importlib.util.spec_from_file_location("peak_memory", file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["peak_memory"] = module  # where its dataclass looks itself up
        spec.loader.exec_module(module)
        found = module.peak_memory(iteration, [generator, discriminator], [adam_g, adam_d], torch.device(device).type)
        return int(found.peak)

    PEAK["gan"] = peak
    return wrong_gradients(nn.Sequential(generator, discriminator), noise()[:2]), {"step": iteration}


def wrong_gradients(model: nn.Module, noise: Tensor) -> list[str]:
    """Sparse layers whose gradient of the summed scores differs from that of the reference backend."""
    model = copy.deepcopy(model).eval()
    layers = sparse_layers(model)
    gradients = []
    for backend in ("auto", "reference"):
        for layer in layers:
            layer.backend = backend
        gradients.append(torch.autograd.grad(model(noise).sum(), [layer.values for layer in layers]))
    pairs = enumerate(zip(*gradients, strict=True))
    errors = {i: error_of(ours, expected) for i, (ours, expected) in pairs}
    return [f"gradient of sparse layer {i} (error {e:.1e})" for i, e in errors.items() if not e < GAN_TOLERANCE]


def sparse_layers(net: nn.Module) -> list[Any]:
    return [module for module in net.modules() if isinstance(module, ddst.SparseConv2d | ddst.SparseLinear)]


def exchange(layers: list[Any], times: int) -> None:
    """Moves blocks at random, as training does, so that layers are in the state of a long run; counts stay."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(times):
        for layer in layers:
            mask = layer.block_mask.flatten().cpu()
            active, free = mask.nonzero().flatten(), (~mask).nonzero().flatten()
            moved = min(max(1, round(EXCHANGED * len(active))), len(active), len(free))
            mask[active[torch.randperm(len(active), generator=generator)[:moved]]] = False
            mask[free[torch.randperm(len(free), generator=generator)[:moved]]] = True
            layer.set_block_mask(mask.view(layer.block_mask.shape).to(layer.block_mask.device))


def laid_out(tensor: Tensor, request: dict[str, Any]) -> Tensor:
    last = request["channels_last"] and tensor.dim() == 4
    return tensor.contiguous(memory_format=torch.channels_last) if last else tensor.contiguous()


def error_of(result: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected entry; NaN stays NaN."""
    result, expected = result.detach().double(), expected.detach().double()
    return float((result - expected).abs().max() / expected.abs().max().clamp(min=1e-300))


def main() -> None:
    """Answers until standard input ends."""
    descriptor, threads, clock_name = sys.argv[1:]
    answers = os.fdopen(int(descriptor), "w")
    torch.set_num_threads(int(threads))
    clock = time.process_time if clock_name == "cpu" else time.perf_counter
    programs: Programs = {}
    synchronize: Callable[[], object] = lambda: None  # noqa: E731

    def timed(name: str, calls: int) -> float:
        work = programs[name]
        synchronize()
        start = clock()
        for _ in range(calls):
            work()
        synchronize()
        return (clock() - start) / calls

    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "time":
                answer: dict[str, Any] = {"seconds": timed(request["program"], request["calls"])}
            elif request["do"] == "peak":
                answer = {"peak": PEAK["gan"](request["file"])}
            elif request["do"] == "hello":
                answer = {"file": ddst.__file__, "version": ddst.__version__, "torch": torch.__version__}
            else:
                programs = {}  # what was measured before is freed first
                synchronize = torch.cuda.synchronize if request["device"] == "cuda" else lambda: None
                make = gan_programs if request["do"] == "gan" else layer_programs
                wrong, programs = make(request)
                answer = {"wrong": wrong, "programs": list(programs)}
        except Exception as error:  # whatever it is, the other side has to hear of it
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
