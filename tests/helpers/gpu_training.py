"""Settings of a run of a few steps, as part of a dry run of `make gpu`: its blocks move, and it takes a second."""

TRAINING = {
    "resolution": 8, "width_g": 16, "width_d": 16, "latent": 16, "block": (8, 8), "density": 0.3, "batch": 4,
    "exempt_g": "none", "interval_g": 3, "interval_d": 4, "br_every": 1, "br_window": 2, "warmup": 0, "threads": 1,
    "drop_fraction_steps": 8, "connected": False,
}  # fmt: skip
