"""`Alert`: what a person is sent, as fields and as text; and `Channel`: anything that delivers it."""

from __future__ import annotations

import json
import math
import os
import socket
import uuid
from collections.abc import Awaitable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

from ..errors import AftertaskError
from ..events import OUTCOMES, Note
from ..policies import Severity

Kind: TypeAlias = Literal[
    "failed",
    "timed_out",
    "skipped",
    "dropped",
    "rejected",
    "lost",
    "cut_off",
    "slow",
    "stuck",
    "burst",
    "resolved",
    "test",
]

#: What follows the task's name in a title, where that is not the kind itself.
_PREDICATES = {
    "timed_out": "timed out",
    "slow": "is slow",
    "stuck": "is stuck",
    "skipped": "was skipped",
    "dropped": "was dropped",
    "rejected": "was rejected",
    "lost": "was lost",
    "cut_off": "was cut off by a shutdown",
}


@dataclass(frozen=True, slots=True)
class Suppressed:
    """
    Alerts that a channel's rate limit held back.

    Attributes:
        alerts: Number of alerts held back.
        runs: Number of runs they are about.
        tasks: Task name to number of those runs; the ten tasks with the most.
    """

    alerts: int
    runs: int
    tasks: dict[str, int]


def new_id() -> str:
    """The id of a message."""
    return f"alert_{uuid.uuid4().hex}"


def _now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """
    One message to a person: what happened to which task, how often since the last message, and where to look.

    Text from exceptions is redacted; an alert holds no arguments, headers or raw paths.

    Attributes:
        id: Id of the message. Every attempt to deliver it carries the same id, so a receiver can drop duplicates.
        kind: How the run ended (`failed`, `timed_out`, `skipped`, `dropped`, `rejected`, `lost`, or `cut_off`: it had
            started, and a shutdown cancelled it), or `slow`, `stuck`, `burst` (many bad runs of the app at once),
            `resolved` (the task works again), `test`.
        severity: `info`, `warning` or `critical`.
        task: The task's name; None for a burst, which concerns the whole app, and for a test.
        count: Number of runs since the last message of this group; for `resolved`, of the whole episode.
        fingerprint: Sixteen hex digits, the same for the same class raised in the same function of the app.
        error_type: Class of the exception that failed the run or ended its request; None if there was none.
        message: The exception's text, redacted, or one sentence about what happened.
        hint: The likely cause and the remedy in one sentence; None if unknown.
        reason: Why the run never started, as in `tasks_not_run_total`; None if it started.
        first_seen, last_seen: When the first and the last of the counted runs ended; aware, UTC.
        since, total: When the task's current series of bad runs began, and how many this channel has counted since;
            None and 0 if the alert is about no such series.
        owner: The task's owner; None if not set.
        http_method, http_route, request_id, run_id, trace_id: Of the first counted run; None if unknown.
        notes: What `aftertask.note()` attached to the first counted run.
        trace_url: Link to that trace, built from `Settings.trace_url`; None without one.
        runbook_url: Link to the runbook, below `Settings.runbook_url`; None without one.
        stack: Traceback of the first counted run, or where a stuck run was; redacted. None if there is none.
        not_run: Tasks that did not run for the same cause: skipped after these failures, or dropped with these runs.
            Task name to number of runs.
        suppressed: What this channel's rate limit held back; None if nothing.
        service: `service.name` of OpenTelemetry's resource, else `OTEL_SERVICE_NAME`; None if neither is set.
        host: Name of the machine.
        pid: Id of the process.
    """

    id: str = field(default_factory=new_id)
    kind: Kind
    severity: Severity
    task: str | None = None
    count: int = 1
    fingerprint: str = ""
    error_type: str | None = None
    message: str = ""
    hint: str | None = None
    reason: str | None = None
    first_seen: datetime = field(default_factory=_now)
    last_seen: datetime = field(default_factory=_now)
    since: datetime | None = None
    total: int = 0
    owner: str | None = None
    http_method: str | None = None
    http_route: str | None = None
    request_id: str | None = None
    run_id: str | None = None
    trace_id: str | None = None
    notes: dict[str, Note] = field(default_factory=dict)
    trace_url: str | None = None
    runbook_url: str | None = None
    stack: str | None = None
    not_run: dict[str, int] = field(default_factory=dict)
    suppressed: Suppressed | None = None
    service: str | None = field(default_factory=lambda: os.environ.get("OTEL_SERVICE_NAME"))
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)

    @property
    def outcome(self) -> str | None:
        """How the run ended; None if the alert is not about the end of a run."""
        if self.kind == "cut_off":
            return "cancelled"
        return self.kind if self.kind in OUTCOMES else None

    @property
    def title(self) -> str:
        """One line, such as `[critical] mail.receipt failed: shop.MailServerDown (3 times)`."""
        if self.kind == "test":
            return "[test] aftertask can reach you"
        if self.kind == "resolved":
            return f"[resolved] {self.task} works again"
        if self.kind == "burst":
            return f"[{self.severity}] {self.message}"
        cause = self.reason or self.error_type
        text = f"[{self.severity}] {self.task} {_PREDICATES.get(self.kind, self.kind)}{f': {cause}' if cause else ''}"
        return f"{text} ({self.count} times)" if self.count > 1 else text

    @property
    def text(self) -> str:
        """The whole message as plain text, the stack last."""
        lines = [self.message] if self.message and self.kind != "burst" else []
        lines.append(self._when())
        details = {
            "Hint": self.hint,
            "Service": self.service,
            "Owner": self.owner,
            "Route": f"{self.http_method or ''} {self.http_route}".strip() if self.http_route else None,
            "Request": self.request_id,
            "Run": self.run_id,
            "Notes": ", ".join(f"{key}={value}" for key, value in self.notes.items()),
            "Trace": self.trace_url or self.trace_id,
            "Runbook": self.runbook_url,
            "Also not run" if self.reason else "Not run because of it": counts_text(self.not_run),
            "Host": f"{self.host}, process {self.pid}",
        }
        lines += [f"{label}: {value}" for label, value in details.items() if value]
        if self.suppressed is not None:
            held = self.suppressed
            runs = f"{_runs(held.runs)} ({counts_text(held.tasks)})"
            lines.append(f"Held back by the rate limit: {held.alerts} alerts about {runs}")
        if self.stack:
            lines += ["", self.stack.rstrip()]
        return "\n".join(lines)

    def _when(self) -> str:
        first, last = (f"{at:%Y-%m-%d %H:%M:%S} UTC" for at in (self.first_seen, self.last_seen))
        if self.kind == "resolved":
            return f"{_runs(self.count)} ended badly between {first} and {last}; the task has succeeded since"
        text = f"At {first}" if self.count == 1 else f"{_runs(self.count)} between {first} and {last}"
        if self.since is None or self.total <= self.count:
            return text
        return f"{text}; failing since {self.since:%Y-%m-%d %H:%M:%S} UTC, {_runs(self.total)} in all"

    def as_dict(self) -> dict[str, Any]:
        """Every field as JSON has it, with `outcome`, `title` and `text`; times in ISO 8601."""
        values = asdict(self)
        times = {name: at.isoformat() for name, at in values.items() if isinstance(at, datetime)}
        return {**values, **times, "outcome": self.outcome, "title": self.title, "text": self.text}

    def as_json(self) -> bytes:
        """`as_dict()` as JSON in UTF-8."""
        # A message may hold a lone surrogate, which UTF-8 cannot encode.
        return json.dumps(self.as_dict(), ensure_ascii=False).encode(errors="replace")


@runtime_checkable
class Channel(Protocol):
    """
    Takes an alert and delivers it: `Webhook`, `Apprise`, or any sync or async function. An exception means failure.

    Each call runs in a thread of its own, never on the app's event loop; an async channel gets an asyncio event loop
    for the duration of the call. A channel may raise `DeliveryFailed` to control when delivery is tried again.
    """

    def __call__(self, alert: Alert, /) -> Awaitable[None] | None: ...


class DeliveryFailed(AftertaskError):
    """
    An alert could not be delivered.

    Args:
        message: Why. It is logged, so it must not hold a secret.
        retry_after: Seconds after which the receiver wants the next attempt, at least 0; None if it did not ask.
        permanent: Whether an immediate retry is pointless, such as after a wrong address.

    Raises:
        ValueError: `retry_after` is negative or infinite.
    """

    __module__ = "aftertask.alerts"  # `error_type` is a public name

    def __init__(self, message: str, *, retry_after: float | None = None, permanent: bool = False) -> None:
        super().__init__(message)
        if retry_after is not None and not 0 <= retry_after < math.inf:
            raise ValueError(f"DeliveryFailed.retry_after must be at least 0 seconds, or None, got {retry_after!r}")
        self.retry_after = retry_after
        self.permanent = permanent


def counts_text(tasks: Mapping[str, int]) -> str:
    """Numbers of runs by task, such as `mail.receipt (3), orders.ship (1)`."""
    return ", ".join(f"{task} ({count})" for task, count in tasks.items())


def _runs(count: int) -> str:
    return f"{count} run{'' if count == 1 else 's'}"
