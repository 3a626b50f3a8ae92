"""`Sender`: one channel's queue, and the thread that delivers it away from every task's path."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Literal, Protocol, TypeAlias

from .. import _clock
from .._core.process import start_thread
from .._log import Level, log
from ..events import Failure
from ..policies import Retry
from .alert import Alert, DeliveryFailed
from .calls import call, is_explained, not_in_time
from .queue import AlertQueue, GroupKey, Message, Timing
from .routing import Route

Status: TypeAlias = Literal["sent", "failed", "deduplicated", "rate_limited", "dropped"]
STATUSES: tuple[Status, ...] = ("sent", "failed", "deduplicated", "rate_limited", "dropped")

#: Waits between two attempts to deliver one message.
_RETRY = Retry(wait_initial=2.0, wait_max=30.0)

#: Seconds that a thread has to end once it was asked to.
_LAST_WORDS = 0.5


class AlertMetrics(Protocol):
    """What alerts count: implemented by `aftertask.signals.Metrics`."""

    def count_alerts(self, channel: str, status: str, count: int) -> None: ...
    def observe_alert_delivery(self, channel: str, seconds: float) -> None: ...
    def set_alert_queue(self, channel: str, length: int) -> None: ...
    def self_error(self, component: str) -> None: ...


class Sender:
    """
    What one channel has yet to send, and the thread that delivers it.

    The thread exists while there is something to send. It calls the channel in another thread and gives a call up after
    the route's timeout. While a call hangs no other one is made, so there is never more than one.
    """

    def __init__(
        self, route: Route, timing: Timing, redact: Callable[[str], str], metrics: AlertMetrics | None
    ) -> None:
        self.route = route
        self._timing, self._redact, self._metrics = timing, redact, metrics
        self.after_fork()
        for status in STATUSES:
            self._count(status, 0)
        self._measure()

    def after_fork(self) -> None:
        """Start over in a child process: what is pending belongs to the parent."""
        self._changed = threading.Condition()
        self._queue = AlertQueue(self._timing, self.route.rate, self.route.per)
        self._thread: threading.Thread | None = None
        self._call: tuple[Alert, Future[None]] | None = None
        self._closing = False

    def add(self, key: GroupKey, count: int, describe: Callable[[], Alert], timestamp: float) -> None:
        """Add runs to their group; `describe` is called only if an alert begins with them."""
        with self._changed:
            if self._queue.add(key, count, describe, _clock.monotonic(), timestamp):
                self._wake()
                self._measure()

    def add_not_run(self, cause: GroupKey, task: str) -> bool:
        """Attach a run that did not start to the pending alert about its cause; False if there is none."""
        with self._changed:
            return self._queue.add_not_run(cause, task)

    def succeeded(self, task: str) -> None:
        """Note that a run of a failing task succeeded."""
        with self._changed:
            self._queue.succeeded(task, _clock.monotonic())
            self._wake()

    def has_alerted(self, task: str) -> bool:
        """Whether an alert about this task was sent or is pending."""
        with self._changed:
            return self._queue.has_alerted(task)

    def clock_advanced(self) -> None:
        """Look again at what is due."""
        with self._changed:
            self._changed.notify_all()

    def begin_close(self) -> None:
        """Make everything due at once; what fails from now on is dropped."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def finish_close(self, timeout: float) -> None:
        """Wait until everything is delivered, at most `timeout` seconds; drop and count the rest."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout)
            with self._changed:
                self._thread = None
                self._changed.notify_all()
            thread.join(_LAST_WORDS)
        with self._changed:
            dropped = self._queue.clear()
            self._closing = False
            self._measure()
        if dropped:
            self._count("dropped", dropped)
            self._log("error", "alert.failed", reason="shutdown", suppressed_count=dropped)

    def _wake(self) -> None:
        """Have the thread look at the queue again; start it if it is needed and not there."""
        self._changed.notify_all()
        if self._thread is None and self._queue.pause(_clock.monotonic()) is not None:
            self._thread = start_thread(f"alerts-{self.route.name}", self._work)

    @property
    def _active(self) -> bool:
        """Whether the current thread is still the one that delivers."""
        return self._thread is threading.current_thread()

    def _work(self) -> None:
        while (message := self._next()) is not None:
            try:
                self._deliver(message)
            except Exception as error:  # of a metrics signal, for one: no reason to stop sending alerts
                stack = Failure(error, self._redact).stack
                log("error", "signal.failed", signal="aftertask.alerts", on="delivery", exception=stack)

    def _next(self) -> Message | None:
        """The next message, as soon as it is due; None when the thread should end."""
        with self._changed:
            while self._active:
                now = _clock.monotonic()
                message = self._queue.take(now, closing=self._closing)
                if message is not None:
                    return message
                pause = self._queue.pause(now)
                if self._closing or pause is None:
                    self._thread = None
                else:
                    self._changed.wait(min(pause, threading.TIMEOUT_MAX))
            return None

    def _deliver(self, message: Message) -> None:
        closing, attempt = self._closing, 0
        while True:
            attempt += 1
            started = _clock.monotonic()
            error = self._try(message.alert)
            if error is None:
                self._sent(message, _clock.monotonic() - started)
                return
            retry_after = error.retry_after if isinstance(error, DeliveryFailed) else None
            permanent = isinstance(error, DeliveryFailed) and (error.permanent or (retry_after or 0) > _RETRY.wait_max)
            if permanent or attempt == self.route.attempts or not self._active:
                self._failed(message, error, attempt, retry_after, last=closing)
                return
            pause = _RETRY.delay_s(attempt) if retry_after is None else retry_after
            self._wait(lambda: self._closing is not closing, _clock.monotonic() + pause)

    def _try(self, alert: Alert) -> BaseException | None:
        """Call the channel; the error, or None."""
        end = _clock.monotonic() + self.route.timeout
        while True:
            if self._call is None:  # or an earlier call, which timed out, still hangs
                self._call = alert, call(self.route, alert)
                self._call[1].add_done_callback(lambda _: self.clock_advanced())
            called, future = self._call
            self._wait(future.done, end)
            if not future.done():
                return not_in_time(self.route)
            self._call = None
            if called is alert:
                return future.exception()

    def _wait(self, until: Callable[[], bool], end: float) -> None:
        """Wait until a condition holds, at most until `end`, and not after the thread was asked to end."""
        with self._changed:
            while not until() and self._active and (left := end - _clock.monotonic()) > 0:
                self._changed.wait(min(left, threading.TIMEOUT_MAX))

    def _sent(self, message: Message, duration: float) -> None:
        alert, held = message.alert, message.alert.suppressed
        with self._changed:
            self._queue.sent(message, _clock.monotonic())
            self._measure()
        self._count("sent", 1)
        self._count("deduplicated", message.runs - 1)
        self._count("rate_limited", message.runs_held_back)
        if self._metrics is not None:
            self._metrics.observe_alert_delivery(self.route.name, duration)
        runs = None if held is None else held.runs
        self._log("info", "alert.sent", alert, duration_s=round(duration, 6), suppressed_count=runs)
        if held is not None:
            self._log("info", "alert.suppressed", alert, alerts=held.alerts, suppressed_count=runs)

    def _failed(
        self, message: Message, error: BaseException, attempts: int, retry_after: float | None, *, last: bool
    ) -> None:
        with self._changed:
            self._queue.failed(message, _clock.monotonic(), retry_after)
            if last and self._active:
                self._thread = None  # one more round when the app closes, not as many as its time allows
            self._measure()
        self._count("failed", 1)
        failure = Failure(error, self._redact)
        self._log(
            "error",
            "alert.failed",
            message.alert,
            attempts=attempts,
            error_type=failure.type,
            error_message=failure.message,
            exception=None if is_explained(error) else failure.stack,
        )

    def _count(self, status: Status, count: int) -> None:
        if self._metrics is not None:
            self._metrics.count_alerts(self.route.name, status, count)

    def _measure(self) -> None:
        if self._metrics is not None:
            self._metrics.set_alert_queue(self.route.name, len(self._queue))

    def _log(self, level: Level, event: str, alert: Alert | None = None, **keys: Any) -> None:
        if alert is not None:
            keys |= {"kind": alert.kind, "task": alert.task, "count": alert.count}
            keys["fingerprint"] = alert.fingerprint or None
        if log(level, event, channel=self.route.name, **keys) is not None and self._metrics is not None:
            self._metrics.self_error("aftertask.alerts")
