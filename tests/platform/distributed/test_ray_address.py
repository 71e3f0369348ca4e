"""RAY_ADDRESS without a running cluster is rejected within seconds, before Ray uses it."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent import futures

import grpc
import pytest

from linflab.platform.config.overrides import load_config
from linflab.platform.distributed.address import check_address, configured_address, needs_ray
from linflab.platform.distributed.train import start_ray
from linflab.platform.errors import InputError
from tests.conftest import RECIPE, RunCli, assert_rejected

pytestmark = pytest.mark.integration


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that accepts connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.fixture
def other_service_port() -> Iterator[int]:
    """The port of a gRPC server that is not a Ray cluster."""
    server = grpc.server(futures.ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield port
    server.stop(None)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1:1", "localhost:1", "ray://127.0.0.1:10001", "http://127.0.0.1:8265", "garbage", "127.0.0.1",
        "127.0.0.1:", "127.0.0.1:0", "127.0.0.1:99999", ":6379", "no.such.host.invalid:6379", "a b:1", "auto:auto",
    ],
)  # fmt: skip
def test_address_without_cluster_is_rejected(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    start = time.monotonic()
    with pytest.raises(InputError) as caught:
        start_ray()
    assert_rejected(caught, f"RAY_ADDRESS={address}")
    assert time.monotonic() - start < 20


def test_port_of_another_service_is_rejected(silent_port: int, other_service_port: int) -> None:
    for port in (silent_port, other_service_port):
        start = time.monotonic()
        with pytest.raises(InputError, match=f"RAY_ADDRESS=127.0.0.1:{port}"):
            check_address(f"127.0.0.1:{port}")
        assert time.monotonic() - start < 20


@pytest.mark.parametrize("address", ["", "local", None])
def test_one_worker_without_address_needs_no_ray(monkeypatch: pytest.MonkeyPatch, address: str | None) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    assert configured_address() is None and not needs_ray(load_config(RECIPE, []))
    assert needs_ray(load_config(RECIPE, ["compute.workers=2"]))


@pytest.mark.parametrize("workers", [1, 2])
def test_train_rejects_address_without_cluster(run_cli: RunCli, tmp_path, workers: int) -> None:
    done = run_cli("train", RECIPE, f"compute.workers={workers}", "--storage", str(tmp_path), RAY_ADDRESS="127.0.0.1:1")
    assert_rejected(done, "RAY_ADDRESS=127.0.0.1:1")


@pytest.mark.slow
def test_local_ray_has_cpus_of_slurm_job_and_namespace_of_user() -> None:
    code = "import ray; from linflab.platform.distributed.train import start_ray; start_ray()\n"
    code += "print(ray.get_runtime_context().namespace, ray.cluster_resources()['CPU'])"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY", "SLURM"))}
    environment |= {"SLURM_JOB_ID": "7", "SLURM_CPUS_ON_NODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-2:] == [f"linflab-{os.getuid()}", "1.0"]
