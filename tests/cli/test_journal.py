"""`aftertask runs` and `aftertask dead` on a journal."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from aftertask.cli.app import app
from aftertask.journal import rows
from aftertask.journal.file import connect, prepare
from aftertask.journal.letters import letters as dead_letters


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A journal with runs in every stage, and five dead letters of three kinds."""
    path = tmp_path / "tasks.db"
    prepare(path)
    now = time.time()
    with closing(connect(path)) as db:
        for number, (task, state, dead, error) in enumerate(
            [
                ("mail", "succeeded", None, None),
                ("mail", "started", None, None),
                ("report", "dropped", None, None),
                ("mail", "failed", "failed", "OSError"),
                ("mail", "failed", "failed", "OSError"),
                ("mail", "failed", "failed", "KeyError"),
                ("report", "lost", "interrupted", None),
                ("report", "timed_out", "timed_out", "aftertask.TaskTimeout"),
            ]
        ):
            ended = None if state == "started" else now - 50 + number
            row: dict[str, Any] = {"id": f"run-{number}", "task": task, "code": f"shop.{task}", "state": state}
            row |= {"durable": 1, "idempotent": 0, "origin": "request", "owner": 1, "scheduled_at": now - 60 + number}
            row |= {"settled_at": ended, "dead": dead, "error_type": error, "attempts": 1, "http_route": "/buy"}
            row |= {"arguments": json.dumps({"to": f"a{number}@b"}), "fingerprint": error and f"print-{error}"}
            row |= {"error_message": error and "the reason", "stack": error and f"Traceback …\n{error}: the reason"}
            row |= {"reason": "validation" if state == "dropped" else None}
            rows.upsert(db, row)
    return path


def call(path: Path | None, *arguments: str, input: str | None = None) -> Result:
    """The command."""
    where = [] if path is None else ["--journal", str(path)]
    return CliRunner().invoke(app, [*arguments, *where], input=input)


def letters(path: Path) -> list[str]:
    """The ids of the dead letters, the newest first."""
    with closing(connect(path)) as db:
        return [row["id"] for row in dead_letters(db)]


def test_runs_are_listed_the_newest_last(path: Path) -> None:
    """With task, state, route, id and why."""
    lines = call(path, "runs").output.splitlines()
    assert lines[0].split() == ["SCHEDULED", "TASK", "STATE", "ATTEMPTS", "DURATION", "ROUTE", "RUN"]
    assert len(lines) == 9 and "run-0" in lines[1] and "run-7" in lines[8]
    assert "aftertask.TaskTimeout: the reason" in lines[8] and "validation" in lines[3] and "running" in lines[2]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--task", "report"), ["run-2", "run-6", "run-7"]),
        (("--state", "running"), ["run-1"]),
        (("--state", "failed", "--limit", "2"), ["run-4", "run-5"]),
        (("--since", "1h", "--task", "mail", "--state", "succeeded"), ["run-0"]),
    ],
)
def test_runs_are_filtered(path: Path, options: tuple[str, ...], expected: list[str]) -> None:
    """By task, state and age; JSON has every field."""
    lines = call(path, "runs", "--json", *options).output.splitlines()
    assert [json.loads(line)["id"] for line in lines] == expected
    assert {"at", "progress", "result", "http_route", "replay_of"} <= json.loads(lines[0]).keys()


def test_runs_since_a_time_that_is_none(path: Path) -> None:
    """The message shows how it is written."""
    done = call(path, "runs", "--since", "yesterday")
    assert done.exit_code == 2 and "such as 90s, 15m, 2h or 7d, got 'yesterday'" in done.output
    done = call(path, "runs", "--state", "faild")
    assert done.exit_code == 2 and "--state takes one of scheduled, " in done.output and "got 'faild'" in done.output


@pytest.mark.timeout(60)
def test_runs_are_followed(path: Path) -> None:
    """A change shows up while the command runs, and what has not changed is not printed again."""
    command = [sys.executable, "-u", "-m", "aftertask.cli", "runs", "--follow", "--json", "--journal", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert [json.loads(child.stdout.readline())["id"] for _ in range(8)][-1] == "run-7"
        with closing(connect(path)) as db:
            rows.update(db, "run-1", 1, {"state": "succeeded", "settled_at": time.time()})
        changed = json.loads(child.stdout.readline())
        child.kill()
    assert (changed["id"], changed["state"]) == ("run-1", "succeeded")


def test_letters_that_are_alike_are_one_line(path: Path) -> None:
    """With their number and an example."""
    lines = call(path, "dead", "list").output.splitlines()
    assert len(lines) == 5
    assert re.match(r"2 +mail +failed +print-OSError .* run-4 +OSError: the reason", lines[1])
    each = call(path, "dead", "list", "--each", "--task", "report").output.splitlines()
    assert len(each) == 3 and "interrupted" in each[2]


@pytest.mark.parametrize("command", [["list"], ["replay", "--all", "--yes"], ["delete", "--all", "--yes"]])
def test_an_unknown_reason_is_refused(path: Path, command: list[str]) -> None:
    """It would match no letter, as if there were none; the message lists the reasons."""
    done = call(path, "dead", *command, "--reason", "intrrupted")
    assert done.exit_code == 2
    assert "--reason takes one of failed, timed_out, skipped, interrupted, " in done.output
    assert "got 'intrrupted'" in done.output
    assert len(letters(path)) == 5


@pytest.mark.parametrize(
    "command", [["runs"], ["dead", "list"], ["dead", "replay", "--all", "--yes"], ["dead", "delete", "--all", "--yes"]]
)
def test_a_task_that_no_run_has_is_refused(path: Path, command: list[str]) -> None:
    """It would match nothing, as if there were no such runs; the message has the nearest name."""
    done = call(path, *command, "--task", "mial")
    assert done.exit_code == 2
    assert done.output == "aftertask: the journal has no run of a task 'mial'; did you mean 'mail'?\n"
    assert "known are mail, report" in call(path, *command, "--task", "orders.*").output


def test_a_task_without_dead_letters_is_not_refused(path: Path) -> None:
    """Nothing is found, and that is true; nor is a name in an empty journal called a typing error."""
    with closing(connect(path)) as db:
        db.execute("DELETE FROM runs WHERE id IN ('run-6', 'run-7')")
        assert call(path, "dead", "list", "--task", "report").exit_code == 0
        assert "0 of 0 dead letters deleted" in call(path, "dead", "delete", "--all", "--task", "report").output
        db.execute("DELETE FROM runs")
        assert "no run of a task 'report'; it has no runs yet" in call(path, "runs", "--task", "report").output
        assert call(path, "runs").exit_code == 0


def test_a_letter_is_shown_with_arguments_and_stack(path: Path) -> None:
    """And why it is one."""
    output = call(path, "dead", "show", "run-5").output
    assert 'arguments:  {"to": "a5@b"}' in output and "Traceback …\nKeyError: the reason" in output
    assert "reason:     interrupted: it was running when its worker ended; it may have finished" in (
        call(path, "dead", "show", "run-6").output
    )
    done = call(path, "dead", "show", "run-0")
    assert done.exit_code == 2 and "no dead letter 'run-0'" in done.output


def test_letters_are_replayed(path: Path) -> None:
    """One, some, or all that match; each becomes a new run with the same arguments."""
    assert "1 of 1 dead letters will run again in a worker" in call(path, "dead", "replay", "run-6", "--yes").output
    options = ("--all", "--task", "mail", "--fingerprint", "print-OSError", "--per-second", "1000", "--yes")
    assert "2 of 2" in call(path, "dead", "replay", *options).output
    assert letters(path) == ["run-7", "run-5"]
    with closing(connect(path)) as db:
        new = db.execute("SELECT * FROM runs WHERE replay_of IS NOT NULL ORDER BY replay_of").fetchall()
        assert [(row["replay_of"], row["state"], row["owner"]) for row in new] == [
            (f"run-{number}", "ready", None) for number in (3, 4, 6)
        ]
        assert new[0]["arguments"] == '{"to": "a3@b"}' and new[0]["task"] == "mail"


def test_letters_are_deleted(path: Path) -> None:
    """After a question."""
    assert call(path, "dead", "delete", "run-3", input="n\n").exit_code == 1
    assert len(letters(path)) == 5
    assert "2 of 2 dead letters deleted" in (
        call(path, "dead", "delete", "--all", "--task", "report", input="y\n").output
    )
    assert letters(path) == ["run-5", "run-4", "run-3"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dead", "replay"), "name the runs, or --all"),
        (("dead", "delete", "run-3", "--all"), "name the runs, or --all"),
        (("dead", "replay", "run-0", "--yes"), "no dead letter 'run-0' that matches"),
        (("dead", "replay", "run-3", "--task", "report", "--yes"), "no dead letter 'run-3' that matches"),
    ],
)
def test_a_choice_that_cannot_be_made(path: Path, arguments: tuple[str, ...], message: str) -> None:
    """Nothing is changed, and the message says what to write."""
    done = call(path, *arguments)
    assert done.exit_code == 2 and message in done.output and len(letters(path)) == 5


def test_a_journal_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not created; the environment names it as it does for the app."""
    done = call(tmp_path / "none.db", "runs")
    assert done.exit_code == 2 and "there is no journal" in done.output
    assert not (tmp_path / "none.db").exists()
    (tmp_path / "text.db").write_text("x" * 5000)
    monkeypatch.setenv("AFTERTASK_JOURNAL", str(tmp_path / "text.db"))
    done = call(None, "dead", "list")
    assert done.exit_code == 2 and "text.db cannot be used: file is not a database" in done.output.replace("\n", "")
