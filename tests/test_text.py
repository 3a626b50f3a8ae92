"""Exceptions as text: redacted, bounded, grouped, never raising."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aftertask._text import (
    LONGEST_MESSAGE,
    LONGEST_REDACTED,
    LONGEST_STACK,
    default_redact,
    error_message,
    error_type,
    fingerprint,
    is_library_file,
    stack,
)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("postgres://shop:hunter2@db/orders", "postgres://shop:[redacted]@db/orders"),
        ("redis://:hunter2@cache", "redis://:[redacted]@cache"),
        ("Authorization: Bearer abc.def-123456", "Authorization: [redacted]"),
        ("sent Bearer abcdef123456 to them", "sent Bearer [redacted] to them"),
        ("login failed: password=hunter2 user=bob", "login failed: password=[redacted] user=bob"),
        ('{"api_key": "s3cr3t, really", "id": 3}', '{"api_key": [redacted], "id": 3}'),
        ("{'db_password': 'x y z'}", "{'db_password': [redacted]}"),
        ("X-Api-Key: 123abc; next", "X-Api-Key: [redacted]; next"),
        ("dsn=https://key@sentry/1", "dsn=[redacted]"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abc_DEF is expired", "[redacted] is expired"),
        ("AKIAIOSFODNN7EXAMPLE denied", "[redacted] denied"),
        ("ghp_abcdefghijklmnopqrstuvwxyz0123456789 revoked", "[redacted] revoked"),
        ("sk_live_abcdefghijklmnop", "[redacted]"),
        ("xoxb-1234567890-abcdef", "[redacted]"),
        ("card 4111 1111 1111 1111 declined", "card [redacted] declined"),
        ("card 4111-1111-1111-1111 declined", "card [redacted] declined"),
        ("no mailbox for ada.lovelace+x@example.co.uk!", "no mailbox for [redacted]!"),
    ],
)
def test_a_secret_is_taken_out_and_the_rest_stays(text: str, left: str) -> None:
    """The key or scheme stays, so that the message can still be read."""
    assert default_redact(text) == left


@pytest.mark.parametrize(
    "text",
    [
        "order 4111111111111112 not found",  # sixteen digits, but no card
        "KeyError: 'orders'",
        'File "/srv/shop/tasks.py", line 12, in charge_card',
        "2026-11-23T10:00:00.123456Z",
        "01a20834-91bf-7681-8b73-4cdaf03b7b2b",
        "https://example.com/orders/12?page=3",
        "passing 3 of 4 checks: authors are fine",
        "tokenizer broke",
        "object at 0x7f763c30eca0",
    ],
)
def test_ordinary_text_stays(text: str) -> None:
    """Text that looks a little like a secret is left alone."""
    assert default_redact(text) == text


@given(st.text(max_size=300))
def test_redacting_never_raises_and_is_idempotent(text: str) -> None:
    """An app may put any text into an exception."""
    once = default_redact(text)
    assert default_redact(once) == once


@pytest.mark.parametrize("evil", ["a@", "password", "1 " * 10, "eyJ", "x://a:", "token=", "a_-", "'\"", "=", "a." * 30])
def test_redacting_takes_linear_time(evil: str) -> None:
    """A hostile message of a megabyte is done within the time of a test: no pattern backtracks."""
    default_redact(evil * (1_000_000 // len(evil)))


def test_a_long_text_loses_its_middle() -> None:
    """Head and tail matter most."""
    text = default_redact("head " + "x" * 50_000 + " tail")
    assert text.startswith("head ")
    assert text.endswith(" tail")
    assert len(text) < LONGEST_REDACTED + 100


class Unspeakable(Exception):
    """An error whose text cannot be made."""

    def __str__(self) -> str:
        raise RuntimeError("no")


def raised(function: Callable[[], object]) -> BaseException:
    """The exception that a function raises, with its traceback."""
    try:
        function()
    except BaseException as error:
        return error
    raise AssertionError("it did not raise")


def test_error_types_are_named_as_in_the_contract() -> None:
    """A builtin by its bare name, any other class with its module."""
    assert error_type(KeyError("x")) == "KeyError"
    assert error_type(Unspeakable()) == f"{__name__}.Unspeakable"


def test_a_message_never_raises_and_is_short() -> None:
    """Whatever the exception's `__str__` does."""
    assert error_message(Unspeakable(), str) == "[its message cannot be read: RuntimeError]"
    assert len(error_message(ValueError("x" * 5000), str)) == LONGEST_MESSAGE


def test_a_redaction_that_fails_withholds_the_text() -> None:
    """No message is better than a leaked one."""

    def broken(text: str) -> str:
        raise RuntimeError("regex gone wrong")

    error = raised(lambda: int("hunter2"))
    assert "hunter2" not in error_message(error, broken) + stack(error, broken)


def test_a_stack_has_causes_and_no_locals() -> None:
    """It is printed as Python prints it, redacted and bounded."""

    def inner() -> None:
        secret_local = "do not show"
        raise ValueError("password=hunter2" + secret_local[:0])

    def outer() -> None:
        try:
            inner()
        except ValueError as error:
            raise RuntimeError("outer") from error

    text = stack(raised(outer), default_redact)
    assert "ValueError: password=[redacted]" in text
    assert "The above exception was the direct cause" in text
    assert "in inner" in text
    assert "do not show" not in text.replace('secret_local = "do not show"', "")

    def deep(level: int) -> None:
        if level:
            deep(level - 1)
        raise ValueError("x" * 20_000)

    assert len(stack(raised(lambda: deep(50)), str)) < LONGEST_STACK + 100


def test_a_stack_has_every_error_of_a_group() -> None:
    """The members of an ExceptionGroup are in it."""

    def group() -> None:
        raise ExceptionGroup("two", [KeyError("a"), LookupError("b")])

    text = stack(raised(group), str)
    assert "KeyError" in text
    assert "LookupError" in text


def test_a_fingerprint_is_of_the_class_and_the_function() -> None:
    """It is the same for another line or message in that function, and differs for another class or function."""

    def one(kind: type[Exception], text: str) -> None:
        if text == "b":
            raise kind(text)
        raise kind(text)

    def two() -> None:
        raise ValueError("a")

    first = fingerprint(raised(lambda: one(ValueError, "a")))
    assert len(first) == 16
    assert first == fingerprint(raised(lambda: one(ValueError, "b")))
    assert first != fingerprint(raised(lambda: one(KeyError, "a")))
    assert first != fingerprint(raised(two))
    # Where a library raises, the app's own function counts.
    assert fingerprint(raised(lambda: int("a"))) == fingerprint(raised(lambda: int("b")))
    assert fingerprint(ValueError("never raised")) == fingerprint(ValueError("never raised either"))


@pytest.mark.parametrize("redact", [lambda text: None, lambda text: 1 / 0, lambda text: text.encode()])
def test_what_a_redaction_does_not_return_as_text_is_withheld(redact: Callable[[str], str]) -> None:
    """A function that forgot its `return` would make each message "None"."""
    assert error_message(ValueError("x"), redact) == "[redaction failed: text withheld]"


def test_the_script_of_a_server_is_not_the_app() -> None:
    """Every stack under gunicorn begins in it."""
    assert is_library_file(f"{sysconfig.get_path('scripts')}/gunicorn")
    assert not is_library_file(__file__)
