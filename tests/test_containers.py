"""Container files: what images install, the user that they run as, and the Kubernetes objects."""

import re
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

import linflab
from linflab.platform.cluster.ports import MLFLOW_PORT

ROOT = Path(__file__).parents[1]
CONTAINERS = ROOT / "containers"
RAY_SETTINGS = ("RAY_memory_monitor_refresh_ms", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO")
KUBERNETES = "1.31"  # oldest version whose schemas the dependency is required to have
# Fields of KubeRay's API v1 (ray-operator/apis/ray/v1/raycluster_types.go and rayjob_types.go): allowed, and required.
FIELDS: dict[str, tuple[set[str], set[str]]] = {
    "RayCluster": (
        {"headGroupSpec", "workerGroupSpecs", "rayVersion", "enableInTreeAutoscaling", "autoscalerOptions",
         "headServiceAnnotations", "suspend", "authOptions"},
        {"headGroupSpec"},
    ),
    "headGroupSpec": (
        {"serviceType", "headService", "enableIngress", "rayStartParams", "template"},
        {"rayStartParams", "template"},
    ),
    "workerGroupSpecs": (
        {"groupName", "replicas", "minReplicas", "maxReplicas", "numOfHosts", "rayStartParams", "template",
         "scaleStrategy"},
        {"groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"},
    ),
    "RayJob": (
        {"activeDeadlineSeconds", "backoffLimit", "rayClusterSpec", "submitterPodTemplate", "metadata",
         "clusterSelector", "submitterConfig", "managedBy", "deletionStrategy", "entrypoint", "runtimeEnvYAML", "jobId",
         "submissionMode", "entrypointResources", "entrypointNumCpus", "entrypointNumGpus", "ttlSecondsAfterFinished",
         "shutdownAfterJobFinishes", "suspend", "schedule"},
        {"entrypoint"},
    ),
}  # fmt: skip


def read_objects() -> list[dict[str, Any]]:
    files = [CONTAINERS / "kuberay.yaml", CONTAINERS / "rayjob.yaml"]
    return [one for file in files for one in yaml.safe_load_all(file.read_text())]


def find_object(kind: str, name: str = "") -> dict[str, Any]:
    (found,) = [one for one in read_objects() if one["kind"] == kind and name in ("", one["metadata"].get("name"))]
    return found


def check_fields(kind: str, spec: dict[str, Any]) -> None:
    allowed, required = FIELDS[kind]
    assert required <= spec.keys() <= allowed


def list_pod_templates() -> list[dict[str, Any]]:
    cluster, job = find_object("RayCluster")["spec"], find_object("RayJob")["spec"]
    workers = [group["template"] for group in cluster["workerGroupSpecs"]]
    deployment = find_object("Deployment")["spec"]["template"]
    return [cluster["headGroupSpec"]["template"], *workers, job["submitterPodTemplate"], deployment]


@pytest.mark.parametrize("one", read_objects(), ids=lambda one: f"{one['kind']}-{one['metadata'].get('name', '')}")
def test_kubernetes_objects_follow_their_schemas(one: dict[str, Any]) -> None:
    if one["apiVersion"] != "ray.io/v1":
        kubernetes_validate.validate(one, KUBERNETES, strict=True)
        return
    check_fields(one["kind"], one["spec"])
    if one["kind"] == "RayCluster":
        check_fields("headGroupSpec", one["spec"]["headGroupSpec"])
        for group in one["spec"]["workerGroupSpecs"]:
            check_fields("workerGroupSpecs", group)
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


@pytest.mark.parametrize("template", list_pod_templates(), ids=lambda one: one["spec"]["containers"][0]["name"])
def test_pods_follow_the_schema_and_run_without_root(template: dict[str, Any]) -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod", **template.get("metadata", {})}}
    kubernetes_validate.validate(pod | {"spec": template["spec"]}, KUBERNETES, strict=True)
    assert template["spec"]["securityContext"]["runAsNonRoot"] is True
    user = re.search(r"^USER (\d+)$", (CONTAINERS / "Dockerfile").read_text(), re.MULTILINE)
    assert user is not None and template["spec"]["securityContext"]["runAsUser"] == int(user[1]) > 0
    (container,) = template["spec"]["containers"]
    assert container["image"] == f"linflab:{linflab.__version__}"
    volumes = {volume["name"] for volume in template["spec"].get("volumes", [])}
    assert {mount["name"] for mount in container.get("volumeMounts", [])} == volumes


def test_nodes_share_storage_and_use_the_mlflow_service() -> None:
    service = find_object("Service")
    name, port = service["metadata"]["name"], service["spec"]["ports"][0]["port"]
    server = find_object("Deployment")["spec"]["template"]
    assert service["spec"]["selector"].items() <= server["metadata"]["labels"].items() and port == MLFLOW_PORT
    assert f"--port={port}" in server["spec"]["containers"][0]["command"]
    exported = (ROOT / "cluster.yaml").read_text().split()  # Kubernetes sets Ray up as cluster.yaml does
    claims = {one["metadata"]["name"]: one["spec"]["accessModes"] for one in read_objects() if "Claim" in one["kind"]}
    for template in list_pod_templates()[:2]:
        environment = {one["name"]: one["value"] for one in template["spec"]["containers"][0]["env"]}
        assert environment["LINFLAB_TRACKING_URI"] == f"http://{name}:{port}"
        mounts = {one["mountPath"]: one["name"] for one in template["spec"]["containers"][0]["volumeMounts"]}
        (work,) = [one for one in template["spec"]["volumes"] if one["name"] == mounts["/linflab"]]
        assert claims[work["persistentVolumeClaim"]["claimName"]] == ["ReadWriteMany"]
        assert all(environment[name].startswith("/linflab/") for name in ("LINFLAB_STORAGE", "LINFLAB_DATA"))
        assert {f"{name}={environment.get(name)}" for name in RAY_SETTINGS} <= set(exported)
    selector = find_object("RayJob")["spec"]["clusterSelector"]
    assert selector == {"ray.io/cluster": find_object("RayCluster")["metadata"]["name"]}


def test_ray_needs_a_token_and_policies_cover_all_servers() -> None:
    cluster = find_object("RayCluster")
    assert cluster["spec"]["authOptions"] == {"mode": "token"}
    # Authentication by token exists since Ray 2.52: docs.ray.io/en/latest/ray-security/token-auth.html
    assert [int(part) for part in cluster["spec"]["rayVersion"].split(".")] >= [2, 52, 0]
    policies = [one["spec"] for one in read_objects() if one["kind"] == "NetworkPolicy"]
    covered = [policy["podSelector"]["matchLabels"] for policy in policies]
    assert find_object("Deployment")["spec"]["template"]["metadata"]["labels"] in covered
    assert {"ray.io/cluster": cluster["metadata"]["name"]} in covered
    for policy in policies:
        assert policy["policyTypes"] == ["Ingress"] and all(rule["from"] for rule in policy["ingress"])


def test_documented_check_of_the_policies_tells_open_ports_from_closed_ones() -> None:
    text = (CONTAINERS / "README.md").read_text()
    (code,) = re.findall(r'-- python -c "\n(.*?)\n    "\n', text, re.DOTALL)
    names = {one["metadata"]["name"] for one in read_objects() if one["kind"] == "Service"}
    names.add(f"{find_object('RayCluster')['metadata']['name']}-head-svc")  # the service that KubeRay makes
    assert set(re.findall(r"\('(linflab[\w-]*)'", code)) == names
    with socket.create_server(("127.0.0.1", 0)) as server:
        targets = f"[('127.0.0.1', {server.getsockname()[1]}), ('127.0.0.1', 1)]"
        code = re.sub(r"\[\(.*\)\]", targets, textwrap.dedent(code))
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    lines = done.stdout.splitlines()
    assert len(lines) == 4 and lines[1] == "OPEN" and lines[3].startswith("closed"), done.stderr


def test_images_copy_existing_files_and_end_without_root() -> None:
    lines = (CONTAINERS / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    instructions = [line.split() for line in lines if line and not line.startswith("#")]
    assert instructions[0][:2] == ["ARG", "BASE=debian:bookworm-slim"] and instructions[1] == ["FROM", "${BASE}"]
    sources = [word for words in instructions if words[0] == "COPY" for word in words[1:-1]]
    assert sources == ["dist/*.whl", "containers/install.sh"] and (ROOT / sources[1]).stat().st_mode & 0o111
    users = [words[1] for words in instructions if words[0] == "USER"]
    assert users and users[-1] != "root" and users[-1] != "0"
    definition = (CONTAINERS / "linflab.def").read_text()
    assert {"%arguments", "%files", "%post", "%environment", "%runscript"} <= set(definition.splitlines())
    assert "containers/install.sh" in definition


def test_install_names_the_missing_wheel(tmp_path: Path) -> None:
    (tmp_path / "linflab-9-cp27-cp27-manylinux1_x86_64.whl").touch()
    done = subprocess.run(
        [str(CONTAINERS / "install.sh"), str(tmp_path), str(tmp_path / "environment")], capture_output=True, text=True
    )
    assert done.returncode == 1 and "make dist" in done.stderr and str(tmp_path) in done.stderr
    assert not (tmp_path / "environment").exists()
