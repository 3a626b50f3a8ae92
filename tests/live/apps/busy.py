"""An app whose sync endpoint keeps a thread of the shared pool until it is let go."""

import threading

from fastapi import FastAPI

from aftertask import AftertaskMiddleware

app = FastAPI()
app.add_middleware(AftertaskMiddleware)
go = threading.Event()
waiting = threading.Semaphore(0)
started = 0


@app.get("/hold")
def hold() -> None:
    """Keeps its thread."""
    global started
    started += 1
    go.wait(30)


@app.get("/started")
async def how_many() -> int:
    """How many hold one."""
    return started


@app.get("/release")
async def release() -> None:
    """Lets all go."""
    go.set()
