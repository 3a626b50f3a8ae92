"""Calls as users write them, for the type checker alone: `mypy` reads this file, nothing runs it."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any, assert_type

from fastapi import BackgroundTasks, FastAPI
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.middleware import Middleware

from aftertask import (
    AftertaskMiddleware,
    Limit,
    Policy,
    Retry,
    Settings,
    TaskEvent,
    TaskRun,
    TaskTimeout,
    current_run,
    get_run,
    note,
    observe_functions,
    options,
    progress,
    task,
)
from aftertask.alerts import Alert, Alerts, Apprise, Channel, DeliveryFailed, Route, Tested, Webhook, send_test
from aftertask.events import Failed, StoredRun
from aftertask.signals import Logs, Metrics, Tracing, usual
from aftertask.testing import Recorder, VirtualClock

app = FastAPI()
app.add_middleware(AftertaskMiddleware)
settings = Settings(
    registry=CollectorRegistry(), trace="link", exclude=("/health",), policies={"mail.*": Policy(owner="x")}
)
app.add_middleware(AftertaskMiddleware, settings=settings, signals=[*usual(settings), print])
Starlette(middleware=[Middleware(AftertaskMiddleware, signals=[Tracing(), Metrics(), Logs()])])


@task
def plain(number: int) -> str:
    return str(number)


@task(name="mail.welcome", owner="growth", expected=(ValueError, KeyError), trace="none")
async def welcome(email: str, *, again: bool = False) -> None: ...


assert_type(plain(3), str)
smtp = Limit("smtp", 5, max_waiting=10)


async def noted(run: TaskRun, error: Exception) -> None:
    assert_type(run.state, str)


@task(
    timeout=20,
    retry=Retry(attempts=4, on=(OSError, TaskTimeout), give_up_on=FileNotFoundError),
    limit=smtp,
    priority=10,
    on_failure="contain",
    expires=60.5,
    run_on_error=True,
    idempotent=True,
    executor="thread",
    on_error=noted,
)
def governed() -> None:
    progress(1, 2, "half way")
    note(user_id=42, plan="free")


options(governed, limit=3, on_error=lambda run, error: run.task)
Settings(on_failure="continue", max_waiting=10, thread_limit=8, drain_timeout=30)
call: Callable[..., Any] = options(welcome, trace="link")
assert_type(options(plain, observe=False)(3), str)


@observe_functions
class Queue(BackgroundTasks): ...


def signal(event: TaskEvent) -> None:
    if isinstance(event, Failed):
        assert_type(event.failure.message, str)
        assert_type(event.run.id, str)


def request_id(scope: MutableMapping[str, Any]) -> str | None:
    return None


AftertaskMiddleware(app, settings=Settings.from_env(request_id=request_id), signals=[signal])
assert_type(current_run(), TaskRun | None)


async def look_up() -> None:
    assert_type(await get_run("x"), TaskRun | StoredRun | None)


recorder = Recorder()
with VirtualClock() as clock:
    clock.advance(3)
assert_type(recorder.of(Failed), list[Failed])


def page(alert: Alert) -> None:
    assert_type(alert.owner, str | None)
    raise DeliveryFailed("no", retry_after=3)


async def post(alert: Alert) -> None: ...


class Pager:
    def __call__(self, alert: Alert) -> None: ...


channel: Channel = Pager()
settings = Settings(
    alerts=[
        page,
        post,
        channel,
        "https://example.org/hook",
        Webhook("https://example.org", headers={"X": "y"}),
        Route(Apprise("slack://a/b/c"), severity="critical", owner=["a", "b"], task="mail.*", rate=3, per=60),
    ],
    trace_url="https://tempo/{trace_id}",
)
assert_type(send_test(settings.alerts), list[Tested])
AftertaskMiddleware(app, settings=settings, signals=[*usual(settings), Alerts([page], burst=100, repeat_after=60)])
