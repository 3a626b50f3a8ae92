"""What is wrong, and what to do about it: the texts of the hazards that the core finds."""

from __future__ import annotations

WEBSOCKET = (
    "FastAPI never runs the tasks that are injected into a WebSocket endpoint: await the function there, or start it "
    "in a task group of your own"
)
MUTATED = (
    "it adds a task to the batch that it runs in, which works only because Starlette happens to loop over the same "
    "list: call the function in this task, or add both in the endpoint"
)
EARLY = (
    "it started before the response was complete, so the client waits for it, and its failure can cut the response "
    "off: a middleware holds the response back (several BaseHTTPMiddleware do, on Starlette before 1.7): update "
    "Starlette, or let that middleware pass each message on"
)
LOST_RESULT = "is to keep its result, which is lost: there is no journal"
KEEP_RESULT = "set Settings(journal=…), or leave keep_result=True out"
