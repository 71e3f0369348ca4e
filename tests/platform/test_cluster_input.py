"""What users can get wrong about clusters and record servers: one clear error, at once. What a cluster can become."""

import json
from pathlib import Path

import pytest
import ray

from linflab.platform import node
from linflab.platform.config import load_experiment
from linflab.platform.errors import SettingError
from linflab.platform.node import close_ports
from linflab.platform.storage import Storage
from linflab.platform.workers import at_once, machines, start_ray, worker_resources
from tests.conftest import RECIPE, Here

FILE = """
cluster_name: nobody
provider: {type: local, head_ip: 127.0.0.1, worker_ips: []}
auth: {ssh_user: nobody, ssh_private_key: /nowhere/key, ssh_proxy_command: "false"}
"""


@pytest.fixture
def laptop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder and home, with nothing in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("LINFLAB_CLUSTER", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.mark.parametrize("command", [["sweeps"], ["ui"], ["report", "sweep", "one"], ["train", RECIPE]])
def test_no_file(laptop: Path, here: Here, command: list[str]) -> None:
    done = here(*command, "--cluster")
    assert done.returncode == 2 and f"cluster={laptop / 'cluster.yaml'}: can't be read" in done.stderr
    assert "name the cluster's file in LINFLAB_CLUSTER" in done.stderr


def test_no_file_of_a_cluster(laptop: Path, here: Here) -> None:
    (laptop / "recipe.yaml").write_text("model: {}\n")
    done = here("sweeps", "--cluster", LINFLAB_CLUSTER="recipe.yaml")
    assert done.returncode == 2 and "is no file for `ray up` (it has no provider)" in done.stderr


def test_no_token(laptop: Path, here: Here) -> None:
    (laptop / "cluster.yaml").write_text(FILE)
    done = here("train", RECIPE, "--cluster")
    assert done.returncode == 2 and "there is no token in" in done.stderr
    assert "`ray get-auth-token --generate` makes one" in done.stderr


def test_no_head_there(laptop: Path, here: Here) -> None:
    (laptop / "cluster.yaml").write_text(FILE)
    done = here("sweeps", "--cluster")
    assert done.returncode == 2 and "its head can't be reached by ssh" in done.stderr


def test_what_is_wrong_with_a_sweep_is_said_before_the_cluster_is_asked(laptop: Path, here: Here) -> None:
    done = here("sweep", RECIPE, "demo", "model.widht=3", "--cluster")
    assert done.returncode == 2 and "model.widht" in done.stderr and "cluster" not in done.stderr
    done = here("train", RECIPE, "--dry-run", "--cluster")
    assert done.returncode == 2 and "dry-run" in done.stderr


@pytest.mark.parametrize(
    ("server", "complaint"),
    [
        ("sqlite:///mlflow.db", "must be an MLflow server's URI"),
        ("http://127.0.0.1:1", "no MLflow server answers there"),
    ],
)
def test_no_server(laptop: Path, here: Here, server: str, complaint: str) -> None:
    done = here("sweeps", LINFLAB_MLFLOW=server)
    assert done.returncode == 2 and f"LINFLAB_MLFLOW={server}: {complaint}" in done.stderr


def test_no_machine_of_a_cluster(laptop: Path) -> None:
    with pytest.raises(SettingError, match=r"close-ports: neither .* is here, which say what machines there are"):
        close_ports(Storage.open(laptop))


def test_a_cluster_counts_for_what_it_can_become(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where machines start when there is something to do, there may be none yet."""
    kinds = {
        "head": {"resources": {"CPU": 0}, "max_workers": 0},
        "gpu": {"resources": {"CPU": 800, "GPU": 4}, "max_workers": 5},
    }
    description = {"available_node_types": kinds, "head_node_type": "head", "max_workers": 3}
    # not by another home: Ray keeps the token of a process there
    monkeypatch.setattr(node, "BOOTSTRAP", tmp_path / "ray_bootstrap_config.yaml")
    node.BOOTSTRAP.write_text(json.dumps(description))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    start_ray()
    try:
        (here,) = machines()
        assert "GPU" not in here or here["GPU"] < 4  # a local Ray has nothing to do with it
        monkeypatch.setenv("RAY_ADDRESS", "as on a head")
        assert machines() == 3 * [kinds["gpu"]["resources"]]
        experiment = load_experiment(RECIPE, ["compute.cpus_per_worker=100", "compute.gpus_per_worker=0.5"])
        resources = worker_resources(experiment)
        assert resources == {"CPU": 100, "GPU": 0.5} and at_once(1, resources) == 24
        assert at_once(2, {"CPU": 500, "GPU": 1}) == 1  # one on each machine, two of three make a training
        with pytest.raises(SettingError, match=r"compute.workers=4 of 500 CPU and 1 GPU: .* have room for 3"):
            worker_resources(load_experiment(RECIPE, ["compute.workers=4", "compute.cpus_per_worker=500"]))
    finally:
        ray.shutdown()
