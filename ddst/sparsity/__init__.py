"""Sparse training: conversion, density distributions, drop and grow criteria, schedules, algorithms, optimizers."""

from ddst.sparsity.advice import Advice
from ddst.sparsity.advise import advise
from ddst.sparsity.algorithm import SparseTraining
from ddst.sparsity.convert import dense_state_dict, densify, sparsify
from ddst.sparsity.criterion import choose_drop, choose_grow, relative_keys
from ddst.sparsity.optimizer import carry_state
from ddst.sparsity.schedule import DropSchedule
from ddst.sparsity.stats import FlopCounter, NetworkStats, TrainingFlops, network_stats
from ddst.sparsity.updater import TopologyUpdater, UpdateReport

__all__ = [
    "Advice",
    "DropSchedule",
    "FlopCounter",
    "NetworkStats",
    "SparseTraining",
    "TopologyUpdater",
    "TrainingFlops",
    "UpdateReport",
    "advise",
    "carry_state",
    "choose_drop",
    "choose_grow",
    "dense_state_dict",
    "densify",
    "network_stats",
    "relative_keys",
    "sparsify",
]
