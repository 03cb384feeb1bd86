"""The parts of a run as one Markdown file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ddst.benchmarks.problem import PASSES

Part = dict[str, Any]


def markdown(parts: dict[str, Part]) -> str:
    """All parts that there are."""
    makers = {
        "environment": _environment,
        "primitives": _primitives,
        "correctness": _correctness,
        "tune": _tune,
        "kernels": _kernels,
        "host": _host,
        "iteration": _iteration,
        "train": _train,
        "candidates": _candidates,
        "pictures": _pictures,
    }
    sections = []
    for name, make in makers.items():
        if name in parts:
            body = [_failed(parts[name])] if "failed" in parts[name] else make(parts[name])
            device = parts[name].get("device")
            title = f"## {name.capitalize()}{f', {device}' if device else ''}"
            sections.append("\n".join([title, "", *body, *_troubles(parts[name])]))
    device = parts.get("environment", {}).get("device")
    return "\n\n".join([f"# Measured by `make gpu`{f' on {device}' if device else ''}", *sections])


def _failed(part: Part) -> str:
    return f"This part ended with an error: {part['failed']}"


def _troubles(part: Part) -> list[str]:
    """What was wrong, and what there was no time for."""
    lines = []
    if part.get("wrong"):
        lines += ["", f"**Wrong ({len(part['wrong'])}):**", "", *(f"- {why}" for why in part["wrong"][:40])]
    trimmed = part.get("trimmed")
    if trimmed:
        listed = [trimmed] if isinstance(trimmed, str) else trimmed
        shown = "; ".join(listed[:8]) + ("; …" if len(listed) > 8 else "")
        lines += ["", f"No time was left for {len(listed)}: {shown}"]
    return lines


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    return [f"| {' | '.join(map(str, line))} |" for line in (head, ["---"] * len(head), *rows)]


def _environment(part: Part) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in part["versions"].items() if version)
    lines = [f"{part['device']}, commit {part['commit']}, {part['date']}; {versions}."]
    if "multiprocessors" in part:
        lines.append(
            f"Compute capability {part['capability']}, {part['multiprocessors']} multiprocessors, "
            f"{part['l2_bytes'] / 2**20:.0f} MiB of L2, {part['memory_bytes'] / 2**30:.0f} GiB of memory."
        )
    if "flops_per_s" in part:
        rates = ", ".join(f"{kind} {rate / 1e12:.4g}" for kind, rate in part["flops_per_s"].items())
        cache = part["l2_bytes_per_s"]
        inside = f", inside the L2 cache {cache / 1e12:.3g} TB/s" if cache else ""
        lines.append(
            f"Measured on random data: large copy {part['copy_bytes_per_s'] / 1e12:.3g} TB/s (read and written)"
            f"{inside}; matrix products in TFLOP/s: {rates}."
        )
    return lines


def _primitives(part: Part) -> list[str]:
    if "missing" in part:
        return [part["missing"]]
    return _table(["program", "said"], list(part["programs"].items()))


def _correctness(part: Part) -> list[str]:
    lines = [
        f"{part['checked']} results compared with float64 in {len(part['groups'])} groups; largest relative errors:"
    ]
    worst: dict[str, dict[str, float]] = {}
    counts: dict[str, int] = {}
    refused: dict[str, int] = {}
    for report in part["groups"]:
        backend, kind, _ = report["group"].split()
        key = f"{backend} {kind}"
        counts[key] = counts.get(key, 0) + sum(report["checked"].values())
        for op, error in report["worst"].items():
            of = worst.setdefault(key, {})
            of[op] = max(of.get(op, 0.0), error)
        for reason, count in report["refused"].items():
            refused[reason] = refused.get(reason, 0) + count
    ops = ["forward", "plain", "relu", "dgrad", "wgrad", "scores", "layer"]
    rows = [[key, counts[key], *(f"{of[op]:.1e}" if op in of else "" for op in ops)] for key, of in worst.items()]
    lines += ["", *_table(["backend, products", "results", *ops], rows)]
    if part.get("unusable"):
        lines += ["", "Not usable: " + "; ".join(f"{who}: {why}" for who, why in part["unusable"].items())]
    if refused:
        lines += ["", "Refused: " + "; ".join(f"{count} × {reason}" for reason, count in refused.items())]
    return lines


def _tune(part: Part) -> list[str]:
    rows = [
        [
            line["what"],
            f"{line['ms']:.4f}",
            f"{line['over_default']:.2f}×" if line["over_default"] else "",
            line["config"],
        ]
        for line in part["chosen"]
    ]
    return _table(["pass", "ms", "over default", "chosen"], rows) if rows else ["Nothing was tuned."]


def _kernels(part: Part) -> list[str]:
    lines = ["Times of one call in µs, speed-up over the dense side (median of paired ratios), share of the floor.", ""]
    head = ["layer, batch", "products", "block", "density", "pass", "backend"]
    head += ["cold", "dense", "speed-up", "of floor", "warm", "dense", "speed-up"]
    rows = []
    for row in part["rows"]:
        block = f"{row['block'][0]}×{row['block'][1]}"
        cells = [f"{row['layer']}, {row['batch']}", row["kind"], block, f"{100 * row['density']:g} %"]
        cells += [row["pass"], row["backend"]]
        if "cold" in row:
            cold, warm = row["cold"], row["warm"]
            cells += [*_pair(cold), f"{100 * cold['floor_share']:.0f} %", *_pair(warm)]
        else:
            cells += ["wrong, not timed" if row["wrong"] else row["refused"], "", "", "", "", "", ""]
        rows.append(cells)
    return lines + _table(head, rows)


def _pair(figures: dict[str, Any]) -> list[str]:
    seconds, dense = 1e6 * figures["seconds"], 1e6 * figures["dense_seconds"]
    return [f"{seconds:.1f}", f"{dense:.1f}", f"{figures['speedup']['median']:.2f}×"]


def _host(part: Part) -> list[str]:
    names = list(dict.fromkeys(name for calls in part["seconds"].values() for name in calls))
    rows = [
        [who, *(f"{1e6 * calls[name]:.1f}" if name in calls else "" for name in names)]
        for who, calls in part["seconds"].items()
    ]
    return ["Host time of a call in µs, the device not waited for:", "", *_table(["", *names], rows)]


def _iteration(part: Part) -> list[str]:
    rows = []
    for row in part["rows"]:
        density = "dense" if row["density"] is None else f"{100 * row['density']:g} % {row['distribution']}"
        cells = [row["what"], row["batch"], density]
        if row["wrong"]:
            rows.append([*cells, "wrong, not timed", "", "", "", "", ""])
            continue
        ratio = row.get("speedup", {})
        memory = f"{row['peak_bytes'] / 2**30:.2f}" if "peak_bytes" in row else ""
        cells += [f"{100 * row['flops_share']:.0f} %"]
        for way in ("eager", "graph"):
            cells += [f"{1e3 * row[way]['median']:.2f}", f"{ratio[way]:.2f}×" if way in ratio else ""]
        rows.append([*cells, memory])
    head = ["network", "batch", "density", "operations", "eager ms", "", "graph ms", "", "peak GiB"]
    return ["A whole iteration, channels_last, bf16 autocast; speed-ups over the dense row.", "", *_table(head, rows)]


def _train(part: Part) -> list[str]:
    if "density_g" not in part:
        return ["No step was done."]
    return [
        f"{part['steps']} steps of DDST on digits in {part['seconds']:.1f} s: losses {part['loss_d']:.3f} and "
        f"{part['loss_g']:.3f}, {part['updates_g']} updates of G's blocks ({len(part['moved_g'])} layers moved), "
        f"{part['decisions']} decisions and {part['updates_d']} updates of D; densities at the end: G "
        f"{part['density_g']:.4f}, D {part['density_d']:.4f}."
    ]


def _candidates(part: Part) -> list[str]:
    return [f"{part['configurations']} configurations exact in {part['done']} of {part['sweeps']} sweeps."]


def _pictures(part: Part) -> list[str]:
    return [f"{file}: {why}" for file, why in part["missing"].items()]


def short(parts: dict[str, Part]) -> str:
    """The table that a run ends with: what it measured itself first, its last part before the others; then what earlier
    runs had proven, with their dates; then the counts.
    """
    fresh: list[str] = []
    earlier: list[str] = []
    for name in reversed(list(parts)):
        for line, when in _LINES.get(name, _no_lines)(parts[name]):
            (earlier if when else fresh).append(f"{line}{f'  ({when})' if when else ''}")
    device = parts.get("environment", {}).get("device", "no device")
    lines = [f"{device}: new results, the latest first", *fresh] if fresh else [f"{device}: no new result"]
    lines += ["earlier results", *earlier] if earlier else []
    wrong = sum(len(part.get("wrong", [])) for part in parts.values())
    checked = parts.get("correctness", {}).get("checked")
    lines.append(f"{'' if checked is None else f'{checked} results checked, '}{wrong} wrong")
    return "\n".join(lines)


Lines = Iterator[tuple[str, str | None]]


def _no_lines(part: Part) -> Lines:
    return iter(())


def _kernel_lines(part: Part) -> Lines:
    """The best backend of each layer, kind of products, density and block."""
    best: dict[tuple[str, str, str, str, str | None], dict[str, float]] = {}
    for row in part.get("rows", []):
        if "cold" in row:
            block, density = f"{row['block'][0]}x{row['block'][1]}", f"{100 * row['density']:g} %"
            of = best.setdefault((row["layer"], row["kind"], block, density, row.get("earlier")), {})
            of[row["pass"]] = max(of.get(row["pass"], 0.0), row["cold"]["speedup"]["median"])
    for (layer, kind, block, density, when), of in best.items():
        figures = ", ".join(f"{name} {of[name]:.2f}x" for name in PASSES if name in of)
        yield f"{layer:<20} {kind} {block} {density:>4}, cold, over dense: {figures}", when


def _iteration_lines(part: Part) -> Lines:
    for row in part.get("rows", []):
        if row["wrong"]:
            continue
        density = "dense" if row["density"] is None else f"{100 * row['density']:g} % {row['distribution']}"
        times = ", ".join(f"{way} {1e3 * row[way]['median']:.2f} ms" for way in ("eager", "graph"))
        gains = "".join(f", {way} {gain:.2f}x" for way, gain in row.get("speedup", {}).items())
        memory = f", {row['peak_bytes'] / 2**30:.2f} GiB" if "peak_bytes" in row else ""
        yield f"iteration {row['network']} {density}: {times}{memory}{gains}", row.get("earlier")


def _tune_lines(part: Part) -> Lines:
    for line in part.get("chosen", []):
        gain = f", {line['over_default']:.2f}x the default" if line["over_default"] else ""
        yield f"tuned {line['what']}: {line['ms']:.4f} ms{gain}", line.get("earlier")


def _host_lines(part: Part) -> Lines:
    for who, calls in part.get("seconds", {}).items():
        yield f"host {who}: " + ", ".join(f"{n} {1e6 * s:.1f} us" for n, s in calls.items()), part.get("earlier")


_LINES = {"kernels": _kernel_lines, "iteration": _iteration_lines, "tune": _tune_lines, "host": _host_lines}
