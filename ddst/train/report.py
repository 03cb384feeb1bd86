"""The end of a run: its numbers, the table that shows them, and the picture of how it went."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ddst.metrics import Quality, evaluate_embedded
from ddst.metrics.classifier import TRAINED
from ddst.sparsity.stats import network_stats
from ddst.train.checkpoint import replacing
from ddst.train.compare import Timing, compare_with_dense, time_of_layers
from ddst.train.folder import LOG, REPORT, SUMMARY
from ddst.train.layer_time import LayerTime
from ddst.train.log import lengths, read_log
from ddst.train.loop import Trainer
from ddst.train.methods import steered_by
from ddst.train.options import flag
from ddst.train.pictures import Points, draw_decisions, draw_signal, line, panels
from ddst.train.samples import generate


@dataclass(frozen=True)
class NetworkCost:
    """One network at the end of a run; `dense_` is its dense twin.

    Attributes:
        density: share of active weights.
        parameters, dense_parameters: with biases and batch norm.
        state_bytes, dense_state_bytes: weights, gradients, Adam's moments, for G the moving average, and (sparse) the
            masks and index vectors, and with `published` the moments of dense gradients.
        flops_ratio: counted operations over the whole run, relative to dense; of any image, without penalties.
    """

    density: float
    parameters: int
    dense_parameters: int
    state_bytes: int
    dense_state_bytes: int
    flops_ratio: float


@dataclass(frozen=True)
class Summary:
    """All numbers of the final table.

    Attributes:
        quality: the embedded distance, of data that has one. measured: the last figure of the log, for other data.
        uncounted: options of what D's loss has that counted operations have not.
    """

    method: str
    steps: int
    generator: NetworkCost
    discriminator: NetworkCost
    flops_ratio: float
    seconds_per_step: float
    timing: Timing | None
    layers: list[LayerTime]
    quality: Quality | None
    fd_samples: int
    measured: dict[str, Any] | None
    uncounted: tuple[str, ...] = ()


def summarize(trainer: Trainer) -> Summary:
    """Count, time and judge a finished run; nothing of it is changed."""
    config, players, flops = trainer.config, trainer.players, trainer.flops
    steps = max(trainer.step, 1)

    def cost(
        net: nn.Module,
        optimizer: Optimizer,
        average: nn.Module | None,
        held: list[Tensor],
        forward: float,
        dense: float,
    ) -> NetworkCost:
        for parameter in net.parameters():  # Of a run resumed after its end: no backward pass has made gradients yet.
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        stats = network_stats(net, optimizer, average, held)
        memory = stats.memory
        return NetworkCost(
            stats.density,
            stats.parameters,
            stats.dense_parameters,
            memory.total + memory.index,
            memory.dense,
            forward / (steps * dense),
        )

    (forward_g, forward_d), (held_g, held_d) = trainer.forward_flops, trainer.scheduler.held
    timing = None
    if config.method != "dense" and config.compare_steps:
        timing = compare_with_dense(trainer, config.compare_steps)
    return Summary(
        config.method,
        trainer.step,
        cost(players.generator, players.optimizer_g, trainer.ema.module, held_g, forward_g, flops.generator.dense),
        cost(players.discriminator, players.optimizer_d, None, held_d, forward_d, flops.discriminator.dense),
        flops.relative,
        trainer.seconds / steps,
        timing,
        time_of_layers(trainer) if config.compare_steps else [],
        _quality(trainer),
        config.fd_samples,
        _measured(trainer),
        tuple(flag(name) for name in ("gradient_penalty", "r1", "r2", "consistency") if getattr(config, name)),
    )


def _measured(trainer: Trainer) -> dict[str, Any] | None:
    path = trainer.out / LOG
    entries = read_log(path) if path.exists() else ()
    figures = [e for e in entries if e.get("event") == "metric" and e["value"] is not None]
    return {name: figures[-1].get(name) for name in ("metric", "value", "samples", "step")} if figures else None


def _quality(trainer: Trainer) -> Quality | None:
    if trainer.config.data not in TRAINED or trainer.images.labels is None:
        return None
    noise = torch.Generator().manual_seed(trainer.config.seed + 3)
    z = torch.randn(trainer.config.fd_samples, trainer.config.latent, generator=noise)
    turns = torch.arange(len(z)) % trainer.classes
    parts = zip(z.split(4096), turns.split(4096), strict=True)
    made = (generate(trainer.ema.module, part, labels=labels) for part, labels in parts)
    return evaluate_embedded(trainer.images.batch(slice(None)), made, trainer.config.data)


def table(summary: Summary) -> str:
    """The final table, ready to print."""
    g, d = summary.generator, summary.discriminator

    def row(name: str, *cells: str) -> str:
        return f"{name:<34}" + "".join(f"{cell:>14}" for cell in cells)

    def megabytes(count: int) -> str:
        return f"{count / 1e6:.2f} MB"

    memory, dense_memory = g.state_bytes + d.state_bytes, g.dense_state_bytes + d.dense_state_bytes
    lines = [
        f"{summary.method}, {summary.steps} steps",
        row("", "generator", "discriminator", "together"),
        row("density at the end", f"{g.density:.4f}", f"{d.density:.4f}", ""),
        row("parameters", f"{g.parameters:,}", f"{d.parameters:,}", f"{g.parameters + d.parameters:,}"),
        row("  of the dense twin", f"{g.dense_parameters:,}", f"{d.dense_parameters:,}",
            f"{g.dense_parameters + d.dense_parameters:,}"),
        row("weight state (weights, gradients,", megabytes(g.state_bytes), megabytes(d.state_bytes), megabytes(memory)),
        row("  Adam, average) | relative", f"{g.state_bytes / g.dense_state_bytes:.3f}",
            f"{d.state_bytes / d.dense_state_bytes:.3f}", f"{memory / dense_memory:.3f}"),
        row("counted training FLOPs, relative", f"{g.flops_ratio:.3f}", f"{d.flops_ratio:.3f}",
            f"{summary.flops_ratio:.3f}"),
    ]  # fmt: skip
    if summary.uncounted:
        lines.append(f"  (passes of G and D in every step; what {', '.join(summary.uncounted)} adds is not counted)")
    lines.append(f"whole run: {summary.seconds_per_step:.4f} seconds per step")
    timing = summary.timing
    if timing is not None:
        lines.append(
            f"measured beside a dense twin (median of {timing.pairs} iterations each, final masks): "
            f"{timing.seconds:.4f} s, dense {timing.dense:.4f} s: {timing.speedup:.2f}x as fast"
        )
        beside = f"dense {megabytes(timing.dense_peak_bytes)}: {timing.peak_bytes / timing.dense_peak_bytes:.2f} of it"
        if timing.checkpointed_peak_bytes is not None:
            beside += (
                f" (dense with activation checkpointing {megabytes(timing.checkpointed_peak_bytes)}: "
                f"{timing.peak_bytes / timing.checkpointed_peak_bytes:.2f} of it)"
            )
        lines.append(
            f"memory of an iteration at its peak, weight state included: {megabytes(timing.peak_bytes)}, {beside}"
        )
    quality, measured = summary.quality, summary.measured
    if quality is None and measured is not None:
        found = f"{measured['metric']} of {measured['samples']} samples after step {measured['step']}"
        lines.append(f"{found}: {measured['value']:.4g}")
    elif quality is None:
        lines.append("no distance: digits and shapes have one embedded, other data FID with --inception")
    else:
        lines.append(
            f"Fréchet distance of {summary.fd_samples} samples: {quality.distance:.1f} (real against real "
            f"{quality.floor:.1f}, one class missing about 20; classifier of {quality.resolution}x{quality.resolution})"
        )
        shares = "  ".join(f"{label}: {share:.1%}" for label, share in enumerate(quality.shares))
        lines.append(f"class shares  {shares}")
    return "\n".join(lines)


def write_summary(out: Path, summary: Summary) -> Path:
    """The numbers of the table as `summary.json`."""
    path = out / SUMMARY
    with replacing(path) as file:
        file.write(json.dumps(asdict(summary), indent=2).encode() + b"\n")
    return path


def plot_report(out: Path) -> Path:
    """`report.png` from the log: balance ratio, densities and losses over steps; bounds are those of what is steered.

    Where the sign of D(x) is steered, it has a panel of its own.
    """
    entries = list(read_log(out / LOG))
    steps = [e for e in entries if "event" not in e]
    settings: dict[str, Any] = next((e["settings"] for e in entries if e.get("event") == "start"), {})
    steered, bounds = steered_by(settings) or ("balance_ratio", None)
    decisions = [e for e in entries if e.get("event") == "decision"]

    def series(name: str) -> Points:
        # Gaps stay gaps in the line.
        points = [(e["step"], math.nan if e.get(name) is None else e[name]) for e in steps]
        return points if any(not math.isnan(value) for _, value in points) else []

    def single(name: str) -> Points:
        return [(e["step"], e["sample"][name]) for e in steps if e["sample"] and e["sample"].get(name) is not None]

    path = out / REPORT
    with panels(path, 3 if steered == "balance_ratio" else 4) as (ratio, *signs, density, losses):
        by_ratio = bounds if steered == "balance_ratio" else None
        draw_signal(ratio, "balance_ratio", series("balance_ratio"), by_ratio, single("ratio"))
        for sign in signs:
            draw_signal(sign, "real_sign", series("mean_sign"), bounds, single("sign"))
        line(density, series("density_g"), color="C1", lw=3, alpha=0.6, label="generator")
        line(density, series("density_d"), color="C0", label="discriminator")
        draw_decisions(density, [(e["step"], e["action"], e["new_density"]) for e in decisions], "decision")
        line(losses, series("loss_g"), lw=0.8, color="C1", label="generator")
        line(losses, series("loss_d"), lw=0.8, color="C0", label="discriminator")
        losses.set(ylabel="loss")
        for (_, before), (step, _) in pairwise(lengths(entries)):
            losses.axvline(step, color="0.4", ls=":", label=f"planned for {before:,} steps until here")
    return path
