"""Access from your machine to a cluster started by `ray up`: ssh tunnels to the head node, and jobs.

From outside, only the ssh port of a cluster is reachable. The tunnels lead to Ray's dashboard and to the MLflow server.
The dashboard accepts jobs that are sent with the cluster's token. The MLflow server holds the tracking store.
"""

import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from linflab.platform import signals
from linflab.platform.cluster.ports import DASHBOARD_PORT, MLFLOW_PORT, find_free_port, is_listening
from linflab.platform.errors import InputError, RunInterrupted, TrainingError
from linflab.platform.source import COMMIT_VAR, SOURCE_HASH_VAR, copy_source, git_commit, source_hash
from linflab.search_spaces.strict_yaml import read_mapping

if TYPE_CHECKING:
    from ray.job_submission import JobStatus, JobSubmissionClient

CONNECT_TIMEOUT_S = 30.0
JOB_SUFFIX = 6  # hexadecimal digits behind the name of a command in the id of its job
TOKEN = Path("~/.ray/auth_token")
# Script that prints the head node's address and ssh settings as its last line, after messages of Ray.
_HEAD_LOOKUP_SCRIPT = """
import json, sys, yaml
from ray.autoscaler._private.commands import _bootstrap_config
from ray.autoscaler.sdk import get_head_node_ip
address = get_head_node_ip(sys.argv[1])
print(json.dumps([address, _bootstrap_config(yaml.safe_load(open(sys.argv[1])))["auth"]]))
"""


def cluster_file() -> tuple[Path, dict[str, Any]]:
    """Return path and content of the cluster file: the one in LINFLAB_CLUSTER, or ./cluster.yaml.

    Raises:
        InputError: If the file is not found or not a cluster file.
    """
    path = Path(os.environ.get("LINFLAB_CLUSTER") or "cluster.yaml")
    try:
        path = path.expanduser().absolute()
        content = read_mapping(path)
    except FileNotFoundError:
        raise InputError(
            f"cluster={path}: file not found; run the command in the repository's root, or set LINFLAB_CLUSTER to the "
            "cluster file"
        ) from None
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: ~ of an unknown user
        raise InputError(
            f"cluster={path}: cannot be read ({' '.join(str(error).split())}); set LINFLAB_CLUSTER to another file"
        ) from None
    if "provider" not in content:
        raise InputError(
            f"cluster={path}: must be a file for `ray up`, but provider is missing; set LINFLAB_CLUSTER to another file"
        )
    return path, content


@dataclass(frozen=True)
class _HeadNode:
    """Address and ssh settings of the head node."""

    address: str
    user: str
    key: str
    proxy: str = ""

    @classmethod
    def find(cls, path: Path, content: dict[str, Any]) -> "_HeadNode":
        """Return the head node: from the cluster file if its nodes are on-premise, otherwise from Ray.

        Raises:
            InputError: If no head node is running.
        """
        provider, auth = content["provider"], content.get("auth", {})
        if provider.get("type") == "local" and "head_ip" in provider:
            address = provider.get("external_head_ip", provider["head_ip"])
        else:
            lookup = subprocess.run(
                [sys.executable, "-c", _HEAD_LOOKUP_SCRIPT, str(path)], capture_output=True, text=True
            )
            if lookup.returncode:
                reason = lookup.stderr.strip().splitlines()[-1][:300] if lookup.stderr.strip() else "no message"
                raise InputError(f"cluster={path}: head node not found ({reason}); start it with `ray up`")
            address, auth = json.loads(lookup.stdout.splitlines()[-1])
        return cls(address, auth["ssh_user"], auth.get("ssh_private_key", ""), auth.get("ssh_proxy_command") or "")

    def ssh(self) -> list[str]:
        """Return the ssh command for a tunnel, without the option that forwards a port."""
        # Accept any host key, as Ray does, but do not reuse Ray's ssh connection.
        options = {"StrictHostKeyChecking": "no", "UserKnownHostsFile": os.devnull, "LogLevel": "ERROR"}
        options |= {"BatchMode": "yes", "ConnectTimeout": "20", "ExitOnForwardFailure": "yes"}
        options |= {"ServerAliveInterval": "5", "ServerAliveCountMax": "3", "ControlPath": "none"}
        options |= {"ProxyCommand": self.proxy} if self.proxy else {}
        flags = [flag for name, value in options.items() for flag in ("-o", f"{name}={value}")]
        key = ["-o", "IdentitiesOnly=yes", "-i", str(Path(self.key).expanduser())] if self.key else []
        return ["ssh", "-N", *flags, *key, f"{self.user}@{self.address}"]


@contextmanager
def ssh_tunnel(port: int, local: int | None = None) -> Iterator[int]:
    """Open an ssh tunnel to a port of the head node; close it on exit.

    A signal raises KeyboardInterrupt in the block, as in `signals.guarded`, so that ssh is terminated too.

    Args:
        port: Port of the head node.
        local: Port of this machine; by default, any free port.

    Yields:
        The port of this machine.

    Raises:
        InputError: If the cluster is not reachable.
    """
    path, content = cluster_file()
    local_port = local if local is not None else find_free_port()
    command = [*_HeadNode.find(path, content).ssh(), "-L", f"127.0.0.1:{local_port}:127.0.0.1:{port}"]
    signals.watch_again()  # imports may have replaced handlers
    with signals.guarded(), tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        except OSError as error:
            raise InputError(f"cluster={path}: requires ssh ({error}); install an ssh client") from None
        try:
            with signals.owned(process), _terminate_on_signal(process):
                deadline = time.monotonic() + CONNECT_TIMEOUT_S
                while not is_listening(local_port):
                    if process.poll() is not None or time.monotonic() > deadline:
                        output.seek(0)
                        reason = " ".join(output.read().decode(errors="replace").split())[-300:]
                        raise InputError(
                            f"cluster={path}: ssh to the head node failed ({reason}); start it with `ray up`"
                        )
                    time.sleep(0.1)
                yield local_port
        finally:
            process.terminate()
            process.wait()


@contextmanager
def _terminate_on_signal(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """Terminate `process` on signals that end this process at once, such as SIGHUP of a closed terminal.

    Signals that `linflab.platform.signals` handles keep their handlers.
    """

    def terminate(number: int, frame: FrameType | None) -> None:
        process.terminate()
        signal.signal(number, signal.SIG_DFL)  # no exception, since running code could catch it
        os.kill(os.getpid(), number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.SIGHUP] if signals.is_watching() else [signal.SIGTERM, signal.SIGHUP]
    numbers = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]  # such as under nohup
    previous_handlers = {number: signal.signal(number, terminate) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)


@contextmanager
def tracking_server_tunnel(local: int | None = None) -> Iterator[str]:
    """Open an ssh tunnel to the cluster's MLflow server; close it on exit.

    Args:
        local: Port of this machine; by default, any free port.

    Yields:
        URI of the MLflow server through the tunnel.

    Raises:
        InputError: If the cluster is not reachable.
    """
    with ssh_tunnel(MLFLOW_PORT, local) as port:
        yield f"http://127.0.0.1:{port}"


def is_job_of(job: str, name: str) -> bool:
    """Return True if the id of a Ray job is one that `run_on_cluster` gives to commands of this name."""
    return re.fullmatch(rf"{re.escape(name)}-[0-9a-f]{{{JOB_SUFFIX}}}", job) is not None


def run_on_cluster(
    command: Sequence[str], name: str, files: Mapping[str, str], width: int, show: Callable[[str], None]
) -> None:
    """Run a linflab command as a Ray job on the head node, with the local source code; show its output.

    Args:
        command: Arguments of `linflab`.
        name: Prefix of the job's name.
        files: Files for the job's working directory: contents by file name.
        width: Width of the output in columns.
        show: Called with new output, and with lines about the job.

    Raises:
        InputError: If the cluster is not reachable or does not accept the job.
        TrainingError: If the command failed on the cluster.
        RunInterrupted: If the user stopped the view, the connection was lost, or the job was stopped.
    """
    from ray.job_submission import JobStatus

    logging.getLogger("ray.dashboard.modules.dashboard_sdk").setLevel(logging.WARNING)  # logs each upload
    logging.getLogger("ray._private.runtime_env.packaging").setLevel(logging.WARNING)
    (path, _), job = cluster_file(), f"{name}-{uuid.uuid4().hex[:JOB_SUFFIX]}"
    run = shlex.join(["linflab", *command])
    on_head = f"ray exec {os.environ.get('LINFLAB_CLUSTER') or path.name}"
    view = f"show it with `{on_head} 'ray job logs --follow {job}'`"
    advice = f"{view}, stop it with `{on_head} 'ray job stop {job}'`"
    is_submitted = False
    try:
        with signals.guarded(f"job {job} continues if it was submitted; {advice}"):
            _submit(run, job, files, path, width)
            is_submitted = True
            show(f"Submitted to the cluster as job {job}. Ctrl-C stops this view, but not the job.\n")
            status = _stream_logs(job, show)
    except KeyboardInterrupt:
        state = f"job {job} continues" if is_submitted else f"job {job} continues if it was submitted"
        raise RunInterrupted(f"{state}; {advice}") from None
    if status is None:
        raise RunInterrupted(f"connection to the cluster lost; job {job} continues if the head node is up; {view}")
    if status == JobStatus.STOPPED:
        raise RunInterrupted(f"job {job} was stopped; logged data is kept")
    if status == JobStatus.FAILED:
        raise TrainingError(f"job {job} failed; see its output above")


def _submit(run: str, job: str, files: Mapping[str, str], path: Path, width: int) -> None:
    """Submit a job with the local source code.

    Args:
        run: Shell command.
        job: Id of the job.
        files: Files for the job's working directory: contents by file name.
        path: The cluster file.
        width: Width of the output in columns.

    Raises:
        InputError: If the cluster is not reachable or does not accept the job.
    """
    from ray.exceptions import AuthenticationError, RayError
    from requests.exceptions import RequestException

    from linflab.platform.config.own_parts import copy_own_modules, own_modules
    from linflab.platform.source import IMPORT_VAR

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "files"
        folder.mkdir()
        for file, content in {"command.sh": f"{run}\n", **files}.items():
            (folder / file).write_text(content)
        copy_own_modules(folder)
        variables = {SOURCE_HASH_VAR: source_hash(), COMMIT_VAR: git_commit(), "COLUMNS": str(width)}
        if own_modules():
            variables[IMPORT_VAR] = os.environ[IMPORT_VAR]
        variables["RAY_JOB_STOP_WAIT_TIME_S"] = "120"  # time to save state after `ray job stop`
        try:
            with _dashboard() as client:
                client.submit_job(
                    # On the head node, RAY_ADDRESS has the address at which workers reach the head node.
                    entrypoint=f'LINFLAB_TRACKING_URI="http://${{RAY_ADDRESS%:*}}:{MLFLOW_PORT}" {run}',
                    submission_id=job,
                    runtime_env={
                        "working_dir": str(folder),
                        "py_modules": [str(copy_source(Path(temporary)))],
                        "env_vars": variables,
                    },
                )
        except AuthenticationError:
            raise InputError(
                f"cluster={path}: token in {TOKEN} was rejected; use the token that existed at the time of `ray up`"
            ) from None
        except (RayError, RuntimeError, ConnectionError, RequestException) as error:
            raise InputError(
                f"cluster={path}: job not accepted ({' '.join(str(error).split())[:400]}); check the head node"
            ) from None


def active_job_ids() -> list[str]:
    """Return the ids of unfinished jobs on the cluster.

    Raises:
        InputError: If the cluster is not reachable or does not answer.
    """
    from ray.exceptions import RayError
    from requests.exceptions import RequestException

    try:
        with _dashboard() as client:
            return [job.submission_id or "" for job in client.list_jobs() if not job.status.is_terminal()]
    except (RayError, RuntimeError, ConnectionError, RequestException) as error:
        raise InputError(
            f"cluster: cannot list jobs ({' '.join(str(error).split())[:300]}); check that the head node is up"
        ) from None


@contextmanager
def _dashboard() -> Iterator["JobSubmissionClient"]:
    """Open Ray's job API on the head node through a tunnel."""
    from ray.job_submission import JobSubmissionClient

    token = _token()  # fails fast without a token
    with ssh_tunnel(DASHBOARD_PORT) as port:
        yield JobSubmissionClient(f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {token}"})


def _token() -> str:
    """Return the cluster's token from the first place that has one, in the order that Ray uses.

    Raises:
        InputError: If there is no token.
    """
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or TOKEN).expanduser()
    with suppress(OSError):
        if token := (os.environ.get("RAY_AUTH_TOKEN") or path.read_text()).strip():
            return token
    raise InputError(
        f"cluster: token {path} not found; run `ray get-auth-token --generate`, then `ray up` to copy it to the cluster"
    )


def _stream_logs(job: str, show: Callable[[str], None]) -> "JobStatus | None":
    """Show the output of a job until it ends and return its status; None if the connection is lost."""
    from ray.exceptions import RayError
    from requests.exceptions import RequestException

    num_shown, last_response = 0, time.monotonic()
    while time.monotonic() - last_response < CONNECT_TIMEOUT_S:
        with suppress(RayError, RuntimeError, ConnectionError, RequestException, InputError), _dashboard() as client:
            while True:
                status = client.get_job_status(job)
                text = client.get_job_logs(job)
                last_response = time.monotonic()
                if len(text) > num_shown:
                    show(text[num_shown:])
                    num_shown = len(text)
                if status.is_terminal():
                    return status
                time.sleep(1)
        time.sleep(2)
    return None
