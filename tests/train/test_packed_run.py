"""A packed run and a masked-dense run from the same seed are the same training, to rounding."""

import pytest
import torch

from ddst.data import load_images
from ddst.train import Trainer, resolve, train
from helpers.runs import TINY, log_without_seconds

SETTINGS = {
    **TINY,
    "steps": 50,
    "width_g": 32,
    "width_d": 32,
    "density": 0.2,
    "batch": 8,
    "interval_g": 5,
    "drop_fraction_steps": 50,
    "grace": 10,
    "exempt_g": "none",
    "interval_d": 7,
    "br_window": 5,
    # Near what is measured: decisions are of several kinds and hang on the values.
    "bounds": (0.09, 0.12),
    "lr": 2e-4,
}
# In float64: Adam turns the rounding noise of gradients that are zero in exact arithmetic (biases in front of a batch
# norm) into steps as long as any other once it is larger than eps = 1e-8, which in float32 it is.
DTYPE, TOLERANCE = torch.float64, 1e-9


def log_of(out, **settings):
    torch.set_default_dtype(DTYPE)
    try:
        config = resolve({**SETTINGS, **settings, "out": str(out)})
        assert train(Trainer(config, load_images("digits", 8)), None) is None
    finally:
        torch.set_default_dtype(torch.float32)
    return log_without_seconds(out)[1:]  # The first line holds the settings, which name the backend.


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"method": "ddst-relaxed"}, {"grow", "drop"}),
        ({"method": "ddst-strict", "density_d_max": 0.2}, {"exchange", "drop"}),
        ({"method": "sdst-set"}, set()),
    ],
    ids=["ddst-relaxed", "ddst-strict", "sdst-set"],
)
def test_packed_and_reference_runs_agree_over_50_steps(tmp_path, settings, expected):
    packed, dense = (log_of(tmp_path / backend, **settings, backend=backend) for backend in ("auto", "reference"))
    assert [e.get("event") for e in packed] == [e.get("event") for e in dense]
    kinds, moved = set(), 0
    for a, b in zip(packed, dense, strict=True):
        if a.get("event") == "update":
            assert a == b  # As many blocks of the same layers, at the same steps.
            moved += sum(a["grown"].values())
        elif a.get("event") == "decision":
            assert (a["action"], a["new_density"]) == (b["action"], b["new_density"])
            kinds.add(a["action"])
        elif a.get("event") == "densities":
            assert a == b
        elif a.get("event") == "metric":
            assert (a["step"], a["best"]) == (b["step"], b["best"])
            assert a["value"] == pytest.approx(b["value"], rel=1e-6)
        elif a.get("event") == "samples":
            assert a["step"] == b["step"] and a["spread"] == pytest.approx(b["spread"], rel=1e-6)
        elif a.get("event") == "collapse":
            assert [a[name] for name in ("step", "sign", "begins")] == [b[name] for name in ("step", "sign", "begins")]
        else:
            assert (a["density_g"], a["density_d"]) == (b["density_g"], b["density_d"])
            for name in ("loss_d", "loss_g", "balance_ratio"):
                mine, theirs = a[name], b[name]
                close = (
                    mine is theirs if theirs is None else mine == pytest.approx(theirs, rel=TOLERANCE, abs=TOLERANCE)
                )
                assert close, (a["step"], name, mine, theirs)
    assert moved > 10
    assert expected <= kinds
