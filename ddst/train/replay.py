"""The controller of D's density again over a recorded log, with other settings: a table and a picture.

The measurements stay those of the run, whose D had the recorded densities: what is shown is what the rule would have
decided from them, not how the run would have gone on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ddst.gan.balance import BalanceRatio, WindowSummary
from ddst.gan.controller import MODES, Decision, DensityController
from ddst.gan.presets import PRESETS
from ddst.train.config import REPLAYED, TrainConfig, check_saved, resolve, setting_errors
from ddst.train.folder import LOG
from ddst.train.log import lengths, read_log
from ddst.train.options import ConfigError
from ddst.train.pictures import draw_decisions, draw_signal, line, panels
from ddst.train.target import check_target


@dataclass(frozen=True)
class Replay:
    """Decisions of a log and of a rule over it.

    Attributes:
        rule: decides; of a run that became longer, as at its end. ratios: ``(step, signal)`` where the window has a
            value. logged, replayed: by step.
        densities: ``(step, d_D)`` of the run. interval: steps between decisions.
    """

    rule: DensityController
    ratios: Sequence[tuple[int, float]]
    densities: Sequence[tuple[int, float]]
    logged: Mapping[int, Decision]
    replayed: Mapping[int, Decision]
    interval: int


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
    config = _settings(path, entries, given)
    own = PRESETS[config.method]
    own_mode = own.mode if own.mode in MODES else MODES[0]
    mode, signal = mode or own_mode, signal or own.signal
    highest = config.density_d_max
    if mode != own_mode and "density_d_max" not in given:
        highest = 1.0 if mode == "relaxed" else 0.5
    bounds = None if signal != own.signal and "bounds" not in given else config.bounds
    with setting_errors():
        rule = DensityController(
            mode, bounds, config.delta, (config.density_d_min, highest), 0, signal, config.published
        )
    if config.br_window < config.br_every:
        raise ConfigError(f"--br-window must be at least the run's --br-every ({config.br_every})")
    try:
        return _decided(path, entries, config, rule)
    except ConfigError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{path} holds a measurement or a decision that no run of this ddst writes: {error}"
        ) from None


def _settings(path: Path, entries: list[dict[str, Any]], given: Mapping[str, Any]) -> TrainConfig:
    saved = next((e["settings"] for e in entries if e.get("event") == "start"), None)
    if saved is None:
        raise ConfigError(f"{path} is no log of ddst train: none of its lines holds the settings of a run")
    try:
        saved = check_saved(saved, [*REPLAYED, "method", "steps", "block_d", "br_every"])
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return resolve({**saved, **given, "out": "unused"})


def _warmup(config: TrainConfig, length: int) -> int:
    if config.warmup is not None:
        return config.warmup
    return 0 if config.published or config.block_d == (1, 1) else min(length // 8, 1000)


def _decided(path: Path, entries: list[dict[str, Any]], config: TrainConfig, rule: DensityController) -> Replay:
    meter = BalanceRatio(config.br_window // config.br_every, config.br_average, config.br_eps)
    logged = {e["step"]: Decision.from_dict({k: v for k, v in e.items() if k != "event"})
              for e in entries if e.get("event") == "decision"}  # fmt: skip
    steps = [e for e in entries if "event" not in e]
    if not any(e["sample"] for e in steps):
        every = f"it has {len(steps)} steps, measured every {config.br_every}"
        raise ConfigError(f"{path} holds no measurement of the balance ratio: {every}")
    ratios, densities, replayed = [], [], {}
    density, agreed = float(steps[0]["density_d"]), True
    ends = _ends(next(iter(logged.values()))) if logged else {}
    planned = [(0, config.steps), *lengths(entries)]
    for entry in steps:
        step, sample = entry["step"], entry["sample"]
        if sample:
            alpha, beta = (math.nan if sample[k] is None else sample[k] for k in ("alpha", "beta"))
            meter.add(alpha, beta, sample.get("sign"))
        window = meter.summary()
        value = _value(window, rule)
        if value is not None:
            ratios.append((step, value))
        length = [total for since, total in planned if since < step][-1]
        if 1 < step < length and step % config.interval_d == 0:
            if step in logged:
                ends = _ends(logged[step])
                density = logged[step].density if agreed else density
            rule = replace(rule, warmup=_warmup(config, length))
            replayed[step] = rule.decide(window, density, step, **ends)
            agreed = agreed and _does_the_same(logged.get(step), replayed[step])
            density = replayed[step].new_density
        elif agreed:
            density = float(entry["density_d"])
        densities.append((step, float(entry["density_d"])))
    return Replay(rule, ratios, densities, logged, replayed, config.interval_d)


def _ends(decision: Decision) -> dict[str, float]:
    """What D could reach then, by its own blocks."""
    return {name: getattr(decision, name) for name in ("lowest", "highest", "resolution")}


def _does_the_same(before: Decision | None, decision: Decision) -> bool:
    """Whatever its reason, in which the bounds stand."""
    return before is not None and (before.action, before.new_density) == (decision.action, decision.new_density)


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
    others = sum(not _does_the_same(result.logged.get(step), decision) for step, decision in result.replayed.items())
    said = f"{others} of {len(result.replayed)} decisions are not the run's"
    if not result.replayed:
        done = result.densities[-1][0]
        said = (
            f"no decision: there is one every {result.interval} steps, but the first and the last; the run has {done}"
        )
    lines.append(
        f"{rule.mode}, {rule.signal} within {rule.bounds[0]:g} and {rule.bounds[1]:g}, delta {rule.delta:g}: {said}"
    )
    return "\n".join(lines)


def plot(result: Replay, path: Path) -> None:
    """The signal with its bounds, and D's density as it was and as the rule asks for, over steps.

    Raises:
        ModuleNotFoundError: matplotlib is not installed. OSError: the file cannot be written.
    """
    decisions = list(result.replayed.items())
    with panels(path, 2) as (signal, density):
        draw_signal(signal, result.rule.signal, result.ratios, result.rule.bounds)
        line(density, result.densities, color="C0", label="run")
        if decisions:
            first, last = decisions[0], decisions[-1]
            asked = [(first[0], first[1].density), *((step, d.new_density) for step, d in decisions)]
            asked.append((result.densities[-1][0], last[1].new_density))
            line(density, asked, color="C3", drawstyle="steps-post", label="replayed")
        draw_decisions(density, [(step, d.action, d.new_density) for step, d in decisions], "replayed")
        density.set(ylabel="density of D")


def run_replay(log: Path, given: Mapping[str, Any], mode: str | None, signal: str | None, out: Path | None) -> int:
    """`ddst replay`: prints the table, writes the picture; returns the exit code."""
    if out is not None:
        check_target("--out", out, ".png")
    result = replay(log, given, mode, signal)
    path = out or (log if log.is_dir() else log.parent) / "replay.png"
    check_target("--out", path)
    print(table(result))
    try:
        plot(result, path)
    except ModuleNotFoundError as error:
        print(f"no picture: {error.name} is missing: pip install 'ddst[train]'")
    else:
        print(f"written: {path}")
    return 0
