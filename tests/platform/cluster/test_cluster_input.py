"""Wrong input for clusters and tracking servers is rejected at once; resources of clusters that can grow."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import ray

from linflab.platform import signals
from linflab.platform.cluster import node
from linflab.platform.cluster.head import is_job_of
from linflab.platform.cluster.node import restrict_ports
from linflab.platform.cluster.ports import find_free_port
from linflab.platform.config.overrides import load_config
from linflab.platform.distributed.train import max_concurrent_trials, node_resources, start_ray, worker_resources
from linflab.platform.errors import InputError
from linflab.platform.tracking.storage import Storage
from tests.conftest import RECIPE, RunCli, assert_rejected, time_limit

pytestmark = pytest.mark.integration

FILE = """
cluster_name: nobody
provider: {type: local, head_ip: 127.0.0.1, worker_ips: []}
auth: {ssh_user: nobody, ssh_private_key: /nowhere/key, ssh_proxy_command: "false"}
"""

# Replaces ssh: runs until it is killed, and serves a head that accepts a job that never ends.
SSH = """#!{python}
import json, os, re, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Head(BaseHTTPRequestHandler):
    def do_GET(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        job = dict(submission_id="one", job_id=None)
        job |= dict() if self.command == "POST" else dict(type="SUBMISSION", status="RUNNING", entrypoint="")
        answers = dict(version=dict(version="4", ray_version="{ray}", ray_commit="{commit}"))
        last = self.path.rstrip("/").split("/")[-1]
        answer = dict(logs="under way\\n") if last == "logs" else answers.get(last, job)
        self.send_response(404 if "mlflow" in self.path else 200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())
    do_POST = do_PUT = do_GET
    def log_message(self, *_): pass

port = int(re.search(r":(\\d+):", sys.argv[-1]).group(1))
server = HTTPServer(("127.0.0.1", port), Head)
open("{pids}", "a").write(str(os.getpid()) + chr(10))
server.serve_forever()
"""


@pytest.fixture
def laptop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is also the user's home."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("LINFLAB_CLUSTER", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.mark.parametrize("command", [["sweeps"], ["ui"], ["report", "sweep", "one"], ["train", RECIPE]])
def test_missing_cluster_file_is_rejected(laptop: Path, run_cli: RunCli, command: list[str]) -> None:
    assert_rejected(run_cli(*command, "--cluster"), f"cluster={laptop / 'cluster.yaml'}", "LINFLAB_CLUSTER")


def test_file_without_a_cluster_is_rejected(laptop: Path, run_cli: RunCli) -> None:
    (laptop / "recipe.yaml").write_text("model: {}\n")
    done = run_cli("sweeps", "--cluster", LINFLAB_CLUSTER="recipe.yaml")
    assert_rejected(done, f"cluster={laptop / 'recipe.yaml'}", "provider")


def test_missing_token_is_rejected(laptop: Path, run_cli: RunCli) -> None:
    (laptop / "cluster.yaml").write_text(FILE)
    done = run_cli("train", RECIPE, "--cluster")
    assert_rejected(done, "`ray get-auth-token --generate`")


def test_unreachable_head_is_rejected(laptop: Path, run_cli: RunCli) -> None:
    (laptop / "cluster.yaml").write_text(FILE)
    assert_rejected(run_cli("sweeps", "--cluster"), f"cluster={laptop / 'cluster.yaml'}", "ssh")


def test_wrong_settings_are_rejected_before_connecting(laptop: Path, run_cli: RunCli) -> None:
    done = run_cli("sweep", RECIPE, "demo", "model.widht=3", "--cluster")
    assert_rejected(done, "model.widht=3")
    assert "cluster" not in done.stderr
    assert_rejected(run_cli("train", RECIPE, "--dry-run", "--cluster"), "dry-run")


def test_jobs_of_sweeps_with_longer_names_are_other_jobs() -> None:
    assert is_job_of("first-a1b2c3", "first") and is_job_of("first-lr-a1b2c3", "first-lr")
    assert not is_job_of("first-lr-a1b2c3", "first") and not is_job_of("first", "first")


def test_swallowed_signal_ends_ssh(laptop: Path) -> None:
    """A library may swallow the exception of the first signal; the second, or the end of the grace period, counts."""
    (laptop / "cluster.yaml").write_text(FILE)
    ssh, pid = laptop / "ssh", laptop / "pid"
    ssh.write_text(SSH.format(python=sys.executable, ray=ray.__version__, commit=ray.__commit__, pids=pid))
    ssh.chmod(0o755)
    script = (
        "import time; from pathlib import Path; from linflab.platform import signals; signals.watch()\n"
        "from linflab.platform.cluster.head import ssh_tunnel\n"
        "with ssh_tunnel(8265):\n"
        f"    while not Path({str(pid)!r}).exists(): time.sleep(0.01)\n"
        "    for _ in range(2):\n"
        "        try: print('ready', flush=True); time.sleep(100)\n"
        "        except KeyboardInterrupt: pass\n"
    )
    path = f"{laptop}{os.pathsep}{os.environ['PATH']}"
    with subprocess.Popen(
        [sys.executable, "-c", script], env={**os.environ, "PATH": path}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        for _ in range(2):
            assert process.stdout.readline() == b"ready\n"
            process.send_signal(signal.SIGTERM)
        # On a busy machine, both signals may be read at once, and count as the first.
        assert process.wait(signals.GRACE_S + 15) == signals.INTERRUPTED
        assert process.stderr.read() == b"linflab: interrupted\n"
    if remains := psutil.pid_exists(int(pid.read_text())):
        os.kill(int(pid.read_text()), signal.SIGKILL)
    assert not remains


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("arguments", [["train", RECIPE], ["ui"]], ids=["job", "ui"])
def test_interrupted_cluster_commands_end_their_ssh(laptop: Path, arguments: list[str], number: signal.Signals) -> None:
    (laptop / "cluster.yaml").write_text(FILE)
    ssh, pids, temporary = laptop / "bin" / "ssh", laptop / "pids", laptop / "temporary"
    ssh.parent.mkdir()
    temporary.mkdir()
    ssh.write_text(SSH.format(python=sys.executable, ray=ray.__version__, commit=ray.__commit__, pids=pids))
    ssh.chmod(0o755)
    port = ["--port", str(find_free_port())] if arguments == ["ui"] else []
    log = laptop / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "linflab.platform", *arguments, *port, "--cluster"],
            env={
                **os.environ,
                "PATH": f"{ssh.parent}{os.pathsep}{os.environ['PATH']}",
                "RAY_AUTH_TOKEN": "a" * 64,
                "TMPDIR": str(temporary),
                "PYTHONUNBUFFERED": "1",
            },
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    try:
        expected = "under way" if arguments != ["ui"] else "MLflow is open"
        with time_limit(200):
            while expected not in log.read_text():
                assert process.poll() is None, log.read_text()
                time.sleep(0.1)
        process.send_signal(number)
        assert process.wait(20) == 130, log.read_text()
    finally:
        process.kill()
        process.wait()
        started = [int(pid) for pid in pids.read_text().split()] if pids.exists() else []
        remaining = [pid for pid in started if psutil.pid_exists(pid)]
        for pid in remaining:
            os.kill(pid, signal.SIGKILL)
    output = log.read_text()
    assert "Traceback" not in output and output.splitlines()[-1].startswith("linflab: "), output
    if arguments != ["ui"]:
        job = re.search(r"as job (\S+)\.", output)
        assert job and f"ray job logs --follow {job.group(1)}" in output.splitlines()[-1]
        assert f"ray job stop {job.group(1)}" in output.splitlines()[-1]
    assert started and not remaining
    assert not [path for path in temporary.iterdir() if not path.name.startswith("ray")]  # no copy of the code remains


@pytest.mark.parametrize("server", ["sqlite:///mlflow.db", "http://127.0.0.1:1"])
def test_invalid_tracking_server_is_rejected(laptop: Path, run_cli: RunCli, server: str) -> None:
    assert_rejected(run_cli("sweeps", LINFLAB_TRACKING_URI=server), f"LINFLAB_TRACKING_URI={server}")


def test_restrict_ports_is_rejected_outside_a_cluster(laptop: Path) -> None:
    with pytest.raises(InputError, match=r"restrict-ports\b"):
        restrict_ports(Storage.open(laptop))


@pytest.mark.slow
def test_resources_include_nodes_that_can_be_launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nodes are launched on demand, there may be none yet."""
    node_types = {
        "head": {"resources": {"CPU": 0}, "max_workers": 0},
        "gpu": {"resources": {"CPU": 800, "GPU": 4}, "max_workers": 5},
    }
    description = {"available_node_types": node_types, "head_node_type": "head", "max_workers": 3}
    # Patched instead of HOME, where Ray stores the token of a process.
    monkeypatch.setattr(node, "BOOTSTRAP_CONFIG", tmp_path / "ray_bootstrap_config.yaml")
    node.BOOTSTRAP_CONFIG.write_text(json.dumps(description))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    start_ray()
    try:
        (machine,) = node_resources()
        assert "GPU" not in machine or machine["GPU"] < 4  # a local Ray ignores the description
        too_many = 64 * (os.cpu_count() or 1)
        with pytest.raises(InputError, match=rf"compute\.workers={too_many}\b"):
            worker_resources(load_config(RECIPE, [f"compute.workers={too_many}", f"training.batch_size={too_many}"]))
        monkeypatch.setenv("RAY_ADDRESS", "as on a head")
        assert node_resources() == 3 * [node_types["gpu"]["resources"]]
        experiment = load_config(RECIPE, ["compute.cpus_per_worker=100", "compute.gpus_per_worker=0.5"])
        resources = worker_resources(experiment)
        assert resources == {"CPU": 100, "GPU": 0.5} and max_concurrent_trials(1, resources) == 24
        assert (
            max_concurrent_trials(2, {"CPU": 500, "GPU": 1}) == 1
        )  # one worker per node, two of three nodes per training
        with pytest.raises(InputError, match=r"compute\.workers=4\b.*\b500 CPU.*\b1 GPU.*\b3\b"):
            worker_resources(load_config(RECIPE, ["compute.workers=4", "compute.cpus_per_worker=500"]))
    finally:
        ray.shutdown()
