"""The parts of a run as one Markdown file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
            sections.append("\n".join([f"## {name.capitalize()}", "", *body, *_troubles(parts[name])]))
    return "\n\n".join(["# Measured by `make gpu`", *sections])


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
    """The few lines that a run ends with: the best speed-up per layer, density and block, and the iterations."""
    lines = []
    if "kernels" in parts and "rows" in parts["kernels"]:
        best: dict[tuple[str, str, str], dict[str, float]] = {}
        for row in parts["kernels"]["rows"]:
            if "cold" in row and row["kind"] == "bf16":
                key = (row["layer"], f"{row['block'][0]}x{row['block'][1]}", f"{100 * row['density']:g} %")
                of = best.setdefault(key, {})
                of[row["pass"]] = max(of.get(row["pass"], 0.0), row["cold"]["speedup"]["median"])
        if best:
            lines.append(f"{'bf16, cold, over dense':<24} {'block':<7} {'dens.':<6} forward  dgrad  wgrad")
            for (layer, block, density), of in sorted(best.items()):
                figures = "  ".join(
                    f"{of[name]:5.2f}" if name in of else "    -" for name in ("forward", "dgrad", "wgrad")
                )
                lines.append(f"{layer:<24} {block:<7} {density:<6}  {figures}")
    for row in parts.get("iteration", {}).get("rows", []):
        if "speedup" in row:
            gains = ", ".join(f"{way} {gain:.2f}" for way, gain in row["speedup"].items())
            what = f"{row['network']} {100 * row['density']:g} % {row['distribution']}"
            lines.append(f"iteration {what}, over dense: {gains}")
    wrong = sum(len(part.get("wrong", [])) for part in parts.values())
    checked = parts.get("correctness", {}).get("checked")
    lines.append(f"{'' if checked is None else f'{checked} results checked, '}{wrong} wrong")
    return "\n".join(lines)
