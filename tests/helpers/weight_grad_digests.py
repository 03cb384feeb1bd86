"""Prints digests of one weight gradient's bits, computed with one, two and three threads.

DDST_WEIGHT_GRAD_SHARES is read once per process, so each value needs its own.
"""

from __future__ import annotations

import hashlib

import torch

from helpers.problems import ConvProblem
from helpers.sparse import call, op_arguments


def main() -> None:
    problem = ConvProblem(batch=8, channels=(32, 48), block=(16, 16), size=(12, 12), mask="empty_lines")
    arguments = op_arguments(problem, problem.build(torch.float32))
    assert arguments is not None
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        grad = call("conv2d_weight_grad", arguments["conv2d_weight_grad"])
        print(hashlib.sha256(grad.numpy().tobytes()).hexdigest())
