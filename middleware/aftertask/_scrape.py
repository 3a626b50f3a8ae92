"""`GET /metrics`: the whole registry, rendered off the event loop and off the threads that sync endpoints share."""

from __future__ import annotations

import gzip
import os
import re
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any
from urllib.parse import parse_qs

import anyio
from anyio.lowlevel import RunVar
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.datastructures import Headers
from starlette.responses import Response

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

# A thread of our own: forty busy sync endpoints must not delay a scrape, nor many scrapes take threads without end.
_limiter: RunVar[anyio.CapacityLimiter] = RunVar("aftertask_scrapes")


def is_taken(scope: Scope, inside: object, path: str) -> bool:
    """
    Whether the app itself has a route or mount of that very path; a catch-all is none.

    The app is the scope's, or, where we are put around it and the scope does not name it yet, the first one inside.
    """
    routes = getattr(scope.get("app"), "routes", None)
    for _ in range(100):
        if routes is not None or inside is None:
            break
        routes, inside = getattr(inside, "routes", None), getattr(inside, "app", None)
    return any(_path_of(route) == path for route in _routes(routes))


def _routes(routes: Iterable[Any] | None, depth: int = 0) -> Iterable[Any]:
    for route in routes or ():
        yield route
        # FastAPI keeps an included router as one entry; what it serves is told by its own candidates.
        inner = getattr(route, "effective_candidates", None)
        if callable(inner) and depth < 10:
            yield from _routes(inner(), depth + 1)


def _path_of(route: Any) -> str | None:
    path = getattr(route, "path", None)
    if not isinstance(path, str):
        return None
    return path.rstrip("/") or path


async def answer(scope: Scope, receive: Any, send: Send, registry: CollectorRegistry) -> None:
    """Answer a scrape, in the format and encoding it asks for."""
    headers = Headers(scope=scope)
    encode, content_type = choose_encoder(headers.get("accept", ""))
    names = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("name[]")
    compress = _takes_gzip(headers.get("accept-encoding", ""))

    def render() -> bytes:
        source = _source(registry)
        text = encode(source.restricted_registry(names) if names else source)
        return gzip.compress(text, 5) if compress else text

    body = await anyio.to_thread.run_sync(render, limiter=_own_thread())
    response = Response(
        body, media_type=None, headers={"content-type": content_type, "vary": "Accept, Accept-Encoding"}
    )
    if compress:
        response.headers["content-encoding"] = "gzip"
    if scope["method"] == "HEAD":
        response.body = b""
    await response(scope, receive, send)


def _takes_gzip(accept_encoding: str) -> bool:
    for coding in accept_encoding.lower().split(","):
        name, _, quality = coding.partition(";")
        if name.strip() == "gzip":
            return re.fullmatch(r"\s*q\s*=\s*0(\.0*)?\s*", quality) is None
    return False


def _own_thread() -> anyio.CapacityLimiter:
    try:
        return _limiter.get()
    except LookupError:
        limiter = anyio.CapacityLimiter(1)
        _limiter.set(limiter)
        return limiter


def _source(registry: CollectorRegistry) -> CollectorRegistry:
    if not os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        return registry
    from .signals._multiprocess import all_processes

    return all_processes()
