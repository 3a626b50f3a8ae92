"""
Customers of the shop: a seeded mix of requests, bounded in time, number and rate.

Most of the time all is well; for a minute every eight the mail server and the carrier are down.

    python examples/shop/traffic.py --url http://127.0.0.1:8000 --seconds 10
    python examples/shop/traffic.py --count 100 --seed 7       # the same hundred requests each time
    python examples/shop/traffic.py --faults all --seconds 60  # every outcome, all the time
"""

from __future__ import annotations

import argparse
import asyncio
import random
from collections import Counter

import httpx2

Request = tuple[int, str, str, dict[str, str | int | float]]

#: What customers do on a good day: weight, method, path, query. Their own mistakes are common, a fault of ours is rare.
CALM: list[Request] = [
    (400, "POST", "/orders/{n}", {}),
    (1, "POST", "/orders/{n}", {"fault": "declined"}),
    (20, "POST", "/carrier", {"up": "true"}),
    (60, "POST", "/parcels/{n}", {}),
    (30, "POST", "/orders/{n}", {"fault": "sold_out"}),
    (150, "GET", "/search", {"limit": 2}),
    (30, "GET", "/search", {"limit": "many"}),
    (150, "POST", "/images/{n}", {"sizes": 3}),
    (100, "POST", "/reports", {"seconds": 0.3}),
    (10, "POST", "/reports", {"seconds": 4}),
    (60, "GET", "/export", {}),
    (50, "GET", "/invoices/{n}", {}),
    (20, "POST", "/admin/reindex", {}),
]
#: The mail server is down: receipts fail, and what comes after them is skipped. So is the carrier: dead letters.
INCIDENT: list[Request] = [
    (400, "POST", "/orders/{n}", {"fault": "mail"}),
    (50, "POST", "/orders/{n}", {}),
    (20, "POST", "/carrier", {"up": "false"}),
    *CALM[3:],
]
#: Every outcome, all the time.
ALL: list[Request] = [
    (30, "POST", "/orders/{n}", {}),
    (6, "POST", "/orders/{n}", {"fault": "declined"}),
    (3, "POST", "/orders/{n}", {"fault": "mail"}),
    (3, "POST", "/orders/{n}", {"fault": "sold_out"}),
    (1, "POST", "/orders/{n}", {"fault": "cancelled"}),
    (2, "POST", "/orders/{n}", {"fault": "bug"}),
    (8, "GET", "/search", {"limit": 2}),
    (3, "GET", "/search", {"limit": "many"}),
    (8, "POST", "/images/{n}", {"sizes": 3}),
    (6, "POST", "/reports", {"seconds": 0.3}),
    (1, "POST", "/reports", {"seconds": 4}),
    (5, "GET", "/export", {}),
    (4, "GET", "/invoices/{n}", {}),
    (3, "DELETE", "/orders/{n}", {}),
    (3, "POST", "/admin/reindex", {}),
]

#: Seconds from the start of one incident to the next, and how long each lasts.
INCIDENT_EVERY, INCIDENT_LASTS = 480, 60


def mix(faults: str, incident: float, elapsed: float) -> list[Request]:
    """What customers do `elapsed` seconds after the start, with the first incident after `incident` seconds."""
    if faults == "all":
        return ALL
    down = elapsed >= incident and (elapsed - incident) % INCIDENT_EVERY < INCIDENT_LASTS
    return INCIDENT if down else CALM


async def shop(
    url: str,
    *,
    seconds: float,
    rate: float = 20,
    seed: int = 1,
    count: int | None = None,
    faults: str = "rare",
    incident: float = 120,
) -> Counter[int]:
    """
    Send requests until `seconds` have passed or `count` are sent, about `rate` per second.

    Args:
        faults: `rare` with incidents, or `all`.
        incident: Seconds until the first incident.

    Returns:
        The number of responses of each status; 0 counts requests without a response.
    """
    chance, answers = random.Random(seed), Counter[int]()
    loop = asyncio.get_running_loop()
    began = loop.time()
    # One connection per request: uvicorn closes a connection on which a task has failed, with the next request on it.
    apart = httpx2.Limits(max_keepalive_connections=0)
    # The shop is on this machine: a proxy from the environment is not used.
    async with (
        httpx2.AsyncClient(base_url=url, timeout=10, limits=apart, trust_env=False) as client,
        asyncio.TaskGroup() as group,
    ):
        number = 0
        while (elapsed := loop.time() - began) < seconds and (count is None or number < count):
            requests = mix(faults, incident, elapsed)
            _, method, path, query = chance.choices(requests, [weight for weight, *_ in requests])[0]
            number += 1
            group.create_task(one(client, answers, method, path.format(n=number), query))
            await asyncio.sleep(chance.expovariate(rate))
    return answers


async def one(
    client: httpx2.AsyncClient, answers: Counter[int], method: str, path: str, query: dict[str, str | int | float]
) -> None:
    """One request; a broken connection is counted."""
    try:
        response = await client.request(method, path, params=query)
        answers[response.status_code] += 1
    except httpx2.HTTPError:
        answers[0] += 1


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--seconds", type=float, default=10, help="end after this many seconds (default: 10)")
    parser.add_argument("--count", type=int, help="end after this many requests, if that comes first")
    parser.add_argument("--rate", type=float, default=20, help="requests per second, on average (default: 20)")
    parser.add_argument("--seed", type=int, default=1, help="the same number gives the same requests (default: 1)")
    parser.add_argument(
        "--faults",
        choices=("rare", "all"),
        default="rare",
        help=f"rare, with an incident of {INCIDENT_LASTS} s every {INCIDENT_EVERY} s (default), or all of them always",
    )
    parser.add_argument("--incident", type=float, default=120, help="seconds until the first incident (default: 120)")
    options = parser.parse_args()
    answers = asyncio.run(shop(**vars(options)))
    print(f"answers by status: {dict(sorted(answers.items()))}")


if __name__ == "__main__":
    main()
