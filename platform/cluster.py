"""A cluster that `ray up` started, from the user's machine: ssh tunnels to its head, and jobs that are sent there.

Nothing of a cluster is open but ssh. Through a tunnel go Ray's dashboard, which takes jobs from those who have the
token, and MLflow's server, which has the record.
"""

import logging
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from rich.console import Console

from linflab.platform.errors import Interrupted, SettingError, TrainingError
from linflab.platform.node import RECORD_PORT
from linflab.platform.shipping import CODE, COMMIT, code_digest, copy_code, git_commit

if TYPE_CHECKING:
    from ray.job_submission import JobStatus, JobSubmissionClient

DASHBOARD_PORT = 8265
SECONDS_TO_CONNECT = 60.0
TOKEN = Path("~/.ray/auth_token")
_TUNNEL = "import sys; from ray.autoscaler.sdk import run_on_cluster; from json import loads; "
_TUNNEL += "run_on_cluster(sys.argv[1], port_forward=[tuple(pair) for pair in loads(sys.argv[2])])"


def cluster_file() -> Path:
    """The file that describes the cluster: what LINFLAB_CLUSTER names, or ./cluster.yaml.

    Raises:
        SettingError: there is none, or it is no description of a cluster.
    """
    path = Path(os.environ.get("LINFLAB_CLUSTER") or "cluster.yaml").expanduser().absolute()
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SettingError(
            f"cluster={path}: can't be read ({' '.join(str(error).split())}); LINFLAB_CLUSTER names another file"
        ) from None
    if not isinstance(content, dict) or "provider" not in content:
        raise SettingError(f"cluster={path}: is no file for `ray up` (it has no provider)")
    return path


@contextmanager
def tunnel(*ports: int, local: int | None = None) -> Iterator[list[int]]:
    """ssh tunnels to ports of the cluster's head, while it lasts: the ports of this machine that lead there.

    Args:
        local: the port of this machine for the first one; any that is free if left out.

    Raises:
        SettingError: the cluster can't be reached.
    """
    path = cluster_file()
    entrances = [local if local is not None and not place else _free_port() for place in range(len(ports))]
    pairs = [[here, there] for here, there in zip(entrances, ports, strict=True)]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [sys.executable, "-c", _TUNNEL, str(path), str(pairs)],
            stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + SECONDS_TO_CONNECT
            while not all(map(_open, entrances)):
                if process.poll() is not None or time.monotonic() > deadline:
                    said.seek(0)
                    reason = " ".join(said.read().decode(errors="replace").split())[-300:]
                    raise SettingError(
                        f"cluster={path}: can't be reached by ssh ({reason}); `ray up {path.name}` starts it"
                    )
                time.sleep(0.2)
            yield entrances
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def record(local: int | None = None) -> Iterator[str]:
    """A tunnel to the cluster's record, while it lasts: the URI of its MLflow server from here.

    Raises:
        SettingError: the cluster can't be reached.
    """
    with tunnel(RECORD_PORT, local=local) as (port,):
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
    from ray.job_submission import JobStatus, JobSubmissionClient

    logging.getLogger("ray.dashboard.modules.dashboard_sdk").setLevel(logging.WARNING)  # each package that goes
    logging.getLogger("ray._private.runtime_env.packaging").setLevel(logging.WARNING)
    path, token, job = cluster_file(), _token(), f"{name}-{uuid.uuid4().hex[:6]}"
    run = shlex.join(["linflab", *command])
    with tunnel(DASHBOARD_PORT) as (port,), tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "files"
        folder.mkdir()
        for file, content in {"command.sh": f"{run}\n", **files}.items():
            (folder / file).write_text(content)
        try:
            client = JobSubmissionClient(f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {token}"})
            client.submit_job(
                # on the head, Ray says where the head is as the workers see it
                entrypoint=f'LINFLAB_MLFLOW="http://${{RAY_ADDRESS%:*}}:{RECORD_PORT}" {run}',
                submission_id=job,
                runtime_env={
                    "working_dir": str(folder),
                    "py_modules": [str(copy_code(Path(temporary)))],
                    "env_vars": {CODE: code_digest(), COMMIT: git_commit(), "COLUMNS": str(console.width)},
                },
            )
        except AuthenticationError:
            raise SettingError(
                f"cluster={path}: does not accept the token in {TOKEN}; it knows the one that was there at `ray up`"
            ) from None
        except (RayError, RuntimeError, ConnectionError, ValueError) as error:
            raise SettingError(f"cluster={path}: takes no job ({' '.join(str(error).split())[:400]})") from None
        console.print(f"Sent to the cluster, as job {job}. Ctrl-C ends this view of it, not the job.")
        on_head = f"ray exec {os.environ.get('LINFLAB_CLUSTER') or path.name}"
        view = f"`{on_head} 'ray job logs --follow {job}'` shows it"
        try:
            status = _follow(client, job, console)
        except KeyboardInterrupt:
            raise Interrupted(f"job {job} goes on; {view}, `{on_head} 'ray job stop {job}'` ends it") from None
        if status is None:
            raise Interrupted(f"the connection to the cluster is lost; if its head runs, so does job {job}: {view}")
        if status == JobStatus.STOPPED:
            raise Interrupted(f"job {job} was stopped; what was recorded is kept")
        if status == JobStatus.FAILED:
            raise TrainingError(f"job {job} failed; its last lines are above")


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


def _follow(client: "JobSubmissionClient", job: str, console: Console) -> "JobStatus | None":
    """Print what a job prints until it ends; None where the cluster has not answered for a minute."""
    shown, heard = 0, time.monotonic()
    while True:
        try:
            status = client.get_job_status(job)
            text = client.get_job_logs(job)
        except (RuntimeError, ConnectionError):
            if time.monotonic() - heard > SECONDS_TO_CONNECT:
                return None
            time.sleep(2)
            continue
        heard = time.monotonic()
        if len(text) > shown:
            console.print(text[shown:], end="")
            shown = len(text)
        if status.is_terminal():
            return status
        time.sleep(1)
