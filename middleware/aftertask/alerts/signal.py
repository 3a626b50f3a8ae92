"""`Alerts`: the signal that turns bad runs into alerts."""

from __future__ import annotations

import functools
import math
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import replace

from .. import _clock
from .._core.process import on_exit, on_fork
from .._text import default_redact
from ..events import Cancelled, RequestInfo, Signal, Slow, Stuck, Succeeded, TaskRun
from ..policies import check_seconds, check_whole
from .alert import Alert, Channel
from .delivery import AlertMetrics, Sender
from .describe import BadEnd, Problem, common_cause, describe, describe_burst, group_key, severity
from .queue import GroupKey, Timing
from .routing import Route, routes

#: Seconds that `close()` gives all channels together.
CLOSE_TIMEOUT = 5.0

#: A server that ends cancels what still runs immediately before it starts the lifespan's shutdown: what was cancelled
#: within this many seconds before that was cut off, and not cancelled with its request.
CUT_OFF_WITHIN = 2.0

#: At most this many runs are cut off one by one.
_MOST_CANCELLED = 1000


class Alerts(Signal):
    """
    Sends alerts about bad runs; one of the usual signals if `Settings.alerts` names a channel.

    A run that ends badly (`docs/telemetry.md`, Words) is sent at once if it is the first of its group: the same task,
    outcome and fingerprint (exception class, and the app's function that raised it). Further runs are counted and sent
    together after 5 minutes, then 10, 20, and so on, at most an hour. So is a run that had started and that a shutdown
    cancels. A task without a bad run for 5 minutes and with a
    success since is resolved, which is sent too. Runs that were skipped after a failure are part of its alert, and runs
    that one request dropped share one.

    For a task this costs a lock and a count; an alert's text is made once per message. Delivery has its own threads.

    Args:
        channels: `Webhook`, `Apprise`, a function, a URL, or a `Route` around one of these.
        trace_url: Template such as `https://tempo.example.org/trace/{trace_id}`; None means no link.
        runbook_url: Where the pages of `dashboards/runbooks/` are; None means no link.
        burst: Number of bad runs of the whole app within `burst_window` seconds that make a burst, at least 2.
        burst_window: The window of a burst, in seconds.
        repeat_after: Seconds from a group's first message to its second; doubled for each further one.
        repeat_max: Upper bound of that time, in seconds.
        resolve_after: Seconds without a bad run after which a task that has succeeded is resolved.
        service: Finds the service's name when an alert is made; None, or if it returns None, means `OTEL_SERVICE_NAME`.
        redact: As `Settings.redact`; applied to what a channel raises before it is logged.
        metrics: The `Metrics` signal, which counts deliveries; None: they are only logged.

    Raises:
        TypeError, ValueError: A value is not allowed; the message names it and shows no secret.
        ImportError: A channel needs Apprise, which is not installed.
    """

    def __init__(
        self,
        channels: Iterable[Channel | Route | str],
        *,
        trace_url: str | None = None,
        runbook_url: str | None = None,
        burst: int = 25,
        burst_window: float = 60.0,
        repeat_after: float = 300.0,
        repeat_max: float = 3600.0,
        resolve_after: float = 300.0,
        service: Callable[[], str | None] | None = None,
        redact: Callable[[str], str] = default_redact,
        metrics: AlertMetrics | None = None,
    ) -> None:
        check_trace_url("Alerts.trace_url", trace_url)
        check_base_url("Alerts.runbook_url", runbook_url)
        check_whole("Alerts.burst", burst, least=2)
        check_seconds("Alerts.burst_window", burst_window)
        check_seconds("Alerts.repeat_after", repeat_after)
        check_seconds("Alerts.repeat_max", repeat_max)
        check_seconds("Alerts.resolve_after", resolve_after)
        self._burst, self._burst_window, self._runbook_url = burst, burst_window, runbook_url
        self._describe = functools.partial(describe, trace_url=trace_url, runbook_url=runbook_url)
        self._service = service
        timing = Timing(
            repeat_after=repeat_after, repeat_max=max(repeat_after, repeat_max), resolve_after=resolve_after
        )
        self._senders = [Sender(route, timing, redact, metrics) for route in routes(channels)]
        self._reset()
        on_fork(self)
        on_exit(self)
        _clock.watchers.add(self)

    def _reset(self) -> None:
        # Reentrant: collecting garbage may close a coroutine, which ends its run, at any line of any thread.
        self._lock = threading.RLock()
        # Task to its number of bad runs in a row, and when the first of them ended.
        self._failing: dict[str, tuple[int, float]] = {}
        self._first: weakref.WeakKeyDictionary[TaskRun | RequestInfo, GroupKey] = weakref.WeakKeyDictionary()
        self._recent: deque[tuple[float, str]] = deque(maxlen=self._burst)
        self._cancelled: deque[Cancelled] = deque(maxlen=_MOST_CANCELLED)
        self._is_closed = False
        self._burst_ends_s = -math.inf

    @property
    def routes(self) -> list[Route]:
        """Where alerts go, each route under its final name."""
        return [sender.route for sender in self._senders]

    def succeeded(self, event: Succeeded) -> None:
        """Note that a failing task works."""
        task = event.run.task
        if task not in self._failing:
            return
        with self._lock:
            self._failing.pop(task, None)
        for sender in self._senders:
            sender.succeeded(task)

    def cancelled(self, event: Cancelled) -> None:
        """A started run was cancelled: by a shutdown, if the app closes now or has closed."""
        if event.run.info.alert:
            with self._lock:
                self._cancelled.append(event)
                is_closed = self._is_closed
            if is_closed:
                self._alert_cut_off()

    def open(self) -> None:
        """The app starts, maybe again."""
        self._is_closed = False

    def _alert_cut_off(self) -> None:
        with self._lock:
            self._is_closed = True
            cancelled = list(self._cancelled)
            self._cancelled.clear()
        for event in cancelled:
            if event.timestamp > _clock.timestamp() - CUT_OFF_WITHIN:
                describe = functools.partial(self._describe, event, 1, event.timestamp)
                self._send(self._senders_for(event), group_key(event), 1, describe, event.timestamp)

    def close(self) -> None:
        """Deliver what is pending on all channels; what takes longer than five seconds is dropped and counted."""
        self._alert_cut_off()
        deadline = _clock.monotonic() + CLOSE_TIMEOUT
        for sender in self._senders:
            sender.begin_close()
        for sender in self._senders:
            sender.finish_close(max(0.0, deadline - _clock.monotonic()))

    at_exit = close  # the server may not have run the app's lifespan

    def after_fork(self) -> None:
        """Start over in a child process: what is pending belongs to the parent."""
        self._reset()
        for sender in self._senders:
            sender.after_fork()

    def clock_advanced(self) -> None:
        """Look again at what is due."""
        for sender in self._senders:
            sender.clock_advanced()

    def _bad_end(self, event: BadEnd) -> None:
        run = event.run
        if not event.bad or not run.info.alert:
            return
        key, senders = group_key(event), self._senders_for(event)
        first = self._first_of_cause(event, key)
        if first is not None:
            informed = [sender for sender in self._senders if sender.add_not_run(first, run.task)]
            senders = [sender for sender in senders if sender not in informed]
        count, since = self._streak(event)
        if count:
            self._send(senders, key, count, lambda: self._describe(event, count, since), event.timestamp)
        if first is None:  # one mail server that is down is one failure a request, whatever was skipped after it
            self._detect_burst(event)

    # One handler for every bad end.
    failed = timed_out = skipped = dropped = rejected = lost = _bad_end

    def _long_running(self, event: Slow | Stuck) -> None:
        if not event.run.info.alert:
            return
        at = event.timestamp
        with self._lock:
            self._failing.setdefault(event.run.task, (0, at))
        self._send(self._senders_for(event), group_key(event), 1, lambda: self._describe(event, 1, at), at)

    slow = stuck = _long_running

    def _first_of_cause(self, event: BadEnd, key: GroupKey) -> GroupKey | None:
        """The group of the first bad end with the same cause; None if this is the first, or has no common cause."""
        cause = common_cause(event)
        if cause is None:
            return None
        with self._lock:
            first = self._first.get(cause)
            if first is None:
                self._first[cause] = key
            return first

    def _streak(self, event: BadEnd) -> tuple[int, float]:
        """How many bad runs the event stands for, and since when; 0 while its task has had fewer than `alert_after`."""
        run, at = event.run, event.timestamp
        wanted = run.info.alert_after
        with self._lock:
            before, since = self._failing.get(run.task, (0, at))
            streak = before + 1
            self._failing[run.task] = streak, since if before else at
        if wanted == 1 or streak > wanted or any(sender.has_alerted(run.task) for sender in self._senders):
            return 1, at
        return (streak, since) if streak == wanted else (0, at)

    def _detect_burst(self, event: BadEnd) -> None:
        """Alert once about many bad runs of the app, until there have been fewer for as long as the window."""
        now, recent = _clock.monotonic(), self._recent
        with self._lock:
            recent.append((now, event.run.task))
            seconds = now - recent[0][0]
            if len(recent) < self._burst or seconds > self._burst_window:
                return
            begins, self._burst_ends_s = now >= self._burst_ends_s, now + self._burst_window
            tasks = Counter(task for _, task in recent)
        if begins:
            senders = [sender for sender in self._senders if sender.route.accepts("critical", None, None)]
            alert = describe_burst(tasks, seconds, event.timestamp, runbook_url=self._runbook_url)
            self._send(senders, GroupKey("", "burst", ""), self._burst, lambda: alert, event.timestamp)

    def _senders_for(self, event: Problem) -> list[Sender]:
        run, level = event.run, severity(event)
        return [sender for sender in self._senders if sender.route.accepts(level, run.info.owner, run.task)]

    def _send(
        self, senders: list[Sender], key: GroupKey, count: int, describe: Callable[[], Alert], timestamp: float
    ) -> None:
        @functools.cache
        def once() -> Alert:
            alert, name = describe(), None if self._service is None else self._service()
            return alert if name is None else replace(alert, service=name)

        for sender in senders:
            sender.add(key, count, once, timestamp)


def check_base_url(name: str, value: object) -> None:
    """Require an HTTP URL or None. Raises TypeError or ValueError, which name the value."""
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name} must be a URL or None, got {value!r}")
    if isinstance(value, str) and not value.startswith(("https://", "http://")):
        raise ValueError(f"{name} must begin with https:// or http://, got {value!r}")


def check_trace_url(name: str, value: object) -> None:
    """Require an HTTP URL with the placeholder `{trace_id}`, or None, likewise."""
    check_base_url(name, value)
    if value is not None and "{trace_id}" not in str(value):
        raise ValueError(
            f"{name} must contain {{trace_id}}, such as https://tempo.example.org/trace/{{trace_id}}, got {value!r}"
        )
