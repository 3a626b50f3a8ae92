"""The usual set-ups of logging, each in a process of its own: what a failure looks like there."""

from __future__ import annotations

import subprocess
import sys

import pytest

APP = """
import logging, logging.config, sys
import aftertask
{setup}
from fastapi import BackgroundTasks, FastAPI
from fastapi.testclient import TestClient
from aftertask import AftertaskMiddleware, Retry, Settings, task

app = FastAPI()
app.add_middleware(AftertaskMiddleware, settings=Settings(metrics_path=None))

@task(name="mail.welcome", retry=Retry(attempts=2, wait_initial=0), on_failure="contain")
async def welcome():
    raise ConnectionError("refused")

@app.post("/signup")
async def signup(tasks: BackgroundTasks):
    tasks.add_task(welcome)

with TestClient(app) as client:
    for _ in range(2):
        client.post("/signup")
"""

LOGURU = """
from loguru import logger
class Intercept(logging.Handler):
    def emit(self, record):
        logger.opt(exception=record.exc_info).log(record.levelname, record.getMessage())
logging.basicConfig(handlers=[Intercept()], level=0, force=True)
"""
DICT = """
logging.config.dictConfig({
    "version": 1,
    "handlers": {"console": {"class": "logging.StreamHandler"}},
    "root": {"handlers": ["console"], "level": "INFO"},
})
"""
STRUCTLOG = """
import structlog
structlog.configure(
    processors=[structlog.stdlib.filter_by_level, structlog.processors.KeyValueRenderer()],
    logger_factory=structlog.stdlib.LoggerFactory(),
    wrapper_class=structlog.stdlib.BoundLogger,
)
"""
FAILED = "task.failed mail.welcome: ConnectionError: refused (POST /signup, attempt 2 of 2)"


def output(setup: str) -> str:
    """What the app writes to stderr."""
    done = subprocess.run([sys.executable, "-c", APP.format(setup=setup)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize("setup", ["logging.basicConfig()", LOGURU], ids=["basicConfig", "loguru"])
def test_a_text_format_names_the_failure_and_once_why_it_shows_no_more(setup: str) -> None:
    """The message is readable by itself; the first one says where the other keys are."""
    text = output(setup)
    assert text.count(FAILED) == 2
    assert text.count(f"{FAILED} [run_id, trace_id and more are attributes of this record") == 1


def test_a_format_that_shows_the_keys_gets_no_explanation() -> None:
    """`RunFilter` on a handler whose format names the keys is what the explanation asks for."""
    text = output(
        "from aftertask.signals import RunFilter\n"
        "handler = logging.StreamHandler()\n"
        "handler.addFilter(RunFilter())\n"
        "logging.basicConfig(handlers=[handler], format='%(message)s run=%(run_id)s')"
    )
    assert text.count(f"{FAILED} run=") == 2
    assert "attributes of this record" not in text


def test_uvicorns_own_configuration_leaves_json_on_stderr() -> None:
    """It has handlers for uvicorn's loggers only."""
    text = output("import uvicorn.config\nlogging.config.dictConfig(uvicorn.config.LOGGING_CONFIG)")
    assert text.count('{"event": "task.failed", "level": "error"') == 2


@pytest.mark.parametrize("structlogs", ["", STRUCTLOG], ids=["stdlib", "structlog"])
def test_a_disabled_logger_still_logs_failures_and_once_the_reason(structlogs: str) -> None:
    """`dictConfig` disables every logger that it does not name, unless `disable_existing_loggers` is False."""
    text = output(DICT + structlogs)
    assert text.count(FAILED) == 2
    assert text.count("set disable_existing_loggers to False") == 1
    assert "task.succeeded" not in text


def test_lines_about_no_run_have_their_keys_in_the_message() -> None:
    """Every line is readable where only messages are printed."""
    text = output("logging.basicConfig(level=logging.INFO)")
    assert "INFO:aftertask:lifecycle.policies on_failure=stop policies={'mail.welcome'" in text
