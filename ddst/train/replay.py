"""The controller of D's density again over a recorded log, with other settings: a table and a picture.

The measurements stay those of the run, whose D had the recorded densities: what is shown is what the rule would have
decided from them, not how the run would have gone on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddst.gan.balance import BalanceRatio, WindowSummary
from ddst.gan.controller import GROW, MODES, Decision, DensityController
from ddst.train.checkpoint import replacing
from ddst.train.config import TrainConfig, check_saved, resolve, setting_errors
from ddst.train.folder import LOG
from ddst.train.log import read_log
from ddst.train.options import ConfigError


@dataclass(frozen=True)
class Replay:
    """Decisions of a log and of a rule over it.

    Attributes:
        rule: decides. ratios: ``(step, signal)`` where the window has a value. logged, replayed: by step.
        densities: ``(step, d_D)`` of the run.
    """

    rule: DensityController
    ratios: Sequence[tuple[int, float]]
    densities: Sequence[tuple[int, float]]
    logged: Mapping[int, Decision]
    replayed: Mapping[int, Decision]

    @property
    def same(self) -> bool:
        """Whether every decision is the logged one."""
        return self.logged == self.replayed


def replay(log: Path, given: Mapping[str, Any], mode: str | None = None, signal: str | None = None) -> Replay:
    """Decides again at every decision's step of a log.

    While the decisions are the logged ones D has the logged densities; from the first other one on, those asked for.

    Args:
        log: ``log.jsonl`` of a run, or the run's folder; of any method, as all measure.
        given: settings other than the run's, of :data:`ddst.train.config.REPLAYED`.
        mode: "relaxed" or "strict"; None: the run's, "relaxed" where it has none. signal: of
            :class:`ddst.DensityController`; None: the run's.

    Raises:
        ConfigError: no log there, one without settings or measurements, or a setting that is not possible.
    """
    path = log / LOG if log.is_dir() else log
    try:
        entries = list(read_log(path))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from None
    config, own = _settings(path, entries, given)
    parts = config.method.removeprefix("ddst-")
    mode = mode or (parts if parts in MODES else MODES[0])
    signal = signal or ("real_sign" if config.method == "ddst-ada" else "balance_ratio")
    changed = mode != (parts if parts in MODES else MODES[0])
    highest = (1.0 if mode == "relaxed" else 0.5) if changed and "density_d_max" not in given else config.density_d_max
    with setting_errors():
        warmup = config.warmup
        if warmup is None:
            single = config.published or config.block_d == (1, 1)
            warmup = 0 if single else min(config.steps // 8, 1000)
        swapped = signal != own and "bounds" not in given
        bounds = None if swapped else config.bounds
        density_range = (config.density_d_min, highest)
        rule = DensityController(mode, bounds, config.delta, density_range, warmup, signal, config.published)
    if config.br_window < config.br_every:
        raise ConfigError(f"--br-window must be at least the run's --br-every ({config.br_every})")
    return _decided(path, entries, config, rule)


def _settings(path: Path, entries: list[dict[str, Any]], given: Mapping[str, Any]) -> tuple[TrainConfig, str]:
    saved = next((e.get("settings") for e in entries if e.get("event") == "start"), None)
    try:
        config = resolve({**check_saved(saved), **given, "out": "unused"})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}" if saved is None else str(error)) from None
    return config, "real_sign" if config.method == "ddst-ada" else "balance_ratio"


def _decided(path: Path, entries: list[dict[str, Any]], config: TrainConfig, rule: DensityController) -> Replay:
    meter = BalanceRatio(config.br_window // config.br_every, config.br_average, config.br_eps)
    logged = {e["step"]: Decision.from_dict({k: v for k, v in e.items() if k != "event"})
              for e in entries if e.get("event") == "decision"}  # fmt: skip
    steps = [e for e in entries if "event" not in e]
    if not any(e["sample"] for e in steps):
        raise ConfigError(f"{path} holds no measurement of the balance ratio")
    ratios, densities, replayed = [], [], {}
    density, agreed, ends = float(steps[0]["density_d"]), True, {}
    for entry in steps:
        step, sample = entry["step"], entry["sample"]
        if sample:
            alpha, beta = (math.nan if sample[k] is None else sample[k] for k in ("alpha", "beta"))
            meter.add(alpha, beta, sample.get("sign"))
        window = meter.summary()
        value = _value(window, rule)
        if value is not None:
            ratios.append((step, value))
        if 1 < step < config.steps and step % config.interval_d == 0:
            if step in logged:
                ends = {k: getattr(logged[step], k) for k in ("lowest", "highest", "resolution")}
                density = logged[step].density if agreed else density
            replayed[step] = rule.decide(window, density, step, **ends)
            agreed = agreed and logged.get(step) == replayed[step]
            density = replayed[step].new_density
        elif agreed:
            density = float(entry["density_d"])
        densities.append((step, float(entry["density_d"])))
    return Replay(rule, ratios, densities, logged, replayed)


def _value(window: WindowSummary, rule: DensityController) -> float | None:
    return window.balance_ratio if rule.signal == "balance_ratio" else window.mean_sign


def table(result: Replay) -> str:
    """Step, signal, and both decisions with their densities, a line each.

    A "-" stands where the run decided nothing.
    """
    lines = [f"{'step':>8}{'signal':>9}  {'run':<18}{'replayed':<18}reason"]
    for step, decision in result.replayed.items():
        value, before = _value(decision.window, result.rule), result.logged.get(step)
        theirs = "-" if before is None else f"{before.action} {before.new_density:.3f}"
        ours = f"{decision.action} {decision.new_density:.3f}"
        signal = "-" if value is None else f"{value:.3f}"
        lines.append(f"{step:>8}{signal:>9}  {theirs:<18}{ours:<18}{decision.reason}")
    rule = result.rule
    assert rule.bounds is not None
    count = sum(result.logged.get(step) != decision for step, decision in result.replayed.items())
    lines.append(
        f"{rule.mode}, {rule.signal} within {rule.bounds[0]:g} and {rule.bounds[1]:g}, delta {rule.delta:g}: "
        f"{count} of {len(result.replayed)} decisions are not the run's"
    )
    return "\n".join(lines)


def plot(result: Replay, path: Path) -> None:
    """The signal with its bounds, and D's density as it was and as the rule asks for, over steps.

    Raises:
        ModuleNotFoundError: matplotlib is not installed. OSError: the file cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure

    assert result.rule.bounds is not None
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(8, 6))
        figure.subplots_adjust(left=0.09, right=0.98, top=0.98, bottom=0.08, hspace=0.08)
        signal, density = figure.subplots(2, sharex=True)
        signal.plot(*_columns(result.ratios), color="C0", label=result.rule.signal.replace("_", " "))
        signal.axhspan(*result.rule.bounds, color="C2", alpha=0.2, label="bounds")
        signal.set(ylabel="signal", ylim=(-0.25, 1.5))
        density.plot(*_columns(result.densities), color="C0", label="run")
        asked = [(step, d.new_density) for step, d in result.replayed.items()]
        density.step(*_columns(asked), where="post", color="C3", label="replayed")
        grown = [(step, d.new_density) for step, d in result.replayed.items() if d.action == GROW]
        density.plot(*_columns(grown), "^", ms=5, color="C3", label="replayed: grow")
        density.set(ylabel="density of D", xlabel="step", ylim=(0, 1.05))
        for axes in (signal, density):
            axes.legend(loc="upper right", fontsize=8)
            axes.grid(alpha=0.3)
        with replacing(path) as file:
            figure.savefig(file, format="png", dpi=110)


def _columns(pairs: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [step for step, _ in pairs], [value for _, value in pairs]


def run_replay(log: Path, given: Mapping[str, Any], mode: str | None, signal: str | None, out: Path | None) -> int:
    """`ddst replay`: prints the table, writes the picture; returns the exit code."""
    result = replay(log, given, mode, signal)
    print(table(result))
    path = out or (log if log.is_dir() else log.parent) / "replay.png"
    try:
        plot(result, path)
    except ModuleNotFoundError as error:
        print(f"no picture: {error.name} is missing: pip install 'ddst[train]'")
    else:
        print(f"written: {path}")
    return 0
