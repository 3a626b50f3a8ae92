"""
202 with the id of the run, and two ways to follow it: polling and server-sent events. Run it and order a report:

    uvicorn status:app --app-dir examples
    curl -i -X POST 'http://127.0.0.1:8000/reports?pages=30'
    curl http://127.0.0.1:8000/reports/<the x-run-id of the response>
    curl -N http://127.0.0.1:8000/reports/<the same>/events

You will see {"state": "running", "progress": "7/30 pages", "result": null} with growing numbers, and at the end
{"state": "succeeded", "progress": "30/30 pages", "result": {"words": 9000}}. The journal, a file `status.db` in the
current folder, keeps the run and its result: ask again after a restart, or another worker.
"""

import json
import os
from collections.abc import AsyncIterator

import anyio
from fastapi import BackgroundTasks, FastAPI, HTTPException
from fastapi.responses import StreamingResponse

from aftertask import AftertaskMiddleware, Settings, get_run, progress, task
from aftertask.events import StoredRun

app = FastAPI()
journal = os.environ.get("JOURNAL", "status.db")
app.add_middleware(AftertaskMiddleware, settings=Settings(run_ids_header="x-run-id", journal=journal))


@task(name="reports.build", timeout=600, keep_result=True)
async def build(pages: int) -> dict[str, int]:
    """Pretend to write a page, ten times a second; what it returns is kept as JSON."""
    for page in range(pages):
        await anyio.sleep(0.1)
        progress(page + 1, pages, "pages")
    return {"words": 300 * pages}


async def look(run_id: str) -> dict[str, object]:
    """What a client may see of a run; a real app also checks whose report it is."""
    run = await get_run(run_id)
    if run is None or run.task != "reports.build":
        raise HTTPException(404, "no such report")
    result = run.result if isinstance(run, StoredRun) else None
    return {"state": run.state, "progress": run.progress.text if run.progress else None, "result": result}


@app.post("/reports", status_code=202)
async def order(pages: int, tasks: BackgroundTasks) -> dict[str, str]:
    """Respond at once; the id of the run is in the header `x-run-id`."""
    tasks.add_task(build, pages)
    return {"status": "accepted"}


@app.get("/reports/{run_id}")
async def poll(run_id: str) -> dict[str, object]:
    """How far the report is, and its result."""
    return await look(run_id)


@app.get("/reports/{run_id}/events")
async def events(run_id: str) -> StreamingResponse:
    """The same as server-sent events: one for each change, until the run has ended."""
    first = await look(run_id)  # an unknown id is a 404 before the stream begins

    async def changes() -> AsyncIterator[str]:
        sent, now = None, first
        while True:
            if now != sent:
                yield f"data: {json.dumps(now)}\n\n"
                sent = now
            if now["state"] not in ("scheduled", "queued", "running", "backoff"):
                return
            await anyio.sleep(0.2)
            now = await look(run_id)

    return StreamingResponse(changes(), media_type="text/event-stream", headers={"cache-control": "no-store"})
