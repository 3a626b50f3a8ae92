"""`GET /metrics`: renders the registry in a separate thread, off the event loop."""

from __future__ import annotations

import gzip
import re
from urllib.parse import parse_qs

import anyio
from anyio.lowlevel import RunVar
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ._metric_set import exposed

# Busy sync endpoints must not delay a scrape, nor may many scrapes take their threads.
_limiter: RunVar[anyio.CapacityLimiter] = RunVar("aftertask_scrapes")


async def answer(scope: Scope, receive: Receive, send: Send, registry: CollectorRegistry) -> None:
    """Respond to a scrape in the format and encoding that it asks for; `name[]` in the query selects families."""
    headers = Headers(scope=scope)
    encode, content_type = choose_encoder(headers.get("accept", ""))
    names = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("name[]")
    compress = _accepts_gzip(headers.get("accept-encoding", ""))

    def render() -> bytes:
        source = exposed(registry, by_name=bool(names))
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


def _accepts_gzip(accept_encoding: str) -> bool:
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
