"""A run's averaged generator judged: `ddst evaluate`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ddst.data import DataError, load_images
from ddst.data.cache import cache_folder
from ddst.data.images import advice_if_gone
from ddst.metrics.classifier import TRAINED
from ddst.metrics.judge import METRICS, Figure, Judge
from ddst.metrics.statistics import write_statistics
from ddst.runs.sample import draw, labels_of, noise_of
from ddst.train.checkpoint import replacing
from ddst.train.folder import EVALUATION, versions
from ddst.train.generator import read_generator
from ddst.train.options import ConfigError
from ddst.train.target import check_target

MOST = 50_000  # Samples, where none are asked for: FID's usual number.


def evaluate(
    source: Path,
    metrics: Sequence[str] | None = None,
    *,
    samples: int | None = None,
    seed: int = 0,
    weights: Path | None = None,
    reference: Path | None = None,
    data: str | None = None,
    held_out: bool = False,
    statistics: Path | None = None,
    tell: Callable[[Figure], object] = lambda figure: None,
) -> list[Figure]:
    """Judge the averaged generator of a run, and keep the figures as `evaluation.json` where `source` is its folder.

    Figures of earlier calls stay in that file while step, seed and versions are the same; a metric that is asked again
    of the same real images is replaced.

    Args:
        source: see :func:`ddst.load_generator`.
        metrics: of :data:`ddst.metrics.judge.METRICS`; None: the distance embedded for the data, "fid" for other data.
        samples: generated images; None: as many as there are real ones, at most 50,000.
        seed: of their noise, and of what the generator draws itself.
        weights: of the Inception network. reference: an .npz in place of real images, for "fid" and "prdc".
        data: the real images where the run's own have moved. held_out: those set aside for tests.
        statistics: an .npz file for the mean and covariance of the real images and what they are of; it is replaced.
        tell: is called with each figure before a file is written.

    Raises:
        ConfigError: metrics that there are not, an argument without effect on those asked for, or a place where no
            file can be, a run's folder included (its checkpoint as `source` is judged all the same).
        DataError, CheckpointError: what is needed is not there. OSError: a file cannot be written.
    """
    if unknown := [name for name in metrics or () if name not in METRICS]:
        raise ConfigError(f"--metrics must be some of {', '.join(METRICS)} joined by commas, got {unknown[0]!r}")
    if statistics is not None:
        check_target("--statistics", statistics, ".npz")
    generator, about = read_generator(source)
    if source.is_dir():
        check_target("RUN", source / EVALUATION)
    config = about.config
    name = config.data if data is None else data
    if metrics is None:
        metrics = [name if name in TRAINED else "fid"]
    _refuse_without_effect(metrics, weights, reference, data, held_out, statistics)
    real = None
    if reference is None or any(metric in TRAINED for metric in metrics):
        cache = cache_folder(config.data_cache)
        try:
            real = load_images(name, config.resolution, held_out=held_out, cache=cache)
        except DataError as error:
            raise DataError(f"{error}{advice_if_gone(name) if data is None else ''}") from None
        if real.channels != about.channels and real.channels == 1:
            raise DataError(f"{name} is grey, the generator makes {about.channels} channels")
    judge = Judge(
        metrics, real, f"{name}, {'held out' if held_out else 'training'}", weights=weights, reference=reference
    )
    count = samples if samples is not None else min(MOST, MOST if real is None else len(real))
    figures = judge(draw(generator, noise_of(generator, count, seed), labels_of(generator, count), seed))
    for figure in figures:
        tell(figure)
    if statistics is not None:
        write_statistics(statistics, judge.moments(), judge.origin)
    if source.is_dir():
        _keep(source / EVALUATION, {"step": about.step, "seed": seed, "versions": versions()}, figures)
    return figures


def _refuse_without_effect(
    metrics: Sequence[str],
    weights: Path | None,
    reference: Path | None,
    data: str | None,
    held_out: bool,
    statistics: Path | None,
) -> None:
    asked = f"with --metrics {','.join(metrics)}"
    by_network = not set(metrics) <= set(TRAINED)
    if weights is not None and not by_network:
        raise ConfigError(f"--weights has no effect {asked}, only with fid, is and prdc")
    if reference is not None and not {"fid", "prdc"} & set(metrics):
        raise ConfigError(f"--reference has no effect {asked}, only with fid and prdc")
    if statistics is not None and not by_network:
        raise ConfigError("--statistics are those of the Inception network: they need --metrics fid, is or prdc")
    if reference is not None and statistics is not None:
        raise ConfigError("--statistics are those of real images, and --reference stands in their place: leave one out")
    if reference is not None and not set(metrics) & set(TRAINED):
        for option, given in (("--data", data is not None), ("--held-out", held_out)):
            if given:
                raise ConfigError(f"{option} has no effect {asked} and --reference, which stands in the images' place")


def _keep(path: Path, made_by: dict[str, Any], figures: Sequence[Figure]) -> None:
    """Write `figures`, and beside them what the file holds of other metrics and images by the same makers."""
    new = [figure.as_dict() for figure in figures]
    try:
        held = json.loads(path.read_text())
        earlier = held["figures"] if {name: held[name] for name in made_by} == made_by else []
        kept = [old for old in earlier if not any(_same_question(old, figure) for figure in new)]
    except (OSError, ValueError, LookupError, TypeError):
        kept = []  # None, or nothing that this has written.
    with replacing(path) as file:
        file.write(json.dumps(made_by | {"figures": kept + new}, indent=2).encode() + b"\n")


def _same_question(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return (one["metric"], one["split"]) == (other["metric"], other["split"])
