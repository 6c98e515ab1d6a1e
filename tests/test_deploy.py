"""The files in deploy/ parse, refer to existing things, and use metrics that a live server exports."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from serving import ServerProcess, jpeg, make_bundle

from resight.client import Client, NewEntry
from resight.cycle.site import load_site
from resight.service.app import SERVICES
from resight.service.monitoring.metrics import SHED_REASONS
from resight.service.settings import PREFIX, Settings, load_settings

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
KUBERNETES = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
DECISIONS = {"match", "uncertain", "unknown", "uncalibrated"}


def objects() -> list[dict[str, Any]]:
    return [
        one for path in KUBERNETES if path.name != "kustomization.yaml" for one in yaml.safe_load_all(path.read_text())
    ]


def of_kind(kind: str) -> dict[str, dict[str, Any]]:
    return {one["metadata"]["name"]: one for one in objects() if one["kind"] == kind}


def expressions() -> Iterator[tuple[str, str]]:
    """(where, PromQL) of the dashboard, the alerts and the adapter."""
    board = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
    for panel in board["panels"]:
        for target in panel.get("targets", ()):
            yield f"panel {panel['title']}", target["expr"].replace("$__rate_interval", "5m")
    for group in yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"]:
        for rule in group["rules"]:
            yield f"alert {rule['alert']}", rule["expr"]
    for rule in yaml.safe_load((DEPLOY / "prometheus-adapter.yaml").read_text())["rules"]["custom"]:
        yield "adapter series", rule["seriesQuery"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of the series that a live server's /metrics has, or can have: those of its families."""
    folder = tmp_path_factory.mktemp("deploy")
    server = ServerProcess(make_bundle(folder / "b").path, folder / "data", "--metrics", "127.0.0.1:0")
    try:
        with Client(server.wait_ready()) as client:
            client.create_collection("c", unlimited_retention=True)
            client.enrol("c", NewEntry(jpeg(1)))
            client.search("c", jpeg(1))
        url = json.loads((folder / "data" / "server.json").read_text())["metrics"]
        with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
            text = answer.read().decode()
    finally:
        assert server.end() == 0
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "info": ("_info",)}
    names = set()
    for family in text_string_to_metric_families(text):
        names |= {family.name + suffix for suffix in suffixes.get(family.type, ("",))}
    return names


def test_every_expression_is_promql_over_series_that_exist(exported: set[str]) -> None:
    found = list(expressions())
    assert len(found) > 30
    for where, expression in found:
        promql_parser.parse(expression)
        used = set(re.findall(r"\b(?:resight|process)_[a-z0-9_]+", expression))
        assert used <= exported, (where, used - exported)
        for label, values in re.findall(r'(\w+)\s*(?:=~|!=|=)\s*"([^"]*)"', expression):
            for value in values.split("|"):
                if label == "reason":
                    assert value in SHED_REASONS, where
                elif label == "decision":
                    assert value in DECISIONS, where
                elif label == "method":
                    assert value.split("/")[1] in SERVICES, where


def test_every_metric_is_in_the_docs_and_every_one_there_is_exported(exported: set[str]) -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    documented = set(re.findall(r"`(resight_[a-z0-9_]+)`", text))
    base = {re.sub(r"_(bucket|sum|count)$", "", name) for name in exported if name.startswith("resight_")}
    assert documented == base


@pytest.mark.parametrize("path", KUBERNETES, ids=lambda path: path.stem)
def test_manifests_have_the_schema_of_kubernetes(path: Path) -> None:
    for one in yaml.safe_load_all(path.read_text()):
        if one["kind"] != "Kustomization":
            kubernetes_validate.validate(one, "1.33", strict=True)


def test_kustomization_names_every_manifest() -> None:
    listed = yaml.safe_load((DEPLOY / "kubernetes" / "kustomization.yaml").read_text())["resources"]
    assert sorted(listed) == [path.name for path in KUBERNETES if path.name != "kustomization.yaml"]


def test_manifests_name_what_exists() -> None:
    deployments, claims = of_kind("Deployment"), of_kind("PersistentVolumeClaim")
    maps, services = of_kind("ConfigMap"), of_kind("Service")
    (scaler,) = of_kind("HorizontalPodAutoscaler").values()
    (budget,) = of_kind("PodDisruptionBudget").values()
    assert scaler["spec"]["scaleTargetRef"]["name"] in deployments
    assert scaler["spec"]["metrics"][0]["pods"]["metric"]["name"] == "resight_queue_depth"
    assert set(services) == set(deployments) == {"resight", "resight-embed"}
    guide = (ROOT / "docs" / "operations.md").read_text()
    for name, one in deployments.items():
        labels = one["spec"]["template"]["metadata"]["labels"]
        assert one["spec"]["selector"]["matchLabels"] == services[name]["spec"]["selector"] == labels
        pod = one["spec"]["template"]["spec"]
        for volume in pod["volumes"]:
            if claim := volume.get("persistentVolumeClaim"):
                assert claim["claimName"] in claims
            if secret := volume.get("secret"):
                assert secret["secretName"] in guide  # how it is made
        for container in (*pod["initContainers"], *pod["containers"]):
            mounted = {mount["name"] for mount in container["volumeMounts"]}
            assert mounted <= {volume["name"] for volume in pod["volumes"]}
            for source in container.get("envFrom", ()):
                assert source["configMapRef"]["name"] in maps
    assert budget["spec"]["selector"]["matchLabels"] == deployments["resight-embed"]["spec"]["selector"]["matchLabels"]
    assert deployments["resight"]["spec"]["replicas"] == 1  # one process holds the data folder
    assert deployments["resight"]["spec"]["strategy"]["type"] == "Recreate"


def test_pods_run_without_a_named_user_and_with_a_read_only_root() -> None:
    jobs = [one["spec"]["jobTemplate"] for one in of_kind("CronJob").values()]
    for one in (*of_kind("Deployment").values(), *jobs):
        pod = one["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 10001
        assert pod["automountServiceAccountToken"] is False
        for container in (*pod.get("initContainers", ()), *pod["containers"]):
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] and not context["allowPrivilegeEscalation"]
            assert context["capabilities"] == {"drop": ["ALL"]} and "memory" in container["resources"]["limits"]


def test_the_cycle_runs_once_a_night_on_the_folder_of_models_that_the_server_reads(tmp_path: Path) -> None:
    (job,) = of_kind("CronJob").values()
    spec, guide = job["spec"], (ROOT / "docs" / "cycle.md").read_text()
    pod = spec["jobTemplate"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert (spec["concurrencyPolicy"], container["args"]) == ("Forbid", ["cycle", "once", "/site/site.toml"])
    path = tmp_path / "site.toml"
    path.write_text(of_kind("ConfigMap")["resight-site"]["data"]["site.toml"])
    site = load_site(path)
    mounted = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {mount["name"] for mount in mounted.values()} == set(volumes)
    for place in (site.state, site.service.model_root):
        assert "readOnly" not in mounted[str(place)]
    for place in (site.service.bundle, *site.service.token_file.parents[:1], *site.service.tls_ca.parents[:1]):
        assert mounted[str(place)]["readOnly"]
    assert all(str(Path(camera.source).parents[1]) in mounted for camera in site.camera)
    assert site.schedule.budget_minutes * 60 < spec["jobTemplate"]["spec"]["activeDeadlineSeconds"]
    claims, maps = of_kind("PersistentVolumeClaim"), of_kind("ConfigMap")
    for volume in volumes.values():
        assert volume.get("persistentVolumeClaim", {}).get("claimName", "resight-cycle") in claims
        assert volume.get("secret", {}).get("secretName", "") in guide
        assert volume.get("configMap", {}).get("name", "resight-site") in maps
    host, _, port = site.service.address.rpartition(":")
    assert int(port) in {one["port"] for one in of_kind("Service")[host]["spec"]["ports"]}
    served = of_kind("Deployment")[host]["spec"]["template"]["spec"]
    claim = volumes[mounted[str(site.service.model_root)]["name"]]["persistentVolumeClaim"]["claimName"]
    (shared,) = (one for one in served["volumes"] if one.get("persistentVolumeClaim", {}).get("claimName") == claim)
    (place,) = (one for one in served["containers"][0]["volumeMounts"] if one["name"] == shared["name"])
    assert {"name": "RESIGHT_MODELS", "value": place["mountPath"]} in served["containers"][0]["env"]
    labels = spec["jobTemplate"]["spec"]["template"]["metadata"]["labels"]
    assert labels["resight-client"] == "true"  # else the server's network policy shuts it out


def test_settings_of_the_pods_are_settings_and_ports_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    body = of_kind("ConfigMap")["resight-settings"]
    assert {name.removeprefix(PREFIX).lower() for name in body["data"]} <= set(Settings.model_fields)
    for name, value in body["data"].items():
        monkeypatch.setenv(name, value)
    settings = load_settings()
    metrics_port = int((settings.metrics_listen or "").rpartition(":")[2])
    (policy,) = of_kind("NetworkPolicy").values()
    opened = {port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]}
    assert opened == {settings.port, metrics_port}
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert f"EXPOSE {settings.port}" in dockerfile
    for one in of_kind("Deployment").values():
        pod = one["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert ports == {"grpc": settings.port, "metrics": metrics_port}
        for probe, path in (("startupProbe", "/readyz"), ("readinessProbe", "/readyz"), ("livenessProbe", "/livez")):
            assert container[probe]["httpGet"] == {"path": path, "port": "metrics", "scheme": "HTTPS"}
        assert pod["terminationGracePeriodSeconds"] > settings.drain_delay_s + settings.drain_grace_s
        assert str(settings.tls_key).startswith("/tls/")
    for service in of_kind("Service").values():
        assert {port["name"]: port["port"] for port in service["spec"]["ports"]} == ports


def test_the_cycle_of_compose_writes_the_models_that_the_service_reads() -> None:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    service, cycle = services["service"], services["cycle"]
    assert cycle["network_mode"] == "service:service" and cycle["profiles"]  # only where it is asked for
    (read,) = (one for one in service["volumes"] if one["source"] == "models")
    (written,) = (one for one in cycle["volumes"] if one["source"] == "models")
    assert read["target"] == service["environment"]["RESIGHT_MODELS"] and read["read_only"]
    assert "read_only" not in written
    stages = (ROOT / "Dockerfile").read_text().split("\nFROM ")
    for image, target in ((service, read["target"]), (cycle, written["target"])):
        (stage,) = (text for text in stages if f"AS {image['build']['target']}\n" in text)
        assert re.search(rf"install -d -o 10001 .*{target}\b", stage)  # a new volume takes its owner from there


def test_compose_watches_the_service_on_loopback_only() -> None:
    watch = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    base = yaml.safe_load((ROOT / "compose.yaml").read_text())
    assert "service" in base["services"]
    port = watch["services"]["service"]["environment"]["RESIGHT_METRICS_LISTEN"].rpartition(":")[2]
    scraped = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"][0]
    assert scraped["static_configs"][0]["targets"] == [f"service:{port}"]
    assert scraped["authorization"]["credentials_file"] == "/run/secrets/resight-token"
    for name, service in watch["services"].items():
        assert all(str(one).startswith("127.0.0.1:") for one in service.get("ports", ()))
        for volume in service.get("volumes", ()):
            if volume["type"] == "bind":
                assert (ROOT / volume["source"]).exists(), (name, volume)
            else:
                assert volume["source"] in watch["volumes"]
        if name != "service":
            assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]) and service["cap_drop"] == ["ALL"]
    source = yaml.safe_load((DEPLOY / "grafana-provisioning/datasources/prometheus.yaml").read_text())
    board = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
    used = {panel["datasource"]["uid"] for panel in board["panels"] if "datasource" in panel}
    assert used == {source["datasources"][0]["uid"]}
