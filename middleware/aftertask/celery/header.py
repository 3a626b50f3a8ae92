"""aftertask's one header on a Celery message; everything else is in Celery's own fields."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields

from .._signatures import signature_of
from ..errors import UnknownMessage

#: The header's name.
NAME = "aftertask"

#: What this version of aftertask writes and reads.
VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """
    What a worker learns of a run besides Celery's own fields.

    Attributes:
        scheduled_at: When the run was scheduled, in seconds since the Unix epoch; None if the sender did not say.
        carrier: W3C trace context of the span that sent the message: `traceparent`, `tracestate`.
        first: The same of the run's first attempt, once there is another.
        http_route, http_method, request_id: The request that scheduled the run; None outside of one.
        signature: Fingerprint of the function's parameters, for a task of `@task`.
    """

    scheduled_at: float | None = None
    carrier: Mapping[str, str] = field(default_factory=dict)
    first: Mapping[str, str] = field(default_factory=dict)
    http_route: str | None = None
    http_method: str | None = None
    request_id: str | None = None
    signature: str | None = None

    def plain(self) -> dict[str, object]:
        """The header as JSON."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {"v": VERSION, **{name: value for name, value in values.items() if value}}


@functools.lru_cache(1000)
def fingerprint(function: Callable[..., object]) -> str:
    """Eight hex digits that change with the names, kinds and annotations of the parameters."""
    parts = [f"{each.kind}:{each.name}:{each.annotation!r}" for each in signature_of(function).parameters.values()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def read(value: object) -> Header:
    """
    The header of a message; an empty one if it has none.

    Raises:
        UnknownMessage: It has another version.
    """
    if not isinstance(value, Mapping):
        return Header()
    if value.get("v") != VERSION:
        raise UnknownMessage(
            f"the message has version {value.get('v')!r} of aftertask's header, and this worker reads {VERSION}; "
            f"deploy workers before web processes"
        )
    return Header(**{each.name: value[each.name] for each in fields(Header) if each.name in value})
