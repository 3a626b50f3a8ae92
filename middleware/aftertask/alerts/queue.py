"""
What one channel has yet to send: runs merged into groups, spaced, and rate limited.

State and decisions only: the caller holds the lock and passes `now`, in monotonic seconds.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import NamedTuple

from ..policies import SEVERITIES
from .alert import Alert, Kind, Suppressed, new_id

#: A channel has at most this many groups; further ones are merged by kind under the task `__other__`.
MAX_GROUPS = 1000
OTHER = "__other__"

#: Kinds whose alerts do not stand for runs, and kinds after which a task needs no `resolved`.
_WITHOUT_RUNS = ("burst", "resolved", "test")
_NEVER_RESOLVED = (*_WITHOUT_RUNS, "slow")


class GroupKey(NamedTuple):
    """What the runs of one group have in common."""

    task: str
    kind: Kind
    fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """
    When messages are due; all in seconds.

    Attributes:
        group_wait: How long the first run of a group waits for what belongs to it, such as the siblings it caused to be
            skipped.
        repeat_after, repeat_max: Time from a group's first message to its second, doubled for each further one; and
            its upper bound.
        resolve_after: Time without a bad run after which a task that has succeeded is resolved.
        cool_down, cool_down_max: Pause after a failed delivery, doubled for each further failure; and its upper bound.
    """

    group_wait: float = 0.2
    repeat_after: float = 300.0
    repeat_max: float = 3600.0
    resolve_after: float = 300.0
    cool_down: float = 60.0
    cool_down_max: float = 600.0


@dataclass(frozen=True, slots=True)
class Message:
    """
    A message to deliver.

    Attributes:
        alert: What is delivered.
        parts: The groups it covers, each with its alert: the first in full, the others, which the rate limit held back,
            as a number.
    """

    alert: Alert
    parts: list[tuple[GroupKey, Alert]]

    @property
    def runs(self) -> int:
        """Number of runs covered in full; 1 for an alert that does not stand for runs."""
        return _weight(self.parts[0][1])

    @property
    def runs_held_back(self) -> int:
        """Number of runs covered as a number."""
        return sum(_weight(alert) for _, alert in self.parts[1:])


@dataclass(slots=True)
class _Group:
    """Runs with the same key: the alert that is pending, when it is due, and what it counts."""

    repeat_s: float
    pending: Alert | None = None
    due_s: float = 0.0
    sent_s: float | None = None
    last_s: float = 0.0
    last_seen: float = 0.0
    count: int = 0
    not_run: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class _Episode:
    """The bad runs of one task until it works again; `alert` is the first that was sent."""

    alert: Alert | None = None
    count: int = 0
    last_s: float = 0.0
    last_seen: float = 0.0
    succeeded_s: float = -math.inf


class AlertQueue:
    """
    The groups of one channel.

    Args:
        timing: When messages are due.
        rate, per: At most `rate` messages in `per` seconds.
    """

    def __init__(self, timing: Timing, rate: int, per: float) -> None:
        self._timing, self._per = timing, per
        self._groups: dict[GroupKey, _Group] = {}
        self._episodes: dict[str, _Episode] = {}
        self._sent: deque[float] = deque(maxlen=rate)
        self._limited = False
        self._blocked_until = -math.inf
        self._cool_down = timing.cool_down

    def __len__(self) -> int:
        return len(self._pending())

    def join(self, key: GroupKey, count: int, now: float, timestamp: float) -> bool:
        """
        Count runs in a group with a pending alert; False if it has none, so that `add` needs one.

        Args:
            key: The group.
            count: Number of runs.
            now: Monotonic seconds.
            timestamp: When the last of them ended, in seconds since the Unix epoch.
        """
        key = self._within_bounds(key)
        group = self._groups.get(key)
        if group is None or group.pending is None:
            return False
        self._count(key, group, count, now, timestamp)
        return True

    def add(self, key: GroupKey, alert: Alert, now: float, timestamp: float) -> None:
        """Count the runs of this alert in its group, and make it pending unless another one is."""
        if self.join(key, alert.count, now, timestamp):
            return
        if self._within_bounds(key) != key:
            self._forget(now)
        bounded = self._within_bounds(key)
        if bounded != key:
            note = f"one of more than {MAX_GROUPS} groups of failures: {alert.task}: {alert.message}"
            key, alert = bounded, replace(alert, task=OTHER, fingerprint="", message=note)
        group = self._groups.setdefault(key, _Group(self._timing.repeat_after))
        if now - group.last_s > self._timing.repeat_max:  # so long ago that it is news again
            group.sent_s, group.repeat_s = None, self._timing.repeat_after
        self._count(key, group, alert.count, now, timestamp)
        group.pending = alert
        group.due_s = now + self._timing.group_wait if group.sent_s is None else group.sent_s + group.repeat_s
        self._groups.pop(_resolved(key.task), None)  # it is no longer true

    def add_not_run(self, cause: GroupKey, task: str) -> bool:
        """Attach a run that did not start to the pending alert about its cause; False if there is none."""
        group = self._groups.get(self._within_bounds(cause))
        if group is None or group.pending is None:
            return False
        group.not_run[task] += 1
        return True

    def succeeded(self, task: str, now: float) -> None:
        """Note that a run of a failing task succeeded."""
        if task in self._episodes:
            self._episodes[task].succeeded_s = now

    def has_alerted(self, task: str) -> bool:
        """Whether an alert about this task was sent or is pending."""
        episode = self._episodes.get(task)
        return (episode is not None and episode.alert is not None) or any(key.task == task for key in self._pending())

    def take(self, now: float, *, closing: bool = False) -> Message | None:
        """
        The next message to deliver; None if none is due.

        Args:
            closing: Whether the app ends: then every group is due, and the rate limit only merges.
        """
        if now < self._blocked_until and not closing:
            return None
        self._resolve(now)
        due = [key for key, group in self._pending().items() if closing or group.due_s <= now]
        free = now >= self._free_s()
        if not due or not (free or closing):
            self._limited = bool(due)
            return None
        due.sort(key=self._rank)
        # After a pause by the rate limit, one message covers all that came up meanwhile.
        return self._message(due[:1] if free and not self._limited else due, now)

    def pause(self, now: float) -> float | None:
        """Seconds until `take` may return a message; None: not before the next `add` or `succeeded`."""
        times = [group.due_s for group in self._pending().values()] + list(self._resolving().values())
        if not times:
            return None
        return max(0.0, max(min(times), self._blocked_until, self._free_s()) - now)

    def sent(self, message: Message, now: float) -> None:
        """Note that a message was delivered."""
        self._sent.append(now)
        self._limited = False
        self._cool_down = self._timing.cool_down
        for key, alert in message.parts:
            episode = self._episodes.get(key.task)
            if episode is not None and episode.alert is None and key.kind not in _NEVER_RESOLVED:
                episode.alert = alert

    def failed(self, message: Message, now: float, retry_after: float | None = None) -> None:
        """Return a message that could not be delivered; nothing is due before a pause of at least `retry_after`."""
        self._blocked_until = now + max(self._cool_down, retry_after or 0.0)
        self._cool_down = min(2 * self._cool_down, self._timing.cool_down_max)
        busy = {key.task for key in self._pending()}
        for key, alert in message.parts:
            if key.kind == "resolved" and key.task in busy:
                continue  # it is no longer true
            group = self._groups.setdefault(key, _Group(self._timing.repeat_after))
            if group.pending is None:
                group.last_seen = max(group.last_seen, alert.last_seen.timestamp())
            group.pending, group.due_s = alert, now
            group.count += alert.count
            group.not_run += Counter(alert.not_run)

    def clear(self) -> int:
        """Drop everything; the number of runs, and of alerts that do not stand for runs, that were pending."""
        dropped = sum(_weight(self._taken(key)) for key in self._pending())
        self._groups.clear()
        self._episodes.clear()
        return dropped

    def _pending(self) -> dict[GroupKey, _Group]:
        return {key: group for key, group in self._groups.items() if group.pending is not None}

    def _within_bounds(self, key: GroupKey) -> GroupKey:
        """The key itself, or that of the group of all others if there are too many."""
        full = key not in self._groups and len(self._groups) >= MAX_GROUPS
        return GroupKey(OTHER, key.kind, OTHER) if full else key

    def _forget(self, now: float) -> None:
        """Make room: drop the groups with nothing pending whose last message is long ago."""
        for key, group in list(self._groups.items()):
            if group.pending is None and now - (group.sent_s or 0.0) > self._timing.repeat_max:
                del self._groups[key]

    def _count(self, key: GroupKey, group: _Group, count: int, now: float, timestamp: float) -> None:
        group.count += count
        group.last_s, group.last_seen = now, timestamp
        if key.kind not in _NEVER_RESOLVED:
            episode = self._episodes.setdefault(key.task, _Episode())
            episode.count += count
            episode.last_s, episode.last_seen = now, timestamp

    def _free_s(self) -> float:
        """When the rate limit admits the next message; monotonic."""
        return self._sent[0] + self._per if len(self._sent) == self._sent.maxlen else -math.inf

    def _rank(self, key: GroupKey) -> tuple[int, datetime]:
        """The most severe first, then the oldest."""
        alert = self._groups[key].pending
        assert alert is not None  # its group is due
        return -SEVERITIES.index(alert.severity), alert.first_seen

    def _message(self, keys: list[GroupKey], now: float) -> Message:
        parts = []
        for key in keys:
            group = self._groups[key]
            if group.sent_s is not None:
                group.repeat_s = min(2 * group.repeat_s, self._timing.repeat_max)
            group.sent_s = now
            parts.append((key, self._taken(key)))
        (_, alert), *others = parts
        if others:
            tasks: Counter[str] = Counter()
            for key, other in others:
                tasks[key.task or key.kind] += other.count
            alert = replace(alert, suppressed=Suppressed(len(others), tasks.total(), dict(tasks.most_common(10))))
        return Message(alert, parts)

    def _taken(self, key: GroupKey) -> Alert:
        """The pending alert of a group, with its counts; afterwards nothing is pending."""
        group = self._groups[key]
        assert group.pending is not None  # the caller looked
        last_seen = datetime.fromtimestamp(group.last_seen, UTC)
        not_run = dict(group.not_run)
        alert = replace(group.pending, id=new_id(), count=group.count, last_seen=last_seen, not_run=not_run)
        group.pending, group.count, group.not_run = None, 0, Counter()
        if key.kind == "resolved":
            del self._groups[key]
        return alert

    def _resolving(self) -> dict[str, float]:
        """The tasks that have succeeded since their last bad run, and when each is resolved."""
        busy = {key.task for key in self._pending()}
        return {
            task: episode.last_s + self._timing.resolve_after
            for task, episode in self._episodes.items()
            if episode.alert is not None and episode.succeeded_s >= episode.last_s and task not in busy
        }

    def _resolve(self, now: float) -> None:
        """Replace the groups of each task that works again by a `resolved` alert."""
        for task, at in self._resolving().items():
            if at > now:
                continue
            episode = self._episodes.pop(task)
            first = episode.alert
            assert first is not None  # or it would not be resolving
            for key in [key for key in self._groups if key.task == task]:
                del self._groups[key]
            alert = replace(
                first, kind="resolved", fingerprint="", error_type=None, message="", hint=None, reason=None, stack=None
            )
            self._groups[_resolved(task)] = _Group(
                self._timing.repeat_after, alert, due_s=now, last_seen=episode.last_seen, count=episode.count
            )


def _resolved(task: str) -> GroupKey:
    return GroupKey(task, "resolved", "")


def _weight(alert: Alert) -> int:
    return 1 if alert.kind in _WITHOUT_RUNS else alert.count + sum(alert.not_run.values())
