"""
What one channel has yet to send: runs merged into groups, spaced, and rate limited.

State and decisions only: the caller holds the lock and passes `now`, in monotonic seconds.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import NamedTuple

from ..policies import SEVERITIES
from .alert import Alert, Kind, Suppressed, new_id

#: At most this many groups are pending; further ones are merged by kind under the task `__other__`.
MAX_GROUPS = 1000
OTHER = "__other__"

#: Kinds whose alerts do not stand for runs, and kinds after which a task needs no `resolved`.
_WITHOUT_RUNS = ("burst", "resolved", "test")
_NEVER_RESOLVED = (*_WITHOUT_RUNS, "slow", "cut_off")


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
    An alert to deliver, and the groups it covers: the first in full, those held back as a number.

    Attributes:
        repeats: Repetitions that `resolved` replaces: they were not due when the task worked again.
    """

    alert: Alert
    parts: list[tuple[GroupKey, Alert]]
    repeats: list[tuple[GroupKey, Alert]]

    @property
    def runs(self) -> int:
        """Number of runs covered in full, those of repetitions included; 1 for an alert that stands for none."""
        return _weight(self.parts[0][1]) + sum(_weight(alert) for _, alert in self.repeats)

    @property
    def runs_held_back(self) -> int:
        """Number of runs covered as a number."""
        return sum(_weight(alert) for _, alert in self.parts[1:])


@dataclass(slots=True)
class _Pending:
    """The alert about a group's first run that no message covers yet, and what it counts."""

    first: Alert
    due_s: float
    count: int = 0
    last_seen: float = 0.0
    not_run: Counter[str] = field(default_factory=Counter)
    repeats: list[tuple[GroupKey, Alert]] = field(default_factory=list)

    @property
    def rank(self) -> tuple[int, datetime]:
        """The most severe first, then the oldest."""
        return -SEVERITIES.index(self.first.severity), self.first.first_seen

    def alert(self) -> Alert:
        """The alert with its counts, as a new message."""
        last_seen = datetime.fromtimestamp(self.last_seen, UTC)
        return replace(self.first, id=new_id(), count=self.count, last_seen=last_seen, not_run=dict(self.not_run))


@dataclass(slots=True)
class _Episode:
    """The bad runs of one task until it works again; `alert` is the first that was sent."""

    since: datetime
    alert: Alert | None = None
    count: int = 0
    last_s: float = 0.0
    last_seen: float = 0.0
    succeeded_s: float = -math.inf


class AlertQueue:
    """The groups of one channel, which takes at most `rate` messages in `per` seconds."""

    def __init__(self, timing: Timing, rate: int, per: float) -> None:
        self._timing, self._rate, self._per = timing, rate, per
        self._pending: dict[GroupKey, _Pending] = {}
        # When a group's last message was taken, and the wait until the next; oldest first.
        self._sent: dict[GroupKey, tuple[float, float]] = {}
        self._episodes: dict[str, _Episode] = {}
        self._delivered: deque[float] = deque(maxlen=rate)
        self._blocked_until = -math.inf
        self._cool_down = timing.cool_down

    def __len__(self) -> int:
        return len(self._pending)

    def add(self, key: GroupKey, count: int, describe: Callable[[], Alert], now: float, timestamp: float) -> bool:
        """Count runs, the last of which ended at `timestamp`; return whether `describe` made a new pending alert."""
        bounded = self._within_bounds(key)
        new = bounded not in self._pending
        if new:
            alert = describe()
            if bounded != key:
                note = f"one of more than {MAX_GROUPS} groups of failures: {alert.task}: {alert.message}"
                alert = replace(alert, task=OTHER, fingerprint="", message=note)
            self._begin(bounded, alert, now)
        pending = self._pending[bounded]
        pending.count += count
        pending.last_seen = timestamp
        if key.kind not in _NEVER_RESOLVED:
            episode = self._episodes.setdefault(bounded.task, _Episode(pending.first.first_seen))
            episode.count += count
            episode.last_s, episode.last_seen = now, timestamp
        return new

    def _begin(self, key: GroupKey, alert: Alert, now: float) -> None:
        sent_s, wait = self._sent.get(key, (-math.inf, 0.0))
        if now - sent_s > self._timing.repeat_max:  # nothing since: it is news again
            self._sent.pop(key, None)
        self._pending[key] = _Pending(alert, max(now + self._timing.group_wait, sent_s + wait))
        untrue = self._pending.pop(_resolved(key.task), None)
        for repeat in () if untrue is None else untrue.repeats:
            self._return(*repeat, now)

    def add_not_run(self, cause: GroupKey, task: str) -> bool:
        """Attach a run that did not start to the pending alert about its cause; False if there is none."""
        pending = self._pending.get(self._within_bounds(cause))
        if pending is None:
            return False
        pending.not_run[task] += 1
        return True

    def succeeded(self, task: str, now: float) -> None:
        """Note that a run of a failing task succeeded."""
        if task in self._episodes:
            self._episodes[task].succeeded_s = now

    def has_alerted(self, task: str) -> bool:
        """Whether an alert about this task was sent or is pending."""
        episode = self._episodes.get(task)
        return (episode is not None and episode.alert is not None) or task in self._busy()

    def take(self, now: float, *, closing: bool = False) -> Message | None:
        """The next message; None if none is due. If `closing`, every group is due, and the rate limit only merges."""
        if now < self._blocked_until and not closing:
            return None
        for task, at in self._resolving().items():
            if at <= now:
                self._resolve(task, now)
        due = [key for key, pending in self._pending.items() if closing or pending.due_s <= now]
        free = self._rate - sum(at + self._per > now for at in self._delivered)
        if not due or not (free or closing):
            return None
        due.sort(key=lambda key: self._pending[key].rank)
        # The last message that the rate limit admits covers every group.
        return self._message(due[:1] if free > 1 else due, now)

    def pause(self, now: float) -> float | None:
        """Seconds until `take` may return a message; None: not before the next `add` or `succeeded`."""
        times = [pending.due_s for pending in self._pending.values()] + list(self._resolving().values())
        if not times:
            return None
        full = len(self._delivered) == self._rate
        free_s = self._delivered[0] + self._per if full else -math.inf
        return max(0.0, max(min(times), self._blocked_until, free_s) - now)

    def sent(self, message: Message, now: float) -> None:
        """Note that a message was delivered."""
        self._delivered.append(now)
        self._cool_down = self._timing.cool_down
        for key, alert in message.parts:
            episode = self._episodes.get(key.task)
            if episode is not None and episode.alert is None and key.kind not in _NEVER_RESOLVED:
                episode.alert = alert

    def failed(self, message: Message, now: float, retry_after: float | None = None) -> None:
        """Return a message that could not be delivered; nothing is due before a pause of at least `retry_after`."""
        self._blocked_until = now + max(self._cool_down, retry_after or 0.0)
        self._cool_down = min(2 * self._cool_down, self._timing.cool_down_max)
        for key, alert in message.parts:
            repeats = [each for each in message.repeats if key.kind == "resolved" and each[0].task == key.task]
            if key.kind == "resolved" and key.task in self._busy():
                for repeat in repeats:
                    self._return(*repeat, now)
                continue  # it is no longer true
            self._return(key, alert, now)
            self._pending[key].repeats = repeats

    def _return(self, key: GroupKey, alert: Alert, now: float) -> None:
        newer = self._pending.get(key)
        pending = self._pending[key] = _Pending(alert, now, alert.count, alert.last_seen.timestamp())
        pending.not_run.update(alert.not_run)
        if newer is not None:
            pending.count += newer.count
            pending.last_seen = newer.last_seen
            pending.not_run.update(newer.not_run)

    def clear(self) -> int:
        """Drop everything; the number of runs, and of alerts that do not stand for runs, that were pending."""
        pending = self._pending.values()
        dropped = sum(_weight(each.alert()) + sum(_weight(alert) for _, alert in each.repeats) for each in pending)
        self._pending.clear()
        self._sent.clear()
        self._episodes.clear()
        return dropped

    def _busy(self) -> set[str]:
        """The tasks with a pending alert."""
        return {key.task for key in self._pending}

    def _within_bounds(self, key: GroupKey) -> GroupKey:
        """The key itself, or that of the group of all others if too many are pending."""
        full = key not in self._pending and len(self._pending) >= MAX_GROUPS
        return GroupKey(OTHER, key.kind, OTHER) if full else key

    def _message(self, keys: list[GroupKey], now: float) -> Message:
        parts, repeats = [], []
        for key in keys:
            pending = self._pending.pop(key)
            parts.append((key, self._with_episode(key, pending.alert())))
            repeats += pending.repeats
            _, wait = self._sent.pop(key, (0.0, self._timing.repeat_after / 2))
            self._sent[key] = now, min(2 * wait, self._timing.repeat_max)
        while len(self._sent) > MAX_GROUPS:
            del self._sent[next(iter(self._sent))]
        (_, alert), *others = parts
        if others:
            tasks: Counter[str] = Counter()
            for key, other in others:
                tasks[key.task or key.kind] += other.count
            alert = replace(alert, suppressed=Suppressed(len(others), tasks.total(), dict(tasks.most_common(10))))
        return Message(alert, parts, repeats)

    def _with_episode(self, key: GroupKey, alert: Alert) -> Alert:
        """The alert with the beginning and the size of the episode that it is a part of."""
        episode = None if key.kind in _NEVER_RESOLVED else self._episodes.get(key.task)
        return alert if episode is None else replace(alert, since=episode.since, total=episode.count)

    def _resolving(self) -> dict[str, float]:
        """The tasks that have succeeded since their last bad run, and when each is resolved."""
        # A repetition that is not due waits for minutes, up to an hour: it does not hold up the good news.
        busy = {key.task for key in self._pending if key not in self._sent}
        return {
            task: episode.last_s + self._timing.resolve_after
            for task, episode in self._episodes.items()
            if episode.alert is not None and episode.succeeded_s >= episode.last_s and task not in busy
        }

    def _resolve(self, task: str, now: float) -> None:
        """End a task's episode by a `resolved` alert; its next failure is a first one again."""
        episode = self._episodes.pop(task)
        first = episode.alert
        assert first is not None  # or it would not be resolving
        repeated = [key for key in self._pending if key.task == task and key.kind not in _NEVER_RESOLVED]
        repeats = [(key, self._pending.pop(key).alert()) for key in repeated]
        self._sent = {key: sent for key, sent in self._sent.items() if key.task != task}
        alert = replace(
            first, kind="resolved", fingerprint="", error_type=None, message="", hint=None, reason=None, stack=None
        )
        self._pending[_resolved(task)] = _Pending(alert, now, episode.count, episode.last_seen, repeats=repeats)


def _resolved(task: str) -> GroupKey:
    return GroupKey(task, "resolved", "")


def _weight(alert: Alert) -> int:
    return 1 if alert.kind in _WITHOUT_RUNS else alert.count + sum(alert.not_run.values())
