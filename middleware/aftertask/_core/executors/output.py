"""
What a task prints and logs in a worker process, carried to the parent's stdout, stderr and logging.

The worker appends lines to a temporary file, and a thread of the parent follows it: a killed worker loses none.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any, TextIO

from ..._log import bind_context, context_keys, log
from ..._text import type_name
from ..process import start_thread

#: Characters of one attempt's output; what follows is left out.
LONGEST_OUTPUT = 10_000_000

#: Seconds between two looks at the file.
_LOOK_EVERY = 0.2


@dataclass(frozen=True, slots=True)
class Output:
    """
    Where a worker writes what a task prints and logs.

    Attributes:
        path: The file.
        level: The level of the parent's root logger.
        keys: What is bound for structlog in the parent, such as the keys of the run.
    """

    path: str
    level: int
    keys: dict[str, Any]


# --- in the parent


@contextlib.contextmanager
def followed() -> Iterator[Output | None]:
    """A file for a worker, whose lines are handed on until the end of the block; None if there can be no file."""
    try:
        handle, path = tempfile.mkstemp(prefix="aftertask-", suffix=".jsonl")
    except OSError as error:
        _lost(error)
        yield None
        return
    plain = {key: value for key, value in context_keys().items() if isinstance(value, (str, int, float))}
    reader = _Reader(open(handle, encoding="utf-8"))  # noqa: SIM115  # closed below
    # The lines are logged in the context of the run, so that they get its keys.
    context = copy_context()
    with contextlib.suppress(RuntimeError):  # no thread can be started: the lines come when the attempt is over
        start_thread("worker-output", lambda: context.run(reader.follow))
    try:
        yield Output(path, logging.getLogger().getEffectiveLevel(), plain)
    finally:
        reader.close()
        with contextlib.suppress(OSError):
            os.unlink(path)


class _Reader:
    """Hands the lines of a file on, as they come."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._rest = file, ""
        self._lock, self._ended = threading.Lock(), threading.Event()

    def follow(self) -> None:
        while not self._ended.wait(_LOOK_EVERY):
            self._read()

    def close(self) -> None:
        self._ended.set()
        self._read()
        with self._lock:
            self._file.close()

    def _read(self) -> None:
        with self._lock:
            if self._file.closed:
                return
            *lines, self._rest = (self._rest + self._file.read()).split("\n")
            for line in lines:
                try:
                    _hand_on(json.loads(line))
                except Exception as error:  # of the app's own logging
                    _lost(error)


def _hand_on(line: dict[str, Any]) -> None:
    if "record" in line:
        record = logging.makeLogRecord(line["record"])
        logger = logging.getLogger(record.name)
        if logger.isEnabledFor(record.levelno):
            logger.handle(record)
        return
    stream: TextIO | None = getattr(sys, line["stream"])
    if stream is not None:
        stream.write(line["text"])
        stream.flush()


def _lost(error: Exception) -> None:
    log("warning", "worker.output_lost", error_type=type_name(type(error)), error_message=str(error))


# --- in the worker


class _Sink:
    """Writes to the file of the current call; between two calls there is none."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._file: TextIO | None = None
        self._left = 0

    def begin(self, path: str) -> None:
        with contextlib.suppress(OSError), self._lock:
            self._file, self._left = open(path, "a", encoding="utf-8"), LONGEST_OUTPUT  # noqa: SIM115

    def end(self) -> None:
        with contextlib.suppress(OSError), self._lock:
            file, self._file = self._file, None
            if file is not None:
                file.close()

    def write(self, line: dict[str, Any]) -> None:
        # A disk that is full must not fail the task.
        with contextlib.suppress(OSError), self._lock:
            text = json.dumps(line, default=str)
            if self._file is not None and self._left > 0:
                self._left -= len(text)
                if self._left <= 0:
                    text = json.dumps({"stream": "stderr", "text": "[aftertask: the rest of the output is left out]\n"})
                self._file.write(f"{text}\n")
                self._file.flush()


class _Lines(io.RawIOBase):
    """Takes the place of stdout or stderr: whole lines go to the sink."""

    def __init__(self, name: str, sink: _Sink) -> None:
        self._name, self._sink, self._rest = name, sink, b""
        self._nowhere = os.open(os.devnull, os.O_WRONLY)

    def writable(self) -> bool:
        """Always True."""
        return True

    def fileno(self) -> int:
        """That of the null device, for programs that a task starts."""
        return self._nowhere

    def write(self, data: Any) -> int:
        """Keep the text until its line ends."""
        lines, newline, self._rest = (self._rest + bytes(data)).rpartition(b"\n")
        if newline:
            self._sink.write({"stream": self._name, "text": (lines + newline).decode(errors="replace")})
        return len(data)

    def finish(self) -> None:
        """End a line that has not ended."""
        if self._rest:
            self.write(b"\n")


class _Forward(logging.Handler):
    """Writes records to the sink as plain data."""

    def __init__(self, sink: _Sink) -> None:
        super().__init__()
        self._sink = sink

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        values = {key: value for key, value in vars(record).items() if key not in ("args", "exc_info")}
        if record.exc_info and not record.exc_text:
            values["exc_text"] = logging.Formatter().formatException(record.exc_info)
        values["msg"] = record.getMessage()
        plain = (str, int, float, bool, type(None))
        values |= {key: str(value) for key, value in values.items() if not isinstance(value, plain)}
        self._sink.write({"record": values})


class _Worker:
    """What replaces stdout, stderr and the handlers of logging; one a process, made by the first call."""

    def __init__(self) -> None:
        self.sink = _Sink()
        self.forward = _Forward(self.sink)
        self._lines = [_Lines("stdout", self.sink), _Lines("stderr", self.sink)]
        # They stay: what the app's modules create at import, such as handlers, may keep them.
        sys.stdout, sys.stderr = self._streams = [
            io.TextIOWrapper(io.BufferedWriter(each), "utf-8", "backslashreplace", line_buffering=True)
            for each in self._lines
        ]

    def finish(self) -> None:
        """Write what is left of a line."""
        for stream, lines in zip(self._streams, self._lines, strict=True):
            stream.flush()
            lines.finish()


_worker = functools.cache(_Worker)


@contextlib.contextmanager
def captured(output: Output | None) -> Iterator[None]:
    """Write what is printed and logged to the file of the parent; used by one call at a time."""
    if output is None:
        yield
        return
    worker = _worker()
    worker.sink.begin(output.path)
    forward_logging(output)
    bind_context(output.keys)
    try:
        yield
    finally:
        worker.finish()
        worker.sink.end()


def forward_logging(output: Output | None) -> None:
    """Make the parent's logging the only one; again after the app's modules were imported, which may configure it."""
    if output is not None:
        root = logging.getLogger()
        root.handlers[:] = [_worker().forward]
        root.setLevel(output.level)
