"""`ray up cluster.yaml` against a mock of AWS's API, until the head node is launched.

Ray then connects to the mock's fictitious address by ssh. The mock and `ray up` therefore run in a network namespace
with only a loopback interface, which no connection can leave.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.platform.cluster.hosts import ROOT, find_missing_requirements

pytestmark = pytest.mark.integration

FILES = ("cluster.yaml", "cluster.local.yaml")

# Runs in the namespace: starts the mock and `ray up`, which waits for ssh in vain, and saves what the mock created.
SCRIPT = """
import json, os, subprocess, sys, time, urllib.request
import boto3
folder, ray, moto = sys.argv[1:]
server = subprocess.Popen([moto, "-H", "127.0.0.1", "-p", "5577"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
for attempt in range(300):
    try:
        urllib.request.urlopen("http://127.0.0.1:5577/moto-api/data.json").close()
        break
    except OSError:
        time.sleep(0.1)
def list_instances():
    reservations = ec2.describe_instances()["Reservations"]
    return [instance for reservation in reservations for instance in reservation["Instances"]]
ec2 = boto3.client("ec2")
up = subprocess.Popen([ray, "up", "-y", "--no-config-cache", f"{folder}/cluster.yaml"], stdin=subprocess.DEVNULL,
                      stdout=open(f"{folder}/up.log", "w"), stderr=subprocess.STDOUT)
for attempt in range(600):
    if list_instances() or up.poll() is not None:
        break
    time.sleep(0.2)
time.sleep(2)
up.kill()
groups = [group["GroupId"] for group in list_instances()[0]["SecurityGroups"]] if list_instances() else []
profiles = boto3.client("iam").list_instance_profiles()["InstanceProfiles"]
found = {
    "instances": list_instances(),
    "groups": ec2.describe_security_groups(GroupIds=groups)["SecurityGroups"] if groups else [],
    "profiles": profiles,
    "policies": [
        policy["PolicyArn"] for profile in profiles for role in profile["Roles"]
        for policy in boto3.client("iam").list_attached_role_policies(RoleName=role["RoleName"])["AttachedPolicies"]
    ],
}
# Launch a worker as the autoscaler on the head does.
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.commands import _bootstrap_config
from ray.autoscaler._private.util import prepare_config
import yaml
config = _bootstrap_config(prepare_config(yaml.safe_load(open(f"{folder}/cluster.yaml"))), no_config_cache=True)
found["resources"] = config["available_node_types"]["gpu"]["resources"]
found["max_workers"] = config["available_node_types"]["gpu"]["max_workers"]
provider = AWSNodeProvider(config["provider"], config["cluster_name"])
before = {instance["InstanceId"] for instance in list_instances()}
tags = {"ray-node-type": "worker", "ray-launch-config": "gpu"}
provider.create_node(config["available_node_types"]["gpu"]["node_config"], tags, 1)
found["worker"] = [instance for instance in list_instances() if instance["InstanceId"] not in before]
json.dump(found, open(f"{folder}/found.json", "w"), default=str)
server.kill()
"""


@pytest.mark.parametrize("name", FILES)
def test_cluster_files_pass_the_validation_of_ray(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = yaml.safe_load((ROOT / name).read_text())
    validate_config(prepare_config(config))
    for local in list(config["file_mounts"].values())[1:]:  # the first is the user's token
        assert (ROOT / local).exists(), local


def test_cluster_files_send_the_same_files() -> None:
    aws, local = (yaml.safe_load((ROOT / name).read_text()) for name in FILES)
    assert aws["file_mounts"] == local["file_mounts"] and aws["rsync_exclude"] == local["rsync_exclude"]


@pytest.mark.slow
def test_files_on_nodes_contain_the_whole_package(tmp_path: Path) -> None:
    """`make install` on a node, without the dependencies and the kernels, which take minutes."""
    source, wheels = tmp_path / "linflab", tmp_path / "wheels"
    for remote, local in yaml.safe_load((ROOT / "cluster.yaml").read_text())["file_mounts"].items():
        if remote.startswith("~/linflab/"):
            target = source / remote.removeprefix("~/linflab/")
            target.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / local).is_dir():
                shutil.copytree(ROOT / local, target, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
            else:
                shutil.copy(ROOT / local, target)
    result = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(wheels), str(source)],
        env={**os.environ, "CC": "false", "CXX": "false"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = wheels.iterdir()
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    expected = {
        f"{name.replace('.', '/')}/{path.relative_to(ROOT / folder)}"
        for name, folder in packages.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".yaml")
    }
    assert expected <= set(zipfile.ZipFile(wheel).namelist())


def test_settings_to_edit_are_at_the_top_of_cluster_files() -> None:
    """The part below the marker contains no address, identity, size or price."""
    for name in FILES:
        _, rest = (ROOT / name).read_text().split("# ---- ... to here.")
        assert not re.search(r"\d+\.\d+\.\d+\.\d+|ami-|us-west|InstanceType|VolumeSize|ssh_private_key", rest)


@pytest.fixture(scope="module")
def aws_state(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if find_missing_requirements():
        pytest.skip(find_missing_requirements())
    folder = tmp_path_factory.mktemp("aws")
    (folder / ".ray").mkdir()
    (folder / ".ray" / "auth_token").write_text("0" * 64)
    (folder / "cluster.yaml").write_text((ROOT / "cluster.yaml").read_text())
    bin_folder = Path(sys.executable).parent
    base_env = {name: value for name, value in os.environ.items() if not name.startswith(("AWS", "RAY", "LINFLAB"))}
    region = yaml.safe_load((ROOT / "cluster.yaml").read_text())["provider"]["region"]
    result = subprocess.run(
        ["unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "sh",
         sys.executable, "-c", SCRIPT, str(folder), str(bin_folder / "ray"), str(bin_folder / "moto_server")],
        env={**base_env, "HOME": str(folder), "AWS_ENDPOINT_URL": "http://127.0.0.1:5577", "AWS_DEFAULT_REGION": region,
             "AWS_ACCESS_KEY_ID": "mock", "AWS_SECRET_ACCESS_KEY": "mock", "MOTO_IAM_LOAD_MANAGED_POLICIES": "true",
             "AWS_EC2_METADATA_DISABLED": "true"},
        cwd=ROOT, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    log = folder / "up.log"
    assert (folder / "found.json").exists(), result.stdout + result.stderr + (log.read_text() if log.exists() else "")
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    assert found["instances"], log.read_text()
    return found


cluster = pytest.mark.cluster


@cluster
def test_head_is_small_on_demand_and_can_launch_nodes(aws_state: dict[str, Any]) -> None:
    (head,) = aws_state["instances"]
    tags = {tag["Key"]: tag["Value"] for tag in head["Tags"]}
    assert tags["ray-node-type"] == "head" and tags["ray-cluster-name"] == "linflab"
    assert tags["ray-user-node-type"] == "head" and tags["ray-launch-config"]
    assert head["InstanceType"] == "m6i.large" and head.get("InstanceLifecycle") != "spot"
    assert head["IamInstanceProfile"]["Arn"].endswith("ray-autoscaler-v1")
    assert any(policy.endswith("/AmazonEC2FullAccess") for policy in aws_state["policies"])


@cluster
def test_only_ssh_is_open_to_the_internet(aws_state: dict[str, Any]) -> None:
    (group,) = aws_state["groups"]
    public = [rule for rule in group["IpPermissions"] if rule.get("IpRanges") or rule.get("Ipv6Ranges")]
    assert [(rule["IpProtocol"], rule["FromPort"], rule["ToPort"]) for rule in public] == [("tcp", 22, 22)]
    internal = [rule for rule in group["IpPermissions"] if rule not in public]
    members = [pair["GroupId"] for rule in internal for pair in rule["UserIdGroupPairs"]]
    assert members == [group["GroupId"]]  # only the cluster's own nodes


@cluster
def test_workers_are_spot_nodes_with_a_gpu(aws_state: dict[str, Any]) -> None:
    (worker,) = aws_state["worker"]
    assert worker["InstanceType"] == "g5.2xlarge" and worker["InstanceLifecycle"] == "spot"
    assert [group["GroupId"] for group in worker["SecurityGroups"]] == [aws_state["groups"][0]["GroupId"]]
    assert "IamInstanceProfile" not in worker
    assert aws_state["resources"]["GPU"] == 1 and aws_state["resources"]["CPU"] == 8 and aws_state["max_workers"] == 4
