"""The signals that come with aftertask: `Tracing`, `Metrics`, `Logs`; and `usual`, an app's default list of signals."""

from __future__ import annotations

import functools

from ..alerts import Alerts
from ..events import Signal
from ..policies import is_pattern
from ..settings import Settings
from ._filter import RunFilter
from .logs import Logs
from .metrics import Metrics
from .tracing import Tracing, service_name

__all__ = ["Logs", "Metrics", "RunFilter", "Tracing", "usual"]


def usual(settings: Settings) -> list[Signal]:
    """
    The signals an app has by default; add your own with `signals=[*usual(settings), mine]`.

    `Tracing` comes first, so that the others see the span of an attempt. `Alerts` is included if `Settings.alerts` has
    a channel.
    """
    metrics = Metrics(settings.registry, tasks=[name for name in settings.policies if not is_pattern(name)])
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
                service=functools.partial(service_name, settings.tracer_provider),
                redact=settings.redact,
                metrics=metrics,
            )
        )
    return signals
