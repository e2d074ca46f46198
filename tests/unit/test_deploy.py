"""What is deployed is valid, and fits the service: names, ports, probes, settings, users, times.

The validators are those of the formats (wheels of check-jsonschema, hadolint, kubernetes-validate),
all offline. `tests/e2e/test_compose.py` runs what the compose file says.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from app.cli.main import app as cli
from app.main import create_app
from app.settings import Role, Settings
from docs.generate import ROOT, variable_of

DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
KUSTOMIZATION = KUBERNETES / "kustomization.yaml"
MANIFESTS = sorted(KUBERNETES.glob("*.yaml"))
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
BIN = Path(sys.executable).parent
SETTINGS = {variable_of(name, field) for name, field in Settings.model_fields.items()}
ONE_SHOT = {"migrate"}
AFTER_DRAIN_S = 10
"""What a process needs besides its grace: open streams get 5 s, the rest is giving runs back."""


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    """The compose file with its anchors resolved."""
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))
    return loaded


def objects(*paths: Path) -> Iterator[dict[str, Any]]:
    for path in paths or MANIFESTS:
        if path != KUSTOMIZATION:
            yield from yaml.safe_load_all(path.read_text("utf-8"))


def of_kind(kind: str) -> list[dict[str, Any]]:
    return [found for found in objects() if found["kind"] == kind]


def pod_of(workload: dict[str, Any]) -> dict[str, Any]:
    pod: dict[str, Any] = workload["spec"]["template"]
    return pod


def ours(compose: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The services that run this repository."""
    return {n: found for n, found in compose["services"].items() if "build" in found}


def routes(role: Role) -> set[str]:
    return set(create_app(Settings.model_construct(), "", role).openapi()["paths"])


def parsed(command: list[str]) -> dict[str, Any]:
    """The parameters of a `flexrun …` command line; fails when it does not parse."""
    assert command[0] == "flexrun"
    group: Any = typer.main.get_command(cli)
    context = group.context_class(group)
    found = group.get_command(context, command[1])
    assert found is not None, command
    return dict(found.make_context(command[1], command[2:], parent=context).params)


def asked(healthcheck: list[str]) -> tuple[int, str]:
    """Port and path that one of our health checks asks."""
    found = re.search(r"'127\.0\.0\.1', (\d+).*'GET', '(/\w+)'", " ".join(healthcheck))
    assert found is not None, healthcheck
    return int(found[1]), found[2]


def validated(tool: str, *arguments: str | Path) -> None:
    done = subprocess.run([BIN / tool, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def seconds(text: str) -> int:
    found = re.fullmatch(r"(\d+)s", text)
    assert found is not None, text
    return int(found[1])


# --- the image ------------------------------------------------------------------------------------


def test_the_dockerfile_is_clean() -> None:
    validated("hadolint", ROOT / "Dockerfile")


def test_what_is_copied_exists_and_is_let_through() -> None:
    sources = [
        source
        for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE)
        for source in line.split()[:-1]
    ]
    ignore = (ROOT / ".dockerignore").read_text("utf-8").split("\n")
    assert "*" in ignore  # nothing but what is named below
    assert {line[1:] for line in ignore if line.startswith("!")} == set(sources)
    assert all((ROOT / source).exists() for source in sources)


def test_the_image_runs_as_a_fixed_user_without_pip_or_a_data_folder() -> None:
    build, _, last = DOCKERFILE.rpartition("\nFROM ")
    assert "--only-binary=:all: --require-hashes" in build
    assert re.findall(r"^USER (.+)$", last, re.MULTILINE) == ["10001:10001"]
    assert "pip uninstall" in last
    assert "pip install" not in last
    assert "VOLUME" not in last
    assert re.findall(r"^STOPSIGNAL (.+)$", last, re.MULTILINE) == ["SIGTERM"]
    command = re.findall(r"^CMD (.+)$", last, re.MULTILINE)
    assert [json.loads(found) for found in command] == [["flexrun", "api"]]
    named = set(re.findall(r"\b(FLEXRUN_\w+|DATABASE_URL)=", last))
    assert named <= SETTINGS


def test_the_images_own_health_check_asks_the_default_port_of_the_api() -> None:
    (check,) = re.findall(r"^HEALTHCHECK .+\n +CMD (\[.+\])$", DOCKERFILE, re.MULTILINE)
    port, path = asked(json.loads(check))
    assert port == Settings.model_fields["port"].default
    assert path in routes("api")
    exposed = re.findall(r"^EXPOSE (.+)$", DOCKERFILE, re.MULTILINE)[0].split()
    defaults = [Settings.model_fields[name].default for name in ("port", "worker_port")]
    assert exposed == [str(port) for port in defaults]


# --- compose --------------------------------------------------------------------------------------


def test_the_compose_file_is_valid() -> None:
    schema = ("--builtin-schema", "vendor.compose-spec")
    validated("check-jsonschema", *schema, ROOT / "docker-compose.yml")


def test_it_holds_the_services_that_are_promised(compose: dict[str, Any]) -> None:
    services = compose["services"]
    standard = {name for name, found in services.items() if "profiles" not in found}
    assert standard == {"postgres", "redis", "migrate", "api", "worker-1", "worker-2"}
    assert {n: f["profiles"] for n, f in services.items() if "profiles" in f} == {
        "models": ["models"]
    }
    assert services["worker-1"] == services["worker-2"]


def test_every_service_is_watched_bounded_and_restarted(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        is_one_shot = name in ONE_SHOT
        assert service["restart"] == ("no" if is_one_shot else "unless-stopped")
        assert service["healthcheck"].get("disable", False) is is_one_shot
        assert {"cpus", "memory"} <= set(service["deploy"]["resources"]["limits"])
        assert not service["image"].endswith(":latest")
        for published in service.get("ports", ()):
            assert published.startswith("127.0.0.1:"), name


def test_services_wait_for_what_they_need(compose: dict[str, Any]) -> None:
    services = compose["services"]
    for name, service in services.items():
        for needed, how in service.get("depends_on", {}).items():
            expected = "completed_successfully" if needed in ONE_SHOT else "healthy"
            assert how == {"condition": f"service_{expected}"}, (name, needed)
    for name in ("api", "worker-1", "worker-2"):
        assert set(services[name]["depends_on"]) == {"postgres", "redis", "migrate"}


def test_our_commands_parse_and_health_checks_ask_their_ports(compose: dict[str, Any]) -> None:
    for name, service in ours(compose).items():
        command = service["command"]
        parameters = parsed(command)
        if name in ONE_SHOT:
            continue
        role: Role = command[1]
        port, path = asked(service["healthcheck"]["test"])
        assert (parameters["host"], parameters["port"]) == ("0.0.0.0", port)
        assert path in routes(role)
    assert compose["services"]["api"]["ports"][0].endswith(":8000")


def test_settings_in_the_compose_file_exist(compose: dict[str, Any]) -> None:
    for service in ours(compose).values():
        assert set(service["environment"]) <= SETTINGS
    text = (ROOT / "docker-compose.yml").read_text("utf-8")
    asked_for = set(re.findall(r"\$\{(\w+)", text))
    assert {name for name in asked_for if name.startswith("FLEXRUN_")} <= SETTINGS
    assert not re.findall(r"\$\{\w+\}", text), "a variable without a default"


def test_addresses_in_the_compose_file_are_services(compose: dict[str, Any]) -> None:
    services = compose["services"]
    for service in ours(compose).values():
        for name in ("DATABASE_URL", "REDIS_URL"):
            host = re.search(r"(?:@|//)([\w-]+):\d+/", service["environment"][name])
            assert host is not None
            assert host[1] in services
            shared = set(services[host[1]]["networks"]) & set(service["networks"])
            assert shared, "no network in common"


def test_there_is_time_to_drain(compose: dict[str, Any]) -> None:
    for name, service in ours(compose).items():
        grace = re.search(r":-(\d+)", service["environment"]["FLEXRUN_DRAIN_GRACE_S"])
        assert grace is not None
        assert int(grace[1]) == Settings.model_fields["drain_grace_s"].default
        assert seconds(service["stop_grace_period"]) >= int(grace[1]) + AFTER_DRAIN_S, name


def test_redis_refuses_rather_than_forgets(compose: dict[str, Any]) -> None:
    command = shlex.join(compose["services"]["redis"]["command"])
    assert "--maxmemory-policy noeviction" in command
    assert "--save '' --appendonly no" in command


# --- Kubernetes -----------------------------------------------------------------------------------


def test_manifests_are_valid() -> None:
    validated("kubernetes-validate", "--strict", *(p for p in MANIFESTS if p != KUSTOMIZATION))


def test_the_guide_names_the_kubernetes_that_a_sleep_before_the_stop_needs() -> None:
    hooks = [c.get("lifecycle") for w in workloads() for c in pod_of(w)["spec"]["containers"]]
    assert {"preStop": {"sleep": {"seconds": 5}}} in hooks
    guide = (ROOT / "docs" / "DEPLOYMENT.md").read_text("utf-8")
    assert "Kubernetes 1.30 or\nnewer" in guide


def test_the_kustomization_takes_every_manifest_but_the_example() -> None:
    found = yaml.safe_load(KUSTOMIZATION.read_text("utf-8"))
    manifests = {path.name for path in MANIFESTS}
    assert set(found["resources"]) == manifests - {"kustomization.yaml", "secret.example.yaml"}
    images = {c["image"] for w in workloads() for c in pod_of(w)["spec"]["containers"]}
    assert images == {image["name"] for image in found["images"]}
    (namespace,) = of_kind("Namespace")
    assert found["namespace"] == namespace["metadata"]["name"]


def workloads() -> list[dict[str, Any]]:
    return [*of_kind("Deployment"), *of_kind("Job")]


def test_pods_run_without_rights_as_the_user_of_the_image() -> None:
    user = re.findall(r"^USER (\d+):(\d+)$", DOCKERFILE, re.MULTILINE)[0]
    assert {w["metadata"]["name"] for w in workloads()} == {
        "flexrun-api",
        "flexrun-worker",
        "flexrun-migrate",
    }
    for workload in workloads():
        pod = pod_of(workload)["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == int(user[0])
        assert pod["securityContext"]["runAsGroup"] == int(user[1])
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False  # they would be read as settings
        (container,) = pod["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert "memory" in container["resources"]["limits"]


def test_probes_ask_what_the_process_answers() -> None:
    for workload in of_kind("Deployment"):
        (container,) = pod_of(workload)["spec"]["containers"]
        role: Role = container["command"][1]
        port = container["ports"][0]["containerPort"]
        assert parsed(container["command"])["port"] == port
        paths = {
            probe: container[f"{probe}Probe"]["httpGet"]
            for probe in ("startup", "liveness", "readiness")
        }
        assert {probe: found["path"] for probe, found in paths.items()} == {
            "startup": "/startupz",
            "liveness": "/livez",
            "readiness": "/readyz",
        }
        annotations = pod_of(workload)["metadata"]["annotations"]
        assert annotations["prometheus.io/port"] == str(port)
        answered = {*(found["path"] for found in paths.values())}
        assert {*answered, annotations["prometheus.io/path"]} <= routes(role)
    (job,) = of_kind("Job")
    parsed(pod_of(job)["spec"]["containers"][0]["command"])


def test_selectors_find_pods() -> None:
    labels = [pod_of(workload)["metadata"]["labels"] for workload in workloads()]

    def finds(selector: dict[str, str]) -> bool:
        return any(selector.items() <= found.items() for found in labels)

    for workload in of_kind("Deployment"):
        selector = workload["spec"]["selector"]["matchLabels"]
        assert selector == pod_of(workload)["metadata"]["labels"]
    selectors = [found["spec"]["selector"] for found in of_kind("Service")]
    selectors += [f["spec"]["selector"]["matchLabels"] for f in of_kind("PodDisruptionBudget")]
    policies = [found["spec"]["podSelector"] for found in of_kind("NetworkPolicy")]
    assert {} in policies  # everything that is not named is closed
    selectors += [found["matchLabels"] for found in policies if found]
    assert len(selectors) == 1 + 2 + 4
    assert all(finds(selector) for selector in selectors)


def test_settings_in_the_manifests_exist_and_leave_time_to_drain() -> None:
    (config,), (secret,) = of_kind("ConfigMap"), of_kind("Secret")
    assert set(config["data"]) | set(secret["stringData"]) <= SETTINGS
    assert all("CHANGE-ME" in value for value in secret["stringData"].values())
    grace = int(config["data"]["FLEXRUN_DRAIN_GRACE_S"])
    for workload in of_kind("Deployment"):
        pod = pod_of(workload)["spec"]
        hook = pod["containers"][0].get("lifecycle", {}).get("preStop", {}).get("sleep", {})
        needed = grace + AFTER_DRAIN_S + hook.get("seconds", 0)
        assert pod["terminationGracePeriodSeconds"] >= needed
        assert {next(iter(source)) for source in pod["containers"][0]["envFrom"]} == {
            "configMapRef",
            "secretRef",
        }


def test_the_autoscaler_moves_the_workers() -> None:
    (scaler,) = of_kind("HorizontalPodAutoscaler")
    target = scaler["spec"]["scaleTargetRef"]
    (found,) = [w for w in of_kind("Deployment") if w["metadata"]["name"] == target["name"]]
    assert "replicas" not in found["spec"]  # two owners of one number would fight
    metric = scaler["spec"]["metrics"][0]["external"]["metric"]["name"]
    guide = (ROOT / "docs" / "DEPLOYMENT.md").read_text("utf-8")
    assert f"name: {{as: {metric}}}" in guide
