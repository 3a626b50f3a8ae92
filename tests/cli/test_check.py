"""`aftertask check`: what it finds in an app that does all wrong, and that it finds nothing in one that does not."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fastapi import Depends

ROOT = Path(__file__).parents[2]

BAD = """
import subprocess
import time
from time import sleep as pause
from typing import Annotated

import requests_like as requests
from fastapi import BackgroundTasks, Depends, FastAPI, Request, WebSocket
from sqlalchemy.orm import Session

from aftertask import AftertaskMiddleware, Limit, Retry, Settings, options, task

app = FastAPI()


def session():
    with Session() as made:
        yield made


@task(name="mail.send", owner="growth", retry=Retry(attempts=4), limit=Limit("smtp", 5), timeout=20)
async def send(address: str) -> None:
    time.sleep(1)


async def helper_blocks() -> None:
    helper()


def helper() -> None:
    subprocess.run(["true"])


async def local_import() -> None:
    import urllib.request

    urllib.request.urlopen("http://x")
    pause(1)


async def queries(db: Session, number: int) -> None:
    db.execute("select 1")


async def looks(request: Request) -> None:
    await request.body()


def numbers():
    yield 1


@task(executor="thread", timeout=1)
async def in_a_thread() -> None:
    time.sleep(1)


async def passes_on() -> None:
    import anyio.to_thread

    await anyio.to_thread.run_sync(time.sleep, 1)


@app.get("/metrics")
async def metrics() -> str:
    return ""


@app.websocket("/ws")
async def ws(socket: WebSocket, tasks: BackgroundTasks) -> None:
    tasks.add_task(numbers)


@app.post("/")
async def endpoint(
    tasks: BackgroundTasks, request: Request, db: Annotated[Session, Depends(session, scope="function")]
) -> None:
    tasks.add_task(send, "a")
    tasks.add_task(helper_blocks)
    tasks.add_task(local_import)
    tasks.add_task(options(queries, timeout=1), db, number=1)
    tasks.add_task(looks, request)
    tasks.add_task(in_a_thread)
    tasks.add_task(passes_on)
    tasks.add_task(metrics)


async def secret_channel(alert: object) -> None:
    pass


app.add_middleware(
    AftertaskMiddleware,
    settings=Settings(
        alerts=["https://hooks.example.org/T000/hunter2/verysecret", secret_channel], run_ids_header="x-runs"
    ),
)
"""

if "scope" not in inspect.signature(Depends).parameters:  # since FastAPI 0.121; before, it is so for every dependency
    BAD = BAD.replace(', scope="function"', "")

GOOD = '''
from fastapi import BackgroundTasks, FastAPI
from aftertask import AftertaskMiddleware, task

app = FastAPI()
app.add_middleware(AftertaskMiddleware)


@task(timeout=5)
async def fine(number: int) -> None:
    """Does what a task should."""


@app.get("/")
async def endpoint(tasks: BackgroundTasks) -> None:
    tasks.add_task(fine, 1)


def make() -> FastAPI:
    return app
'''


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three apps: one that does all wrong, one that is fine, one that is none."""
    (tmp_path / "bad.py").write_text(BAD.lstrip("\n"))
    (tmp_path / "good.py").write_text(GOOD)
    (tmp_path / "bare.py").write_text("from fastapi import FastAPI\napp = FastAPI()\nnumber = 1\n")
    (tmp_path / "broken.py").write_text("import nothing_of_that_name\n")
    (tmp_path / "wrong.py").write_text(
        "from fastapi import FastAPI\nfrom aftertask import AftertaskMiddleware\n"
        "app = FastAPI()\napp.add_middleware(AftertaskMiddleware)\n"
    )
    (tmp_path / "requests_like.py").write_text("")
    return tmp_path


def check(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """The command, in a process of its own: it imports the app."""
    command = [sys.executable, "-m", "aftertask.cli", "check", *arguments]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("AFTERTASK_", "WEB_CONC"))}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=15, env={**clean, **env})


def at(text: str) -> int:
    """The line of the bad app that holds this text."""
    return next(number for number, source in enumerate(BAD.lstrip("\n").splitlines(), 1) if text in source)


def reported(folder: Path, app: str, *arguments: str, **env: str) -> Any:
    """What it tells as JSON."""
    done = check(folder, app, "--json", *arguments, **env)
    assert done.stderr == "", done.stderr
    return json.loads(done.stdout)


def test_all_that_is_wrong_is_found(folder: Path) -> None:
    """Each with its task, its line and a remedy."""
    found = reported(folder, "bad:app")["findings"]
    assert all(one["remedy"] and one["severity"] in ("error", "warning", "note") for one in found)
    seen = {
        (one["kind"], (one["task"] or "").removeprefix("bad."), one["line"])
        for one in found
        if one["severity"] != "note"
    }

    assert seen == {
        ("blocked_loop", "mail.send", at("time.sleep(1)")),
        ("blocked_loop", "helper_blocks", at("subprocess.run")),
        ("blocked_loop", "local_import", at("urlopen")),
        ("blocked_loop", "local_import", at("pause(1)")),
        ("blocked_loop", "queries", at("db.execute")),
        ("request_scoped", "looks", at("async def looks")),
        ("generator", "numbers", at("def numbers")),
        ("response_returned", "metrics", at('@app.get("/metrics")')),
        ("db_session", "queries", at("options(queries")),
        ("websocket", "", at('@app.websocket("/ws")')),
        ("metrics_path", "", None),
    }
    assert {one["file"] for one in found if one["file"]} == {str(folder / "bad.py")}
    notes = {one["task"] for one in found if one["severity"] == "note"}
    assert "bad.helper_blocks" in notes and "mail.send" not in notes


def test_settings_and_policies_are_told_without_secrets(folder: Path) -> None:
    """A webhook's URL is one."""
    done = check(folder, "bad:app")
    assert done.returncode == 1
    assert "run_ids_header = x-runs" in done.stdout and "block_threshold = 0.25" in done.stdout
    assert "mail.send: owner=growth, timeout=20, retry=4 attempts, limit=smtp:5" in done.stdout
    assert "hunter2" not in done.stdout and "verysecret" not in done.stdout
    assert f"bad.py:{at('time.sleep(1)')}: warning: mail.send is async and calls time.sleep()" in done.stdout
    assert "1 note" not in done.stdout.splitlines()[-1] and "errors" in done.stdout.splitlines()[-1]


def test_an_app_that_is_fine_passes(folder: Path) -> None:
    """Code 0, and nothing found; by a factory too."""
    for arguments in (["good:app"], ["good:make", "--factory"], ["good:app", "--fail-on", "note"]):
        done = check(folder, *arguments)
        assert (done.returncode, done.stderr) == (0, ""), done.stdout
        assert done.stdout.splitlines()[-1] == "0 errors, 0 warnings, 0 notes"


@pytest.mark.parametrize("app", ["shop.app", "minimal"])
def test_the_examples_pass(app: str) -> None:
    """But for what they do wrong on purpose, which a note may say."""
    folder = ROOT / "examples"
    done = check(folder, f"{app}:app", "--json", "--fail-on", "error")
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_app_without_the_middleware(folder: Path) -> None:
    """That is an error, since nothing is seen."""
    assert [(one["kind"], one["severity"]) for one in reported(folder, "bare:app")["findings"]] == [
        ("not_added", "error")
    ]


def test_several_workers_need_a_directory(folder: Path, tmp_path: Path) -> None:
    """By the option or by WEB_CONCURRENCY."""
    for arguments, env in ((["--workers", "2"], {}), ([], {"WEB_CONCURRENCY": "2"})):
        assert [one["kind"] for one in reported(folder, "good:app", *arguments, **env)["findings"]] == [
            "several_workers"
        ]
    env = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    assert reported(folder, "good:app", "--workers", "2", **env)["findings"] == []


def test_a_mistake_in_the_environment_is_a_finding(folder: Path) -> None:
    """The app would not start with it."""
    (one,) = reported(folder, "wrong:app", AFTERTASK_TRACE="nonsense")["findings"]
    assert one["kind"] == "settings" and "AFTERTASK_TRACE" in one["message"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["bad"], "name the app as module:app, got 'bad'"),
        (["nowhere:app"], "there is no module 'nowhere' in"),
        (["bare:nothing"], "the module 'bare' has no 'nothing'"),
        (["bare:number"], "bare:number is no ASGI app but a int"),
        (["good:app", "--fail-on", "all"], "--fail-on must be note, warning or error, got 'all'"),
    ],
)
def test_what_cannot_be_checked_is_refused(folder: Path, arguments: list[str], word: str) -> None:
    """Code 2, and one line that says why."""
    done = check(folder, *arguments)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith(f"aftertask: {word}")


def test_a_module_that_cannot_be_imported_is_told_in_one_line(folder: Path) -> None:
    """With what was raised and by which of the app's lines; by another code than findings have."""
    done = check(folder, "broken:app", "--json")
    assert (done.returncode, done.stdout) == (2, "")
    said = "'broken' cannot be imported: ModuleNotFoundError: No module named 'nothing_of_that_name' ("
    assert said in done.stderr and "broken.py:1)" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("metrics_path='/m'", "write settings=Settings(metrics_path=…)"),
        ("settings={'trace': 'link'}", "settings must be an aftertask.Settings"),
        ("signals=[print, None]", "a signal must be a Signal or a function that takes an event, got None"),
        ("signals=print", "signals must be a list of signals"),
    ],
)
def test_what_the_middleware_would_refuse_is_found(folder: Path, given: str, says: str) -> None:
    """The app that was added it would not serve a request."""
    (folder / "refused.py").write_text(
        "from fastapi import FastAPI\nfrom aftertask import AftertaskMiddleware\n"
        f"app = FastAPI()\napp.add_middleware(AftertaskMiddleware, {given})\n"
    )
    (one,) = reported(folder, "refused:app")["findings"]
    assert (one["kind"], one["severity"]) == ("settings", "error") and says in one["message"]


def test_a_policy_of_no_task_is_noted(folder: Path) -> None:
    """A typo there is a time limit that somebody believes in."""
    (folder / "typo.py").write_text(
        "from fastapi import FastAPI\nfrom aftertask import AftertaskMiddleware, Policy, Settings, task\n"
        "@task(name='mail.welcome')\ndef welcome(): ...\n"
        "policies = {name: Policy(timeout=5) for name in ('mail.*', 'mail.welcome', 'mial.*', 'mail.welcom')}\n"
        "app = FastAPI()\napp.add_middleware(AftertaskMiddleware, settings=Settings(policies=policies))\n"
    )
    found = [one["message"] for one in reported(folder, "typo:app")["findings"] if one["kind"] == "unused_policy"]
    assert [message.split("'")[1] for message in found] == ["mial.*", "mail.welcom"]


def test_that_it_is_switched_off_is_found(folder: Path) -> None:
    """Forgotten in production, nobody would notice."""
    kinds = {one["kind"] for one in reported(folder, "good:app", AFTERTASK_DISABLED="1")["findings"]}
    assert kinds == {"disabled"}


def test_a_test_alert_is_sent_on_demand(folder: Path) -> None:
    """Each channel's result is told, and one that fails ends with code 1."""
    text = GOOD.replace("AftertaskMiddleware, task", "AftertaskMiddleware, Settings, task").replace(
        "app.add_middleware(AftertaskMiddleware)",
        "def works(alert): print('GOT', alert.kind)\ndef fails(alert): raise OSError('no route')\n"
        "app.add_middleware(AftertaskMiddleware, settings=Settings(alerts=[works, fails]))",
    )
    (folder / "alerting.py").write_text(text)
    done = check(folder, "alerting:app", "--send-test-alert")
    assert done.returncode == 1
    assert "GOT test" in done.stdout and "FAILED: OSError: no route" in done.stdout and ": taken (" in done.stdout


def test_a_thousand_routes(folder: Path) -> None:
    """Read in a second or two."""
    routes = "\n\n".join(
        f"@app.get('/{n}')\nasync def e{n}(tasks: BackgroundTasks) -> None:\n    tasks.add_task(fine, {n})"
        for n in range(1000)
    )
    (folder / "many.py").write_text(f"{GOOD}\n\n{routes}\n")
    assert reported(folder, "many:app")["findings"] == []


SUBTLE = """
import shutil
import smtplib

from fastapi import APIRouter, BackgroundTasks, FastAPI, WebSocket
from starlette.background import BackgroundTask
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

from aftertask import AftertaskMiddleware

app = FastAPI()
app.add_middleware(AftertaskMiddleware)
router = APIRouter()


async def raises() -> None:
    raise smtplib.SMTPRecipientsRefused({})


class Publisher:
    async def _publish(self) -> None:
        shutil.copytree("a", "b")

    def publish(self, tasks: BackgroundTasks) -> None:
        tasks.add_task(self._publish)


@router.websocket("/live")
async def live(socket: WebSocket, tasks: BackgroundTasks) -> None: ...


@app.get("/")
async def endpoint(tasks: BackgroundTasks) -> PlainTextResponse:
    tasks.add_task(raises)
    return PlainTextResponse("x", background=BackgroundTask(shutil.rmtree, "nothing-here"))


@app.get("/forgets")
async def forgets() -> str:
    own = BackgroundTasks()
    own.add_task(raises)
    return "ok"


async def numbers(request) -> PlainTextResponse:
    return PlainTextResponse("0")


app.include_router(router, prefix="/ws")
app.mount("/inner", Mount("", routes=[Route("/metrics", numbers)]))
"""


def test_what_is_subtle_is_found_and_nothing_else(folder: Path) -> None:
    """Exception classes do not block; findings point to the user's own lines, with a remedy for them."""
    (folder / "subtle.py").write_text(SUBTLE)
    findings = reported(folder, "subtle:app")["findings"]
    lines = SUBTLE.splitlines()
    found = {(one["kind"], lines[one["line"] - 1].strip()) for one in findings if one["kind"] != "no_timeout"}
    assert found == {
        ("blocked_loop", 'shutil.copytree("a", "b")'),  # a bound method
        ("unused_container", "own = BackgroundTasks()"),
        ("websocket", '@router.websocket("/live")'),  # in an included router
    }
    assert all(one["file"] == str(folder / "subtle.py") for one in findings)
    (library,) = [one for one in findings if one["task"] == "shutil.rmtree"]
    assert "background=BackgroundTask(shutil.rmtree" in lines[library["line"] - 1]
    assert 'Settings(policies={"shutil.rmtree": Policy(timeout=…)})' in library["remedy"]
