"""
A large job in shards, on processes, with its progress. Run it, start a job, and ask how far it is:

    uvicorn batch_progress:app --app-dir examples
    curl -i -X POST 'http://127.0.0.1:8000/jobs?shards=30'
    curl http://127.0.0.1:8000/jobs/<the x-run-id of the response>

You will see {"state": "running", "progress": "7/30 shards"} with growing numbers, and 404 when the job has ended. The
event loop stays free meanwhile: the work runs in worker processes, two at a time.
"""

import hashlib

import anyio
import anyio.to_process
from fastapi import BackgroundTasks, FastAPI, HTTPException

from aftertask import AftertaskMiddleware, Settings, get_run, progress, task

app = FastAPI()
app.add_middleware(AftertaskMiddleware, settings=Settings(run_ids_header="x-run-id"))


def hash_shard(shard: int) -> str:
    """The work: some tenths of a second of a processor. Runs in a worker process, so it is a function of a module."""
    return hashlib.pbkdf2_hmac("sha256", b"shard %d" % shard, b"salt", 400_000).hex()


@task(name="jobs.hash", timeout=3600)
async def hash_all(shards: int) -> None:
    """Hand the shards to worker processes, and report each that is done."""
    done = 0
    two = anyio.CapacityLimiter(2)

    async def one(shard: int) -> None:
        nonlocal done
        await anyio.to_process.run_sync(hash_shard, shard, limiter=two)
        done += 1
        progress(done, shards, "shards")

    async with anyio.create_task_group() as group:
        for shard in range(shards):
            group.start_soon(one, shard)


@app.post("/jobs", status_code=202)
async def start(shards: int, tasks: BackgroundTasks) -> dict[str, int]:
    """Respond at once; the id of the run is in the header `x-run-id`."""
    tasks.add_task(hash_all, shards)
    return {"shards": shards}


@app.get("/jobs/{run_id}")
async def status(run_id: str) -> dict[str, str | None]:
    """How far the job is. Runs are known to the process that they run in, until they have ended."""
    run = await get_run(run_id)
    if run is None:
        raise HTTPException(404, "no such job is in flight")
    return {"state": run.state, "progress": run.progress.text if run.progress else None}
