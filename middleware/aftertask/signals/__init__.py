"""Who is told: `Tracing`, `Metrics`, `Logs`; `usual` is the list an app has when it names none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..alerts import Alerts
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

    Tracing comes first, so that the others know an attempt's span; `Alerts` is there where `Settings.alerts` names a
    channel.
    """
    metrics = Metrics(
        settings.registry, tasks=[name for name in settings.policies if not any(c in name for c in "*?[")]
    )
    signals: list[Signal] = [
        Tracing(settings.tracer_provider, trace=settings.trace),
        metrics,
        Logs(success_log_rate=settings.success_log_rate),
    ]
    if settings.alerts:
        signals.append(
            Alerts(
                settings.alerts,
                trace_url=settings.trace_url,
                runbook_url=settings.runbook_url,
                redact=settings.redact,
                numbers=metrics,
            )
        )
    return signals
