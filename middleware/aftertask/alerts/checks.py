"""Checks of values that alerts are configured with. Each raises a `TypeError` or `ValueError` that names the value."""

from __future__ import annotations


def check_base_url(name: str, value: object) -> None:
    """Require an HTTP URL or None."""
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name} must be a URL or None, got {value!r}")
    if isinstance(value, str) and not value.startswith(("https://", "http://")):
        raise ValueError(f"{name} must begin with https:// or http://, got {value!r}")


def check_trace_url(name: str, value: object) -> None:
    """Require an HTTP URL with the placeholder `{trace_id}`, or None."""
    check_base_url(name, value)
    if value is not None and "{trace_id}" not in str(value):
        raise ValueError(
            f"{name} must contain {{trace_id}}, such as https://tempo.example.org/trace/{{trace_id}}, got {value!r}"
        )
