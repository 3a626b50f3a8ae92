"""The Grafana stack as files: what can be checked without Docker."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose

from aftertask.cli import _rules

ROOT = Path(__file__).parents[1]
STACK = ROOT / "grafana"


def read(path: str) -> Any:
    """A YAML file of the stack."""
    return yaml.safe_load((STACK / path).read_text())


COMPOSE = read("compose.yaml")
SERVICES = COMPOSE["services"]


def mounted(service: str) -> dict[str, str]:
    """The files, folders and volumes that each service mounts, by the path in its container."""
    pairs = [volume.split(":") for volume in SERVICES[service].get("volumes", [])]
    return {inside: outside for outside, inside, *_ in pairs}


def run(name: str, *arguments: str | Path) -> None:
    """Run a check of Prometheus or Alertmanager; a missing tool is a failure where servers are required."""
    if shutil.which(name) is None:
        word = f"no {name} here; it comes with Debian's packages prometheus and prometheus-alertmanager"
        if os.environ.get("AFTERTASK_TEST_REQUIRE_SERVERS"):
            pytest.fail(word)
        pytest.skip(word)
    done = subprocess.run([name, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_compose_file_follows_the_specification() -> None:
    """Its keys and types are valid, and the services, volumes and networks that it names exist."""
    text = (STACK / "compose.yaml").read_text()
    PyCompose.from_yaml(text).validate()
    with pytest.raises(ValueError, match="depend_on"):
        PyCompose.from_yaml(text.replace("depends_on", "depend_on"))
    for service in SERVICES.values():
        assert set(service.get("depends_on", [])) <= set(SERVICES)


def test_every_image_has_a_version_and_only_this_machine_can_reach_it() -> None:
    """No image is `latest`, and ports are bound to loopback."""
    for name, service in SERVICES.items():
        if "image" in service:
            assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+", service["image"]), name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name


def test_everything_that_is_mounted_or_copied_exists() -> None:
    """So do the files of the Dockerfile, and the paths in the commands."""
    for name in SERVICES:
        for inside, outside in mounted(name).items():
            assert outside in COMPOSE["volumes"] or (STACK / outside).exists(), f"{name}: {outside}"
            assert inside.startswith("/")
        build = SERVICES[name].get("build")
        if build:
            context = STACK / build["context"]
            dockerfile = (context / build["dockerfile"]).read_text()
            for copied in re.findall(r"^COPY (.*) \S+$", dockerfile, re.MULTILINE):
                for each in copied.split():
                    assert (context / each).exists(), each
    assert (ROOT / "examples" / "shop" / "traffic.py").is_file() and "examples/shop/traffic.py" in str(
        SERVICES["customers"]
    )


@pytest.mark.parametrize(
    ("service", "flag"),
    [
        *(("prometheus", "--config.file="), ("alertmanager", "--config.file=")),
        *(("tempo", "-config.file="), ("loki", "-config.file="), ("collector", "--config=")),
    ],
)
def test_each_server_is_given_the_file_that_is_mounted(service: str, flag: str) -> None:
    """With another path a server would start with its defaults, or not at all."""
    command = SERVICES[service]["command"]
    words = command if isinstance(command, list) else command.split()
    (path,) = [word.removeprefix(flag) for word in words if word.startswith(flag)]
    assert path in mounted(service)


def test_grafana_finds_the_dashboards_and_the_data_sources() -> None:
    """The provider's path has the JSON, and every link between data sources leads to one."""
    (provider,) = read("provisioning/dashboards/aftertask.yaml")["providers"]
    inside = mounted("grafana")
    path = provider["options"]["path"]
    assert len(list((STACK / inside[path]).glob("*.json"))) == 4
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (STACK / inside[path] / Path(home).relative_to(path)).is_file()
    assert (STACK / inside["/etc/grafana/provisioning"] / "datasources").is_dir()

    sources = read("provisioning/datasources/aftertask.yaml")["datasources"]
    uids = {source["uid"]: source for source in sources}
    assert {source["type"] for source in sources} == {"prometheus", "tempo", "loki", "alertmanager"}
    linked = set(re.findall(r"datasourceUid: (\w+)", (STACK / "provisioning/datasources/aftertask.yaml").read_text()))
    assert linked == {"tempo", "loki"} and linked <= set(uids)
    for source in sources:
        host, port = re.fullmatch(r"http://(\w+):(\d+)", source["url"]).groups()  # type: ignore[union-attr]
        assert host in SERVICES and int(port) == {"prometheus": 9090, "tempo": 3200, "loki": 3100}.get(host, 9093)
    assert uids["prometheus"]["jsonData"]["exemplarTraceIdDestinations"][0]["name"] == "trace_id"
    scrape = read("prometheus/prometheus.yml")["scrape_configs"][0]["scrape_interval"]
    assert uids["prometheus"]["jsonData"]["timeInterval"] == scrape


def test_a_log_line_leads_to_its_trace() -> None:
    """The derived field's expression fits the lines that aftertask writes."""
    loki = next(
        each for each in read("provisioning/datasources/aftertask.yaml")["datasources"] if each["uid"] == "loki"
    )
    (field,) = loki["jsonData"]["derivedFields"]
    line = json.dumps({"event": "task.failed", "trace_id": "4bf92f3577b34da6a3ce929d0e0e4736"})
    found = re.search(field["matcherRegex"], line)
    assert found is not None and found[1] == "4bf92f3577b34da6a3ce929d0e0e4736"


def test_prometheus_scrapes_the_shop_keeps_exemplars_and_loads_the_rules() -> None:
    """It sends its alerts to Alertmanager, and the job is the service's name in spans and logs."""
    run("promtool", "check", "config", STACK / "prometheus" / "prometheus.yml")
    config = read("prometheus/prometheus.yml")
    (job,) = config["scrape_configs"]
    assert job["static_configs"][0]["targets"] == ["shop:8000"]
    assert job["job_name"] == read("collector/collector.yaml")["receivers"]["file_log"]["resource"]["service.name"]
    assert f'"service.name": "{job["job_name"]}"' in (ROOT / "examples" / "shop" / "app.py").read_text()
    assert "--enable-feature=exemplar-storage" in SERVICES["prometheus"]["command"]
    (rules,) = config["rule_files"]
    folder, pattern = os.path.split(rules)
    assert {path.name for path in (STACK / mounted("prometheus")[folder]).glob(pattern)} == {
        *("aftertask.rules.yml", "aftertask-more.rules.yml")
    }
    assert config["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] == ["alertmanager:9093"]


def test_alertmanagers_configuration_names_our_alerts() -> None:
    """amtool accepts it, and every alert in an inhibition is one of ours."""
    run("amtool", "check-config", STACK / "alertmanager" / "alertmanager.yml")
    ours = {f"Aftertask{alert.name}" for alert in _rules.alerts()}
    named = set(re.findall(r"Aftertask\w+", (STACK / "alertmanager" / "alertmanager.yml").read_text()))
    assert named <= ours and len(named) == 2


def test_the_collector_passes_everything_on() -> None:
    """Each part of its pipelines is configured and used, and each address is a service of ours."""
    config = read("collector/collector.yaml")
    used: set[tuple[str, str]] = set()
    for pipeline in config["service"]["pipelines"].values():
        used |= {(kind, name) for kind, names in pipeline.items() for name in names}
    assert used == {(kind, name) for kind in ("receivers", "processors", "exporters") for name in config[kind]}
    # Renamed in 0.144 and 0.149: the old names warn.
    assert not [name for _, name in used if name.partition("/")[0] in ("otlphttp", "filelog")]
    for exporter in config["exporters"].values():
        assert re.match(r"http://(\w+):", exporter["endpoint"])[1] in SERVICES  # type: ignore[index]
    (pattern,) = config["receivers"]["file_log"]["include"]
    assert os.path.dirname(pattern) in mounted("collector") and os.path.dirname(pattern) in mounted("shop")
    endpoint = SERVICES["shop"]["environment"]["OTEL_EXPORTER_OTLP_ENDPOINT"]
    assert (
        endpoint
        == "http://collector:" + config["receivers"]["otlp"]["protocols"]["http"]["endpoint"].rpartition(":")[2]
    )


def test_tempo_has_only_keys_of_its_version() -> None:
    """Tempo 3 refuses unknown keys and has removed several."""
    config = read("tempo/tempo.yaml")
    assert not set(config) & {"ingester", "compactor", "ingester_client", "metrics_generator_client"}
    assert set(config) <= {"server", "distributor", "storage", "usage_report", "query_frontend", "overrides"}
    http = config["distributor"]["receivers"]["otlp"]["protocols"]["http"]["endpoint"]
    assert f"http://{http}" == read("collector/collector.yaml")["exporters"]["otlp_http/tempo"]["endpoint"]
    assert config["usage_report"]["reporting_enabled"] is False


def test_loki_stores_what_the_collector_sends() -> None:
    """OTLP needs structured metadata, which needs schema 13 on tsdb."""
    (schema,) = read("loki/loki.yaml")["schema_config"]["configs"]
    assert (schema["schema"], schema["store"]) == ("v13", "tsdb")
    assert read("collector/collector.yaml")["exporters"]["otlp_http/loki"]["endpoint"].endswith("/otlp")
    assert read("loki/loki.yaml")["analytics"]["reporting_enabled"] is False
