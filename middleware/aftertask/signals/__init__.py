"""Who is told: `Tracing`, `Metrics`, `Logs`; `usual` is the list an app has when it names none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..events import Signal
from .logs import Logs, RunFilter
from .metrics import Metrics
from .tracing import Tracing

if TYPE_CHECKING:
    from ..settings import Settings

__all__ = ["Logs", "Metrics", "RunFilter", "Tracing", "usual"]


def usual(settings: Settings) -> list[Signal]:
    """
    The signals that `signals=None` means, to add one's own to: `signals=[*usual(settings), mine]`.

    Tracing comes first, so that the others know an attempt's span.
    """
    return [
        Tracing(settings.tracer_provider, trace=settings.trace),
        Metrics(settings.registry, tasks=[name for name in settings.policies if not any(c in name for c in "*?[")]),
        Logs(success_log_rate=settings.success_log_rate),
    ]
