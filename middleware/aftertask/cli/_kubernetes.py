"""Rules and dashboards as objects of Kubernetes: for the Prometheus operator and the sidecar of Grafana's chart."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated

import typer

from ._output import dump, refusal

Wanted = Annotated[bool, typer.Option("--kubernetes", help="Write Kubernetes objects instead of plain files.")]
Name = Annotated[str, typer.Option("--name", help="With --kubernetes: the name, or the prefix of the names.")]
Namespace = Annotated[str, typer.Option("--namespace", help="With --kubernetes: the namespace; by default kubectl's.")]
Labels = Annotated[
    list[str] | None, typer.Option("--label", help="With --kubernetes: a label KEY=VALUE. May be repeated.")
]

_PART = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_VALUE = r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?"
_LABEL = re.compile(rf"({_PART}(\.{_PART})*/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?={_VALUE}")


def meta(
    wanted: bool, name: str, namespace: str, given: list[str] | None, default: Mapping[str, str]
) -> dict[str, object] | None:
    """
    The metadata of each object, by the options of a command; None without `--kubernetes`.

    Raises:
        typer.Exit: An option that Kubernetes would refuse, or that does nothing.
    """
    if not wanted:
        if namespace or given or name != "aftertask":
            raise refusal("--name, --namespace and --label need --kubernetes")
        return None
    for option, value in (("--name", name), ("--namespace", namespace)):
        if (value or option == "--name") and not (re.fullmatch(_PART, value) and len(value) <= 63):
            raise refusal(f"{option} must be up to 63 lower-case letters, digits and hyphens, got {value!r}")
    labels = dict(default)
    for each in given or []:
        key, _, value = each.partition("=")
        if not _LABEL.fullmatch(each) or len(value) > 63 or len(key.rpartition("/")[2]) > 63:
            raise refusal(f"--label must be KEY=VALUE as in Kubernetes, such as release=monitoring, got {each!r}")
        labels[key] = value
    return {"name": name, **({"namespace": namespace} if namespace else {}), "labels": labels}


def prometheus_rule(about: dict[str, object], groups: list[dict[str, object]]) -> str:
    """Groups of rules for the Prometheus operator."""
    head = "Written by `aftertask rules export --kubernetes`."
    kind = {"apiVersion": "monitoring.coreos.com/v1", "kind": "PrometheusRule"}
    return dump(head, {**kind, "metadata": about, "spec": {"groups": groups}})


def config_map(about: dict[str, object], file: str, text: str) -> str:
    """A dashboard for the sidecar of Grafana's chart."""
    head = "Written by `aftertask dashboards export --kubernetes`."
    name = f"{about['name']}-{file.removesuffix('.json').removeprefix('aftertask-')}"
    kind = {"apiVersion": "v1", "kind": "ConfigMap"}
    return dump(head, {**kind, "metadata": {**about, "name": name}, "data": {file: text}})
