"""The template of the route that serves a request, as the app's OpenAPI shows it; never a raw path."""

from __future__ import annotations

import re
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from starlette.routing import Router

from ..tasks import attribute

#: Apps within apps, or middleware around an app, are followed no deeper than this: they may contain themselves.
_DEEPEST = 10

#: Middleware around an app is followed no further than this.
_MOST_MIDDLEWARE = 100


def http_route(scope: Mapping[str, Any]) -> str | None:
    """
    The template of the route that serves a request: `/shop/orders/{id}`, with the prefixes of routers and mounts.

    Path converters are left out: `/files/{name}` for `/files/{name:path}`. An app that is mounted and shows no routes
    serves `/prefix/{path}`.

    Returns:
        None if no route matched, or if the route is inside an app whose routes cannot be seen.
    """
    router, endpoint = scope.get("router"), scope.get("endpoint")  # the outermost router, the innermost endpoint
    if endpoint is None or not isinstance(router, Router):
        return None
    root_path = scope.get("app_root_path", scope.get("root_path", ""))  # as it was before mounts added to it
    return _table_of(router).template(router, endpoint, _relative(scope["path"], root_path))


def route_path(scope: Mapping[str, Any]) -> str:
    """The path relative to the root path that the app is mounted or served under."""
    return _relative(scope["path"], scope.get("root_path", ""))


def _relative(path: str, root_path: str) -> str:
    # A proxy may have removed the root path already; `/apiary` is not below `/api`.
    rest = path.removeprefix(root_path)
    return rest if rest.startswith("/") or path == root_path else path


@dataclass(frozen=True, slots=True)
class _Template:
    """
    One way to reach an endpoint.

    Attributes:
        text: The whole template.
        mounts: Patterns of the mounts around the route, the outermost first; each leaves the rest of the path.
        pattern: That of the route.
    """

    text: str
    mounts: tuple[re.Pattern[str], ...]
    pattern: re.Pattern[str]

    def matches(self, path: str) -> bool:
        """Whether it leads from this path to the endpoint."""
        for mount in self.mounts:
            found = mount.match(path)
            if found is None:
                return False
            path = f"/{found['path']}"
        return self.pattern.match(path) is not None


class _Table:
    """
    The templates of all endpoints below one router.

    A walk through all routes takes too long to be done for each request: 1 ms for 500 routes in included routers. It is
    done again when an endpoint is not found, as routes may be added at any time.
    """

    def __init__(self) -> None:
        # By identity: an endpoint may be any callable, hashable or not. The table must not keep the app alive, which
        # the endpoints often refer to.
        self._templates: dict[int, list[_Template]] = {}
        self._unknown: set[int] = set()

    def template(self, router: Router, endpoint: object, path: str) -> str | None:
        """The template of the first route that leads to this endpoint."""
        found = self._find(endpoint, path)
        if found is None and id(endpoint) not in self._unknown:
            self._read(router)
            found = self._find(endpoint, path)
            if found is None:
                self._unknown.add(id(endpoint))
        return found

    def _find(self, endpoint: object, path: str) -> str | None:
        for template in self._templates.get(id(endpoint), ()):
            if template.matches(path):
                return template.text
        return None

    def _read(self, router: Router) -> None:
        templates: dict[int, list[_Template]] = {}
        for endpoint, template in _walk(router.routes):
            templates.setdefault(id(endpoint), []).append(template)
        self._templates = templates


#: By the router's identity: Starlette's routers cannot be hashed.
_tables: dict[int, _Table] = {}


def _table_of(router: Router) -> _Table:
    table = _tables.get(id(router))
    if table is None:
        table = _tables[id(router)] = _Table()
        weakref.finalize(router, _tables.pop, id(router), None).atexit = False
    return table


def _walk(
    routes: Iterable[Any], prefix: str = "", mounts: tuple[re.Pattern[str], ...] = (), depth: int = 0
) -> Iterator[tuple[object, _Template]]:
    """Every endpoint below these routes with its template, in the order in which the router tries them."""
    if depth > _DEEPEST:
        return
    for route in with_included(routes):
        pattern: re.Pattern[str] | None = getattr(route, "path_regex", None)
        text = f"{prefix}{getattr(route, 'path_format', '')}"
        endpoint = getattr(route, "endpoint", None)
        if endpoint is not None:
            if pattern is not None:
                yield endpoint, _Template(text, mounts, pattern)
            continue
        below = routes_of(route)
        if pattern is None:  # a Host, which matches no part of the path
            yield from _walk(below, prefix, mounts, depth + 1)
        elif below:
            yield from _walk(below, text.removesuffix("/{path}"), (*mounts, pattern), depth + 1)
        else:
            yield getattr(route, "app", None), _Template(text, mounts, pattern)


def with_included(routes: Iterable[Any]) -> Iterable[Any]:
    """Each route with its whole path: since 0.137, FastAPI keeps included routers as they are, without the prefix."""
    # Not imported: FastAPI need not be installed. 0.137.0 and 0.137.1 have no public way to find the prefix.
    iter_route_contexts: Callable[[Iterable[Any]], Iterable[Any]] | None = getattr(
        sys.modules.get("fastapi.routing"), "iter_route_contexts", None
    )
    return routes if iter_route_contexts is None else iter_route_contexts(routes)


def routes_of(app: object) -> Sequence[Any]:
    """The routes of an app or a mount, also where middleware is around it; none if it shows none."""
    for _ in range(_MOST_MIDDLEWARE):
        routes: object = getattr(app, "routes", None)
        if routes and isinstance(routes, Sequence):  # a mock has any attribute
            return routes
        app = getattr(app, "app", None)
        if app is None:
            break
    return ()


def serves(app: object, path: str) -> bool:
    """Whether an app has a route or mount of exactly this path, below mounts too; a catch-all does not count."""
    own = (getattr(route, "path", None) for route in with_included(routes_of(app)))
    paths = chain(own, (template.text for _, template in _walk(routes_of(app))))
    return any(isinstance(each, str) and (each.rstrip("/") or each) == path for each in paths)


def endpoints_of(app: object) -> Iterator[object]:
    """The endpoint of every route of an app, below its mounts too."""
    return (endpoint for endpoint, _ in _walk(routes_of(app)))


def mounted_apps(app: object) -> Iterator[object]:
    """Every app that is mounted somewhere below this one and shows no routes, and what is inside such an app."""
    for mounted in endpoints_of(app):
        for _ in range(_DEEPEST):
            if mounted is None:
                break
            yield mounted
            mounted = attribute(mounted, "app")
