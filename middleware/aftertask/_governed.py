"""A run under its policy: it waits for its turn, is called, perhaps called again, and ends."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any

from . import _clock, _gates, _intercept, _timer
from ._frames import calls_run
from .errors import TaskTimeout
from .events import Plan, TaskRun
from .executors import Executor
from .executors.process import Process
from .executors.thread import SharedPlace, Thread, ThreadCall
from .policies import code_name

if TYPE_CHECKING:
    from ._runner import Engine

#: Has the rest of a run go on beside its siblings.
Spawn = Callable[[Callable[[], Coroutine[Any, Any, None]]], Awaitable[None]]
Settle = Callable[[Exception], object]


class Governor:
    """
    Runs the runs of one app whose policy asks for more than a call.

    Args:
        engine: Who tells each step.
        thread_limit: Threads of our own.
    """

    def __init__(self, engine: Engine, thread_limit: int) -> None:
        self._engine = engine
        self.threads = _gates.Gate("aftertask", thread_limit)
        self._thread = Thread(self._left_running)
        self._executors: dict[str, Executor] = {"thread": self._thread, "process": Process()}

    def run(self, run: TaskRun, spawn: Spawn | None, settle: Settle) -> Awaitable[Exception | None]:
        """
        Run a scheduled run to its end, once this is awaited.

        Args:
            run: The run.
            spawn: Has what follows a back-off go on beside the siblings; None where a back-off holds them.
            settle: Told what a run that went on beside its siblings has failed with.

        Returns:
            What it failed with; None where it did not, or has not yet.
        """
        plan = run.plan
        if plan.own_thread:
            run.places = (*run.places, _gates.Place(self.threads, plan.priority))
        elif plan.executor == "thread" and _counted(plan):
            run.places = (*run.places, SharedPlace())
        late = plan.expires is not None and _left(run, plan.expires) <= 0
        if late or not _enter_now(run):
            return self._later(run, spawn, settle)
        return self._attempts(run, spawn, settle)

    @calls_run
    async def _later(self, run: TaskRun, spawn: Spawn | None, settle: Settle) -> Exception | None:
        return await self._attempts(run, spawn, settle) if await self._in_time(run) else None

    @calls_run
    async def _attempts(self, run: TaskRun, spawn: Spawn | None, settle: Settle) -> Exception | None:
        """Call the function, again after each failure that its policy wants that for; what it has failed with."""
        engine, plan = self._engine, run.plan
        while True:
            delay: float | None = None
            outer = engine.begin(run)
            try:
                call = self._call(run)
                result = await (call if plan.timeout is None else _timer.within(plan.timeout, call))
            except Exception as raised:
                error, timed_out = raised, isinstance(raised, _timer.Overrun)
                if timed_out:
                    error = TaskTimeout(f"{run.task} took longer than its time limit of {plan.timeout:g} s")
                    error.__cause__ = raised.__cause__
                delay = self._delay(run, error)
                try:
                    if delay is None:
                        engine.fail(run, error, timed_out=timed_out)
                        await self._tell_owner(run, error)
                        return error
                    engine.retrying(run, error, delay)
                finally:
                    del error  # its traceback holds this frame: there would be a cycle
            except BaseException:
                engine.cut_off(run)
                raise
            else:
                engine.succeed(run, result)
                return None
            finally:
                if delay is not None:
                    _come_out(run)
                engine.leave(run, outer, for_good=delay is None)
            if spawn is not None:
                run.batch = 0  # it has a context of its own from here on
                await spawn(functools.partial(self._rest, run, delay, settle))
                return None
            await self._back_off(run, delay)

    @calls_run
    async def _rest(self, run: TaskRun, delay: float, settle: Settle) -> None:
        await self._back_off(run, delay)
        error = await self._attempts(run, None, settle)
        if error is not None:
            settle(error)
        del error  # since Python 3.12 the frames of its traceback lead here: there would be a cycle

    # --- before an attempt

    async def _in_time(self, run: TaskRun) -> bool:
        """Wait until the run may start; False where its deadline passed first."""
        expires = run.plan.expires
        try:
            if expires is None:
                await self._enter(run)
                return True
            left = _left(run, expires)
            if left <= 0:
                raise _timer.Overrun
            await _timer.within(left, self._enter(run))
        except _timer.Overrun:
            self._engine.expire(run)
            return False
        except BaseException:
            self._engine.never_ran(run, "cancelled", None)
            raise
        return True

    async def _enter(self, run: TaskRun) -> None:
        """Take the places that an attempt needs, one after another."""
        try:
            for place in run.places:
                await place.enter()
        except BaseException:
            _come_out(run)
            raise

    async def _back_off(self, run: TaskRun, delay: float) -> None:
        run.backing_off = True
        try:
            await _timer.sleep(delay)
            await self._enter(run)
        except BaseException:
            self._engine.cut_off_waiting(run)
            raise
        finally:
            run.backing_off = False

    # --- an attempt

    def _call(self, run: TaskRun) -> Awaitable[Any]:
        plan = run.plan
        executor = plan.executor
        if executor == "inline" or (executor == "thread" and not _counted(plan)):
            return _intercept.call(run.target, self._engine.spanned)
        return self._executors[executor](run)

    def _delay(self, run: TaskRun, error: Exception) -> float | None:
        """Seconds until the next attempt; None where there is none."""
        plan = run.plan
        retry = plan.retry
        if retry is None or run.attempt >= retry.attempts or not retry.wants(error):
            return None
        if run.abandoned is not None and not plan.idempotent:
            return None  # its thread goes on: a second one beside it would do the work twice
        return retry.delay_s(run.attempt)

    @calls_run
    async def _tell_owner(self, run: TaskRun, error: Exception) -> None:
        callback = run.plan.on_error
        if callback is None:
            return
        try:
            told = callback(run, error)
            if inspect.isawaitable(told):
                await told
        except Exception as broken:
            self._engine.broken(code_name(callback), "on_error", broken)

    # --- threads that go on

    def _left_running(self, run: TaskRun, call: ThreadCall) -> None:
        """An attempt is over, and its thread is not: what it holds, it keeps."""
        run.abandoned = call
        places, started = run.places, run.started_s or 0.0
        run.places = tuple(place.again() for place in places)
        self._engine.abandon(run)

        def ended() -> None:
            for place in places:
                place.give_back()
            if run.abandoned is call:
                run.abandoned = None
            self._engine.end_abandoned(run, _clock.monotonic() - started)

        call.at_end(ended)


def _counted(plan: Plan) -> bool:
    """Whether its thread may be left behind with something that it keeps until it ends: asyncio can cancel any."""
    return plan.own_thread or plan.timeout is not None or plan.gate is not None


def _left(run: TaskRun, expires: float) -> float:
    return run.scheduled_s + expires - _clock.monotonic()


def _enter_now(run: TaskRun) -> bool:
    """Take the places that an attempt needs, if all are free now."""
    for place in run.places:
        if not place.enter_now():
            _come_out(run)
            return False
    return True


def _come_out(run: TaskRun) -> None:
    for place in run.places:
        place.come_out()
