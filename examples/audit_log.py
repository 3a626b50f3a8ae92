"""
An audit log: ordered, durable, and complete after a kill -9. Run it, make transfers, kill it, and start it again:

    uvicorn audit_log:app --app-dir examples & sleep 2
    for i in 1 2 3 4 5 6 7 8; do curl -X POST "http://127.0.0.1:8000/transfers?amount=$i"; done; sleep 1; kill -9 $!
    uvicorn audit_log:app --app-dir examples & sleep 9
    curl http://127.0.0.1:8000/audit

You will see all eight transfers, in their order and each once, although the process died while most of them waited to
be written: each was in the journal (`audit-tasks.db`) before its response left, and the next start goes on. Without the
`sleep 1` the last one may be missing: it died before its request had ended, so the transfer may not have been made. It
is a dead letter then, `unconfirmed`, for a person to decide: `aftertask dead list --journal audit-tasks.db`.

How: `durable` puts an entry on disk before the response leaves. `idempotent` allows a second execution if the process
dies in the middle of one; the entry's number is the key of its row, so the second one changes nothing. The numbers are
the order: what was being written when the process died comes after what was waiting. The limit writes one at a time.
"""

import itertools
import os
import sqlite3
import time
from contextlib import closing

from fastapi import BackgroundTasks, FastAPI

from aftertask import AftertaskMiddleware, Limit, Settings, task

AUDIT = os.environ.get("AUDIT", "audit.db")

app = FastAPI()
journal = os.environ.get("JOURNAL", "audit-tasks.db")
app.add_middleware(AftertaskMiddleware, settings=Settings(journal=journal))

#: Numbers that grow, also beyond a restart.
numbers = itertools.count(time.time_ns())


def audit() -> sqlite3.Connection:
    """The audit log, as a file; in a real app the system that is hard to reach from the request."""
    db = sqlite3.connect(AUDIT)
    db.execute("CREATE TABLE IF NOT EXISTS entries (number INTEGER PRIMARY KEY, what TEXT NOT NULL)")
    return db


@task(name="audit.write", durable=True, idempotent=True, limit=Limit("audit", 1), timeout=30)
def write(number: int, what: str) -> None:
    """Write one entry, slowly."""
    time.sleep(0.3)  # so that there is time to kill the process
    with closing(audit()) as db, db:
        db.execute("INSERT OR IGNORE INTO entries VALUES (?, ?)", (number, what))


@app.post("/transfers")
async def transfer(amount: int, tasks: BackgroundTasks) -> dict[str, int]:
    """Move the money; the entry is written after the response."""
    number = next(numbers)
    tasks.add_task(write, number, f"transferred {amount}")
    return {"number": number}


@app.get("/audit")
def entries() -> list[str]:
    """The entries in their order."""
    with closing(audit()) as db:
        return [what for (what,) in db.execute("SELECT what FROM entries ORDER BY number")]
