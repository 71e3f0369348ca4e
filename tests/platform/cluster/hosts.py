"""Simulated cluster machines: network namespaces with their own processes, homes and sshd.

They share the file system, so every folder has the same path on all of them.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from linflab.platform.cluster.ports import is_listening

ROOT = Path(__file__).resolve().parents[3]
TOOLS = ("sshd", "ssh", "rsync", "ip", "nft", "unshare", "nsenter")
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def find_missing_requirements() -> str:
    """Return what this machine lacks to simulate hosts, as text; empty if it lacks nothing."""
    tools = [tool for tool in TOOLS if shutil.which(tool, path=PATH) is None]
    if tools:
        return f"requires {', '.join(tools)} (Debian: openssh-server, openssh-client, rsync, iproute2, nftables)"
    if os.geteuid() != 0:
        return "requires root to create network namespaces"
    probe = f"linflab-probe-{os.getpid()}"
    result = subprocess.run(["ip", "netns", "add", probe], capture_output=True)
    subprocess.run(["ip", "netns", "del", probe], capture_output=True)
    return "" if result.returncode == 0 else "requires permission to create network namespaces"


class Host:
    """A simulated machine with an address, a home and processes."""

    def __init__(self, network: "Network", name: str, address: str) -> None:
        self.network, self.name, self.address = network, f"{network.name}-{name}", address
        self.interface = f"{network.name}-{len(network.hosts)}"  # at most 15 characters
        self.home = network.folder / name
        self.home.mkdir()
        (self.home / ".bashrc").write_text("# as every home has one\n")
        # Without this link, `make install` would create gigabytes on each host.
        environment = self.home / "linflab" / ".venv"
        environment.mkdir(parents=True)
        (environment / "bin").symlink_to(Path(sys.prefix) / "bin")
        for stamp in (".created", ".installed"):
            (environment / stamp).touch()
            os.utime(environment / stamp, (time.time() + 10**8,) * 2)
        _run("ip", "netns", "add", self.name)
        self.connect()
        self.start()

    def connect(self) -> None:
        _run("ip", "link", "add", self.interface, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        _run("ip", "link", "set", self.interface, "master", self.network.bridge, "up")
        for command in (
            f"addr add {self.address}/24 dev eth0",
            "link set eth0 up",
            "link set lo up",
            f"route add default via {self.network.gateway}",
        ):
            _run("ip", "-n", self.name, *command.split())

    def start(self) -> None:
        """Start the machine: sshd in new namespaces."""
        folder = self.network.folder
        # This Python may be in /root, so passwd gives root another home instead of a mount over /root.
        passwd = f"root:x:0:0:root:{self.home}:/bin/bash\nsshd:x:100:65534::/run/sshd:/usr/sbin/nologin\n"
        (self.home / "passwd").write_text(passwd)
        script = f"""
            set -e
            mount --make-rprivate /
            mount --bind {self.home}/passwd /etc/passwd
            mount --bind {folder}/hosts /etc/hosts
            for directory in /tmp/ray /run /dev/shm; do mkdir -p $directory; mount -t tmpfs tmpfs $directory; done
            mkdir -p /run/sshd
            hostname {self.name}
            exec {shutil.which("sshd", path=PATH)} -D -e -f {folder}/sshd_config
        """
        inside = ["unshare", "-m", "-p", "-u", "-i", "-f", "--mount-proc", "--kill-child", "bash", "-c", script]
        with (folder / f"{self.name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, *inside],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                env={"PATH": PATH, "HOME": str(self.home)},
            )  # fmt: skip

    def kill(self) -> None:
        """Simulate a power failure: remove the network interface and kill all processes."""
        _run("ip", "link", "del", self.interface)
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def run(self, command: str, check: bool = True) -> str:
        """Run a command as root over ssh; return its output."""
        result = subprocess.run(
            ["ssh", "-i", str(self.network.key), "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null",
             "-o", "LogLevel=ERROR", f"root@{self.address}", f". ~/.bashrc; {command}"],
            capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert not check or result.returncode == 0, result.stdout + result.stderr
        return result.stdout + result.stderr


class Network:
    """A network of simulated machines, which also includes this machine."""

    def __init__(self, folder: Path) -> None:
        _remove_stale_networks()
        self.folder, self.name = folder, f"lf{os.getpid()}"
        used_addresses = _run("ip", "-4", "-o", "addr", "show")
        number = next(number for number in range(77, 255) if f" 10.{number}." not in used_addresses)
        self.bridge, self.prefix = f"{self.name}-br", f"10.{number}.0"
        self.gateway = f"{self.prefix}.1"
        self.hosts: dict[str, Host] = {}
        self.key = folder / "key"
        for key in (self.key, folder / "host_key"):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
        shutil.copy(folder / "key.pub", folder / "authorized_keys")
        (folder / "sshd_config").write_text(
            f"HostKey {folder}/host_key\nAuthorizedKeysFile {folder}/authorized_keys\nStrictModes no\n"
            "PermitRootLogin prohibit-password\nPasswordAuthentication no\nUsePAM no\nPidFile none\nMaxSessions 50\n"
        )
        (folder / "hosts").write_text("127.0.0.1 localhost\n")
        _run("ip", "link", "add", self.bridge, "type", "bridge")
        _run("ip", "addr", "add", f"{self.gateway}/24", "dev", self.bridge)
        _run("ip", "link", "set", self.bridge, "up")

    def add(self, *names: str) -> None:
        for name in names:
            address = f"{self.prefix}.{10 + len(self.hosts)}"
            with (self.folder / "hosts").open("a") as file:
                file.write(f"{address} {self.name}-{name}\n")
            self.hosts[name] = Host(self, name, address)
        deadline = time.monotonic() + 20
        for name in names:
            while not is_listening(22, self.hosts[name].address):
                assert time.monotonic() < deadline, (self.folder / f"{self.name}-{name}.log").read_text()
                time.sleep(0.1)

    def close(self) -> None:
        for host in self.hosts.values():
            with suppress(ProcessLookupError):
                os.killpg(host.process.pid, signal.SIGKILL)
            host.process.wait()
            subprocess.run(["ip", "netns", "del", host.name], capture_output=True)
        subprocess.run(["ip", "link", "del", self.bridge], capture_output=True)


def find_open_ports(host: Host, address: str, ports: list[int]) -> list[int]:
    """Return the ports of an address that accept connections from a host."""
    script = "import socket, sys\nfor port in map(int, sys.argv[2:]):\n"
    script += " try: socket.create_connection((sys.argv[1], port), timeout=1.5).close(); print(port)\n"
    script += " except OSError: pass"
    command = ["ip", "netns", "exec", host.name, sys.executable, "-c", script, address, *map(str, ports)]
    return [int(port) for port in _run(*command).split()]


def _remove_stale_networks() -> None:
    """Remove the networks of killed tests, whose bridges would answer in place of this one."""
    for pid in re.findall(r"\blf(\d+)-br:", _run("ip", "-o", "link", "show", "type", "bridge")):
        if Path(f"/proc/{pid}").exists():
            continue
        for name in re.findall(rf"\blf{pid}-\w+", _run("ip", "netns", "list")):
            for process in subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split():
                with suppress(ProcessLookupError):
                    os.kill(int(process), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        subprocess.run(["ip", "link", "del", f"lf{pid}-br"], capture_output=True)


def _run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": PATH})
    assert result.returncode == 0, f"{' '.join(command)}: {result.stdout}{result.stderr}"
    return result.stdout
