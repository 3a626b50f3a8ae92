"""`executor="process"`: what crosses to a worker process, and what comes back."""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import traceback
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import structlog
from fastapi import BackgroundTasks as Injected
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry
from starlette.background import BackgroundTask

from aftertask import AftertaskMiddleware, Retry, Settings, options
from aftertask.errors import NotSerializable, ProcessTaskError
from aftertask.events import Abandoned, Failed, Rejected, Succeeded, TimedOut
from aftertask.signals import Logs, RunFilter
from aftertask.testing import Recorder, VirtualClock
from kit import Env, answering, drive

# A worker process starts within seconds, but not on a busy machine.
pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]

# Every test that runs a worker starts one, which takes a second: what is the same on both backends is tested on one.
on_asyncio = pytest.mark.parametrize("anyio_backend", ["asyncio"])


def note(path: str, text: str) -> None:
    """Append a line to a file."""
    with open(path, "a") as file:
        file.write(f"{text}\n")


def note_pid(path: str, *, times: int = 1) -> None:
    """Append the id of this process to a file."""
    for _ in range(times):
        note(path, str(os.getpid()))


async def note_pid_async(path: str) -> None:
    """The same in an async function."""
    await anyio.lowlevel.checkpoint()
    note_pid(path)


async def note_backend(path: str) -> None:
    """Append the kind of this event loop to a file."""
    note(path, anyio.get_cancelled_exc_class().__module__.partition(".")[0])


async def drive_in_process(env: Env, func: Any, *args: Any, **policy: Any) -> Failed | Succeeded:
    """Run a function in a worker process; returns the event of its end."""
    await drive(env.app(answering(BackgroundTask(options(func, executor="process", **policy), *args))))
    event = env.seen.events[-1]
    assert isinstance(event, (Failed, Succeeded)), event
    return event


async def failure_in_process(env: Env, func: Any, *args: Any, **policy: Any) -> Failed:
    """The same for a function that fails."""
    event = await drive_in_process(env, func, *args, **policy)
    assert isinstance(event, Failed)
    return event


async def test_a_function_runs_in_another_process(env: Env, tmp_path: Path, anyio_backend_name: str) -> None:
    """Sync or async, it gets its arguments; an async one has an event loop of the app's kind."""
    file = tmp_path / "pids"
    await drive_in_process(env, note_pid, str(file))
    await drive_in_process(env, note_pid_async, str(file))
    await drive(env.app(answering(BackgroundTask(options(note_pid, executor="process"), str(file), times=2))))
    pids = file.read_text().split()
    assert len(pids) == 4
    assert str(os.getpid()) not in pids
    assert [run.info.executor for run in env.seen.runs()] == ["process"] * 3
    await drive_in_process(env, note_backend, str(file))
    assert file.read_text().split()[-1] == anyio_backend_name


# --- what it prints and logs


def talk(path: str | None = None) -> None:
    """Print and log in every way; with a path, until it is killed."""
    print("printed\nand more", end="")  # noqa: T201  # what this is about
    print("to stderr", file=sys.stderr)  # noqa: T201
    sys.stdout.buffer.write(b"bytes\n")
    logging.getLogger("talk").warning("half of %d", 3, extra={"order": 7})
    structlog.get_logger().info("by structlog")
    try:
        find()
    except LookupError:
        logging.getLogger("talk").exception("caught")
    if path is not None:
        note_pid(path)
        never_ends(path)


@on_asyncio
async def test_prints_and_log_lines_reach_the_parent_with_the_runs_keys(
    env: Env, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """As if the task ran here: stdout, stderr, records with their extras and stacks, structlog's bound keys."""
    caplog.handler.addFilter(RunFilter())
    await drive(env.app_with_signals([Logs(), env.seen], answering(BackgroundTask(options(talk, executor="process")))))
    (run,) = env.seen.runs()
    out, err = capsys.readouterr()
    assert out.startswith("printed\nand more")
    assert "bytes\n" in out
    assert "by structlog" in out and run.id in out
    assert "to stderr\n" in err
    half, caught = (record for record in caplog.records if record.name == "talk")
    assert (half.getMessage(), half.levelno, vars(half)["order"]) == ("half of 3", logging.WARNING, 7)
    assert vars(half)["run_id"] == run.id
    assert half.process != os.getpid()
    assert "LookupError" in str(caught.exc_text)


@on_asyncio
async def test_what_a_killed_worker_wrote_is_not_lost(
    env: Env, clock: VirtualClock, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The timeout kills the process, and what it had printed until then is there."""
    file = tmp_path / "begun"
    func = options(talk, executor="process", timeout=5)
    async with anyio.create_task_group() as group:
        group.start_soon(drive, env.app(answering(BackgroundTask(func, str(file)))))
        with anyio.fail_after(50):
            while not file.exists():  # noqa: ASYNC110  # the file is the only sign
                await anyio.sleep(0.01)
        clock.advance(5)
    assert [type(event) for event in env.seen.events][-1] is TimedOut
    assert "printed\nand more" in capsys.readouterr().out


# --- exceptions


class PaymentError(Exception):
    """An error that cannot be rebuilt from its `args`."""

    def __init__(self, code: int, detail: str) -> None:
        super().__init__(f"{code}: {detail}")


class CardError(PaymentError):
    """A subclass of it."""


class CodeError(Exception):
    """An error that would be rebuilt with another message."""

    def __init__(self, code: object) -> None:
        super().__init__(f"code {code}")


def pay(path: str | None = None) -> None:
    """A task that fails, several calls deep."""
    if path is not None:
        note_pid(path)
    charge()


def charge() -> None:
    """The function that raises."""
    raise CardError(402, "no card")


def look_up() -> None:
    """A task that fails with an exception that can be rebuilt."""
    find()


def find() -> None:
    """The function that raises, with a cause."""
    try:
        {}["order"]
    except KeyError as error:
        raise LookupError("no such order") from error


async def look_up_async() -> None:
    """The same in an async function."""
    await anyio.lowlevel.checkpoint()
    find()


def raise_code() -> None:
    """A task whose error would be rebuilt with another message."""
    raise CodeError(7)


@on_asyncio
async def test_a_failure_is_the_tasks_own_exception(env: Env) -> None:
    """It has its class and text, and a printed traceback shows the stack in the worker, causes included."""
    for func in (look_up, look_up_async):
        event = await failure_in_process(env, func)
        assert (type(event.error), str(event.error)) == (LookupError, "no such order")
        assert (event.failure.type, event.failure.message) == ("LookupError", "no such order")
        printed = "".join(traceback.format_exception(event.error))
        for text in (event.failure.stack, printed):
            assert f"in {func.__name__}\n" in text
            assert "in find\n" in text
            assert "KeyError: 'order'" in text


@on_asyncio
async def test_an_exception_that_cannot_be_rebuilt_keeps_class_text_and_stack(env: Env) -> None:
    """It is raised as `ProcessTaskError`; every signal sees the class it had in the worker."""
    for func, kind, message, frame in (
        (pay, CardError, "402: no card", "charge"),
        (raise_code, CodeError, "code 7", "raise_code"),
    ):
        event = await failure_in_process(env, func)
        assert isinstance(event.error, ProcessTaskError)
        assert event.failure.type == f"{kind.__module__}.{kind.__qualname__}"
        assert event.failure.message == str(event.error) == message
        assert event.failure.stack.splitlines()[-1].endswith(message)
        assert f"in {frame}\n" in "".join(traceback.format_exception(event.error))


@on_asyncio
async def test_the_stack_begins_with_the_task(env: Env) -> None:
    """Neither our frames nor anyio's are in it."""
    for func, frames in ((pay, ["pay", "charge"]), (note_pid_async, ["note_pid_async", "note_pid", "note"])):
        error = (await failure_in_process(env, func, *([] if func is pay else ["/no/such/folder"]))).error
        remote = error if isinstance(error, ProcessTaskError) else error.__cause__
        assert isinstance(remote, ProcessTaskError)
        lines = [line for line in remote.stack.splitlines() if line.startswith("  File ")]
        assert [line.rpartition(" in ")[2] for line in lines] == frames


@on_asyncio
async def test_expected_and_retry_match_by_class_name(env: Env, tmp_path: Path) -> None:
    """They match the name of a base class, too, if the exception itself cannot be rebuilt."""
    file = tmp_path / "pids"
    retry = Retry(attempts=3, wait_initial=0, on=PaymentError)
    event = await failure_in_process(env, pay, str(file), retry=retry, expected=PaymentError)
    assert event.attempt == len(file.read_text().split()) == 3
    assert not event.bad
    event = await failure_in_process(env, pay, retry=Retry(wait_initial=0, on=CodeError), expected=CodeError)
    assert event.attempt == 1
    assert event.bad


def exit_there() -> None:
    """A task that ends its process, as a command-line tool does."""
    sys.exit("bad option")


def interrupt_there() -> None:
    """A task that raises what Ctrl+C raises."""
    raise KeyboardInterrupt


async def cancel_there() -> None:
    """A task that raises a cancellation of its own."""
    raise asyncio.CancelledError


@on_asyncio
async def test_a_base_exception_in_a_worker_fails_the_run_only(env: Env) -> None:
    """`SystemExit`, `KeyboardInterrupt` and the task's own `CancelledError` stay in the worker; none is retried."""
    names = []
    for func in (exit_there, interrupt_there, cancel_there):
        event = await failure_in_process(env, func, retry=Retry(wait_initial=0))
        names.append((event.failure.type, event.attempt, event.bad))
        assert f"in {func.__name__}\n" in event.failure.stack
    assert names == [
        ("SystemExit", 1, True),
        ("KeyboardInterrupt", 1, True),
        ("asyncio.exceptions.CancelledError", 1, True),
    ]


def die() -> None:
    """A task whose process ends as one that the kernel kills."""
    os._exit(9)


@on_asyncio
async def test_a_process_that_dies_fails_the_run(env: Env, tmp_path: Path) -> None:
    """The next run gets a new process."""
    assert (await failure_in_process(env, die)).failure.type.endswith("BrokenWorkerProcess")
    assert isinstance(await drive_in_process(env, note_pid, str(tmp_path / "pids")), Succeeded)


# --- arguments and results


def count(path: str) -> Any:
    """A task whose result cannot be pickled."""
    note_pid(path)
    return (row for row in [1])


@on_asyncio
async def test_a_result_stays_in_the_worker(env: Env, tmp_path: Path) -> None:
    """A run whose result cannot be pickled has succeeded and is not repeated."""
    file = tmp_path / "pids"
    event = await drive_in_process(env, count, str(file), retry=Retry(wait_initial=0))
    assert isinstance(event, Succeeded)
    assert len(file.read_text().split()) == 1


class Unreadable:
    """An argument that can be pickled, but not be rebuilt."""

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("written by a newer version")

    def __getstate__(self) -> object:
        return 1


@on_asyncio
async def test_an_argument_that_cannot_be_rebuilt_fails_the_run(env: Env) -> None:
    """The failure has the worker's error and stack."""
    event = await failure_in_process(env, print, Unreadable())
    assert event.failure.message == "written by a newer version"
    assert "in __setstate__\n" in event.failure.stack


async def test_an_argument_that_cannot_be_pickled_is_refused_by_add_task() -> None:
    """The error names the argument, never its value, and the handler may respond to it."""
    recorder = Recorder()
    app = FastAPI()

    @app.get("/")
    async def endpoint(tasks: Injected) -> Any:
        try:
            tasks.add_task(options(note_pid, executor="process"), "secret", times=threading.Lock())
        except NotSerializable as error:
            return JSONResponse(str(error), 500)
        return "accepted"

    chosen = Settings(metrics_path=None, registry=CollectorRegistry())
    app.add_middleware(AftertaskMiddleware, settings=chosen, signals=[recorder])
    r = await drive(app)
    assert b"argument 'times' (lock) cannot be pickled" in r.body
    assert b"secret" not in r.body
    assert [event.reason for event in recorder.of(Rejected)] == ["not_serializable"]


async def test_a_local_function_is_rejected_with_its_response(env: Env) -> None:
    """A response's tasks are checked when it starts: the run is rejected, and the client gets its response."""

    def local() -> None: ...

    r = await drive(env.app(answering(BackgroundTask(options(local, executor="process")))))
    assert (r.status, r.exc) == (200, None)
    assert [event.reason for event in env.seen.of(Rejected)] == ["not_serializable"]


# --- cancellation


def never_ends(path: str) -> None:
    """A task that notes its start and never ends."""
    note_pid(path)
    threading.Event().wait()


async def test_a_process_past_its_timeout_is_killed(env: Env, clock: VirtualClock, tmp_path: Path) -> None:
    """Nothing is abandoned, so a retry is safe."""
    file = tmp_path / "pids"
    file.touch()
    func = options(never_ends, executor="process", timeout=5, retry=Retry(attempts=2, wait_initial=0))
    async with anyio.create_task_group() as group:
        group.start_soon(drive, env.app(answering(BackgroundTask(func, str(file)))))
        for attempt in (1, 2):
            with anyio.fail_after(50):
                while len(file.read_text().split()) < attempt:  # noqa: ASYNC110  # the file is the only sign
                    await anyio.sleep(0.01)
            clock.advance(5)
            if attempt == 1:
                await clock.until_waiting()
                clock.advance(0)
    assert [event.attempt for event in env.seen.of(TimedOut)] == [2]
    assert env.seen.of(Abandoned) == []
    for pid in file.read_text().split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


# --- an app in the main module

MAIN = """
    from fastapi import BackgroundTasks, FastAPI
    from prometheus_client import CollectorRegistry
    from starlette.testclient import TestClient
    from aftertask import AftertaskMiddleware, Settings, task

    class PaymentError(Exception):
        def __init__(self, code, detail):
            super().__init__(f"{code}: {detail}")

    class OrderError(Exception):
        pass

    @task(executor="process", expected=PaymentError)
    def pay():
        raise PaymentError(402, "no card")

    @task(executor="process", expected=OrderError)
    def order():
        raise OrderError("sold out")

    def main():
        app, seen = FastAPI(), []
        settings = Settings(registry=CollectorRegistry(), on_failure="contain")
        app.add_middleware(AftertaskMiddleware, settings=settings, signals=[seen.append])

        @app.get("/")
        async def endpoint(tasks: BackgroundTasks):
            tasks.add_task(pay)
            tasks.add_task(order)

        with TestClient(app) as client:
            client.get("/")
        for event in seen:
            if type(event).__name__ == "Failed":
                print(event.failure.type, event.bad, type(event.error).__name__)

    if __name__ == "__main__":
        main()
"""


@pytest.mark.parametrize(
    ("command", "module"),
    [
        pytest.param(["app.py"], "__main__", id="a file"),
        pytest.param(["-c", "import app; app.main()"], "app", id="no file"),  # a worker has no main module then
    ],
)
def test_the_classes_of_the_app_are_found(tmp_path: Path, command: list[str], module: str) -> None:
    """A worker has a main module under another name; `expected` matches all the same."""
    (tmp_path / "app.py").write_text(textwrap.dedent(MAIN))
    ended = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, timeout=50)
    assert ended.stdout.splitlines() == [
        f"{module}.PaymentError False ProcessTaskError",
        f"{module}.OrderError False OrderError",
    ], ended.stderr
