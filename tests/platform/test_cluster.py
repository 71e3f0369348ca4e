"""`ray up cluster.local.yaml` for real: a head and two workers, each with a network, processes and a home of its own.

What follows each other here is one user's day: the tests run in order, on one cluster.
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

from linflab.platform.shipping import copy_code
from tests.conftest import RECIPE
from tests.platform.hosts import ROOT, Host, Network, answering_from, missing

pytestmark = pytest.mark.cluster
BIN = Path(sys.executable).parent
EPOCHS = 30
TRIALS = 6
SHORT = [f"training.epochs={EPOCHS}", "training.checkpoint_epochs=1", "evaluation.attack.steps=5"]
ASKED = [RECIPE, "demo", *SHORT, "--budget", str(TRIALS), "--sampler", "random"]
CORES = os.cpu_count() or 1  # what each host believes to have


class Cluster:
    """The hosts, and the machine of a user who has edited the code."""

    def __init__(self, folder: Path) -> None:
        self.network = Network(folder)
        self.network.add("head", "one", "two", "outside")
        self.head, self.one, self.two, self.outside = self.network.hosts.values()
        self.shared, self.home = folder / "shared", folder / "laptop"
        for made in (self.shared, self.home):
            made.mkdir()
        self.file = folder / "cluster.yaml"
        self.file.write_text(self.edited((ROOT / "cluster.local.yaml").read_text()))
        self.code = copy_code(folder / "code")
        tracking = self.code / "platform" / "tracking.py"
        before = tracking.read_text()
        tracking.write_text(before.replace(" CPU cores (", " edited CPU cores ("))
        assert tracking.read_text() != before
        self.ray("get-auth-token", "--generate")

    def edited(self, text: str) -> str:
        """The file as a user edits it: the lines that it names, and no other."""
        edits = {
            r"cluster_name: \S+": f"cluster_name: {self.network.name}",
            r"head_ip: \S+": f"head_ip: {self.head.address}",
            r"worker_ips: \[.*\]": f"worker_ips: [{self.one.address}, {self.two.address}]",
            r"ssh_user: \S+": "ssh_user: root",
            r"ssh_private_key: \S+": f"ssh_private_key: {self.network.key}",
            r"LINFLAB_SHARED=/\S+'": f"LINFLAB_SHARED={self.shared}'",
        }
        edit_here, rest = re.split(r"  # ---- \.\.\. to here", text)
        for old, new in edits.items():
            edit_here, times = re.subn(old, new, edit_here)
            assert times == 1, old
        return f"{edit_here}  # ---- ... to here{rest}"

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("LINFLAB", "RAY"))}
        own = {"HOME": str(self.home), "LINFLAB_CLUSTER": str(self.file), "PYTHONPATH": str(self.code.parent)}
        return {**kept, **own, "PATH": f"{BIN}{os.pathsep}{kept['PATH']}", "COLUMNS": "150"}

    def ray(self, *arguments: str) -> str:
        command = [str(BIN / "ray"), *arguments]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=300,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        """The user's command, begun."""
        return subprocess.Popen(
            [str(BIN / "linflab"), *arguments], cwd=self.home, env=self.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def linflab(self, *arguments: str, status: int = 0) -> str:
        process = self.start(*arguments)
        said, _ = process.communicate(timeout=600)
        assert process.returncode == status, said
        return said

    def trials(self, name: str) -> pd.DataFrame:
        """What the head's record has of a sweep; read through ssh."""
        script = (
            "import sys; from linflab.platform.cluster import record; from linflab.reports.records import read_trials\n"
        )
        script += "with record() as uri: read_trials(uri, sys.argv[1]).to_json(sys.argv[2])"
        file = self.home / "trials.json"
        command = [sys.executable, "-c", script, name, str(file)]
        subprocess.run(command, env=self.environment, check=True, cwd=self.home, timeout=120)
        return pd.read_json(file, dtype=False, convert_dates=False)

    def checkpoints(self) -> int:
        return len(list(self.shared.glob("runs/checkpoints/*/latest.pt")))

    def wait_for(self, what: "subprocess.Popen[str]", checkpoints: int) -> None:
        deadline = time.monotonic() + 180
        while self.checkpoints() < checkpoints:
            assert time.monotonic() < deadline and what.poll() is None, what.stdout and what.stdout.read()
            time.sleep(0.2)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(reason)
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        cluster.ray("up", "-y", str(cluster.file))
        yield cluster
    finally:
        cluster.network.close()


def processes(host: Host) -> list[str]:
    """What runs there of Ray, Python and MLflow."""
    lines = host.run("ps -eo pid,args --no-headers").splitlines()
    return [line for line in lines if re.search("ray|python|mlflow|uvicorn", line) and "ps -eo" not in line]


def ports_of(host: Host) -> list[int]:
    """What listens there."""
    return sorted({int(line.split()[3].rsplit(":", 1)[1]) for line in host.run("ss -ltnH").splitlines()})


def test_a_sweep_from_the_laptop(cluster: Cluster) -> None:
    """Trials run on both workers, by the code as the user has edited it; the record is on the head, the table here."""
    deadline = time.monotonic() + 180
    while "3 local.cluster.node" not in cluster.ray("exec", str(cluster.file), "ray status"):  # workers join later
        assert time.monotonic() < deadline
        time.sleep(2)
    said = cluster.linflab("sweep", *ASKED, "--name", "calm", "--cluster")
    for trial in range(1, TRIALS + 1):
        assert f"trial {trial} of {TRIALS} done" in said
    (job,) = re.findall(r"as job (\S+)\.", said)
    assert f"trial {TRIALS} of {TRIALS} done" in cluster.ray("exec", str(cluster.file), f"ray job logs {job}")
    trials = cluster.trials("calm")
    assert len(trials) == TRIALS and set(trials["status"]) == {"FINISHED"}
    assert set(trials["linflab.host"]) == {cluster.one.name, cluster.two.name}
    assert trials["linflab.hardware"].str.contains("edited CPU cores").all()
    assert (cluster.head.home / "linflab-record" / "mlflow.db").stat().st_size > 0
    assert list(cluster.shared.glob("runs/artifacts/**/weights.pt"))
    reports = cluster.home / "runs" / "reports"
    calm = (reports / "sweep-calm.csv").read_bytes()
    shutil.rmtree(reports)
    assert "Sweep calm: digits, eps = 0.1" in cluster.linflab("report", "sweep", "calm", "--cluster")
    assert (reports / "sweep-calm.csv").read_bytes() == calm
    (line,) = [line for line in cluster.linflab("sweeps", "--cluster").splitlines() if line.startswith("calm")]
    assert "finished" in line and f"{TRIALS} trials" in line


def test_the_ui_through_a_tunnel(cluster: Cluster) -> None:
    process = cluster.start("ui", "--cluster", "--port", "5077")
    assert process.stdout is not None
    assert "MLflow is open" in process.stdout.readline()
    link = re.search(r"digits eps 0.1: http://127.0.0.1:5077/#/experiments/\d+/runs", process.stdout.readline())
    assert link is not None
    with urllib.request.urlopen("http://127.0.0.1:5077/", timeout=20) as answer:
        assert "MLflow" in answer.read().decode()
    process.terminate()
    process.communicate(timeout=20)
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", 5077)) != 0  # the tunnel has gone with it


def test_a_trial_over_two_hosts(cluster: Cluster) -> None:
    wide = ["compute.workers=2", f"compute.cpus_per_worker={CORES}", "training.epochs=3"]
    said = cluster.linflab("train", RECIPE, "evaluation.attack.steps=5", *wide, "--cluster")
    assert "Test: clean" in said and "Browse it: linflab ui --cluster" in said


def test_what_is_wrong_is_said_before_anything_starts(cluster: Cluster) -> None:
    assert "name=calm: this sweep is already on the cluster" in cluster.linflab(
        "sweep", *ASKED, "--name", "calm", "--cluster", status=2
    )
    assert "resume=none: there is no such sweep on the cluster; there are: calm" in cluster.linflab(
        "sweep", "--resume", "none", "--cluster", status=2
    )
    token = cluster.home / ".ray" / "auth_token"
    kept = token.read_text()
    token.write_text("0" * len(kept))
    try:
        refused = cluster.linflab("train", RECIPE, "--cluster", status=2)
    finally:
        token.write_text(kept)
    assert "does not accept the token in ~/.ray/auth_token" in refused


def test_nobody_else_gets_in(cluster: Cluster) -> None:
    """Without the token Ray refuses, on the head itself; to other machines nothing answers but ssh."""
    python = f"env -u RAY_AUTH_MODE HOME=/nowhere {sys.executable} -c"
    jobs = "http://127.0.0.1:8265/api/jobs/"
    asking = f"import urllib.request as r; print(r.urlopen(r.Request('{jobs}', headers=HEADERS)).status)"
    assert "401" in cluster.head.run(f'{python} "{asking.replace("HEADERS", "{}")}"', check=False)
    token = (cluster.home / ".ray" / "auth_token").read_text().strip()
    headers = f"{{'Authorization': 'Bearer {token}'}}"
    assert "200" in cluster.head.run(f'{python} "{asking.replace("HEADERS", headers)}"')
    submit = (
        f"env -u RAY_AUTH_MODE HOME=/nowhere {BIN}/ray job submit --address http://127.0.0.1:8265 -- echo came through"
    )
    said = cluster.head.run(submit, check=False)
    assert "nauthorized" in said and "came through" not in said
    for address in ("ray://127.0.0.1:10001", f"{cluster.head.address}:6379"):
        script = f"\"import ray; ray.init('{address}'); print('came through')\""
        assert "came through" not in cluster.head.run(f"{python} {script}", check=False)
        assert "came through" in cluster.head.run(f"{sys.executable} -c {script}")  # by the token in its home
    for host in (cluster.head, cluster.one):
        ports = ports_of(host)
        assert len(ports) > 5
        assert answering_from(cluster.outside, host.address, ports) == [22]
    assert answering_from(cluster.one, cluster.head.address, [22, 5500, 6379]) == [22, 5500, 6379]


def test_a_worker_is_gone_and_then_the_head(cluster: Cluster) -> None:
    """Trials go on elsewhere, from their checkpoints; what the head's end cuts is resumed; none is lost or doubled."""
    first = cluster.start("sweep", *ASKED, "--name", "wild", "--cluster")
    cluster.wait_for(first, checkpoints=2 * CORES)  # each host trains so many
    cluster.two.kill()
    deadline = time.monotonic() + 180
    while (trials := cluster.trials("wild"))["linflab.starts"].str.contains(",").sum() == 0:  # none has begun anew yet
        assert time.monotonic() < deadline and first.poll() is None, first.stdout and first.stdout.read()
        time.sleep(1)
    moved = trials[trials["linflab.starts"].str.contains(",", na=False)]
    assert set(moved["linflab.host"]) == {cluster.one.name}
    cluster.head.run("pkill -9 gcs_server; pkill -9 raylet", check=False)
    said, _ = first.communicate(timeout=180)
    assert first.returncode == 130 and "the connection to the cluster is lost" in said, said
    cluster.two.connect()
    cluster.two.start()
    cluster.ray("up", "-y", str(cluster.file))
    (line,) = [line for line in cluster.linflab("sweeps", "--cluster").splitlines() if line.startswith("wild")]
    assert " cut " in line
    cluster.linflab("sweep", "--resume", "wild", "--cluster")
    assert answering_from(cluster.outside, cluster.two.address, ports_of(cluster.two)) == [22]
    trials = cluster.trials("wild")
    assert sorted(trials["linflab.trial"].astype(int)) == list(range(1, TRIALS + 1))
    assert set(trials["status"]) == {"FINISHED"}
    reports = cluster.home / "runs" / "reports"
    assert (reports / "sweep-wild.csv").read_bytes() == (reports / "sweep-calm.csv").read_bytes()
    assert not list(cluster.shared.glob("runs/checkpoints/*")) and not list(cluster.shared.glob("runs/ray/*"))


def test_ray_down_leaves_no_process(cluster: Cluster) -> None:
    assert any("mlflow" in line for line in processes(cluster.head))
    cluster.ray("down", "-y", str(cluster.file))
    deadline = time.monotonic() + 90  # workers give a head that they have lost some time
    for host in (cluster.head, cluster.one, cluster.two):
        while left := processes(host):
            assert time.monotonic() < deadline, left
            time.sleep(2)
