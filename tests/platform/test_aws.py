"""`ray up cluster.yaml` against a mock of AWS's API, as far as to the head that has been launched.

Ray would then go to the mock's invented address by ssh. So mock and `ray up` run in a network namespace that has the
loopback and nothing else: no connection can leave it.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.platform.hosts import ROOT, missing

FILES = ("cluster.yaml", "cluster.local.yaml")

# runs in the namespace: the mock, `ray up` until it waits for ssh in vain, and what the mock has then
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
def there():
    reservations = ec2.describe_instances()["Reservations"]
    return [instance for reservation in reservations for instance in reservation["Instances"]]
ec2 = boto3.client("ec2")
up = subprocess.Popen([ray, "up", "-y", "--no-config-cache", f"{folder}/cluster.yaml"], stdin=subprocess.DEVNULL,
                      stdout=open(f"{folder}/up.log", "w"), stderr=subprocess.STDOUT)
for attempt in range(600):
    if there() or up.poll() is not None:
        break
    time.sleep(0.2)
time.sleep(2)
up.kill()
groups = [group["GroupId"] for group in there()[0]["SecurityGroups"]] if there() else []
profiles = boto3.client("iam").list_instance_profiles()["InstanceProfiles"]
found = {
    "instances": there(),
    "groups": ec2.describe_security_groups(GroupIds=groups)["SecurityGroups"] if groups else [],
    "profiles": profiles,
    "policies": [
        policy["PolicyArn"] for profile in profiles for role in profile["Roles"]
        for policy in boto3.client("iam").list_attached_role_policies(RoleName=role["RoleName"])["AttachedPolicies"]
    ],
}
# and a worker, as the autoscaler on the head would launch one
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.commands import _bootstrap_config
from ray.autoscaler._private.util import prepare_config
import yaml
config = _bootstrap_config(prepare_config(yaml.safe_load(open(f"{folder}/cluster.yaml"))), no_config_cache=True)
found["resources"] = config["available_node_types"]["gpu"]["resources"]
found["max_workers"] = config["available_node_types"]["gpu"]["max_workers"]
provider = AWSNodeProvider(config["provider"], config["cluster_name"])
before = {instance["InstanceId"] for instance in there()}
tags = {"ray-node-type": "worker", "ray-launch-config": "gpu"}
provider.create_node(config["available_node_types"]["gpu"]["node_config"], tags, 1)
found["worker"] = [instance for instance in there() if instance["InstanceId"] not in before]
json.dump(found, open(f"{folder}/found.json", "w"), default=str)
server.kill()
"""


@pytest.mark.parametrize("name", FILES)
def test_cluster_files_pass_rays_own_validation(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = yaml.safe_load((ROOT / name).read_text())
    validate_config(prepare_config(config))
    for local in list(config["file_mounts"].values())[1:]:  # the first is the user's token
        assert (ROOT / local).exists(), local


def test_both_files_install_the_same() -> None:
    aws, own = (yaml.safe_load((ROOT / name).read_text()) for name in FILES)
    assert aws["file_mounts"] == own["file_mounts"] and aws["rsync_exclude"] == own["rsync_exclude"]


def test_all_that_must_be_edited_is_at_the_top() -> None:
    """After the edited part there is no address, no identity, no size and no price."""
    for name in FILES:
        _, rest = (ROOT / name).read_text().split("# ---- ... to here.")
        assert not re.search(r"\d+\.\d+\.\d+\.\d+|ami-|us-west|InstanceType|VolumeSize|ssh_private_key", rest)


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if missing():
        pytest.skip(missing())
    folder = tmp_path_factory.mktemp("aws")
    (folder / ".ray").mkdir()
    (folder / ".ray" / "auth_token").write_text("0" * 64)
    (folder / "cluster.yaml").write_text((ROOT / "cluster.yaml").read_text())
    bin_folder = Path(sys.executable).parent
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS", "RAY", "LINFLAB"))}
    region = yaml.safe_load((ROOT / "cluster.yaml").read_text())["provider"]["region"]
    done = subprocess.run(
        ["unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "sh",
         sys.executable, "-c", SCRIPT, str(folder), str(bin_folder / "ray"), str(bin_folder / "moto_server")],
        env={**kept, "HOME": str(folder), "AWS_ENDPOINT_URL": "http://127.0.0.1:5577", "AWS_DEFAULT_REGION": region,
             "AWS_ACCESS_KEY_ID": "mock", "AWS_SECRET_ACCESS_KEY": "mock", "MOTO_IAM_LOAD_MANAGED_POLICIES": "true",
             "AWS_EC2_METADATA_DISABLED": "true"},
        cwd=ROOT, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    log = folder / "up.log"
    assert (folder / "found.json").exists(), done.stdout + done.stderr + (log.read_text() if log.exists() else "")
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    assert found["instances"], log.read_text()
    return found


cluster = pytest.mark.cluster


@cluster
def test_the_head_is_small_on_demand_and_may_start_machines(launched: dict[str, Any]) -> None:
    (head,) = launched["instances"]
    tags = {tag["Key"]: tag["Value"] for tag in head["Tags"]}
    assert tags["ray-node-type"] == "head" and tags["ray-cluster-name"] == "linflab"
    assert tags["ray-user-node-type"] == "head" and tags["ray-launch-config"]
    assert head["InstanceType"] == "m6i.large" and head.get("InstanceLifecycle") != "spot"
    assert head["IamInstanceProfile"]["Arn"].endswith("ray-autoscaler-v1")
    assert any(policy.endswith("/AmazonEC2FullAccess") for policy in launched["policies"])


@cluster
def test_only_ssh_is_open_to_the_world(launched: dict[str, Any]) -> None:
    (group,) = launched["groups"]
    world = [rule for rule in group["IpPermissions"] if rule.get("IpRanges") or rule.get("Ipv6Ranges")]
    assert [(rule["IpProtocol"], rule["FromPort"], rule["ToPort"]) for rule in world] == [("tcp", 22, 22)]
    inner = [rule for rule in group["IpPermissions"] if rule not in world]
    members = [pair["GroupId"] for rule in inner for pair in rule["UserIdGroupPairs"]]
    assert members == [group["GroupId"]]  # the cluster's machines, and nobody else


@cluster
def test_workers_are_spot_machines_with_a_gpu_and_none_at_first(launched: dict[str, Any]) -> None:
    (worker,) = launched["worker"]
    assert worker["InstanceType"] == "g5.2xlarge" and worker["InstanceLifecycle"] == "spot"
    assert [group["GroupId"] for group in worker["SecurityGroups"]] == [launched["groups"][0]["GroupId"]]
    assert "IamInstanceProfile" not in worker
    assert launched["resources"]["GPU"] == 1 and launched["resources"]["CPU"] == 8 and launched["max_workers"] == 4
