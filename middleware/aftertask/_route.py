"""The template of the route that serves a request, with the prefixes it is mounted under; never a raw path."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any


def http_route(scope: MutableMapping[str, Any]) -> str | None:
    """`/orders/{id}`; None where no route has matched."""
    telemetry = scope.get("fastapi.telemetry")
    route = getattr(telemetry, "route", None)  # FastAPI has put mounts and routers together already
    if route is None:
        path = getattr(scope.get("route"), "path_format", None) or getattr(scope.get("route"), "path", None)
        if path is not None:
            return _mounted(scope) + str(path)
        route = _found(scope, getattr(scope.get("app"), "routes", None))  # before 0.47 Starlette does not say it
    return None if route is None else str(route)


def _found(scope: MutableMapping[str, Any], routes: Iterable[Any] | None) -> str | None:
    """The route of this endpoint among an app's, looked up by what the scope says of it."""
    endpoint, params = scope.get("endpoint"), set(scope.get("path_params") or ())
    for route in routes or ():
        inner, path = getattr(route, "routes", None), getattr(route, "path", None)
        if endpoint is not None and getattr(route, "endpoint", None) is endpoint:
            if set(getattr(route, "param_convertors", ())) <= params:
                return str(path)
        elif inner:
            below = _found(scope, inner)
            if below is not None:
                return f"{path or ''}{below}"
    return None


def _mounted(scope: MutableMapping[str, Any]) -> str:
    """
    The path of the mounts around the route.

    The scope holds it as it was requested; where a mount has parameters, their values are put back into `{name}`.
    """
    root: str = scope.get("root_path", "")
    prefix = root.removeprefix(scope.get("app_root_path", root)).rstrip("/")
    params: Mapping[str, Any] = scope.get("path_params") or {}
    if not prefix or not params:
        return prefix
    names = {str(value): name for name, value in params.items()}
    return "/".join(f"{{{names[part]}}}" if part in names else part for part in prefix.split("/"))
