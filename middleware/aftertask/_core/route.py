"""The template of the route that serves a request, with the prefixes it is mounted under; never a raw path."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any


def route_path(scope: MutableMapping[str, Any]) -> str:
    """The path relative to the root path that the app is mounted or served under."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(root) else path


def http_route(scope: MutableMapping[str, Any]) -> str | None:
    """`/orders/{id}`; None where no route has matched."""
    telemetry = scope.get("fastapi.telemetry")
    route = getattr(telemetry, "route", None)  # FastAPI has put mounts and routers together already
    if route is None:
        path = getattr(scope.get("route"), "path_format", None) or getattr(scope.get("route"), "path", None)
        if path is not None:
            return _mounted(scope) + str(path)
        # Before 0.47 Starlette does not say which route it was.
        path = scope["path"].removeprefix(scope.get("app_root_path", ""))
        route = _found(scope.get("endpoint"), getattr(scope.get("app"), "routes", None), path)
    return None if route is None else str(route)


def _found(endpoint: object, routes: Iterable[Any] | None, path: str) -> str | None:
    """The route of this endpoint for this path, looked up in an app's routes and mounts."""
    for route in routes or ():
        pattern = getattr(route, "path_regex", None)
        match = None if pattern is None else pattern.match(path)
        if match is None:
            continue
        if endpoint is not None and getattr(route, "endpoint", None) is endpoint:
            return str(route.path)
        rest = match.groupdict().get("path")
        below = None if rest is None else _found(endpoint, getattr(route, "routes", None), f"/{rest}")
        if below is not None:
            return f"{route.path}{below}"
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
