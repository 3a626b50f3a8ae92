"""Whether this process is one of several workers, read from the server that runs in it, however that was configured."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys

from .._log import log

_warned = False


def warn_of_several_workers() -> None:
    """Log once per start of a server with several workers that a scrape sees only one of them."""
    global _warned
    workers = 0 if _warned else _gunicorn_workers() or _spawned_workers()
    if workers > 1:
        _warned = True
        log(
            "warning",
            "metrics.several_workers",
            workers=workers,
            advice="a scrape sees one worker at a time; set PROMETHEUS_MULTIPROC_DIR to an empty directory",
        )


def _gunicorn_workers() -> int:
    """Number of gunicorn's workers so far if this is the second one, which is the first to see another; else 0."""
    # A worker is a fork of the arbiter and has its list of the workers started before it. Neither server is imported
    # here: one that runs in this process is imported already.
    arbiter = getattr(sys.modules.get("gunicorn.arbiter"), "Arbiter", None)
    ages = [getattr(worker, "age", 0) for worker in getattr(arbiter, "WORKERS", {}).values()]
    return 2 if ages == [1] else 0


def _spawned_workers() -> int:
    """Number of workers if this is the first process that a server started through `multiprocessing`; else 0."""
    # uvicorn and hypercorn name their processes SpawnProcess-1, -2, …; granian gives no numbers, so each of its workers
    # logs the warning.
    number = re.search(r"-(\d+)$", multiprocessing.current_process().name)
    if multiprocessing.parent_process() is None or (number and number[1] != "1"):
        return 0
    return _uvicorn_workers() or _requested_workers()


def _uvicorn_workers() -> int:
    """The setting of the uvicorn server that handles this process's signals; 0 if there is none."""
    uvicorn = sys.modules.get("uvicorn")
    server = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    if uvicorn is None or not isinstance(server, uvicorn.Server):
        return 0
    return 1 if server.config.reload else int(server.config.workers)


def _requested_workers() -> int:
    """The number of workers on the command line or in the environment; 0 if there is none."""
    option = re.search(r"(?:^|\0)(?:--workers|-w)[=\0]?(\d+)(?:\0|$)", "\0".join(sys.argv))
    text = option[1] if option else os.environ.get("WEB_CONCURRENCY", "")
    return int(text) if text.isdigit() else 0
