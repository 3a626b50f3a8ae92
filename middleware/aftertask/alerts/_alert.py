"""What an alert says: the record that channels are given, and its text for people."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from typing import Any, Literal, TypeAlias

from ..events import OUTCOMES
from ..policies import Severity

Kind: TypeAlias = Literal[
    "failed",
    "timed_out",
    "skipped",
    "dropped",
    "rejected",
    "lost",
    "slow",
    "stuck",
    "burst",
    "resolved",
    "test",
]

#: A kind that is a sentence about the task needs other words than its own name.
_SAYS = {
    "timed_out": "timed out",
    "slow": "is slow",
    "stuck": "is stuck",
    "skipped": "was skipped",
    "dropped": "was dropped",
    "rejected": "was rejected",
    "lost": "was lost",
    "resolved": "works again",
}


@dataclass(frozen=True, slots=True)
class Suppressed:
    """
    What a channel was not told in messages of their own, since it had had its share.

    Attributes:
        alerts: How many messages were left out.
        runs: How many runs those would have told of.
        tasks: Task name to how many of these runs; the ten with the most.
    """

    alerts: int
    runs: int
    tasks: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """
    One message to a person: what happened to which task, how often since the last message, and where to look.

    Text that the app put into its exception has been redacted; there are no arguments, headers or raw paths.

    Attributes:
        id: The message's own id, the same however often its delivery is tried: a receiver may drop a second one.
        kind: How the run ended badly (`failed`, `timed_out`, `skipped`, `dropped`, `rejected`, `lost`), or `slow`,
            `stuck`, `burst` (many bad runs of the app at once), `resolved` (the task works again), `test`.
        severity: `info`, `warning` or `critical`.
        task: The task's name; None for a burst, which is the app's, and for a test.
        count: Runs of this kind since the last message about it; for `resolved`, all of the episode.
        fingerprint: Sixteen hex digits: the same for the same error class raised in the same function of the app.
        error_type: The exception's class; None where there was none.
        message: What the exception said, or why there was none; redacted.
        hint: What it comes from and what to do, in a sentence, where aftertask knows; else None.
        reason: Why a run was not started, as in `tasks_not_run_total`; else None.
        first_seen, last_seen: When this began and when it last happened, of those counted here; aware, UTC.
        owner: The task's owner.
        http_method, http_route, request_id, run_id, trace_id: Of the first run counted here, where they are known.
        trace_url: `Settings.trace_url` with that trace's id put in.
        runbook_url: The page that says what to do, below `Settings.runbook_url`.
        stack: The traceback of the first run counted here, redacted; or where a stuck one stood.
        not_run: Tasks that were skipped because of these failures, or dropped with these runs, and how often.
        service: `OTEL_SERVICE_NAME`, where it is set.
        host: The machine's name.
        pid: The process.
        suppressed: What this channel was not told since its last message; None where nothing was left out.
    """

    id: str
    kind: Kind
    severity: Severity
    task: str | None = None
    count: int = 1
    fingerprint: str = ""
    error_type: str | None = None
    message: str = ""
    hint: str | None = None
    reason: str | None = None
    first_seen: datetime = field(default_factory=lambda: datetime.now(UTC))
    last_seen: datetime = field(default_factory=lambda: datetime.now(UTC))
    owner: str | None = None
    http_method: str | None = None
    http_route: str | None = None
    request_id: str | None = None
    run_id: str | None = None
    trace_id: str | None = None
    trace_url: str | None = None
    runbook_url: str | None = None
    stack: str | None = None
    not_run: Mapping[str, int] = field(default_factory=dict)
    service: str | None = None
    host: str = ""
    pid: int = 0
    suppressed: Suppressed | None = None

    @property
    def outcome(self) -> str | None:
        """How the run ended; None where this is not about an end."""
        return self.kind if self.kind in OUTCOMES else None

    @property
    def title(self) -> str:
        """One line: `[critical] mail.receipt failed: shop.MailServerDown (3 times)`."""
        if self.kind == "test":
            return "[test] aftertask can reach you"
        if self.kind == "burst":
            return f"[{self.severity}] {self.message}"
        what = f"{self.task} {_SAYS.get(self.kind, self.kind)}"
        why = self.error_type or self.reason
        times = f" ({self.count} times)" if self.count > 1 and self.kind != "resolved" else ""
        return f"[{self.severity}] {what}{f': {why}' if why else ''}{times}"

    @property
    def text(self) -> str:
        """The whole message as plain text, the stack last."""
        lines = [self.message] if self.message and self.kind != "burst" else []
        lines.append(self._when())
        known = {
            "Hint": self.hint,
            "Service": self.service,
            "Owner": self.owner,
            "Route": f"{self.http_method or ''} {self.http_route}".strip() if self.http_route else None,
            "Request": self.request_id,
            "Run": self.run_id,
            "Trace": self.trace_url or self.trace_id,
            "Runbook": self.runbook_url,
            "Not run because of it" if self.error_type else "Not run either": counts(self.not_run),
            "Host": f"{self.host}, process {self.pid}" if self.host else None,
        }
        lines += [f"{key}: {value}" for key, value in known.items() if value]
        if self.suppressed is not None:
            left_out = self.suppressed
            lines.append(
                f"Left out since the last message: {left_out.alerts} alerts about {left_out.runs} runs "
                f"({counts(left_out.tasks)})"
            )
        if self.stack:
            lines += ["", self.stack.rstrip()]
        return "\n".join(lines)

    def _when(self) -> str:
        first, last = (f"{at:%Y-%m-%d %H:%M:%S} UTC" for at in (self.first_seen, self.last_seen))
        if self.kind == "resolved":
            return f"{_runs(self.count)} went wrong, from {first} to {last}; none since, and it has succeeded"
        return f"At {first}" if self.count == 1 else f"{_runs(self.count)}, from {first} to {last}"

    def as_dict(self) -> dict[str, Any]:
        """Every field as JSON has it, with `outcome`, `title` and `text`; times in ISO 8601."""
        told: dict[str, Any] = {item.name: getattr(self, item.name) for item in fields(self)}
        for name in ("first_seen", "last_seen"):
            told[name] = told[name].isoformat()
        left_out = self.suppressed
        told["not_run"] = dict(self.not_run)
        told["suppressed"] = left_out and {
            "alerts": left_out.alerts,
            "runs": left_out.runs,
            "tasks": dict(left_out.tasks),
        }
        return {**told, "outcome": self.outcome, "title": self.title, "text": self.text}

    def as_json(self) -> bytes:
        """The same as UTF-8."""
        return json.dumps(self.as_dict(), ensure_ascii=False).encode(errors="replace")


def _runs(count: int) -> str:
    return f"{count} run{'' if count == 1 else 's'}"


def counts(tasks: Mapping[str, int]) -> str:
    """Tasks and how often, for people."""
    return ", ".join(f"{task} ({count})" for task, count in tasks.items())
