"""Which messages a channel gets, and when: merged by kind, spaced, rate-limited, and no run is lost from the count."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime

from hypothesis import given, settings
from hypothesis import strategies as st

from aftertask.alerts import Alert
from aftertask.alerts._groups import COOL_DOWN, KINDS, Groups, Key, Message, Pace

PACE = Pace(settle=0.2, repeat_after=300, repeat_max=3600, quiet=300)


def key(task: str = "mail", fingerprint: str = "f") -> Key:
    return task, "failed", fingerprint


def alert(task: str = "mail", severity: str = "warning", at: float = 0.0) -> Alert:
    seen = datetime.fromtimestamp(at, UTC)
    return Alert(id="", kind="failed", severity=severity, task=task, first_seen=seen, last_seen=seen)  # type: ignore[arg-type]  # one of them


def groups(rate: int = 10, per: float = 300) -> Groups:
    return Groups(PACE, rate, per)


def add(to: Groups, now: float, task: str = "mail", fingerprint: str = "f") -> bool:
    which = key(task, fingerprint)
    return to.add(which, alert(task, at=now) if to.wants_text(which) else None, now, now)


def take(of: Groups, now: float) -> Message:
    message = of.take(now)
    assert message is not None
    of.sent(message)
    return message


def test_the_first_of_a_kind_is_told_at_once_and_the_rest_together() -> None:
    """After a fifth of a second the first; then one message with the others after 5 minutes, then 10, and so on."""
    to = groups()
    assert add(to, 0)
    assert to.take(0.1) is None
    assert to.pause(0.1) is not None and abs(to.pause(0.1) - 0.1) < 1e-9  # type: ignore[operator]  # not None
    assert take(to, 0.2).alert.count == 1
    told = []
    for second in range(1, 20_000):
        add(to, float(second))
        if (message := to.take(float(second))) is not None:
            to.sent(message)
            told.append((second, message.alert.count))
    assert [when for when, _ in told] == [301, 901, 2101, 4501, 8101, 11701, 15301, 18901]
    assert sum(count for _, count in told) == 18_901
    last = told[-1]
    assert last[1] == 3600


def test_another_fingerprint_is_another_kind() -> None:
    """A new failure of a failing task is told at once."""
    to = groups()
    add(to, 0)
    take(to, 1)
    add(to, 2, fingerprint="other")
    assert take(to, 3).alert.count == 1


def test_over_its_rate_a_channel_gets_one_message_with_the_number_of_the_others() -> None:
    """Ten messages, and then one for the other forty, which says how many it stands for."""
    to = groups(rate=10, per=300)
    for number in range(50):
        add(to, 0, task=f"task{number}")
    for _ in range(10):
        assert take(to, 1).alert.suppressed is None
    assert to.take(1) is None
    pause = to.pause(1)
    assert pause is not None and abs(pause - 30) < 1.1
    last = take(to, 1 + pause + 0.001)
    assert last.alert.suppressed is not None
    assert (last.alert.suppressed.alerts, last.alert.suppressed.runs) == (39, 39)
    assert len(last.alert.suppressed.tasks) == 10
    assert to.waiting == 0
    assert to.take(100) is None


def test_the_most_severe_is_told_first() -> None:
    """Where there are several, the critical one is told in full."""
    to = groups()
    to.add(key("a"), alert("a", "info"), 0, 0)
    to.add(key("b"), alert("b", "critical"), 0, 0)
    assert take(to, 1).alert.task == "b"


def test_what_could_not_be_delivered_is_kept_and_told_with_what_came_since() -> None:
    """A minute later, under a new id, since it says something else."""
    to = groups()
    add(to, 0)
    message = to.take(1)
    assert message is not None
    to.failed(message, 2)
    add(to, 3)
    add(to, 4)
    assert to.take(1 + COOL_DOWN) is None
    later = take(to, 2 + COOL_DOWN)
    assert later.alert.count == 3
    assert later.alert.first_seen.timestamp() == 0
    assert later.alert.last_seen.timestamp() == 4
    assert later.alert.id != message.alert.id


def test_a_receiver_that_asks_to_be_left_alone_is_left_alone() -> None:
    """`Retry-After` wins where it is longer."""
    to = groups()
    add(to, 0)
    message = to.take(1)
    assert message is not None
    to.failed(message, 1, retry_after=500)
    assert to.take(500) is None
    assert to.take(501) is not None


def test_a_task_works_again_after_a_success_and_five_quiet_minutes() -> None:
    """One message that counts the whole episode; the next failure is a first one again."""
    to = groups()
    add(to, 0)
    take(to, 1)
    add(to, 10)
    add(to, 20)
    to.succeeded("mail", 30)
    assert to.pause(30) is not None
    assert take(to, 301).alert.count == 2
    message = take(to, 320.5)
    assert (message.alert.kind, message.alert.count, message.alert.task) == ("resolved", 3, "mail")
    assert message.alert.last_seen.timestamp() == 20
    assert to.take(10_000) is None
    assert to.pause(10_000) is None
    add(to, 10_001)
    assert take(to, 10_002).alert.kind == "failed"


def test_without_a_success_nothing_works_again() -> None:
    """Silence is no recovery."""
    to = groups()
    add(to, 0)
    take(to, 1)
    assert to.take(100_000) is None


def test_what_was_only_slow_is_not_told_to_work_again() -> None:
    """Nothing was broken."""
    to = groups()
    to.add(("mail", "slow", "s"), replace(alert(), kind="slow"), 0, 0)
    take(to, 1)
    to.succeeded("mail", 2)
    assert to.pause(3) is None
    assert to.take(10_000) is None


def test_what_comes_back_after_a_long_time_is_news_again() -> None:
    """An hour after the last one, though none has succeeded since: at once, and the next ones after five minutes."""
    to = groups()
    for now in (0, 301, 902):
        add(to, now)
        take(to, now + 1)
    add(to, 10_000)
    take(to, 10_001)
    add(to, 10_002)
    assert to.take(10_300) is None
    assert take(to, 10_302).alert.count == 1


def test_a_success_before_the_message_is_out_counts() -> None:
    """A quick success after the first failure is not forgotten."""
    to = groups()
    add(to, 0)
    to.succeeded("mail", 0.1)
    take(to, 1)
    assert take(to, 301).alert.kind == "resolved"


def test_a_failure_takes_back_a_recovery_that_is_not_out_yet() -> None:
    """Nobody is told that a task works which does not."""
    to = groups()
    add(to, 0)
    take(to, 1)
    to.succeeded("mail", 2)
    message = to.take(400)
    assert message is not None and message.alert.kind == "resolved"
    add(to, 401)
    to.failed(message, 402)
    kinds = []
    for now in (600, 601, 602):
        if (told := to.take(now)) is not None:
            to.sent(told)
            kinds.append(told.alert.kind)
    assert kinds == ["failed"]


def test_skipped_siblings_are_told_with_their_cause() -> None:
    """One message for a failure and what it kept from running."""
    to = groups()
    add(to, 0)
    assert to.add_not_run(key(), "charge")
    assert to.add_not_run(key(), "charge")
    message = take(to, 1)
    assert message.alert.not_run == {"charge": 2}
    assert message.told == 3
    assert not to.add_not_run(key(), "charge"), "it is out already, so the skipped run has to be told by itself"


def test_kinds_are_bounded_and_still_counted() -> None:
    """Ten thousand kinds take the room of a thousand; the others are one kind."""
    to = groups()
    for number in range(10_000):
        add(to, 0, task=f"task{number}")
    assert to.waiting <= KINDS + 1
    message = to.take(1, closing=True)
    total = 0
    while message is not None:
        to.sent(message)
        total += message.told + message.left_out
        message = to.take(1, closing=True)
    assert total == 10_000


def test_old_kinds_make_room() -> None:
    """What was told long ago and is quiet is forgotten, so that new kinds are told apart."""
    to = groups(rate=100_000)
    for number in range(KINDS):
        add(to, 0, task=f"task{number}")
        take(to, 1)
    add(to, 10_000, task="new")
    assert take(to, 10_001).alert.task == "new"


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["fail", "fail", "fail", "succeed", "deliver", "break", "skip"]),
        st.integers(0, 3),
        st.floats(0, 400),
    ),
    max_size=60,
)


@given(STEPS, st.integers(1, 3))
@settings(max_examples=300, deadline=None)
def test_no_run_is_lost_from_the_count(steps: list[tuple[str, int, float]], rate: int) -> None:
    """Whatever fails, is skipped, recovers or cannot be delivered: in the end every bad run has been told once."""
    to, now, bad, told = groups(rate=rate), 0.0, 0, 0
    recovered: Counter[str] = Counter()

    def delivered(message: Message) -> int:
        to.sent(message)
        for part, what in message.parts:
            recovered[part[0]] += what.kind == "resolved"
        return sum(what.count + sum(what.not_run.values()) for _, what in message.parts if what.kind != "resolved")

    for step, number, passed in steps:
        now += passed
        task = f"task{number}"
        if step == "fail":
            add(to, now, task)
            bad += 1
        elif step == "skip":
            bad += to.add_not_run(key(task), "other")
        elif step == "succeed":
            to.succeeded(task, now)
        elif (message := to.take(now)) is not None:
            if step == "break":
                to.failed(message, now)
            else:
                told += delivered(message)
        elif step == "deliver":
            pause = to.pause(now)
            assert pause is None or pause > 0, "its thread would spin"
    while (message := to.take(now, closing=True)) is not None:
        told += delivered(message)
    assert told == bad
    assert to.waiting == 0
    assert to.drop() == 0
