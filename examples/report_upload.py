"""
An uploaded CSV file becomes statistics in a database, and then a mail. Run it, upload a file, and look:

    uvicorn report_upload:app --app-dir examples
    printf 'city,amount\nParis,3\nParis,5\nRome,4\n' > sales.csv
    curl -F file=@sales.csv http://127.0.0.1:8000/reports
    curl http://127.0.0.1:8000/reports/1

You will see the report, and the log lines of two tasks that succeeded. Each task has a database session of its own, and
starts after the request's transaction has been committed (`run_after="request"`), so the row is there.

    curl -F file=@sales.csv http://127.0.0.1:8000/trap

The trap: this task gets the upload itself, which is closed when the task runs. It fails, and `hint` says why.
"""

import csv
import io
import os
from collections.abc import Iterator
from typing import Annotated

from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException, UploadFile
from sqlalchemy import create_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from aftertask import AftertaskMiddleware, Settings, task

engine = create_engine(os.environ.get("DATABASE_URL", "sqlite:///reports.db"))


class Base(DeclarativeBase):
    """The tables."""


class Report(Base):
    """One uploaded file, and what was found in it."""

    __tablename__ = "reports"

    id: Mapped[int] = mapped_column(primary_key=True)
    rows: Mapped[int | None]
    total: Mapped[float | None]


Base.metadata.create_all(engine)


def session() -> Iterator[Session]:
    """The request's session, committed at the end of the request."""
    with Session(engine) as session, session.begin():
        yield session


Database = Annotated[Session, Depends(session)]

app = FastAPI()
app.add_middleware(AftertaskMiddleware, settings=Settings(run_after="request"))


@task(name="reports.build", timeout=60)
def build_report(report_id: int, content: bytes) -> None:
    """Read the file that was passed as bytes, and write the result with a session of its own."""
    amounts = [float(row["amount"]) for row in csv.DictReader(io.StringIO(content.decode()))]
    with Session(engine) as session, session.begin():
        report = session.get_one(Report, report_id)
        report.rows, report.total = len(amounts), sum(amounts)


@task(name="reports.mail")
async def mail_report(report_id: int) -> None:
    """Pretend to send a mail with a link to the report; skipped if it could not be built."""


@app.post("/reports", status_code=202)
async def upload(file: UploadFile, session: Database, tasks: BackgroundTasks) -> dict[str, int]:
    """Store an empty report, and let the tasks do the rest."""
    report = Report()
    session.add(report)
    session.flush()
    tasks.add_task(build_report, report.id, await file.read())
    tasks.add_task(mail_report, report.id)
    return {"id": report.id}


@app.get("/reports/{report_id}")
def show(report_id: int, session: Database) -> dict[str, float | None]:
    """What was found; None until the task has run."""
    report = session.get(Report, report_id)
    if report is None:
        raise HTTPException(404, f"there is no report {report_id}")
    return {"rows": report.rows, "total": report.total}


@task(name="reports.trap")
def read_upload(file: UploadFile) -> None:
    """Fail: the request has ended, and FastAPI has closed the file."""
    file.file.read()


@app.post("/trap", status_code=202)
async def trap(file: UploadFile, tasks: BackgroundTasks) -> dict[str, str]:
    """Do not do this: pass the bytes, or the path of a copy."""
    tasks.add_task(read_upload, file)
    return {"status": "ok"}
