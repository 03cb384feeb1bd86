"""Sparse training: drop and grow criteria, schedules, algorithms, optimizer state, densities."""

from ddst.sparsity.algorithm import SparseTraining
from ddst.sparsity.criterion import choose_drop, choose_grow, relative_keys
from ddst.sparsity.optimizer import carry_state
from ddst.sparsity.schedule import DropSchedule
from ddst.sparsity.stats import FlopCounter, NetworkStats, TrainingFlops, network_stats
from ddst.sparsity.updater import TopologyUpdater, UpdateReport

__all__ = [
    "DropSchedule",
    "FlopCounter",
    "NetworkStats",
    "SparseTraining",
    "TopologyUpdater",
    "TrainingFlops",
    "UpdateReport",
    "carry_state",
    "choose_drop",
    "choose_grow",
    "network_stats",
    "relative_keys",
]
