"""
Several processes, one scrape: prometheus-client keeps each process's values in files of `PROMETHEUS_MULTIPROC_DIR`.

Each worker holds a lock on a file of its own for as long as it lives, so a worker is dead exactly when its lock is
free, even if another process has its pid. What a dead worker had scheduled and not finished is lost; that is computed
from its files at each scrape, so it is counted exactly once, whichever worker is scraped.
"""

from __future__ import annotations

import collections
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple, TypeAlias

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from . import families as f

if sys.platform != "win32":
    import fcntl

#: Without these locks (Windows) no worker is ever taken for dead.
_CAN_LOCK = sys.platform != "win32"

#: Number of runs by task and engine.
Runs: TypeAlias = Mapping[tuple[str, str], float]

_PID = re.compile(r"_(\d+)\.\w+$")

#: The samples that count a lost run, by family.
_COUNTS_LOST: dict[str, dict[str, str]] = {
    f.FINISHED.full_name: {"outcome": "lost"},
    f.NOT_RUN.full_name: {"outcome": "lost", "reason": "crash"},
    f.BAD.full_name: {},
}


class Past(NamedTuple):
    """
    What an earlier process with the same pid left in the files that this process continues.

    Attributes:
        unfinished: Runs that it had scheduled and not finished.
        gauges: Its gauges of what was going on.
    """

    unfinished: Runs
    gauges: list[Metric]


class Workers(Collector):
    """
    The workers that share a directory; collects the sum over all of them, dead ones included.

    Args:
        path: The directory.

    Raises:
        FileNotFoundError: The directory does not exist.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise FileNotFoundError(
                f"PROMETHEUS_MULTIPROC_DIR={str(path)!r} is not a directory; create it before the workers start"
            )
        self._path = path
        self._mutex = threading.Lock()
        self._own_lock: IO[bytes] | None = None

    def registry(self, *, by_name: bool) -> CollectorRegistry:
        """A registry that holds only this collector; `by_name` if it must find families, which takes twice as long."""
        registry = CollectorRegistry(auto_describe=by_name)
        registry.register(self)
        return registry

    def join(self, settle: Callable[[Past], object]) -> None:
        """
        Make this process one of the workers; does nothing if it is one.

        Args:
            settle: Called with what an earlier process with this pid left behind, if there was one: after a restart of
                a container the pids are the same again, and the files go on from their last values.
        """
        if not _CAN_LOCK or self._own_lock is not None:
            return
        # No scrape may see the runs of the past both as a dead worker's and as settled.
        with self._locked(fcntl.LOCK_EX):
            lock_file = self._lock_file(os.getpid())
            if lock_file.exists():
                settle(self._past(os.getpid()))
            self._own_lock = lock_file.open("ab")
            fcntl.lockf(self._own_lock, fcntl.LOCK_EX)

    def after_fork(self) -> None:
        """Forget the parent's lock: this process does not hold it."""
        self._mutex = threading.Lock()
        self._own_lock = None

    def collect(self) -> Iterable[Metric]:
        """The sum over all workers."""
        with self._locked(fcntl.LOCK_SH if _CAN_LOCK else None):
            dead = self._dead()
            lost = _unfinished(self._path / f"counter_{pid}.db" for pid in dead)
            files = [file for file in self._path.glob("*.db") if not (_is_live_gauge(file) and _pid(file) in dead)]
            metrics: list[Metric] = list(MultiProcessCollector.merge(map(str, files)))  # type: ignore[no-untyped-call]
            for pid in dead:
                if not _is_running(pid):  # another process may have opened files under this pid
                    mark_process_dead(pid, str(self._path))  # type: ignore[no-untyped-call]
        return [_with_lost(metric, lost) for metric in metrics]

    def _dead(self) -> set[int]:
        """The pids of workers that no longer hold their lock."""
        if not _CAN_LOCK:
            return set()
        # Never its own file: closing it would release the lock.
        files = {_pid(file): file for file in self._path.glob("aftertask_*.lock") if _pid(file) != os.getpid()}
        return {pid for pid, file in files.items() if _is_free(file)}

    def _past(self, pid: int) -> Past:
        gauges = [str(file) for file in self._path.glob("gauge_live*.db") if _pid(file) == pid]
        merged: Iterable[Metric] = MultiProcessCollector.merge(gauges)  # type: ignore[no-untyped-call]
        return Past(_unfinished([self._path / f"counter_{pid}.db"]), list(merged))

    def _lock_file(self, pid: int) -> Path:
        return self._path / f"aftertask_{pid}.lock"

    @contextmanager
    def _locked(self, kind: int | None) -> Iterator[None]:
        """Lock the directory; the lock is the process's, so its threads exclude each other by a mutex."""
        with self._mutex, (self._path / "aftertask.lock").open("a+b") as file:
            if kind is not None:
                fcntl.lockf(file, kind)
            yield


def _unfinished(counter_files: Iterable[Path]) -> Runs:
    """Runs scheduled and not finished, as the counters of these files show them."""
    runs: collections.Counter[tuple[str, str]] = collections.Counter()
    signs = {f.SCHEDULED.full_name: 1, f.FINISHED.full_name: -1}
    files = [str(file) for file in counter_files if file.exists()]
    for metric in MultiProcessCollector.merge(files):  # type: ignore[no-untyped-call]
        sign = signs.get(metric.name)
        for sample in metric.samples if sign else ():
            runs[sample.labels["task"], sample.labels["engine"]] += sign * sample.value
    return +runs


def _with_lost(metric: Metric, lost: Runs) -> Metric:
    """The metric with these lost runs counted, if it counts lost runs."""
    where = _COUNTS_LOST.get(metric.name)
    if where is None or not lost:
        return metric
    counted = Metric(metric.name, metric.documentation, metric.type)
    for sample in metric.samples:
        more = _lost_of(sample, lost) if where.items() <= sample.labels.items() else 0
        counted.add_sample(sample.name, sample.labels, sample.value + more)
    return counted


def _lost_of(sample: Sample, lost: Runs) -> float:
    """How many of the lost runs are of the sample's task, and of its engine if it has that label."""
    task, engine = sample.labels["task"], sample.labels.get("engine")
    return sum(count for (name, on), count in lost.items() if name == task and engine in (None, on))


def _is_free(lock_file: Path) -> bool:
    with lock_file.open("rb") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def _is_live_gauge(file: Path) -> bool:
    return file.name.startswith("gauge_live")


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _pid(file: Path) -> int:
    """The pid at the end of a file's name; 0 if there is none."""
    found = _PID.search(file.name)
    return int(found[1]) if found else 0
