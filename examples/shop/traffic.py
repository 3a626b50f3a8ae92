"""
Customers of the shop: a seeded mix of requests, bounded in time, number and rate.

    python examples/shop/traffic.py --url http://127.0.0.1:8000 --seconds 10
    python examples/shop/traffic.py --count 100 --seed 7       # the same hundred requests each time
"""

from __future__ import annotations

import argparse
import asyncio
import random
from collections import Counter

import httpx2

#: What customers do: weight, method, path, query.
MIX: list[tuple[int, str, str, dict[str, str | int | float]]] = [
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


async def shop(url: str, *, seconds: float, rate: float = 20, seed: int = 1, count: int | None = None) -> Counter[int]:
    """
    Send requests until `seconds` have passed or `count` are sent, about `rate` per second.

    Returns:
        The number of responses of each status; 0 counts requests without a response.
    """
    chance, answers = random.Random(seed), Counter[int]()
    weights = [weight for weight, *_ in MIX]
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    # One connection per request: uvicorn closes a connection on which a task has failed, with the next request on it.
    apart = httpx2.Limits(max_keepalive_connections=0)
    # The shop is on this machine: a proxy from the environment is not used.
    async with (
        httpx2.AsyncClient(base_url=url, timeout=10, limits=apart, trust_env=False) as client,
        asyncio.TaskGroup() as group,
    ):
        number = 0
        while loop.time() < end and (count is None or number < count):
            _, method, path, query = chance.choices(MIX, weights)[0]
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
    options = parser.parse_args()
    answers = asyncio.run(
        shop(options.url, seconds=options.seconds, rate=options.rate, seed=options.seed, count=options.count)
    )
    print(f"answers by status: {dict(sorted(answers.items()))}")


if __name__ == "__main__":
    main()
