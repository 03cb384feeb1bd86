"""The averaged generator of a run, by itself: read back from a run's checkpoint, or from one safetensors file.

Both say what they hold: the settings, image channels and classes that the architecture follows from, and for each
packed weight its block, density and shape. Nothing is guessed, and nothing of a file is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ddst._arguments import check_device
from ddst.models.families import FAMILIES
from ddst.nn import sparse_layers
from ddst.nn.packed_facts import KEY as FACTS
from ddst.nn.packed_facts import packed_facts, sizes
from ddst.train.checkpoint import CheckpointError, load_checkpoint, replacing
from ddst.train.config import TrainConfig, fitting, resolve
from ddst.train.folder import CHECKPOINT, versions
from ddst.train.options import ConfigError
from ddst.train.players import build_networks, check_memory, make_sparse
from ddst.train.rules import Misfit
from ddst.train.state_schema import network

KEY = "ddst generator"  # Of the description among a safetensors file's metadata.


@dataclass(frozen=True)
class About:
    """What a file says of the generator in it.

    Attributes:
        settings: of the run, by the names of `TrainConfig`; with `channels` and `classes` they make the architecture.
        channels: of the images. classes: of the images, 1 for a network that takes none.
        layers: name of a packed layer -> its "weight_shape", "block" and "density"; empty for a dense generator.
        step: training steps that made it.
        versions: of the programs that wrote it.
    """

    settings: Mapping[str, Any]
    channels: int
    classes: int
    layers: Mapping[str, Mapping[str, Any]]
    step: int
    versions: Mapping[str, str]

    @property
    def config(self) -> TrainConfig:
        """The settings, resolved; those that this ddst has and the file's did not have their defaults.

        Raises:
            ConfigError: a setting that this ddst does not know, or of another type or range.
        """
        return resolve({**self.settings, "out": "."})


def load_generator(path: str | PathLike[str], device: torch.device | str = "cpu") -> nn.Module:
    """The averaged generator of a run, in eval mode: ``generator(noise)``, of biggan ``generator(noise, classes)``.

    Args:
        path: folder of a run, its checkpoint, or a file of ``ddst export --safetensors`` or ``--dense``.
        device: where its tensors are to lie.

    Returns:
        A network of :mod:`ddst.models` with the packed layers of the file (of ``--dense``: torch's own layers). Noise
        is ``[N, generator.latent]``, standard normal, classes ``[N]``, int64, below ``generator.classes``, None
        where it takes none. Images are ``[N, channels, resolution, resolution]`` in [-1, 1]; those of r3gan and
        stylegan2 may go beyond. Noise and classes that do not fit are a ValueError (on CUDA devices classes are not
        compared).

    Raises:
        CheckpointError: (a ValueError) the file is missing, damaged, of another kind, or its tensors are not those of
            the architecture, block or density that it says it has; one line that names both.

    Numerics: the bits of the generator that was written. torch's random state is left as it is. A stylegan2 generator
    draws noise for each pixel from it at every call, in eval mode, too: `torch.manual_seed` before a call repeats one.

    Example:
        >>> import ddst
        >>> ddst.load_generator("runs/none")
        Traceback (most recent call last):
        ddst.train.checkpoint.CheckpointError: no run and no generator at the path runs/none
    """
    return read_generator(path, device)[0]


def read_generator(path: str | PathLike[str], device: torch.device | str = "cpu") -> tuple[nn.Module, About]:
    """`load_generator`, with what the file says of it."""
    if not isinstance(path, str | PathLike) or "\0" in fspath(path):
        raise TypeError(f"path must be that of a run or a file, got {path!r}")
    device, file = check_device("device", device), Path(path)
    try:
        file = file / CHECKPOINT if file.is_dir() else file
        if not file.exists():
            raise CheckpointError(f"no run and no generator at the path {path}")
        read = _of_safetensors if _is_safetensors(file) else _of_checkpoint
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from None
    state, about = read(file)
    try:
        config = about.config
        generator = _built(config, about)
    except ConfigError as error:
        raise CheckpointError(f"{file}: no generator of its settings: {error}") from None
    try:
        _load(generator, state, about)
    except Misfit as error:
        described = (
            f"{config.model} of {config.resolution}x{config.resolution} pixels, width {config.width_g}, latent "
            f"{config.latent}, channels {about.channels}"
        )
        raise CheckpointError(f"{file} does not hold the generator that it describes ({described}): {error}") from None
    return generator.to(device).eval(), about


def write_generator(path: Path, generator: nn.Module, about: About) -> None:
    """Write a generator, packed or dense, with its description as one safetensors file, whole or not at all.

    Raises:
        OSError: it cannot be written; `path` holds what it held before.
    """
    text = json.dumps(
        {
            "settings": dict(about.settings),
            "channels": about.channels,
            "classes": about.classes,
            "layers": _facts(generator),
            "step": about.step,
            "versions": versions(),
        }
    )
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in generator.state_dict().items()}
    with replacing(path) as out:
        out.write(save(tensors, {KEY: text}))


def _facts(generator: nn.Module) -> dict[str, dict[str, Any]]:
    return {name: packed_facts(layer) for name, layer in sparse_layers(generator).items()}


def _is_safetensors(file: Path) -> bool:
    """Whether it begins as such a file does: eight bytes of length, then JSON; a checkpoint is a zip file."""
    with file.open("rb") as opened:
        return opened.read(9)[8:] == b"{"


def _of_safetensors(file: Path) -> tuple[dict[str, Tensor], About]:
    try:
        with safe_open(file, framework="pt") as opened:
            text = (opened.metadata() or {}).get(KEY)
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"cannot read {file}: {error}") from None
    if text is None:
        raise CheckpointError(f"{file} says of no generator what it is: no file of ddst export")
    try:
        return state, _about(json.loads(text))
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: the description of its generator is damaged: {error!r}") from None


def _about(said: Any) -> About:
    """The description as it was written; tuples came back as lists, which `resolve` takes."""
    step, layers = said["step"], dict(said["layers"])
    if type(step) is not int:
        raise ValueError(f"step {step!r}")
    for name, most in (("channels", 64), ("classes", 2**24)):
        if type(said[name]) is not int or not 1 <= said[name] <= most:
            raise ValueError(f"{name} {said[name]!r}")
    for name, facts in layers.items():
        shape, block, density = facts["weight_shape"], facts["block"], facts["density"]
        if not all(type(n) is int for n in [*shape, *block]) or len(block) != 2 or type(density) is not float:
            raise ValueError(f"layer {name!r}: {facts!r}")
    return About(dict(said["settings"]), said["channels"], said["classes"], layers, step, dict(said["versions"]))


def _of_checkpoint(file: Path) -> tuple[dict[str, Tensor], About]:
    held = load_checkpoint(file, "a checkpoint of ddst train, or a file of ddst export --safetensors or --dense")
    try:
        state = held["ema"]["module"]
        facts = {name: entry[FACTS] for name, entry in state._metadata.items() if FACTS in entry}
        return state, _about({**held, "settings": held["config"], "layers": facts})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file} holds no generator: {error!r}") from None


def _built(config: TrainConfig, about: About) -> nn.Module:
    """A new generator as the trainer made it; what is random in it is overwritten."""
    config = replace(config, batch_norm="local", backend="auto", device="cpu")
    with torch.random.fork_rng(devices=[]), fitting("networks"):
        check_memory(config, about.channels, about.classes)
        generator, discriminator = build_networks(config, about.channels, about.classes)
        if about.layers:
            make_sparse(config, generator, discriminator)
    if not FAMILIES[config.model].conditional:
        generator.classes = None
    return generator


def _parts(state: Mapping[str, Tensor]) -> list[str]:
    """Names of the modules that tensors belong to, or of tensors that belong to none inside."""
    return list(dict.fromkeys(name.rpartition(".")[0] or name for name in state))


def _some(parts: Sequence[str]) -> str:
    """Modules in words: the first one by its name.

    Example:
        >>> _some([]), _some(["linear"]), _some(["linear", "blocks.0"])
        ('nothing', 'linear', 'linear and 1 more')
    """
    return (parts[0] if len(parts) < 2 else f"{parts[0]} and {len(parts) - 1} more") if parts else "nothing"


def _settings(config: TrainConfig) -> str:
    """What decides which weights are packed, in the words of the options."""
    packing = "" if config.method == "dense" else f" --density {config.density:g} --block {sizes(config.block)}"
    return f"--method {config.method}{packing}"


def _packed(density: float, block: Sequence[int]) -> str:
    return f"packed at density {density:.6g} in blocks of {sizes(block)}"


def _load(generator: nn.Module, state: Mapping[str, Tensor], about: About) -> None:
    """Raises Misfit unless the tensors are those of the generator, and of the blocks and densities that are named."""
    layers = sparse_layers(generator)
    made, held = _parts(generator.state_dict()), _parts(state)
    lacking, beyond = [part for part in made if part not in held], [part for part in held if part not in made]
    if lacking or beyond:
        raise Misfit(
            f"its settings make {_some(lacking)} that it lacks, it holds {_some(beyond)} that they do not make"
        )
    for name in [*layers, *about.layers]:
        if name not in layers:
            packed = _packed(about.layers[name]["density"], about.layers[name]["block"])
            raise Misfit(f"{name} is {packed}, by its settings ({_settings(about.config)}) dense")
        if name not in about.layers:
            packed = _packed(layers[name].density, layers[name].block)
            raise Misfit(f"{name} is dense, by its settings ({_settings(about.config)}) {packed}")
    for name, layer in layers.items():
        said, values = about.layers[name], state.get(f"{name}.values")
        if tuple(said["block"]) != layer.block:
            raise Misfit(f"{name} has blocks of {sizes(said['block'])}, by its settings of {sizes(layer.block)}")
        if values is not None and tuple(values.shape[1:]) != layer.block:
            raise Misfit(f"{name}.values has blocks of {sizes(values.shape[1:])}, it says {sizes(layer.block)}")
        if tuple(said["weight_shape"]) != layer.weight_shape:
            raise Misfit(
                f"{name} is a weight of {sizes(said['weight_shape'])}, by its settings of {sizes(layer.weight_shape)}"
            )
    network(generator)(dict(state), "")
    generator.load_state_dict(state)
    for name, layer in layers.items():
        if abs(layer.density - about.layers[name]["density"]) > 1e-9:
            raise Misfit(f"{name} has the density {layer.density:.6g}, it says {about.layers[name]['density']:.6g}")
