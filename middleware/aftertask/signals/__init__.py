"""The signals that come with aftertask: `Tracing`, `Metrics`, `Logs`; and `usual`, the list an app has by default."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

# Only the types of what `Settings` holds.
from opentelemetry.trace import TracerProvider
from prometheus_client import CollectorRegistry

from ..alerts import Alerts, Channel, Route
from ..events import Signal
from ..policies import Policy, Trace, is_pattern
from ._filter import RunFilter
from .logs import Logs
from .metrics import Metrics
from .tracing import Tracing, service_name

__all__ = ["Logs", "Metrics", "RunFilter", "SignalSettings", "Tracing", "usual"]


class SignalSettings(Protocol):
    """What `usual` reads: a part of `aftertask.Settings`, which documents each field."""

    @property
    def registry(self) -> CollectorRegistry: ...
    @property
    def policies(self) -> Mapping[str, Policy]: ...
    @property
    def tracer_provider(self) -> TracerProvider | None: ...
    @property
    def trace(self) -> Trace: ...
    @property
    def success_log_rate(self) -> float | None: ...
    @property
    def alerts(self) -> Sequence[Channel | Route | str]: ...
    @property
    def trace_url(self) -> str | None: ...
    @property
    def runbook_url(self) -> str | None: ...
    @property
    def redact(self) -> Callable[[str], str]: ...


def usual(settings: SignalSettings) -> list[Signal]:
    """
    The signals an app has by default; add your own with `signals=[*usual(settings), mine]`.

    Tracing comes first, so that the others see the span of an attempt. `Alerts` is included if `Settings.alerts` names
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
