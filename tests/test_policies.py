"""Names and policies of tasks: @task, options() and the policies of Settings."""

from __future__ import annotations

import functools
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from aftertask import Limit, NameClash, Policy, Retry, Settings, TaskEvent, options, task
from aftertask.events import Failed, Scheduled
from aftertask.policies import PolicyBook
from aftertask.tasks import code_name, registration
from kit import ClientFor


def plain() -> None: ...


async def coroutine() -> None: ...


class Mailer:
    """Every kind of callable that a class has."""

    def method(self) -> None: ...

    @classmethod
    def of_class(cls) -> None: ...

    @staticmethod
    def static() -> None: ...

    def __call__(self) -> None: ...


class Hostile:
    """An object that has no attribute and raises when asked for one."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"no {name} for you")

    def __call__(self) -> None: ...


def local() -> Callable[[], None]:
    def inner() -> None: ...

    return inner


HERE = __name__


NAMED: list[tuple[Any, str]] = [
    (plain, f"{HERE}.plain"),
    (coroutine, f"{HERE}.coroutine"),
    (functools.partial(plain), f"{HERE}.plain"),
    (functools.partial(functools.partial(coroutine)), f"{HERE}.coroutine"),
    (options(plain, trace="none"), f"{HERE}.plain"),
    (Mailer().method, f"{HERE}.Mailer.method"),
    (Mailer.of_class, f"{HERE}.Mailer.of_class"),
    (Mailer.static, f"{HERE}.Mailer.static"),
    (Mailer(), f"{HERE}.Mailer"),
    (Mailer, f"{HERE}.Mailer"),
    ([].append, "builtins.list.append"),
    (print, "builtins.print"),
    (local(), f"{HERE}.local.<locals>.inner"),
    (lambda: None, f"{HERE}.<lambda>"),
    (Hostile(), f"{HERE}.Hostile"),
]


@pytest.mark.parametrize(("func", "name"), NAMED, ids=[name for _, name in NAMED])
def test_a_task_is_named_by_module_and_qualname(func: Any, name: str) -> None:
    """The name is never a `repr`, whatever the callable is."""
    assert code_name(func) == name


def test_main_is_named_as_python_was_started(tmp_path: Path) -> None:
    """`__main__` is the module's own name under `python -m`, else `__main__`."""
    (tmp_path / "program.py").write_text("from aftertask.tasks import code_name\ndef f(): ...\nprint(code_name(f))\n")
    run = functools.partial(subprocess.run, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert run([sys.executable, "program.py"]).stdout.strip() == "__main__.f"
    assert run([sys.executable, "-m", "program"]).stdout.strip() == "program.f"


def test_a_registered_function_stays_itself() -> None:
    """@task returns the same function, which can be called and pickled as before."""
    assert task(name="mail.send", owner="growth")(plain) is plain
    assert pickle.loads(pickle.dumps(plain)) is plain
    assert plain() is None  # type: ignore[func-returns-value]  # that it can be called is the point


def test_a_name_clash_is_an_error() -> None:
    """Two functions under one name would share their metrics."""
    task(name="mail.send")(local())
    with pytest.raises(NameClash, match=r"'mail.send' is already used by .*local.*inner, so .*coroutine"):
        task(name="mail.send")(coroutine)


def test_a_reload_is_no_clash() -> None:
    """The same module and qualname may register the name again."""
    task(name="mail.again")(local())
    task(name="mail.again")(local())


@pytest.mark.parametrize(
    ("policy", "error", "message"),
    [
        ({"nam": "x"}, TypeError, "unknown policy option 'nam'; did you mean 'name'?"),
        ({"qqq": 3}, TypeError, "unknown policy option 'qqq'; known are alert, "),
        ({"timeout": 0}, ValueError, "Policy.timeout must be more than 0 seconds, got 0"),
        ({"timeout": "3"}, TypeError, "Policy.timeout must be a number of seconds, got '3'"),
        ({"timeout": float("inf")}, ValueError, "Policy.timeout"),
        ({"timeout": float("nan")}, ValueError, "Policy.timeout"),
        ({"retry": 3}, TypeError, "write Retry(attempts=3)"),
        ({"limit": -1}, ValueError, "Policy.limit must be at least 1, got -1"),
        ({"limit": True}, TypeError, "Policy.limit must be a whole number, got True"),
        ({"priority": 1.5}, TypeError, "Policy.priority must be a whole number"),
        ({"on_failure": "ignore"}, ValueError, "Policy.on_failure must be one of 'stop', 'continue', 'contain'"),
        (
            {"executor": "threads"},
            ValueError,
            "'process', or the name of an engine, got 'threads'; did you mean 'thread'?",
        ),
        ({"expires": -1}, ValueError, "Policy.expires"),
        ({"run_on_error": 1}, TypeError, "Policy.run_on_error must be True, False or None, got 1"),
        ({"on_error": "log"}, TypeError, "Policy.on_error must be a function"),
        ({"on_error": lambda: None}, TypeError, "the run and the exception, but <lambda> does not take"),
        ({"severity": "bad"}, ValueError, "Policy.severity"),
        ({"alert_after": 0}, ValueError, "Policy.alert_after must be at least 1"),
        ({"stuck_after": 0}, ValueError, "Policy.stuck_after"),
        ({"name": ""}, TypeError, "Policy.name must be a non-empty string"),
        ({"owner": 3}, TypeError, "Policy.owner"),
        ({"observe": "no"}, TypeError, "Policy.observe must be True, False or None, got 'no'"),
        (
            {"expected": (KeyboardInterrupt,)},
            TypeError,
            "Policy.expected must be an exception class or a tuple",
        ),
        ({"expected": "ValueError"}, TypeError, "Policy.expected must be an exception class or a tuple"),
        ({"trace": "yes"}, ValueError, "Policy.trace must be one of 'child', 'link', 'none', got 'yes'"),
    ],
)
def test_a_bad_policy_is_refused(policy: dict[str, Any], error: type[Exception], message: str) -> None:
    """The error names the option when the decorator is applied."""
    with pytest.raises(error) as caught:
        task(**policy)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Retry(attempts=0), "Retry.attempts must be at least 1, got 0; 1 means no retry"),
        (lambda: Retry(wait_initial=-1), "Retry.wait_initial must be at least 0 seconds"),
        (lambda: Retry(wait_max=float("inf")), "Retry.wait_max"),
        (lambda: Retry(on="ValueError"), "Retry.on must be an exception class or a tuple"),
        (
            lambda: Retry(give_up_on=(KeyboardInterrupt,)),
            "Retry.give_up_on must be an exception class or a tuple",
        ),
        (lambda: Limit("", 3), "Limit.name must be a non-empty string"),
        (lambda: Limit("smtp", 5, max_wait=3), "unknown argument 'max_wait' of Limit; did you mean 'max_waiting'"),
        (lambda: Limit("smtp", 0), "Limit.size must be at least 1, got 0"),
        (lambda: Limit("smtp", 1, max_waiting=-1), "Limit.max_waiting must be at least 0"),
        (lambda: Settings(policies={"a": Policy(limit=Limit("x", 1)), "b": Policy(limit=Limit("x", 1))}), "share one"),
        (lambda: Settings(on_failure="ignore"), "Settings.on_failure"),
        (lambda: Settings(max_waiting=-1), "Settings.max_waiting"),
        (lambda: Settings(thread_limit=0), "Settings.thread_limit"),
        (lambda: Settings(drain_timeout=0), "Settings.drain_timeout"),
    ],
)
def test_a_bad_value_is_refused_by_name(make: Callable[[], Any], message: str) -> None:
    """A Retry or Limit checks its values when it is made, not when a task runs."""
    with pytest.raises((TypeError, ValueError)) as caught:
        make()
    assert message in str(caught.value)


def test_the_waits_of_a_retry_grow_with_full_jitter() -> None:
    """Each wait is between 0 and a bound that doubles up to `wait_max`; no attempt overflows."""
    retry = Retry(attempts=9, wait_initial=1, wait_max=5)
    for attempt, most in [(1, 1), (2, 2), (3, 4), (4, 5), (5000, 5)]:
        drawn = [retry.delay_s(attempt) for _ in range(300)]
        assert 0 <= min(drawn) < 0.2 * most
        assert 0.8 * most < max(drawn) <= most


def test_a_retry_applies_to_the_errors_it_names() -> None:
    """`give_up_on` wins over `on`."""
    retry = Retry(on=(OSError, KeyError), give_up_on=FileNotFoundError)
    wanted = [retry.applies_to(error) for error in (OSError(), KeyError(), FileNotFoundError(), ValueError())]
    assert wanted == [True, True, False, False]


def test_a_function_without_attributes_cannot_be_decorated() -> None:
    """The error points to Settings.policies, which can name a builtin."""
    with pytest.raises(TypeError, match=r"name it in Settings\.policies instead"):
        task(print)
    with pytest.raises(TypeError, match="registers a function, got 3"):
        task(3)  # type: ignore[call-overload]  # the mistake


def test_options_leave_name_and_owner_to_the_task() -> None:
    """The policy of one call cannot rename the task."""
    with pytest.raises(TypeError, match="name belongs to the task"):
        options(plain, name="other")


def test_a_policy_book_resolves_field_by_field() -> None:
    """options() wins over an exact name, that over patterns in their order, those over @task."""
    declared = Policy(name="mail.send", owner="declared", expected=(ValueError,), trace="none")
    book = PolicyBook(
        {
            "mail.*": Policy(owner="first pattern"),
            "*": Policy(owner="second pattern", observe=False),
            "mail.send": Policy(trace="link"),
        }
    )

    chosen = book.policy("mail.send", Policy(expected=KeyError), declared)

    assert (chosen.owner, chosen.observe, chosen.trace, chosen.expected_classes) == (
        "first pattern",
        False,
        "link",
        (KeyError,),
    )


def test_a_task_that_is_not_observed_runs_without_events(client_for: ClientFor, registry: CollectorRegistry) -> None:
    """With `observe=False` it has neither an event nor a series."""
    ran: list[str] = []

    @task(name="quiet", observe=False)
    async def quiet() -> None:
        ran.append("quiet")

    def loud() -> None:
        ran.append("loud")

    seen: list[TaskEvent] = []
    client_for(quiet, loud, signals=[seen.append]).get("/")

    assert ran == ["quiet", "loud"]
    assert {event.run.task.rpartition(".")[2] for event in seen} == {"loud"}


def test_settings_win_over_the_decorator(client_for: ClientFor) -> None:
    """Settings.policies by name overrides @task."""

    @task(name="job", observe=False)
    async def job() -> None: ...

    seen: list[TaskEvent] = []
    client_for(job, signals=[seen.append], policies={"job": Policy(observe=True)}).get("/")

    assert [type(event).__name__ for event in seen] == ["Scheduled", "Started", "Succeeded"]


def test_expected_exceptions_are_failed_and_not_bad(client_for: ClientFor, registry: CollectorRegistry) -> None:
    """A declined card is part of the task's work; any other error is bad."""

    @task(name="charge", expected=LookupError)
    async def charge() -> None:
        raise KeyError("declined")

    seen: list[TaskEvent] = []
    client_for(charge, signals=[seen.append]).get("/")

    failed = seen[-1]
    assert isinstance(failed, Failed)
    assert (failed.expected, failed.bad) == (True, False)


def test_options_work_with_sync_and_async_functions(client_for: ClientFor) -> None:
    """The result of options() runs where the function itself would."""
    ran: list[str] = []

    def sync(word: str) -> None:
        ran.append(word)

    async def asynchronous(word: str) -> None:
        ran.append(word)

    seen: list[TaskEvent] = []
    calls = [functools.partial(options(each, trace="none"), each.__name__) for each in (sync, asynchronous)]
    client_for(*calls, signals=[seen.append]).get("/")

    assert ran == ["sync", "asynchronous"]
    assert [event.run.info.executor for event in seen if isinstance(event, Scheduled)] == ["thread", "inline"]


def test_task_may_stand_above_the_decorators_of_a_class() -> None:
    """Above or below @staticmethod and @classmethod it marks the function, for the class and for its objects."""

    class Shop:
        @task(priority=3)
        @classmethod
        def of_class(cls) -> None: ...

        @task(priority=4)
        @staticmethod
        def static() -> None: ...

    for func, priority in ((Shop.of_class, 3), (Shop().of_class, 3), (Shop.static, 4), (Shop().static, 4)):
        entry = registration(func)
        assert entry is not None
        assert entry.policy.priority == priority
