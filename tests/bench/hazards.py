"""
What looking for hazards costs.

    python tests/bench/hazards.py                # the figures and the gates; exit code 1 where a gate fails

1. A task that is scheduled with ordinary arguments: microseconds for the look at them, by the clock, in a loop; the
   best of several rounds.
2. Watching the event loop: processor time of a whole process that serves nothing for some seconds, with and without it
   by turns, as a share of one core, the median of several; beside it what a thread costs that sleeps as often, and does
   nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
import threading
import time
import uuid
from contextvars import copy_context
from datetime import UTC, datetime
from typing import Any

import uvicorn
from starlette.background import BackgroundTask

from aftertask import Settings
from aftertask._exchange import Exchange
from aftertask._runner import Engine
from aftertask.events import Scheduled, TaskRun
from aftertask.hazards._arguments import Arguments

#: Microseconds a task, once its arguments' classes are known.
LOOK_GATE = 1.0

#: Share of one core.
WATCH_GATE = 0.001

SECONDS, TIMES = 8, 3


class Order:
    """An object of the app's own."""


ARGUMENTS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "none": ((), {}),
    "two": (("someone@example.org", 7), {}),
    "six": (("a", 1, 2.5, None, True, uuid.uuid4()), {}),
    "keywords": (("a",), {"number": 1, "at": datetime.now(UTC)}),
    "an object": ((Order(),), {}),
    "a list of ten": ((list(range(10)),), {}),
    "a dict": (({"id": 1, "name": "a", "tags": "b"},), {}),
}


async def task(*args: Any, **kwargs: Any) -> None:
    """Any task."""


def a_request(engine: Engine) -> Exchange:
    """A request that nobody serves."""
    return Exchange([None, Exchange, engine, copy_context(), None])


def look(args: tuple[Any, ...], kwargs: dict[str, Any], rounds: int = 7, times: int = 20_000) -> float:
    """Microseconds for one look."""
    arguments = Arguments(lambda *told: None)
    engine = Engine(Settings(), [])
    exchange = a_request(engine)
    exchange.scope = {"type": "http", "route": None, "fastapi_inner_astack": None}
    target = BackgroundTask(task, *args, **kwargs)
    run = TaskRun(engine.plan(target), exchange, target)
    event = Scheduled(run, run.timestamp)
    arguments.look(event)
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(times):
            arguments.look(event)
        best = min(best, time.perf_counter() - start)
    return best / times * 1e6


def idle(loop: str, watched: str, runs: bool, seconds: float) -> float:
    """
    Processor seconds of a process whose event loop does nothing for so long.

    Args:
        loop: `asyncio` or `uvloop`; or `uvicorn`, whose server wakes asyncio's loop ten times a second.
        watched: `yes`, `no`, or `sleep`: a thread that only sleeps, as often as the one that watches.
        runs: Whether a run waits.
        seconds: For how long.
    """
    done = subprocess.run(
        [sys.executable, __file__, "--idle", loop, watched, str(int(runs)), str(seconds)],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout)


def share(loop: str, watched: str, runs: bool, seconds: float) -> float:
    """How much more of a core such a process takes than one that nobody watches: the median of some, by turns."""
    more = (idle(loop, watched, runs, seconds) - idle(loop, "no", runs, seconds) for _ in range(TIMES))
    return statistics.median(more) / seconds


def _idle_here(loop: str, watched: str, runs: bool, seconds: float) -> None:
    from aftertask.hazards import Hazards, _loop
    from aftertask.signals import Metrics

    async def main() -> None:
        if watched == "sleep":
            threading.Thread(target=_sleep, args=(Settings().block_threshold * _loop.SHARE,), daemon=True).start()
        if watched == "yes":
            hazards = Hazards(Settings().block_threshold)
            hazards.attach(Engine(Settings(), [Metrics()]))
            hazards.open()
        if runs:
            engine = Engine(Settings(), [])
            engine.schedule(a_request(engine), BackgroundTask(task))
        if loop == "uvicorn":
            server = uvicorn.Server(uvicorn.Config(_answers, port=0, log_level="error", lifespan="off", loop="asyncio"))
            serving = asyncio.create_task(server.serve())
        await asyncio.sleep(0.5)  # what starting costs is not counted
        before = time.process_time()
        await asyncio.sleep(seconds)
        print(time.process_time() - before)
        if loop == "uvicorn":
            server.should_exit = True
            await serving

    if loop == "uvloop":
        import uvloop

        uvloop.run(main())
    else:
        asyncio.run(main())


async def _answers(scope: Any, receive: Any, send: Any) -> None:
    """An app that nobody asks."""


def _sleep(seconds: float) -> None:
    while True:
        time.sleep(seconds)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="how long a process is idle")
    parser.add_argument("--idle", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.idle:
        loop, watched, runs, seconds = options.idle
        _idle_here(loop, watched, runs == "1", float(seconds))
        return 0
    fine = True
    print("look at a scheduled task's arguments, µs")
    for name, (args, kwargs) in ARGUMENTS.items():
        cost = look(args, kwargs)
        fine = fine and cost <= LOOK_GATE
        print(f"  {name:15} {cost:6.2f}   {'ok' if cost <= LOOK_GATE else f'OVER {LOOK_GATE}'}")
    print(f"an idle process, share of a core over {TIMES} times {options.seconds:g} s")
    for loop in ("asyncio", "uvloop", "uvicorn"):
        for runs in (False, True):
            more = share(loop, "yes", runs, options.seconds)
            fine = fine and more <= WATCH_GATE
            name = f"{loop}, {'a run waits' if runs else 'no runs'}"
            print(f"  {name:22} {more:8.3%}   {'ok' if more <= WATCH_GATE else f'OVER {WATCH_GATE:.1%}'}")
    print(f"  {'a thread that sleeps':22} {share('asyncio', 'sleep', False, options.seconds):8.3%}")
    return not fine


if __name__ == "__main__":
    sys.exit(main())
