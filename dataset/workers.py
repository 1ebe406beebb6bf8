"""A function over chunks of rows, in several processes, its results in the order of the chunks."""

import multiprocessing
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from dataset.files import DataError


class WorkerKilled(DataError):
    def __init__(self) -> None:
        super().__init__("a worker process was killed, by the system if memory ran out")


def in_order(
    function: Callable, tasks: Iterable[tuple], num_proc: int, initializer: Callable, *initargs: Any
) -> Iterator[tuple[tuple, Any]]:
    """(task, function(*task)) for each task. Few are in flight, so memory does not grow with their number.

    Raises WorkerKilled if one of the processes is.
    """
    waiting: deque = deque()
    others = multiprocessing.active_children()
    with ProcessPoolExecutor(num_proc, multiprocessing.get_context("spawn"), initializer, initargs) as pool:
        try:
            for task in tasks:
                waiting.append((task, _submit(pool, function, task)))
                if len(waiting) > 2 * num_proc:
                    task, done = waiting.popleft()
                    yield task, done.result()
            while waiting:
                task, done = waiting.popleft()
                yield task, done.result()
        except BrokenProcessPool:
            # A pool that breaks overlooks the worker that is just being started, and then waits for it for ever.
            for process in multiprocessing.active_children():
                if process not in others:
                    process.kill()
                    process.join()
            raise WorkerKilled from None


def _submit(pool: ProcessPoolExecutor, function: Callable, task: tuple) -> Future:
    try:
        with hidden_script():
            return pool.submit(function, *task)
    except OSError as error:  # its queue was closed, as it broke, under the worker that it was starting
        raise BrokenProcessPool from error


def end_with_parent() -> None:
    """This process must not outlive a killed parent: its queue never tells it."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


@contextmanager
def hidden_script() -> Iterator[None]:
    """A process that is spawned imports the script that runs, for what it may define: torch and all, three seconds and
    300 MB for each worker, which needs none of it. It does not where the script's path is not known."""
    script = vars(sys.modules["__main__"])
    hidden = {name: script[name] for name in ("__spec__", "__file__") if name in script}
    script.update(dict.fromkeys(hidden))
    try:
        yield
    finally:
        script.update(hidden)
