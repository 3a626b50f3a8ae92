"""Arguments that are dead when the task runs are reported when it is scheduled; live ones are not."""

from __future__ import annotations

import functools
import sqlite3
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any
from unittest.mock import AsyncMock, MagicMock, Mock
from xmlrpc.client import ServerProxy

import fastapi
import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, File, Form, Request, UploadFile
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry
from sqlalchemy import create_engine, text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship
from starlette.background import BackgroundTask
from starlette.responses import JSONResponse, StreamingResponse

from aftertask import AftertaskMiddleware, HazardFound, Settings
from aftertask.events import Failed
from aftertask.testing import Recorder
from kit import FASTAPI

#: Since 0.118 uploads and dependencies are closed after the tasks; since 0.121 there is scope="function".
ALIVE = FASTAPI >= (0, 118)
FUNCTION_SCOPE = FASTAPI >= (0, 121)

engine = create_engine("sqlite://")


class Harness:
    """An app, its client, and the hazards that were reported."""

    def __init__(self) -> None:
        self.app, self.events = FastAPI(), Recorder()
        settings = Settings(registry=CollectorRegistry())
        self.app.add_middleware(AftertaskMiddleware, settings=settings, signals=[self.events])
        self.client = TestClient(self.app, raise_server_exceptions=False)

    def found(self) -> list[tuple[str, str | None]]:
        """Each hazard's kind and argument."""
        return [(event.kind, event.argument) for event in self.events.of(HazardFound)]

    def advice(self) -> str:
        """The advice of the only one."""
        (event,) = self.events.of(HazardFound)
        return event.advice


@pytest.fixture
def harness() -> Harness:
    """A new one."""
    return Harness()


async def takes(*args: Any, **kwargs: Any) -> None:
    """Any task."""


def session_of_request() -> Iterator[Session]:
    with Session(engine) as session:
        yield session


def test_an_upload_is_dead_where_fastapi_closes_it_before_the_response(harness: Harness) -> None:
    """From 0.106 to 0.117; since then the task can read it, and nothing is reported."""
    read: list[str] = []

    async def store(number: int, file: UploadFile) -> None:
        read.append("closed" if file.file.closed else (await file.read()).decode())

    @harness.app.post("/")
    async def endpoint(tasks: BackgroundTasks, file: Annotated[UploadFile, File()]) -> None:
        tasks.add_task(store, 1, file)

    harness.client.post("/", files={"file": b"abc"})
    assert read == ["abc" if ALIVE else "closed"]  # the report is true
    assert harness.found() == ([] if ALIVE else [("closed_upload", "file")])
    if not ALIVE:
        assert fastapi.__version__ in harness.advice() and "await file.read()" in harness.advice()


def test_uploads_in_a_list_and_their_files(harness: Harness) -> None:
    """One level into containers; and the file of an upload is as dead as the upload."""

    @harness.app.post("/")
    async def endpoint(tasks: BackgroundTasks, file: Annotated[UploadFile, File()]) -> None:
        tasks.add_task(takes, files=[file])
        tasks.add_task(takes, raw=file.file)

    harness.client.post("/", files={"file": b"abc"})
    assert harness.found() == ([] if ALIVE else [("closed_upload", "files"), ("closed_upload", "raw")])


def test_an_upload_that_is_closed_already_is_dead_everywhere(harness: Harness) -> None:
    """Whoever closed it."""

    @harness.app.post("/")
    async def endpoint(tasks: BackgroundTasks, file: Annotated[UploadFile, File()]) -> None:
        await file.close()
        tasks.add_task(takes, file=file)

    harness.client.post("/", files={"file": b"abc"})
    assert harness.found() == [("closed_upload", "file")]
    assert not ALIVE or "it is closed already" in harness.advice()


def test_a_request_is_over_when_its_tasks_run(harness: Harness) -> None:
    """As an argument, and as its stream; whatever the version."""

    @harness.app.post("/")
    async def endpoint(tasks: BackgroundTasks, request: Request) -> None:
        tasks.add_task(takes, request=request)
        tasks.add_task(takes, body=request.stream())

    harness.client.post("/")
    assert harness.found() == [("request_scoped", "request"), ("request_scoped", "body")]


def test_a_responses_stream_is_used_up(harness: Harness) -> None:
    """A response that streams; another one is but data."""

    @harness.app.get("/")
    async def endpoint(tasks: BackgroundTasks) -> Any:
        response = StreamingResponse(iter([b"a"]))
        tasks.add_task(takes, response=response)
        tasks.add_task(takes, response=JSONResponse({}))
        response.background = tasks
        return response

    harness.client.get("/")
    assert harness.found() == [("response_stream", "response")]


@pytest.mark.parametrize("sync", [True, False])
def test_a_session_of_the_request(sync: bool, harness: Harness) -> None:
    """It is open when the run is scheduled, on each version, and nothing public shows when it will be closed."""

    async def asynchronous(tasks: BackgroundTasks, session: Annotated[Session, Depends(session_of_request)]) -> None:
        tasks.add_task(takes, session)

    def synchronous(tasks: BackgroundTasks, session: Annotated[Session, Depends(session_of_request)]) -> None:
        tasks.add_task(takes, session)

    harness.app.get("/")(synchronous if sync else asynchronous)
    harness.client.get("/")
    assert harness.found() == []


@pytest.mark.skipif(not FUNCTION_SCOPE, reason="no scope in this FastAPI")
def test_a_session_of_the_function(harness: Harness) -> None:
    """scope="function": the session is closed before the response; found when the task fails with it."""

    def session_of_function() -> Iterator[Session]:
        with Session(engine, close_resets_only=False) as session:
            yield session

    def write(session: Session) -> None:
        session.execute(text("select 1"))

    @harness.app.get("/")
    async def endpoint(
        tasks: BackgroundTasks, session: Session = Depends(session_of_function, scope="function")
    ) -> None:
        tasks.add_task(write, session)

    harness.client.get("/")
    (failed,) = harness.events.of(Failed)
    assert str(failed.failure.hint).startswith("argument 'session': the database session is closed")
    assert harness.found() == [("db_session", "session")]


def test_what_merely_holds_a_session_is_no_hazard(harness: Harness) -> None:
    """A service object with a session that it does not use in the task: nothing to report."""

    class Service:
        def __init__(self, session: Session) -> None:
            self.session = session

        def send(self) -> None:
            """Never touches the session."""

    scope: dict[str, Any] = {"scope": "function"} if FUNCTION_SCOPE else {}

    @harness.app.get("/")
    async def endpoint(tasks: BackgroundTasks, session: Session = Depends(session_of_request, **scope)) -> None:
        tasks.add_task(Service(session).send)
        tasks.add_task(takes, service=Service(session))

    harness.client.get("/")
    assert harness.found() == []


def test_a_closed_connection_is_a_hazard(harness: Harness) -> None:
    """It reports itself that it is closed; here for a task that the response carries."""

    @harness.app.get("/")
    async def endpoint() -> JSONResponse:
        with engine.connect() as connection:
            pass
        return JSONResponse({}, background=BackgroundTask(takes, connection=connection))

    harness.client.get("/")
    assert harness.found() == [("db_session", "connection")]


def test_partials_methods_and_closures_carry_arguments_too(harness: Harness) -> None:
    """A partial, a nested function and a bound method bring values; what the method's object holds is no hazard."""

    class Job:
        def __init__(self, request: Request) -> None:
            self.request = request

        async def run(self) -> None:
            """Its object is not looked into."""

    @harness.app.get("/")
    async def endpoint(tasks: BackgroundTasks, request: Request) -> None:
        async def inner() -> None:
            _ = request

        tasks.add_task(functools.partial(takes, held=request))
        tasks.add_task(inner)
        tasks.add_task(request.is_disconnected)
        tasks.add_task(Job(request).run)

    harness.client.get("/")
    assert harness.found() == [("request_scoped", name) for name in ("held", "request", "self")]


def record(request: Request, code: int, note: str = "") -> None:
    """A task with positional arguments."""


def record_keyword(code: int, *, request: Request) -> None:
    """A task with a keyword argument."""


PARTIALS: list[Callable[[Request], tuple[Callable[..., Any], tuple[Any, ...]]]] = [
    lambda request: (record, (request, 1)),
    lambda request: (functools.partial(record, request), (1,)),
    lambda request: (functools.partial(record, note="x"), (request, 1)),
    lambda request: (functools.partial(record_keyword, request=request), (1,)),
    lambda request: (functools.partial(functools.partial(record, request), 1), ()),
]


@pytest.mark.parametrize("given", PARTIALS)
def test_an_argument_has_its_name_whoever_binds_it(given: Any, harness: Harness) -> None:
    """Positional arguments that a partial binds shift no names."""

    @harness.app.get("/")
    async def endpoint(tasks: BackgroundTasks, request: Request) -> None:
        func, args = given(request)
        tasks.add_task(func, *args)

    harness.client.get("/")
    assert harness.found() == [("request_scoped", "request")]


@pytest.mark.parametrize("make", [MagicMock, AsyncMock, Mock, lambda: ServerProxy("http://127.0.0.1:9/").send])
def test_a_task_that_makes_up_attributes_is_left_alone(
    make: Callable[[], Any], harness: Harness, caplog: pytest.LogCaptureFixture
) -> None:
    """Mocks and remote proxies are tasks like any other: no endless look, no error of aftertask's, no warning."""

    @harness.app.get("/")
    async def endpoint(tasks: BackgroundTasks) -> None:
        tasks.add_task(make(), make(), each=[make()])

    assert harness.client.get("/").status_code == (500 if "ServerProxy" in repr(make()) else 200)
    assert harness.found() == []
    assert [record.message for record in caplog.records if record.message.startswith("signal.failed")] == []


def test_a_variable_that_is_not_assigned_yet_is_left_alone(harness: Harness, caplog: pytest.LogCaptureFixture) -> None:
    """A nested function may use a variable that gets its value later."""

    @harness.app.get("/")
    async def endpoint(tasks: BackgroundTasks) -> None:
        def inner() -> None:
            assert later

        tasks.add_task(inner)
        later = 1

    assert harness.client.get("/").status_code == 200
    assert [record.message for record in caplog.records if record.message.startswith("signal.failed")] == []


def test_large_arguments(harness: Harness) -> None:
    """Bytes, text and containers that would stay in memory while the run waits."""

    @harness.app.get("/")
    async def endpoint(tasks: BackgroundTasks) -> None:
        tasks.add_task(takes, data=b"x" * 12_000_000)
        tasks.add_task(takes, rows=list(range(1_000_000)))
        tasks.add_task(takes, view=memoryview(bytearray(10_000_000)))
        tasks.add_task(takes, data=b"x" * 1_000_000, rows=[1] * 1000)

    harness.client.get("/")
    assert harness.found() == [("large_argument", name) for name in ("data", "rows", "view")]
    assert "12 MB" in harness.events.of(HazardFound)[0].advice
    assert "1,000,000 elements" in harness.events.of(HazardFound)[1].advice


class Model:
    """Data of the app."""


PLAIN = [1, 1.5, True, None, "text", b"bytes", (1, 2), [1], {"a": 1}, {1}, uuid.uuid4(), datetime.now(UTC), Decimal(1)]


def test_plain_arguments_are_no_hazard(harness: Harness) -> None:
    """Data, functions, classes, objects of the app's own."""

    @harness.app.get("/")
    async def endpoint(tasks: BackgroundTasks) -> None:
        for value in [*PLAIN, Model(), Model, takes, [Model()], {"a": Model()}, lambda: None, PLAIN]:
            tasks.add_task(takes, value, value=value)

    harness.client.get("/")
    assert harness.found() == []


@pytest.mark.parametrize("text_of", ["file", "session"])
def test_a_failure_by_a_dead_argument_points_to_it(text_of: str, harness: Harness, request: Any) -> None:
    """In the failure itself, so in its log line, and as a hazard: the argument by name."""

    async def reads(file: UploadFile) -> None:
        file.file.close()  # what FastAPI did before 0.118
        file.file.read()

    async def queries(connection: Any) -> None:
        connection.close()
        connection.execute(text("select 1"))

    @harness.app.post("/")
    async def endpoint(tasks: BackgroundTasks, file: Annotated[UploadFile, File()]) -> None:
        if text_of == "file":
            tasks.add_task(reads, file)
        else:
            tasks.add_task(queries, engine.connect())

    harness.client.post("/", files={"file": b"abc"})
    (failed,) = harness.events.of(Failed)
    argument, kind = ("file", "closed_upload") if text_of == "file" else ("connection", "db_session")
    assert str(failed.failure.hint).startswith(f"argument {argument!r}: ")
    assert harness.found()[-1] == (kind, argument)


class Repository:
    """An object of the app's that holds a connection."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection

    async def load(self, request: Request | None = None) -> None:
        """Use the connection."""
        self.connection.execute(text("select 1"))


def test_a_failure_by_what_an_object_holds_points_to_the_object(harness: Harness) -> None:
    """What an object merely holds is looked at once the run has failed with something closed."""

    @harness.app.get("/")
    async def endpoint(tasks: BackgroundTasks) -> None:
        with engine.connect() as connection:
            tasks.add_task(Repository(connection).load)

    harness.client.get("/")
    (failed,) = harness.events.of(Failed)
    assert str(failed.failure.hint).startswith("argument 'self': the database session is closed")
    assert harness.found() == [("db_session", "self")]


def test_a_failure_points_to_an_argument_of_the_kind_that_was_closed(harness: Harness) -> None:
    """A closed connection does not come from the request, though that was given first."""

    async def loads(request: Request, connection: Any) -> None:
        connection.close()
        connection.execute(text("select 1"))

    @harness.app.get("/")
    async def endpoint(tasks: BackgroundTasks, request: Request) -> None:
        tasks.add_task(loads, request, engine.connect())

    harness.client.get("/")
    (failed,) = harness.events.of(Failed)
    assert str(failed.failure.hint).startswith("argument 'connection': ")


class Base(DeclarativeBase):
    pass


class Parent(Base):
    __tablename__ = "parent"
    id: Mapped[int] = mapped_column(primary_key=True)
    children: Mapped[list[Child]] = relationship()


class Child(Base):
    __tablename__ = "child"
    id: Mapped[int] = mapped_column(primary_key=True)
    parent_id: Mapped[int] = mapped_column(__import__("sqlalchemy").ForeignKey("parent.id"))


def test_a_row_without_its_session_points_to_the_session(harness: Harness) -> None:
    """The commonest of all failures with a database: a lazy attribute of a detached row."""

    async def counts(row: Parent) -> None:
        assert len(row.children) == 0

    @harness.app.get("/")
    async def endpoint(tasks: BackgroundTasks) -> None:
        made = create_engine("sqlite://")
        Base.metadata.create_all(made)
        with Session(made) as session:
            row = Parent(id=1)
            session.add(row)
            session.commit()
            session.refresh(row, ["id"])
        tasks.add_task(counts, row)
        made.dispose()

    harness.client.get("/")
    (failed,) = harness.events.of(Failed)
    assert "pass its id" in str(failed.failure.hint)
    assert harness.found() == [("db_session", None)]


def test_other_failures_point_nowhere(harness: Harness) -> None:
    """A ValueError of the task's own is no closed file."""

    async def fails(file: UploadFile) -> None:
        raise ValueError("no such customer")

    @harness.app.post("/")
    async def endpoint(
        tasks: BackgroundTasks, file: Annotated[UploadFile, File()], note: Annotated[str, Form()] = ""
    ) -> None:
        tasks.add_task(fails, file)

    harness.client.post("/", files={"file": b"abc"})
    assert harness.events.of(Failed)[0].failure.hint is None


def hostile() -> Any:
    """An object that raises at whatever it is asked."""

    class Hostile:
        def __getattribute__(self, name: str) -> Any:
            raise RuntimeError(name)

        def __len__(self) -> int:
            raise RuntimeError("len")

    return Hostile()


def test_hostile_arguments_break_nothing(harness: Harness, caplog: pytest.LogCaptureFixture) -> None:
    """What cannot be looked at is left alone; the task runs."""
    ran: list[int] = []

    def task_of(value: Any) -> None:
        ran.append(1)

    @harness.app.get("/")
    async def endpoint(tasks: BackgroundTasks, session: Annotated[Session, Depends(session_of_request)]) -> None:
        tasks.add_task(task_of, hostile())
        tasks.add_task(task_of, [hostile()])

    assert harness.client.get("/").status_code == 200
    assert ran == [1, 1]
    assert [record.message for record in caplog.records if record.message.startswith("signal.failed")] == []


Make = Callable[[], Any]


@pytest.mark.parametrize("make", [lambda: sqlite3.connect(":memory:"), lambda: Session(engine)])
def test_a_session_of_ones_own_is_no_hazard(make: Make, harness: Harness) -> None:
    """Whoever opens it for the task may give it to the task."""

    async def uses(session: Any) -> None:
        session.close()

    @harness.app.get("/")
    async def endpoint(tasks: BackgroundTasks) -> None:
        tasks.add_task(uses, make())

    harness.client.get("/")
    assert harness.found() == []


def test_an_option_given_to_add_task_is_named(harness: Harness) -> None:
    """It reaches the function, which does not take it. A wrong call inside the function has no such hint."""

    def send(to: str) -> None:
        if to == "inside":
            dict.fromkeys([], timeout=3)  # type: ignore[call-overload]

    @harness.app.get("/")
    def endpoint(tasks: BackgroundTasks) -> None:
        tasks.add_task(send, "x", timeout=3)

    @harness.app.get("/inside")
    def inside(tasks: BackgroundTasks) -> None:
        tasks.add_task(send, "inside")

    @harness.app.get("/name")
    def name(tasks: BackgroundTasks) -> None:
        tasks.add_task(send, "x", name="no option of one call")

    for path in ("/", "/inside", "/name"):
        harness.client.get(path)

    misplaced, *others = (event.failure.hint for event in harness.events.of(Failed))
    assert misplaced == (
        "add_task passes timeout to the function; an option of the task is set with "
        "add_task(options(func, timeout=…), …)"
    )
    assert others == [None, None]
