"""dataset/workers.py: order, errors, and what becomes of a killed worker."""

import multiprocessing
import os
import signal
import sys

import pytest

from dataset import workers


def nothing() -> None:
    pass


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.parametrize("at", [0, 1, 7])
@pytest.mark.parametrize("killed", [1, 2])
def test_a_killed_worker_breaks_off_at_once(at, killed):
    """As it starts, or later; whatever waits in the pipes. Nothing waits for ever, nothing is left.

    The other may have done every task that came after: then all results are there.
    """

    def tasks():
        for n in range(20):  # each more than a pipe holds
            if n == at:
                for process in multiprocessing.active_children()[:killed]:
                    os.kill(process.pid, signal.SIGKILL)
            yield (b"x" * 200_000,)

    broken_off = 0
    for _ in range(8):
        try:
            sizes = [size for _, size in workers.in_order(len, tasks(), 2, nothing)]
            assert killed == 1 and sizes == [200_000] * 20
        except workers.WorkerKilled:
            broken_off += 1
        assert not multiprocessing.active_children()
    assert broken_off


def test_results_come_in_the_order_of_the_tasks():
    tasks = [(b"x" * n,) for n in (100_000, 1, 50_000, 3, 0, 7, 9, 11)]
    assert [(len(task[0]), size) for task, size in workers.in_order(len, tasks, 2, nothing)] == [
        (len(text), len(text)) for (text,) in tasks
    ]


def test_an_error_of_the_function_is_raised_here():
    with pytest.raises(ValueError, match="'x'"):
        list(workers.in_order(int, [("1",), ("x",)], 2, nothing))
    assert not multiprocessing.active_children()
