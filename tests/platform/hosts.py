"""Machines to run a cluster on: network namespaces of this machine, with processes and homes of their own, and sshd.

They share the file system, so any folder is one that all of them see under the same path.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from linflab.platform.ports import answers

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("sshd", "ssh", "rsync", "ip", "nft", "unshare", "nsenter")
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def missing() -> str:
    """What this machine lacks for it, in words; empty where it lacks nothing."""
    tools = [tool for tool in TOOLS if shutil.which(tool, path=PATH) is None]
    if tools:
        return f"needs {', '.join(tools)}, of Debian's openssh-server, openssh-client, rsync, iproute2 and nftables"
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    probe = f"linflab-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True)
    subprocess.run(["ip", "netns", "del", probe], capture_output=True)
    return "" if made.returncode == 0 else "needs the right to make network namespaces"


class Host:
    """A machine: its address, its home, and its processes."""

    def __init__(self, network: "Network", name: str, address: str) -> None:
        self.network, self.name, self.address = network, f"{network.name}-{name}", address
        self.cable = f"{network.name}-{len(network.hosts)}"  # 15 letters are the most
        self.home = network.folder / name
        self.home.mkdir()
        (self.home / ".bashrc").write_text("# as every home has one\n")
        # what `make install` would make there anew, and takes for up to date: gigabytes
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
        _run("ip", "link", "add", self.cable, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        _run("ip", "link", "set", self.cable, "master", self.network.bridge, "up")
        for command in (
            f"addr add {self.address}/24 dev eth0",
            "link set eth0 up",
            "link set lo up",
            f"route add default via {self.network.gateway}",
        ):
            _run("ip", "-n", self.name, *command.split())

    def start(self) -> None:
        """Switch the machine on."""
        folder = self.network.folder
        # root's home is /root elsewhere, where this Python may be
        passwd = f"root:x:0:0:root:{self.home}:/bin/bash\nsshd:x:100:65534::/run/sshd:/usr/sbin/nologin\n"
        (self.home / "passwd").write_text(passwd)
        script = f"""
            set -e
            mount --make-rprivate /
            mount --bind {self.home}/passwd /etc/passwd
            mount --bind {folder}/hosts /etc/hosts
            for place in /tmp/ray /run /dev/shm; do mkdir -p $place; mount -t tmpfs tmpfs $place; done
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
        """Cut the machine's power: all its processes are gone at once, and nothing answers."""
        _run("ip", "link", "del", self.cable)
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def run(self, command: str, check: bool = True) -> str:
        """What a command prints there, as root over ssh."""
        done = subprocess.run(
            ["ssh", "-i", str(self.network.key), "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null",
             "-o", "LogLevel=ERROR", f"root@{self.address}", f". ~/.bashrc; {command}"],
            capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr


class Network:
    """Machines on one network, with this machine on it as well."""

    def __init__(self, folder: Path, number: int = 77) -> None:
        self.folder, self.name = folder, f"lf{os.getpid() % 10000}"
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
            while not answers(22, self.hosts[name].address):
                assert time.monotonic() < deadline, (self.folder / f"{self.name}-{name}.log").read_text()
                time.sleep(0.1)

    def close(self) -> None:
        for host in self.hosts.values():
            with suppress(ProcessLookupError):
                os.killpg(host.process.pid, signal.SIGKILL)
            host.process.wait()
            subprocess.run(["ip", "netns", "del", host.name], capture_output=True)
        subprocess.run(["ip", "link", "del", self.bridge], capture_output=True)


def answering_from(host: Host, address: str, ports: list[int]) -> list[int]:
    """Those of the ports of an address to which a connection can be made from a host."""
    script = "import socket, sys\nfor port in map(int, sys.argv[2:]):\n"
    script += " try: socket.create_connection((sys.argv[1], port), timeout=1.5).close(); print(port)\n"
    script += " except OSError: pass"
    command = ["ip", "netns", "exec", host.name, sys.executable, "-c", script, address, *map(str, ports)]
    return [int(port) for port in _run(*command).split()]


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": PATH})
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
    return done.stdout
