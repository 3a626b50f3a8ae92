"""
What one channel has yet to tell: bad runs merged by kind, when they are due, and how many messages it may have.

No thread, no clock, no I/O: `now` is monotonic seconds, given by the caller, who also holds the lock.
"""

from __future__ import annotations

import math
import random
import uuid
from collections import Counter
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TypeAlias

from ..policies import SEVERITIES
from ._alert import Alert, Suppressed

#: Task, kind, fingerprint: runs with the same are one group.
Key: TypeAlias = tuple[str, str, str]

#: So many kinds are told apart; further ones are counted under the task `__other__`, so that memory is bounded.
KINDS = 1000
OTHER = "__other__"

#: Kinds that are not about so many runs; and those that do not say that a task does not work, so that it need not be
#: told when it does again.
_ABOUT_NO_RUNS = ("burst", "resolved", "test")
_NOT_RESOLVED = (*_ABOUT_NO_RUNS, "slow")

#: After how many seconds what could not be delivered is tried again: the first time, and at most.
COOL_DOWN, LONGEST_COOL_DOWN = 60.0, 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """
    How often a channel is told, in seconds.

    Attributes:
        settle: How long the first of a kind waits for what belongs to it, such as the siblings it caused to be skipped.
        repeat_after: How long after a message the same kind is told again; then twice that, and so on.
        repeat_max: How long at most.
        quiet: How long after its last bad run, and at least one success since, a task works again.
    """

    settle: float = 0.2
    repeat_after: float = 300.0
    repeat_max: float = 3600.0
    quiet: float = 300.0


@dataclass(slots=True)
class Message:
    """
    An alert that is to be delivered, and the groups that it tells of: they get it back where that fails.

    Attributes:
        alert: What is delivered.
        parts: The alert of each group; the first is told in full, the others as a number.
    """

    alert: Alert
    parts: list[tuple[Key, Alert]]

    @property
    def told(self) -> int:
        """What it tells of in full: runs, or one for what is not about runs."""
        return _weight(self.parts[0][1])

    @property
    def left_out(self) -> int:
        """The same of what it tells only as a number."""
        return sum(_weight(alert) for _, alert in self.parts[1:])


@dataclass(slots=True)
class _Group:
    """
    Runs of one kind.

    Attributes:
        repeat_s: How long after the last message they are told again.
        told_s, last_s: When they were told last, and when there was one last; monotonic.
        due_s: When what is pending is to be told.
        pending: The first of what has not been told; None where nothing is pending.
        count, total: Runs not told yet; and all of the episode.
        last: When there was one last, in seconds since the Unix epoch.
        not_run: Tasks that were skipped because of them.
    """

    repeat_s: float
    told_s: float | None = None
    last_s: float = 0.0
    due_s: float = 0.0
    pending: Alert | None = None
    count: int = 0
    total: int = 0
    last: float = 0.0
    not_run: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class _Episode:
    """A task of which it was told that it does not work."""

    alert: Alert
    keys: set[Key] = field(default_factory=set)


class Groups:
    """
    The groups of one channel.

    Args:
        pace: How often it is told.
        rate, per: At most so many messages in so many seconds.
    """

    def __init__(self, pace: Pace, rate: int, per: float) -> None:
        self._pace, self._rate, self._per = pace, rate, per
        self._groups: dict[Key, _Group] = {}
        self._pending: dict[Key, None] = {}
        self._episodes: dict[str, _Episode] = {}
        self._succeeded: dict[str, float] = {}
        self._tokens, self._refilled_s = float(rate), 0.0
        self._limited = False
        self._blocked_s = 0.0
        self._cool_down = COOL_DOWN

    @property
    def waiting(self) -> int:
        """Groups that have something to tell."""
        return len(self._pending)

    def wants_text(self, key: Key) -> bool:
        """Whether the next run of this kind begins a message, so that its text is needed."""
        group = self._groups.get(self._within_bounds(key))
        return group is None or group.pending is None

    def add(self, key: Key, alert: Alert | None, now: float, timestamp: float) -> bool:
        """
        A run of this kind; returns whether that makes something due that was not.

        Args:
            alert: What is told of it, with its count; may be None where `wants_text` is False.
            now: Monotonic seconds.
            timestamp: When, in seconds since the Unix epoch.
        """
        kind, key = key, self._within_bounds(key, now)
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = _Group(self._pace.repeat_after)
        if group.pending is None and now - group.last_s > self._pace.repeat_max:
            group.told_s, group.repeat_s = None, self._pace.repeat_after  # so long ago that it is news again
        count = 1 if alert is None else alert.count
        group.count += count
        group.total += count
        group.last, group.last_s = timestamp, now
        if group.pending is not None or alert is None:
            return False
        if key != kind:
            note = f"more than {KINDS} kinds of failure are waiting; this is one of the others"
            alert = replace(alert, task=OTHER, fingerprint="", message=f"{note}: {alert.task}: {alert.message}")
        self._put(key, alert, now + self._pace.settle if group.told_s is None else group.told_s + group.repeat_s)
        self._pending.pop(_resolved(key), None)  # it is not true any more
        return True

    def add_not_run(self, cause: Key, task: str) -> bool:
        """A run was skipped because of one of this kind; False where this channel is not about to tell of that kind."""
        group = self._groups.get(self._within_bounds(cause))
        if group is None or group.pending is None:
            return False
        group.not_run[task] += 1
        return True

    def succeeded(self, task: str, now: float) -> None:
        """A run of a task that did not work has succeeded."""
        if self._groups:
            self._succeeded[task] = now

    def knows(self, task: str) -> bool:
        """Whether something was, or is to be, told of this task."""
        return task in self._episodes or any(key[0] == task for key in self._pending)

    def take(self, now: float, *, closing: bool = False) -> Message | None:
        """
        The message that is to be delivered now; None where none is.

        Args:
            closing: Whether this is the last opportunity: then everything is due.
        """
        if now < self._blocked_s and not closing:
            return None
        self._refill(now)
        self._resolve(now)
        due = [key for key in self._pending if closing or self._groups[key].due_s <= now]
        if not due or (self._tokens < 1 and not closing):
            self._limited = bool(due)
            return None
        due.sort(key=self._rank)
        return self._message(due[:1] if self._tokens >= 1 and not self._limited else due, now)

    def pause(self, now: float) -> float | None:
        """Seconds until `take` may have something; None: not before the next `add` or `succeeded`."""
        times = [self._groups[key].due_s for key in self._pending]
        times += [max(at, now) for _, at in self._works_again()]
        if not times:
            return None
        at = max(min(times), self._blocked_s)
        if self._limited:
            at = max(at, self._refilled_s + (1 - self._tokens) * self._per / self._rate)
        return max(0.0, at - now)

    def sent(self, message: Message) -> None:
        """A message was delivered."""
        self._tokens = max(0.0, self._tokens - 1)
        self._limited = False
        self._cool_down = COOL_DOWN
        for key, alert in message.parts:
            if key[1] not in _NOT_RESOLVED and key in self._groups:
                self._episodes.setdefault(key[0], _Episode(alert)).keys.add(key)

    def failed(self, message: Message, now: float, retry_after: float | None = None) -> None:
        """A message could not be delivered: what it tells is kept, and told later, at the earliest after so long."""
        self._blocked_s = now + max(self._cool_down, retry_after or 0.0)
        self._cool_down = min(2 * self._cool_down, LONGEST_COOL_DOWN)
        for key, alert in message.parts:
            if key[1] == "resolved" and any(other[0] == key[0] for other in self._pending):
                continue  # meanwhile it is not true any more
            group = self._groups.setdefault(key, _Group(self._pace.repeat_after))
            if group.pending is None:
                group.last = max(group.last, alert.last_seen.timestamp())
            group.count += alert.count
            group.not_run += Counter(alert.not_run)
            self._put(key, alert, now)

    def drop(self) -> int:
        """Forget everything that has not been told; how many runs, or messages that are not about runs, that were."""
        dropped = sum(_weight(self._taken(key)) for key in list(self._pending))
        self._groups.clear()
        self._episodes.clear()
        self._succeeded.clear()
        return dropped

    def _within_bounds(self, key: Key, now: float | None = None) -> Key:
        """The key, or where there are too many, that of all others."""
        if key in self._groups or len(self._groups) < KINDS:
            return key
        if now is not None:
            self._forget(now)
        return key if len(self._groups) < KINDS else (OTHER, key[1], OTHER)

    def _put(self, key: Key, alert: Alert, due_s: float) -> None:
        group = self._groups[key]
        group.pending, group.due_s = alert, due_s
        self._pending[key] = None

    def _refill(self, now: float) -> None:
        self._tokens = min(float(self._rate), self._tokens + max(0.0, now - self._refilled_s) * self._rate / self._per)
        self._refilled_s = now

    def _rank(self, key: Key) -> tuple[int, datetime]:
        alert = self._groups[key].pending
        assert alert is not None  # or it would not be pending
        return -SEVERITIES.index(alert.severity), alert.first_seen

    def _message(self, keys: list[Key], now: float) -> Message:
        parts = []
        for key in keys:
            group = self._groups[key]
            if group.told_s is not None:
                group.repeat_s = min(2 * group.repeat_s, self._pace.repeat_max)
            group.told_s = now
            parts.append((key, self._taken(key)))
        alert, others = parts[0][1], [alert for _, alert in parts[1:]]
        if others:
            tasks: Counter[str] = Counter()
            for other in others:
                tasks[other.task or other.kind] += other.count
            left_out = Suppressed(len(others), tasks.total(), dict(tasks.most_common(10)))
            alert = replace(alert, suppressed=left_out)
        return Message(alert, parts)

    def _taken(self, key: Key) -> Alert:
        """What is pending, with its count; then nothing is."""
        group = self._groups[key]
        pending, count, not_run = group.pending, group.count, dict(group.not_run)
        assert pending is not None  # or it would not be pending
        del self._pending[key]
        group.pending, group.count, group.not_run = None, 0, Counter()
        if key[1] == "resolved":
            del self._groups[key]
        last = datetime.fromtimestamp(group.last, UTC)
        return replace(pending, id=message_id(), count=count, last_seen=last, not_run=not_run)

    def _works_again(self) -> list[tuple[str, float]]:
        """Tasks that have succeeded since their last bad run, and when that may be told."""
        busy = {key[0] for key in self._pending}
        found = []
        for task, episode in self._episodes.items():
            last_s = max(self._groups[key].last_s for key in episode.keys)
            if task not in busy and self._succeeded.get(task, -math.inf) >= last_s:
                found.append((task, last_s + self._pace.quiet))
        return found

    def _resolve(self, now: float) -> None:
        """Tasks that work again get a message that says so."""
        for task, at in self._works_again():
            if at <= now:
                episode = self._episodes.pop(task)
                del self._succeeded[task]
                groups = [self._groups.pop(key) for key in episode.keys]
                key = _resolved((task, "", ""))
                self._groups[key] = _Group(
                    self._pace.repeat_after,
                    count=sum(group.total for group in groups),
                    last=max(group.last for group in groups),
                )
                self._put(key, resolved(episode.alert), now)

    def _forget(self, now: float) -> None:
        """Make room: drop groups that have nothing to tell and were told longest ago, the oldest tenth."""
        idle = [(group.told_s or 0.0, key) for key, group in self._groups.items() if group.pending is None]
        for told_s, key in sorted(idle)[: KINDS // 10]:
            if now - told_s > self._pace.repeat_max:
                del self._groups[key]
                episode = self._episodes.get(key[0])
                if episode is not None:
                    episode.keys.discard(key)
                    if not episode.keys:
                        del self._episodes[key[0]]


def resolved(alert: Alert) -> Alert:
    """The alert that says that what this one told of is over."""
    return replace(
        alert,
        kind="resolved",
        fingerprint="",
        error_type=None,
        message="",
        hint=None,
        reason=None,
        stack=None,
        not_run={},
    )


def message_id() -> str:
    """An id of a message."""
    return f"alert_{uuid.UUID(int=_random.getrandbits(128), version=4).hex}"


# The system's: an app may seed the global generator, and workers that were forked must not give out the same ids.
_random = random.SystemRandom()


def _resolved(key: Key) -> Key:
    return key[0], "resolved", ""


def _weight(alert: Alert) -> int:
    return 1 if alert.kind in _ABOUT_NO_RUNS else alert.count + sum(alert.not_run.values())
