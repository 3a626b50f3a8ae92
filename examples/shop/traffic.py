"""
Customers of the shop: a seeded mix of requests, bounded in time and rate.

    python examples/shop/traffic.py --url http://127.0.0.1:8000 --seconds 10
"""

from __future__ import annotations

import argparse
import asyncio
import random
from collections import Counter

import httpx2

#: What customers do, and how often: weight, method, path, query.
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
    (3, "DELETE", "/orders/{n}", {}),
    (3, "POST", "/admin/reindex", {}),
]


async def shop(url: str, *, seconds: float, rate: float = 20, seed: int = 1) -> Counter[int]:
    """
    Send requests for so long, about `rate` a second.

    Returns:
        How many answers there were of each status; 0 counts connections that were cut.
    """
    chance, answers = random.Random(seed), Counter[int]()
    weights = [weight for weight, *_ in MIX]
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    async with httpx2.AsyncClient(base_url=url, timeout=10) as client, asyncio.TaskGroup() as group:
        number = 0
        while loop.time() < end:
            _, method, path, query = chance.choices(MIX, weights)[0]
            number += 1
            group.create_task(one(client, answers, method, path.format(n=number), query))
            await asyncio.sleep(chance.expovariate(rate))
    return answers


async def one(
    client: httpx2.AsyncClient, answers: Counter[int], method: str, path: str, query: dict[str, str | int | float]
) -> None:
    """One request; a cut connection is counted and no reason to stop."""
    try:
        response = await client.request(method, path, params=query)
        answers[response.status_code] += 1
    except httpx2.HTTPError:
        answers[0] += 1


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rate", type=float, default=20)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    answers = asyncio.run(shop(options.url, seconds=options.seconds, rate=options.rate, seed=options.seed))
    print(f"answers by status: {dict(sorted(answers.items()))}")


if __name__ == "__main__":
    main()
