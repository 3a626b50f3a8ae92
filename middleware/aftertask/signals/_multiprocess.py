"""
Several processes, one scrape: prometheus-client keeps each process's values in files of `PROMETHEUS_MULTIPROC_DIR`.

Each worker holds a lock on a file of its own for as long as it lives, so a worker is dead exactly when its lock is
free, even if another process has its pid. What a dead worker had scheduled and not finished is offloaded if the journal
has it, else lost; that is computed from its files at each scrape, so it is counted exactly once, whichever worker is
scraped.
"""

from __future__ import annotations

import collections
import operator
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TypeAlias

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

from .._taskrun import LOCAL
from . import families as f

if sys.platform != "win32":
    import fcntl

#: Without these locks (Windows) no worker is ever taken for dead.
_CAN_LOCK = sys.platform != "win32"

#: Number of runs by task and outcome.
Runs: TypeAlias = collections.Counter[tuple[str, str]]

#: In place of the pid: what ended processes counted.
_ENDED = "ended"

_PID = re.compile(r"_(\d+)\.\w+$")

#: The families that count a run of a dead worker.
_COUNTS = (f.FINISHED.full_name, f.NOT_RUN.full_name, f.BAD.full_name)


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

    def join(self, settle: Callable[[Runs, Iterable[Metric]], object]) -> None:
        """
        Make this process one of the workers; does nothing if it is one.

        Args:
            settle: Called with the runs that an earlier process with this pid had not finished, and its gauges of what
                was going on: after a restart of a container the pids are the same again, and the files go on from their
                last values.
        """
        if not _CAN_LOCK or self._own_lock is not None:
            return
        # No scrape may see the runs of the past both as a dead worker's and as settled.
        with self._locked():
            pid = os.getpid()
            lock_file = self._lock_file(pid)
            if lock_file.exists():
                gauges = [file for mode in ("live*", "sum") for file in self._path.glob(f"gauge_{mode}_{pid}.db")]
                settle(self._unfinished(pid), _merged(gauges))
            self._own_lock = lock_file.open("ab")
            fcntl.lockf(self._own_lock, fcntl.LOCK_EX)

    def after_fork(self) -> None:
        """Forget the parent's lock: this process does not hold it."""
        self._mutex = threading.Lock()
        self._own_lock = None

    def collect(self) -> Iterable[Metric]:
        """The sum over all workers."""
        with self._locked(shared=True):
            dead = self._dead()
            unfinished = sum(map(self._unfinished, dead), Runs())
            ended = {file for file in self._path.glob("gauge_live*.db") if _pid(file) in dead}
            metrics = _merged(file for file in self._path.glob("*.db") if file not in ended)
            for pid in dead:
                if not _is_running(pid):  # another process may have opened files under this pid
                    with suppress(FileNotFoundError):  # another scrape was faster
                        mark_process_dead(pid, str(self._path))  # type: ignore[no-untyped-call]
        return [_with_unfinished(metric, unfinished) for metric in metrics if metric.name != f.KEPT.full_name]

    def sweep(self) -> None:
        """
        Fold what dead workers counted into one file per kind, and remove theirs.

        Where a pool replaces its processes all the time, their files would pile up. A worker with unfinished runs keeps
        its files, from which these are counted.
        """
        with self._locked():
            for pid in self._dead():
                if _is_running(pid) or self._unfinished(pid):
                    continue
                mark_process_dead(pid, str(self._path))  # type: ignore[no-untyped-call]
                for kind in ("counter", "histogram", "gauge_sum"):
                    self._fold(kind, pid, operator.add)
                self._fold("gauge_max", pid, max)
                self._lock_file(pid).unlink()

    def _fold(self, kind: str, pid: int, merge: Callable[[float, float], float]) -> None:
        file = self._path / f"{kind}_{pid}.db"
        if not _has_values(file):
            return
        total = MmapedDict(str(self._path / f"{kind}_{_ENDED}.db"))  # type: ignore[no-untyped-call]
        try:
            for key, value, timestamp, _ in MmapedDict.read_all_values_from_file(file):  # type: ignore[no-untyped-call]
                before, _ = total.read_value(key)  # type: ignore[no-untyped-call]
                total.write_value(key, merge(before, value), timestamp)  # type: ignore[no-untyped-call]
        finally:
            total.close()  # type: ignore[no-untyped-call]
        file.unlink()

    def _dead(self) -> set[int]:
        """The pids of workers that no longer hold their lock."""
        if not _CAN_LOCK:
            return set()
        # Never its own file: closing it would release the lock.
        files = {_pid(file): file for file in self._path.glob("aftertask_*.lock") if _pid(file) != os.getpid()}
        return {pid for pid, file in files.items() if _is_free(file)}

    def _unfinished(self, pid: int) -> Runs:
        """
        Runs that a dead worker had scheduled and not finished, and how they end.

        Only those of its own engine: a run of another one may have gone on elsewhere, and its engine knows.
        """
        sums = {family.full_name: collections.Counter[str]() for family in (f.SCHEDULED, f.FINISHED, f.KEPT)}
        for metric in _merged(self._path / f"{kind}_{pid}.db" for kind in ("counter", "gauge_sum")):
            for sample in metric.samples if metric.name in sums else ():
                if sample.labels["engine"] == LOCAL:
                    sums[metric.name][sample.labels["task"]] += int(sample.value)
        scheduled, finished, kept = sums.values()
        left = scheduled - finished
        ends = {"offloaded": left & kept, "lost": left - kept}
        return Runs({(task, end): count for end, runs in ends.items() for task, count in runs.items()})

    def _lock_file(self, pid: int) -> Path:
        return self._path / f"aftertask_{pid}.lock"

    @contextmanager
    def _locked(self, *, shared: bool = False) -> Iterator[None]:
        """Lock the directory; the lock is the process's, so its threads exclude each other by a mutex."""
        with self._mutex, (self._path / "aftertask.lock").open("a+b") as file:
            if _CAN_LOCK:
                fcntl.lockf(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
            yield


def _merged(files: Iterable[Path]) -> list[Metric]:
    names = [str(file) for file in files if _has_values(file)]
    return list(MultiProcessCollector.merge(names))  # type: ignore[no-untyped-call]


def _has_values(file: Path) -> bool:
    """False also for an empty file, which prometheus-client cannot read: its worker has only just created it."""
    try:
        return file.stat().st_size > 0
    except FileNotFoundError:
        return False


def _with_unfinished(metric: Metric, unfinished: Runs) -> Metric:
    """The metric with these runs counted, if it counts such runs."""
    if metric.name not in _COUNTS or not unfinished:
        return metric
    counted = Metric(metric.name, metric.documentation, metric.type)
    for sample in metric.samples:
        labels = sample.labels
        counts = labels.get("engine", LOCAL) == LOCAL and labels.get("reason", "crash") == "crash"
        more = unfinished[labels["task"], labels.get("outcome", "lost")] if counts else 0
        counted.add_sample(sample.name, labels, sample.value + more)
    return counted


def _is_free(lock_file: Path) -> bool:
    with lock_file.open("rb") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return True


def _pid(file: Path) -> int:
    """The pid at the end of a file's name; 0 if there is none."""
    found = _PID.search(file.name)
    return int(found[1]) if found else 0
