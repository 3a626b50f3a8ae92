"""What Grafana does with a dashboard before anybody sees it, so that a test can read the same figures."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from live.monitoring import api, instant
from live.servers import Server

ROOT = Path(__file__).parents[2]
BOARDS = {path.stem: json.loads(path.read_text()) for path in sorted((ROOT / "dashboards").glob("*.json"))}


def panels(board: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """All panels but the headings, those in folded rows too."""
    for panel in board["panels"]:
        yield from panel["panels"] if panel["type"] == "row" else [panel]


def properties(panel: dict[str, Any], wanted: str) -> dict[str, Any]:
    """One property of the series or columns that a panel has overrides for, by their name."""
    return {
        override["matcher"]["options"]: each["value"]
        for override in panel["fieldConfig"]["overrides"]
        for each in override["properties"]
        if each["id"] == wanted
    }


class Grafana:
    """What Grafana does to a query before it asks: variables in, the more than one value of each as alternatives."""

    def __init__(self, server: Server, board: dict[str, Any], shown: int = 90, **chosen: str) -> None:
        self.server, self.shown = server, shown
        # With a scrape a second, as Grafana reckons it: max(interval + scrape, 4 x scrape).
        self.values = {"__rate_interval": "4s", "__interval": "1s", "__range": f"{shown}s", "slo": "0.99"}
        for variable in board["templating"]["list"]:
            if variable["type"] == "query":
                found = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["definition"])
                assert found is not None
                series = api(server, "series", **{"match[]": self.filled(found[1])})
                values = sorted({each[found[2]] for each in series})
                assert values, f"{variable['name']} has no value"
                if variable["name"] in chosen:
                    assert chosen[variable["name"]] in values
                    values = [chosen[variable["name"]]]
                alternatives = "|".join(re.escape(value).replace("\\", "\\\\") for value in values)
                self.values[variable["name"]] = f"({alternatives})"

    def filled(self, query: str) -> str:
        """The query as it is asked."""
        for name in sorted(self.values, key=len, reverse=True):
            query = query.replace(f"${name}", self.values[name])
        assert "$" not in query, query
        return query

    def ask(self, target: dict[str, Any]) -> list[list[float]]:
        """Each series' values, without those that are no number."""
        query = self.filled(target["expr"])
        now = time.time()
        if target["instant"]:
            result = [[each["value"]] for each in instant(self.server, query)]
        else:
            data = api(self.server, "query_range", query=query, start=str(now - self.shown), end=str(now), step="1")
            result = [each["values"] for each in data["result"]]
        return [[float(value) for _, value in each if not math.isnan(float(value))] for each in result]

    def bars(self, target: dict[str, Any]) -> dict[str, list[tuple[float, float]]]:
        """Each series' times and values, by its task."""
        now, query = time.time(), self.filled(target["expr"])
        data = api(self.server, "query_range", query=query, start=str(now - self.shown), end=str(now), step="1")
        return {
            each["metric"]["task"]: [(float(at), float(value)) for at, value in each["values"]]
            for each in data["result"]
        }

    def exemplars(self, target: dict[str, Any]) -> set[str]:
        """The traces that a query's dots lead to."""
        now = time.time()
        query = self.filled(target["expr"])
        data = api(self.server, "query_exemplars", query=query, start=str(now - 60), end=str(now))
        return {exemplar["labels"]["trace_id"] for each in data for exemplar in each["exemplars"]}

    def values_of(self, query: str) -> dict[tuple[str, ...], float]:
        """Each series' newest value, by its labels' values in the order of their names."""
        return {
            tuple(value for _, value in sorted(each["metric"].items())): float(each["value"][1])
            for each in instant(self.server, self.filled(query))
        }


def colour(steps: list[dict[str, Any]], value: float) -> str:
    """The colour that a threshold gives to a value."""
    return str([step["color"] for step in steps if step["value"] is None or value >= step["value"]][-1])
