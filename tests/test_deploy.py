"""What is deployed is what the server is: files under deploy/, docker-compose.yml and the Dockerfile, held against code and schemas."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from seqserve.cli import main as seqserve
from seqserve.turns import METADATA
from server.config import Config
from server.metrics import TABLE
from tests import models
from tests.process import ROOT, Served, serve
from web.config import Config as WebConfig

DEPLOY = ROOT / "deploy"
COMPOSE: Mapping[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
SERVICES: Mapping[str, Mapping[str, Any]] = COMPOSE["services"]
KNOBS = {"SEQSERVE_" + f.name.upper() for f in dataclasses.fields(Config)} | {
    "SEQSERVE_WEB_" + f.name.upper() for f in dataclasses.fields(WebConfig)
}
NATIVE = ["balancer", "namespace", "network", "replicas", "scaling", "store"]


def documents(file: Path) -> list[dict[str, Any]]:
    return [d for d in yaml.safe_load_all(file.read_text(encoding="utf-8")) if d]


EVERY = [(name, d) for name in NATIVE for d in documents(DEPLOY / "k8s" / f"{name}.yaml")]


@pytest.mark.parametrize(("name", "document"), EVERY, ids=[f"{name}-{d['kind']}-{d['metadata']['name']}" for name, d in EVERY])
def test_kubernetes_schema(name: str, document: dict[str, Any]) -> None:
    """Every manifest is one by Kubernetes' own schema, with no field it does not know."""
    kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


def test_kubernetes_schema_sees_a_wrong_field() -> None:
    """The schema check refuses a misspelt field, deep inside."""
    document = next(d for _, d in EVERY if d["kind"] == "Deployment")
    wrong = json.loads(json.dumps(document))
    wrong["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, kubernetes_validate.latest_version(), strict=True)


def pods() -> Iterator[tuple[str, dict[str, str], dict[str, Any]]]:
    """Name, labels and pod spec of everything that runs pods."""
    for _, d in EVERY:
        if d["kind"] in ("Deployment", "StatefulSet"):
            template = d["spec"]["template"]
            yield d["metadata"]["name"], template["metadata"]["labels"], template["spec"]


def test_kustomization_names_every_manifest() -> None:
    """kustomization.yaml lists each manifest but the one for KServe, the balancer's configuration is the file compose mounts, and
    every image has a tag that is not `latest`."""
    kustomization = documents(DEPLOY / "k8s" / "kustomization.yaml")[0]
    listed = set(kustomization["resources"])
    assert listed == {f"{name}.yaml" for name in NATIVE} | {"../haproxy"}
    files = {p.name for p in (DEPLOY / "k8s").glob("*.yaml")} - {"kustomization.yaml", "kserve.yaml"}
    assert files == {f"{name}.yaml" for name in NATIVE}
    generated = documents(DEPLOY / "haproxy" / "kustomization.yaml")[0]["configMapGenerator"][0]
    assert generated["name"] == "balancer"
    assert [(DEPLOY / "haproxy" / f).is_file() for f in generated["files"]] == [True]
    tagged = {i["name"]: i["newTag"] for i in kustomization["images"]}
    for _, _, spec in pods():
        for container in spec["containers"]:
            name, _, tag = container["image"].partition(":")
            assert tagged.get(name, tag) not in ("", "latest")


def test_kubernetes_references_meet() -> None:
    """Selectors of Services, budgets and policies find pods, the autoscaler its Deployment and a metric that the server has, named
    ports exist, and pods run as nobody, on a read-only file system, with limits."""
    every = list(pods())
    for _, d in EVERY:
        spec = d.get("spec", {})
        selector = spec.get("selector") if d["kind"] == "Service" else spec.get("podSelector", spec.get("selector"))
        wanted = (selector or {}).get("matchLabels", {} if d["kind"] != "Service" else selector)
        if wanted:
            found = [s for _, labels, s in every if wanted.items() <= labels.items()]
            assert found, f"{d['kind']} {d['metadata']['name']} selects nothing"
            if d["kind"] == "Service":
                ports = {p["name"]: p["containerPort"] for c in found[0]["containers"] for p in c["ports"]}
                assert all(p.get("targetPort", p["port"]) in {*ports, *ports.values()} for p in spec["ports"])
    for _, _, spec in every:
        assert spec["securityContext"]["runAsNonRoot"]
        for container in spec["containers"]:
            assert container["securityContext"]["readOnlyRootFilesystem"]
            assert "memory" in container["resources"]["limits"]
            assert container["readinessProbe"]
            assert container["livenessProbe"]
    scaler = next(d for _, d in EVERY if d["kind"] == "HorizontalPodAutoscaler")["spec"]
    assert scaler["scaleTargetRef"]["name"] in {name for name, _, _ in every}
    assert {m["pods"]["metric"]["name"] for m in scaler["metrics"]} <= {m.name for m in TABLE}


def test_kserve_runtime() -> None:
    """The ServingRuntime's container is one by Kubernetes' schema, and its own fields are those that KServe's API names."""
    (runtime,) = documents(DEPLOY / "k8s" / "kserve.yaml")
    assert (runtime["apiVersion"], runtime["kind"]) == ("serving.kserve.io/v1alpha1", "ServingRuntime")
    spec = dict(runtime["spec"])
    containers = spec.pop("containers")
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "p", "annotations": spec.pop("annotations")},
        "spec": {"containers": containers},
    }
    kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)
    assert set(spec) == {"supportedModelFormats", "protocolVersions", "multiModel"}
    assert all(set(f) <= {"name", "version", "autoSelect", "priority"} for f in spec["supportedModelFormats"])
    assert spec["protocolVersions"] == ["grpc-v2"]
    assert containers[0]["name"] == "kserve-container"  # KServe's own name for it
    assert containers[0]["ports"][0]["name"] == "h2c"  # so that Knative speaks HTTP/2 to it


@pytest.mark.parametrize("name", SERVICES)
def test_compose_service(name: str) -> None:
    """Every service has a pinned image, limits, a health check and a read-only root, drops all rights, and is published to this
    machine only."""
    service = SERVICES[name]
    tag = service["image"].partition(":")[2]
    assert re.match(r"v?\d+\.\d+\.\d+", tag)
    limits = service["deploy"]["resources"]["limits"]
    assert {"cpus", "memory"} <= set(limits)
    assert service["healthcheck"]["test"]
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
    for volume in service.get("volumes", ()):
        source = volume.partition(":")[0]
        assert (ROOT / source).exists() if source.startswith(".") else source in COMPOSE["volumes"]
    assert {key for key in service.get("environment", {}) if key.startswith("SEQSERVE_")} <= KNOBS


def test_compose_profiles() -> None:
    """`docker compose up` starts the server alone; what a service depends on is in its profile."""
    assert [name for name, s in SERVICES.items() if "profiles" not in s] == ["server"]
    for service in SERVICES.values():
        for other in service.get("depends_on", ()):
            assert SERVICES[other]["profiles"] == service["profiles"]
    assert SERVICES["replica"]["deploy"]["replicas"] >= 2


def test_grace_outlasts_the_drain() -> None:
    """Whoever stops a server waits longer than it drains."""
    drain = Config().drain_seconds
    assert float(SERVICES["replica"]["stop_grace_period"].removesuffix("s")) > drain
    assert float(SERVICES["web"]["stop_grace_period"].removesuffix("s")) > WebConfig().drain_seconds
    assert next(spec for name, _, spec in pods() if name == "seqserve")["terminationGracePeriodSeconds"] > drain


def test_image_has_what_the_server_needs() -> None:
    """The Dockerfile copies every package of the wheel, sets knobs that exist, is not root, never installs torch, and .dockerignore
    lets through what is copied."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    let = {line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line.startswith("!")}
    copied = {word for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.MULTILINE) for word in line.split()[:-1]}
    assert copied == let
    packages = re.search(r"packages = (\[.*\])", (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert packages is not None
    assert set(json.loads(packages[1])) <= copied
    assert set(re.findall(r"SEQSERVE_\w+", text)) <= KNOBS
    assert re.search(r"^USER \d+:\d+$", text, re.MULTILINE)
    assert set(re.findall(r"/tmp/(\w+)\.txt", text)) == {"base", "redis", "mtls", "cpu", "gpu", "loadtest", "web"}


def test_dashboard_and_alerts_ask_for_metrics_that_exist() -> None:
    """Every metric of ours that the dashboard or an alert asks for is in the server's table, with the labels it is asked by."""
    table = {m.name: {*m.labels, "instance", "job", "le"} for m in TABLE}
    dashboard = json.loads((DEPLOY / "grafana/dashboards/seqserve.json").read_text(encoding="utf-8"))
    asked = [t["expr"] for panel in dashboard["panels"] for t in panel.get("targets", ())]
    alerts = documents(DEPLOY / "prometheus/alerts.yml")[0]["groups"]
    asked += [rule["expr"] for group in alerts for rule in group["rules"]]
    assert len(asked) > 20
    for expression in asked:
        for name, inside in re.findall(r"(seqserve_\w+)(?:\{([^}]*)\})?", expression):
            base = re.sub(r"_(bucket|sum|count)$", "", name)
            assert base in table, expression
            assert set(re.findall(r"(\w+)\s*=~?", inside)) <= table[base], expression
        for by in re.findall(r"by \(([^)]*)\)", expression):
            named = {table[re.sub(r"_(bucket|sum|count)$", "", n)] and n for n in re.findall(r"seqserve_\w+", expression)}
            for name in named:
                assert set(by.replace(" ", "").split(",")) <= table[re.sub(r"_(bucket|sum|count)$", "", name)], expression
    sources = documents(DEPLOY / "grafana/provisioning/datasources/prometheus.yml")[0]["datasources"]
    assert {p["datasource"]["uid"] for p in dashboard["panels"] if "datasource" in p} == {s["uid"] for s in sources}


def test_prometheus_scrapes_what_compose_runs() -> None:
    """Every name that Prometheus looks up is a service of compose."""
    config = documents(DEPLOY / "prometheus/prometheus.yml")[0]
    names = {name for job in config["scrape_configs"] for sd in job["dns_sd_configs"] for name in sd["names"]}
    assert names == {"server", "server-gpu", "replica", "balancer"}
    assert names <= set(SERVICES)


def test_balancer_configuration() -> None:
    """HAProxy takes its configuration, where there is one on this machine; its check asks for grpc.health.v1 and waits for SERVING;
    calls are hashed by the metadata that the client sends."""
    file = DEPLOY / "haproxy/haproxy.cfg"
    text = file.read_text(encoding="utf-8")
    sent = b"".join(bytes.fromhex(found) for found in re.findall(r"send-binary (\S+)", text))
    assert b"/grpc.health.v1.Health/Check" in sent
    assert sent.startswith(b"PRI * HTTP/2.0")
    assert "expect binary 00000000020801" in text
    assert f"balance hdr({METADATA})" in text
    if haproxy := shutil.which("haproxy"):
        environment = {**os.environ, "REPLICAS": "localhost", "BALANCER_PORT": "8010"}
        ran = subprocess.run([haproxy, "-c", "-f", str(file)], env=environment, capture_output=True, text=True, timeout=30)
        assert ran.returncode == 0, ran.stderr
    else:
        print("test_deploy.py: no haproxy on this machine, its configuration is not parsed", file=sys.__stderr__)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    library = tmp_path_factory.mktemp("models")
    models.library(library)
    with serve(library) as server:
        yield server


def test_health_command(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    """`seqserve health` says SERVING and ends with 0; with 2 for a service that is not there, with 1 for a server that is not."""
    here = f"localhost:{served.port}"
    assert seqserve(["health", "--server", here]) == 0
    assert capsys.readouterr().out == "SERVING\n"
    assert seqserve(["health", "--server", here, "--service", "no.such.Service"]) == 2
    assert seqserve(["health", "--server", "localhost:1", "--timeout", "0.2"]) == 1


def test_raw_health_check(served: Served) -> None:
    """The bytes of the balancer's check, sent as they are, are answered with the bytes it waits for."""
    text = (DEPLOY / "haproxy/haproxy.cfg").read_text(encoding="utf-8")
    sent = b"".join(bytes.fromhex(found) for found in re.findall(r"send-binary (\S+)", text))
    with socket.create_connection(("127.0.0.1", served.port), 10) as connection:
        connection.sendall(sent)
        got = b""
        while bytes.fromhex("00000000020801") not in got:
            part = connection.recv(4096)
            assert part, got
            got += part
