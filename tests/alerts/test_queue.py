"""Which messages a channel gets, and when: merged into groups, spaced, rate limited, and no run lost from the count."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aftertask.alerts import Alert
from aftertask.alerts.queue import MAX_GROUPS, AlertQueue, GroupKey, Message, Timing

TIMING = Timing()


def key(task: str = "mail", fingerprint: str = "f") -> GroupKey:
    return GroupKey(task, "failed", fingerprint)


def alert(task: str = "mail", severity: str = "warning", at: float = 0.0) -> Alert:
    seen = datetime.fromtimestamp(at, UTC)
    return Alert(kind="failed", severity=severity, task=task, first_seen=seen, last_seen=seen)  # type: ignore[arg-type]  # one of them


def new_queue(rate: int = 10, per: float = 300) -> AlertQueue:
    return AlertQueue(TIMING, rate, per)


def add(queue: AlertQueue, now: float, task: str = "mail", fingerprint: str = "f") -> None:
    queue.add(key(task, fingerprint), 1, lambda: alert(task, at=now), now, now)


def deliver(queue: AlertQueue, now: float) -> Message:
    message = queue.take(now)
    assert message is not None
    queue.sent(message, now)
    return message


def test_the_first_run_of_a_group_is_sent_at_once_and_the_others_together() -> None:
    """The first is sent after 0.2 s, the others in one message after 5 minutes, then 10, and so on."""
    queue = new_queue()
    add(queue, 0)
    assert queue.take(0.1) is None
    assert queue.pause(0.1) == pytest.approx(0.1)
    assert deliver(queue, 0.2).alert.count == 1
    sent = []
    for second in range(1, 20_000):
        add(queue, float(second))
        message = queue.take(float(second))
        if message is not None:
            queue.sent(message, float(second))
            sent.append((second, message.alert.count))
    assert [when for when, _ in sent] == [301, 901, 2101, 4501, 8101, 11701, 15301, 18901]
    assert sum(count for _, count in sent) == 18_901
    assert sent[-1][1] == 3600


def test_another_fingerprint_is_another_group() -> None:
    """A new failure of a failing task is sent at once."""
    queue = new_queue()
    add(queue, 0)
    deliver(queue, 1)
    add(queue, 2, fingerprint="other")
    assert deliver(queue, 3).alert.count == 1


def test_the_last_message_that_the_rate_limit_admits_covers_every_group() -> None:
    """Of fifty groups nine get their own message, and the tenth summarises the others; then the channel pauses."""
    queue = new_queue(rate=10, per=300)
    for number in range(50):
        add(queue, 0, task=f"task{number}")
    for _ in range(9):
        assert deliver(queue, 1).alert.suppressed is None
    last = deliver(queue, 1).alert
    assert last.suppressed is not None
    assert (last.suppressed.alerts, last.suppressed.runs) == (40, 40)
    assert len(last.suppressed.tasks) == 10
    assert len(queue) == 0
    add(queue, 2, task="another")
    assert queue.take(3) is None
    assert queue.pause(3) == 298
    assert deliver(queue, 301).alert.task == "another"


def test_the_most_severe_alert_comes_first() -> None:
    """Of several groups that are due, the critical one is sent first."""
    queue = new_queue()
    queue.add(key("a"), 1, lambda: alert("a", "info"), 0, 0)
    queue.add(key("b"), 1, lambda: alert("b", "critical"), 0, 0)
    assert deliver(queue, 1).alert.task == "b"


def test_a_failed_message_is_kept_and_sent_with_what_came_since() -> None:
    """It is sent a minute later, under a new id, since its content differs."""
    queue = new_queue()
    add(queue, 0)
    message = queue.take(1)
    assert message is not None
    queue.failed(message, 2)
    add(queue, 3)
    add(queue, 4)
    assert queue.take(1 + TIMING.cool_down) is None
    later = deliver(queue, 2 + TIMING.cool_down)
    assert later.alert.count == 3
    assert later.alert.first_seen.timestamp() == 0
    assert later.alert.last_seen.timestamp() == 4
    assert later.alert.id != message.alert.id


def test_retry_after_extends_the_pause_after_a_failure() -> None:
    """A receiver that asks for a longer pause gets it."""
    queue = new_queue()
    add(queue, 0)
    message = queue.take(1)
    assert message is not None
    queue.failed(message, 1, retry_after=500)
    assert queue.take(500) is None
    assert queue.take(501) is not None


def test_a_task_is_resolved_by_a_success_and_five_minutes_without_a_bad_run() -> None:
    """One message counts the whole episode; the next failure is a first one again."""
    queue = new_queue()
    add(queue, 0)
    deliver(queue, 1)
    add(queue, 10)
    add(queue, 20)
    queue.succeeded("mail", 30)
    assert queue.pause(30) is not None
    again = deliver(queue, 301).alert
    assert (again.count, again.total, again.since) == (2, 3, datetime.fromtimestamp(0, UTC))
    resolved = deliver(queue, 320.5).alert
    assert (resolved.kind, resolved.count, resolved.task) == ("resolved", 3, "mail")
    assert resolved.last_seen.timestamp() == 20
    assert queue.take(10_000) is None
    assert queue.pause(10_000) is None
    add(queue, 10_001)
    assert deliver(queue, 10_002).alert.kind == "failed"


def test_a_repetition_does_not_hold_up_the_end_of_an_outage() -> None:
    """It would be due after twenty minutes; the task works again, and `resolved` covers the runs it had counted."""
    queue = new_queue()
    for now in (0, 301, 902):
        add(queue, now)
        deliver(queue, now + 1)
    add(queue, 910)
    add(queue, 920)
    queue.succeeded("mail", 921)
    assert queue.take(1219) is None
    message = deliver(queue, 1220)
    assert (message.alert.kind, message.alert.count, message.runs) == ("resolved", 5, 3)
    assert queue.pause(1221) is None


def test_a_resolution_that_a_failure_withdraws_returns_its_repetitions() -> None:
    """No run is lost from the count if the message could not be delivered."""
    queue = new_queue()
    add(queue, 0)
    deliver(queue, 1)
    add(queue, 2)
    queue.succeeded("mail", 3)
    resolved = queue.take(302)
    assert resolved is not None and resolved.alert.kind == "resolved"
    add(queue, 303)
    queue.failed(resolved, 304)
    assert deliver(queue, 400).alert.count == 2


def test_without_a_success_a_task_is_not_resolved() -> None:
    """The absence of runs is no recovery."""
    queue = new_queue()
    add(queue, 0)
    deliver(queue, 1)
    assert queue.take(100_000) is None


def test_a_task_that_was_only_slow_is_not_resolved() -> None:
    """It never failed."""
    queue = new_queue()
    queue.add(GroupKey("mail", "slow", "s"), 1, lambda: replace(alert(), kind="slow"), 0, 0)
    deliver(queue, 1)
    queue.succeeded("mail", 2)
    assert queue.pause(3) is None
    assert queue.take(10_000) is None


def test_a_failure_after_an_hour_without_one_is_sent_at_once() -> None:
    """Also if no run has succeeded since; its repetitions are due after five minutes again."""
    queue = new_queue()
    for now in (0, 301, 902):
        add(queue, now)
        deliver(queue, now + 1)
    add(queue, 10_000)
    deliver(queue, 10_001)
    add(queue, 10_002)
    assert queue.take(10_300) is None
    assert deliver(queue, 10_302).alert.count == 1


def test_a_success_before_the_message_is_sent_counts() -> None:
    """A quick success after the first failure resolves the task as well."""
    queue = new_queue()
    add(queue, 0)
    queue.succeeded("mail", 0.1)
    deliver(queue, 1)
    assert deliver(queue, 301).alert.kind == "resolved"


def test_a_failure_withdraws_a_resolution_that_was_not_delivered() -> None:
    """No message claims that a failing task works."""
    queue = new_queue()
    add(queue, 0)
    deliver(queue, 1)
    queue.succeeded("mail", 2)
    message = queue.take(400)
    assert message is not None and message.alert.kind == "resolved"
    add(queue, 401)
    queue.failed(message, 402)
    kinds = []
    for now in (600, 601, 602):
        message = queue.take(now)
        if message is not None:
            queue.sent(message, now)
            kinds.append(message.alert.kind)
    assert kinds == ["failed"]


def test_skipped_siblings_are_part_of_the_alert_about_their_cause() -> None:
    """One message covers a failure and the runs it prevented; afterwards a skipped run needs its own."""
    queue = new_queue()
    add(queue, 0)
    assert queue.add_not_run(key(), "charge")
    assert queue.add_not_run(key(), "charge")
    message = deliver(queue, 1)
    assert message.alert.not_run == {"charge": 2}
    assert message.runs == 3
    assert not queue.add_not_run(key(), "charge")


def test_groups_are_bounded_and_every_run_is_counted() -> None:
    """Three thousand groups take the room of a thousand; those beyond share one."""
    queue = new_queue()
    for number in range(3_000):
        add(queue, 0, task=f"task{number}")
    assert len(queue) <= MAX_GROUPS + 1
    total = 0
    while (message := queue.take(1, closing=True)) is not None:
        queue.sent(message, 1)
        total += message.runs + message.runs_held_back
    assert total == 3_000


def test_old_groups_make_room_for_new_ones() -> None:
    """A group whose last message is long ago is forgotten, so a new one is not merged with others."""
    queue = new_queue(rate=100_000)
    for number in range(MAX_GROUPS):
        add(queue, 0, task=f"task{number}")
        deliver(queue, 1)
    add(queue, 10_000, task="new")
    assert deliver(queue, 10_001).alert.task == "new"


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["fail", "fail", "fail", "succeed", "deliver", "break", "skip"]),
        st.integers(0, 3),
        st.floats(0, 400),
    ),
    max_size=60,
)


#: It works again, which cannot be delivered before it fails again.
FAILS_AGAIN = [("fail", 3, 0.0), ("deliver", 0, 1.0), ("fail", 3, 0.0), ("succeed", 3, 0.0), ("break", 0, 300.0)]


@given(STEPS, st.integers(1, 3))
@example([*FAILS_AGAIN, ("fail", 3, 0.0)], 1)
@settings(max_examples=200, deadline=None)
def test_every_bad_run_is_reported_exactly_once(steps: list[tuple[str, int, float]], rate: int) -> None:
    """In any order of failures, skipped runs, successes, deliveries and outages."""
    queue, now, bad, reported = new_queue(rate=rate), 0.0, 0, 0
    resolved: Counter[str] = Counter()

    def delivered(message: Message) -> int:
        queue.sent(message, now)
        for part, what in message.parts:
            resolved[part.task] += what.kind == "resolved"
        covered = [*message.parts, *message.repeats]
        return sum(what.count + sum(what.not_run.values()) for _, what in covered if what.kind != "resolved")

    for step, number, passed in steps:
        now += passed
        task = f"task{number}"
        if step == "fail":
            add(queue, now, task)
            bad += 1
        elif step == "skip":
            bad += queue.add_not_run(key(task), "other")
        elif step == "succeed":
            queue.succeeded(task, now)
        elif (message := queue.take(now)) is not None:
            if step == "break":
                queue.failed(message, now)
            else:
                reported += delivered(message)
        elif step == "deliver":
            pause = queue.pause(now)
            assert pause is None or pause > 0, "its thread would spin"
    while (message := queue.take(now, closing=True)) is not None:
        reported += delivered(message)
    assert reported == bad
    assert len(queue) == 0
    assert queue.clear() == 0
