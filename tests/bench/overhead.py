"""
What observing a background task costs: aftertask beside the same signals written by hand, and whether the gates hold.

    python tests/bench/overhead.py               # the table and the gates; exit code 1 if a gate fails
    python tests/bench/overhead.py --quick       # two rounds, for a first impression

How it measures. A FastAPI app is driven in process, without sockets; for a request without tasks also under uvicorn, by
a client with one connection. In a round, a process pinned to one core forks a child for each variant, and the children
take turns of some milliseconds in an order that changes each time, so that what slows the machine down slows all of
them. The clock is the CPU time of a child's whole process, exporter threads included; each turn ends by flushing the
spans it made. A round is a process of its own; its figure is the median over its turns. The table has the median over
the rounds, and their range.

What one task more costs is (a request with ten tasks - a request with one) / 9, `add_task` included; what is done once
for a response is in the figure of a request with one task. "added" subtracts bare, "x floor" divides by what the floor
adds, both in the same round.

The floor emits the signals that aftertask emits by default for a task that succeeds, each by the public API of its
library: the same metrics with exemplars, a span with the same attributes, the same keys bound for the task's own log
lines, one log line. aftertask logs each success here (`success_log_rate=None`), as the floor does.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
import traceback
from asyncio import Runner
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import uvicorn
from opentelemetry import trace
from opentelemetry.context import attach, detach
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags
from subjects import VARIANTS, Subject

#: Requests in a turn, by the tasks each of them adds. At most 512 spans: more, and the exporter's thread wakes up.
REQUESTS = {0: 120, 1: 60, 10: 30}

#: Requests in a turn under uvicorn.
SERVED = 300

#: Two processes that run the same code differ by some per cent. The gates of a request without tasks are as fine as
#: that, so what they compare is measured in this many more processes.
AGAIN, TIMES = ("bare", "ours"), 3


# --- one child: drives its app when the round asks for it


def parent_context(*, sampled: bool) -> Any:
    """A request's span as the current context, as a server's instrumentation leaves it."""
    flags = TraceFlags(TraceFlags.SAMPLED if sampled else TraceFlags.DEFAULT)
    span = SpanContext(0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331, False, flags)
    return trace.set_span_in_context(NonRecordingSpan(span))


def scope_for(path: str) -> dict[str, Any]:
    """An ASGI scope as a server makes it."""
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "headers": [(b"host", b"test"), (b"user-agent", b"bench")],
        "client": ("127.0.0.1", 5000),
        "server": ("127.0.0.1", 80),
        "state": {},
    }


async def receive() -> dict[str, Any]:
    """The empty body."""
    return {"type": "http.request", "body": b"", "more_body": False}


async def send(message: Any) -> None:
    """Drop the message."""


async def burst(app: Any, path: str, requests: int, parent: Any) -> None:
    """Serve requests one after another, the parent's span current around each call of the app."""
    for _ in range(requests):
        token = attach(parent)
        await app(scope_for(path), receive, send)
        detach(token)


class Driver:
    """Drives a subject's app in process."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.parent = parent_context(sampled=subject.sampled)
        self.runner = Runner()
        self.lifespan = self.runner.run(self._start())

    async def _start(self) -> asyncio.Task[None]:
        """Begin the app's lifespan, as each server does; it lasts as long as the child."""
        messages, started = asyncio.Queue[dict[str, Any]](), asyncio.Event()
        messages.put_nowait({"type": "lifespan.startup"})

        async def send(message: Any) -> None:
            assert message["type"] == "lifespan.startup.complete", message
            started.set()

        scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}
        lifespan = asyncio.create_task(self.subject.app(scope, messages.get, send))
        await started.wait()
        return lifespan

    def turn(self, path: str, requests: int) -> float:
        """Microseconds of CPU time per request, after a few that warm the caches up again."""
        self.drive(path, 3)
        gc.collect()
        start = time.process_time_ns()
        self.drive(path, requests)
        return (time.process_time_ns() - start) / requests / 1000

    def drive(self, path: str, requests: int) -> None:
        """Serve requests and flush the spans they made; flushing none costs time, too, so it is left out."""
        self.runner.run(burst(self.subject.app, path, requests, self.parent))
        if path != "/0" or self.subject.traces_requests:
            self.subject.flush()


class Client:
    """A client of an app under uvicorn, on one connection."""

    def __init__(self, listener: socket.socket) -> None:
        self._socket = socket.create_connection(listener.getsockname())

    def get(self, path: str) -> bytes:
        """The body of a response, which fits into one read after the headers."""
        self._socket.sendall(b"GET %b HTTP/1.1\r\nhost: t\r\n\r\n" % path.encode())
        data = b""
        while True:
            data += self._socket.recv(4096)
            head, end, body = data.partition(b"\r\n\r\n")
            if end and len(body) == int(head.lower().partition(b"content-length:")[2].split()[0]):
                return body

    def turn(self) -> float:
        """Microseconds of the server's CPU time per request without tasks."""
        for _ in range(3):
            self.get("/0")
        start = int(self.get("/cpu"))
        for _ in range(SERVED):
            self.get("/0")
        return (int(self.get("/cpu")) - start) / SERVED / 1000


def child(make: Callable[[], Subject], paths: Sequence[int], turns: Connection) -> None:
    """Build the app, then take a turn for each number of tasks that comes in, until None does."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        driver = Driver(make())
        for tasks in paths:
            driver.drive(f"/{tasks}", 100)
        gc.collect()
        gc.freeze()
        turns.send("ready")
        while (tasks := turns.recv()) is not None:
            turns.send(driver.turn(f"/{tasks}", REQUESTS[tasks]))
    except BaseException:
        turns.send(RuntimeError(traceback.format_exc()))
        raise


def serve(make: Callable[[], Subject], listener: socket.socket, loop: Any = "auto") -> None:
    """Serve the app by uvicorn until the process is ended."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    config = uvicorn.Config(make().app, log_level="error", access_log=False, loop=loop)
    uvicorn.Server(config).run(sockets=[listener])


def pin() -> None:
    """Stay on one core, if the system allows it."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def answer(end: Connection) -> Any:
    """What a child sends; raises its error if it broke."""
    answer = end.recv()
    if isinstance(answer, BaseException):
        raise answer
    return answer


# --- one round: a process with a child for each variant


class Round:
    """The children of one round, and the figures of their turns."""

    def __init__(self, names: Sequence[str]) -> None:
        self._context = get_context("fork")
        self._processes: list[BaseProcess] = []
        #: Each child's variant, what is measured (`"0"`, `"1"`, `"10"` tasks, or `"served"`), and how.
        self.turns: list[tuple[str, str, Callable[[], float]]] = []
        again = [name for name in AGAIN if name in names]
        for name in names:
            self._start(name, tuple(REQUESTS))
        for name in again * TIMES:
            self._start(name, (0,))
        for name in again * 2:
            self._serve(name)

    def _start(self, name: str, paths: Sequence[int]) -> None:
        ours, theirs = self._context.Pipe()
        self._processes.append(self._context.Process(target=child, args=(VARIANTS[name], paths, theirs), daemon=True))
        self._processes[-1].start()
        theirs.close()
        answer(ours)

        def turn(tasks: int) -> float:
            ours.send(tasks)
            return float(answer(ours))

        self.turns += [(name, str(tasks), lambda tasks=tasks: turn(tasks)) for tasks in paths]  # type: ignore[misc]

    def _serve(self, name: str) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        self._processes.append(self._context.Process(target=serve, args=(VARIANTS[name], listener), daemon=True))
        self._processes[-1].start()
        self.turns.append((name, "served", Client(listener).turn))

    def measure(self, batches: int) -> dict[str, dict[str, float]]:
        """Microseconds per request, by variant: the median over the batches, the mean over a variant's children."""
        figures: list[list[float]] = [[] for _ in self.turns]
        for _ in range(batches):
            for number in random.sample(range(len(self.turns)), len(self.turns)):
                figures[number].append(self.turns[number][2]())
        found: dict[str, dict[str, list[float]]] = {}
        for (name, what, _), measured in zip(self.turns, figures, strict=True):
            found.setdefault(name, {}).setdefault(what, []).append(statistics.median(measured))
        return {name: {what: statistics.mean(of) for what, of in by.items()} for name, by in found.items()}

    def end(self) -> None:
        """End the children."""
        for process in self._processes:
            process.terminate()
            process.join(10)


def one_round(names: Sequence[str], batches: int) -> dict[str, dict[str, float]]:
    """The figures of one round."""
    pin()
    made = Round(names)
    try:
        return made.measure(batches)
    finally:
        made.end()


# --- all rounds


class Results:
    """The figures of all rounds."""

    def __init__(self, rounds: Sequence[dict[str, dict[str, float]]]) -> None:
        self.rounds = rounds
        self.names = list(rounds[0])

    def task(self, name: str) -> list[float]:
        """Microseconds that one task more adds beyond bare, in each round."""
        return [((r[name]["10"] - r[name]["1"]) - (r["bare"]["10"] - r["bare"]["1"])) / 9 for r in self.rounds]

    def one(self, name: str) -> list[float]:
        """Microseconds that a request with one task takes beyond bare's."""
        return [r[name]["1"] - r["bare"]["1"] for r in self.rounds]

    def none(self, name: str) -> list[float]:
        """Microseconds of a request without tasks, in process."""
        return [r[name]["0"] for r in self.rounds]

    def served(self, name: str) -> list[float]:
        """Microseconds of a request without tasks, under uvicorn."""
        return [r[name].get("served", float("nan")) for r in self.rounds]

    def table(self) -> str:
        """One line for each variant."""
        middle = statistics.median
        tasks = middle((r["bare"]["10"] - r["bare"]["1"]) / 9 for r in self.rounds)
        lines = [
            f"Bare: a request without tasks {middle(self.none('bare')):.1f} us in process, "
            f"{middle(self.served('bare')):.1f} us under uvicorn; one task more {tasks:.2f} us. "
            f"Rounds: {len(self.rounds)}.",
            "",
            f"{'':16}{'one task more, us':26}{'x floor':22}{'one task, us':26}{'x floor':22}no task, x bare",
        ]
        for name in self.names:
            task, one, none = self.task(name), self.one(name), quotients(self.none(name), self.none("bare"))
            columns = [task, quotients(task, self.task("floor")), one, quotients(one, self.one("floor")), none]
            texts = [f"{middle(each):.3f} ({min(each):.2f}..{max(each):.2f})" for each in columns]
            cells = (f"{text:{width}}" for text, width in zip(texts, (26, 22, 26, 22, 0), strict=True))
            lines.append(f"{name:16}{''.join(cells)}")
        return "\n".join(lines)


def quotients(figures: Sequence[float], others: Sequence[float]) -> list[float]:
    """Of the figures of each round."""
    return [figure / other if other else 0.0 for figure, other in zip(figures, others, strict=True)]


@dataclass
class Gate:
    """A promise: a figure of a variant, divided by another's, is at most the limit."""

    title: str
    figure: Callable[[Results, str], list[float]]
    variant: str
    against: str
    limit: float
    goal: float | None = None

    def check(self, results: Results) -> tuple[str, bool]:
        """The line to print, and whether the promise is kept; what was not measured breaks none."""
        if not {self.variant, self.against} <= set(results.names):
            return f"  --    {self.title:52}not measured", True
        ratio = statistics.median(quotients(self.figure(results, self.variant), self.figure(results, self.against)))
        line = f"{self.title:52}{ratio:7.3f}  limit {self.limit:.2f}"
        if self.goal is not None:
            line += f"  goal {self.goal:.2f} {'reached' if ratio <= self.goal else 'not reached'}"
        return f"  {'pass' if ratio <= self.limit else 'FAIL'}  {line}", ratio <= self.limit


GATES = (
    Gate("one task more, x floor: structlog configured", Results.task, "ours", "floor", 1.6, 1.2),
    Gate("one task more, x floor: nothing configured", Results.task, "ours_stderr", "floor", 1.8, 1.3),
    Gate("one task more, x floor: metrics alone", Results.task, "ours_metrics", "floor", 0.3),
    Gate("one task more, x floor: not sampled", Results.task, "ours_unsampled", "floor", 0.75),
    Gate("one task more, x floor: no signals", Results.task, "ours_none", "floor", 0.15),
    Gate("request with one task, x floor: no signals", Results.one, "ours_none", "floor", 0.6),
    Gate("request with one task, x floor: all signals", Results.one, "ours", "floor", 1.8),
    Gate("request without tasks, x bare: under uvicorn", Results.served, "ours", "bare", 1.03),
    Gate("request without tasks, x bare: in process", Results.none, "ours", "bare", 1.10),
    Gate("every policy set, none acting, x none set", Results.task, "ours_policies", "ours", 2.0),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the rounds, print the table, check the gates."""
    options = _options(arguments)
    if options.one_round:
        print(json.dumps(one_round(options.variants, options.batches)))
        return 0
    command = [sys.executable, __file__, "--one-round", "--batches", str(options.batches)]
    rounds = []
    for number in range(options.rounds):
        done = subprocess.run(
            [*command, "--variants", ",".join(options.variants)], stdout=subprocess.PIPE, text=True, check=True
        )
        rounds.append(json.loads(done.stdout))
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
    results = Results(rounds)
    print(results.table(), end="\n\n")
    checked = [gate.check(results) for gate in GATES]
    print("Gates", *(line for line, _ in checked), sep="\n")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"python": sys.version.split()[0], "rounds": rounds}, file)
    return 0 if all(kept for _, kept in checked) else 1


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What observing a background task costs.")
    parser.add_argument("--rounds", type=int, help="processes to measure in, one after another (default 8)")
    parser.add_argument("--batches", type=int, default=12, help="turns of each variant in a round (default 12)")
    parser.add_argument("--quick", action="store_true", help="2 rounds, unless --rounds is given")
    parser.add_argument("--variants", type=_names, default=list(VARIANTS), help=f"some of {', '.join(VARIANTS)}")
    parser.add_argument("--json", metavar="FILE", help="write the figures of each round")
    parser.add_argument("--one-round", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (2 if options.quick else 8)
    return options


def _names(text: str) -> list[str]:
    """The variants named, and the two that the others are compared with."""
    unknown = sorted(set(text.split(",")) - set(VARIANTS))
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown variant {unknown[0]!r}; known variants are {', '.join(VARIANTS)}")
    return [name for name in VARIANTS if name in {*text.split(","), "bare", "floor"}]


if __name__ == "__main__":
    sys.exit(main())
