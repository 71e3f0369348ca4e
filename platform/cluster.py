"""A cluster that `ray up` started, from the user's machine: ssh tunnels to its head, and jobs that are sent there.

Nothing of a cluster is open but ssh. Through a tunnel go Ray's dashboard, which takes jobs from those who have the
token, and MLflow's server, which has the record.
"""

import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console

from linflab.platform.errors import Interrupted, SettingError, TrainingError
from linflab.platform.ports import DASHBOARD_PORT, RECORD_PORT, answers, free_port
from linflab.platform.shipping import CODE, COMMIT, code_digest, copy_code, git_commit

if TYPE_CHECKING:
    from ray.job_submission import JobStatus, JobSubmissionClient

SECONDS_TO_CONNECT = 30.0  # before a cluster is given up
TOKEN = Path("~/.ray/auth_token")
# asks Ray, whose own messages go before: the head's address, and how to get in
_WHERE = """
import json, sys, yaml
from ray.autoscaler._private.commands import _bootstrap_config
from ray.autoscaler.sdk import get_head_node_ip
address = get_head_node_ip(sys.argv[1])
print(json.dumps([address, _bootstrap_config(yaml.safe_load(open(sys.argv[1])))["auth"]]))
"""


def cluster_file() -> tuple[Path, dict[str, Any]]:
    """The file that describes the cluster, and what it says: what LINFLAB_CLUSTER names, or ./cluster.yaml.

    Raises:
        SettingError: there is none, or it is no description of a cluster.
    """
    path = Path(os.environ.get("LINFLAB_CLUSTER") or "cluster.yaml").expanduser().absolute()
    try:
        content = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise SettingError(
            f"cluster={path}: can't be read, since there is no such file; call it from the repository's root, or name "
            "the cluster's file in LINFLAB_CLUSTER"
        ) from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SettingError(
            f"cluster={path}: can't be read ({' '.join(str(error).split())}); LINFLAB_CLUSTER names another file"
        ) from None
    if not isinstance(content, dict) or "provider" not in content:
        raise SettingError(f"cluster={path}: is no file for `ray up` (it has no provider)")
    return path, content


@dataclass(frozen=True)
class _Head:
    """How the head is reached by ssh."""

    address: str
    user: str
    key: str
    proxy: str = ""

    @classmethod
    def find(cls, path: Path, content: dict[str, Any]) -> "_Head":
        """Of one's own machines, as the file says; else as Ray finds out.

        Raises:
            SettingError: no head runs.
        """
        provider, auth = content["provider"], content.get("auth", {})
        if provider.get("type") == "local" and "head_ip" in provider:
            address = provider.get("external_head_ip", provider["head_ip"])
        else:
            asked = subprocess.run([sys.executable, "-c", _WHERE, str(path)], capture_output=True, text=True)
            if asked.returncode:
                reason = asked.stderr.strip().splitlines()[-1][:300] if asked.stderr.strip() else "it said nothing"
                raise SettingError(f"cluster={path}: Ray finds no head ({reason}); `ray up` starts one")
            address, auth = json.loads(asked.stdout.splitlines()[-1])
        return cls(address, auth["ssh_user"], auth.get("ssh_private_key", ""), auth.get("ssh_proxy_command") or "")

    def ssh(self) -> list[str]:
        # as Ray does it, which trusts whoever answers at the address, but on a connection of its own
        options = {"StrictHostKeyChecking": "no", "UserKnownHostsFile": os.devnull, "LogLevel": "ERROR"}
        options |= {"BatchMode": "yes", "ConnectTimeout": "20", "ExitOnForwardFailure": "yes"}
        options |= {"ServerAliveInterval": "5", "ServerAliveCountMax": "3", "ControlPath": "none"}
        options |= {"ProxyCommand": self.proxy} if self.proxy else {}
        words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        key = ["-o", "IdentitiesOnly=yes", "-i", str(Path(self.key).expanduser())] if self.key else []
        return ["ssh", "-N", *words, *key, f"{self.user}@{self.address}"]


@contextmanager
def tunnel(port: int, local: int | None = None) -> Iterator[int]:
    """An ssh tunnel to a port of the cluster's head, while it lasts: the port of this machine that leads there.

    Args:
        local: the port of this machine; any that is free if left out.

    Raises:
        SettingError: the cluster can't be reached.
    """
    path, content = cluster_file()
    entrance = local if local is not None else free_port()
    command = [*_Head.find(path, content).ssh(), "-L", f"127.0.0.1:{entrance}:127.0.0.1:{port}"]
    with tempfile.TemporaryFile() as said:
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        except OSError as error:
            raise SettingError(f"cluster={path}: needs ssh ({error})") from None
        try:
            with _ended_with(process):
                deadline = time.monotonic() + SECONDS_TO_CONNECT
                while not answers(entrance):
                    if process.poll() is not None or time.monotonic() > deadline:
                        said.seek(0)
                        reason = " ".join(said.read().decode(errors="replace").split())[-300:]
                        raise SettingError(f"cluster={path}: its head can't be reached by ssh ({reason}); is it up?")
                    time.sleep(0.1)
                yield entrance
        finally:
            process.terminate()
            process.wait()


@contextmanager
def _ended_with(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """A signal that ends this process, as of a terminal that is closed, ends that one, too."""

    def leave(number: int, frame: FrameType | None) -> None:
        process.terminate()
        signal.signal(number, signal.SIG_DFL)  # no exception: what runs at the moment could take it for its own
        os.kill(os.getpid(), number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def record(local: int | None = None) -> Iterator[str]:
    """A tunnel to the cluster's record, while it lasts: the URI of its MLflow server from here.

    Raises:
        SettingError: the cluster can't be reached.
    """
    with tunnel(RECORD_PORT, local) as port:
        yield f"http://127.0.0.1:{port}"


def run_on_cluster(command: Sequence[str], name: str, files: Mapping[str, str], console: Console) -> None:
    """Run a command of linflab as a Ray job on the cluster's head, with the code that runs here; show what it prints.

    Args:
        command: what follows `linflab`.
        name: what the job's name begins with.
        files: by name, the content of files that the command finds in the folder where it runs.

    Raises:
        SettingError: the cluster can't be reached, or does not accept the job.
        TrainingError: the command failed there.
        Interrupted: the user stopped looking, or the job was stopped; says how to go on.
    """
    from ray.exceptions import AuthenticationError, RayError
    from ray.job_submission import JobStatus
    from requests.exceptions import RequestException

    logging.getLogger("ray.dashboard.modules.dashboard_sdk").setLevel(logging.WARNING)  # each package that goes
    logging.getLogger("ray._private.runtime_env.packaging").setLevel(logging.WARNING)
    (path, _), job = cluster_file(), f"{name}-{uuid.uuid4().hex[:6]}"
    run = shlex.join(["linflab", *command])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "files"
        folder.mkdir()
        for file, content in {"command.sh": f"{run}\n", **files}.items():
            (folder / file).write_text(content)
        variables = {CODE: code_digest(), COMMIT: git_commit(), "COLUMNS": str(console.width)}
        variables["RAY_JOB_STOP_WAIT_TIME_S"] = "120"  # to write down where things stand, after `ray job stop`
        try:
            with _dashboard() as client:
                client.submit_job(
                    # on the head, Ray says where the head is as the workers see it
                    entrypoint=f'LINFLAB_MLFLOW="http://${{RAY_ADDRESS%:*}}:{RECORD_PORT}" {run}',
                    submission_id=job,
                    runtime_env={
                        "working_dir": str(folder),
                        "py_modules": [str(copy_code(Path(temporary)))],
                        "env_vars": variables,
                    },
                )
        except AuthenticationError:
            raise SettingError(
                f"cluster={path}: does not accept the token in {TOKEN}; it knows the one that was there at `ray up`"
            ) from None
        except (RayError, RuntimeError, ConnectionError, RequestException) as error:
            raise SettingError(f"cluster={path}: takes no job ({' '.join(str(error).split())[:400]})") from None
    console.print(f"Sent to the cluster, as job {job}. Ctrl-C ends this view of it, not the job.")
    on_head = f"ray exec {os.environ.get('LINFLAB_CLUSTER') or path.name}"
    view = f"`{on_head} 'ray job logs --follow {job}'` shows it"
    try:
        status = _follow(job, console)
    except KeyboardInterrupt:
        raise Interrupted(f"job {job} goes on; {view}, `{on_head} 'ray job stop {job}'` ends it") from None
    if status is None:
        raise Interrupted(f"the connection to the cluster is lost; if its head runs, so does job {job}: {view}")
    if status == JobStatus.STOPPED:
        raise Interrupted(f"job {job} was stopped; what was recorded is kept")
    if status == JobStatus.FAILED:
        raise TrainingError(f"job {job} failed; its last lines are above")


def running_jobs() -> list[str]:
    """The names of jobs that have not ended on the cluster.

    Raises:
        SettingError: the cluster can't be reached, or does not answer.
    """
    from ray.exceptions import RayError
    from requests.exceptions import RequestException

    try:
        with _dashboard() as client:
            return [job.submission_id or "" for job in client.list_jobs() if not job.status.is_terminal()]
    except (RayError, RuntimeError, ConnectionError, RequestException) as error:
        raise SettingError(f"cluster: says nothing of its jobs ({' '.join(str(error).split())[:300]})") from None


@contextmanager
def _dashboard() -> Iterator["JobSubmissionClient"]:
    """Ray's job API on the head, through a tunnel."""
    from ray.job_submission import JobSubmissionClient

    token = _token()  # first: without, there is no use in asking
    with tunnel(DASHBOARD_PORT) as port:
        yield JobSubmissionClient(f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {token}"})


def _token() -> str:
    """What the cluster lets in, found where Ray finds it.

    Raises:
        SettingError: there is none.
    """
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or TOKEN).expanduser()
    with suppress(OSError):
        if token := (os.environ.get("RAY_AUTH_TOKEN") or path.read_text()).strip():
            return token
    raise SettingError(
        f"cluster: there is no token in {path}; `ray get-auth-token --generate` makes one, and `ray up` takes it there"
    )


def _follow(job: str, console: Console) -> "JobStatus | None":
    """Print what a job prints until it ends; None where the cluster has not answered for a while."""
    from ray.exceptions import RayError
    from requests.exceptions import RequestException

    shown, heard = 0, time.monotonic()
    while time.monotonic() - heard < SECONDS_TO_CONNECT:
        with suppress(RayError, RuntimeError, ConnectionError, RequestException, SettingError), _dashboard() as client:
            while True:
                status = client.get_job_status(job)
                text = client.get_job_logs(job)
                heard = time.monotonic()
                if len(text) > shown:
                    console.print(text[shown:], end="")
                    shown = len(text)
                if status.is_terminal():
                    return status
                time.sleep(1)
        time.sleep(2)
    return None
