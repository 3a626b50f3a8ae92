"""Serves the metrics of a process without an HTTP server, such as a worker, on a separate port."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Metric, start_http_server
from prometheus_client.registry import Collector

from ._metric_set import exposed, metric_set


class _Exposed(Collector):
    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterable[Metric]:
        return exposed(self._registry).collect()


def serve(registry: CollectorRegistry, host: str, port: int) -> int:
    """
    Serve this registry by HTTP in a thread of its own, in multi-process mode the sum over all processes.

    From now on this process also folds the files of processes that have ended. Returns the port.

    Raises:
        OSError: The address is taken.
    """
    metric_set(registry).sweep()
    shown = CollectorRegistry()
    shown.register(_Exposed(registry))
    server, _ = start_http_server(port, host, shown)
    return int(server.server_port)
