"""
How to test tasks: a small app, and its tests. Run them:

    pytest examples/testing.py

You will see four tests pass at once, though the task waits for up to a minute between its attempts: the tests advance
the clock.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from fastapi import BackgroundTasks, FastAPI, HTTPException
from starlette.testclient import TestClient

from aftertask import AftertaskMiddleware, Retry, task
from aftertask.events import Dropped, Failed, Retrying, Succeeded
from aftertask.testing import Recorder, VirtualClock, recorded

app = FastAPI()
app.add_middleware(AftertaskMiddleware)
outbox: list[str] = []
broken: list[Exception] = []


@task(name="mail.welcome", timeout=60, retry=Retry(attempts=3, wait_initial=30), on_failure="contain")
async def send_welcome_mail(address: str) -> None:
    """Fail as often as the test wants, then send."""
    if broken:
        raise broken.pop()
    outbox.append(address)


@app.post("/signup")
async def signup(email: str, tasks: BackgroundTasks) -> dict[str, str]:
    """Respond at once."""
    tasks.add_task(send_welcome_mail, email)
    if "@" not in email:
        raise HTTPException(400, "this is no address")
    return {"status": "ok"}


@pytest.fixture
def events() -> Iterator[Recorder]:
    """What happens to the tasks of the app; its log lines and metrics are left out meanwhile."""
    outbox.clear()
    broken.clear()
    with recorded(app) as recorder:
        yield recorder


def test_a_signup_sends_a_mail(events: Recorder) -> None:
    """`TestClient` returns when the tasks have ended, so there is nothing to wait for."""
    TestClient(app).post("/signup", params={"email": "ada@example.org"})
    assert events.outcomes() == [("mail.welcome", "succeeded")]
    assert outbox == ["ada@example.org"]


def test_a_refused_signup_sends_none(events: Recorder) -> None:
    """The task was added, and then the handler raised."""
    TestClient(app).post("/signup", params={"email": "ada"})
    assert [event.reason for event in events.of(Dropped)] == ["http_exception"]
    assert outbox == []


def sign_up_and_wait(events: Recorder, *, waits: int) -> None:
    """Sign up in a thread, and let a minute pass each time that the task waits for its next attempt."""
    with VirtualClock() as clock, ThreadPoolExecutor(1) as threads:
        response = threads.submit(TestClient(app).post, "/signup", params={"email": "ada@example.org"})
        for number in range(1, waits + 1):
            events.wait_for(Retrying, number)
            clock.wait_until_waiting()
            clock.advance(60)
        response.result(timeout=10)


def test_a_mail_is_tried_again(events: Recorder) -> None:
    """The third attempt succeeds."""
    broken.extend([ConnectionError("421"), ConnectionError("421")])
    sign_up_and_wait(events, waits=2)
    assert [event.run.attempt for event in events.of(Succeeded)] == [3]
    assert outbox == ["ada@example.org"]


def test_a_mail_that_cannot_be_sent_is_reported(events: Recorder) -> None:
    """After the last attempt the run has failed, with the error of that attempt."""
    broken.extend([ConnectionError("third"), ConnectionError("second"), ConnectionError("first")])
    sign_up_and_wait(events, waits=2)
    (failed,) = events.of(Failed)
    assert (failed.failure.type, failed.failure.message) == ("ConnectionError", "third")
    assert outbox == []
