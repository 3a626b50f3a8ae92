"""
Kills a real uvicorn at random moments, with 1 and 4 workers under load; compares what tasks did with the journal.

    python tests/crash.py                    # 2 000 times kill -9
    python tests/crash.py --kills 50 --signals KILL TERM STOP
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import signal
import sqlite3
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import httpx2

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))

from live.servers import Server, eventually, uvicorn

APPS = Path(__file__).parent / "live" / "apps"
KINDS = ("durable", "idempotent", "plain")
HOWS = ("good", "good", "good", "refused", "commit_fails")

#: How many times a server with several workers loses one of them before it is killed as a whole.
KILLS_A_SERVER = 8

#: Seconds in which a worker of uvicorn must answer it.
HEALTH_CHECK = 60


class Crash:
    """
    One journal, one file of effects, and what the clients have seen.

    Args:
        folder: Where the files are.
        seed: Of the random choices.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.journal, self.effects = folder / "tasks.db", folder / "effects"
        self.orders = itertools.count(1)
        #: Order, to its kind, how its request was to end, the status the client got and the run's id.
        self.seen: dict[int, tuple[str, str, int, str | None]] = {}
        self.killed: Counter[str] = Counter()

    @contextmanager
    def server(self, workers: int) -> Iterator[Server]:
        """The app under uvicorn."""
        env = {"JOURNAL": str(self.journal), "EFFECTS": str(self.effects), "PYTHONPATH": os.pathsep.join(sys.path)}
        # Four workers that import at once on a busy machine take their time.
        many = ("--workers", str(workers), "--timeout-worker-healthcheck", str(HEALTH_CHECK))
        options, log = () if workers == 1 else many, self.folder / "log"
        with uvicorn("crashing:app", APPS, log, *options, ready="/ready", seconds=90, **env) as server:
            yield server

    @contextmanager
    def load(self, server: Server, clients: int = 6) -> Iterator[None]:
        """Clients that place orders one after another."""
        done = threading.Event()

        def place(chooser: random.Random) -> None:
            with httpx2.Client(timeout=30) as client:
                while not done.is_set():
                    order, kind, how = next(self.orders), chooser.choice(KINDS), chooser.choice(HOWS)
                    try:
                        got = client.post(f"{server.url}/{kind}/{how}/{order}")
                    except httpx2.HTTPError:  # it was killed
                        done.wait(0.02)
                        continue
                    self.seen[order] = kind, how, got.status_code, got.headers.get("x-run-ids")

        threads = [
            threading.Thread(target=place, args=(random.Random(self.random.random()),), daemon=True)
            for _ in range(clients)
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            done.set()
            for thread in threads:
                thread.join()

    def life(self, workers: int, signals: list[str], most: int) -> int:
        """One server under load until it is killed as a whole; returns the number of kills, at most `most`."""
        kills = 0
        with self.server(workers) as server, self.load(server):
            while workers > 1 and kills < min(KILLS_A_SERVER, most) - 1:
                time.sleep(self.random.uniform(0.1, 1.2))  # a random moment is what is tested
                self.strike(self.random.choice(worker_pids(server.child.pid)), self.random.choice(signals))
                kills += 1
            time.sleep(self.random.uniform(0.05, 1.5))
            os.killpg(server.child.pid, signal.SIGKILL)
            self.killed["KILL"] += 1
        return kills + 1

    def strike(self, pid: int, name: str) -> None:
        """Send a signal to a worker; a stopped one goes on after longer than its siblings take to notice a death."""
        number = getattr(signal, f"SIG{name}")
        try:
            os.kill(pid, number)
            if name == "STOP":
                time.sleep(2.5)
                os.kill(pid, signal.SIGCONT)
        except ProcessLookupError:  # its predecessor was struck a moment ago
            return
        self.killed[name] += 1

    def rest(self) -> None:
        """A last server settles what is left."""
        with self.server(1):
            eventually(lambda: self.unsettled() == 0, seconds=120, what="settling every run")

    def unsettled(self) -> int:
        """Runs in the journal that have not ended."""
        with closing(sqlite3.connect(self.journal)) as db:
            return int(db.execute("SELECT count(*) FROM runs WHERE settled_at IS NULL").fetchone()[0])

    def check(self) -> Counter[str]:
        """Compare; returns how often what happened. Raises AssertionError."""
        with closing(sqlite3.connect(self.journal)) as db:
            db.row_factory = sqlite3.Row
            rows = {row["id"]: row for row in db.execute("SELECT * FROM runs")}
            (health,) = db.execute("PRAGMA integrity_check").fetchone()
        assert health == "ok", health
        starts, ends, commits = defaultdict[str, int](int), defaultdict[str, int](int), set[int]()
        for line in self.effects.read_text().splitlines():
            what, *words = line.split()
            if what == "commit":
                commits.add(int(words[0]))
                continue
            kind, order, id = words[0], int(words[1]), words[2]
            if what == "start":
                starts[id] += 1
                # A plain task runs before the exit code of dependencies, as in FastAPI.
                assert kind == "plain" or order in commits, f"{line}: before its request had committed"
            else:
                ends[id] += 1
        found: Counter[str] = Counter()
        for order, (kind, how, status, id) in self.seen.items():
            if status != 200:
                assert kind == "plain" or id is None or not starts[id], f"order {order} failed, and was run"
                found["request failed"] += 1
                continue
            assert id is not None, f"order {order} was answered without an id"
            row = rows.get(id)
            if row is None:
                assert kind == "plain", f"order {order}: the journal does not know {kind} run {id}"
                found["plain, not written in time"] += 1
                continue
            found[f"{kind} {row['state']} {row['dead'] or ''}".strip()] += 1
            assert how == "good" or kind == "plain" or not starts[id], f"order {order} did not commit, and was run"
        for id, row in rows.items():
            what = f"run {id}: {dict(row)}, started {starts[id]} times, ended {ends[id]} times"
            assert row["settled_at"] is not None, what
            if row["state"] == "succeeded":
                assert ends[id] >= 1, what
            if not row["durable"]:
                continue
            assert row["state"] in ("succeeded", "dropped", "lost", "cancelled"), what
            if row["state"] in ("lost", "cancelled"):
                assert row["dead"] in ("interrupted", "unconfirmed", "max_recoveries"), what
            if row["dead"] == "unconfirmed" or row["state"] == "dropped":
                assert starts[id] == 0, what
            if row["idempotent"]:
                assert starts[id] <= 1 + row["recoveries"] + 1, what
            else:
                assert starts[id] <= 1, what
        return found


def worker_pids(server: int) -> list[int]:
    """The worker processes of a uvicorn."""

    def look() -> list[int]:
        children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
        commands = {int(pid): read_command(pid) for pid in children}
        return [pid for pid, command in commands.items() if "spawn_main" in command]

    # uvicorn waits for the answer of a worker that was killed while it was asked, before it starts others.
    return eventually(look, seconds=2 * HEALTH_CHECK, what="a worker")


def read_command(pid: str) -> str:
    """The command line of a process; empty if it has just ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def run(folder: Path, kills: int, signals: list[str], seed: int) -> Crash:
    """Kill as often as that, by turns with one worker and with four; settle the rest and compare."""
    crash = Crash(folder, seed)
    for workers in itertools.cycle((1, 4)):
        kills -= crash.life(workers, signals, kills)
        if kills <= 0:
            break
    crash.rest()
    return crash


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=2000)
    parser.add_argument("--signals", nargs="+", default=["KILL"], choices=["KILL", "TERM", "STOP"])
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--folder", type=Path, help="keep the files here")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.folder or Path(temporary)
        print(f"seed {asked.seed}")
        crash = run(folder, asked.kills, asked.signals, asked.seed)
        found = crash.check()
        print(f"killed: {dict(crash.killed)}; orders answered: {len(crash.seen)}")
        for what, count in sorted(found.items()):
            print(f"{count:8d}  {what}")


if __name__ == "__main__":
    main()
