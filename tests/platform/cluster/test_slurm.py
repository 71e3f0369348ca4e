"""`linflab slurm` on a real Slurm with a login node and two compute nodes, which are simulated machines."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from linflab.platform.tracking.storage import Storage
from linflab.reports import schema
from linflab.reports.records import read_runs, read_trials
from tests.conftest import RECIPE
from tests.platform.cluster.hosts import find_missing_requirements
from tests.platform.cluster.slurm import CPUS, GPUS, SlurmCluster, find_missing_daemons

pytestmark = pytest.mark.slurm
TRIALS = 8
SHORT = ["training.checkpoint_interval=1", "evaluation.attack.steps=5", "evaluation.attack.restarts=1"]
SWEEP = [RECIPE, "demo", *SHORT, "training.epochs=40", "--budget", str(TRIALS), "--sampler", "random"]
# A worker with all CPUs of a node, so that the second worker is on the other node.
TRAINING = [RECIPE, *SHORT, "training.epochs=15", "compute.workers=2", f"compute.cpus_per_worker={CPUS}"]
TWO_NODES = ["--nodes", "2", "--time", "00:20:00", "--stop-before", "150"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    if reason := find_missing_requirements() or find_missing_daemons():
        pytest.skip(reason)
    cluster = SlurmCluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.network.close()


def count_checkpoints(storage: Path) -> int:
    return len(list(storage.glob("checkpoints/*/latest.pt")))


def read_table(storage: Path) -> str:
    """Return the table of a sweep: configurations, results and commands in order, without times and ids."""
    return (storage / "reports" / "sweep-cut.csv").read_text()


def test_sweep_at_time_limit_resumes_with_same_table(cluster: SlurmCluster) -> None:
    storage = cluster.shared / "sweep"
    number = cluster.submit("sweep", *SWEEP, "--name", "cut", *TWO_NODES, "--storage", str(storage))
    cluster.wait_for(lambda: count_checkpoints(storage) > 0, 400)
    # Slurm checks time limits every 30 seconds, and sends the signal up to 30 seconds early.
    limit = cluster.minutes(number) + 2
    cluster.run("scontrol", "update", f"JobId={number}", f"TimeLimit={limit}")
    cluster.wait_for(lambda: cluster.job(number)["Restarts"] == "1", 300)
    trials = read_trials(Storage(storage).tracking_uri, "cut")
    assert (trials["status"] != "FINISHED").any() or len(trials) < TRIALS, "the sweep was not cut"
    cluster.run("scontrol", "update", f"JobId={number}", "TimeLimit=20")
    undisturbed = cluster.shared / "undisturbed"
    cluster.run("linflab", "sweep", *SWEEP, "--name", "cut", "--storage", str(undisturbed))
    cluster.wait_until_completed(number, 500)
    assert len(read_trials(Storage(storage).tracking_uri, "cut")) == TRIALS
    assert read_table(storage) == read_table(undisturbed)


def test_canceled_training_leaves_no_process_and_resumes(cluster: SlurmCluster) -> None:
    storage = cluster.shared / "training"
    arguments = ["train", *TRAINING, *TWO_NODES, "--storage", str(storage)]
    canceled = cluster.submit(*arguments)
    cluster.wait_for(lambda: count_checkpoints(storage) > 0, 400)
    assert any("gcs_server" in line for line in cluster.processes())
    cluster.run("scancel", canceled)
    cluster.wait_for(lambda: cluster.processes() == [], 60)
    resumed = cluster.submit(*arguments, "--resume")
    cluster.wait_until_completed(resumed, 500)
    (run,) = read_runs(Storage(storage).tracking_uri, {schema.KIND: "trial"}).to_dict("records")
    assert run["status"] == "FINISHED"
    assert f"Resuming run {run['run_id']}" in cluster.log()
    cluster.wait_for(lambda: cluster.processes() == [], 60)


def test_array_job_trains_one_seed_per_task(cluster: SlurmCluster) -> None:
    storage = cluster.shared / "array"
    number = cluster.submit(
        "train", RECIPE, *SHORT, "training.epochs=1", "--array", "seed=3-4", "--cpus-per-node", "1",
        "--time", "00:10:00", "--storage", str(storage),
    )  # fmt: skip
    for task in (3, 4):
        cluster.wait_until_completed(f"{number}_{task}", 400)
        (run,) = read_runs(Storage(storage / f"seed-{task}").tracking_uri, {schema.KIND: "trial"}).to_dict("records")
        assert run["status"] == "FINISHED" and run["seed"] == str(task)


def test_gpus_are_requested_on_each_node(cluster: SlurmCluster) -> None:
    arguments = [
        "slurm",
        "train",
        RECIPE,
        "--nodes",
        "2",
        "--time",
        "00:10:00",
        "--storage",
        str(cluster.shared / "gpus"),
    ]
    cluster.run("linflab", *arguments, "--gpus-per-node", str(len(GPUS)))
    (script,) = (cluster.shared / "gpus" / "slurm").glob("*.sh")
    cluster.run("sbatch", "--test-only", str(script))
    rejected = cluster.run("linflab", *arguments, "--gpus-per-node", str(len(GPUS) + 1), "--submit", check=False)
    assert rejected.startswith("linflab: ") and str(script.with_suffix("")) in rejected and "\n" not in rejected
