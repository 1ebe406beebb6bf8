"""dataset/workers.py: order, and what becomes of a killed worker."""

import multiprocessing
import os
import signal
import sys

import pytest

from dataset import workers


def nothing() -> None:
    pass


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_worker_killed_at_its_start_breaks_off_at_once():
    """Its pool must not wait for the second worker, which is being started at that moment."""

    def tasks():
        for n in range(20):  # more than a pipe holds, so that something waits to be read
            yield (b"x" * 200_000,)
            if n == 0:
                os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    for _ in range(8):
        with pytest.raises(workers.WorkerKilled):
            list(workers.in_order(len, tasks(), 2, nothing))
        assert not multiprocessing.active_children()


def test_results_come_in_the_order_of_the_tasks():
    tasks = [(b"x" * n,) for n in (100_000, 1, 50_000, 3, 0, 7, 9, 11)]
    assert [(len(task[0]), size) for task, size in workers.in_order(len, tasks, 2, nothing)] == [
        (len(text), len(text)) for (text,) in tasks
    ]
