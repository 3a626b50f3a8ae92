"""`aftertask check`: it finds everything in an app that does all wrong, and nothing in an app that is fine."""

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

from kit import TASKS_COME_FIRST

pytestmark = pytest.mark.timeout(60)  # each test starts the command, some several times

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

#: Whether dependencies have a scope.
HAS_SCOPE = "scope" in inspect.signature(Depends).parameters

if not HAS_SCOPE:  # before 0.118 it is so for every dependency, and from then on for none
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
    (tmp_path / "bare.py").write_text(
        "from fastapi import FastAPI\napp = FastAPI()\nnumber = 1\ndef fails(): raise OSError('no disk')\n"
    )
    (tmp_path / "broken.py").write_text("import nothing_of_that_name\n")
    (tmp_path / "wrong.py").write_text(
        "from fastapi import FastAPI\nfrom aftertask import AftertaskMiddleware\n"
        "app = FastAPI()\napp.add_middleware(AftertaskMiddleware)\n"
    )
    (tmp_path / "requests_like.py").write_text("")
    (tmp_path / "shop" / "views").mkdir(parents=True)
    for package in ("shop", "shop/views"):
        (tmp_path / package / "__init__.py").write_text("")
    return tmp_path


def check(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """The command, in a process of its own: it imports the app."""
    command = [sys.executable, "-m", "aftertask.cli", "check", *arguments]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("AFTERTASK_", "WEB_CONC"))}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=30, env={**clean, **env})


def at(text: str) -> int:
    """The line of the bad app that holds this text."""
    return next(number for number, source in enumerate(BAD.lstrip("\n").splitlines(), 1) if text in source)


def reported(folder: Path, app: str, *arguments: str, **env: str) -> Any:
    """What it prints as JSON."""
    done = check(folder, app, "--json", *arguments, **env)
    assert done.stderr == "", done.stderr
    return json.loads(done.stdout)


def test_all_that_is_wrong_is_found(folder: Path) -> None:
    """Each finding has its task, its line and a remedy."""
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
        *([("db_session", "queries", at("options(queries"))] if HAS_SCOPE or not TASKS_COME_FIRST else []),
        ("websocket", "", at('@app.websocket("/ws")')),
        ("metrics_path_taken", "", None),
    }
    assert {one["file"] for one in found if one["file"]} == {str(folder / "bad.py")}
    notes = {one["task"] for one in found if one["severity"] == "note"}
    assert "bad.helper_blocks" in notes and "mail.send" not in notes


def test_settings_and_policies_are_printed_without_secrets(folder: Path) -> None:
    """A webhook's URL is a secret."""
    done = check(folder, "bad:app")
    assert done.returncode == 1
    assert "run_ids_header = x-runs" in done.stdout and "block_threshold" not in done.stdout
    assert "mail.send: owner=growth, timeout=20, retry=4 attempts, limit=smtp:5" in done.stdout
    assert "hunter2" not in done.stdout and "verysecret" not in done.stdout
    assert f"bad.py:{at('time.sleep(1)')}: warning: mail.send is async and calls time.sleep()" in done.stdout
    headline, *rest = done.stdout.splitlines()
    assert headline.startswith("bad:app: ") and "errors" in headline and "1 note" not in headline
    last_finding = max(number for number, line in enumerate(rest) if line.endswith("]"))
    assert last_finding < rest.index("Tasks") < rest.index("Settings that differ from the defaults")


def test_what_the_app_prints_is_not_in_the_report(folder: Path) -> None:
    """Its own output goes to stderr, and what aftertask finds is not logged as well."""
    logs = """
import logging.config, sys
print("importing")
logging.config.dictConfig({
    "version": 1, "disable_existing_loggers": True, "root": {"level": "DEBUG", "handlers": ["out"]},
    "handlers": {"out": {"class": "logging.StreamHandler", "stream": "ext://sys.stdout"}},
})
"""
    (folder / "prints.py").write_text(f"{logs}\n{GOOD}\napp.get('/metrics')(lambda: 'mine')\n")
    done = check(folder, "prints:app", "--json")
    assert [one["kind"] for one in json.loads(done.stdout)["findings"]] == ["metrics_path_taken"]
    assert done.stderr == "importing\n"


def test_a_variable_without_effect_is_named_once(folder: Path) -> None:
    """Also where the middleware is built with the app, which logs it then, and where a warning says it."""
    (folder / "wrapped.py").write_text(
        "from starlette.applications import Starlette\nfrom aftertask import AftertaskMiddleware, Settings\n"
        "app = AftertaskMiddleware(Starlette(), settings=Settings())\n"
    )
    done = check(folder, "wrapped:app", AFTERTASK_MAX_WAITING="3")
    assert (done.stdout + done.stderr).count("AFTERTASK_MAX_WAITING") == 1
    done = check(folder, "good:app", AFTERTASK_MAX_WAITINGS="3")
    assert done.stderr.count("unknown environment variable AFTERTASK_MAX_WAITINGS") == 1


def test_what_is_wrong_with_another_app_of_the_module_is_found(folder: Path) -> None:
    """It is built when the module is imported, and its own log lines would be no part of the report."""
    (folder / "two.py").write_text(
        "from fastapi import FastAPI\nfrom aftertask import AftertaskMiddleware, Policy, Settings\n"
        "admin = FastAPI()\napp = FastAPI()\napp.add_middleware(AftertaskMiddleware)\n"
        "nothing = Settings(policies={'two.mail': Policy(timeout=1)})\n"
        "app.mount('/admin', AftertaskMiddleware(admin, settings=nothing))\n"
    )
    done = check(folder, "two:app", "--json")
    assert [one["kind"] for one in json.loads(done.stdout)["findings"]] == ["unused_policy"]
    assert done.stderr == ""


def test_lines_that_are_no_findings_are_written(folder: Path) -> None:
    """What aftertask logs while the app is imported, beside its mistakes, goes where the app's log goes."""
    (folder / "served.py").write_text(
        f"from starlette.testclient import TestClient\n{GOOD}\nwith TestClient(app):\n    pass\n"
    )
    done = check(folder, "served:app")
    assert done.returncode == 0 and '"event": "lifecycle.policies"' in done.stderr


def test_a_durable_task_without_a_journal_is_found(folder: Path) -> None:
    """The app starts, and the first request that adds it fails; a result would be lost."""
    (folder / "forgot.py").write_text(
        "from fastapi import FastAPI\nfrom aftertask import AftertaskMiddleware, task\n"
        "@task(durable=True, timeout=5)\ndef charge(order: int): ...\n"
        "@task(keep_result=True, timeout=5)\ndef report(order: int): ...\n"
        "app = FastAPI()\napp.add_middleware(AftertaskMiddleware)\n"
    )
    found = reported(folder, "forgot:app")["findings"]
    assert [(one["kind"], one["severity"], one["task"], one["line"]) for one in found] == [
        ("no_journal", "error", "forgot.charge", 3),
        ("no_journal", "warning", "forgot.report", 5),
    ]


def test_no_journal_is_created(folder: Path) -> None:
    """The file belongs to the machine that runs the app; if its folder is missing here, that is a note."""
    (folder / "kept.py").write_text(
        "from fastapi import FastAPI\nfrom aftertask import AftertaskMiddleware, Settings, task\n"
        "@task(durable=True, timeout=5)\ndef charge(order: int): ...\napp = FastAPI()\n"
        "app.add_middleware(AftertaskMiddleware)\n"
    )
    for path, kinds in (("tasks.db", []), ("nowhere/tasks.db", ["journal_folder"])):
        found = reported(folder, "kept:app", AFTERTASK_JOURNAL=str(folder / path))["findings"]
        assert [(one["kind"], one["severity"]) for one in found] == [(kind, "note") for kind in kinds]
    assert not list(folder.glob("*.db*"))


def test_what_cannot_be_a_journal_is_an_error(folder: Path) -> None:
    """A directory, or a file of something else."""
    for path, kinds in ((folder, ["journal_file"]), (folder / "good.py", ["journal_file"]), (folder / "new.db", [])):
        found = reported(folder, "good:app", AFTERTASK_JOURNAL=str(path))["findings"]
        assert [(one["kind"], one["severity"]) for one in found] == [(kind, "error") for kind in kinds]


def test_a_missing_directory_for_the_metrics_is_a_note(folder: Path) -> None:
    """It belongs to the machine that runs the app."""
    found = reported(folder, "good:app", PROMETHEUS_MULTIPROC_DIR=str(folder / "nowhere"))["findings"]
    assert [(one["kind"], one["severity"]) for one in found] == [("multiproc_directory", "note")]


def test_settings_by_position_are_found(folder: Path) -> None:
    """Starlette hands them to the middleware when the app is built, which refuses them then."""
    (folder / "placed.py").write_text(
        "from fastapi import FastAPI\nfrom aftertask import AftertaskMiddleware, Settings\n"
        "app = FastAPI()\napp.add_middleware(AftertaskMiddleware, Settings())\n"
    )
    (one,) = reported(folder, "placed:app")["findings"]
    assert (one["kind"], one["severity"]) == ("settings", "error")
    assert one["message"] == "write add_middleware(AftertaskMiddleware, settings=…), got Settings"


def test_an_app_that_is_fine_passes(folder: Path) -> None:
    """The command ends with code 0 and no finding, also for a factory."""
    for arguments in (["good:app"], ["good:make", "--factory"], ["good:app", "--fail-on", "note"]):
        done = check(folder, *arguments)
        assert (done.returncode, done.stderr) == (0, ""), done.stdout
        assert done.stdout.splitlines()[0] == f"{arguments[0]}: 0 errors, 0 warnings, 0 notes"
        assert done.stdout.endswith("Settings that differ from the defaults\n  none\n")


@pytest.mark.parametrize("app", ["shop.app", "quickstart", "signup_mail", "compensation", "celery_offload.web"])
def test_the_examples_pass(app: str) -> None:
    """The examples have no error; what they do wrong on purpose may be a note."""
    folder = ROOT / "examples"
    done = check(folder, f"{app}:app", "--json", "--fail-on", "error")
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_app_without_the_middleware(folder: Path) -> None:
    """An app without the middleware is an error, since nothing is observed."""
    assert [(one["kind"], one["severity"]) for one in reported(folder, "bare:app")["findings"]] == [
        ("not_added", "error")
    ]


def test_several_workers_need_a_directory(folder: Path, tmp_path: Path) -> None:
    """Several workers, by the option or by WEB_CONCURRENCY, need PROMETHEUS_MULTIPROC_DIR."""
    for arguments, env in ((["--workers", "2"], {}), ([], {"WEB_CONCURRENCY": "2"})):
        assert [one["kind"] for one in reported(folder, "good:app", *arguments, **env)["findings"]] == [
            "several_workers"
        ]
    env = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    assert reported(folder, "good:app", "--workers", "2", **env)["findings"] == []


def test_settings_of_an_engine_that_lose_runs_are_findings(tmp_path: Path) -> None:
    """As the worker names them at its start; for the tasks that this app hands over."""
    (tmp_path / "offloads.py").write_text(
        """
from celery import Celery
from fastapi import BackgroundTasks, FastAPI
from aftertask import AftertaskMiddleware, Settings, task
from aftertask.celery import CeleryEngine

@task(executor="celery", timeout=7200)
def render(): pass

app = FastAPI()
celery = Celery("shop", broker="redis://127.0.0.1:1/0", broker_transport_options={"socket_timeout": 30})
app.add_middleware(AftertaskMiddleware, settings=Settings(engines={"celery": CeleryEngine(celery)}))
"""
    )
    found = reported(tmp_path, "offloads:app")["findings"]
    assert [(one["kind"], one["severity"], one["message"]) for one in found] == [
        (
            "engine_setting",
            "warning",
            "Settings.engines['celery']: broker_transport_options.visibility_timeout is 3600.0",
        ),
        ("engine_setting", "warning", "Settings.engines['celery']: worker_prefetch_multiplier is 4"),
    ]
    assert "a run may take 7200 s" in found[0]["remedy"]


def test_a_mistake_in_the_environment_is_a_finding(folder: Path) -> None:
    """With it the app answers no request."""
    (one,) = reported(folder, "wrong:app", AFTERTASK_TRACE="nonsense")["findings"]
    assert one["kind"] == "settings" and "AFTERTASK_TRACE" in one["message"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["bad"], "name the app as module:app, such as bad:app, got 'bad'"),
        (["good.py:app"], "name the module, not its file: good:app"),
        (["shop/views/orders.py:app"], "name the module, not its file: shop.views.orders:app"),
        (["some/where/good.py"], "name the module, not its file: good:app --app-dir some/where"),
        (["good:made"], "the module 'good' has no 'made'; did you mean good:app?"),
        (["good:make"], "good:make is a function without arguments: if it returns the app, add --factory"),
        (["good:fine"], "good:fine is a function, but does not take scope, receive and send, so it is not an ASGI app"),
        (["good:app", "--factory"], "good:app cannot be called without arguments, as --factory does"),
        (["bare:fails", "--factory"], "the factory bare:fails failed: OSError: no disk (bare.py:"),
        (["nowhere:app"], "there is no module 'nowhere' in"),
        (["bare:nothing"], "the module 'bare' has no 'nothing'"),
        (["bare:number"], "bare:number is of type int, not an ASGI app"),
        (["good:app", "--fail-on", "all"], "--fail-on must be note, warning or error, got 'all'"),
    ],
)
def test_what_cannot_be_checked_is_refused(folder: Path, arguments: list[str], word: str) -> None:
    """The command ends with code 2 and one line that gives the reason."""
    done = check(folder, *arguments)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith(f"aftertask: {word}")


def test_a_module_that_cannot_be_imported_is_reported_in_one_line(folder: Path) -> None:
    """The line has the exception and the line of the app that raised it; the code differs from that of findings."""
    done = check(folder, "broken:app", "--json")
    assert (done.returncode, done.stdout) == (2, "")
    reason = "'broken' cannot be imported: ModuleNotFoundError: No module named 'nothing_of_that_name' ("
    assert reason in done.stderr and "broken.py:1)" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("metrics_path='/m'", "write settings=Settings(metrics_path=…)"),
        ("settings={'trace': 'link'}", "settings must be an aftertask.Settings"),
        ("signals=[print, None]", "a signal must be a Signal or a function that takes an event, got None"),
        ("signals=print", "signals must be a list of signals"),
    ],
)
def test_what_the_middleware_would_refuse_is_found(folder: Path, given: str, message: str) -> None:
    """An app with such a middleware would not serve a request."""
    (folder / "refused.py").write_text(
        "from fastapi import FastAPI\nfrom aftertask import AftertaskMiddleware\n"
        f"app = FastAPI()\napp.add_middleware(AftertaskMiddleware, {given})\n"
    )
    (one,) = reported(folder, "refused:app")["findings"]
    assert (one["kind"], one["severity"]) == ("settings", "error") and message in one["message"]


MISTAKES = """
import logging

from fastapi import APIRouter, BackgroundTasks, FastAPI

from aftertask import AftertaskMiddleware, Limit, Policy, Settings, task


def decorated(func):
    def inner(*args):
        return func(*args)

    return inner


@decorated
@task(name="mail.hidden", timeout=5)
def hidden(): ...


@task(name="mail.welcome", limit=Limit("smtp", 5), timeout=5)
def welcome(): ...


below, router, app = FastAPI(), APIRouter(), FastAPI()


@below.get("/inner")
@task(name="mounted")
async def mounted(): ...


@router.get("/metrics")
@task(name="included")
async def included(tasks: BackgroundTasks):
    tasks.add_task(hidden)


app.include_router(router)
app.mount("/below", below)
policies = {name: Policy(timeout=5) for name in ("mail.*", "mistakes.welcome", "mail.welcome", "mial.*", "mail.welcom")}
policies["*.second"] = Policy(limit=Limit("smtp", 9))
app.add_middleware(AftertaskMiddleware, settings=Settings(policies=policies))
"""

STARTED = """
import json, logging
from starlette.testclient import TestClient
import mistakes

class Kept(logging.Handler):
    def emit(self, record):
        lines.append(vars(record))

lines = []
logging.basicConfig(handlers=[Kept()])
with TestClient(mistakes.app) as client:
    client.get("/metrics")
print(json.dumps([(line.get("kind"), line["advice"]) for line in lines if "advice" in line]))
"""


def test_it_lists_what_the_app_logs_at_its_start(folder: Path) -> None:
    """The same mistakes in the same words, each at the line of its function."""
    (folder / "mistakes.py").write_text(MISTAKES)
    found = [one for one in reported(folder, "mistakes:app")["findings"] if one["severity"] == "warning"]
    assert [one["severity"] for one in found] == ["warning"] * 7
    lines = MISTAKES.splitlines()
    places = {one["message"].split()[0]: lines[one["line"] - 1] for one in found if one["line"] is not None}
    assert places == {
        "mistakes.mounted": '@below.get("/inner")',
        "mistakes.included": '@router.get("/metrics")',
        "mistakes.decorated.<locals>.inner": "    def inner(*args):",
    }
    done = subprocess.run([sys.executable, "-c", STARTED], cwd=folder, capture_output=True, text=True, timeout=15)
    assert done.returncode == 0, done.stderr
    advice: dict[str, str | None] = {advice: kind for kind, advice in json.loads(done.stdout)}
    assert len(advice) == 7
    for one in found:
        said = f"{one['message'].replace('mistakes.decorated.<locals>.inner calls', 'it calls')}: {one['remedy']}"
        assert advice[said] == (one["kind"] if one["kind"] != "task_hidden" else None)
    subjects = {one["message"].split("'")[1] for one in found if one["kind"] in ("unused_policy", "limit_name")}
    assert subjects == {"mial.*", "mail.welcom", "smtp"}


def test_that_it_is_switched_off_is_found(folder: Path) -> None:
    """A variable that is forgotten in production switches everything off."""
    kinds = {one["kind"] for one in reported(folder, "good:app", AFTERTASK_DISABLED="1")["findings"]}
    assert kinds == {"disabled"}


def test_a_test_alert_is_sent_on_demand(folder: Path) -> None:
    """Each channel's result is printed; if one fails, the command ends with code 1."""
    text = GOOD.replace("AftertaskMiddleware, task", "AftertaskMiddleware, Settings, task").replace(
        "app.add_middleware(AftertaskMiddleware)",
        "def works(alert): print('GOT', alert.kind)\ndef fails(alert): raise OSError('no route')\n"
        "app.add_middleware(AftertaskMiddleware, settings=Settings(alerts=[works, fails]))",
    )
    (folder / "alerting.py").write_text(text)
    done = check(folder, "alerting:app", "--send-test-alert")
    assert done.returncode == 1
    assert "GOT test" in done.stdout and "FAILED: OSError: no route" in done.stdout and ": accepted (" in done.stdout


def test_a_test_alert_without_a_channel_is_a_failure(folder: Path) -> None:
    """Who asks for one believes that there is a channel."""
    done = check(folder, "good:app", "--send-test-alert")
    assert done.returncode == 1
    assert done.stderr.startswith("aftertask: no test alert was sent: no channel is configured; set AFTERTASK_ALERTS")


def test_a_thousand_routes(folder: Path) -> None:
    """An app with a thousand routes is read in a few seconds."""
    routes = "\n\n".join(
        f"@app.get('/{n}')\nasync def e{n}(tasks: BackgroundTasks) -> None:\n    tasks.add_task(fine, {n})"
        for n in range(1000)
    )
    (folder / "many.py").write_text(f"{GOOD}\n\n{routes}\n")
    assert reported(folder, "many:app")["findings"] == []


HEAD = """
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, WebSocket
from starlette.background import BackgroundTask
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

from aftertask import AftertaskMiddleware, Settings, options

app = FastAPI()
app.add_middleware(AftertaskMiddleware)
"""

WAITS = """
import http.client
import os
import requests
import smtplib
import time
import urllib3

from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import sessionmaker

client = requests.Session()
os = {}
Sessions, AsyncSessions = sessionmaker(), async_sessionmaker()


async def raises(time: object) -> None:
    time.sleep(1)
    os.system("true")
    requests.exceptions.ConnectionError("created, not raised by a call")
    urllib3.util.parse_url("http://example.org")
    urllib3.disable_warnings()
    requests.Session()
    raise smtplib.SMTPRecipientsRefused({})


async def shadows(answers: dict[str, str]) -> None:
    requests = answers
    requests.get("id")


async def queries() -> None:
    with Sessions() as made:
        made.execute("select 1")  # blocked_loop
    async with AsyncSessions() as other:
        await other.execute("select 1")


async def waits(connection: http.client.HTTPConnection) -> None:
    with requests.Session() as session:
        session.get("http://example.org")  # blocked_loop
    client.post("http://example.org")  # blocked_loop
    requests.Session().put("http://example.org")  # blocked_loop
    connection.request("GET", "/")  # blocked_loop
    from time import sleep as pause
    pause(1)  # blocked_loop


@app.get("/")
async def endpoint(tasks: BackgroundTasks) -> None:
    tasks.add_task(raises, time)
    tasks.add_task(shadows, {})
    tasks.add_task(queries)
    tasks.add_task(func=waits, connection=None)
"""

METHODS = """
import asyncio
import functools
import time


def counted(func):
    @functools.wraps(func)
    async def counting(*args):
        return await func(*args)

    return counting


class Base:
    def nap(self) -> None:
        time.sleep(1)  # blocked_loop

    async def pause(self) -> None:
        time.sleep(1)  # blocked_loop

    async def _publish(self) -> None:
        self.nap()
        await self.pause()


class Publisher(Base):
    def publish(self, tasks: BackgroundTasks) -> None:
        tasks.add_task(self._publish)


class Other:
    async def _publish(self) -> None:
        time.sleep(1)

    async def send(self) -> None:
        time.sleep(1)  # blocked_loop

    @staticmethod
    async def plain() -> None:
        time.sleep(1)  # blocked_loop


@counted
async def wrapped() -> None:
    time.sleep(1)  # blocked_loop


@app.get("/")
async def endpoint(tasks: BackgroundTasks, other: Other = Depends()) -> None:
    tasks.add_task(other.send)
    tasks.add_task(Other.plain)
    tasks.add_task(options(wrapped, timeout=1))
"""

LIBRARY = """
from shutil import rmtree

from starlette.routing import request_response


async def work(request) -> None: ...


wrapped = request_response(work)


@app.get("/")
async def endpoint(tasks: BackgroundTasks) -> PlainTextResponse:
    tasks.add_task(print, "done")
    tasks.add_task(wrapped)  # wrapped
    return PlainTextResponse("x", background=BackgroundTask(rmtree, "nothing-here"))
"""

CONTAINERS = """
async def work() -> None: ...


@app.get("/forgets")
async def forgets() -> str:
    own = BackgroundTasks()  # unused_container
    own.add_task(work)
    return "ok"


@app.get("/annotated")
async def annotated() -> str:
    own: BackgroundTasks = BackgroundTasks()  # unused_container
    own.add_task(work)
    return "ok"


@app.get("/gives")
async def gives() -> PlainTextResponse:
    own = BackgroundTasks()
    own.add_task(work)
    return PlainTextResponse("ok", background=own)


@app.get("/sets")
async def sets() -> PlainTextResponse:
    own, response = BackgroundTasks(), PlainTextResponse("ok")
    own.add_task(work)
    response.background = own
    return response
"""

SOCKETS = """
router, outer = APIRouter(), APIRouter()


async def work() -> None: ...


def schedules(tasks: BackgroundTasks) -> None:
    tasks.add_task(work)


@router.websocket("/live")  # websocket
async def live(socket: WebSocket, tasks: BackgroundTasks) -> None: ...


@router.websocket("/deep")  # websocket
async def deep(socket: WebSocket, scheduled: None = Depends(schedules)) -> None: ...


@router.websocket("/fine")
async def fine(socket: WebSocket) -> None: ...


outer.include_router(router, prefix="/inner")
app.include_router(outer, prefix="/outer")
"""


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(WAITS, id="functions that wait"),
        pytest.param(METHODS, id="bound and wrapped functions"),
        pytest.param(LIBRARY, id="functions of libraries"),
        pytest.param(CONTAINERS, id="containers"),
        pytest.param(SOCKETS, id="websockets"),
    ],
)
def test_each_rule_finds_the_marked_lines_and_no_other(source: str, folder: Path) -> None:
    """A comment names the kind of the finding; tasks without a timeout aside, there is nothing else."""
    lines = (HEAD + source).splitlines()
    (folder / "marked.py").write_text(HEAD + source)
    found = [one for one in reported(folder, "marked:app")["findings"] if one["kind"] != "no_timeout"]
    marked = {(number, mark) for number, line in enumerate(lines, 1) if " " not in (mark := line.partition("  # ")[2])}
    assert {(one["line"], one["kind"]) for one in found} == {each for each in marked if each[1]}
    assert all(one["file"] == str(folder / "marked.py") for one in found)


def test_a_bound_method_is_named_by_its_class(folder: Path) -> None:
    """As when it runs, so that its policy in the settings is found."""
    (folder / "methods.py").write_text(HEAD + METHODS)
    tasks = reported(folder, "methods:app")["tasks"]
    assert set(tasks) == {f"methods.{name}" for name in ("Publisher._publish", "Other.send", "Other.plain", "wrapped")}


def test_a_finding_of_a_librarys_function_points_to_where_it_is_added(folder: Path) -> None:
    """With a remedy that can be applied there: `@task` cannot be written into a library."""
    (folder / "library.py").write_text(HEAD + LIBRARY)
    findings = {one["task"]: one for one in reported(folder, "library:app")["findings"] if one["kind"] == "no_timeout"}
    lines = (HEAD + LIBRARY).splitlines()
    for name, added in (("shutil.rmtree", "BackgroundTask(rmtree"), ("builtins.print", "add_task(print")):
        assert findings[name]["file"] == str(folder / "library.py") and added in lines[findings[name]["line"] - 1]
        assert f'Settings(policies={{"{name}": Policy(timeout=…)}})' in findings[name]["remedy"]
        assert "@task" not in findings[name]["remedy"]


@pytest.mark.parametrize(
    ("routes", "kinds"),
    [
        ('app.mount("/inner", Mount("", routes=[Route("/metrics", numbers)]))', []),
        ('app.mount("/", Mount("", routes=[Route("/metrics", numbers)]))', ["metrics_path_taken"]),
        ('app.include_router(router, prefix="/inner")', []),
        ("app.include_router(router)", ["metrics_path_taken"]),
        ("app.include_router(router)\napp = GZipMiddleware(app)", ["metrics_path_taken"]),
    ],
)
def test_a_route_is_compared_with_its_prefix(routes: str, kinds: list[str], folder: Path) -> None:
    """Below mounts, in included routers, and inside of middleware."""
    handler = 'router = APIRouter()\n@router.get("/metrics")\nasync def numbers(): ...\n'
    (folder / "nested.py").write_text(f"{HEAD}\n{handler}\n{routes}\n")
    assert [one["kind"] for one in reported(folder, "nested:app")["findings"]] == kinds


def test_mocks_and_proxies_do_no_harm(folder: Path) -> None:
    """Objects that make up any attribute are tasks like others."""
    source = """
from unittest.mock import AsyncMock, MagicMock
from xmlrpc.client import ServerProxy

mock, later, remote = MagicMock(), AsyncMock(), ServerProxy("http://localhost:1").ping


@app.get("/")
async def endpoint(tasks: BackgroundTasks) -> None:
    tasks.add_task(mock)
    tasks.add_task(later)
    tasks.add_task(remote)
"""
    (folder / "odd.py").write_text(HEAD + source)
    assert {one["kind"] for one in reported(folder, "odd:app")["findings"]} == {"no_timeout"}


# --- transactions

SESSIONS = '''
from collections.abc import AsyncIterator, Iterator

from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker
from starlette.background import BackgroundTask
from starlette.responses import JSONResponse

from aftertask import AftertaskMiddleware, Settings, task

engine, async_engine = create_engine("sqlite://"), create_async_engine("sqlite+aiosqlite://")
Made, AsyncMade = sessionmaker(engine), async_sessionmaker(async_engine)
app, router = FastAPI(), APIRouter()
app.add_middleware(AftertaskMiddleware, settings=Settings())


@task(timeout=5)
async def mails() -> None:
    """A task."""


def commits() -> Iterator[Session]:
    session = Made()
    try:
        yield session
        session.commit()  # after
    except Exception:
        session.rollback()
        raise
    finally:
        session.close()


async def begins() -> AsyncIterator[AsyncSession]:
    async with AsyncMade() as session, session.begin():  # around
        yield session


def closes() -> Iterator[Session]:
    with Made() as session:  # closes only
        yield session


def no_task() -> Iterator[Session]:
    with Made.begin() as session:
        yield session


def in_the_function() -> Iterator[Session]:
    with Made.begin() as session:
        yield session


def before() -> Iterator[Session]:
    session = Made()
    session.commit()
    yield session


def by_hand() -> Iterator[Session]:
    with Made.begin() as session:
        yield session


def repository(session: Session = Depends(commits)) -> Session:
    return session


@app.post("/injected")
def injected(tasks: BackgroundTasks, session: Session = Depends(repository)) -> None:
    tasks.add_task(mails)


@router.post("/carried")
def carried(session: AsyncSession = Depends(begins), other: Session = Depends(closes)) -> JSONResponse:
    return JSONResponse({}, background=BackgroundTask(mails))


@app.post("/none")
def none(session: Session = Depends(no_task)) -> None: ...


@app.post("/scope")
def scoped(tasks: BackgroundTasks, session: Session = Depends(in_the_function, scope="function")) -> None:
    tasks.add_task(mails)


@app.post("/before")
def committed_before(tasks: BackgroundTasks, session: Session = Depends(before)) -> None:
    tasks.add_task(mails)


@app.post("/hand")
def commits_itself(tasks: BackgroundTasks, session: Session = Depends(by_hand)) -> None:
    session.commit()
    tasks.add_task(mails)


app.include_router(router, prefix="/more")
'''


LINES = {
    "commits": "        session.commit()  # after",
    "begins": "    async with AsyncMade() as session, session.begin():  # around",
    "closes": "    with Made() as session:  # closes only",
}


def found_in(folder: Path, source: str) -> dict[int, dict[str, Any]]:
    """The findings about transactions in an app with sessions, by line."""
    (folder / "sessions.py").write_text(source)
    found = reported(folder, "sessions:app")["findings"]
    return {one["line"]: one for one in found if one["kind"] == "runs_before_commit"}


@pytest.mark.skipif(not HAS_SCOPE, reason="dependencies have a scope since FastAPI 0.121")
def test_a_dependency_that_commits_after_the_tasks_is_found(folder: Path) -> None:
    """By its line, with the endpoints whose tasks come first, the versions of FastAPI and the remedies."""
    found = found_in(folder, SESSIONS)
    lines = {word: SESSIONS.splitlines().index(line) + 1 for word, line in LINES.items()}
    assert set(found) == set(lines.values())
    commits, begins, closes = (found[lines[word]] for word in LINES)
    assert (commits["severity"], begins["severity"], closes["severity"]) == ("warning", "warning", "note")
    assert commits["message"].startswith(
        "sessions.commits commits after the tasks of sessions.injected (from FastAPI 0.118"
    )
    assert "sessions.carried" in begins["message"] and "sessions.carried" in closes["message"]
    assert 'Depends(sessions.commits, scope="function")' in commits["remedy"]
    assert 'Settings(run_after="request")' in commits["remedy"]
    assert commits["file"] == str(folder / "sessions.py")


def test_tasks_after_the_request_come_after_every_commit(folder: Path) -> None:
    """There is nothing to find."""
    source = SESSIONS.replace("settings=Settings()", 'settings=Settings(run_after="request")')
    assert found_in(folder, source.replace(', scope="function"', "")) == {}


@pytest.mark.skipif(HAS_SCOPE, reason="here dependencies have a scope")
def test_an_older_fastapi_and_dependencies_that_commit(folder: Path) -> None:
    """Before 0.118 it is a note for the update; the remedy names the version that it needs."""
    found = found_in(folder, SESSIONS.replace(', scope="function"', ""))
    commits = next(one for one in found.values() if one["message"].startswith("sessions.commits"))
    assert commits["severity"] == ("warning" if TASKS_COME_FIRST else "note")
    assert "FastAPI 0.121 and later" in commits["remedy"]
