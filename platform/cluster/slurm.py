"""Batch scripts for Slurm: a linflab command on one node, or on the Ray cluster of several nodes.

On several nodes, `ray symmetric-run` starts Ray on each node, runs the command on the first one, and stops Ray.
"""

import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from linflab.platform.cluster.tracking_server import MODULE as SERVER_MODULE
from linflab.platform.errors import InputError
from linflab.platform.source import IMPORT_VAR

STOP_TIMEOUT_S = 30  # for Ray on all nodes
TASK = "$SLURM_ARRAY_TASK_ID"
# Options of sbatch that `Allocation` sets itself, or on which the script relies.
OWN_OPTIONS = (
    "array", "chdir", "cpus-per-task", "error", "exclusive", "gpus-per-node", "job-name", "no-requeue", "nodes",
    "ntasks", "ntasks-per-node", "open-mode", "output", "requeue", "signal", "time",
)  # fmt: skip


@dataclass(frozen=True)
class Allocation:
    """Resources of a job, and how it ends.

    Attributes:
        nodes: Number of nodes.
        gpus_per_node: Number of GPUs of each node.
        cpus_per_node: Number of CPUs of each node; None for whole nodes.
        time: Time limit, as HH:MM:SS or D-HH:MM:SS.
        stop_before: Seconds before the time limit at which the command is stopped.
        max_requeues: Number of times that the job is requeued after its time limit.
        array: Setting and task numbers of an array job, as in seed=0-4; empty for a single job.
        options: Other options of sbatch, without the leading dashes, such as account=NAME.

    Raises:
        InputError: If a value is not valid.
    """

    nodes: int
    gpus_per_node: int
    cpus_per_node: int | None
    time: str
    stop_before: int
    max_requeues: int
    array: str = ""
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        limit = _seconds(self.time)
        if limit <= self.stop_before:
            raise InputError(
                f"stop-before={self.stop_before}: must be less than time={self.time}; use a longer time limit, or stop "
                "the command later"
            )
        if self.array and not re.fullmatch(r"[\w.]+=\d+(-\d+(:\d+)?)?(,\d+(-\d+(:\d+)?)?)*(%\d+)?", self.array):
            raise InputError(f"array={self.array}: must be SETTING=NUMBERS; use seed=0-4 or model.width=64,128,256")
        for option in self.options:
            name = option.partition("=")[0]
            if not re.fullmatch(r"[a-z][a-z-]*(=[^\n]+)?", option):
                raise InputError(
                    f"sbatch={option}: must be a long option of sbatch without its dashes; use mail-type=END, for "
                    "example"
                )
            if name in OWN_OPTIONS:
                raise InputError(
                    f"sbatch={option}: --{name} is set by linflab; leave it out, and use options of linflab such as "
                    "--nodes or --cpus-per-node"
                )

    @property
    def uses_whole_nodes(self) -> bool:
        """Whether the job has its nodes for itself; Ray requires that on several nodes."""
        return self.nodes > 1 or self.cpus_per_node is None

    @property
    def setting(self) -> str:
        """Setting that the tasks of an array job vary; empty for a single job."""
        return self.array.partition("=")[0]

    @property
    def tasks(self) -> list[int]:
        """Numbers of the tasks of an array job, of each range only the first and the last."""
        numbers: dict[int, None] = {}
        for part in filter(None, self.array.partition("=")[2].partition("%")[0].split(",")):
            first, _, rest = part.partition("-")
            last, _, step = rest.partition(":")
            tasks = range(int(first), int(last or first) + 1, max(1, int(step or 1)))
            if not tasks:
                raise InputError(f"array={self.array}: ranges must begin with the smaller number; use seed=0-4")
            numbers |= dict.fromkeys((tasks[0], tasks[-1]))
        return list(numbers)

    def directives(self) -> list[str]:
        """Return the options of sbatch, without the leading dashes."""
        lines = [f"nodes={self.nodes}", "ntasks-per-node=1", f"time={self.time}"]
        lines += ["exclusive"] if self.uses_whole_nodes else []
        has_memory = any(option.startswith("mem") for option in self.options)
        lines += ["mem=0"] if self.uses_whole_nodes and not has_memory else []  # 0: all memory of the node
        lines += [f"cpus-per-task={self.cpus_per_node}"] if self.cpus_per_node else []
        lines += [f"gpus-per-node={self.gpus_per_node}"] if self.gpus_per_node else []
        lines += [f"array={self.array.partition('=')[2]}"] if self.array else []
        lines += [f"signal=B:USR1@{self.stop_before}", "requeue", "open-mode=append"]
        return [*lines, *self.options]


@dataclass(frozen=True)
class Job:
    """A linflab command as a batch job.

    Attributes:
        name: Name of the job, and beginning of the names of its script and log.
        storage: Absolute path of the storage directory, on a file system that all nodes share.
        tracking_server: URI of an MLflow server to use; None for the storage's database.
        data_dir: Absolute path of the datasets.
        command: Arguments of `linflab`, without the option --storage.
        resume: Arguments of the command that resumes it.
        is_started: Bash condition under which the job resumes.
        advice: How to resume once the job is not requeued any more.
        resumes_own_runs: Whether a training resumes only a run that the job started, not the latest one with its
            settings.
    """

    name: str
    storage: Path
    tracking_server: str | None
    data_dir: Path
    command: tuple[str, ...]
    resume: tuple[str, ...]
    is_started: str
    advice: str
    resumes_own_runs: bool = False


def _seconds(time: str) -> int:
    match = re.fullmatch(r"(?:(\d+)-)?(\d{1,2}):(\d\d):(\d\d)", time)
    if match is None:
        raise InputError(f"time={time}: must be HH:MM:SS or D-HH:MM:SS; use 12:00:00, for example")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def write_script(job: Job, allocation: Allocation) -> Path:
    """Write the batch script of a job to the storage's folder `slurm/`, and return its path.

    A script with other content is kept, since it may still be submitted; the new script's name then ends in a number.

    Raises:
        InputError: If the script cannot be written.
    """
    folder, script = job.storage / "slurm", batch_script(job, allocation)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = (f"{job.name}{f'-{number}' if number > 1 else ''}.sh" for number in itertools.count(1))
        return next(folder / name for name in names if _create(folder / name, script))
    except OSError as error:
        raise InputError(f"storage={job.storage}: must be writable ({error}); use another folder") from None


def _create(path: Path, text: str) -> bool:
    """Write a file unless it exists, and return whether it has this text."""
    try:
        with path.open("x") as file:
            file.write(text)
    except FileExistsError:
        return path.read_text() == text
    return True


def log_file(job: Job, allocation: Allocation, number: str) -> Path:
    """Return the path of the output of a job with this number; Slurm replaces %a by the number of the task."""
    return job.storage / "slurm" / f"{job.name}-{number}{'_%a' if allocation.array else ''}.log"


def batch_script(job: Job, allocation: Allocation) -> str:
    """Return the batch script of a job."""
    log = log_file(job, allocation, "%A" if allocation.array else "%j")
    directives = [f"job-name={job.name}", f"chdir={Path.cwd()}", f"output={log}", *allocation.directives()]
    values = {
        "directives": "\n".join(f"#SBATCH --{_quote_directive(line)}" for line in directives),
        "bin": shlex.quote(str(Path(sys.executable).parent)),
        "data": shlex.quote(str(job.data_dir)),
        "imports": _export_imports(),
        "server": f"export LINFLAB_TRACKING_URI={shlex.quote(job.tracking_server)}\n" if job.tracking_server else "",
        "log": shlex.quote(str(job.storage / "slurm" / job.name)),
        "storage": shlex.quote(str(job.storage)) + _task_folder(job, allocation),
        "command": _quote(job.command),
        "resume": _quote(job.resume),
        "is_started": job.is_started,
        "start": _START_ON_NODES if allocation.nodes > 1 else _START_HERE,
        "tracked": "" if job.tracking_server else f' python -m {SERVER_MODULE} run "$storage" "${{head%:*}}"',
        "tracking_token": "" if job.tracking_server else " MLFLOW_TRACKING_TOKEN=$RAY_AUTH_TOKEN",
        "nodes": str(allocation.nodes),
        "gpus": str(allocation.gpus_per_node),
        "stop_timeout": str(STOP_TIMEOUT_S),
        "max_requeues": str(allocation.max_requeues),
        "own_job": "$task" if job.resumes_own_runs else "",
        "advice": shlex.quote(job.advice),
    }
    return re.sub(r"@(\w+)@", lambda match: values[match[1]], re.sub("@start@", lambda _: values["start"], _SCRIPT))


def _export_imports() -> str:
    """Return the lines that name modules of the user, and the folders of PYTHONPATH, where they are found."""
    modules, paths = os.environ.get(IMPORT_VAR, "").strip(), os.environ.get("PYTHONPATH", "")
    if not modules:
        return ""
    folders = os.pathsep.join(os.path.abspath(path) for path in paths.split(os.pathsep)) if paths else ""
    search = f"export PYTHONPATH={shlex.quote(folders)}\n" if folders else ""
    return f"export {IMPORT_VAR}={shlex.quote(modules)}\n{search}"


def _task_folder(job: Job, allocation: Allocation) -> str:
    """Return the part of the path of an array task's storage; each task writes its own database."""
    return f"/{allocation.setting}-{TASK}" if allocation.array and job.tracking_server is None else ""


def _quote_directive(option: str) -> str:
    """Return an option of sbatch for a line of the script; sbatch accepts double quotes."""
    name, equals, value = option.partition("=")
    return f'{name}="{value}"' if re.search(r"\s", value) else f"{name}{equals}{value}"


def _quote(words: Sequence[str]) -> str:
    """Quote words for bash, except the number of the array task, which bash inserts."""
    return shlex.join(words).replace(TASK, f"'\"{TASK}\"'")  # it is within single quotes, since it contains $


def submit(script: Path) -> str:
    """Submit a batch script and return the id of the job.

    Raises:
        InputError: If Slurm is not installed, or rejects the job.
    """
    if shutil.which("sbatch") is None:
        raise InputError(f"submit: sbatch not found; submit {script} on a login node of a Slurm cluster")
    result = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True)
    if result.returncode:
        raise InputError(f"submit: {script} was rejected ({' '.join(result.stderr.split())[:300]}); change the options")
    return result.stdout.strip().split(";")[0]  # JOB or JOB;CLUSTER


_START_HERE = """\
"${command[@]}" &
job=$!
"""

_START_ON_NODES = """\
# Ray, and MLflow if this job starts it, accept only this job's processes, since other users do not know the token.
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN@tracking_token@
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=${RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT:-180}
# Address of this node, the first one. If other nodes cannot reach it, set LINFLAB_HEAD to another address of this node.
head=${LINFLAB_HEAD:-$(python -c 'import ray; print(ray.util.get_node_ip_address())')}
ask_ports() {
    python -c "from linflab.platform.cluster import ports; import sys; print(ports.$1(sys.argv[1]))" "$head"
}
no_proxy=$(ask_ports no_proxy_with) && port=$(ask_ports find_free_port) || exit
head=$head:$port
# On all nodes: workers reach MLflow without the HTTP proxy. Ray neither kills processes when memory is low, nor hides
# the GPUs from workers that request none (see linflab.platform.distributed.train).
export no_proxy NO_PROXY=$no_proxy RAY_memory_monitor_refresh_ms=0 RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0
ray_log=${log%.log}-ray.log
echo "Output of Ray: $ray_log"
run_on_first_node() {
    exec >> "$log" 2>&1
    RAY_ADDRESS=$head@tracked@ "$@" &
    echo $! > "$state/pid"
    wait $!
    echo $? > "$state/status"
}
start_ray() {
    exec >> "$ray_log" 2>&1
    if [ "$SLURM_PROCID" != 0 ]; then  # Ray itself would notice only after a minute that the first node has stopped
        (until [ -e "$state/status" ]; do sleep 1; done; ray stop --force) &
    fi
    exec ray symmetric-run --address "$head" --min-nodes @nodes@ --num-cpus "$SLURM_CPUS_ON_NODE" --num-gpus @gpus@ \\
        --disable-usage-stats -- bash -c 'run_on_first_node "$@"' linflab "$@"
}
export head log ray_log state storage
export -f run_on_first_node start_ray
srun --cpu-bind=none bash -c 'start_ray "$@"' linflab "${command[@]}" &
job=$!
"""

_SCRIPT = """\
#!/bin/bash
@directives@

export PATH=@bin@:$PATH LINFLAB_DATA=@data@ PYTHONUNBUFFERED=1
unset RAY_ADDRESS  # the job starts its own Ray
@imports@@server@task=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
export LINFLAB_SLURM_JOB=@own_job@
log=@log@-$task.log
storage=@storage@
state=$storage/slurm-$SLURM_JOB_ID
rm -rf "$state"
mkdir -p "$state"
trap 'rm -rf "$state"' EXIT
command=(linflab @command@ --storage "$storage")
if @is_started@; then
    command=(linflab @resume@ --storage "$storage")
fi

# Slurm sends this signal before the time limit. The command then writes its state and ends with a status that is not 0.
at_limit=
stop_at_limit() {
    at_limit=yes
    echo "Time limit of job $task: stopping the command."
    kill -TERM "$(cat "$state/pid" 2> /dev/null || echo "$job")" 2> /dev/null
}
trap stop_at_limit USR1
trap : TERM  # when the job is canceled, Slurm sends SIGTERM to all its processes; wait for them

@start@
stopping=0  # seconds since the end of the command, in which Ray stops
while kill -0 "$job" 2> /dev/null && [ "$stopping" -lt @stop_timeout@ ]; do
    [ ! -s "$state/status" ] || stopping=$((stopping + 1))
    sleep 1
done
status=$(cat "$state/status" 2> /dev/null) || { wait "$job"; status=$?; }
if [ -n "$at_limit" ] && [ "$status" -ne 0 ]; then
    if [ "${SLURM_RESTART_COUNT:-0}" -lt @max_requeues@ ]; then
        echo "Requeueing job $task, which resumes."
        scontrol requeue "$task"
    else
        echo "Not requeued, since the job has restarted ${SLURM_RESTART_COUNT:-0} times; to resume," @advice@.
    fi
fi
exit "$status"
"""
