"""`ddst` in processes that begin as copies of a server that has imported everything."""

import os
import sys
from datetime import timedelta

import torch

from ddst import cli
from ddst.train import job
from helpers.copies import SERVER


class Program:
    """`ddst` with these words, as one process of several."""

    def __init__(self, words, variables, said, patience):
        self.said_in = said
        self.process = SERVER.Process(target=_main, args=(words, variables, str(said), patience))
        self.process.start()

    def said(self):
        return self.said_in.read_text()

    def ended(self, seconds):
        """Its exit code, once there is one."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, self.said()
        return self.process.exitcode

    def send(self, number):
        os.kill(self.process.pid, number)


def _main(words, variables, said, patience):
    os.environ.update(variables)
    file = os.open(said, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if patience is not None:  # seconds that processes wait for each other, once they train
        train = job.train

        def impatient(*arguments):
            torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=patience))
            return train(*arguments)

        job.train = impatient
    sys.exit(cli.main(words))
