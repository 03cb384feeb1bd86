"""report.png and replay.png: each signal with the bounds it is held within, and a legend of what is drawn."""

import pytest

from ddst.gan.balance import WindowSummary
from ddst.gan.controller import Decision, DensityController
from ddst.train.log import RunLog
from ddst.train.methods import METHODS, steered_by
from ddst.train.replay import Replay, plot, table
from ddst.train.report import plot_report


@pytest.fixture
def drawn(monkeypatch):
    """Of each picture that is written: its panels by their labels."""
    from matplotlib.figure import Figure

    figures = []
    real = Figure.savefig

    def keep(figure, *args, **options):
        figures.append({axes.get_ylabel(): axes for axes in figure.axes})
        return real(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def legend(axes):
    return [] if axes.get_legend() is None else [text.get_text() for text in axes.get_legend().get_texts()]


def band(axes):
    """What axhspan has drawn, from y to y."""
    return [(patch.get_y(), patch.get_y() + patch.get_height()) for patch in axes.patches]


def write_log(out, method, *, measured=True, settings=()):
    sample = {"alpha": 0.1, "beta": 0.5, "ratio": 0.2, "sign": 0.6} if measured else None
    with RunLog(out / "log.jsonl") as log:
        log.write(event="start", settings={"method": method, "bounds": [0.45, 0.55], "steps": 4, **dict(settings)})
        for step in range(1, 5):
            value = 0.2 if measured and step > 2 else None
            sign = 0.6 if measured and step > 2 else None
            log.write(
                step=step, loss_d=1.0, loss_g=0.5, balance_ratio=value, mean_sign=sign, sample=sample,
                density_g=0.1, density_d=0.1,
            )  # fmt: skip


@pytest.mark.parametrize("method", ["ddst-relaxed", "dda", "static", "ddst-ramp", "dense", "ddst-ada"])
def test_bounds_are_those_of_what_is_steered(tmp_path, drawn, method):
    write_log(tmp_path, method)
    assert plot_report(tmp_path).read_bytes().startswith(b"\x89PNG")
    (panels,) = drawn
    ratio = panels["balance ratio"]
    if method == "ddst-ada":
        sign = panels["mean sign of D(x)"]
        assert band(sign) == [pytest.approx((0.45, 0.55))] and sign.get_ylim() == (-1.05, 1.05)
        assert legend(sign) == ["single measurement", "window", "bounds"]
    else:
        assert set(panels) == {"balance ratio", "density", "loss"}
    assert bool(band(ratio)) == (method in ("ddst-relaxed", "dda")) == ("bounds" in legend(ratio))
    assert legend(panels["density"]) == ["generator", "discriminator"]


def test_a_legend_names_nothing_that_is_not_there(tmp_path, drawn):
    write_log(tmp_path, "static", measured=False)
    plot_report(tmp_path)
    assert legend(drawn[0]["balance ratio"]) == []
    with RunLog(tmp_path / "log.jsonl") as log:
        log.write(event="settings", step=4, before={"steps": 4}, now={"steps": 9})
    plot_report(tmp_path)
    assert legend(drawn[1]["loss"]) == ["generator", "discriminator", "planned for 4 steps until here"]


def test_the_methods_that_steer_by_a_signal():
    found = {method: steered_by({"method": method, "bounds": (0.4, 0.6)}) for method in METHODS}
    assert {method: signal[0] for method, signal in found.items() if signal} == {
        **dict.fromkeys(("ddst-relaxed", "ddst-strict", "dda"), "balance_ratio"),
        "ddst-ada": "real_sign",
    }
    for bounds in (None, [0.4], [0.4, "x"], [0.4, float("inf")], 10**400):
        assert steered_by({"method": "dda", "bounds": bounds}) is None
    assert steered_by({}) is None


def replayed(signal, *decisions):
    window = WindowSummary(3, 3, 0.1, 0.5, 0.2, mean_sign=-0.9)
    made = {step: Decision(step, action, 0.1, density, "", window) for step, action, density in decisions}
    steps = range(1, 15)
    return Replay(
        DensityController(signal=signal), [(s, -0.9) for s in steps], [(s, 0.1) for s in steps], {}, made, 5
    )  # fmt: skip


def test_one_decision_is_a_line_to_the_end(tmp_path, drawn):
    plot(replayed("real_sign", (5, "drop", 0.05)), tmp_path / "a.png")
    (panels,) = drawn
    assert panels["mean sign of D(x)"].get_ylim()[0] < -0.9
    density = panels["density of D"]
    assert legend(density) == ["run", "replayed", "replayed: drop"]
    (line,) = (line for line in density.lines if line.get_label() == "replayed")
    assert line.get_xydata().tolist() == [[5, 0.1], [5, 0.05], [14, 0.05]]


def test_a_run_that_is_too_short_says_so(tmp_path, drawn):
    none = replayed("balance_ratio")
    assert table(none).endswith("no decision: there is one every 5 steps, but the first and the last; the run has 14")
    plot(none, tmp_path / "a.png")
    assert legend(drawn[0]["density of D"]) == ["run"]
