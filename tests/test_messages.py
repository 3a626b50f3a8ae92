"""The usual wrong inputs: each is one error that shows the way out."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI

from aftertask import AftertaskMiddleware, Limit, Policy, Retry, Settings, task
from aftertask.alerts import Route, Webhook
from aftertask.testing import recorded

MISTAKES: dict[str, tuple[Callable[..., Any], str]] = {
    "Policy(retries=3)": (lambda: Policy(retries=3), "unknown policy option 'retries'; write retry=Retry(attempts=…)"),
    "@task(retries=3)": (lambda: task(retries=3), "unknown policy option 'retries'; write retry=Retry(attempts=…)"),
    "Policy(concurrency=3)": (lambda: Policy(concurrency=3), "write limit=…, a number or a Limit"),
    "Policy(time_out=3)": (lambda: Policy(time_out=3), "did you mean 'timeout'?"),
    "Policy(3)": (lambda: Policy(3), "Policy takes keywords only, got 3; write Policy(timeout=…)"),
    "Retry(3)": (lambda: Retry(3), "write Retry(attempts=3)"),
    "Retry(max_attempts=3)": (lambda: Retry(max_attempts=3), "did you mean 'attempts'?"),
    "Retry(attempts='3')": (
        lambda: Retry(attempts="3"),
        "Retry.attempts must be a whole number, got '3'; write 3 without",
    ),
    "Retry(on=[…])": (lambda: Retry(on=[OSError]), "write a tuple: (A, B)"),
    "Policy(expected=[…])": (lambda: Policy(expected=[OSError]), "write a tuple: (A, B)"),
    "Policy(retry=3)": (lambda: Policy(retry=3), "write Retry(attempts=3)"),
    "Policy(timeout='20')": (lambda: Policy(timeout="20"), "got '20'; write 20 without quotes"),
    "Policy(retry=True)": (lambda: Policy(retry=True), "got True; write Retry(attempts=…)"),
    "Limit(5)": (lambda: Limit(5), "write Limit('smtp', 5); for one task alone limit=5 is enough"),
    "Limit('smtp')": (lambda: Limit("smtp"), "Limit takes a name and a size: write Limit('smtp', 5)"),
    "Limit(5, 'smtp')": (lambda: Limit(5, "smtp"), "Limit takes its name first, got 5: write Limit('smtp', 5)"),
    "Limit('smtp', '5')": (lambda: Limit("smtp", "5"), "write 5 without quotes"),
    "@task('name')": (lambda: task("mail.welcome"), "write @task(name='mail.welcome')"),
    "Settings('x')": (lambda: Settings("x"), "Settings takes keywords only, got 'x'"),
    "Settings(timeout=3)": (lambda: Settings(timeout=3), "write Settings(policies={'*': Policy(timeout=…)}) or @task"),
    "Settings(drain_timeout='4')": (lambda: Settings(drain_timeout="4"), "write 4 without quotes"),
    "Settings(block_threshold='0.5')": (lambda: Settings(block_threshold="0.5"), "write 0.5 without quotes"),
    "Settings(success_log_rate='4')": (lambda: Settings(success_log_rate="4"), "write 4 without quotes"),
    "Settings(thread_limit='4')": (lambda: Settings(thread_limit="4"), "write 4 without quotes"),
    "Settings(exclude='/health')": (lambda: Settings(exclude="/health"), "write exclude=['/health']"),
    "Settings(policies=[…])": (lambda: Settings(policies=[Policy()]), "write policies={'mail.*': Policy(timeout=20)}"),
    "Settings(policies={'mail.*': Policy(name='mail')})": (
        lambda: Settings(policies={"mail.*": Policy(name="mail")}),
        "Settings.policies['mail.*'] has name='mail', which all tasks that match would share; write @task(name=…) on "
        "each, or the exact name of one task as the key",
    ),
    "Settings(policies={'a': {…}})": (lambda: Settings(policies={"a": {"timeout": 3}}), "write Policy(timeout=3)"),
    "Route(owner=5)": (
        lambda: Route("https://example.org", owner=5),
        "Route.owner must be one name or several, got 5; write owner=['…', '…']",
    ),
    "Route(task=print)": (lambda: Route("https://example.org", task=print), "Route.task must be one name or several"),
    "recorded('main:app')": (
        lambda: recorded("main:app").__enter__(),
        "recorded() takes the Starlette or FastAPI app itself, got 'main:app'; import it and pass it",
    ),
    "signals=print": (
        lambda: AftertaskMiddleware(FastAPI(), signals=print),
        "signals must be a list of signals or None, got <built-in function print>; write signals=[*usual(settings), …]"
        ", with usual from aftertask.signals",
    ),
    "Limit(max_waiting=-1)": (
        lambda: Limit("smtp", 5, max_waiting=-1),
        "max_waiting must be at least 0, got -1; None means Settings.max_waiting",
    ),
    "Route(rate='3')": (lambda: Route("https://example.org", rate="3"), "write 3 without quotes"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_usual_mistake_shows_the_way_out(mistake: str) -> None:
    """The thing, the value, and what to write."""
    call, message = MISTAKES[mistake]
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("https://hooks.slack.com/services/T0/B0/s3cret", "use slack://TokenA/TokenB/TokenC"),
        ("https://discord.com/api/webhooks/1/s3cret", "use discord://WebhookID/WebhookToken"),
        ("https://acme.webhook.office.com/webhookb2/s3cret", "use msteams://"),
        ("https://example.org/s3cret;https://example.org/b", "must be separated by commas"),
        ("https://example.org/s3cret https://example.org/b", "must be separated by commas"),
        ("https://example.org/s3cret, example.org/b", "after a comma comes an entry without a scheme"),
        ("example.org/s3cret", "got one without a scheme: a webhook's address begins with https://"),
        ("#s3cret", "got one without a scheme"),
    ],
)
def test_a_mistake_in_the_channels_shows_the_way_out_and_no_secret(
    value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variable is named."""
    monkeypatch.setenv("AFTERTASK_ALERTS", value)
    with pytest.raises(ValueError, match="AFTERTASK_ALERTS") as caught:
        Settings.from_env()
    assert message in str(caught.value) and "s3cret" not in str(caught.value)


def test_channels_may_have_commas_and_spaces_between_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A comma that no scheme follows belongs to the URL."""
    monkeypatch.setenv("AFTERTASK_ALERTS", " https://example.org/a?to=x,y ,\n https://example.org/b, ")
    assert len(Settings.from_env().alerts) == 2


def test_a_chats_webhook_in_code_is_refused_as_well() -> None:
    """Only the host is shown."""
    with pytest.raises(ValueError, match=r"hooks\.slack\.com is a chat") as caught:
        Webhook("https://hooks.slack.com/services/T0/B0/s3cret")
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("value", [Policy(timeout=3, retry=Retry(attempts=2)), Retry(attempts=2)])
def test_values_can_be_copied_and_pickled(value: object) -> None:
    """What refuses wrong arguments is called for a copy, too, and without any."""
    assert pickle.loads(pickle.dumps(value)) == copy.deepcopy(value) == copy.copy(value) == value
    limit = copy.copy(Limit("smtp", size=5))
    assert (limit.name, limit.size) == ("smtp", 5)
