"""Whether a response may start: what it promises has to be kept first."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.types import Message

from .parts import Parts
from .run import Run


async def admit(parts: Parts, message: Message, runs: Sequence[Run], refusal: Exception | None) -> Message:
    """
    Await the admissions of the runs that a response carries, and name the runs in its header.

    Args:
        parts: The app's parts.
        message: The start of the response.
        runs: The runs.
        refusal: Why a run that had to be kept was not accepted; None if all were.

    Raises:
        Exception: The response must not start: `refusal`, or what an admission raised.
    """
    if refusal is not None:
        raise refusal
    await parts.emit.admit(runs)
    if parts.run_ids_header is None:
        return message
    header = parts.run_ids_header.lower().encode("latin-1"), ", ".join(run.id for run in runs).encode("latin-1")
    return {**message, "headers": [*message.get("headers", ()), header]}
