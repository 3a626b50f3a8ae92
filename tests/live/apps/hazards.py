"""An app that does on purpose what makes background tasks fail, one thing in each endpoint; `/healthy` does not."""

import asyncio
import json
import sys
import threading
import time
from collections.abc import Iterator
from typing import Annotated, Any

from fastapi import BackgroundTasks, Depends, FastAPI, File, Request, UploadFile, WebSocket
from sqlalchemy import create_engine
from sqlalchemy.orm import Session
from starlette.responses import JSONResponse, StreamingResponse

from aftertask import AftertaskMiddleware, HazardFound, Settings, task
from aftertask.events import Signal
from aftertask.signals import usual

app = FastAPI()
engine = create_engine("sqlite://")
go = threading.Event()
gathered = 0


def session() -> Iterator[Session]:
    with Session(engine) as made:
        yield made


async def takes(value: Any) -> None:
    """Any task."""


@task(name="crowd")
async def crowd(culprit: bool, size: int) -> None:
    global gathered
    gathered += 1
    while gathered < size:  # noqa: ASYNC110  # they wait for each other
        await asyncio.sleep(0.005)
    if culprit:
        time.sleep(0.4)  # noqa: ASYNC251  # on purpose
    await asyncio.sleep(0.02)


async def blocks() -> None:
    time.sleep(0.5)  # noqa: ASYNC251  # on purpose


def holds() -> None:
    go.wait(60)


def generates() -> Iterator[int]:
    yield 1


async def answers() -> JSONResponse:
    return JSONResponse({})


async def adds(tasks: BackgroundTasks) -> None:
    tasks.add_task(takes, 1)


async def reads(file: UploadFile) -> None:
    file.file.read()


@app.post("/crowd")
async def start_crowd(tasks: BackgroundTasks, culprit: bool, size: int) -> None:
    tasks.add_task(crowd, culprit, size)


@app.post("/again")
async def again() -> None:
    global gathered
    gathered = 0


@app.post("/blocked_loop")
async def blocked_loop(tasks: BackgroundTasks) -> None:
    tasks.add_task(blocks)


@app.post("/endpoint_blocks")
async def endpoint_blocks() -> None:
    time.sleep(0.5)  # noqa: ASYNC251  # on purpose


@app.post("/starved_threads")
async def starved_threads(tasks: BackgroundTasks) -> None:
    tasks.add_task(holds)


@app.post("/let_go")
async def let_go() -> None:
    go.set()


@app.post("/generator")
async def generator(tasks: BackgroundTasks) -> None:
    tasks.add_task(generates)


@app.post("/response_returned")
async def response_returned(tasks: BackgroundTasks) -> None:
    tasks.add_task(answers)


@app.post("/mutated_tasks")
async def mutated_tasks(tasks: BackgroundTasks) -> None:
    tasks.add_task(adds, tasks)


@app.post("/closed_upload")
async def closed_upload(tasks: BackgroundTasks, file: Annotated[UploadFile, File()]) -> None:
    await file.close()
    tasks.add_task(reads, file)


@app.post("/request_scoped")
async def request_scoped(tasks: BackgroundTasks, request: Request) -> None:
    tasks.add_task(takes, request)


@app.post("/db_session")
async def db_session(tasks: BackgroundTasks) -> None:
    with engine.connect() as connection:
        pass
    tasks.add_task(takes, connection)


@app.post("/response_stream")
async def response_stream(tasks: BackgroundTasks) -> None:
    tasks.add_task(takes, StreamingResponse(iter([])))


@app.post("/large_argument")
async def large_argument(tasks: BackgroundTasks) -> None:
    tasks.add_task(takes, bytes(11_000_000))


@app.websocket("/websocket")
async def websocket(socket: WebSocket, tasks: BackgroundTasks) -> None:
    await socket.accept()
    tasks.add_task(takes, 1)
    await socket.close()


# --- what a healthy app does


@task(name="mail", timeout=5)
async def mail(address: str, data: dict[str, Any]) -> None:
    await asyncio.sleep(0.01)


@task(name="thumbnail")
def thumbnail(data: bytes) -> None:
    time.sleep(0.005)


async def uses(session: Session, file: UploadFile) -> None:
    await file.read()


@app.post("/healthy")
async def healthy(
    tasks: BackgroundTasks, file: Annotated[UploadFile, File()], session: Annotated[Session, Depends(session)]
) -> None:
    tasks.add_task(mail, "a@example.org", {"order": [1, 2, 3], "at": time.time()})
    tasks.add_task(thumbnail, b"x" * 1000)
    tasks.add_task(uses, session, file)


class Found(Signal):
    """Each finding: the log has only one per task and kind."""

    def hazard_found(self, event: HazardFound) -> None:
        """Write a line."""
        sys.stderr.write(json.dumps({"event": "found", "kind": event.kind, "run_id": event.run.id}) + "\n")


settings = Settings.from_env(run_ids_header="x-runs")
app.add_middleware(AftertaskMiddleware, settings=settings, signals=[*usual(settings), Found()])
