"""What runs on the machines of a cluster beside Ray: MLflow's server on the head, a closed door on each, and an end.

The cluster files run it, as `linflab node ...`.
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

from linflab.platform.checkpoints import write_partial
from linflab.platform.errors import SettingError, TrainingError
from linflab.platform.ports import DASHBOARD_PORT, RAY_PORT, RECORD_PORT, answers
from linflab.platform.storage import Storage

BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")  # where `ray up` leaves the cluster's description, as JSON
SECONDS_TO_START = 120.0
SECONDS_WITHOUT_HEAD = 20.0  # after which a worker gives it up
# what Ray, PyTorch and MLflow listen on: fixed ports, and whatever the system gives them
OUR_PORTS = f"{{ {RECORD_PORT}, {RAY_PORT}, {DASHBOARD_PORT}, 10001-65535 }}"


def cluster_description() -> dict[str, Any] | None:
    """What `ray up` was given, with Ray's additions; None on machines that are not of such a cluster."""
    with suppress(OSError, ValueError):
        found = json.loads(BOOTSTRAP.expanduser().read_text())
        return found if isinstance(found, dict) else None
    return None


def serve(storage: Storage, database: str, port: int) -> None:
    """Start MLflow's server in the background, for as long as this machine's Ray head runs; waits until it answers.

    Args:
        storage: whose `artifacts/` the server keeps; a folder that outlives this machine's processes.
        database: URI of a database, which MLflow makes where it is missing.

    Raises:
        SettingError: no Ray head runs here, or the port is taken.
        TrainingError: the server does not start; has the end of its log.
    """
    head = _latest("gcs_server")
    if head is None:
        raise SettingError("serve: no Ray head runs on this machine; start it first, by `ray start --head`")
    if database.startswith("sqlite:///"):
        Path(database.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + SECONDS_TO_START
    while answers(port):  # the server of a head that was there before is about to end
        if time.monotonic() > deadline:
            raise SettingError(f"port={port}: is taken by another program; end it, or choose another port")
        time.sleep(0.5)
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", database, "--serve-artifacts"]
    command += ["--artifacts-destination", str(storage.artifacts)]
    command += ["--host", "0.0.0.0", "--port", str(port), "--workers", "2", "--allowed-hosts", ",".join(_own_names())]
    log = storage.root / "mlflow.log"
    with log.open("ab") as file:
        watcher = subprocess.Popen(
            [sys.executable, "-m", "linflab.platform.node", "serve", str(head), *command],
            stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True, cwd="/",
        )  # fmt: skip
    deadline = time.monotonic() + SECONDS_TO_START
    while not _healthy(port):
        if watcher.poll() is not None or time.monotonic() > deadline:
            with suppress(ProcessLookupError):
                os.killpg(watcher.pid, signal.SIGKILL)
            end = " ".join(log.read_text(errors="replace").split())[-500:]
            raise TrainingError(f"MLflow's server did not start ({end}); {log} has more")
        time.sleep(0.5)


def _raylet() -> int | None:
    return _latest("raylet")


def _latest(name: str) -> int | None:
    """This user's process of this name, the latest: while Ray starts anew there are several."""
    found = []
    for process in psutil.process_iter(["name", "uids", "create_time", "status"]):
        own = process.info["uids"] is not None and process.info["uids"].real == os.getuid()
        if process.info["name"] == name and own and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append((process.info["create_time"], process.pid))
    return max(found)[1] if found else None


def _own_names() -> list[str]:
    """What this machine is called by those who may ask it for the record, with and without a port."""
    addresses = [address.address for entries in psutil.net_if_addrs().values() for address in entries]
    own = [address for address in addresses if re.fullmatch(r"[0-9.]+", address)]  # as IPv4
    names = dict.fromkeys(["localhost", "127.0.0.1", socket.gethostname(), *own])
    return [*names, *(f"{name}:*" for name in names)]


def end_with_head(head: str, port: int) -> None:
    """Start, in the background, what stops Ray on this worker once its head is gone: Ray itself leaves some of it.

    Raises:
        SettingError: no worker of Ray runs here.
    """
    if _raylet() is None:
        raise SettingError("end-with-head: Ray does not run on this machine; start it first, by `ray start`")
    subprocess.Popen(
        [sys.executable, "-m", "linflab.platform.node", "end-with-head", head, str(port)],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, cwd="/",
    )  # fmt: skip


def _end_with_head(head: str, port: int) -> None:
    raylet, heard = _raylet(), time.monotonic()
    while raylet is not None and _raylet() == raylet and time.monotonic() - heard < SECONDS_WITHOUT_HEAD:
        time.sleep(3)
        if answers(port, head):
            heard = time.monotonic()
    if _raylet() in (raylet, None):  # else Ray has been started anew, with another of these
        subprocess.run([str(Path(sys.executable).with_name("ray")), "stop", "--force"])


def _healthy(port: int) -> bool:
    with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
        return bool(answer.status == 200)
    return False


def _watch(head: int, command: list[str]) -> None:
    """Run a command, anew if it ends, until the Ray head is gone; then end it, with all that it has started."""
    server: subprocess.Popen[bytes] | None = None
    with suppress(psutil.NoSuchProcess):
        ray = psutil.Process(head)
        while ray.is_running() and ray.status() != psutil.STATUS_ZOMBIE:
            if server is None or server.poll() is not None:
                server = subprocess.Popen(command)
            time.sleep(1)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is of this group itself
    os.killpg(0, signal.SIGTERM)
    if server is not None:
        with suppress(subprocess.TimeoutExpired):
            server.wait(timeout=10)
    os.killpg(0, signal.SIGKILL)


def close_ports(storage: Storage) -> None:
    """Let nobody but the cluster's own machines reach what Ray, PyTorch and MLflow listen on; ssh stays as it is.

    A table of this machine's firewall, `inet linflab`, is made for it, or made anew. The head, where `ray up` leaves
    the machines' addresses, tells them the others, in the storage that all see.

    Raises:
        SettingError: this is no machine of a cluster of one's own, nftables is missing, or it can't be changed.
    """
    told = storage.root / "machines.json"
    provider = (cluster_description() or {}).get("provider", {})
    if "head_ip" in provider:
        os.replace(write_partial(told, lambda file: file.write(json.dumps(provider).encode())), told)
    elif told.exists():
        provider = json.loads(told.read_text())
    else:
        raise SettingError(
            f"close-ports: neither {BOOTSTRAP} nor {told} is here, which say what machines there are; `ray up` of a "
            "cluster of one's own makes them, on the head first"
        )
    nft = shutil.which("nft", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]))
    if nft is None:
        raise SettingError("close-ports: needs nft, of Debian's package nftables")
    command = [nft, "-f", "-"] if os.geteuid() == 0 else ["sudo", "-n", nft, "-f", "-"]
    try:
        done = subprocess.run(command, input=_rules(provider), capture_output=True, text=True)
    except OSError as error:
        raise SettingError(f"close-ports: {error}; nft needs root, or sudo without a password") from None
    if done.returncode:
        raise SettingError(f"close-ports: nft could not be used ({' '.join(done.stderr.split())[:300]})")


def _rules(provider: Mapping[str, Any]) -> str:
    hosts = [provider["head_ip"], *provider.get("worker_ips", [])]
    if "external_head_ip" in provider:
        hosts.append(provider["external_head_ip"])
    try:
        found = {
            str(entry[4][0]) for host in hosts for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        }
    except OSError as error:
        raise SettingError(f"close-ports: an address of {', '.join(hosts)} can't be found ({error})") from None
    families = {
        "ip": sorted(address for address in found if ":" not in address),
        "ip6": sorted(address for address in found if ":" in address),
    }
    ours = [f"{family} saddr {{ {', '.join(known)} }} accept" for family, known in families.items() if known]
    rules = ["iif lo accept", "ct state established,related accept", *ours, f"tcp dport {OUR_PORTS} drop"]
    chain = "type filter hook input priority filter; policy accept;"
    # named, removed and made in one transaction: at no time is the door open
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
    if sys.argv[1] == "serve":
        _watch(int(sys.argv[2]), sys.argv[3:])
    else:
        _end_with_head(sys.argv[2], int(sys.argv[3]))
