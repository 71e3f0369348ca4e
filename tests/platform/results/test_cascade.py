"""`linflab evaluate --certifier cascade`: verdicts are kept, resumed and spread over workers."""

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from mlflow.tracking import MlflowClient
from scipy.stats import binom

from linflab.models.robustness.certification.cascade import CascadeSettings
from linflab.platform.errors import InputError, RunLockedError
from linflab.platform.results.cascade import CascadeRun
from linflab.platform.results.verdicts import FILE, ImageVerdict, VerdictStore
from linflab.platform.tracking.storage import Storage
from linflab.reports import schema
from linflab.reports.intervals import proportion_interval
from tests.conftest import FinishedTraining, RunCli, assert_rejected

LIMITS = CascadeSettings(time_limit=math.inf, max_subproblems=20)  # independent of the machine's speed


def certify(weights: Path, root: Path, images: int, workers: int = 0) -> list[ImageVerdict]:
    run = CascadeRun(weights, LIMITS, images=images, workers=workers)
    with VerdictStore.open(root, run.plan) as store:
        run.certify(store, lambda record: None)
        return run.result(store).verdicts


def decisions(verdicts: list[ImageVerdict]) -> list[tuple[int, str, str]]:
    return [(one.image, one.status, one.certifier) for one in verdicts]


def test_command_prints_logs_and_keeps_verdicts(
    finished_training: FinishedTraining, run_cli: RunCli, tmp_path: Path
) -> None:
    folder = shutil.copytree(finished_training.storage, tmp_path / "runs")  # other tests count its evaluations
    run = replace(finished_training, storage=Storage.open(folder).root)
    arguments = ["evaluate", run.id, "--storage", str(run.storage), "--certifier", "cascade", "--timeout", "0.5"]
    done = run_cli(*arguments, "--images", "20", "--json", "--radii-dir", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(done.stdout)
    verdicts = result["verdicts"]
    assert (
        result["images"] == 20 and len(set(verdicts["image"])) == 20 and verdicts["image"] == sorted(verdicts["image"])
    )
    assert result["certified"] == verdicts["status"].count("certified") / 20
    assert result["certified_interval"] == list(proportion_interval(verdicts["status"].count("certified"), 20))
    with (tmp_path / "out" / "verdicts.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == verdicts["status"]
    with np.load(tmp_path / "out" / "adversarial.npz") as arrays:
        assert len(arrays.files) == verdicts["status"].count("falsified")
    metrics = MlflowClient(f"sqlite:///{run.storage}/mlflow.db").get_run(run.id).data.metrics
    assert metrics["test/certified_accuracy/cascade-sound/eps-0.1/images-20"] == result["certified"]
    data = MlflowClient(f"sqlite:///{run.storage}/mlflow.db").get_run(run.id).data
    undecided = verdicts["status"].count("unknown") / 20
    assert data.metrics[schema.TEST_VERIFIED] == result["certified"]
    assert data.tags[schema.TEST_VERIFICATION] == (
        f"20 of 360 images by cascade-sound (time limit 0.5 s): {100 * result['certified']:.2f}% certified, "
        f"{100 * undecided:.2f}% undecided"
    )
    # The images of a larger sample include those of a smaller one, whose verdicts are known.
    more = run_cli(*arguments, "--images", "24")
    assert more.returncode == 0 and "24 images, 20 of them known" in more.stdout, more.stdout + more.stderr


def test_complete_evaluates_the_same_sample(
    finished_training: FinishedTraining, run_cli: RunCli, tmp_path: Path
) -> None:
    folder = shutil.copytree(finished_training.storage, tmp_path / "runs")
    storage = Storage.open(folder).root
    arguments = ["evaluate", finished_training.id, "--storage", str(storage), "--eps", "0.05,0.1"]
    limits = ["--images", "8", "--attacks", "none"]
    done = run_cli(*arguments, "--certifier", "complete", "--timeout", "0.2", *limits, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["num_images"], result["split_size"], result["certifier"]) == (8, 360, "complete")
    assert result["experiment"]["evaluation.time_limit"] == 0.2 and "0.2 s" in result["notes"]
    data = MlflowClient(f"sqlite:///{storage}/mlflow.db").get_run(finished_training.id).data
    first, last = result["results"]
    assert data.metrics["test/certified_accuracy/complete-sound/eps-0.05/images-8"] == first["certified"]
    assert data.metrics[schema.TEST_VERIFIED] == last["certified"] <= first["certified"]
    assert "8 of 360 images by complete-sound (time limit 0.2 s)" in data.tags[schema.TEST_VERIFICATION]
    lipschitz = json.loads(run_cli(*arguments, *limits, "--json").stdout)["results"]
    assert lipschitz[0]["clean"] == first["clean"] and lipschitz[0]["certified"] <= first["certified"]


def test_verdicts_are_certificates(finished_training: FinishedTraining, tmp_path: Path) -> None:
    """Compare with `lipschitz` on the same images."""
    run = CascadeRun(finished_training.weights, LIMITS, images=40)
    with VerdictStore.open(tmp_path, run.plan) as store:
        run.certify(store, lambda record: None)
        result = run.result(store)
    assert result.counts.total() == 40 and result.counts["error"] == 0
    assert result.certified <= result.robust <= result.clean
    assert any(one.certifier == "lipschitz" for one in result.verdicts)


def test_resumed_certification_equals_an_undisturbed_one(finished_training: FinishedTraining, tmp_path: Path) -> None:
    """Stopped after three verdicts, and with a line that was cut off."""
    expected = certify(finished_training.weights, tmp_path / "calm", 12)
    run = CascadeRun(finished_training.weights, LIMITS, images=12)

    class Stop(Exception):
        pass

    def stop(record: ImageVerdict) -> None:
        if len(store.verdicts) == 3:
            raise Stop

    with pytest.raises(Stop), VerdictStore.open(tmp_path / "wild", run.plan) as store:
        run.certify(store, stop)
    (path,) = tmp_path.glob(f"wild/*/{FILE}")
    with path.open("a") as file:
        file.write('{"image": 1, "lab')
    assert decisions(certify(finished_training.weights, tmp_path / "wild", 12)) == decisions(expected)
    assert len(path.read_text().splitlines()) == 12


def test_damaged_or_locked_verdicts_are_rejected(finished_training: FinishedTraining, tmp_path: Path) -> None:
    run = CascadeRun(finished_training.weights, LIMITS, images=1)
    with VerdictStore.open(tmp_path, run.plan) as store:
        run.certify(store, lambda record: None)
        with pytest.raises(RunLockedError), VerdictStore.open(tmp_path, run.plan):
            pass
        path = store.folder / FILE
    path.write_text("nonsense\n")
    with pytest.raises(InputError, match="line 1"), VerdictStore.open(tmp_path, run.plan):
        pass


def test_errors_are_tried_again(finished_training: FinishedTraining, tmp_path: Path) -> None:
    run = CascadeRun(finished_training.weights, LIMITS, images=2)
    first = run.positions[0]
    with VerdictStore.open(tmp_path, run.plan) as store:
        store.add(ImageVerdict(first, 0, "error", "crown", 0.0, "out of memory"), None)
        assert run.remaining(store) == run.positions
        run.certify(store, lambda record: None)
        assert store.verdicts[first].status != "error"


def test_invalid_arguments_are_rejected(finished_training: FinishedTraining, run_cli: RunCli, tmp_path: Path) -> None:
    weights, storage = str(finished_training.weights), ["--storage", str(tmp_path / "new")]
    cascade = ["evaluate", weights, *storage, "--certifier", "cascade"]
    assert_rejected(run_cli(*cascade, "--images", "361"), "images=361")
    assert_rejected(run_cli(*cascade, "--timeout", "0"), "timeout=0")
    assert_rejected(run_cli(*cascade, "--attacks", "pgd"), "attacks=pgd")
    assert_rejected(run_cli(*cascade, "evaluation.batch_size=5"), "evaluation.batch_size=5")
    complete = ["evaluate", weights, *storage, "--certifier", "complete", "--attacks", "none"]
    assert_rejected(run_cli(*complete, "--images", "361"), "images=361")
    assert_rejected(run_cli(*complete, "--timeout", "0"), "timeout=0")
    assert_rejected(run_cli(*complete, "--images", "3", "--radii-dir", str(tmp_path)), "images=3")
    assert_rejected(run_cli("evaluate", weights, *storage, "--timeout", "5"), "timeout=5", "certifier=lipschitz")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("count", "total"), [(0, 10), (3, 10), (10, 10), (480, 1000)])
def test_proportion_interval_is_exact(count: int, total: int) -> None:
    """At each end, the count or a more extreme one has a probability of 2.5%."""
    low, high = proportion_interval(count, total)
    assert count == 0 or binom.sf(count - 1, total, low) == pytest.approx(0.025)
    assert count == total or binom.cdf(count, total, high) == pytest.approx(0.025)
    assert (low == 0) == (count == 0) and (high == 1) == (count == total)


@pytest.mark.slow
def test_killed_workers_and_drivers_do_not_change_verdicts(finished_training: FinishedTraining, tmp_path: Path) -> None:
    """Kill a worker, then the driver; the resumed command gives the verdicts of an undisturbed one."""
    expected = certify(finished_training.weights, tmp_path / "calm", 360)
    root = tmp_path / "wild"
    code = (
        "import sys\nfrom pathlib import Path\nfrom tests.platform.results.test_cascade import certify\n"
        f"certify(Path({str(finished_training.weights)!r}), Path({str(root)!r}), 360, workers=2)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    try:
        wait_for_verdicts(root, 1, process)
        (worker, *_) = find_workers(process)
        worker.kill()
        wait_for_verdicts(root, 40, process)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    resumed = certify(finished_training.weights, root, 360)
    assert decisions(resumed) == decisions(expected)
    assert not [one for one in resumed if one.status == "error"]


def wait_for_verdicts(root: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until a number of verdicts is kept, or the process has ended well."""
    deadline = time.monotonic() + 240
    while sum(len(path.read_text().splitlines()) for path in root.glob(f"*/{FILE}")) < count:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def find_workers(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Return the Ray workers of a process that hold a network."""
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if any("_JudgeActor" in word for word in child.cmdline())]
