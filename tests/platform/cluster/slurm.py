"""A Slurm cluster of simulated machines: slurmctld on one, slurmd on the others, with munge on all of them."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.platform.cluster.hosts import PATH, ROOT, Network

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "scancel", "scontrol")
NODES = ("one", "two")
CPUS = 2  # of each node
GPUS = ("/dev/null", "/dev/zero")  # of each node; Slurm only counts them
BIN = Path(sys.executable).parent


def find_missing_daemons() -> str:
    """Return what this machine lacks to run Slurm, as text; empty if it lacks nothing."""
    missing = [tool for tool in DAEMONS if shutil.which(tool, path=PATH) is None]
    return f"requires {', '.join(missing)} (Debian: slurm-wlm, munge)" if missing else ""


class SlurmCluster:
    """A login node with slurmctld, and two compute nodes that share its file system."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.network = folder, Network(folder)
        self.shared = folder / "shared"
        for directory in (self.shared, folder / "state"):
            directory.mkdir()
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o600)
        self.network.add("login", *NODES)
        self.login = self.network.hosts["login"]
        self.nodes = [self.network.hosts[name] for name in NODES]
        (folder / "gres.conf").write_text("".join(f"Name=gpu File={path}\n" for path in GPUS))
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # slurmd loads it, but nothing uses it
        (folder / "slurm.conf").write_text(self._config())

    def start(self) -> None:
        """Start the daemons, and wait until the nodes are idle."""
        folder = self.folder
        for host in self.network.hosts.values():
            host.run(f"mkdir -m 755 /run/munge && {self._daemon('munged')} --force --key-file {folder}/munge.key "
                     f"--log-file {folder}/munged-{host.name}.log --seed-file {folder}/seed-{host.name}")  # fmt: skip
        self.login.run(f"{self._daemon('slurmctld')} -c -f {folder}/slurm.conf -L {folder}/slurmctld.log")
        for host in self.nodes:
            (folder / f"spool-{host.name}").mkdir()
            host.run(
                f"{self._daemon('slurmd')} -N {host.name} -f {folder}/slurm.conf -L {folder}/{host.name}-slurmd.log"
            )
        self.wait_for(lambda: self.run("sinfo", "--noheader", "--format=%D %T") == f"{len(NODES)} idle", 60)

    @staticmethod
    def _daemon(name: str) -> str:
        return f"setsid {shutil.which(name, path=PATH)} < /dev/null > /dev/null 2>&1"

    def _config(self) -> str:
        """Return slurm.conf; without cgroups, which a virtual machine may lack."""
        options = {
            "ClusterName": "linflab", "SlurmctldHost": f"{self.login.name}({self.login.address})", "SlurmUser": "root",
            "AuthType": "auth/munge", "AuthInfo": "cred_expire=5",  # requeued jobs start after this time
            "ProctrackType": "proctrack/linuxproc", "TaskPlugin": "task/none", "ReturnToService": "2",
            "SelectType": "select/cons_tres", "SelectTypeParameters": "CR_CPU", "MpiDefault": "none",
            "SlurmdParameters": "config_overrides",  # the nodes may have fewer CPUs than this machine
            "StateSaveLocation": f"{self.folder}/state", "SlurmdSpoolDir": f"{self.folder}/spool-%n",
            "SlurmctldPidFile": "/run/slurmctld.pid", "SlurmdPidFile": "/run/slurmd.pid", "GresTypes": "gpu",
            "SchedulerParameters": "sched_interval=5",
            "MinJobAge": "3600",  # the default is 5 minutes; 0 means at once in Slurm 22.05, despite its manual
        }  # fmt: skip
        lines = [f"{name}={value}" for name, value in options.items()]
        lines += [
            f"NodeName={host.name} NodeAddr={host.address} CPUs={CPUS} Gres=gpu:{len(GPUS)}" for host in self.nodes
        ]
        lines += [f"PartitionName=all Nodes={','.join(host.name for host in self.nodes)} Default=YES MaxTime=INFINITE"]
        return "\n".join([*lines, ""])

    @property
    def environment(self) -> dict[str, str]:
        """Environment of a user on the login node."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("LINFLAB", "RAY"))}
        changed = {"SLURM_CONF": f"{self.folder}/slurm.conf", "HOME": str(self.login.home), "COLUMNS": "150"}
        return {**inherited, **changed, "PATH": f"{BIN}{os.pathsep}{PATH}", "OMP_NUM_THREADS": "1"}

    def run(self, *command: str, check: bool = True) -> str:
        """Run a command as a user on the login node; return its output."""
        (login,) = psutil.Process(self.login.process.pid).children()
        result = subprocess.run(
            ["nsenter", "--target", str(login.pid), "--mount", "--pid", "--net", "--uts", "--ipc", f"--wdns={ROOT}",
             *command],
            env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=1200, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert (result.returncode == 0) is check, result.stdout + result.stderr
        return (result.stdout + result.stderr).strip()

    def submit(self, *arguments: str) -> str:
        """Submit a job with `linflab slurm` and return its number."""
        output = self.run("linflab", "slurm", *arguments, "--submit")
        match = re.search(r"Submitted job (\d+)", output)
        assert match is not None, output
        return match[1]

    def job(self, number: str) -> dict[str, str]:
        """Return the properties of a job from `scontrol show job`."""
        shown = self.run("scontrol", "--oneliner", "show", "job", number)
        return dict(re.findall(r"(\w+)=(\S*)", shown.splitlines()[0]))

    def minutes(self, number: str) -> int:
        """Return for how many minutes a job has been running, rounded up."""
        hours, minutes, seconds = map(int, self.job(number)["RunTime"].split(":"))
        return 60 * hours + minutes + (seconds > 0)

    def log(self) -> str:
        """Return the output of all jobs, and the end of the daemons' logs, for messages of failed tests."""
        logs = [path.read_text(errors="replace") for path in sorted(self.shared.glob("*/slurm/*.log"))]
        return "\n".join([*logs, *(path.read_text()[-2000:] for path in self.folder.glob("*slurm*.log"))])

    def wait_for(self, condition: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.log()
            time.sleep(1)

    def wait_until_completed(self, number: str, seconds: float) -> None:
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.wait_for(lambda: self.job(number)["JobState"] in ended, seconds)
        assert self.job(number)["JobState"] == "COMPLETED", self.log()

    def processes(self) -> list[str]:
        """Return the processes of jobs on the compute nodes."""
        own = re.compile("ps -eo|sshd|slurmd$|slurmd -N|munged|/slurmd |^ *PID")
        lines = (line for host in self.nodes for line in host.run("ps -eo pid,args --no-headers").splitlines())
        return [line for line in lines if not own.search(line)]
