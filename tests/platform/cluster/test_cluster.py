"""`ray up cluster.local.yaml` on a simulated cluster: a head and two workers with their own network and processes.

The tests run in order on one cluster, like one user's day.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from linflab.platform.source import copy_source
from tests.conftest import RECIPE, has_words
from tests.platform.cluster.hosts import ROOT, Host, Network, find_missing_requirements, find_open_ports

pytestmark = pytest.mark.cluster
BIN = Path(sys.executable).parent
EPOCHS = 30
TRIALS = 6
SHORT = [f"training.epochs={EPOCHS}", "training.checkpoint_interval=1", "evaluation.attack.steps=5"]
SWEEP_ARGUMENTS = [RECIPE, "demo", *SHORT, "--budget", str(TRIALS), "--sampler", "random"]
CORES = os.cpu_count() or 1  # each host detects all cores of this machine


class Cluster:
    """The simulated hosts, and the machine of a user who has edited the code."""

    def __init__(self, folder: Path) -> None:
        self.network = Network(folder)
        self.network.add("head", "one", "two", "outside")
        self.head, self.one, self.two, self.outside = self.network.hosts.values()
        self.shared, self.home = folder / "shared", folder / "laptop"
        for directory in (self.shared, self.home):
            directory.mkdir()
        self.file = folder / "cluster.yaml"
        self.file.write_text(self.edit_cluster_file((ROOT / "cluster.local.yaml").read_text()))
        self.code = copy_source(folder / "code")
        host = self.code / "platform" / "host.py"
        before = host.read_text()
        host.write_text(before.replace(" CPU cores (", " edited CPU cores ("))
        assert host.read_text() != before
        self.ray("get-auth-token", "--generate")

    def edit_cluster_file(self, text: str) -> str:
        """Return the cluster file as users edit it: only the lines that it names are changed."""
        edits = {
            r"cluster_name: \S+": f"cluster_name: {self.network.name}",
            r"head_ip: \S+": f"head_ip: {self.head.address}",
            r"worker_ips: \[.*\]": f"worker_ips: [{self.one.address}, {self.two.address}]",
            r"ssh_user: \S+": "ssh_user: root",
            r"ssh_private_key: \S+": f"ssh_private_key: {self.network.key}",
            r"LINFLAB_SHARED=/\S+'": f"LINFLAB_SHARED={self.shared}'",
        }
        editable, rest = re.split(r"  # ---- \.\.\. to here", text)
        for old, new in edits.items():
            editable, times = re.subn(old, new, editable)
            assert times == 1, old
        return f"{editable}  # ---- ... to here{rest}"

    @property
    def environment(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("LINFLAB", "RAY"))}
        changed = {"HOME": str(self.home), "LINFLAB_CLUSTER": str(self.file), "PYTHONPATH": str(self.code.parent)}
        return {**inherited, **changed, "PATH": f"{BIN}{os.pathsep}{inherited['PATH']}", "COLUMNS": "150"}

    def ray(self, *arguments: str) -> str:
        command = [str(BIN / "ray"), *arguments]
        result = subprocess.run(
            command,
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=300,
            stdin=subprocess.DEVNULL,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        """Start a linflab command on the user's machine."""
        return subprocess.Popen(
            [str(BIN / "linflab"), *arguments], cwd=self.home, env=self.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def linflab(self, *arguments: str, status: int = 0) -> str:
        process = self.start(*arguments)
        output, _ = process.communicate(timeout=600)
        assert process.returncode == status, output
        return output

    def trials(self, name: str) -> pd.DataFrame:
        """Return a sweep's trials from the head's tracking store, read through ssh."""
        script = "import sys; from linflab.platform.cluster.head import tracking_server_tunnel\n"
        script += "from linflab.reports.records import read_trials\n"
        script += "with tracking_server_tunnel() as uri: read_trials(uri, sys.argv[1]).to_json(sys.argv[2])"
        file = self.home / "trials.json"
        command = [sys.executable, "-c", script, name, str(file)]
        subprocess.run(command, env=self.environment, check=True, cwd=self.home, timeout=120)
        return pd.read_json(file, dtype=False, convert_dates=False)

    def checkpoints(self) -> int:
        return len(list(self.shared.glob("runs/checkpoints/*/latest.pt")))

    def wait_for(self, process: "subprocess.Popen[str]", checkpoints: int) -> None:
        deadline = time.monotonic() + 180
        while self.checkpoints() < checkpoints:
            assert time.monotonic() < deadline and process.poll() is None, process.stdout and process.stdout.read()
            time.sleep(0.2)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := find_missing_requirements():
        pytest.skip(reason)
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        cluster.ray("up", "-y", str(cluster.file))
        yield cluster
    finally:
        cluster.network.close()


def list_processes(host: Host) -> list[str]:
    """Return the host's processes of Ray, Python and MLflow."""
    lines = host.run("ps -eo pid,args --no-headers").splitlines()
    return [line for line in lines if re.search("ray|python|mlflow|uvicorn", line) and "ps -eo" not in line]


def list_listening_ports(host: Host) -> list[int]:
    """Return the TCP ports on which the host listens."""
    return sorted({int(line.split()[3].rsplit(":", 1)[1]) for line in host.run("ss -ltnH").splitlines()})


def test_sweep_from_a_laptop_runs_on_both_workers(cluster: Cluster) -> None:
    """Trials run the user's edited code; the tracking store is on the head, the report on the laptop."""
    deadline = time.monotonic() + 180
    while "3 local.cluster.node" not in cluster.ray("exec", str(cluster.file), "ray status"):  # workers join later
        assert time.monotonic() < deadline
        time.sleep(2)
    output = cluster.linflab("sweep", *SWEEP_ARGUMENTS, "--name", "calm", "--cluster")
    for trial in range(1, TRIALS + 1):
        assert f"trial={trial} total={TRIALS}" in output
    (job,) = re.findall(r"as job (\S+)\.", output)
    assert f"trial={TRIALS} total={TRIALS}" in cluster.ray("exec", str(cluster.file), f"ray job logs {job}")
    trials = cluster.trials("calm")
    assert len(trials) == TRIALS and set(trials["status"]) == {"FINISHED"}
    assert set(trials["linflab.hostname"]) == {cluster.one.name, cluster.two.name}
    assert trials["linflab.hardware"].str.contains("edited CPU cores").all()
    assert (cluster.head.home / "linflab-record" / "mlflow.db").stat().st_size > 0
    assert list(cluster.shared.glob("runs/artifacts/**/weights.pt"))
    reports = cluster.home / "runs" / "reports"
    first_report = (reports / "sweep-calm.csv").read_bytes()
    shutil.rmtree(reports)
    assert "calm" in cluster.linflab("report", "sweep", "calm", "--cluster")
    assert (reports / "sweep-calm.csv").read_bytes() == first_report
    (line,) = [line for line in cluster.linflab("sweeps", "--cluster").splitlines() if line.startswith("calm")]
    assert "finished" in line and f"{TRIALS} trials" in line


def test_ui_opens_through_a_tunnel(cluster: Cluster) -> None:
    process = cluster.start("ui", "--cluster", "--port", "5077")
    assert process.stdout is not None
    process.stdout.readline()  # the line that reports the open UI
    link = re.search(r"digits eps 0.1: http://127.0.0.1:5077/#/experiments/\d+/runs", process.stdout.readline())
    assert link is not None
    with urllib.request.urlopen("http://127.0.0.1:5077/", timeout=20) as answer:
        assert "MLflow" in answer.read().decode()
    process.terminate()
    process.communicate(timeout=20)
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", 5077)) != 0  # the tunnel is closed as well


def test_training_uses_two_hosts(cluster: Cluster) -> None:
    settings = ["compute.workers=2", f"compute.cpus_per_worker={CORES}", "training.epochs=3"]
    output = cluster.linflab("train", RECIPE, "evaluation.attack.steps=5", *settings, "--cluster")
    assert re.search(r"certified \d+\.\d\d% \(lipschitz-sound\)", output) and "linflab ui --cluster" in output


def test_wrong_input_is_rejected_before_a_job_starts(cluster: Cluster) -> None:
    output = cluster.linflab("sweep", *SWEEP_ARGUMENTS, "--name", "calm", "--cluster", status=2)
    assert has_words(output.splitlines()[-1], "name=calm")
    output = cluster.linflab("sweep", "--resume", "none", "--cluster", status=2).splitlines()[-1]
    assert has_words(output, "resume=none") and has_words(output, "calm")
    token = cluster.home / ".ray" / "auth_token"
    original = token.read_text()
    token.write_text("0" * len(original))
    try:
        output = cluster.linflab("train", RECIPE, "--cluster", status=2)
    finally:
        token.write_text(original)
    assert "~/.ray/auth_token" in output.splitlines()[-1]


def test_cluster_rejects_missing_tokens_and_other_hosts(cluster: Cluster) -> None:
    """Without the token, Ray rejects requests even on the head; to other machines, only ssh answers."""
    python = f"env -u RAY_AUTH_MODE HOME=/nowhere {sys.executable} -c"
    jobs = "http://127.0.0.1:8265/api/jobs/"
    request_code = f"import urllib.request as r; print(r.urlopen(r.Request('{jobs}', headers=HEADERS)).status)"
    assert "401" in cluster.head.run(f'{python} "{request_code.replace("HEADERS", "{}")}"', check=False)
    token = (cluster.home / ".ray" / "auth_token").read_text().strip()
    headers = f"{{'Authorization': 'Bearer {token}'}}"
    assert "200" in cluster.head.run(f'{python} "{request_code.replace("HEADERS", headers)}"')
    submit = (
        f"env -u RAY_AUTH_MODE HOME=/nowhere {BIN}/ray job submit --address http://127.0.0.1:8265 -- echo came through"
    )
    output = cluster.head.run(submit, check=False)
    assert "nauthorized" in output and "came through" not in output
    for address in ("ray://127.0.0.1:10001", f"{cluster.head.address}:6379"):
        script = f"\"import ray; ray.init('{address}'); print('came through')\""
        assert "came through" not in cluster.head.run(f"{python} {script}", check=False)
        command_with_token = f"{sys.executable} -c {script}"  # the token is in the home
        # Ray waits 30 s for a client's server to start, which a busy machine can exceed.
        assert any("came through" in cluster.head.run(command_with_token, check=False) for _ in range(3))
    for host in (cluster.head, cluster.one):
        ports = list_listening_ports(host)
        assert len(ports) > 5
        assert find_open_ports(cluster.outside, host.address, ports) == [22]
    assert find_open_ports(cluster.one, cluster.head.address, [22, 5500, 6379]) == [22, 5500, 6379]


def test_sweep_survives_the_loss_of_a_worker_and_the_head(cluster: Cluster) -> None:
    """Trials resume on the other worker, and the sweep after the head's loss; none is lost or duplicated."""
    process = cluster.start("sweep", *SWEEP_ARGUMENTS, "--name", "wild", "--cluster")
    cluster.wait_for(process, checkpoints=2 * CORES)  # each host trains this many trials
    cluster.two.kill()
    deadline = time.monotonic() + 180
    while (trials := cluster.trials("wild"))["linflab.start_epochs"].str.contains(
        ","
    ).sum() == 0:  # no trial has restarted yet
        assert time.monotonic() < deadline and process.poll() is None, process.stdout and process.stdout.read()
        time.sleep(1)
    moved = trials[trials["linflab.start_epochs"].str.contains(",", na=False)]
    assert set(moved["linflab.hostname"]) == {cluster.one.name}
    cluster.head.run("pkill -9 gcs_server; pkill -9 raylet", check=False)
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 130 and output.splitlines()[-1].startswith("linflab: "), output
    cluster.two.connect()
    cluster.two.start()
    cluster.ray("up", "-y", str(cluster.file))
    (line,) = [line for line in cluster.linflab("sweeps", "--cluster").splitlines() if line.startswith("wild")]
    assert " interrupted " in line
    cluster.linflab("sweep", "--resume", "wild", "--cluster")
    assert find_open_ports(cluster.outside, cluster.two.address, list_listening_ports(cluster.two)) == [22]
    trials = cluster.trials("wild")
    assert sorted(trials["linflab.trial"].astype(int)) == list(range(1, TRIALS + 1))
    assert set(trials["status"]) == {"FINISHED"}
    reports = cluster.home / "runs" / "reports"
    assert (reports / "sweep-wild.csv").read_bytes() == (reports / "sweep-calm.csv").read_bytes()
    assert not list(cluster.shared.glob("runs/checkpoints/*")) and not list(cluster.shared.glob("runs/ray/*"))


def test_ray_down_leaves_no_process(cluster: Cluster) -> None:
    assert any("mlflow" in line for line in list_processes(cluster.head))
    cluster.ray("down", "-y", str(cluster.file))
    deadline = time.monotonic() + 90  # workers wait some time for a lost head
    for host in (cluster.head, cluster.one, cluster.two):
        while remaining := list_processes(host):
            assert time.monotonic() < deadline, remaining
            time.sleep(2)
