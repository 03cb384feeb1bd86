"""Every setting of a training run: name, default of its method and preset, range, and which may change on resume."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

from ddst.gan.losses import LOSSES
from ddst.gan.presets import PRESETS as METHOD_PARTS
from ddst.models.families import FAMILIES, latent_of
from ddst.sparsity.schedule import FINAL_FRACTION
from ddst.train.methods import (
    CHANGING,
    CONTROLLED,
    EXCHANGING,
    EXCHANGING_D,
    GROWING,
    METHODS,
    MOVING,
    PRUNING,
    SPARSE,
    SPARSE_D,
    STEERED,
)
from ddst.train.options import (
    BELOW_ONE,
    BOUNDS,
    COUNT,
    DENSITY,
    NATURAL,
    NOT_NEGATIVE,
    PAIR_BELOW_ONE,
    RATE,
    SAMPLES,
    SEED,
    SHARE,
    THREADS,
    ConfigError,
    Known,
    flag,
    option,
    option_of,
    parse_augment,
    parse_block,
    shown_value,
)

PRESETS = ("demo", "sngan32", "sngan48", "biggan32", "biggan64")
EXEMPT = ("none", "ends")

# Settings of the controller, which `ddst replay` takes.
REPLAYED = (
    "bounds", "delta", "density_d_min", "density_d_max", "warmup", "interval_d", "br_window", "br_average", "br_eps",
    "published",
)  # fmt: skip

# Settings of this process: no run remembers them.
NOT_SAVED = ("out", "resume", "stop_after")
# Those that a resumed run may be given anew, and then remembers: it is the same run at another length, with more or
# fewer files beside it, and wherever its images lie, which the checkpoint knows by their contents.
FREE_ON_RESUME = (
    *NOT_SAVED,
    "steps",
    "data",
    "data_cache",
    "live",
    "checkpoint_every",
    "sample_every",
    "compare_steps",
    "fd_samples",
    "metric_every",
    "inception",
)


def _published(demo: Any, published: Any) -> Callable[[Known], Any]:
    return lambda known: demo if known["preset"] == "demo" else published


def _ours(ours: Any, published: Any) -> Callable[[Known], Any]:
    """A default of the demo that the authors' runs, and --published, do not have."""
    return lambda known: published if known["published"] or known["preset"] != "demo" else ours


def _preset(demo: Any, sngan32: Any, sngan48: Any, biggan32: Any, biggan64: Any) -> Callable[[Known], Any]:
    values = dict(zip(PRESETS, (demo, sngan32, sngan48, biggan32, biggan64), strict=True))
    return lambda known: values[known["preset"]]


def _model(setting: str) -> Callable[[Known], Any]:
    return lambda known: getattr(FAMILIES[known["model"]], setting)


def _blocks(single: Any, larger: Any, of: str = "block") -> Callable[[Known], Any]:
    """A default that is the paper's for single weights (and with --published) and another for larger blocks."""
    return lambda known: single if known["published"] or known[of] == (1, 1) else larger


def _bounds(known: Known) -> tuple[float, float]:
    """Wide ones in the demo: every change shakes a D of few blocks, and between narrow ones its density swings."""
    if known["method"] == "ddst-ada":
        return (0.55, 0.65)
    return _ours((0.5, 1.0), (0.5, 0.65) if known["method"] == "dda" else (0.45, 0.55))(known)


def _strict(other: Any, strict: Any) -> Callable[[Known], Any]:
    return lambda known: strict if known["method"] == "ddst-strict" else other


@dataclass(frozen=True)
class TrainConfig:
    """All settings of a run, resolved and checked; made by `resolve`. `ddst train --help` explains each."""

    # fmt: off
    preset: str = option("demo", str, "sizes, lengths and rates: 'demo' is minutes on two cores, "
                         "'sngan32', 'sngan48', 'biggan32' and 'biggan64' are those of the published runs "
                         "(docs/paper.md)", choices=PRESETS)
    method: str = option("ddst-relaxed", str, "training method (ddst.gan.PRESETS): '-balance' and short names start "
                         "D at G's density, '-strong' has a dense D, 'dda' steers D beside a static G, 'ddst-ramp' "
                         "raises D's density in a line, 'ddst-ada' steers it by the mean sign of D(x), 'prune' trains "
                         "dense, then prunes G", choices=METHODS)
    model: str = option(_preset("sngan", "sngan", "sngan", "biggan", "biggan"), str, "networks; biggan needs images "
                        "with classes",
                        shown="biggan32, biggan64: biggan, else sngan", choices=tuple(FAMILIES))
    data: str = option("digits", str, "'digits' (1,797 real images, part of scikit-learn), 'shapes' (2,000 drawn, in "
                       "colour), a folder or .zip of image files, or a folder of CIFAR, STL-10 or TinyImageNet",
                       metavar="{digits,shapes,PATH}")
    data_cache: str | None = option(None, str, "folder where resized images are kept for the next run, or 'none'",
                                    shown="ddst/images in the user's cache folder", metavar="DIR")
    flips: bool = option(False, bool, "train on the images' mirror images, too")
    out: str = option(None, str, "folder for everything the run writes; required", metavar="DIR")
    steps: int = option(_preset(800, 100_000, 100_000, 200_000, 200_000), int, "generator iterations; with "
                        "--resume another number than before, not below those made: schedules are those of the new "
                        "one from there on",
                        shown="demo 800, sngan 100000, biggan 200000", range=COUNT, metavar="N")
    seed: int = option(0, int, "of weights, masks, noise and the order of images", range=SEED, metavar="S")
    resume: bool = option(False, bool, "continue the run in --out; settings not given are the run's own, and only "
                          "those of its length, its images and what is written beside it may be others")
    stop_after: int | None = option(None, int, "end at step K as an interruption would, to be resumed", shown="never",
                                    range=COUNT, metavar="K")

    # The two networks.
    resolution: int = option(_preset(16, 32, 48, 32, 64), int, "side of the images in pixels: 8, 16, 32, ... or, "
                             "sngan and dcgan, 12, 24, ...", shown="demo 16, else the name's number",
                             range=COUNT, metavar="PIXELS")
    width_g: int = option(_preset(128, 256, 512, 256, 1024), int, "channels of G's first feature map, its widest",
                          shown="demo 128, sngan32 and biggan32 256, sngan48 512, biggan64 1024", range=COUNT,
                          metavar="CHANNELS")
    width_d: int = option(_preset(64, 128, 128, 256, 1024), int, "channels of D's last feature map, its widest",
                          shown="demo 64, sngan 128, biggan32 256, biggan64 1024", range=COUNT, metavar="CHANNELS")
    latent: int = option(lambda known: latent_of(known["model"], known["resolution"]), int,
                         "length of the noise vector", shown="128; biggan: its pieces' sum", range=COUNT, metavar="N")

    # Sparsity.
    density: float = option(0.1, float, "share of G's weights that are active", range=DENSITY, metavar="D",
                            methods=SPARSE)
    density_d: float = option(lambda known: METHOD_PARTS[known["method"]].density_d(known["density"]), float,
                              "the same for D, at the start", shown="that of G, '-strong' 1", range=DENSITY,
                              metavar="D", methods=SPARSE_D)
    published: bool = option(False, bool, "the authors' code in whatever is not given, whatever the blocks: what "
                             "enters has the moments of dense gradients, decisions on the bounds, nothing above "
                             "the highest density", methods=SPARSE)
    block: tuple[int, int] = option((16, 16), parse_block, "block of weights that is active or not: output x input "
                                    "channels, 1x1 to 64x64; 1x1 with --backend reference is unstructured sparsity, "
                                    "masked-dense", metavar="ROWSxCOLUMNS", methods=SPARSE)
    block_d: tuple[int, int] = option(lambda known: known["block"], parse_block, "the same for D", shown="that of G",
                                      metavar="ROWSxCOLUMNS", methods=SPARSE_D)
    distribution: str = option("erk", str, "how the density is shared out over layers; with 'work' it is the share of "
                               "multiply-adds", choices=("erk", "work", "uniform"), methods=SPARSE)
    distribution_d: str = option(lambda known: known["distribution"], str, "the same for D", shown="that of G",
                                 choices=("erk", "work", "uniform"), methods=SPARSE_D)
    algorithm_d: str = option(lambda known: "rigl" if METHOD_PARTS[known["method"]].steers_d else "static", str,
                              "how D's blocks are chosen where D changes; without a steered density, 'rigl' and 'set' "
                              "exchange them every --interval-d", shown="static, with a steered density rigl",
                              choices=("rigl", "set", "static"), methods=SPARSE_D)
    prune_at: int = option(lambda known: max(2, 2 * known["steps"] // 3), int, "step at which G is pruned to "
                           "--density, half as many steps after as before", shown="two thirds of --steps", range=COUNT,
                           metavar="STEP", methods=PRUNING)
    sn_noise: float = option(_blocks(0.0, 0.05, "block_d"), float, "share of noise in D's power iteration, which keeps "
                             "the spectral norm of few blocks from getting stuck; models sngan and biggan",
                             shown="1x1 blocks 0, larger 0.05",
                             range=SHARE, metavar="SHARE", methods=SPARSE)
    backend: str = option("auto", str, "'reference' computes with dense weights and masks, for comparison",
                          choices=("auto", "reference"), methods=SPARSE)
    fuse: bool = option(True, bool, "compute norms, activations, upsampling, pooling and sums within the sparse "
                        "convolutions beside them, which takes less memory", shown="yes", methods=SPARSE)
    device: str = option("cpu", str, "where the networks are trained", choices=("cpu", "cuda"))
    batch_norm: str = option("local", str, "G's, with several processes: of each one's share of the batch, or of all",
                             choices=("local", "synced"))

    # Moving G's blocks.
    interval_g: int = option(_published(100, 500), int, "steps between G's topology updates",
                             shown="demo 100, published 500", range=COUNT, metavar="STEPS", methods=MOVING)
    drop_fraction: float = option(_blocks(0.5, 0.3), float, "share of G's active blocks exchanged at the first update",
                                  shown="1x1 blocks 0.5, larger 0.3", range=SHARE, metavar="SHARE", methods=MOVING)
    drop_schedule: str = option("cosine", str, "how that share falls, to --drop-fraction-end",
                                choices=("cosine", "linear", "constant"), methods=MOVING)
    drop_fraction_end: float = option(FINAL_FRACTION, float, "share exchanged at last, of G and of D",
                                      range=SHARE, metavar="SHARE", methods=MOVING)
    drop_fraction_steps: int | None = option(None, int, "steps over which the share falls, of G and of D",
                                             shown="all, for G with blocks larger than 1x1 a third of the run",
                                             range=COUNT, metavar="STEPS", methods=MOVING)
    scope: str | None = option(None, str, "an exchange of blocks (of G; strict: of D too) ranks them within each layer "
                               "or over the network", shown="1x1 blocks and with --published global, larger layer",
                               choices=("layer", "global"), methods=EXCHANGING)
    ranking: str | None = option(None, str, "blocks are ranked by their RMS relative to the layer's, or by their norm",
                                 shown="1x1 blocks and with --published raw, larger relative",
                                 choices=("relative", "raw"), methods=CHANGING)
    max_norm_share: float | None = option(None, float, "most of the squared norm that one update may drop: of a "
                                          "layer or, with --scope global and changes of D's density, of the network",
                                          shown="no limit", range=SHARE, metavar="SHARE", methods=CHANGING)
    grown_second_moment: str | None = option(None, str, "where Adam's second moment of a grown block starts; 'dense': "
                                             "both moments of the dense gradients of all steps, the authors'",
                                             shown="1x1 blocks mean, larger score, with random growth mean, with "
                                             "--published dense", choices=("zero", "mean", "score", "dense"),
                                             methods=GROWING)
    connected: bool | None = option(None, bool, "no change takes the last block of a row or a column of blocks",
                                    shown="1x1 blocks, prune of G and with --published no, else yes",
                                    methods=CHANGING)
    grace: int | None = option(None, int, "steps for which no exchange drops a block that has entered",
                               shown="1x1 blocks and with --published 0, larger five intervals", range=NATURAL,
                               metavar="STEPS", methods=EXCHANGING)
    random_share: float = option(0.0, float, "share of the blocks that grow at random where others grow by gradient",
                                 range=SHARE, metavar="SHARE", methods=GROWING)

    exempt_g: str | None = option(None, str, "layers of G that never change: none, or its first and last",
                                  shown="1x1 blocks and with --published none, larger ends",
                                  choices=EXEMPT, methods=MOVING)

    # The balance ratio and D's density.
    interval_d: int = option(
        lambda known: (40 if known["preset"] == "demo" else 1000) * (2 if known["method"] == "ddst-strict" else 1),
        int, "steps between decisions on D's density, or exchanges of its blocks",
        shown="demo 40, published 1000; strict: twice that", range=COUNT, metavar="STEPS", methods=SPARSE_D)
    bounds: tuple[float, float] = option(
        _bounds, float, "D grows where the balance ratio is above HI and shrinks where it is below LO (ddst-ada: the "
        "other way round, of the mean sign of D(x))", shown="demo 0.5 1.0, published 0.45 0.55, there dda 0.5 0.65; "
        "ddst-ada 0.55 0.65", words=2, range=BOUNDS, metavar=("LO", "HI"), methods=CONTROLLED)
    delta: float = option(0.05, float, "change of D's density per decision", range=DENSITY, metavar="D",
                          methods=CONTROLLED)
    density_d_min: float = option(0.05, float, "lowest density of D", range=SHARE, metavar="D", methods=CONTROLLED)
    density_d_max: float = option(_strict(1.0, 0.5), float, "highest density of D, with ddst-ramp that of the end",
                                  shown="1, ddst-strict 0.5", range=DENSITY, metavar="D", methods=STEERED)
    drop_fraction_d: float = option(_blocks(0.5, 0.3, "block_d"), float, "share of D's active blocks exchanged: "
                                    "ddst-strict at its highest density, others by --algorithm-d",
                                    shown="1x1 blocks 0.5, larger 0.3", range=SHARE, metavar="SHARE",
                                    methods=EXCHANGING_D)
    exempt_d: str | None = option(None, str, "layers of D that never change: none, or its first and last",
                                  shown="1x1 blocks none, larger ends", choices=EXEMPT, methods=SPARSE_D)
    br_every: int = option(_published(2, 10), int, "steps between measurements of the balance ratio",
                           shown="demo 2, published 10", range=COUNT, metavar="STEPS")
    br_window: int = option(_published(40, 1000), int, "steps the balance ratio is averaged over",
                            shown="demo 40, published 1000", range=COUNT, metavar="STEPS")
    br_average: str = option(_blocks("mean_of_ratios", "ratio_of_means", "block_d"), str, "average of the balance "
                             "ratio; mean_of_ratios leaves out samples whose denominator is not above --br-eps, and "
                             "has no value where they are the majority",
                             shown="1x1 blocks mean_of_ratios, larger ratio_of_means",
                             choices=("ratio_of_means", "mean_of_ratios"))
    br_eps: float = option(1e-3, float, "smallest meaningful denominator of the balance ratio", range=NOT_NEGATIVE,
                           metavar="EPS")
    warmup: int | None = option(None, int, "steps without a decision on D's density",
                                shown="1x1 blocks 0, larger an eighth of the run, at most 1000", range=NATURAL,
                                metavar="STEPS", methods=CONTROLLED)

    # What is played.
    loss: str = option(_model("loss"), str, "bce: non-saturating, that of softplus; wgan: with --gradient-penalty; "
                       "relativistic: with --r1 and --r2", shown="sngan, biggan hinge; resnet wgan; dcgan, stylegan2 "
                       "bce; r3gan relativistic", choices=LOSSES)
    gradient_penalty: float = option(lambda known: 10.0 if known["loss"] == "wgan" else 0.0, float, "weight of "
                                     "WGAN-GP's penalty in D's loss", shown="wgan 10, else 0", range=NOT_NEGATIVE,
                                     metavar="WEIGHT")
    r1: float = option(_model("r1"), float, "weight of half the squared gradient of D at real images",
                       shown="stylegan2 and r3gan 1, else 0", range=NOT_NEGATIVE, metavar="WEIGHT")
    r2: float = option(_model("r2"), float, "the same at generated images", shown="r3gan 1, else 0",
                       range=NOT_NEGATIVE, metavar="WEIGHT")
    lazy: int = option(1, int, "R1 and R2 at every K-th step of D only, K times as heavy (StyleGAN2 16)", range=COUNT,
                       metavar="K")
    consistency: float = option(0.0, float, "weight of the squared difference of D's scores of real images and of "
                                "their mirrored, moved twins", range=NOT_NEGATIVE, metavar="WEIGHT")
    augment: str = option("none", parse_augment, "DiffAugment: what is changed at random in all images that D sees, "
                          "words of color, translation and cutout joined by commas", metavar="KINDS")
    precision: str = option("float32", str, "autocast of both networks; float16 scales its losses",
                            choices=("float32", "bfloat16", "float16"))

    # Optimisation.
    batch: int = option(_preset(32, 64, 64, 50, 50), int, "images per batch, real and generated",
                        shown="demo 32, sngan 64, biggan 50", range=COUNT, metavar="N")
    accumulate: int = option(1, int, "batches whose mean gradient makes one step", range=COUNT, metavar="N")
    d_steps: int = option(_preset(2, 5, 5, 4, 4), int, "D steps per G step", shown="demo 2, sngan 5, biggan 4",
                          range=COUNT, metavar="N")
    lr_decay: str = option("none", str, "how both rates fall to 0 at the end of the run",
                           choices=("none", "linear", "cosine"))
    lr_decay_start: int = option(0, int, "first step of the decay", range=NATURAL, metavar="STEP")
    lr: float = option(_published(3e-4, 2e-4), float, "learning rate of Adam", shown="demo 0.0003, published 0.0002",
                       range=RATE, metavar="RATE")
    lr_d: float = option(lambda known: known["lr"], float, "the same for D", shown="that of --lr", range=RATE,
                         metavar="RATE")
    lr_density_power: float = option(_ours(0.5, 0.0), float, "P, from 0 to 1: both rates are those of a dense network, "
                                     "divided by the P-th power of each network's density",
                                     shown="demo 0.5, presets of published runs and with --published 0",
                                     range=SHARE, metavar="P", methods=SPARSE)
    betas: tuple[float, float] = option((0.0, 0.9), float, "betas of Adam", words=2, range=PAIR_BELOW_ONE,
                                        metavar=("B1", "B2"))
    ema: float = option(_published(0.99, 0.999), float, "decay of G's moving average, which makes the samples",
                        shown="demo 0.99, published 0.999", range=BELOW_ONE, metavar="DECAY")
    ema_ramp: float = option(0.0, float, "the average's half-life is at most this share of the steps done (StyleGAN2 "
                             "0.05); 0: no limit", range=SHARE, metavar="SHARE")
    ema_start: int = option(0, int, "first steps that copy G's weights into the average instead", range=NATURAL,
                            metavar="STEPS")
    threads: int = option(0, int, "threads of torch; results are the same bit for bit only with the same number",
                          shown="torch's own choice", range=THREADS, metavar="N")

    # What is written.
    sample_every: int = option(_published(100, 1000), int, "steps between sample grids",
                               shown="demo 100, published 1000", range=COUNT, metavar="STEPS")
    checkpoint_every: int = option(_published(50, 500), int, "steps between checkpoints",
                                   shown="demo 50, published 500", range=COUNT, metavar="STEPS")
    fd_samples: int = option(1797, int, "generated images for the Fréchet distance", range=SAMPLES, metavar="N")
    metric_every: int = option(_published(100, 5000), int, "steps between measurements of the averaged generator (0: "
                               "none), by the embedded distance for digits and shapes, by FID with --inception; the "
                               "best one is kept", shown="demo 100, published 5000", range=NATURAL, metavar="STEPS")
    live: str = option("none", str, "where curves can be watched, too; needs ddst[live]",
                       choices=("none", "tensorboard", "wandb"))
    inception: str | None = option(None, str, "weights of Inception-v3 as a local file, for FID", shown="none",
                                   metavar="FILE")
    compare_steps: int = option(5, int, "iterations timed beside a dense twin at the end, and one layer by layer (0: "
                                "none)", range=NATURAL, metavar="N")

    # fmt: on

    def as_dict(self) -> dict[str, Any]:
        """Plain values, of which `resolve` makes an equal config."""
        return asdict(self)

    def saved(self) -> dict[str, Any]:
        """What checkpoint and log keep of it: `as_dict` without what is this process's alone."""
        return {name: value for name, value in self.as_dict().items() if name not in NOT_SAVED}


OPTIONS = {f.name: option_of(f) for f in fields(TrainConfig)}


def resolve(given: Mapping[str, Any]) -> TrainConfig:
    """The settings of a run: those given, the others by the defaults of its preset and method; all checked.

    Raises:
        ConfigError: an unknown name, a value outside its range, or settings that do not fit together.

    Example:
        >>> config = resolve({"out": "runs/x", "method": "ddst-strict"})
        >>> config.density_d, config.density_d_max, config.interval_d
        (0.1, 0.5, 80)
    """
    unknown = set(given) - set(OPTIONS)
    if unknown:
        raise ConfigError(f"unknown setting {flag(min(unknown))}")
    known: dict[str, Any] = {}
    for name, declared in OPTIONS.items():
        known[name] = declared.plain(name, given[name] if name in given else declared.resolve(known))
    config = TrainConfig(**known)
    _check_together(config)
    return config


def _check_together(config: TrainConfig) -> None:
    if not config.out:
        raise ConfigError("--out DIR is required: the folder for everything the run writes")
    try:
        FAMILIES[config.model].check(config.resolution, config.width_g, config.width_d, config.latent)
    except ValueError as error:
        raise ConfigError("--" + str(error).replace("width must", "width-g must", 1).replace("_", "-")) from None
    if config.density_d_min > config.density_d_max:
        limits = f"{config.density_d_min} and {config.density_d_max}"
        raise ConfigError(f"--density-d-min must not be above --density-d-max, got {limits}")
    if config.br_window < config.br_every:
        raise ConfigError(f"--br-window must be at least --br-every ({config.br_every}), got {config.br_window}")
    parts = METHOD_PARTS[config.method]
    if "set" in (parts.method, config.algorithm_d):
        which = f"--method {config.method}" if parts.method == "set" else "--algorithm-d set"
        if config.grown_second_moment == "score":
            raise ConfigError(f"--grown-second-moment score needs gradient scores, which {which} does not have")
        if config.random_share:
            raise ConfigError(f"--random-share needs growth by gradient, which {which} does not have")
    if parts.steers_d and config.algorithm_d == "static":
        raise ConfigError(f"--algorithm-d static does not go with --method {config.method}, which changes D")
    if config.method in MOVING and config.density == 1:
        raise ConfigError(f"--density must be below 1 with --method {config.method}, which moves G's blocks, got 1.0")
    if config.method in PRUNING and not 2 <= config.prune_at < config.steps:
        raise ConfigError(f"--prune-at must be at least 2 and below --steps ({config.steps}), got {config.prune_at}")
    if config.lazy > 1 and not (config.r1 or config.r2):
        raise ConfigError("--lazy has no effect without --r1 or --r2")
    if config.lr_decay == "none" and config.lr_decay_start:
        raise ConfigError("--lr-decay-start has no effect without --lr-decay linear or cosine")


@contextmanager
def setting_errors() -> Iterator[None]:
    """Turns what the library says of an argument into a `ConfigError` that names the option instead.

    Example:
        >>> with setting_errors():
        ...     raise ValueError('grown_second_moment="score" needs growth="gradient"')
        Traceback (most recent call last):
        ddst.train.options.ConfigError: --grown-second-moment "score" needs growth="gradient"
    """
    try:
        yield
    except ConfigError:
        raise
    except (TypeError, ValueError, OverflowError) as error:
        message = " ".join(str(error).split())
        argument = re.match(r"(\w+)=? ?", message)
        name = {"prune_to": "density"}.get(argument[1], argument[1]) if argument else ""
        if argument and name in OPTIONS:
            message = f"{flag(name)} {message[argument.end() :]}"
        raise ConfigError(message) from error


@contextmanager
def fitting(sizes: str) -> Iterator[None]:
    """Turns running out of memory into a `ConfigError` that names the options which say how much is needed.

    Example:
        >>> with fitting("images of this --resolution"):
        ...     raise MemoryError("3 TB asked for")
        Traceback (most recent call last):
        ddst.train.options.ConfigError: images of this --resolution do not fit: 3 TB asked for
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if (message := out_of_memory(error)) is None:
            raise
        raise ConfigError(f"{sizes} do not fit: {message}") from error


def out_of_memory(error: RuntimeError | MemoryError) -> str | None:
    """What torch or Python says of a size that cannot be had; None for an error of another kind."""
    message = str(error).splitlines()[0] if str(error) else "not enough memory"
    words = ("allocate", "overflow", "out of memory")
    return message if isinstance(error, MemoryError) or any(word in message for word in words) else None


def check_saved(settings: Any, needed: Sequence[str] | None = None) -> dict[str, Any]:
    """What `TrainConfig.saved` returned, read back from a file: each setting of its type and within its range.

    Args:
        settings: by name. needed: those that must be there, of a version that may have others; None: all, no others.

    Raises:
        ConfigError: they are not; names the first.
    """
    names = [name for name in OPTIONS if name not in NOT_SAVED]
    if not isinstance(settings, dict):
        raise ConfigError(f"settings must be a dict, got {type(settings).__name__}")
    for name in names if needed is None else needed:
        if name not in settings:
            raise ConfigError(f"setting {name!r} is missing")
    for name in settings if needed is None else ():
        if name not in names:
            raise ConfigError(f"setting {name!r} is none of this ddst")
    return {name: OPTIONS[name].plain(name, settings[name]) for name in names if name in settings}


def check_same_run(saved: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings to resume with: the saved run's, and the given ones that are free to change.

    Args:
        saved: `TrainConfig.saved()` of the run.
        given: settings given now.

    Raises:
        ConfigError: a given setting differs from the saved run's; names the first, in the order of `--help`.
    """
    merged = dict(saved)
    for name, declared in OPTIONS.items():
        if name in given and name not in FREE_ON_RESUME:
            theirs = declared.plain(name, given[name])
            if theirs != saved.get(name):
                mine = shown_value(saved.get(name))
                raise ConfigError(
                    f"cannot resume with {flag(name)} {shown_value(theirs)}: the run in --out has {flag(name)} {mine}"
                )
    merged.update({name: value for name, value in given.items() if name in FREE_ON_RESUME})
    return merged
