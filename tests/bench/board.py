"""
What open pages of the board cost the tasks: three pages, 500 runs per second, under a real uvicorn.

    python tests/bench/board.py                  # five minutes; exit code 1 if a limit is exceeded
    python tests/bench/board.py --journal        # the same with a journal that holds a million runs
    python tests/bench/board.py --rounds 3 --seconds 5

Rounds with three open pages (Now, Runs, a run; with a journal Runs is filtered by text, so that rows are walked
through, and the third is that of dead letters) and with none take turns. Of each kind the best round's 99th percentile
counts: whatever else the machine does makes a round slower, never faster. What the pages take of a processor is the
median of the rounds' differences; it hardly depends on what else the machine does. Memory is the resident memory of the
process after the last round, less that after the first, by when the board keeps as many runs as it ever will.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx2

sys.path.insert(0, str(Path(__file__).parents[1]))

from aftertask.journal.file import prepare
from bench.journal import fill
from live.servers import uvicorn

APPS = Path(__file__).parents[1] / "live" / "apps"
RATIO_LIMIT, CPU_LIMIT, MEMORY_LIMIT_MB = 1.10, 0.10, 5.0
REQUESTS_PER_SECOND = 50


async def traffic(client: httpx2.AsyncClient, seconds: float) -> None:
    """Fifty requests per second, with ten tasks each."""
    start = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for number in range(int(seconds * REQUESTS_PER_SECOND)):
            await asyncio.sleep(max(0.0, start + number / REQUESTS_PER_SECOND - time.monotonic()))
            group.create_task(client.get("/add"))


async def page(client: httpx2.AsyncClient, path: str) -> None:
    """An open page: asks once per second for what has changed, as the script does."""
    headers: dict[str, str] = {}
    while True:
        response = await client.get(f"/aftertask/{path}", headers=headers)
        if found := re.search(r'data-cursor="(.*?)"', response.text):
            headers = {"x-aftertask-after": found[1]}
        await asyncio.sleep(1)


async def measure(
    url: str, rounds: int, seconds: float, paths: Sequence[str]
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """What the app measured in each round without and with open pages."""
    found = []
    apart = httpx2.Limits(max_keepalive_connections=0)  # or a connection may be reused as the server closes it
    async with httpx2.AsyncClient(base_url=url, timeout=30, limits=apart, trust_env=False) as client:
        await traffic(client, 6)  # the record is full then
        for _ in range(rounds):
            both = []
            for shown in ((), paths):
                last = (await client.get("/aftertask/api/runs", params={"limit": 1})).json()["runs"][0]["id"]
                await client.get("/take")
                pages = [asyncio.create_task(page(client, f"runs/{last}" if path == "run" else path)) for path in shown]
                await traffic(client, seconds)
                for each in pages:
                    each.cancel()
                await asyncio.gather(*pages, return_exceptions=True)
                both.append((await client.get("/take")).json())
            found.append((both[0], both[1]))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, compare with the limits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--ratio", type=float, default=RATIO_LIMIT, help=f"the limit (default: {RATIO_LIMIT})")
    parser.add_argument("--memory", type=float, default=MEMORY_LIMIT_MB, help=f"in MB (default: {MEMORY_LIMIT_MB})")
    parser.add_argument("--journal", action="store_true", help="with a journal of a million runs")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tasks.db"
        if options.journal:
            prepare(path)
            fill(path, 1_000_000)
        with uvicorn(
            "board_load:app", APPS, Path(folder) / "log", BENCH_JOURNAL=str(path) if options.journal else ""
        ) as server:
            paths = ("", "runs?q=nothing", "dead") if options.journal else ("", "runs", "run")
            found = asyncio.run(measure(server.url, options.rounds, options.seconds, paths))
    closed, opened = min(one["p99"] for one, _ in found), min(two["p99"] for _, two in found)
    grown = found[-1][1]["resident"] - found[0][1]["resident"]
    runs = sum(one["runs"] + two["runs"] for one, two in found)
    rate = runs / (2 * options.rounds * options.seconds)
    cpu = statistics.median(two["cpu_s"] - one["cpu_s"] for one, two in found) / options.seconds
    kept = opened / closed <= options.ratio, cpu <= CPU_LIMIT, grown <= options.memory
    ratio_kept, cpu_kept, memory_kept = ("pass" if each else "FAIL" for each in kept)
    print(
        f"{ratio_kept}  p99 of a task of 20 ms: {closed * 1e3:.1f} ms, with three open pages "
        f"{opened * 1e3:.1f} ms: {opened / closed:.3f} x  limit {options.ratio:.2f}  ({rate:.0f} runs per second)\n"
        f"{cpu_kept}  three open pages take {cpu:.1%} of a processor  limit {CPU_LIMIT:.0%}\n"
        f"{memory_kept}  resident memory grew by {grown:.2f} MB  limit {options.memory:.2f}"
    )
    return 0 if all(kept) else 1


if __name__ == "__main__":
    sys.exit(main())
