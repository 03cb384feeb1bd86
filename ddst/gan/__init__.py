"""Sparse training of GANs: balance ratio, density controller, DDST and the averaged generator."""

from ddst.gan.balance import BalanceRatio, BalanceSample, WindowSummary
from ddst.gan.controller import Decision, DensityController
from ddst.gan.ddst import DDST
from ddst.gan.ema import EMA
from ddst.gan.presets import PRESETS, Preset
from ddst.gan.step_report import StepReport

__all__ = [
    "DDST",
    "EMA",
    "PRESETS",
    "BalanceRatio",
    "BalanceSample",
    "Decision",
    "DensityController",
    "Preset",
    "StepReport",
    "WindowSummary",
]
