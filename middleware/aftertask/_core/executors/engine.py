"""A run handed to an engine: off the event loop, within a deadline."""

from __future__ import annotations

import functools
import queue
from collections.abc import Callable
from contextvars import copy_context

import anyio

from ... import _clock
from ..._text import error_type
from ...engines import Engine, Handover
from ...errors import EngineUnavailable
from ...policies import Retry
from ..loops import call_soon_from_any_thread
from ..process import on_fork, start_thread

#: Threads per engine: a broker that takes its time to confirm each message must not make the others wait.
THREADS = 4

#: After a hand-over that failed, durable runs wait for this long in the journal, then one of them tries again.
_AGAIN = Retry(wait_initial=0.5, wait_max=15.0)


class Remote:
    """
    One engine of one app, with the threads that talk to it.

    Args:
        name: Its name in `Settings.engines`.
        engine: The engine.
    """

    def __init__(self, name: str, engine: Engine) -> None:
        self.name, self.engine = name, engine
        self._failures, self._closed_until_s = 0, float("-inf")
        self.after_fork()
        on_fork(self)

    def after_fork(self) -> None:
        """The threads are the parent's."""
        self._calls: queue.SimpleQueue[_Call] = queue.SimpleQueue()
        self._threads = 0

    @property
    def falls_back(self) -> bool:
        """Whether a run that the engine did not take executes here."""
        return self.engine.on_unavailable == "local"

    @property
    def is_open(self) -> bool:
        """Whether it is worth a try: the last hand-over did not fail, or was long enough ago."""
        return _clock.monotonic() >= self._closed_until_s

    async def submit(self, handover: Handover) -> str:
        """
        Hand a run over; returns the queue it went to.

        Raises:
            EngineUnavailable: The engine did not take it within its deadline.
        """
        task = handover.run.task
        if self._failures:  # others wait for what becomes of this one
            self._closed_until_s = _clock.monotonic() + self.engine.deadline
        call = _Call(self.engine, handover)
        self._calls.put(call)
        if self._threads < THREADS:
            self._threads += 1
            start_thread(f"engine-{self.name}", functools.partial(self._send, self._calls))
        try:
            with _clock.move_on_after(self.engine.deadline):
                await call.done.wait()
        finally:
            handover.given_up.set()
        result, error = call.result, call.error  # the thread may still be about to set them
        self._failures = 0 if result is not None else self._failures + 1
        delay_s = _AGAIN.delay_s(self._failures) if self._failures else 0.0
        self._closed_until_s = _clock.monotonic() + delay_s
        if error is not None:
            raise EngineUnavailable(f"{self.name} did not take {task}: {error_type(error)}") from error
        if result is None:
            raise EngineUnavailable(f"{self.name} did not take {task} within {self.engine.deadline:g} s")
        return result

    @staticmethod
    def _send(calls: queue.SimpleQueue[_Call]) -> None:
        while True:
            calls.get()()


class _Call:
    """One call of `Engine.submit`, which its caller may give up while it waits for a thread: it then never begins."""

    def __init__(self, engine: Engine, handover: Handover) -> None:
        self.done = anyio.Event()
        self.result: str | None = None
        self.error: BaseException | None = None
        self._given_up = handover.given_up
        self._submit: Callable[[], str] = functools.partial(copy_context().run, engine.submit, handover)
        self._call_soon = call_soon_from_any_thread()

    def __call__(self) -> None:
        if self._given_up.is_set():
            return
        try:
            self.result = self._submit()
        except BaseException as error:  # the thread serves the calls after this one, too
            self.error = error
        self._call_soon(self.done.set)
