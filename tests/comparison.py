"""
What each tool shows of the same four requests: the table in the README. Prints it.

    python tests/comparison.py                 # makes an environment in .cache/comparison first

Celery needs a Redis: redis-server on the path, or in $REDIS_SERVER. Every answer is looked up in what the tool itself
shows: spans, its page's data, Flower's API, /metrics, log lines.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
CACHE = ROOT / ".cache" / "comparison"
NEEDS = [
    *("fastapi", "uvicorn", "httpx2", "fastapi-taskflow", "celery[redis]", "flower"),
    *("opentelemetry-sdk", "opentelemetry-instrumentation-fastapi"),
]
TOOLS = {
    "fastapi": "FastAPI's own telemetry",
    "contrib": "OpenTelemetry's FastAPI package",
    "taskflow": "fastapi-taskflow",
    "celery": "Celery + Flower",
    "aftertask": "aftertask",
}
ROWS = {
    "unchanged": "Call sites stay as they are",
    "failed": "A task that failed is shown, with the error",
    "skipped": "A task that was skipped because of it is shown as such",
    "siblings": "The tasks after it can run",
    "dropped": "A task whose handler raised is shown as never run",
    "response": "A task on a `Response(background=…)` is shown",
    "span": "A span that names the task",
    "metrics": "Prometheus metrics for each task",
    "page": "A page of its own",
}

#: The app, the same for all but Celery, and what was seen afterwards: `shown` has what is shown of each task.
APP = """
import json, sys
from fastapi import BackgroundTasks, FastAPI, HTTPException
from fastapi.responses import JSONResponse
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.background import BackgroundTask
from starlette.testclient import TestClient

tool = sys.argv[1]
spans = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(spans))
trace.set_tracer_provider(provider)
app = FastAPI()
ran = []

if tool == "contrib":
    from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
    FastAPIInstrumentor.instrument_app(app)
elif tool == "taskflow":
    from fastapi_taskflow import TaskAdmin, TaskManager
    TaskAdmin(app, TaskManager(), auto_install=True)
elif tool == "aftertask":
    from aftertask import AftertaskMiddleware, Settings
    from aftertask.board import Board
    settings = Settings(on_failure="continue" if "continue" in sys.argv else "stop")
    app.add_middleware(AftertaskMiddleware, settings=settings)
    app.mount("/board", Board(authorize=lambda request: {"view"}))

def boom(): raise ValueError("the disk is full")
def after(): ran.append("after")
def never(): ran.append("never")
def alone(): ran.append("alone")

@app.post("/fails")
async def fails(tasks: BackgroundTasks):
    tasks.add_task(boom)
    tasks.add_task(after)

@app.post("/raises")
async def raises(tasks: BackgroundTasks):
    tasks.add_task(never)
    raise HTTPException(409)

@app.post("/response")
async def response():
    return JSONResponse({}, background=BackgroundTask(alone))

with TestClient(app, raise_server_exceptions=False) as client:
    for path in ("/fails", "/raises", "/response"):
        client.post(path)
    scrape = client.get("/metrics").text
    page = client.get("/tasks")

shown, named = {}, False
for span in spans.get_finished_spans():
    attributes = dict(span.attributes or {})
    for name in ("boom", "after", "never", "alone"):
        if name in span.name or name in str(attributes.get("code.function.name", "")):
            shown[name] = [span.status.status_code.name]
            named = named or name == "boom"
if tool == "taskflow":
    shown = {record["func_name"]: [record["status"], record["error"]] for record in page.json()}
print("SEEN", json.dumps({
    "shown": shown, "ran": ran, "scrape": [line for line in scrape.splitlines() if line.startswith("aftertask_tasks_")],
    "span of boom": named,
    "page": any("html" in client.get(path).headers.get("content-type", "") for path in ("/tasks/dashboard", "/board/")),
}))
"""

CELERY = """
from celery import Celery
from fastapi import FastAPI, HTTPException

queue = Celery("work", broker=REDIS, backend=REDIS)
queue.conf.update(worker_send_task_events=True, task_send_sent_event=True)
app = FastAPI()

@queue.task
def boom(): raise ValueError("the disk is full")
@queue.task
def after(): return "after"
@queue.task
def never(): return "never"

@app.post("/fails")
def fails():
    boom.delay()
    after.delay()

@app.post("/raises")
def raises():
    never.delay()
    raise HTTPException(409)
"""

DRIVE = """
import json, sys, time, urllib.request
from starlette.testclient import TestClient
from work import app
flower = sys.argv[1]

def get(path):
    for _ in range(150):
        try:
            return urllib.request.urlopen(flower + path, timeout=5).read().decode()
        except OSError:
            time.sleep(0.2)
    raise SystemExit("Flower does not answer")

while not json.loads(get("/api/workers?refresh=1")):
    time.sleep(0.2)
client = TestClient(app, raise_server_exceptions=False)
for path in ("/fails", "/raises"):
    client.post(path)
tasks = {}
for _ in range(150):
    tasks = {task["name"]: task for task in json.loads(get("/api/tasks")).values()}
    if len(tasks) == 3 and all(task["state"] in ("SUCCESS", "FAILURE") for task in tasks.values()):
        break
    time.sleep(0.2)
print("SEEN", json.dumps({"tasks": tasks, "scrape": get("/metrics"), "page": "<html" in get("/tasks")}))
"""


def python() -> Path:
    """The interpreter of an environment with all tools; made once."""
    made = CACHE / "made"
    if not made.exists():
        subprocess.run([sys.executable, "-m", "venv", CACHE], check=True)
        install = [CACHE / "bin" / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*install, "-e", f"{ROOT}[board,fastapi]", *NEEDS], check=True)
        made.touch()
    return CACHE / "bin" / "python"


def run(*command: object) -> dict[str, Any]:
    """What a probe has seen."""
    env = {**os.environ, "FLOWER_UNAUTHENTICATED_API": "true", "AFTERTASK_DISABLED": ""}
    done = subprocess.run([*map(str, command)], cwd=CACHE, env=env, capture_output=True, text=True, timeout=60)
    lines = [line for line in done.stdout.splitlines() if line.startswith("SEEN ")]
    if not lines:
        raise SystemExit(f"{command} saw nothing:\n{done.stdout}{done.stderr}")
    return json.loads(lines[0].removeprefix("SEEN "))


def in_process(tool: str) -> dict[str, str]:
    """The answers of a tool that lives in the app."""
    program = python()
    (CACHE / "app.py").write_text(APP)
    seen = run(program, "app.py", tool)
    shown, ran = seen["shown"], seen["ran"]

    def counted(task: str, outcome: str) -> bool:
        parts = (f'outcome="{outcome}"', f'.{task}"', " 1.0")
        return any(all(part in line for part in parts) for line in seen["scrape"])

    ours = tool == "aftertask"
    siblings = "after" in ran or (ours and "after" in run(program, "app.py", tool, "continue")["ran"])
    failed = shown.get("boom", [""])
    return {
        "unchanged": "yes",
        "failed": "yes" if "ERROR" in failed or "failed" in failed or counted("boom", "failed") else "no",
        "skipped": "does not apply: it runs" if "after" in ran else ("yes" if counted("after", "skipped") else "no"),
        "siblings": "yes" if siblings else "no",
        "dropped": "yes" if counted("never", "dropped") else (shown["never"][0] if "never" in shown else "no"),
        "response": "yes" if "alone" in shown or counted("alone", "succeeded") else "no",
        "span": "yes" if seen["span of boom"] else "no",
        "metrics": "yes" if counted("boom", "failed") else "no",
        "page": "yes" if seen["page"] else "no",
    }


def celery() -> dict[str, str]:
    """The answers of Celery with Flower: the same tasks, sent to a worker."""
    redis = os.environ.get("REDIS_SERVER") or shutil.which("redis-server")
    if redis is None:
        raise SystemExit("Celery needs a Redis: put redis-server on the path, or name it in $REDIS_SERVER")
    sys.path.insert(0, str(ROOT / "tests"))
    from live.servers import free_port, process

    program = str(python())
    port, flower = free_port(), free_port()
    (CACHE / "work.py").write_text(f"REDIS = 'redis://127.0.0.1:{port}/0'\n{textwrap.dedent(CELERY)}")
    (CACHE / "drive.py").write_text(DRIVE)
    env = {"PYTHONPATH": str(CACHE), "FLOWER_UNAUTHENTICATED_API": "true"}
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(CACHE)]
    command = (program, "-m", "celery", "-A", "work:queue")
    with (
        process(redis, *options, log=CACHE / "redis.log"),
        process(*command, "worker", "-E", "-c", "1", log=CACHE / "worker.log", env=env),
        process(*command, "flower", "--address=127.0.0.1", f"--port={flower}", log=CACHE / "flower.log", env=env),
    ):
        seen = run(program, "drive.py", f"http://127.0.0.1:{flower}")
    tasks, scrape = seen["tasks"], str(seen["scrape"])
    states = {name.rpartition(".")[2]: task["state"] for name, task in tasks.items()}
    assert "disk is full" in str(tasks["work.boom"]["exception"]), tasks
    return {
        "unchanged": "no",
        "failed": "yes" if states["boom"] == "FAILURE" else "no",
        "skipped": "does not apply: it runs" if states["after"] == "SUCCESS" else "no",
        "siblings": "yes" if states["after"] == "SUCCESS" else "no",
        "dropped": "does not apply: it runs" if states["never"] == "SUCCESS" else "no",
        "response": "does not apply",
        "span": "no",
        "metrics": "yes" if 'task="work.boom"' in scrape else "no",
        "page": "yes" if seen["page"] else "no",
    }


def main() -> None:
    """Print the table."""
    answers = {tool: celery() if tool == "celery" else in_process(tool) for tool in TOOLS}
    print(f"| | {' | '.join(TOOLS.values())} |")
    print(f"| --- {'| --- ' * len(TOOLS)}|")
    for row, title in ROWS.items():
        print(f"| {title} | {' | '.join(answers[tool][row] for tool in TOOLS)} |")
    shown = subprocess.run([python(), "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True).stdout
    names = ("fastapi=", "fastapi-taskflow=", "celery=", "flower=", "opentelemetry-instrumentation-fastapi=")
    print("\n" + ", ".join(line for line in shown.splitlines() if line.startswith(names)))


if __name__ == "__main__":
    main()
