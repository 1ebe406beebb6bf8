"""A function over chunks of rows, in several processes, its results in the order of the chunks."""

import contextlib
import multiprocessing
import os
import queue
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

from dataset.files import DataError


class WorkerKilled(DataError):
    def __init__(self) -> None:
        super().__init__("a worker process was killed, by the system if memory ran out")


def in_order(
    function: Callable, tasks: Iterable[tuple], num_proc: int, initializer: Callable, *initargs: Any
) -> Iterator[tuple[tuple, Any]]:
    """(task, function(*task)) for each task. Few are in flight, so memory does not grow with their number.

    Each process has a pipe of its own and a thread that waits for it: where processes share a queue, as those of
    ProcessPoolExecutor do, one that is killed can leave the rest waiting for ever. Here it raises WorkerKilled, once a
    task was its own.
    """
    processes, pipes, mine = [], queue.SimpleQueue(), threading.local()

    def begin() -> None:
        mine.pipe = pipes.get()
        with contextlib.suppress(OSError):  # killed already: call() says so
            mine.pipe.send((function, initializer, initargs))

    def call(task: tuple) -> Any:
        try:
            mine.pipe.send(task)
            result, error = mine.pipe.recv()
        except (EOFError, OSError):
            raise WorkerKilled from None
        if error is not None:
            raise error
        return result

    threads = ThreadPoolExecutor(num_proc, initializer=begin)
    try:
        for _ in range(num_proc):
            process, pipe = _start_process()
            processes.append(process)
            pipes.put(pipe)
        waiting: deque = deque()
        for task in tasks:
            waiting.append((task, threads.submit(call, task)))
            if len(waiting) > 2 * num_proc:
                task, done = waiting.popleft()
                yield task, done.result()
        while waiting:
            task, done = waiting.popleft()
            yield task, done.result()
    finally:
        for process in processes:
            process.kill()
            process.join()
        threads.shutdown(cancel_futures=True)


def _start_process() -> tuple[multiprocessing.Process, Connection]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs,), daemon=True)
    with hidden_script():
        process.start()
    theirs.close()  # so that ours ends when the process does
    return process, ours


def _work(pipe: Connection) -> None:
    """What a worker does until its parent closes the pipe, or is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends this one
    with contextlib.suppress(EOFError, OSError):
        function, initializer, initargs = pipe.recv()
        initializer(*initargs)
        while True:
            task = pipe.recv()
            try:
                answer = function(*task), None
            except Exception as error:
                answer = None, error
            pipe.send(answer)


def end_with_parent() -> None:
    """This process must not outlive a killed parent."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


@contextlib.contextmanager
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
