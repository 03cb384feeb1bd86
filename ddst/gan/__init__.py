"""Sparse training of GANs: balance ratio, density controller, DDST and the averaged generator."""

from ddst.gan.balance import BalanceRatio, BalanceSample, WindowSummary
from ddst.gan.controller import Decision, DensityController
from ddst.gan.ddst import DDST, StepReport
from ddst.gan.ema import EMA

__all__ = [
    "DDST",
    "EMA",
    "BalanceRatio",
    "BalanceSample",
    "Decision",
    "DensityController",
    "StepReport",
    "WindowSummary",
]
