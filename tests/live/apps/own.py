"""Apps: `own` and `wrapped` have a /metrics of their own, `catch_all` takes every path, `compressed` zips."""

from fastapi import FastAPI
from starlette.middleware.gzip import GZipMiddleware

from aftertask import AftertaskMiddleware

own, catch_all, compressed = FastAPI(), FastAPI(), FastAPI()


@own.get("/metrics")
async def theirs() -> str:
    """The app's own numbers."""
    return "theirs"


@catch_all.get("/{path:path}")
async def anything(path: str) -> str:
    """A page for every path."""
    return f"page {path}"


for each in (own, catch_all, compressed):
    each.add_middleware(AftertaskMiddleware)
compressed.add_middleware(GZipMiddleware)

#: Around the whole app, as a plain ASGI app is given it.
wrapped = AftertaskMiddleware(FastAPI(routes=list(own.routes)))
