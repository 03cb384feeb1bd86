"""Several processes that check different groups at once: compiling kernels takes most of the time, and one core each.

A process also keeps the others safe: a kernel that reads outside its memory ends every later call of its process with
an error, and one that never ends is cut off with its process.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ddst.benchmarks.gpu.budget import Deadline


@dataclass(frozen=True)
class Done:
    """A task with its result, or with the reason why it has none."""

    task: Any
    result: Any = None
    trouble: str | None = None


class DeviceLostError(RuntimeError):
    """Raised by a task after an error that its process cannot recover from; carries what it found until then."""

    def __init__(self, why: str, result: Any) -> None:
        super().__init__(why)
        self.result = result


def run(function: Callable[[Any], Any], tasks: Sequence[Any], processes: int, deadline: Deadline) -> Iterator[Done]:
    """``function(task)`` for every task, in the order they finish; those not done at the deadline come last.

    Args:
        function: importable by name. tasks: picklable, the important ones first.
        processes: how many at once; 0: one after the other in this process.
    """
    waiting = list(tasks)
    if processes == 0:
        while waiting and not deadline.passed:
            task = waiting.pop(0)
            yield Done(task, function(task))
    else:
        yield from _in_processes(function, waiting, processes, deadline)
    for task in waiting:
        yield Done(task, trouble="not begun: no time was left")


class _Worker:
    def __init__(self, context: Any, function: Callable[[Any], Any]) -> None:
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, function), daemon=True)
        self.process.start()
        other.close()
        self.task: Any = None

    def give(self, task: Any) -> None:
        self.task = task
        self.connection.send(task)

    def end(self) -> None:
        self.connection.close()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _serve(connection: Any, function: Callable[[Any], Any]) -> None:
    """A worker's life: tasks come in, results go out; the end of the connection ends it."""
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        try:
            connection.send(("done", function(task)))
        except DeviceLostError as lost:
            connection.send(("lost", (str(lost), lost.result)))
            return
        except Exception as error:
            connection.send(("failed", f"{type(error).__name__}: {error}"))


def _in_processes(
    function: Callable[[Any], Any], waiting: list[Any], processes: int, deadline: Deadline
) -> Iterator[Done]:
    context = multiprocessing.get_context("spawn")  # a forked process could not use the device
    busy: list[_Worker] = []
    try:
        while (waiting or busy) and not deadline.passed:
            while waiting and len(busy) < processes:
                busy.append(_Worker(context, function))
                busy[-1].give(waiting.pop(0))
            ready = multiprocessing.connection.wait([worker.connection for worker in busy], min(deadline.left, 1.0))
            for worker in [worker for worker in busy if worker.connection in ready]:
                done, usable = _received(worker)
                yield done
                if usable and waiting and not deadline.passed:
                    worker.give(waiting.pop(0))
                else:
                    busy.remove(worker)
                    worker.end()
    finally:
        cut_off = [worker.task for worker in busy]
        for worker in busy:
            worker.process.kill()
            worker.end()
    for task in cut_off:
        yield Done(task, trouble="cut off: it had not ended when the time was over")


def _received(worker: _Worker) -> tuple[Done, bool]:
    try:
        kind, content = worker.connection.recv()
    except (EOFError, ConnectionResetError):
        worker.process.join(5)
        return Done(worker.task, trouble=f"its process ended with exit code {worker.process.exitcode}"), False
    if kind == "lost":
        return Done(worker.task, result=content[1], trouble=content[0]), False
    return Done(worker.task, *((content,) if kind == "done" else (None, content))), True
