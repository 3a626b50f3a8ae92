"""One channel's outbox: what waits to be told, and the thread that delivers it, off every task's path."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import math
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any, Literal, Protocol, TypeAlias

from opentelemetry import context as otel

from .. import _clock
from .._log import emit
from ..events import Failure
from ..policies import Retry
from ._alert import Alert
from ._channel import DeliveryFailed, Route
from ._groups import Groups, Key, Message, Pace

Status: TypeAlias = Literal["sent", "failed", "deduplicated", "rate_limited", "dropped"]
STATUSES: tuple[Status, ...] = ("sent", "failed", "deduplicated", "rate_limited", "dropped")

#: Waits between two attempts to deliver one message.
RETRY = Retry(wait_initial=2.0, wait_max=30.0)

#: A thread with nothing to do ends after so many seconds.
IDLE = 30.0

#: No lock can be waited for without end; longer times are waited for in parts.
LONGEST_WAIT = 3600.0

# What OpenTelemetry's packages look at before they make a span: by the name of the key, in older versions too.
_SUPPRESSED = ("suppress_instrumentation", getattr(otel, "_SUPPRESS_INSTRUMENTATION_KEY", "suppress_instrumentation"))


class Numbers(Protocol):
    """Who keeps the numbers of alerting: `aftertask.signals.Metrics`."""

    def count_alerts(self, channel: str, status: str, count: int) -> None: ...
    def observe_alert_delivery(self, channel: str, seconds: float) -> None: ...
    def set_alert_queue(self, channel: str, length: int) -> None: ...
    def count_self_error(self, component: str) -> None: ...


class Outbox:
    """
    What waits for one channel, and the thread that delivers it.

    The thread is started when there is something to deliver for the first time. Each call of the channel is made in
    a thread of its own, since a call that hangs cannot be ended from outside: it is given up after the route's time
    limit, and as long as it hangs no other is made, so that there is never more than one.

    Args:
        route: The channel.
        pace: How often it is told.
        redact: Gets the text of what a channel raised, before it is logged.
        numbers: Where deliveries are counted; None: nowhere.
    """

    def __init__(self, route: Route, pace: Pace, redact: Callable[[str], str], numbers: Numbers | None) -> None:
        self.route = route
        self._pace, self._redact, self._numbers = pace, redact, numbers
        for status in STATUSES:
            self._count(status, 0)
        self.start_over()
        self._tell_length()

    def start_over(self) -> None:
        """As in a process that has just begun: after a fork, what the parent has waiting is the parent's."""
        self._changed = threading.Condition()
        self._groups = Groups(self._pace, self.route.rate, self.route.per)
        self._thread: threading.Thread | None = None
        self._call: _Call | None = None
        self._close_at = math.inf

    def add(self, key: Key, describe: Callable[[], Alert], timestamp: float) -> None:
        """A run of this kind ended badly; `describe` is called where a message begins with it."""
        alert = describe() if self._groups.wants_text(key) else None
        with self._changed:
            # It may have been taken meanwhile. The text is made outside of the lock: `Settings.redact` may be slow.
            if alert is not None or not self._groups.wants_text(key):
                self._add(key, alert, timestamp)
                return
        alert = describe()
        with self._changed:
            self._add(key, alert, timestamp)

    def _add(self, key: Key, alert: Alert | None, timestamp: float) -> None:
        if self._groups.add(key, alert, _clock.monotonic(), timestamp):
            self._tell_length()
            self._changed.notify_all()
        if self._thread is None:
            thread = threading.Thread(target=self._work, name=f"aftertask-alerts-{self.route.name}", daemon=True)
            thread.start()  # where that fails, the next one tries again
            self._thread = thread

    def add_not_run(self, cause: Key, task: str) -> bool:
        """A run was skipped because of one of this kind; False where this channel is not about to tell of that kind."""
        with self._changed:
            return self._groups.add_not_run(cause, task)

    def succeeded(self, task: str) -> None:
        """A run of a task that did not work has succeeded."""
        with self._changed:
            self._groups.succeeded(task, _clock.monotonic())
            self._changed.notify_all()

    def knows(self, task: str) -> bool:
        """Whether something was, or is to be, told of this task."""
        with self._changed:
            return self._groups.knows(task)

    def turned(self) -> None:
        """The clock was turned."""
        with self._changed:
            self._changed.notify_all()

    def begin_to_close(self, limit_s: float) -> None:
        """Everything is due from now on, and what has not been delivered after so many seconds is dropped."""
        with self._changed:
            self._close_at = time.monotonic() + limit_s
            self._changed.notify_all()

    def finish_closing(self) -> None:
        """Wait until it is delivered, or the time is up."""
        while (thread := self._thread) is not None and thread.is_alive():
            thread.join(max(0.0, self._left()) + 0.5)  # it ends by itself when the time is up
            if self._left() <= 0:
                break
        with self._changed:
            dropped = self._groups.drop()
            self._thread, self._close_at = None, math.inf
            self._tell_length()
        if dropped:
            self._count("dropped", dropped)
            emit("error", "alert.failed", channel=self.route.name, suppressed_count=dropped, reason="shutdown")

    def _work(self) -> None:
        while (message := self._next()) is not None:
            try:
                self._deliver(message)
            except Exception as error:  # such as the app's own log processor: no reason to tell nothing any more
                self._broken(error)

    def _broken(self, error: Exception) -> None:
        if self._numbers is not None:
            self._numbers.count_self_error("aftertask.alerts")
        with contextlib.suppress(Exception):
            failure = Failure(error, self._redact)
            emit("error", "signal.failed", signal="aftertask.alerts", on="delivery", exception=failure.stack)

    def _next(self) -> Message | None:
        """The next message, as soon as it is due; None where the thread is to end."""
        with self._changed:
            while threading.current_thread() is self._thread:
                now, closing = _clock.monotonic(), self._close_at < math.inf
                message = None if self._left() <= 0 else self._groups.take(now, closing=closing)
                if message is not None:
                    return message
                pause = self._groups.pause(now)
                if closing:
                    self._thread = None
                elif pause is not None:
                    self._changed.wait(min(pause, LONGEST_WAIT))
                elif not self._changed.wait(IDLE) and self._groups.pause(now) is None:
                    self._thread = None  # and nothing has come in while it woke up
            return None

    def _deliver(self, message: Message) -> None:
        attempt, last = 0, self._close_at < math.inf
        while True:
            attempt += 1
            started = time.monotonic()
            error = self._try(message.alert)
            if error is None:
                self._sent(message, time.monotonic() - started)
                return
            asked = error.retry_after if isinstance(error, DeliveryFailed) else None
            permanent = isinstance(error, DeliveryFailed) and (error.permanent or (asked or 0.0) > RETRY.wait_max)
            if permanent or attempt == self.route.attempts or self._left() <= 0:
                self._failed(message, error, attempt, asked, last=last)
                return
            self._rest(RETRY.delay_s(attempt) if asked is None else asked)

    def _rest(self, seconds: float) -> None:
        """Wait before another attempt; not any longer once this is to be closed."""
        with self._changed:
            if self._close_at == math.inf:
                self._changed.wait_for(lambda: self._close_at < math.inf, seconds)
            else:
                self._changed.wait_for(lambda: False, max(0.0, min(seconds, self._left())))

    def _try(self, alert: Alert) -> BaseException | None:
        """Call the channel; what it raised, or None."""
        end = time.monotonic() + self.route.timeout
        if self._call is not None and self._call.alert is not alert:
            if not self._wait_for(self._call, end):
                return self._late("an earlier call has not returned yet")
            self._call = None
        call = self._call = self._call or _Call(self.route, alert, self._call_over)
        if not self._wait_for(call, end):
            return self._late(f"it did not return within {self.route.timeout:.3g} s")
        self._call = None
        return call.error

    def _late(self, why: str) -> TimeoutError:
        return TimeoutError(why if self._left() > 0 else "the app ended before it returned")

    def _wait_for(self, call: _Call, end: float) -> bool:
        """Whether a call is over before this time, and before this is closed."""
        with self._changed:
            while not call.over and (left := min(end - time.monotonic(), self._left())) > 0:
                self._changed.wait(min(left, LONGEST_WAIT))
        return call.over

    def _call_over(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _left(self) -> float:
        return self._close_at - time.monotonic()

    def _sent(self, message: Message, lasted: float) -> None:
        alert = message.alert
        with self._changed:
            self._groups.sent(message)
            self._tell_length()
        self._count("sent", 1)
        self._count("deduplicated", message.told - 1)
        self._count("rate_limited", message.left_out)
        if self._numbers is not None:
            self._numbers.observe_alert_delivery(self.route.name, lasted)
        left_out = None if alert.suppressed is None else alert.suppressed.runs
        self._emit("info", "alert.sent", alert, duration_s=round(lasted, 6), suppressed_count=left_out)
        if alert.suppressed is not None:
            self._emit("info", "alert.suppressed", alert, alerts=alert.suppressed.alerts, suppressed_count=left_out)

    def _failed(
        self, message: Message, error: BaseException, attempts: int, retry_after: float | None, *, last: bool
    ) -> None:
        with self._changed:
            self._groups.failed(message, _clock.monotonic(), retry_after)
            if last:
                self._close_at = -math.inf  # at the end there is one round more, not as many as the time allows
            self._tell_length()
        self._count("failed", 1)
        failure = Failure(error, self._redact)
        ours = isinstance(error, (DeliveryFailed, TimeoutError))
        self._emit(
            "error",
            "alert.failed",
            message.alert,
            attempts=attempts,
            error_type=failure.type,
            error_message=failure.message,
            exception=None if ours else failure.stack,
        )

    def _count(self, status: Status, count: int) -> None:
        if self._numbers is not None:
            self._numbers.count_alerts(self.route.name, status, count)

    def _tell_length(self) -> None:
        if self._numbers is not None:
            self._numbers.set_alert_queue(self.route.name, self._groups.waiting)

    def _emit(self, level: str, event: str, alert: Alert, **keys: Any) -> None:
        known: dict[str, Any] = {
            "kind": alert.kind,
            "task": alert.task,
            "count": alert.count,
            "fingerprint": alert.fingerprint or None,
        }
        emit(level, event, channel=self.route.name, **known, **keys)


class _Call:
    """One call of a channel, in a thread of its own; `done` is called there when it is over."""

    def __init__(self, route: Route, alert: Alert, done: Callable[[], None] = lambda: None) -> None:
        self.alert, self._done = alert, done
        self.error: BaseException | None = None
        self.over = False
        self._route = route
        self._thread: threading.Thread | None = threading.Thread(
            target=self._run, name=f"aftertask-alert-{route.name}", daemon=True
        )
        try:
            self._thread.start()
        except RuntimeError:  # no more threads, or the interpreter is ending: then here
            self._thread = None
            self._run()

    def join(self, timeout: float) -> None:
        """Wait for its end; `over` says whether it has come."""
        if self._thread is not None:
            self._thread.join(timeout)

    def _run(self) -> None:
        context = otel.get_current()
        for key in _SUPPRESSED:
            context = otel.set_value(key, True, context)
        token = otel.attach(context)
        try:
            result = self._route.channel(self.alert)
            if inspect.isawaitable(result):
                asyncio.run(_within(result, self._route.timeout))
        except BaseException as error:  # SystemExit too: a channel ends nothing but its own call
            self.error = error
        finally:
            otel.detach(token)
            self.over = True
            self._done()


async def _within(awaitable: Awaitable[None], timeout: float) -> None:
    await asyncio.wait_for(awaitable, timeout)


def try_once(route: Route, alert: Alert) -> tuple[BaseException | None, float]:
    """Deliver one alert, once; what was raised, or None, and how many seconds it took."""
    started = time.monotonic()
    call = _Call(route, alert)
    call.join(route.timeout)
    lasted = time.monotonic() - started
    if not call.over:
        return TimeoutError(f"{route.name} did not return within {route.timeout:.3g} s"), lasted
    return call.error, lasted
