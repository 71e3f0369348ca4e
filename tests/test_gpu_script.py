"""The benchmark script for GPUs, run on a CPU."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import RECIPE

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--device", "cpu", *arguments]
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True)


@pytest.mark.slow
def test_gpu_script_profiles_and_trains_within_its_time_limit(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("--out", str(out), "--minutes", "5", "--recipe", RECIPE, "--set", "training.epochs=3")
    assert done.returncode == 0, done.stderr
    summary = (out / "summary.md").read_text()
    assert "FAILED" not in summary and " epochs; last: `epoch" in summary, (out / "train.log").read_text()
    with (out / "profile.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["p"] == "8" and rows[-1]["p"] == "inf"
    assert all(float(row["step_ms"]) > 0 for row in rows)
    assert (out / "trace.json.gz").stat().st_size > 0
    (weights,) = out.glob("runs/artifacts/*/artifacts/weights.pt")
    assert weights.exists()
    assert run("--out", str(out)).returncode == 1  # results of an earlier run are not overwritten


@pytest.mark.integration
def test_random_images_replace_a_missing_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINFLAB_DATA", str(tmp_path / "none"))
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import gpu

    from linflab.platform.data.datasets import load_dataset

    assert gpu.random_images("mnist_eps0.3_linf_dist_net", [], tmp_path)
    assert tuple(load_dataset("mnist").train.images.shape[1:]) == (1, 28, 28)
    assert not gpu.random_images(RECIPE, [], tmp_path)
