"""The thread that owns the model: requests go in through a queue, what they get comes back to the event loop.

runner = Runner(engine, stop_ids, max_waiting=64); runner.start(loop)
job = Job([Choice(prompt, params, answer)], adapter=None)
runner.submit(job)                       # may raise Overloaded
for update in await job.updates(): ...   # as they come; runner.cancel(job) frees its slots at any time
"""

import asyncio
import queue
import threading
import traceback
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple

from model.inference.engine import Engine, Event, SamplingParams
from server.deltas import ChatAnswer, TextAnswer
from server.errors import ApiError
from server.scoring import Logprob, score_prompt

BATCH = 256  # updates: all that a slow reader has missed would take the event loop a second to write


class Update(NamedTuple):
    """What one token of one choice brings."""

    choice: int
    deltas: list[dict]
    logprob: Logprob | None = None
    finish_reason: str | None = None  # "stop", "length", or "error"
    error: ApiError | None = None
    prompt: list[Logprob] | None = None  # of a choice whose prompt is scored: its first update


@dataclass(eq=False)
class Choice:
    """One sequence of a job."""

    prompt: list[int]
    params: SamplingParams | None  # None: nothing is to be generated
    answer: ChatAnswer | TextAnswer
    why: str | None = None  # the parameter that the constraint comes from
    score: int | None = None  # the prompt's tokens are scored, with so many of the likeliest at each place
    tokens: int = 0  # generated so far
    logprob: float = 0.0  # of all of them, if the parameters ask for log-probabilities
    number: int | None = None  # the engine's, while it runs


class Job:
    """A request: its choices, and what they have got so far that nobody has fetched."""

    def __init__(self, choices: list[Choice], adapter: str | None):
        self.choices, self.adapter = choices, adapter
        self.open = len(choices)  # choices that have not ended
        self._new: list[Update] = []
        self._some = asyncio.Event()

    @property
    def prompt_tokens(self) -> int:
        """A prompt is counted once, however many choices continue it."""
        return sum({id(choice.prompt): len(choice.prompt) for choice in self.choices}.values())

    @property
    def generated_tokens(self) -> int:
        return sum(choice.tokens for choice in self.choices)

    @property
    def done(self) -> bool:
        """Nothing is left to come or to fetch."""
        return not self.open and not self._new

    def put(self, update: Update) -> None:
        self.open -= update.finish_reason is not None
        self._new.append(update)
        self._some.set()

    async def updates(self) -> list[Update]:
        """Waits for at least one; all there are, so that a slow reader or a busy machine gets them in one piece, but no
        more than BATCH."""
        await self._some.wait()
        new, self._new = self._new[:BATCH], self._new[BATCH:]
        if not self._new:
            self._some.clear()
        return new


class Overloaded(Exception):
    """Too many requests wait."""


@dataclass(eq=False)
class Runner:
    """Runs the engine in a thread of its own. All methods are for the event loop's thread."""

    engine: Engine
    stop_ids: Collection[int]
    max_waiting: int  # choices that may wait for a slot
    pending: int = 0  # choices submitted and not yet ended
    _commands: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)
    _running: dict[int, tuple[Job, int]] = field(default_factory=dict)  # the thread's: by the engine's numbers
    _scoring: deque[tuple[Job, int]] = field(default_factory=deque)  # the thread's: one for each step
    _active: set[Job] = field(default_factory=set)  # the event loop's

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._commands.put((None, None))
        self._thread.join()

    @property
    def waiting(self) -> int:
        return max(0, self.pending - len(self.engine.slots))

    def room(self, choices: int) -> bool:
        return self.waiting + choices <= self.max_waiting or self.pending == 0

    def submit(self, job: Job) -> None:
        """Raises Overloaded."""
        if not self.room(len(job.choices)):
            raise Overloaded
        self.pending += len(job.choices)
        self._active.add(job)
        self._commands.put((self._add, job))

    def cancel(self, job: Job) -> None:
        """Frees the slots of what still runs; ignored for a job that has ended."""
        if job in self._active:
            self._forget(job)
            self._commands.put((self._cancel, job))

    def _forget(self, job: Job) -> None:
        self._active.discard(job)
        self.pending -= job.open

    # ------------------------------------------------------------------------------------------------ the thread

    def _run(self) -> None:
        while True:
            try:
                while not self._commands.empty() or not (self.engine.busy or self._scoring):
                    action, job = self._commands.get()
                    if job is None:
                        return
                    action(job)
                if self._scoring:
                    self._score(*self._scoring.popleft())
                updates = [self._update(event) for event in self.engine.step()]
            except Exception as error:  # whatever it is, those who wait must hear of it, and the next ones be served
                traceback.print_exc()
                running, self._running = self._running, {}
                for number in running:
                    self.engine.cancel(number)
                updates = [failed(*where, ApiError(500, f"the model failed: {error}")) for where in running.values()]
            if updates:
                self._send(updates)

    def _add(self, job: Job) -> None:
        for i, choice in enumerate(job.choices):
            if choice.params is None or choice.score is not None:
                self._scoring.append((job, i))
            else:
                self._generate(job, i)

    def _score(self, job: Job, i: int) -> None:
        choice, scored = job.choices[i], None
        try:
            if choice.score is not None:
                scored = score_prompt(self.engine, choice.prompt, choice.score, job.adapter)
        except Exception as error:  # as in _run()
            traceback.print_exc()
            return self._send([failed(job, i, ApiError(500, f"the model failed: {error}"))])
        reason = "length" if choice.params is None else None
        self._send([(job, Update(i, [], finish_reason=reason, prompt=scored))])
        if choice.params:
            self._generate(job, i)

    def _generate(self, job: Job, i: int) -> None:
        choice = job.choices[i]
        try:
            choice.number = self.engine.add(choice.prompt, choice.params, job.adapter)
            self._running[choice.number] = job, i
        except ValueError as error:
            self._send([failed(job, i, ApiError(400, str(error)))])

    def _cancel(self, job: Job) -> None:
        self._scoring = deque(each for each in self._scoring if each[0] is not job)
        for choice in job.choices:
            if self._running.pop(choice.number, None):
                self.engine.cancel(choice.number)

    def _update(self, event: Event) -> tuple[Job, Update]:
        job, i = self._running[event.index]
        choice = job.choices[i]
        choice.tokens += 1
        deltas, logprob, reason = [], None, event.finish_reason
        last = event.token_id in self.stop_ids or event.token_id in choice.params.stop_token_ids
        if event.logprob is not None:
            choice.logprob += event.logprob
            if choice.answer.shows(event.token_id, last):
                logprob = Logprob(event.token_id, event.logprob, event.top_logprobs)
        if not last:
            deltas = choice.answer.push(event.token_id)
            if choice.answer.stopped:
                self.engine.cancel(event.index)
                reason = "stop"
        if reason:
            del self._running[event.index]
            deltas = deltas + choice.answer.close(cut=reason == "length")
            if choice.params.constraint and choice.params.constraint.failed:
                return failed(job, i, ApiError(400, "the schema is too complex to be enforced", param=choice.why))
        return job, Update(i, deltas, logprob, reason)

    def _send(self, updates: list[tuple[Job, Update]]) -> None:
        try:
            self._loop.call_soon_threadsafe(self._receive, updates)
        except RuntimeError:  # the loop is closed: nobody waits any more
            pass

    def _receive(self, updates: list[tuple[Job, Update]]) -> None:
        """In the event loop."""
        for job, update in updates:
            if job in self._active:
                job.put(update)
                self.pending -= update.finish_reason is not None
                if not job.open:
                    self._active.discard(job)


def failed(job: Job, choice: int, error: ApiError) -> tuple[Job, Update]:
    return job, Update(choice, [], finish_reason="error", error=error)
