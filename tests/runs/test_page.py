"""ddst report: what the page of runs holds, that it asks for nothing, and that names stay names."""

from __future__ import annotations

import base64
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ddst.cli import main
from ddst.runs.page import report
from ddst.runs.plots import Line, plot, thinned
from ddst.train.log import read_log


class Tags(HTMLParser):
    """Elements with their attributes; fails where one is closed that is not open."""

    EMPTY = frozenset({"meta", "img", "br"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        # <li>, <td> and the like are closed by hand in our template, too.
        assert self.open.pop() == tag


def test_a_page_of_two_runs_is_whole_and_by_itself(sparse_run: Path, dense_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    assert main(["report", str(sparse_run), str(dense_run), "--out", str(out)]) == 0
    page = out.read_text()
    tags = Tags(page)
    for tag, attributes in tags.seen:
        assert tag not in ("script", "link", "iframe", "object", "base")
        for name in ("src", "href", "xlink:href", "action"):
            target = attributes.get(name)
            assert target is None or target.startswith(("data:image/png;base64,", "#")), (tag, target)
    assert "url(http" not in page and "@import" not in page
    assert ("default-src 'none'; img-src data:; style-src 'unsafe-inline'") in page

    # One distance over three axes for both; four or five plots of each.
    svgs = [attributes for tag, attributes in tags.seen if tag == "svg"]
    assert len(svgs) == 3 + 5 + 3
    for title in (
        "over step",
        "over seconds of training",
        "over counted operations",
        "Balance ratio, with its bounds",
    ):
        assert title in page
    assert "Density of each layer of the generator" in page and "blocks.0.conv1" in page
    pictures = [a["src"] for tag, a in tags.seen if tag == "img"]
    first = base64.b64decode(pictures[0].partition(",")[2])
    assert first == (sparse_run / "samples" / "step_000000.png").read_bytes()
    assert [a["alt"] for tag, a in tags.seen if tag == "img"][:4] == [
        f"samples after step {step}" for step in (0, 6, 12, 14)
    ]
    assert re.search(r"<td>method</td>\s*<td>&#34;ddst-relaxed&#34;</td>\s*<td>&#34;dense&#34;</td>", page)
    assert "ddst-relaxed</td><td>14</td>" in page
    assert "rules of the generator's blocks: {&#39;growth&#39;: &#39;gradient&#39;, &#39;grown" in page
    # No colour of matplotlib's own is left, so that all of them change in the dark.
    drawn = page[page.index("<body>") :]
    assert not re.search(r"(fill|stroke): ?#", drawn) and "var(--c0)" in drawn and "var(--ink)" in drawn


def test_an_unfinished_run_and_odd_files(sparse_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "<b>&$x_1$"
    shutil.copytree(sparse_run, run)
    lines = (run / "log.jsonl").read_bytes().splitlines(keepends=True)
    (run / "log.jsonl").write_bytes(b"".join(lines[:4]) + b'{"event": "metric", "step"\n{"step": 3}\n')
    (run / "summary.json").write_text('{"generator": 3, "timing": [1]')
    (run / "evaluation.json").write_text('{"figures": [{"metric": "<i>", "value": null}, 4]}')
    (run / "samples" / "step_x.png").write_text("")
    out = tmp_path / "page.html"
    assert main(["report", str(run), "--out", str(out)]) == 0
    page = out.read_text()
    Tags(page)
    assert "&lt;b&gt;&amp;$x_1$" in page and "<b>" not in page and "<i>" not in page and "&lt;i&gt;" in page


def test_what_is_no_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "page.html")]) == 2
    assert capsys.readouterr().err == f"ddst report: error: RUN {tmp_path} holds no log.jsonl of a run\n"
    assert list(tmp_path.iterdir()) == []
    assert main(["report", str(tmp_path / "log.jsonl"), "--out", str(tmp_path / "page.html")]) == 2
    assert capsys.readouterr().err == f"ddst report: error: RUN {tmp_path / 'log.jsonl'} is no folder of a run\n"
    (tmp_path / "log.jsonl").write_text('{"level": "info"}\n')
    for out, message in (
        ("page.html", f"RUN {tmp_path}: log.jsonl is no log of ddst train, none of its lines is one of a run"),
        ("page.pdf", f"--out must end in .html or .htm, got {tmp_path / 'page.pdf'}"),
        ("no/page.html", f"--out {tmp_path / 'no/page.html'} cannot be written: there is no folder {tmp_path / 'no'}"),
    ):
        assert main(["report", str(tmp_path), "--out", str(tmp_path / out)]) == 2
        assert capsys.readouterr().err == f"ddst report: error: {message}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_a_legend_names_the_runs_that_have_the_line(sparse_run: Path, dense_run: Path, tmp_path: Path) -> None:
    runs = [tmp_path / f"run{i}" for i in range(9)]
    for i, run in enumerate(runs):
        run.mkdir()
        shutil.copy((dense_run if i else sparse_run) / "log.jsonl", run)
    log = runs[1] / "log.jsonl"
    log.write_bytes(b"".join(line for line in log.read_bytes().splitlines(True) if b'"metric"' not in line))
    out = tmp_path / "page.html"
    assert main(["report", *map(str, runs), "--out", str(out)]) == 0
    page = out.read_text()
    over_steps = page[page.index("Embedded Fréchet distance of digits over step") :].split("</figure>")[0]
    listed = re.findall(r"</span>([^<]*)</li>", over_steps)
    assert listed == [str(run) for run in [runs[0], *runs[2:8]]] + [f"{runs[8]} (dashed)"]
    of_dense = page[page.index(f"</span>{runs[2]}</h2>") :].split("<h2>")[0]
    assert "Balance ratio</figcaption>" in of_dense and "with its bounds" not in of_dense


def test_figures_of_two_metrics_are_not_compared(sparse_run: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", (sparse_run / "log.jsonl").read_bytes()
    run.mkdir()
    metric = {"event": "metric", "step": 14, "metric": "fid", "samples": 40, "seconds": 1.0, "flops": 1.0}
    more = [json.dumps({**metric, "value": value}).encode() for value in (900.25, 910.75)]
    (run / "log.jsonl").write_bytes(b"\n".join([log + more[0], more[1], b""]))
    out = tmp_path / "page.html"
    assert main(["report", str(run), "--out", str(out)]) == 0
    page = out.read_text()
    assert "<td>fid</td><td>910.8</td><td>900.2</td>" in page
    assert "Embedded Fréchet distance of digits over step" in page and "FID over step" in page


def test_where_the_time_of_an_iteration_went(sparse_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(sparse_run, run)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["timing"] is None and summary["layers"] == []
    layers = [
        {"network": "generator", "layer": f"blocks.{i}.<b>", "forward": 0.01 + i / 1000, "backward": 0.02}
        for i in range(14)
    ]
    timing = {"seconds": 1.0, "dense": 2.0, "peak_bytes": 300, "dense_peak_bytes": 1200}
    for given, rows in ((layers, 14), ([*layers, {"network": 3}], 0), ([], 0)):
        (run / "summary.json").write_text(json.dumps({**summary, "timing": timing, "layers": given}))
        out = tmp_path / "page.html"
        assert main(["report", str(run), "--out", str(out)]) == 0
        page = out.read_text()
        Tags(page)
        assert "<td>0.250</td></tr>" in page  # of the dense twin's memory
        assert page.count('<div class="bar">') == rows
    (run / "summary.json").write_text(json.dumps({**summary, "timing": timing, "layers": layers}))
    assert main(["report", str(run), "--out", str(out)]) == 0
    page = out.read_text()
    table = re.findall(r"<tr><td>([^<]*)</td>\s*<td>([\d.]+)</td><td>([\d.]+)</td>\s*<td><div", page)
    assert len(table) == 13 and table[0] == ("generator blocks.13.&lt;b&gt;", "2.3", "2.0")
    assert table[-1] == ("2 others", "2.1", "4.0")
    # The backward passes of activations and the optimizers are no forward pass.
    (rest,) = re.findall(r'<tr><td>(of no layer[^<]*)</td>\s*<td colspan="2">([\d.]+)</td>\s*<td><div', page)
    named = "of no layer, both ways: activations between layers, penalties, losses, optimizers, scheduler"
    assert rest == (named, "48.9") and '<span class="both" style="width: 100.0%">' in page


def test_settings_that_a_method_does_not_have_are_none_of_its_runs(
    sparse_run: Path, dense_run: Path, tmp_path: Path
) -> None:
    other, out = tmp_path / "other", tmp_path / "page.html"
    other.mkdir()
    log = (sparse_run / "log.jsonl").read_text()
    for old, new in (
        ('"density": 0.3', '"density": 0.2'),
        ('"prune_at": 9', '"prune_at": 8'),
        ('"lr_d":', '"new": 1, "lr_d":'),
    ):
        assert old in log
        log = log.replace(old, new, 1)
    (other / "log.jsonl").write_text(log)
    assert main(["report", str(sparse_run), str(dense_run), str(other), "--out", str(out)]) == 0
    page = out.read_text()
    differing = page[page.index("Settings that differ") :].split("</table>")[0]
    rows = {
        name: re.findall("<td>(.*?)</td>", cells) for name, cells in re.findall(r"<tr><td>(\w+)</td>(.*)", differing)
    }
    assert rows["density"] == ["0.3", "–", "0.2"] and "prune_at" not in rows
    assert rows["new"] == ["null", "null", "1"]  # of a ddst that had other settings
    listed = re.findall(r"<pre>(.*?)</pre>", page, re.DOTALL)
    assert ["\ndensity: " in each for each in listed] == [True, False, True]
    assert ["\nlr: " in each for each in listed] == [True] * 3


def test_long_series_are_thinned_by_means() -> None:
    x, y = thinned(list(range(100_000)), [float(i % 2) for i in range(100_000)])
    assert len(x) == 400 and set(y) == {0.5} and x[0] == 124.5
    assert thinned([], []) == ([], []) and plot("empty", [Line([], [], 0)], "x", "y") == ""


def test_counted_operations_are_those_of_all_images_of_a_step(
    sparse_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log counts for one image; a run with larger or more batches has made more of them."""
    log, runs = (sparse_run / "log.jsonl").read_text(), []
    for name, old, new in (
        ("as it is", "", ""),
        ("larger", '"batch": 4', '"batch": 8'),
        ("more", 'late": 1', 'late": 3'),
    ):
        assert old in log
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text(log.replace(old, new) if old else log)
        runs.append(tmp_path / name)
    drawn = {}
    monkeypatch.setattr("ddst.runs.page.plot", lambda name, lines, label, *_, **__: drawn.update({label: lines}) or "")
    report(runs, tmp_path / "page.html")
    plain, larger, more = (line.x for line in drawn["counted operations (penalties not counted)"])
    flops = [entry["flops"] for entry in read_log(sparse_run / "log.jsonl") if entry.get("event") == "metric"]
    assert flops and plain == [4 * each for each in flops]
    assert larger == [2 * x for x in plain] and more == [3 * x for x in plain]
