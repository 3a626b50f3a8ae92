"""The life of a run: from its turn to its outcome."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import Context
from typing import TypeVar

import anyio

from .. import _clock
from .._taskrun import running
from ..engines import Handover
from ..errors import EngineUnavailable, TaskTimeout
from ..events import Abandoned, AbandonedEnded, OffloadFailed
from ..tasks import code_name
from .emit import Emitter
from .executors.engine import Remote
from .executors.process import call_in_process
from .executors.thread import ThreadCall, call_in_thread
from .keeper import Keeper
from .limits import Limiter, SharedThreadSlot, Slot
from .loops import cancelled_from_outside
from .run import Run
from .stacks import stack_of

T = TypeVar("T")


class Lifecycle:
    """
    Takes the runs of one app through their lives.

    Args:
        emit: Gets every event.
        threads: The limiter of aftertask's own threads.
        keeper: Keeps durable runs; None if nothing does.
    """

    def __init__(self, emit: Emitter, threads: Limiter, keeper: Keeper | None) -> None:
        self._emit, self._threads, self._keeper = emit, threads, keeper

    async def live(self, run: Run) -> None:
        """Run one run to its outcome; raise what its caller should see."""
        delay_s = await self.attempt(run)
        while delay_s is not None:
            await self.back_off(run, delay_s)
            delay_s = await self.attempt(run)

    async def attempt(self, run: Run) -> float | None:
        """
        One attempt: acquire its slots, call the function, emit what became of it.

        Returns:
            Seconds until the next attempt; None if the run has ended.

        Raises:
            BaseException: What the last attempt raised: the task's own exception, or `TaskTimeout`.
        """
        if run.outcome is not None:  # cancelled while it waited for this attempt
            return None
        delay_s = None
        run.scope = scope = anyio.CancelScope()
        try:
            with scope:
                delay_s = await self._attempt(run)
        except RuntimeError:
            if run.outcome != "succeeded":
                raise
            # The task has left a cancel scope of its own open, so ours cannot be closed: without us it would go on.
        if scope.cancelled_caught and run.outcome is None:  # `cancel_run`, before its turn
            self._emit(run.drop("cancel_run"))
            run.forget()
        return delay_s

    async def _attempt(self, run: Run) -> float | None:
        if (run.slots or run.resolved.waits) and not await self._acquired(run):
            return None
        if run.info.durable and not await self._claimed(run):
            return None
        outer = running.get()
        running.set(run)
        restore = None if run.variables is None else apply_variables(run.variables)
        try:
            self._emit(run.begin())
            if run.resolved.remote is not None and await self._handed_over(run, run.resolved.remote):
                return None
            timeout = None if run.observed_only else run.info.timeout
            result = await (self._call(run) if timeout is None else self._call_within(run, timeout))
        except Exception as error:
            delay_s = run.delay_after(error)
            if delay_s is not None:
                self._emit(run.retrying(error, self._emit.failure(error), delay_s))
                _release(run.slots)
                return delay_s
            self._fail(run, error)
            await self._call_on_error(run, error)
            raise
        except BaseException as error:
            if cancelled_from_outside(error):
                self._emit(run.cancel())
            else:
                self._fail(run, error)
            raise
        else:
            self._emit(run.succeed(result))
            return None
        finally:
            # By value and not by token: a coroutine may be closed from another context, which is then left alone.
            if running.get() is run:
                running.set(outer)
                if restore is not None:
                    restore()
            if run.outcome is not None:
                run.forget()

    def observe_sync(self, run: Run, call: Callable[[], T]) -> T:
        """Observe a function that user code calls without awaiting it, maybe in a thread."""
        token = running.set(run)
        try:
            self._emit(run.begin())
            result = call()
        except BaseException as error:
            self._fail(run, error)
            raise
        else:
            self._emit(run.succeed(result))
            return result
        finally:
            running.reset(token)
            run.forget()

    async def back_off(self, run: Run, delay_s: float) -> None:
        """Wait for the next attempt, without a slot or a thread."""
        with anyio.CancelScope() as run.scope:
            if run.cancel_requested:
                run.scope.cancel()
            with self._cancellation_emitted(run):
                await _clock.sleep(delay_s)

    # --- before an attempt

    async def _acquired(self, run: Run) -> bool:
        """Acquire the slots of an attempt; False if the run expired first."""
        if run.attempt:
            with self._cancellation_emitted(run):
                await _acquire(run.slots)
            return True
        self._reserve_threads(run)
        if run.resolved.expires is None or run.observed_only:
            await _acquire(run.slots)
            return True
        left_s = run.scheduled_s + run.resolved.expires - _clock.monotonic()
        if left_s > 0:
            with _clock.move_on_after(left_s):
                await _acquire(run.slots)
                return True
        self._emit(run.expire())
        run.forget()
        return False

    async def _claimed(self, run: Run) -> bool:
        """Whether a durable run may start: from here on, a crash leaves a run that may have finished."""
        was_called_by_user = run.observed_only and not run.confirmed  # and never was an intent
        if self._keeper is None or run.attempt or was_called_by_user:
            return True
        remote = run.resolved.remote if run.is_handed_over else None
        if await self._keeper.claim(run) and (remote is None or remote.is_open):
            return True
        self._emit(run.hand_over())
        run.forget()
        return False

    def _reserve_threads(self, run: Run) -> None:
        """A thread is a slot too, where it may have to be kept after the attempt."""
        if run.observed_only:
            return
        if run.resolved.own_thread:
            slot = self._threads.reserve(run.info.priority, None)
            run.slots = run.slots if slot is None else (*run.slots, slot)
        elif run.resolved.keeps_thread:
            run.slots = (*run.slots, SharedThreadSlot())

    @contextmanager
    def _cancellation_emitted(self, run: Run) -> Iterator[None]:
        """A run that has started and is cancelled while it waits for its next attempt has ended."""
        try:
            yield
        except BaseException:
            self._emit(run.cancel())
            run.forget()
            raise

    # --- an attempt

    async def _handed_over(self, run: Run, remote: Remote) -> bool:
        """Hand the run to its engine, or a durable one back to the journal; False if it is to execute here."""
        if run.observed_only:
            return False
        began_s, waits = _clock.monotonic(), run.info.durable and self._keeper is not None
        if run.arguments is None and run.work is not None:  # it comes from the journal
            run.arguments = remote.engine.encode(run.task, run.work.func, run.work.args, run.work.kwargs)
        expires = run.resolved.expires
        left_s = None if expires is None else max(0.0, run.scheduled_s + expires - began_s)
        try:
            queue = await remote.submit(Handover(run=run, arguments=run.arguments, expires_s=left_s))
        except EngineUnavailable as error:
            failure, seconds = self._emit.failure(error), _clock.monotonic() - began_s
            falls_back = remote.falls_back and not waits
            self._emit(OffloadFailed(run, _clock.timestamp(), remote.name, seconds, failure, falls_back))
            if waits:
                self._emit(run.hand_over())
            elif not falls_back:
                raise
            return waits
        self._emit(run.offload(remote.name, queue, _clock.monotonic() - began_s))
        return True

    async def _call_within(self, run: Run, timeout: float) -> object:
        """Call the function; raise `TaskTimeout` if that takes more than `timeout` seconds."""
        cancelled: list[BaseException] = []
        try:
            with _clock.move_on_after(timeout) as scope:
                try:
                    return await self._call(run)
                except BaseException as error:  # a nursery of trio's makes a group of its cancellations
                    cancelled.append(error)  # its traceback shows where the task was
                    raise
            run.passed_timeout = scope.cancelled_caught
            raise TaskTimeout(f"{run.task} did not finish within its timeout of {timeout:g} s") from cancelled[0]
        finally:
            cancelled.clear()  # a traceback that holds this frame would be a reference cycle

    async def _call(self, run: Run) -> object:
        """Call the function on the loop, in a thread or in a process."""
        work = run.work
        assert work is not None  # until the run is over
        coroutine: Awaitable[object]
        if run.info.executor == "process" and not run.observed_only:
            coroutine = call_in_process(work.func, work.args, work.kwargs)
        elif (run.resolved.own_thread or run.resolved.keeps_thread) and not run.observed_only:
            function = functools.partial(work.func, *work.args, **work.kwargs)
            may_abandon = run.resolved.own_thread or run.info.timeout is not None
            abandoned = functools.partial(self._abandon, run)
            coroutine = call_in_thread(run, function, may_abandon=may_abandon, on_abandoned=abandoned)
        else:
            coroutine = work.call()
        run.coroutine = coroutine
        try:
            return await coroutine
        finally:
            run.coroutine = None

    # --- the end of an attempt

    def _fail(self, run: Run, error: BaseException) -> None:
        failure = self._emit.failure(error)
        self._emit(run.time_out(failure) if run.passed_timeout else run.fail(error, failure))

    async def _call_on_error(self, run: Run, error: Exception) -> None:
        callback = run.resolved.on_error
        if callback is None or run.observed_only:
            return
        try:
            result = callback(run, error)
            if inspect.isawaitable(result):
                await result
        except Exception as broken:
            self._emit.broken(code_name(callback), "on_error", broken)

    def _abandon(self, run: Run, call: ThreadCall) -> None:
        """The attempt is over but its thread may not be: what it holds, it keeps until it ends."""
        slots, started_s, limit_s = run.slots, run.started_s or 0.0, run.info.timeout or 0.0

        def ended() -> None:
            for slot in slots:
                slot.close()
            run.abandoned = False
            self._emit(AbandonedEnded(run, _clock.timestamp(), _clock.monotonic() - started_s, limit_s))

        if call.abandon(ended):
            run.abandoned = True
            run.slots = tuple(slot.another() for slot in slots)
            if self._emit.wants(Abandoned):
                running_s = _clock.monotonic() - started_s
                stack = stack_of(run, self._emit.redact)
                self._emit(Abandoned(run, _clock.timestamp(), running_s, limit_s, stack))


def apply_variables(variables: Context) -> Callable[[], None]:
    """Set context variables here; returns what restores those that it changed."""
    missing = object()
    changed = [
        (var, var.set(value))
        for var, value in variables.items()
        if var is not running and var.get(missing) is not value
    ]

    def restore() -> None:
        for var, token in reversed(changed):
            try:
                var.reset(token)
            except ValueError:  # a coroutine that is closed from another context, which is left alone
                pass

    return restore


async def _acquire(slots: tuple[Slot | SharedThreadSlot, ...]) -> None:
    """Acquire all slots, one after another; none stays acquired if that is cancelled."""
    try:
        for slot in slots:
            if not slot.acquire_nowait():
                await slot.acquire()
    except BaseException:
        _release(slots)
        raise


def _release(slots: tuple[Slot | SharedThreadSlot, ...]) -> None:
    for slot in slots:
        slot.release()
