"""Each example runs as its opening comment describes, and shows what it promises."""

from __future__ import annotations

import ast
import json
import re
import signal
import socket
import subprocess
import sys
import types
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from live.servers import Receiver, Server, eventually, free_port, process, uvicorn

pytestmark = pytest.mark.timeout(60)

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
SHOP = EXAMPLES / "shop"


class Hook(Receiver):
    """A webhook's receiver, and the alerts it got."""

    def __init__(self) -> None:
        super().__init__()
        self.alerts: list[dict[str, str]] = []

    def take(self, body: bytes) -> None:
        """One alert."""
        self.alerts.append(json.loads(body))


def wait_for(server: Server, text: str) -> str:
    """The server's output as soon as it contains this text in a complete line."""

    def look() -> str:
        output = server.log.read_text()
        return output if "\n" in output.partition(text)[2] else ""

    return eventually(look, what=f"{text!r} in the output")


def test_the_quickstart_writes_the_lines_of_the_readme(tmp_path: Path) -> None:
    """A failed task, the one that never ran because of it, and both in /metrics."""
    readme = (ROOT / "README.md").read_text()
    (shown,) = re.findall(r"```json\n(.*?)```", readme, re.DOTALL)
    promised = [json.loads(line) for line in shown.replace("main.", "quickstart.").replace(",\n", ",").splitlines()]
    with uvicorn("quickstart:app", EXAMPLES, tmp_path / "log") as server:
        assert httpx2.post(f"{server.url}/signup", params={"email": "ada@example.org"}).json() == {"status": "ok"}
        # uvicorn's own, after both lines; a stack in a line has no line breaks.
        text = wait_for(server, "Traceback (most recent call last):\n")
        lines = [json.loads(line) for line in text.splitlines() if line.startswith('{"event": "task.')]
        metrics = httpx2.get(f"{server.url}/metrics").text
    assert [line | wanted for line, wanted in zip(lines, promised, strict=True)] == lines
    for line in lines:
        outcome = line["event"].removeprefix("task.")
        labels = f'engine="local",outcome="{outcome}",task="{line["task"]}"'
        assert f"aftertask_tasks_finished_total{{{labels}}} 1.0" in metrics


def test_the_app_of_the_readme_is_the_quickstart() -> None:
    """Users copy it first, so it is run here."""
    readme = (ROOT / "README.md").read_text()
    app = re.search(r"```python\n(from aftertask import AftertaskMiddleware\n.*?)```", readme, re.DOTALL)
    assert app is not None

    def code(text: str) -> list[str]:
        lines = (line.partition("#")[0].rstrip() for line in text.splitlines())
        return sorted(line for line in lines if line and '"""' not in line and line != "    ...")

    quickstart = code((EXAMPLES / "quickstart.py").read_text().split('"""', 2)[2])
    for line in code(app[1]):
        assert line in quickstart or line.endswith("..."), line


def test_the_test_of_the_readme_passes_on_its_app(monkeypatch: pytest.MonkeyPatch) -> None:
    """It passes as it is printed, and more than once."""
    readme = (ROOT / "README.md").read_text()
    app = re.search(r"```python\n(from aftertask import AftertaskMiddleware\n.*?)```", readme, re.DOTALL)
    test = re.search(r"```python\n(from aftertask.testing import .*?)```", readme, re.DOTALL)
    assert app is not None and test is not None
    main = types.ModuleType("main")
    monkeypatch.setitem(sys.modules, "main", main)
    space: dict[str, object] = {}
    exec(app[1], main.__dict__)
    exec(test[1], space)
    (written,) = (value for name, value in space.items() if name.startswith("test_"))
    for _ in range(2):
        written()  # type: ignore[operator]  # the test


def test_the_example_of_policies_retries_and_refuses(tmp_path: Path) -> None:
    """The second attempt succeeds, and a request over the limit gets 503."""
    with uvicorn("policies:app", EXAMPLES, tmp_path / "log") as server:
        assert httpx2.post(f"{server.url}/signup/ada@example.org").status_code == 202
        text = wait_for(server, "task.succeeded")
        lines = [json.loads(line) for line in text.splitlines() if '"task.' in line]
        assert [(line["event"], line["attempt"]) for line in lines] == [("task.retrying", 1), ("task.succeeded", 2)]
        with ThreadPoolExecutor(12) as threads:
            asked = [threads.submit(httpx2.post, f"{server.url}/signup/{n}@example.org") for n in range(12)]
            statuses = Counter(each.result().status_code for each in asked)
        assert set(statuses) == {202, 503}
        assert statuses[202] >= 4


def test_the_example_of_stdlib_logging_shares_the_run_id(tmp_path: Path) -> None:
    """The task's own line and ours have the same run id."""
    with uvicorn("logging_stdlib:app", EXAMPLES, tmp_path / "log") as server:
        httpx2.post(f"{server.url}/orders")
        text = wait_for(server, "task.succeeded")
    runs = re.findall(r"INFO (\S+) (\S+).* task=logging_stdlib.ship run=(\S+)", text)
    assert [(name, message) for name, message, _ in runs] == [("shop", "shipping"), ("aftertask", "task.succeeded")]
    assert len({run for _, _, run in runs}) == 1


def test_the_example_of_structlog_keeps_the_apps_format(tmp_path: Path) -> None:
    """It writes four lines in the app's own format, all of one run."""
    with uvicorn("logging_structlog:app", EXAMPLES, tmp_path / "log") as server:
        httpx2.post(f"{server.url}/orders")
        text = wait_for(server, "task.succeeded")
    lines = [line for line in text.splitlines() if "event=" in line]
    events = [re.search(r"event=(\S+)", line)[1] for line in lines]  # type: ignore[index]  # it is there
    assert events == ["task.scheduled", "task.started", "shipping", "task.succeeded"]
    assert len({re.search(r"run_id=(\S+)", line)[1] for line in lines}) == 1  # type: ignore[index]  # same


def test_the_example_of_alerts_sends_one_and_counts_the_rest(tmp_path: Path) -> None:
    """One alert is sent at once, and another at the end counts the others."""
    with uvicorn("alerts:app", EXAMPLES, tmp_path / "log") as server:
        for number in range(5):
            assert httpx2.post(f"{server.url}/orders/{number}").json() == {"status": "ok"}
            wait_for(server, "ALERT ")
        server.child.send_signal(signal.SIGTERM)
        server.child.wait(20)
        text = server.log.read_text()
    first, last = (part.split("\n\n\n")[0] for part in text.split("ALERT ")[1:])
    assert first.startswith("[warning] mail.receipt failed: ConnectionRefusedError\n")
    assert "Not run because of it: orders.charge_card" in first
    assert "Owner: growth" in first and "Route: POST /orders/{order}" in first
    assert "in send_receipt" in first
    assert "(4 times)" in last.splitlines()[0]


def test_the_example_of_two_workers_has_one_scrape(tmp_path: Path) -> None:
    """Both processes respond, and one scrape counts the tasks of both."""
    numbers = tmp_path / "numbers"
    numbers.mkdir()
    ready = {"ready": "/metrics", "PROMETHEUS_MULTIPROC_DIR": str(numbers)}
    with uvicorn("two_workers:app", EXAMPLES, tmp_path / "log", "--workers", "2", **ready) as server:
        processes: Counter[int] = Counter()

        def both_answered() -> bool:
            processes[httpx2.post(f"{server.url}/orders").json()["process"]] += 1
            return len(processes) == 2

        eventually(both_answered, what="an answer from each of two processes")
        line = 'aftertask_tasks_finished_total{engine="local",outcome="succeeded",task="two_workers.ship"} '
        whole = f"{line}{processes.total()}.0"
        eventually(lambda: whole in httpx2.get(f"{server.url}/metrics").text, what=f"{whole!r} in a scrape")


@pytest.mark.long
def test_the_example_of_signup_mail_retries_alerts_and_sends(tmp_path: Path) -> None:
    """Without a mail server three attempts fail and the webhook is called; with one the mail arrives."""
    port = free_port()
    with Hook() as hook:
        env = {"SMTP_PORT": str(port), "AFTERTASK_ALERTS": f"{hook.url}/hook"}
        with uvicorn("signup_mail:app", EXAMPLES, tmp_path / "log", **env) as server:

            def sign_up() -> None:
                answer = httpx2.post(f"{server.url}/signup", params={"email": "ada@example.org"}, timeout=30)
                assert answer.json() == {"status": "ok"}

            sign_up()
            text = wait_for(server, "task.failed")
            events = [json.loads(line)["event"] for line in text.splitlines() if '"task.' in line]
            assert events == ["task.retrying", "task.retrying", "task.failed"]
            (alert,) = eventually(lambda: hook.alerts, what="the alert")
            assert (alert["task"], alert["owner"], alert["http_route"]) == ("mail.welcome", "growth", "/signup")
            assert "send_welcome_mail" in alert["stack"]
            listen = (sys.executable, "-m", "aiosmtpd", "-n", "-l", f"127.0.0.1:{port}")
            with process(*listen, log=tmp_path / "mails", env={"PYTHONUNBUFFERED": "1"}) as smtp:

                def has_arrived() -> bool:
                    sign_up()
                    assert smtp.poll() is None
                    return "Subject: Welcome" in (tmp_path / "mails").read_text()

                eventually(has_arrived, what="the mail")
                wait_for(server, "task.succeeded")


@pytest.mark.long
def test_the_example_of_report_upload_stores_what_its_task_found(tmp_path: Path) -> None:
    """The row is there when the task runs; the task that gets the upload itself fails with a hint."""
    env = {"DATABASE_URL": f"sqlite:///{tmp_path / 'reports.db'}"}
    with uvicorn("report_upload:app", EXAMPLES, tmp_path / "log", **env) as server:
        files = {"file": ("sales.csv", b"city,amount\nParis,3\nParis,5\nRome,4\n")}
        report = httpx2.post(f"{server.url}/reports", files=files, timeout=30).json()["id"]
        found = eventually(
            lambda: (row := httpx2.get(f"{server.url}/reports/{report}").json())["rows"] and row, what="the report"
        )
        assert found == {"rows": 3, "total": 12.0}
        wait_for(server, '"reports.mail"')
        assert httpx2.post(f"{server.url}/trap", files=files, timeout=30).status_code == 202
        text = wait_for(server, '"task.failed"')
        failed = next(json.loads(line) for line in text.splitlines() if '"task.failed"' in line)
        assert failed["task"] == "reports.trap" and "the upload is closed" in failed["hint"]


@pytest.mark.long
def test_the_example_of_compensation_cleans_up(tmp_path: Path) -> None:
    """The money is released if the order fails, and only then."""
    with uvicorn("compensation:app", EXAMPLES, tmp_path / "log") as server:
        orders = f"{server.url}/orders"
        assert httpx2.post(orders, params={"article": "hat", "stock": 0}, timeout=30).status_code == 409
        text = wait_for(server, "released payment-for-hat")
        assert "task.dropped" in text
        assert httpx2.post(orders, params={"article": "scarf", "stock": 1}, timeout=30).status_code == 200
        eventually(lambda: server.log.read_text().count('"task.succeeded"') == 3, what="three successes")
        assert "released payment-for-scarf" not in server.log.read_text()


@pytest.mark.long
def test_the_example_of_limits_lets_urgent_tasks_overtake(tmp_path: Path) -> None:
    """After the first task, which had the slot for itself, all urgent ones come first."""
    with uvicorn("limits_and_priorities:app", EXAMPLES, tmp_path / "log") as server, ThreadPoolExecutor(10) as threads:
        posts = [threads.submit(httpx2.post, f"{server.url}/users/{user}", timeout=30) for user in range(1, 11)]
        assert {post.result().status_code for post in posts} == {200}
        sent = eventually(
            lambda: len(order := httpx2.get(f"{server.url}/order").json()) == 10 and order, what="ten mails"
        )
    kinds = [each.split()[0] for each in sent]
    assert Counter(kinds) == {"password": 5, "newsletter": 5}
    # Those that were sent before all ten were waiting had none to overtake.
    assert kinds[-2:] == ["newsletter"] * 2


@pytest.mark.long
def test_the_example_of_blocking_is_found_once_and_mended_three_times(tmp_path: Path) -> None:
    """The line that blocks is named by the running app and by the check; the mended tasks block nothing."""
    with uvicorn("blocking:app", EXAMPLES, tmp_path / "log") as server:
        for kind in ("thread", "process", "client", "blocking"):
            httpx2.post(f"{server.url}/{kind}", timeout=30)
            wait_for(server, f'"task": "pages.{kind}"')
        text = wait_for(server, '"loop.blocked"')
        blocked = [json.loads(line) for line in text.splitlines() if '"loop.blocked"' in line]
        named = [line for line in blocked if line["task"].startswith("pages.")]
        assert [line["task"] for line in named] == ["pages.blocking"]
        assert "blocking.py" in named[0]["where"] and "fetch_blocking" in named[0]["stack"]
    check = [sys.executable, "-m", "aftertask.cli", "check", "blocking:app", "--app-dir", str(EXAMPLES)]
    done = subprocess.run(check, capture_output=True, text=True, timeout=50)
    assert done.returncode == 1 and "time.sleep" in done.stdout and "pages.blocking" in done.stdout


@pytest.mark.long
def test_the_example_of_batch_progress_counts_its_shards(tmp_path: Path) -> None:
    """The progress grows while the job is in flight, and the job is unknown afterwards."""
    with uvicorn("batch_progress:app", EXAMPLES, tmp_path / "log") as server:
        job = httpx2.post(f"{server.url}/jobs", params={"shards": 6}, timeout=30).headers["x-run-id"]
        seen: list[str] = []

        def has_ended() -> bool:
            answer = httpx2.get(f"{server.url}/jobs/{job}", timeout=30)
            if answer.status_code == 200 and answer.json()["progress"]:
                seen.append(answer.json()["progress"])
            return answer.status_code == 404

        eventually(has_ended, seconds=50, what="the end of the job")
        assert seen and all(re.fullmatch(r"[1-6]/6 shards", each) for each in seen)
        wait_for(server, '"task.succeeded"')


@pytest.mark.long
def test_the_example_of_status_is_followed_and_kept(tmp_path: Path) -> None:
    """By polling and by events, to the result, which a restart does not lose."""
    env = {"JOURNAL": str(tmp_path / "status.db")}
    with uvicorn("status:app", EXAMPLES, tmp_path / "log", **env) as server:
        accepted = httpx2.post(f"{server.url}/reports", params={"pages": 12}, timeout=30)
        assert accepted.status_code == 202
        report = f"/reports/{accepted.headers['x-run-id']}"
        polled = eventually(
            lambda: (now := httpx2.get(server.url + report, timeout=30).json())["progress"] and now, what="progress"
        )
        assert polled["state"] == "running" and polled["result"] is None
        assert re.fullmatch(r"\d+/12 pages", polled["progress"])
        events = httpx2.get(f"{server.url}{report}/events", timeout=30)
        assert events.headers["content-type"].startswith("text/event-stream")
        seen = [json.loads(line.removeprefix("data: ")) for line in events.text.splitlines() if line]
        assert len(seen) > 1 and {each["state"] for each in seen[:-1]} == {"running"}
        end = {"state": "succeeded", "progress": "12/12 pages", "result": {"words": 3600}}
        assert seen[-1] == end == httpx2.get(server.url + report, timeout=30).json()
        for path in ("/reports/unknown", "/reports/unknown/events"):
            assert httpx2.get(server.url + path, timeout=30).status_code == 404
    with uvicorn("status:app", EXAMPLES, tmp_path / "log", **env) as server:
        assert httpx2.get(server.url + report, timeout=30).json() == end


@pytest.mark.long
def test_the_example_of_an_audit_log_survives_kill_9(tmp_path: Path) -> None:
    """Every entry whose request was answered is there, in order and once, though its process was killed."""
    env = {"JOURNAL": str(tmp_path / "tasks.db"), "AUDIT": str(tmp_path / "audit.db")}

    def audit(server: Server) -> list[str]:
        found: list[str] = httpx2.get(f"{server.url}/audit", timeout=30).json()
        return found

    with uvicorn("audit_log:app", EXAMPLES, tmp_path / "log", **env) as server:
        for amount in range(8):
            assert httpx2.post(f"{server.url}/transfers", params={"amount": amount}, timeout=30).status_code == 200
        assert eventually(lambda: audit(server), what="the first entry")
        before = len(audit(server))
        server.child.kill()
        server.child.wait(20)
    with uvicorn("audit_log:app", EXAMPLES, tmp_path / "log", **env) as server:
        assert httpx2.post(f"{server.url}/transfers", params={"amount": 8}, timeout=30).status_code == 200
        written = eventually(lambda: len(all := audit(server)) == 9 and all, seconds=40, what="all entries")
        assert written == [f"transferred {amount}" for amount in range(9)]
        assert before < 8 and '"task.recovered"' in server.log.read_text()


def test_the_example_of_testing_passes() -> None:
    """Its tests pass as its comment says, also without the plugins that the tests of this repository need."""
    plain = ("-p", "no:cacheprovider", "-p", "no:timeout", "-p", "no:randomly")
    command = [sys.executable, "-m", "pytest", "-q", *plain, str(EXAMPLES / "testing.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert "4 passed" in done.stdout, done.stdout


def test_each_example_runs_in_a_test() -> None:
    """No example is forgotten here, nor on the page that lists them."""
    here, listed = Path(__file__).read_text(), (EXAMPLES / "README.md").read_text()
    for path in [*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*/README.md")]:
        assert f"]({path.relative_to(EXAMPLES)})" in listed, path
    for path in EXAMPLES.glob("*.py"):
        assert f'"{path.stem}:app"' in here or f'"{path.name}"' in here, path.name


@pytest.mark.long
def test_the_shop_counts_the_responses_that_its_customers_got(tmp_path: Path) -> None:
    """The same seed makes the same requests; each 409, 422 and 500 is one dropped batch, by its reason."""
    with uvicorn("app:app", SHOP, tmp_path / "log") as server:
        traffic = [sys.executable, str(SHOP / "traffic.py"), "--url", server.url, "--rate", "200", "--seconds", "15"]
        traffic += ["--count", "90", "--seed", "4", "--faults", "all"]
        saw: list[dict[int, int]] = []
        for _ in range(2):
            done = subprocess.run(traffic, capture_output=True, text=True, timeout=20)
            assert done.returncode == 0, done.stderr
            saw.append(ast.literal_eval(done.stdout.partition(":")[2].strip()))
        answers = saw[0]
        assert saw[1] == answers
        assert answers.keys() == {200, 409, 422, 500}
        assert sum(answers.values()) == 90

        def dropped() -> dict[tuple[str, str], float]:
            return {
                (sample.labels["task"], sample.labels["reason"]): sample.value
                for family in text_string_to_metric_families(httpx2.get(f"{server.url}/metrics").text)
                for sample in family.samples
                if sample.name == "aftertask_tasks_not_run_total" and sample.labels["outcome"] == "dropped"
            }

        want = {
            ("orders.charge_card", "http_exception"): 2 * answers[409],
            ("app.audit", "validation"): 2 * answers[422],
            ("orders.charge_card", "handler_error"): 2 * answers[500],
        }
        # A run is dropped when its request has ended, a moment after the customer has the answer.
        eventually(lambda: want.items() <= dropped().items(), what=f"{want} in a scrape")


@pytest.mark.long
def test_a_good_day_has_no_bad_runs_and_an_incident_has_many(tmp_path: Path) -> None:
    """So that the dashboards open green, and then show something; a customer's mistake is not ours."""
    with uvicorn("app:app", SHOP, tmp_path / "log") as server:

        def bad_share() -> float:
            totals: Counter[str] = Counter()
            for family in text_string_to_metric_families(httpx2.get(f"{server.url}/metrics", timeout=20).text):
                for sample in family.samples:
                    totals[sample.name] += sample.value
            assert totals["aftertask_tasks_finished_total"] > 100
            return totals["aftertask_tasks_bad_total"] / totals["aftertask_tasks_finished_total"]

        traffic = [sys.executable, str(SHOP / "traffic.py"), "--url", server.url, "--rate", "200", "--seconds", "60"]
        traffic += ["--count", "200", "--seed", "4"]
        subprocess.run(traffic, check=True, stdout=subprocess.DEVNULL, timeout=80)
        assert bad_share() < 0.01
        subprocess.run([*traffic, "--incident", "0"], check=True, stdout=subprocess.DEVNULL, timeout=80)
        eventually(lambda: bad_share() > 0.15, what="the incident in a scrape")


@pytest.mark.long
def test_the_demo_ends_by_itself_and_shows_every_outcome() -> None:
    """`make demo SECONDS=…` prints its address, live lines, and a table from the real /metrics."""
    done = subprocess.run(
        [sys.executable, str(SHOP / "demo.py"), "--seconds", "9"], capture_output=True, text=True, timeout=40
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"its metrics at http://127\.0\.0\.1:\d+/metrics", done.stdout)
    for event in ("task.succeeded", "task.failed", "task.skipped", "task.dropped"):
        assert event in done.stdout, done.stdout
    assert "hunter2" not in done.stdout
    assert re.search(
        r"ALERT  \[warning\] mail\.receipt failed: app\.MailServerDown( \(\d+ times\))?  owner growth  not run because",
        done.stdout,
    )
    table = done.stdout.rpartition("/metrics:\n")[2].split("\n\n")[0].strip()
    columns, *rows = (re.split(r" {2,}", row.strip()) for row in table.splitlines())
    shown = {row[0]: dict(zip(columns[1:], row[1:], strict=True)) for row in rows}
    assert {"orders.charge_card", "mail.receipt", "app.notify"} <= shown.keys()
    for row in shown.values():
        wait = row["p95 wait"]
        counts = {column: int(cell) for column, cell in row.items() if column != "p95 wait"}
        assert counts.pop("scheduled") == sum(counts.values()) > 0
        assert wait == "-" or float(wait.removesuffix(" ms")) >= 0
    # The charge waits for the reservation and the receipt, some 15 ms; buckets are coarse.
    assert float(shown["orders.charge_card"]["p95 wait"].removesuffix(" ms")) >= 10


@pytest.mark.parametrize("end", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_the_demo_ends_its_children_on_a_signal(end: signal.Signals) -> None:
    """After Ctrl-C and SIGTERM the exit code is 0 and the port is free."""
    port = free_port()
    command = [sys.executable, "-u", str(SHOP / "demo.py"), "--port", str(port)]
    # Where a shell started the tests with `&` Ctrl-C is ignored, and a child would inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as demo:
        signal.signal(signal.SIGINT, before)
        assert demo.stdout is not None
        try:
            assert any("task.succeeded" in line for line in demo.stdout)
            demo.send_signal(end)
            rest, errors = demo.communicate(timeout=20)
        finally:
            demo.kill()
    assert demo.returncode == 0, errors
    assert rest.endswith("Good-bye.\n")
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"http://127.0.0.1:{port}/metrics")


def test_the_demo_explains_that_a_port_is_taken() -> None:
    """It prints the way out and no traceback."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, str(SHOP / "demo.py"), "--seconds", "5", "--port", port]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert done.returncode == 1
    assert f"127.0.0.1:{port}" in done.stderr
    assert "choose another --port" in done.stderr
    assert "Traceback" not in done.stderr
