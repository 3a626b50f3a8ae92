"""
What observing a task costs a Celery worker, beside bare Celery and `opentelemetry-instrumentation-celery`, in one run.

    python tests/bench/celery_worker.py   # CPU and time a task, in one process of a pool

All three have the same task, which does nothing, and log as Celery does by default. The two that make spans export them
in batches to nowhere; aftertask also writes its metrics to files and a line for at most ten successes a second.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from celery import Celery
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from aftertask.celery import instrument_worker
from live.brokers import redis
from live.servers import eventually

HERE = Path(__file__).parent
VARIANTS = ("bare", "opentelemetry", "aftertask")


class Nowhere(SpanExporter):
    """Throws spans away."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Done."""
        return SpanExportResult.SUCCESS


def observed(app: Celery, variant: str) -> None:
    """Set the worker up as a variant."""
    if variant != "bare":
        provider = TracerProvider()
        provider.add_span_processor(BatchSpanProcessor(Nowhere()))
        trace.set_tracer_provider(provider)
    if variant == "opentelemetry":
        from celery.signals import worker_process_init
        from opentelemetry.instrumentation.celery import CeleryInstrumentor

        # As its documentation says: in each process of the pool.
        worker_process_init.connect(lambda **_: CeleryInstrumentor().instrument(), weak=False)
    elif variant == "aftertask":
        instrument_worker(app)


app = Celery("bench", broker=os.environ.get("BROKER"), task_ignore_result=True)
if "VARIANT" in os.environ:
    observed(app, os.environ["VARIANT"])


@app.task(name="bench.work")  # type: ignore[untyped-decorator]
def work(number: int) -> None:
    """Nothing; at the marks it writes down the time that has passed, and the CPU time of its process."""
    if number in (int(os.environ["FIRST"]), int(os.environ["LAST"])):
        with open(os.environ["MARKS"], "a") as file:
            file.write(f"{time.perf_counter()} {time.process_time()}\n")


def measured(variant: str, broker: str, folder: Path, tasks: int) -> tuple[float, float]:
    """Microseconds of CPU, and of time, that one task takes in a fresh worker; the first tenth does not count."""
    folder.mkdir()
    marks, shared = folder / "marks", folder / "metrics"
    shared.mkdir()
    for number in range(tasks):
        work.apply_async((number,))
    first, last = tasks // 10, tasks - 1
    env = {"VARIANT": variant, "FIRST": str(first), "LAST": str(last), "MARKS": str(marks), "BROKER": broker}
    env |= {"PROMETHEUS_MULTIPROC_DIR": str(shared), "PYTHONPATH": str(HERE)}
    command = [sys.executable, "-m", "celery", "-A", "celery_worker", "worker", "--concurrency", "1"]
    with (folder / "log").open("w") as log:
        child = subprocess.Popen(
            [*command, "--prefetch-multiplier", "64"], env={**os.environ, **env}, cwd=HERE, stdout=log, stderr=log
        )
    try:

        def is_done() -> bool:
            if child.poll() is not None:
                raise SystemExit((folder / "log").read_text())
            return marks.exists() and marks.read_text().count("\n") == 2

        eventually(is_done, seconds=300, what=variant)
    finally:
        child.terminate()
        child.wait(30)
    (began, cpu_before), (ended, cpu_after) = (map(float, line.split()) for line in marks.read_text().splitlines())
    count = (last - first) / 1e6
    return (cpu_after - cpu_before) / count, (ended - began) / count


def main() -> None:
    """Rounds in which the variants take turns; the median of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    found: dict[str, list[tuple[float, float]]] = {variant: [] for variant in VARIANTS}
    with tempfile.TemporaryDirectory() as name, redis(Path(name)) as broker:
        app.conf.broker_url = broker.url
        for number in range(options.rounds):
            for variant in VARIANTS:
                folder = Path(name) / f"{variant}-{number}"
                found[variant].append(measured(variant, broker.url, folder, options.tasks))
    print(f"{'':15} {'CPU us/task':>12} {'us/task':>9}")
    for variant, rounds in found.items():
        cpu, wall = (statistics.median(each) for each in zip(*rounds, strict=True))
        print(f"{variant:15} {cpu:12.0f} {wall:9.0f}")


if __name__ == "__main__":
    main()
