"""The real timers: each called once, at its time and in its order, or taken back; and nothing is left of them."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aftertask import _timer

pytestmark = pytest.mark.anyio


class Loop:
    """An event loop's clock and timers, turned by hand."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timers: list[tuple[float, Callable[..., object], tuple[Any, ...]]] = []

    def time(self) -> float:
        """Seconds."""
        return self.now

    def call_at(self, at: float, function: Callable[..., object], *args: Any) -> None:
        """Call it then."""
        self.timers.append((at, function, args))

    def turn_to(self, now: float) -> None:
        """Let time pass, and call what is due in its order."""
        while due := sorted((timer for timer in self.timers if timer[0] <= now), key=lambda timer: timer[0]):
            self.timers.remove(due[0])
            self.now = max(self.now, due[0][0])
            due[0][1](*due[0][2])
        self.now = now


STEPS = st.lists(st.tuples(st.sampled_from(["set", "take back", "turn"]), st.integers(0, 9)), max_size=60)


@given(steps=STEPS)
@settings(max_examples=300, deadline=None)
def test_each_alarm_is_called_once_at_its_time_or_taken_back(steps: list[tuple[str, int]]) -> None:
    """In any order of events; and the loop has never more timers than alarms were set."""
    loop: Any = Loop()
    alarms, called, wanted = _timer._Alarms(), list[tuple[int, float]](), dict[int, float]()
    back: dict[int, Callable[[], object]] = {}
    for kind, number in steps:
        if kind == "set":
            key, at = len(back), loop.now + number
            back[key] = alarms.set(loop, at, lambda key=key: called.append((key, loop.now)))  # type: ignore[misc]  # a default
            wanted[key] = at
        elif kind == "take back" and number in back:
            back[number]()
            if number not in dict(called):
                wanted.pop(number, None)
        elif kind == "turn":
            loop.turn_to(loop.now + number)
        assert len(loop.timers) <= len(back)
    loop.turn_to(1e6)
    assert dict(called) == wanted
    assert len(called) == len(wanted)
    assert not loop.timers
    assert not alarms._set


async def test_on_a_real_loop(anyio_backend_name: str) -> None:
    """The shorter first, though set later; one that was taken back never; one may take back another of its time."""
    told: list[str] = []
    done = anyio.Event()
    _timer.real_call_later(0.02, lambda: told.append("long"))
    _timer.real_call_later(0.01, lambda: told.append("short"))
    _timer.real_call_later(0.015, lambda: told.append("never"))()
    _timer.real_call_later(0.03, done.set)
    with anyio.fail_after(5):
        await done.wait()
    assert told == ["short", "long"]


def test_a_loop_is_not_kept() -> None:
    """It may be closed with alarms that are not due for long."""
    gc.collect()
    before = len(_timer._alarms)

    async def main() -> None:
        _timer.real_call_later(3600, lambda: None)
        assert len(_timer._alarms) == before + 1

    asyncio.run(main())
    gc.collect()
    assert len(_timer._alarms) == before
