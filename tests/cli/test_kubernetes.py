"""Rules and dashboards as objects of Kubernetes: valid by the published schemas, and with the same content."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from cloudcoil.models.prometheus_operator import v1
from typer.testing import CliRunner, Result

from aftertask.cli.app import app
from aftertask.cli.rules import FILES

ROOT = Path(__file__).parents[2]

#: The request in which `kubectl apply` keeps the last applied object as an annotation may not be longer.
ANNOTATIONS_AT_MOST = 256 * 1024


def aftertask(*arguments: str | Path) -> Result:
    """The command, in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def config_maps(folder: Path) -> dict[str, dict[str, Any]]:
    """What was written, each valid for the newest Kubernetes of the schemas."""
    found = {path.name: yaml.safe_load(path.read_text()) for path in sorted(folder.glob("*.yaml"))}
    for each in found.values():
        kubernetes_validate.validate(each, kubernetes_validate.latest_version(), strict=True)
    return found


def test_rules_are_one_object_for_the_operator(tmp_path: Path) -> None:
    """Every key is one of the operator's model, with values of its form; the groups are those of the plain files."""
    options = ["--kubernetes", "--namespace", "monitoring", "--label", "release=kube-prometheus-stack"]
    assert aftertask("rules", "export", tmp_path, "--all", *options).exit_code == 0
    document = yaml.safe_load((tmp_path / "aftertask-rules.yaml").read_text())
    again = v1.PrometheusRule.model_validate(document).model_dump(mode="json", by_alias=True, exclude_unset=True)
    assert again == document
    assert document["metadata"] == {
        "name": "aftertask",
        "namespace": "monitoring",
        "labels": {"release": "kube-prometheus-stack"},
    }
    plain = [yaml.safe_load((ROOT / "dashboards" / "rules" / name).read_text())["groups"] for name in FILES]
    assert document["spec"]["groups"] == [group for groups in plain for group in groups]
    assert (tmp_path / "runbooks" / "TargetDown.md").is_file() and not list(tmp_path.glob("*.rules.yml"))


def test_the_default_rules_alone_and_the_operators_model_can_refuse(tmp_path: Path) -> None:
    """Without `--all` the others stay out; a key or a duration that the operator does not take is found."""
    assert aftertask("rules", "export", tmp_path, "--kubernetes", "--slo", "0.999").exit_code == 0
    document = yaml.safe_load((tmp_path / "aftertask-rules.yaml").read_text())
    assert [group["name"] for group in document["spec"]["groups"]] == ["aftertask.recording", "aftertask.alerts"]
    assert document["metadata"] == {"name": "aftertask", "labels": {}}
    assert "14.4 * 0.001" in str(document)
    document["spec"]["groups"][0]["interval"] = "half a minute"
    with pytest.raises(ValueError, match="interval"):
        v1.PrometheusRule.model_validate(document)


def test_dashboards_are_config_maps_that_the_sidecar_finds(tmp_path: Path) -> None:
    """One each, byte for byte the plain file, small enough for `kubectl apply`."""
    assert aftertask("dashboards", "export", tmp_path, "--kubernetes").exit_code == 0
    boards = {path.stem: path.read_text() for path in sorted((ROOT / "dashboards").glob("*.json"))}
    found = config_maps(tmp_path)
    assert set(found) == {f"{name}.yaml" for name in boards} and len(found) == 4
    for name, text in boards.items():
        document = found[f"{name}.yaml"]
        assert document["data"] == {f"{name}.json": text}
        assert document["metadata"] == {"name": name, "labels": {"grafana_dashboard": "1"}}
        assert len(json.dumps(document)) < ANNOTATIONS_AT_MOST


def test_names_namespace_and_labels_are_options(tmp_path: Path) -> None:
    """A label given replaces the one of that name."""
    options = ["--name", "shop", "--namespace", "observability", "--label", "grafana_dashboard=yes"]
    options += ["--label", "example.org/team=growth"]
    assert aftertask("dashboards", "export", tmp_path, "--kubernetes", *options).exit_code == 0
    found = config_maps(tmp_path)
    assert {each["metadata"]["name"] for each in found.values()} == {
        "shop-overview",
        "shop-task",
        "shop-capacity",
        "shop-engine",
    }
    for each in found.values():
        assert each["metadata"]["namespace"] == "observability"
        assert each["metadata"]["labels"] == {"grafana_dashboard": "yes", "example.org/team": "growth"}


@pytest.mark.parametrize("command", ["rules", "dashboards"])
@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--namespace", "monitoring"], "--name, --namespace and --label need --kubernetes"),
        (["--label", "a=b"], "--name, --namespace and --label need --kubernetes"),
        (["--kubernetes", "--name", "My_Shop"], "--name must be up to 63 lower-case letters, digits and hyphens, got"),
        (["--kubernetes", "--name", ""], "--name must be up to 63 lower-case letters, digits and hyphens, got ''"),
        (["--kubernetes", "--namespace", "a.b"], "--namespace must be up to 63 lower-case letters"),
        (["--kubernetes", "--label", "team"], "--label must be KEY=VALUE as in Kubernetes, such as"),
        (["--kubernetes", "--label", "team=a b"], "such as release=monitoring, got 'team=a b'"),
    ],
)
def test_what_kubernetes_would_refuse_is_refused(command: str, options: list[str], word: str, tmp_path: Path) -> None:
    """With the value and the way out, before anything is written."""
    done = aftertask(command, "export", tmp_path / "new", *options)
    assert done.exit_code == 2 and word in done.output, done.output
    assert not (tmp_path / "new").exists()
