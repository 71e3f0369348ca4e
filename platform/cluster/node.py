"""Services on cluster nodes: MLflow server on the head node, firewall rules, and shutdown of workers.

The cluster YAML files start these services with the commands of `linflab node`.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from linflab.platform.cluster.ports import DASHBOARD_PORT, MLFLOW_PORT, RAY_PORT, is_listening
from linflab.platform.errors import InputError, TrainingError
from linflab.platform.tracking.storage import Storage
from linflab.reports.outputs import write_whole

BOOTSTRAP_CONFIG = Path("~/ray_bootstrap_config.yaml")  # JSON, written by `ray up`
STARTUP_TIMEOUT_S = 120.0
HEAD_TIMEOUT_S = 20.0  # without contact, before a worker stops Ray
# Ports of Ray, PyTorch and MLflow: fixed ones, and those that the system assigns.
PROTECTED_PORTS = f"{{ {MLFLOW_PORT}, {RAY_PORT}, {DASHBOARD_PORT}, 10001-65535 }}"


def cluster_description() -> dict[str, Any] | None:
    """Return the cluster file of `ray up` with Ray's additions; None outside of a cluster."""
    with suppress(OSError, ValueError):
        description = json.loads(BOOTSTRAP_CONFIG.expanduser().read_text())
        return description if isinstance(description, dict) else None
    return None


def start_mlflow_server(storage: Storage, database: str, port: int) -> None:
    """Start the MLflow server in the background and wait for it; it runs until the local Ray head stops.

    Args:
        storage: Persistent storage; the server keeps artifacts in the storage's folder `artifacts/`.
        database: URI of a database, which MLflow creates if missing.
        port: Port of the server.

    Raises:
        InputError: If no Ray head is running on this machine, or the port is in use.
        TrainingError: If the server does not start; the message has the end of the server's log.
    """
    head = _newest_process("gcs_server")
    if head is None:
        raise InputError("start-mlflow: requires a running Ray head on this machine; run `ray start --head` first")
    if database.startswith("sqlite:///"):
        Path(database.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + STARTUP_TIMEOUT_S
    while is_listening(port):  # the server of a stopped head may still be shutting down
        if time.monotonic() > deadline:
            raise InputError(f"port={port}: must be free, but another program uses it; stop it, or use another port")
        time.sleep(0.5)
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", database, "--serve-artifacts"]
    command += ["--artifacts-destination", str(storage.artifacts)]
    command += [
        "--host",
        "0.0.0.0",
        "--port",
        str(port),
        "--workers",
        "2",
        "--allowed-hosts",
        ",".join(_allowed_hosts()),
    ]
    log = storage.root / "mlflow.log"
    with log.open("ab") as file:
        watcher = subprocess.Popen(
            [sys.executable, "-m", "linflab.platform.cluster.node", "start-mlflow", str(head), *command],
            stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True, cwd="/",
        )  # fmt: skip
    deadline = time.monotonic() + STARTUP_TIMEOUT_S
    while not _is_healthy(port):
        if watcher.poll() is not None or time.monotonic() > deadline:
            with suppress(ProcessLookupError):
                os.killpg(watcher.pid, signal.SIGKILL)
            end = " ".join(log.read_text(errors="replace").split())[-500:]
            raise TrainingError(f"MLflow server did not start ({end}); see {log}")
        time.sleep(0.5)


def _raylet() -> int | None:
    return _newest_process("raylet")


def _newest_process(name: str) -> int | None:
    """Return the id of this user's newest process with this name; several can exist while Ray restarts."""
    processes = []
    for process in psutil.process_iter(["name", "uids", "create_time", "status"]):
        is_own = process.info["uids"] is not None and process.info["uids"].real == os.getuid()
        if process.info["name"] == name and is_own and process.info["status"] != psutil.STATUS_ZOMBIE:
            processes.append((process.info["create_time"], process.pid))
    return max(processes)[1] if processes else None


def _allowed_hosts() -> list[str]:
    """Return the names and addresses of this machine that MLflow clients may use, with and without a port."""
    addresses = [address.address for entries in psutil.net_if_addrs().values() for address in entries]
    ip_addresses = [address for address in addresses if re.fullmatch(r"[0-9.]+", address)]  # IPv4
    names = dict.fromkeys(["localhost", "127.0.0.1", socket.gethostname(), *ip_addresses])
    return [*names, *(f"{name}:*" for name in names)]


def stop_with_head(head: str, port: int) -> None:
    """Start a background process that stops Ray on this worker once the head node is gone.

    Ray itself would leave some of its processes running on this worker.

    Args:
        head: Address of the head node.
        port: Port of Ray on the head node.

    Raises:
        InputError: If no Ray worker is running on this machine.
    """
    if _raylet() is None:
        raise InputError("stop-with-head: requires a running Ray worker on this machine; run `ray start` first")
    subprocess.Popen(
        [sys.executable, "-m", "linflab.platform.cluster.node", "stop-with-head", head, str(port)],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, cwd="/",
    )  # fmt: skip


def _end_with_head(head: str, port: int) -> None:
    raylet, last_contact = _raylet(), time.monotonic()
    while raylet is not None and _raylet() == raylet and time.monotonic() - last_contact < HEAD_TIMEOUT_S:
        time.sleep(3)
        if is_listening(port, head):
            last_contact = time.monotonic()
    if _raylet() in (raylet, None):  # otherwise a restarted Ray has another watcher
        subprocess.run([str(Path(sys.executable).with_name("ray")), "stop", "--force"])


def _is_healthy(port: int) -> bool:
    with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
        return bool(answer.status == 200)
    return False


def _supervise(head: int, command: list[str]) -> None:
    """Run a command, and restart it whenever it ends; kill the process group once the Ray head is gone."""
    server: subprocess.Popen[bytes] | None = None
    with suppress(psutil.NoSuchProcess):
        ray = psutil.Process(head)
        while ray.is_running() and ray.status() != psutil.STATUS_ZOMBIE:
            if server is None or server.poll() is not None:
                server = subprocess.Popen(command)
            time.sleep(1)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # this process is in the group that gets SIGTERM
    os.killpg(0, signal.SIGTERM)
    if server is not None:
        with suppress(subprocess.TimeoutExpired):
            server.wait(timeout=10)
    os.killpg(0, signal.SIGKILL)


def restrict_ports(storage: Storage) -> None:
    """Restrict the ports of Ray, PyTorch and MLflow to the nodes of an on-premise cluster.

    The ssh port is not restricted. This creates or replaces the table `inet linflab` of the firewall. `ray up` leaves
    the nodes' addresses on the head node. The head node copies them to the storage, where the workers read them.

    Args:
        storage: Storage shared by all nodes.

    Raises:
        InputError: If this is not a node of an on-premise cluster, or nftables is missing or cannot be used.
    """
    nodes_file = storage.root / "machines.json"
    provider = (cluster_description() or {}).get("provider", {})
    if "head_ip" in provider:
        write_whole(nodes_file, lambda file: file.write(json.dumps(provider).encode()))
    elif nodes_file.exists():
        provider = json.loads(nodes_file.read_text())
    else:
        raise InputError(
            f"restrict-ports: requires {BOOTSTRAP_CONFIG} or {nodes_file}, which list the nodes; run `ray up` of an "
            "on-premise cluster, which creates them on the head node first"
        )
    nft = shutil.which("nft", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]))
    if nft is None:
        raise InputError("restrict-ports: requires nft; install the package nftables")
    command = [nft, "-f", "-"] if os.geteuid() == 0 else ["sudo", "-n", nft, "-f", "-"]
    try:
        result = subprocess.run(command, input=_firewall_rules(provider), capture_output=True, text=True)
    except OSError as error:
        raise InputError(f"restrict-ports: {error}; run it as root, or allow sudo without a password") from None
    if result.returncode:
        raise InputError(
            f"restrict-ports: nft failed ({' '.join(result.stderr.split())[:300]}); check nftables and sudo"
        )


def _firewall_rules(provider: Mapping[str, Any]) -> str:
    hosts = [provider["head_ip"], *provider.get("worker_ips", [])]
    if "external_head_ip" in provider:
        hosts.append(provider["external_head_ip"])
    try:
        addresses = {
            str(entry[4][0]) for host in hosts for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        }
    except OSError as error:
        raise InputError(
            f"restrict-ports: address of a node not found ({', '.join(hosts)}: {error}); check the cluster file"
        ) from None
    families = {
        "ip": sorted(address for address in addresses if ":" not in address),
        "ip6": sorted(address for address in addresses if ":" in address),
    }
    accept_rules = [
        f"{family} saddr {{ {', '.join(sources)} }} accept" for family, sources in families.items() if sources
    ]
    rules = ["iif lo accept", "ct state established,related accept", *accept_rules, f"tcp dport {PROTECTED_PORTS} drop"]
    chain = "type filter hook input priority filter; policy accept;"
    # One transaction creates the table, deletes it and creates it again, so the ports are never open in between.
    return "\n".join(
        [
            "table inet linflab",
            "delete table inet linflab",
            "table inet linflab {",
            f"chain input {{ {chain}",
            *rules,
            "}",
            "}",
        ]
    )


if __name__ == "__main__":
    if sys.argv[1] == "start-mlflow":
        _supervise(int(sys.argv[2]), sys.argv[3:])
    else:
        _end_with_head(sys.argv[2], int(sys.argv[3]))
