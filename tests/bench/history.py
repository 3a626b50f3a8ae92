"""
Nothing grows with history: a task costs the same after 200 000 tasks as after 1 000, and so does their memory.

    python tests/bench/history.py                # prints both; exit code 1 if a limit is exceeded

All signals are on. The history is a mix: plain tasks, and every eighth one a closure, a `partial`, a callable object or
one that fails with a message of its own; every eighth is dropped because its handler raised. Three processes have
200 000 tasks behind them, and take turns with young ones, each forked for five turns after 1 000 tasks; a cost is the
difference of medians of all turns, in CPU time, as in `overhead.py`. Memory is what tracemalloc counts in one more
process, between 1 000 and 200 000 tasks; the most that an old process's resident memory grew is printed beside it.
"""

from __future__ import annotations

import argparse
import functools
import gc
import os
import random
import statistics
import sys
import traceback
import tracemalloc
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import overhead
import subjects
from fastapi import BackgroundTasks, HTTPException

COST_LIMIT = 1.10
MEMORY_LIMIT_MB = 2.0
YOUNG = 1000
OLDS, TURNS = 3, 5

#: Tasks that one block of history adds: three requests of ten, one mixed and one refused of five each.
BLOCK = 40


class Callable_:
    """A task that is an object."""

    async def __call__(self, number: int) -> None: ...


async def fails(number: int) -> None:
    """A task that fails, each time with another message."""
    raise RuntimeError(f"order {number} is not there")


def subject() -> subjects.Subject:
    """The app of `overhead.py` with all signals, and two routes for the rest of the mix."""
    made = subjects.ours()
    count = 0

    @made.app.get("/mixed")
    async def mixed(tasks: BackgroundTasks) -> dict[str, str]:
        nonlocal count
        count += 1

        async def closure() -> int:
            return count

        tasks.add_task(closure)
        tasks.add_task(functools.partial(subjects.nothing, count))
        tasks.add_task(Callable_(), count)
        tasks.add_task(subjects.nothing, number=count)
        tasks.add_task(fails, count)
        return {}

    @made.app.get("/refused")
    async def refused(tasks: BackgroundTasks) -> dict[str, str]:
        for number in range(5):
            tasks.add_task(subjects.nothing, number)
        raise HTTPException(409)

    return made


class Process:
    """An app with a history."""

    def __init__(self) -> None:
        self.driver = overhead.Driver(subject())

    def live(self, tasks: int) -> None:
        """Run this many tasks."""
        for _ in range(tasks // BLOCK):
            self.driver.drive("/10", 3)
            try:
                self.driver.drive("/mixed", 1)
            except RuntimeError:
                pass
            self.driver.drive("/refused", 1)
        gc.collect()

    def cost(self, end: Connection) -> None:
        """Send what a request with one task and with ten costs now, each time the other end asks."""
        overhead.pin()
        gc.freeze()
        while end.recv():
            end.send({tasks: self.driver.turn(f"/{tasks}", overhead.REQUESTS[tasks]) for tasks in (1, 10)})


def resident_mb() -> float:
    """The process's resident memory."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def grow_old(end: Connection, tasks: int) -> None:
    """Run all the history, send how much the resident memory grew, then costs on request."""
    process = Process()
    process.live(YOUNG)
    before = resident_mb()
    process.live(tasks - YOUNG)
    end.send(resident_mb() - before)
    process.cost(end)


def stay_young(end: Connection) -> None:
    """Send costs on request after a short history."""
    process = Process()
    process.live(YOUNG)
    end.send("ready")
    process.cost(end)


def weigh(end: Connection, tasks: int) -> None:
    """Send by how many megabytes the memory that Python allocated has grown."""
    tracemalloc.start()
    process = Process()
    process.live(YOUNG)
    before = tracemalloc.get_traced_memory()[0]
    process.live(tasks - YOUNG)
    end.send((tracemalloc.get_traced_memory()[0] - before) / 1e6)


def _guarded(work: Callable[..., None], end: Connection, *arguments: Any) -> None:
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        work(end, *arguments)
    except BaseException:
        end.send(RuntimeError(traceback.format_exc()))
        raise


def _forked(work: Callable[..., None], *arguments: Any) -> Connection:
    context = get_context("fork")
    ours, theirs = context.Pipe()
    context.Process(target=_guarded, args=(work, theirs, *arguments), daemon=True).start()
    theirs.close()
    return ours


def costs(olds: Sequence[Connection], pairs: int) -> tuple[float, float]:
    """Microseconds per task in young and in old processes, which take turns."""
    chance = random.Random()
    figures: tuple[list[dict[int, float]], ...] = [], []
    for pair in range(pairs):
        young = _forked(stay_young)
        overhead.answer(young)
        both = [(young, figures[0]), (olds[pair % len(olds)], figures[1])]
        for _ in range(TURNS):
            for end, measured in chance.sample(both, 2):
                end.send(True)
                measured.append(overhead.answer(end))
        young.send(False)
    young_us, old_us = (
        (statistics.median(f[10] for f in measured) - statistics.median(f[1] for f in measured)) / 9
        for measured in figures
    )
    return young_us, old_us


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, compare with the limits."""
    parser = argparse.ArgumentParser(description="Nothing grows with history.")
    parser.add_argument("--tasks", type=int, default=200_000, help="the long history (default 200000)")
    parser.add_argument("--pairs", type=int, default=15, help="young processes to compare with old ones (default 15)")
    options = parser.parse_args(arguments)
    weighing = _forked(weigh, options.tasks)
    olds = [_forked(grow_old, options.tasks) for _ in range(OLDS)]
    resident, grown = max(overhead.answer(old) for old in olds), overhead.answer(weighing)
    young, aged = costs(olds, options.pairs)
    for old in olds:
        old.send(False)
    ratio = aged / young
    cost_kept, memory_kept = ratio <= COST_LIMIT, grown <= MEMORY_LIMIT_MB
    print(
        f"{'pass' if cost_kept else 'FAIL'}  a task costs {young:.1f} us after {YOUNG} tasks and {aged:.1f} us after "
        f"{options.tasks}: {ratio:.3f} x  limit {COST_LIMIT:.2f}\n"
        f"{'pass' if memory_kept else 'FAIL'}  traced memory grew by {grown:.2f} MB  limit {MEMORY_LIMIT_MB:.2f}  "
        f"(resident memory: {resident:.2f} MB)"
    )
    return 0 if cost_kept and memory_kept else 1


if __name__ == "__main__":
    sys.exit(main())
