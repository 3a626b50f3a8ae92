"""
What observing a background task costs, aftertask beside others, and whether it is within the promised limits.

    python tests/bench/overhead.py               # the table and the gates; exit code 1 where a gate fails
    python tests/bench/overhead.py --quick       # two short rounds, for a first impression

How it measures: a FastAPI app is driven in-process, without sockets. In a round, a process pinned to one core forks a
child for each variant, and the children take turns of a few milliseconds, in an order that changes each time: what
slows the machine down slows all of them alike. The clock is the CPU time of a child's whole process, exporter threads
included, and each turn ends by flushing the spans it made. A round is a process of its own (another hash seed, another
layout); its figure is the median over its turns, and the table tells the median over the rounds, and the spread.

What a task costs is (a route that adds ten of them - a route that adds one) / 9, so `add_task` is part of it. "added"
subtracts bare, "of floor" divides by what the floor adds, both in the same round. The floor is the same signals as ours
(span, counters, histogram, gauge, log lines) written by hand around the task, each by its own library's API, as well as
can be done without private names.

What is done once for all tasks of a response is in no task's figure but in that of a request with one task, which the
table tells beside.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import time
import traceback
from asyncio import Runner
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from fastapi import BackgroundTasks, FastAPI
from opentelemetry import trace
from opentelemetry.context import attach, detach
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, DEFAULT_ON, Sampler
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, StatusCode, TraceFlags

Task = Callable[[int], Awaitable[None]]

#: Requests in a turn, by the tasks each of them adds. At most 512 spans, so that it is we who flush them.
REQUESTS = {0: 120, 1: 60, 10: 30}

#: Two processes that run the same code differ by some per cent, by where their memory happens to lie. The gate for a
#: request without tasks is finer than that: what it compares is measured in so many more processes.
AGAIN, TIMES = ("bare", "ours"), 3


@dataclass
class Subject:
    """An app to drive: adds no task at `/0`, one at `/1`, ten at `/10`; whether it makes a span where there is none."""

    app: FastAPI
    flush: Callable[[], object] = lambda: None
    sampled: bool = True
    traces_requests: bool = False


# --- the variants


class NullExporter(SpanExporter):
    """Throws the spans away: sending them costs everybody the same."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Take them and do nothing."""
        return SpanExportResult.SUCCESS


def provider(sampler: Sampler = ALWAYS_ON) -> TracerProvider:
    """A tracer provider as in production, but for the exporter."""
    made = TracerProvider(sampler=sampler)
    made.add_span_processor(BatchSpanProcessor(NullExporter(), max_queue_size=1 << 16))
    return made


def app_with(task: Task, **kwargs: Any) -> FastAPI:
    """The app that all variants are."""
    app = FastAPI(**kwargs)

    @app.get("/0")
    async def none() -> dict[str, str]:
        return {}

    @app.get("/1")
    async def one(tasks: BackgroundTasks) -> dict[str, str]:
        tasks.add_task(task, 1)
        return {}

    @app.get("/10")
    async def ten(tasks: BackgroundTasks) -> dict[str, str]:
        for number in range(10):
            tasks.add_task(task, number)
        return {}

    return app


async def nothing(number: int) -> None:
    """The task of every variant: what is left of a measurement is overhead."""


def bare() -> Subject:
    """FastAPI alone."""
    return Subject(app_with(nothing))


def by_hand(level: int = 20) -> Any:
    """A structlog logger to the null device, as fast as its public configuration makes it."""
    import orjson
    import structlog

    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(serializer=orjson.dumps),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.BytesLoggerFactory(open(os.devnull, "wb")),  # noqa: SIM115  # for the process's life
        cache_logger_on_first_use=True,
    )
    return structlog.get_logger()


def floor() -> Subject:
    """The same signals by hand: no decorators, no label look-ups, attributes at start, children bound beforehand."""
    from prometheus_client import Counter, Gauge, Histogram

    labels = ("task", "route")
    finished = Counter("floor_finished", "d", (*labels, "outcome"))
    started = Counter("floor_started", "d", labels).labels("app.report", "/n")
    ok, failed = (finished.labels("app.report", "/n", outcome) for outcome in ("ok", "error"))
    duration = Histogram("floor_duration_seconds", "d", labels).labels("app.report", "/n")
    running = Gauge("floor_running", "d", labels).labels("app.report", "/n")
    made = provider()
    tracer, log, parent = made.get_tracer("floor"), by_hand(), parent_context(sampled=True)
    now, bits = time.perf_counter, random.getrandbits

    async def task(number: int) -> None:
        run_id = f"{bits(64):016x}"
        started.inc()
        running.inc()
        start = now()
        span = tracer.start_span(
            "background_task app.report",
            parent,
            SpanKind.INTERNAL,
            {
                "task.id": run_id,
                "task.name": "app.report",
                "task.index": 0,
                "task.count": 10,
                "http.route": "/n",
                "code.function.name": "app.report",
            },
        )
        token = attach(trace.set_span_in_context(span, parent))
        context = span.get_span_context()
        trace_id, span_id = trace.format_trace_id(context.trace_id), trace.format_span_id(context.span_id)
        log.info("task.started", task="app.report", task_id=run_id, route="/n", trace_id=trace_id, span_id=span_id)
        error = None
        try:
            pass
        except BaseException as raised:
            error = raised
            raise
        finally:
            lasted = now() - start
            if error is not None:
                span.record_exception(error)
                span.set_status(StatusCode.ERROR)
            detach(token)
            span.end()
            duration.observe(lasted)
            (ok if error is None else failed).inc()
            running.dec()
            log.info(
                "task.finished",
                task="app.report",
                task_id=run_id,
                route="/n",
                trace_id=trace_id,
                span_id=span_id,
                duration=lasted,
                outcome="ok",
            )

    return Subject(app_with(task), made.force_flush)


class Passing:
    """A middleware that does nothing but pass the call on: the least that any middleware costs."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app(scope, receive, send)


def passing() -> Subject:
    """What a request pays for having a middleware at all."""
    app = app_with(nothing)
    app.add_middleware(Passing)
    return Subject(app)


def native() -> Subject:
    """FastAPI's own telemetry, spans only: no metric, no log line."""
    made = provider()
    telemetry = {"tracer_provider": made, "metrics": False, "logs": False}
    return Subject(app_with(nothing, telemetry=telemetry), made.force_flush, traces_requests=True)


def contrib() -> Subject:
    """OpenTelemetry's FastAPI instrumentation, spans only."""
    from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
    from opentelemetry.metrics import NoOpMeterProvider

    made, app = provider(), app_with(nothing)
    FastAPIInstrumentor.instrument_app(
        app, tracer_provider=made, meter_provider=NoOpMeterProvider(), exclude_spans=["send", "receive"]
    )
    return Subject(app, made.force_flush, traces_requests=True)


def ours(
    signals: Sequence[str] | None = None, *, sampler: Sampler = ALWAYS_ON, sampled: bool = True, **chosen_settings: Any
) -> Subject:
    """
    The middleware with a tracer provider and these signals; None: all.

    Settings are the defaults but for one: every success is logged, as the floor logs it. By default
    `success_log_rate` leaves out nearly all of them at a benchmark's pace (`ours_default`).
    """
    from aftertask import AftertaskMiddleware, Settings
    from aftertask.signals import usual

    made = provider(sampler)
    settings = Settings(**{"tracer_provider": made, "success_log_rate": None, **chosen_settings})
    chosen = None if signals is None else [s for s in usual(settings) if type(s).__name__ in signals]
    app = app_with(nothing)
    app.add_middleware(AftertaskMiddleware, settings=settings, signals=chosen)
    return Subject(app, made.force_flush, sampled)


def ours_debug() -> Subject:
    """All signals with structlog configured as in the floor, at debug: three lines for a task instead of one."""
    by_hand(level=10)
    return ours()


def ours_native() -> Subject:
    """All signals beside FastAPI's own telemetry, which feeds the same provider and is muted for our tasks."""
    from aftertask import AftertaskMiddleware, Settings

    made = provider()
    app = app_with(nothing, telemetry={"tracer_provider": made, "metrics": False, "logs": False})
    app.add_middleware(AftertaskMiddleware, settings=Settings(tracer_provider=made, success_log_rate=None))
    return Subject(app, made.force_flush, traces_requests=True)


def ours_policies() -> Subject:
    """All signals, and a task with every policy that an async function can have, none of which has to act."""
    from aftertask import Policy, Retry

    every = Policy(
        timeout=60,
        retry=Retry(),
        limit=100,
        priority=5,
        on_failure="contain",
        expires=60,
        run_on_error=True,
        idempotent=True,
        on_error=lambda run, error: None,
        expected=LookupError,
        slow_after=30,
    )
    return ours(policies={"*": every}, max_waiting=1000)


def ours_default() -> Subject:
    """All signals as shipped: success lines above `Settings.success_log_rate` a second are left out."""
    from aftertask import Settings

    return ours(success_log_rate=Settings().success_log_rate)


VARIANTS: dict[str, Callable[[], Subject]] = {
    "bare": bare,
    "floor": floor,
    "passing": passing,
    "native": native,
    "contrib": contrib,
    "ours": ours,
    "ours_default": ours_default,
    "ours_policies": ours_policies,
    "ours_native": ours_native,
    "ours_debug": ours_debug,
    "ours_tracing": lambda: ours(["Tracing"]),
    "ours_metrics": lambda: ours(["Metrics"]),
    "ours_logs": lambda: ours(["Logs"]),
    "ours_unsampled": lambda: ours(sampler=DEFAULT_ON, sampled=False),
    "ours_none": lambda: ours([]),
}


# --- one child: drives its app when it is told to


def parent_context(*, sampled: bool) -> Any:
    """A request's span as a current context: what a server's instrumentation leaves for us."""
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
    """Nobody listens."""


async def burst(app: Any, path: str, requests: int, parent: Any) -> None:
    """Serve so many requests, one after another, the parent's span current around each call of the app."""
    for _ in range(requests):
        token = attach(parent)
        await app(scope_for(path), receive, send)
        detach(token)


class Driver:
    """Drives a subject's app, and tells what a request cost."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.parent = parent_context(sampled=subject.sampled)
        self.runner = Runner()

    def turn(self, path: str, requests: int) -> float:
        """Microseconds of CPU time a request, after a few that nobody measures: the caches belong to another child."""
        self.drive(path, 3)
        gc.collect()
        start = time.process_time_ns()
        self.drive(path, requests)
        return (time.process_time_ns() - start) / requests / 1000

    def drive(self, path: str, requests: int) -> None:
        """Serve requests and flush the spans they made: to flush nothing takes its time, too, with all caches cold."""
        self.runner.run(burst(self.subject.app, path, requests, self.parent))
        if path != "/0" or self.subject.traces_requests:
            self.subject.flush()


def child(make: Callable[[], Subject], paths: Sequence[int], turns: Connection) -> None:
    """Build the app, then take a turn for each path that comes in, until None does."""
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
    finally:
        turns.close()


def pin() -> None:
    """Stay on one core, where the system lets us choose."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


# --- one round: a process with a child for each variant


def one_round(names: Sequence[str], batches: int) -> dict[str, dict[int, float]]:
    """Microseconds a request, for each variant by its number of tasks: medians over the batches."""
    pin()
    context, chance = get_context("fork"), random.Random()
    wanted = [(name, tuple(REQUESTS)) for name in names]
    wanted += [(name, (0,)) for name in AGAIN for _ in range(TIMES) if name in names]
    ends: list[Connection] = []
    processes = []
    figures: list[dict[int, list[float]]] = [{tasks: [] for tasks in paths} for _, paths in wanted]
    for name, paths in wanted:
        ours_end, theirs = context.Pipe()
        process = context.Process(target=child, args=(VARIANTS[name], paths, theirs), daemon=True)
        process.start()
        theirs.close()
        answer(ours_end)
        ends.append(ours_end)
        processes.append(process)
    for _ in range(batches):
        for number in chance.sample(range(len(ends)), len(ends)):
            for tasks, measured in figures[number].items():
                ends[number].send(tasks)
                measured.append(answer(ends[number]))
    for end, process in zip(ends, processes, strict=True):
        end.send(None)
        process.join(10)
    medians = [{tasks: statistics.median(all_) for tasks, all_ in of.items()} for of in figures]
    return {name: _mean([of for (twin, _), of in zip(wanted, medians, strict=True) if twin == name]) for name in names}


def _mean(processes: Sequence[dict[int, float]]) -> dict[int, float]:
    return {tasks: statistics.mean(of[tasks] for of in processes if tasks in of) for tasks in REQUESTS}


def answer(end: Connection) -> Any:
    """What a child sends; raises where it broke."""
    answer = end.recv()
    if isinstance(answer, BaseException):
        raise answer
    return answer


# --- all rounds, and what they say


class Results:
    """The figures of all rounds."""

    def __init__(self, rounds: Sequence[dict[str, dict[str, float]]]) -> None:
        self.rounds = rounds
        self.names = list(rounds[0])

    def task(self, name: str) -> list[float]:
        """Microseconds a task, in each round."""
        return [(r[name]["10"] - r[name]["1"]) / 9 for r in self.rounds]

    def added(self, name: str) -> list[float]:
        """Microseconds a task beyond bare."""
        return [a - b for a, b in zip(self.task(name), self.task("bare"), strict=True)]

    def of(self, name: str, other: str) -> list[float]:
        """What a variant adds, divided by what another adds."""
        return [a / b for a, b in zip(self.added(name), self.added(other), strict=True)]

    def one(self, name: str) -> list[float]:
        """Microseconds that a request with one task takes beyond bare's: what is done once for a batch is in it."""
        return [r[name]["1"] - r["bare"]["1"] for r in self.rounds]

    def request(self, name: str) -> list[float]:
        """A request without tasks, divided by bare's."""
        return [r[name]["0"] / r["bare"]["0"] for r in self.rounds]

    def table(self) -> str:
        """One line a variant."""
        middle = statistics.median
        lines = [
            f"A request without tasks takes {middle(r['bare']['0'] for r in self.rounds):.1f} us bare, a task "
            f"{middle(self.task('bare')):.2f} us. "
            f"Rounds: {len(self.rounds)}; each figure is their median, with their spread.",
            "",
            f"{'':16}{'added us/task':>13}{'':18}{'of floor':>9}{'':16}{'one task, added us':>18}{'':16}"
            f"{'no task, x bare':>16}",
        ]
        for name in self.names:
            added, ratio, request, one = self.added(name), self.of(name, "floor"), self.request(name), self.one(name)
            lines.append(
                f"{name:16}{middle(added):13.2f}  {_spread(added):16}{middle(ratio):9.3f}  {_spread(ratio):14}"
                f"{middle(one):18.1f}  {_spread(one):14}{middle(request):16.3f}  {_spread(request)}"
            )
        return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    return f"({min(values):.2f}..{max(values):.2f})"


@dataclass
class Gate:
    """A promise: what a variant adds to a task, against another's, or to a request without tasks (against bare)."""

    says: str
    variant: str
    against: str
    limit: float
    goal: float | None = None

    def check(self, results: Results) -> tuple[str, bool]:
        """The line to print, and whether the promise is kept; what was not measured breaks none."""
        if not {self.variant, self.against} <= set(results.names):
            return f"  --    {self.says:46}not measured", True
        of_request = self.against == "bare"
        figures = results.request(self.variant) if of_request else results.of(self.variant, self.against)
        figure = statistics.median(figures)
        kept, line = figure <= self.limit, f"{self.says:46}{figure:7.3f}  limit {self.limit:.2f}"
        if self.goal is not None:
            line += f"  goal {self.goal:.2f} {'reached' if figure <= self.goal else 'not reached'}"
        return f"  {'pass' if kept else 'FAIL'}  {line}", kept


GATES = (
    Gate("all signals, of the floor", "ours", "floor", 0.55, 0.40),
    Gate("all signals, of FastAPI's native span alone", "ours", "native", 1.0),
    Gate("metrics alone, of the floor", "ours_metrics", "floor", 0.25, 0.12),
    Gate("parent not sampled, of the floor", "ours_unsampled", "floor", 0.25, 0.12),
    Gate("no signals, of the floor", "ours_none", "floor", 0.15, 0.08),
    Gate("every policy set, none acting, of none set", "ours_policies", "ours", 1.5),
    Gate("a request without tasks, x bare", "ours", "bare", 1.03),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, judge."""
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
    parser.add_argument("--rounds", type=int, help="processes to measure in, one after another (default 12)")
    parser.add_argument("--batches", type=int, default=12, help="turns of each variant in a round (default 12)")
    parser.add_argument("--quick", action="store_true", help="2 rounds, where not said otherwise")
    parser.add_argument("--variants", type=_names, default=list(VARIANTS), help=f"some of {', '.join(VARIANTS)}")
    parser.add_argument("--json", metavar="FILE", help="write the figures of each round")
    parser.add_argument("--one-round", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (2 if options.quick else 12)
    return options


def _names(text: str) -> list[str]:
    """The variants named, and the two that everything is compared with."""
    unknown = sorted(set(text.split(",")) - set(VARIANTS))
    if unknown:
        raise argparse.ArgumentTypeError(f"no variant {unknown[0]!r}; there are {', '.join(VARIANTS)}")
    return [name for name in VARIANTS if name in {*text.split(","), "bare", "floor"}]


if __name__ == "__main__":
    sys.exit(main())
