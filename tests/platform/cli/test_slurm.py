"""Batch scripts that `linflab slurm` writes, without Slurm; `tests/platform/cluster/test_slurm.py` runs them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from linflab.platform.cluster.slurm import Allocation, Job, batch_script
from tests.conftest import QUICK, RECIPE, RunCli, assert_rejected

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
        ([*TIME, "--sbatch", "chdir=/"], "sbatch=chdir=/"),
        ([*TIME, "--sbatch", "exclusive"], "sbatch=exclusive"),
        ([*TIME, "--sbatch", "comment=a\n#SBATCH --uid=0"], "sbatch=comment=a"),
        ([*TIME, "--partition", "a\nrm -rf ."], "partition=a"),
        ([*TIME, "--cluster"], "cluster"),
        ([*TIME, "--dry-run"], "dry-run"),
        ([*TIME, "model.width=x"], "model.width=x"),
        ([*TIME, "compute.workers=4", "--gpus-per-node", "1", "--nodes", "2"], "compute.workers=4"),
        ([*TIME, "compute.cpus_per_worker=8", "--cpus-per-node", "4"], "compute.cpus_per_worker=8"),
        ([*TIME, "training.batch_size=100000"], "training.batch_size=100000"),
        ([*TIME, "--array", "training.batch_size=64,100000"], "training.batch_size=100000"),
        ([*TIME, "--array", "training.batch_size=100-50"], "array=training.batch_size=100-50"),
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


def test_scripts_of_other_settings_are_kept(run_cli: RunCli, tmp_path: Path) -> None:
    settings = [["seed=0"], ["seed=1"], ["eps=1/255"], ["seed=1", "--tag", "a=b"], ["seed=1"]]
    for arguments in settings:
        done = run_cli("slurm", "train", RECIPE, *arguments, *TIME, "--storage", str(tmp_path))
        assert done.returncode == 0, done.stderr
    scripts = {path.stem.removeprefix(RECIPE): path.read_text() for path in (tmp_path / "slurm").glob("*.sh")}
    assert scripts.keys() == {"_seed_0", "_seed_1", "_eps_1_255", "_seed_1-2"}
    commands = {name: read_command(script) for name, script in scripts.items()}
    assert "seed=0" in commands["_seed_0"] and "--tag" in commands["_seed_1-2"] and "--tag" not in commands["_seed_1"]


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (["train", RECIPE], "add --resume to the command linflab slurm train"),
        (["train", RECIPE, "--resume"], "submit the script again"),
        (["sweep", RECIPE, "demo"], "submit the script again"),
    ],
)
def test_job_that_is_not_requeued_says_how_to_resume(
    run_cli: RunCli, tmp_path: Path, arguments: list[str], advice: str
) -> None:
    done = run_cli("slurm", *arguments, *TIME, "--max-requeues", "0", "--storage", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (end,) = re.findall(r'^if \[ -n "\$at_limit" .*', read_script(tmp_path), re.MULTILINE | re.DOTALL)
    result = subprocess.run(["bash", "-c", f"at_limit=yes status=1\n{end}"], env={}, capture_output=True, text=True)
    assert result.stdout.startswith("Not requeued, since the job has restarted 0 times; ") and result.returncode == 1
    assert advice in result.stdout and len(result.stdout.splitlines()) == 1 and not result.stderr


@pytest.mark.slow
@pytest.mark.integration
def test_requeued_job_resumes_its_own_run(run_cli: RunCli, tmp_path: Path) -> None:
    assert run_cli("slurm", "train", RECIPE, *TIME, "--storage", str(tmp_path)).returncode == 0
    (setting,) = re.findall("^task=.*\nexport .*", read_script(tmp_path), re.MULTILINE)

    def train(number: str, *arguments: str) -> str:
        shown = ["bash", "-c", f'{setting}\necho "$LINFLAB_SLURM_JOB"']
        job = subprocess.run(shown, env={"SLURM_JOB_ID": number}, capture_output=True, text=True).stdout.strip()
        command = ["train", RECIPE, "training.epochs=1", *QUICK[1:], *arguments, "--storage", str(tmp_path)]
        done = run_cli(*command, LINFLAB_SLURM_JOB=job)
        assert done.returncode == 0, done.stderr
        return done.stdout

    first, second = (re.findall("Logged run (\\w+)", train(number))[0] for number in ("1", "2"))
    assert f"Run {first} has finished already" in train("1", "--resume")
    assert f"Run {second} has finished already" in train("2", "--resume")
    assert "No interrupted run found" in train("3", "--resume")


def test_training_that_resumes_takes_the_run_of_another_job(run_cli: RunCli, tmp_path: Path) -> None:
    assert run_cli("slurm", "train", RECIPE, "--resume", *TIME, "--storage", str(tmp_path)).returncode == 0
    assert "export LINFLAB_SLURM_JOB=\n" in read_script(tmp_path)


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
    exported = (Path(__file__).parents[3] / "cluster.yaml").read_text()
    for name in ("RAY_memory_monitor_refresh_ms", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"):
        assert f"{name}=0" in exported and (f"{name}=0" in script) is (nodes == "2")


@pytest.mark.parametrize("server", [None, "http://127.0.0.1:5500"])
def test_token_of_a_job_stays_in_the_job(tmp_path: Path, server: str | None) -> None:
    """Another server has its own token, and must not learn the one that gives access to Ray."""
    job = Job("train", tmp_path, server, tmp_path, ("train", RECIPE), ("train", RECIPE, "--resume"), "false", "")
    script = batch_script(job, Allocation(2, 0, None, "01:00:00", 120, 0))
    assert ("MLFLOW_TRACKING_TOKEN=$RAY_AUTH_TOKEN" in script) is (server is None)


def test_nodes_bypass_the_proxy_and_keep_other_hosts(run_cli: RunCli, tmp_path: Path) -> None:
    done = run_cli("slurm", "train", RECIPE, "--nodes", "2", *TIME, "--storage", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (setup,) = re.findall(r"^ask_ports.*?^export no_proxy.*?$", read_script(tmp_path), re.MULTILINE | re.DOTALL)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for host, proxies, expected in (
        ("127.0.0.1", {"NO_PROXY": "a.org"}, "a.org,127.0.0.1"),
        ("127.0.0.1", {"no_proxy": "*"}, "*"),
        ("192.0.2.1", {}, ""),
    ):
        environment = {**os.environ, "no_proxy": "", "NO_PROXY": "", **proxies, "PATH": path, "head": host}
        shown = ["bash", "-c", f'{setup}\nprintf "%s " "$no_proxy" "$NO_PROXY" "$head"']
        result = subprocess.run(shown, env=environment, capture_output=True, text=True)
        if expected:
            no_proxy, upper, head = result.stdout.split()
            assert no_proxy == upper == expected and re.fullmatch(rf"{host}:\d+", head)
        else:  # not an address of this machine
            assert result.returncode != 0 and f"host={host}" in result.stderr


def test_name_of_an_existing_sweep_is_rejected(run_cli: RunCli, tmp_path: Path) -> None:
    (tmp_path / "sweeps" / "mine").mkdir(parents=True)
    (tmp_path / "sweeps" / "mine" / "sweep.yaml").touch()
    done = run_cli("slurm", "sweep", RECIPE, "demo", "--name", "mine", *TIME, "--storage", str(tmp_path))
    assert_rejected(done, "name=mine", "linflab sweep --resume mine")


@pytest.mark.parametrize("option", [["--name", "mine"], ["--name=mine"]])
def test_sweeps_have_one_name_and_own_modules(
    run_cli: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: list[str]
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_slurm_parts.py").touch()
    arguments = ["slurm", "sweep", RECIPE, "demo", *option, "--budget", "2", *TIME, "--storage", str(tmp_path)]
    done = run_cli(*arguments, LINFLAB_IMPORT="my_slurm_parts")
    assert done.returncode == 0, done.stderr
    script = read_script(tmp_path)
    command = read_command(script)
    assert command.count("--name") == 1 and command[command.index("--name") + 1] == "mine"
    assert not [word for word in command if word.startswith("--name=")]
    assert "export LINFLAB_IMPORT=my_slurm_parts\n" in script


def test_own_modules_are_found_in_the_folders_of_pythonpath(
    run_cli: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job gets absolute paths; without own modules, it does not get PYTHONPATH."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_slurm_parts.py").touch()
    monkeypatch.chdir(tmp_path)
    for modules, expected in (("my_slurm_parts", [f"export PYTHONPATH={tmp_path}/parts:/elsewhere"]), ("", [])):
        storage = tmp_path / f"runs{modules}"
        arguments = ["slurm", "train", RECIPE, *TIME, "--storage", str(storage)]
        done = run_cli(*arguments, LINFLAB_IMPORT=modules, PYTHONPATH="parts:/elsewhere")
        assert done.returncode == 0, done.stderr
        assert [line for line in read_script(storage).splitlines() if "PYTHONPATH" in line] == expected
