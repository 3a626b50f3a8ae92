"""`note()`: whose work a run is, in logs, alerts and `get_run`, also for a run that never started."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import uuid
from typing import Any

import pytest
from fastapi import BackgroundTasks, FastAPI, HTTPException
from prometheus_client import CollectorRegistry
from starlette.testclient import TestClient

from aftertask import AftertaskMiddleware, Settings, current_run, get_run, note
from aftertask.alerts import Alerts
from aftertask.signals import Logs, RunFilter
from aftertask.testing import Recorder
from kit_alerts import Inbox


class Shop:
    """An app that notes who its user is, and what its signals saw."""

    def __init__(self, **settings: Any) -> None:
        self.seen, self.inbox = Recorder(), Inbox()
        self.alerts = Alerts([self.inbox])
        self.app = FastAPI()
        chosen = Settings(registry=CollectorRegistry(), metrics_path=None, **settings)
        self.app.add_middleware(AftertaskMiddleware, settings=chosen, signals=[Logs(), self.alerts, self.seen])

    def get(self, path: str = "/") -> Any:
        """One request; alerts are delivered at its end."""
        response = TestClient(self.app, raise_server_exceptions=False).get(path)
        self.alerts.close()
        return response

    def notes(self) -> dict[str, dict[str, object]]:
        """The last part of each run's name, and its notes."""
        return {run.task.rpartition(".")[2]: run.notes for run in self.seen.runs()}


async def mail() -> None:
    """Fails, once it has said more about itself."""
    note(order_id=17)
    logging.getLogger("mail").warning("its own line")
    raise ConnectionError("refused")


async def charge() -> None:
    """Is skipped."""


def lines(caplog: pytest.LogCaptureFixture, event: str) -> list[dict[str, Any]]:
    """Our records of an event."""
    return [vars(record) for record in caplog.records if getattr(record, "event", None) == event]


def test_notes_of_a_request_belong_to_its_runs_and_those_of_a_task_to_it(caplog: pytest.LogCaptureFixture) -> None:
    """In an async endpoint, before and after `add_task`; the affected user of a skipped run is known, too."""
    shop = Shop()
    caplog.handler.addFilter(RunFilter())

    @shop.app.get("/")
    async def endpoint(tasks: BackgroundTasks) -> None:
        note(user_id=42)
        tasks.add_task(mail)
        tasks.add_task(charge)
        note(plan="free", trial=True)

    shop.get()
    user = {"user_id": 42, "plan": "free", "trial": True}
    assert shop.notes() == {"mail": {**user, "order_id": 17}, "charge": user}
    (failed,), (skipped,) = lines(caplog, "task.failed"), lines(caplog, "task.skipped")
    assert (failed["notes"], skipped["notes"]) == ({**user, "order_id": 17}, user)
    assert "(GET /, user_id=42, plan=free, trial=True, order_id=17)" in failed["message"]
    assert skipped["message"].endswith("(GET /, user_id=42, plan=free, trial=True)")
    (own,) = (record for record in caplog.records if record.name == "mail")
    assert vars(own)["notes"] == {**user, "order_id": 17}
    (alert,) = shop.inbox.wait()
    assert alert.notes == {**user, "order_id": 17}
    assert "Notes: user_id=42, plan=free, trial=True, order_id=17" in alert.text


def test_a_sync_endpoint_can_note_and_a_dropped_run_has_it(caplog: pytest.LogCaptureFixture) -> None:
    """Its thread knows the request."""
    shop = Shop()

    @shop.app.get("/")
    def endpoint(tasks: BackgroundTasks) -> None:
        tasks.add_task(charge)
        note(user_id=42)
        raise HTTPException(503)

    shop.get()
    (dropped,) = lines(caplog, "task.dropped")
    assert dropped["notes"] == {"user_id": 42}


def test_notes_are_redacted_and_bounded() -> None:
    """Secrets go by key or by shape; ten keys, 200 characters; None removes; anything else becomes text."""
    shop = Shop()
    some_id = uuid.uuid4()

    class Unreadable:
        def __str__(self) -> str:
            raise ValueError

    @shop.app.get("/")
    async def endpoint(tasks: BackgroundTasks) -> None:
        note(token="abcdef", mail="ada@example.org", card=4111111111111111, id=some_id, long="x" * 300, gone=1)
        note(gone=None, bad=Unreadable())
        note(**{f"key{number}": number for number in range(20)})
        tasks.add_task(charge)

    shop.get()
    notes = shop.notes()["charge"]
    assert notes["token"] == notes["mail"] == notes["card"] == "[redacted]"
    assert (notes["id"], notes["long"], notes["bad"]) == (str(some_id), "x" * 200, "[it cannot be read: ValueError]")
    assert "gone" not in notes
    assert len(notes) == 10


def test_keys_that_are_left_out_are_named_once() -> None:
    """Per process, without their values."""
    code = """
from fastapi import BackgroundTasks, FastAPI
from starlette.testclient import TestClient
from aftertask import AftertaskMiddleware, note
app = FastAPI()
app.add_middleware(AftertaskMiddleware, signals=[])
@app.get("/")
async def endpoint() -> None:
    note(**{f"key{number}": "value" for number in range(12)})
for _ in range(2):
    TestClient(app).get("/")
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    (line,) = map(json.loads, done.stderr.splitlines())
    assert (line["event"], line["level"], line["left_out"]) == ("note.left_out", "warning", ["key10", "key11"])
    assert "at most 10 keys" in line["advice"] and "value" not in done.stderr


def test_the_apps_own_redaction_applies() -> None:
    """`Settings.redact` gets the key and the value."""
    shop = Shop(redact=lambda text: text.replace("42", "**"))

    @shop.app.get("/")
    async def endpoint(tasks: BackgroundTasks) -> None:
        note(user_id=42)
        tasks.add_task(charge)

    shop.get()
    assert shop.notes() == {"charge": {"user_id": "**"}}


def test_get_run_and_current_run_have_them() -> None:
    """A task that looks itself up."""
    shop, found = Shop(), []

    async def look() -> None:
        here = current_run()
        assert here is not None
        run = await get_run(here.id)
        assert run is here
        found.append(run.notes)

    @shop.app.get("/")
    async def endpoint(tasks: BackgroundTasks) -> None:
        note(user_id=42)
        tasks.add_task(look)

    shop.get()
    assert found == [{"user_id": 42}]


def test_a_request_does_not_have_the_notes_of_another() -> None:
    """Nor does anything outside of one."""
    shop = Shop()

    @shop.app.get("/{user}")
    async def endpoint(user: str, tasks: BackgroundTasks) -> None:
        if user != "none":
            note(user=user)
        tasks.add_task(charge)

    note(user="outside")
    with TestClient(shop.app) as client:
        for user in ("ada", "none", "bob"):
            client.get(f"/{user}")
    assert [run.notes for run in shop.seen.runs()] == [{"user": "ada"}, {}, {"user": "bob"}]
