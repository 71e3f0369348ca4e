"""Batch scripts that `linflab slurm` writes, without Slurm; `tests/platform/cluster/test_slurm.py` runs them."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import RECIPE, RunCli, assert_rejected

TIME = ("--time", "01:00:00")


def read_script(storage: Path) -> str:
    (script,) = (storage / "slurm").glob("*.sh")
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    return script.read_text()


def read_command(script: str, **variables: str) -> list[str]:
    """Return the first command of a script as bash reads it."""
    (line, *_) = re.findall(r"^command=.*", script, re.MULTILINE)
    result = subprocess.run(
        ["bash", "-c", f"storage=STORAGE\n{line}\nprintf '%s\\n' \"${{command[@]}}\""],
        env=variables, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return result.stdout.splitlines()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--time", "90"], "time=90"),
        (["--time", "00:02:00"], "stop-before=120"),
        ([*TIME, "--array", "seed=a"], "array=seed=a"),
        ([*TIME, "--array", "0-4"], "array=0-4"),
        ([*TIME, "--array", "nosuch=0-4"], "nosuch"),
        ([*TIME, "--sbatch", "--mem=1G"], "sbatch=--mem=1G"),
        ([*TIME, "--sbatch", "nodes=3"], "sbatch=nodes=3"),
        ([*TIME, "--sbatch", "comment=a\n#SBATCH --uid=0"], "sbatch=comment=a"),
        ([*TIME, "--partition", "a\nrm -rf ."], "partition=a"),
        ([*TIME, "--cluster"], "cluster"),
        ([*TIME, "--dry-run"], "dry-run"),
        ([*TIME, "model.width=x"], "model.width=x"),
        ([*TIME, "compute.workers=4", "--gpus-per-node", "1", "--nodes", "2"], "compute.workers=4"),
    ],
)
def test_invalid_job_is_rejected(run_cli: RunCli, tmp_path: Path, arguments: list[str], expected: str) -> None:
    done = run_cli("slurm", "train", RECIPE, *arguments, "--storage", str(tmp_path / "storage"))
    assert_rejected(done, expected)
    assert not (tmp_path / "storage").exists()


def test_unknown_option_of_the_command_is_rejected(run_cli: RunCli, tmp_path: Path) -> None:
    done = run_cli("slurm", "train", RECIPE, *TIME, "--no-such", "1", "--storage", str(tmp_path))
    assert done.returncode == 2 and "--no-such" in done.stderr and not (tmp_path / "slurm").exists()


def test_submit_without_slurm_names_the_script(run_cli: RunCli, tmp_path: Path) -> None:
    done = run_cli("slurm", "train", RECIPE, *TIME, "--submit", "--storage", str(tmp_path), PATH=str(tmp_path))
    assert_rejected(done, "submit", "sbatch", str(tmp_path / "slurm" / f"{RECIPE}.sh"))


def test_arguments_reach_the_command_unchanged(run_cli: RunCli, tmp_path: Path) -> None:
    hostile = 'it\'s $HOME `id` $(id) "x" \\ *'
    arguments = ["train", RECIPE, "--tag", f"note={hostile}", "--name", hostile, "model.width=96"]
    done = run_cli("slurm", *arguments, *TIME, "--storage", str(tmp_path))
    assert done.returncode == 0, done.stderr
    expected = ["linflab", *arguments, "--storage", str(tmp_path), "--storage", "STORAGE"]
    assert read_command(read_script(tmp_path)) == expected


def test_array_task_has_its_own_setting_and_storage(run_cli: RunCli, tmp_path: Path) -> None:
    done = run_cli("slurm", "train", RECIPE, *TIME, "--array", "model.width=64,96", "--storage", str(tmp_path))
    assert done.returncode == 0, done.stderr
    script = read_script(tmp_path)
    assert "#SBATCH --array=64,96\n" in script and f"storage={tmp_path}/model.width-$SLURM_ARRAY_TASK_ID\n" in script
    assert "model.width=96" in read_command(script, SLURM_ARRAY_TASK_ID="96")


@pytest.mark.parametrize("nodes", ["1", "2"])
def test_job_requests_the_chosen_resources(run_cli: RunCli, tmp_path: Path, nodes: str) -> None:
    done = run_cli(
        "slurm", "sweep", RECIPE, "demo", "--name", "mine", "--nodes", nodes, "--gpus-per-node", "4", *TIME,
        "--account", "lab", "--sbatch", "comment=two words", "--storage", str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    script = read_script(tmp_path)
    options = {f"nodes={nodes}", "gpus-per-node=4", "account=lab", "time=01:00:00", "exclusive", 'comment="two words"'}
    assert options <= set(re.findall(r"^#SBATCH --(.*)", script, re.MULTILINE))
    assert ("ray symmetric-run" in script) is (nodes == "2")


def test_name_of_an_existing_sweep_is_rejected(run_cli: RunCli, tmp_path: Path) -> None:
    (tmp_path / "sweeps" / "mine").mkdir(parents=True)
    (tmp_path / "sweeps" / "mine" / "sweep.yaml").touch()
    done = run_cli("slurm", "sweep", RECIPE, "demo", "--name", "mine", *TIME, "--storage", str(tmp_path))
    assert_rejected(done, "name=mine", "linflab sweep --resume mine")
