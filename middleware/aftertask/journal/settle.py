"""What happens to the runs of a dead worker: a pure decision."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

State: TypeAlias = Literal["scheduled", "accepted", "ready", "started"]
Action: TypeAlias = Literal["rerun", "dead_lettered", "lost"]

#: How often a run is started again after a worker died with it.
MAX_RECOVERIES = 3

#: Why a run is a dead letter, as people read it.
DEAD = {
    "failed": "it failed",
    "timed_out": "it timed out",
    "skipped": "an earlier run of its batch failed",
    "interrupted": "it was running when its worker ended; it may have finished",
    "unconfirmed": "its worker ended before the request did; the request may not have committed",
    "max_recoveries": "its worker died while running it again and again",
    "unknown_task": "no worker knows a task with this name",
    "arguments": "its arguments no longer fit the task's signature",
}


@dataclass(frozen=True, slots=True)
class Unsettled:
    """
    A run that has not ended, as its row says.

    Attributes:
        state: How far it has come: `accepted` is an intent whose request has not ended, `ready` may start.
        durable, idempotent: By its policy when it was scheduled.
        recoveries: How often it was started again after its worker had died with it.
    """

    id: str
    state: State
    durable: bool
    idempotent: bool
    recoveries: int


@dataclass(frozen=True, slots=True)
class Settled:
    """What becomes of it: for `rerun`, `run` is as it is from now on; `dead` is a key of `DEAD`, None without one."""

    run: Unsettled
    action: Action
    dead: str | None = None


def settle(run: Unsettled, *, max_recoveries: int = MAX_RECOVERIES) -> Settled:
    """Decide about an unsettled run of a worker that is gone."""
    if not run.durable:
        return Settled(run, "lost")
    if run.state == "ready":
        return Settled(run, "rerun")
    if run.state != "started":
        return Settled(run, "dead_lettered", "unconfirmed")
    if not run.idempotent:
        return Settled(run, "dead_lettered", "interrupted")
    if run.recoveries >= max_recoveries:
        return Settled(run, "dead_lettered", "max_recoveries")
    return Settled(replace(run, state="ready", recoveries=run.recoveries + 1), "rerun")
