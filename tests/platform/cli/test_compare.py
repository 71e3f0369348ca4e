"""`linflab compare`: real runs, their table and figure, reuse after interruptions, and rejected input."""

import io
import re
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from mlflow.tracking import MlflowClient
from PIL import Image

from linflab.platform.config.recipes import recipe_files
from linflab.platform.results.compare import comparison_name, plan_runs
from linflab.platform.training.checkpoints import CheckpointStore
from linflab.reports import schema
from tests.conftest import RECIPE, RunCli, assert_rejected
from tests.platform.interruptions import Command, Outcome, group_outcomes

SETTINGS = ["model.width=16", "evaluation.attack.steps=10", "evaluation.attack.restarts=1"]
SET = [part for setting in SETTINGS for part in ("--set", setting)]
T_QUANTILE = 12.7062047  # 0.975 quantile of Student's t with one degree of freedom, from a printed table


@pytest.fixture(scope="module")
def deep_recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a recipe like `RECIPE`, with one more layer."""
    settings = yaml.safe_load(recipe_files()[RECIPE].read_text())
    settings["model"]["depth"] += 1
    file = tmp_path_factory.mktemp("recipe") / "deep.yaml"
    file.write_text(yaml.safe_dump(settings))
    return str(file)


def _test_metrics(storage: Path, run_ids: list[str], name: str) -> np.ndarray:
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    return np.array([100 * client.get_run(run_id).data.metrics[name] for run_id in run_ids])


@pytest.mark.slow
def test_comparison_has_statistics_commands_and_figure(tmp_path: Path, deep_recipe: str, run_cli: RunCli) -> None:
    storage, out = tmp_path / "runs", tmp_path / "report"
    arguments = [RECIPE, deep_recipe, "--epochs", "3", *SET, "--storage", str(storage)]
    done = run_cli("compare", *arguments, "--seeds", "2", "--output", str(out), COLUMNS="160")
    assert done.returncode == 0, done.stdout + done.stderr
    ids = dict(re.findall(r"recipe=(\S+ seed=\d) status=finished .*run_id=(\w+)", done.stdout))
    assert len(ids) == 4

    (csv,) = out.glob("*.csv")
    table = pd.read_csv(io.StringIO(csv.read_text()))
    assert len(table) == 2
    for index, recipe in enumerate((RECIPE, deep_recipe)):
        row, run_ids = table.loc[index], [ids[f"{recipe} seed={seed}"] for seed in (0, 1)]
        for column, metric in (("Clean", schema.TEST_CLEAN), ("Certified", schema.TEST_CERTIFIED)):
            values = _test_metrics(storage, run_ids, metric)
            deviation = np.std(values, ddof=1)
            expected = [np.mean(values), deviation, T_QUANTILE * deviation / np.sqrt(2)]
            assert row[[column, f"{column} sd", f"{column} CI"]].tolist() == pytest.approx(expected, abs=1e-6)
            assert f"{expected[0]:.2f} ± {expected[1]:.2f}" in done.stdout
        commands = row["Command"].splitlines()
        assert len(commands) == 2 and commands[0] in done.stdout
        assert commands[1] == f"linflab train {recipe} {' '.join(SETTINGS)} training.epochs=3 seed=1"

    (image,) = out.glob("*.png")
    with Image.open(image) as figure:
        assert min(figure.size) > 500
    assert {path.suffix for path in out.iterdir()} == {".md", ".tex", ".html", ".csv", ".png", ".pdf"}
    (page,) = out.glob("*.html")
    assert page.read_text().count("data:image/png;base64,") == 1

    # The command of a row repeats the run bit by bit, though the comparison trained several runs in one process.
    alone = tmp_path / "alone"
    assert run_cli(*commands[1].split()[1:], "--storage", str(alone)).returncode == 0
    compared = {name: runs[0] for name, runs in group_outcomes(storage).items()}
    for name, (run,) in group_outcomes(alone).items():
        assert run.metrics == compared[name].metrics
        assert all(np.array_equal(run.weights[key], compared[name].weights[key]) for key in run.weights)

    again = run_cli("compare", *arguments, "--seeds", "3", "--no-quoted")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("status=reused") == 4 and again.stdout.count("status=finished") == 2
    assert len(MlflowClient(f"sqlite:///{storage}/mlflow.db").search_runs(["1"])) == 6
    planned = run_cli("compare", *arguments, "--seeds", "4", "--dry-run")
    rows = [line.split() for line in planned.stdout.splitlines() if line.startswith((RECIPE, deep_recipe))]
    assert [row[1:5] for row in rows] == [["3", "0,1,2,3", "3", "0"]] * 2
    assert len(MlflowClient(f"sqlite:///{storage}/mlflow.db").search_runs(["1"])) == 6


@pytest.fixture(scope="module")
def interruptible(deep_recipe: str) -> list[str]:
    """Arguments of a comparison of four runs."""
    arguments = ["compare", RECIPE, deep_recipe, "--seeds", "2", *SET, "--epochs", "12"]
    return [*arguments, "--set", "training.checkpoint_interval=2"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, interruptible: list[str]) -> dict[str, list[Outcome]]:
    """Runs of a comparison that is not interrupted, by name."""
    command = Command(tmp_path_factory.mktemp("undisturbed") / "runs", *interruptible)
    command.finish()
    return group_outcomes(command.storage)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=lambda number: number.name)
def test_repeated_command_continues_after_interruption(
    tmp_path: Path, interruptible: list[str], uninterrupted: dict[str, list[Outcome]], number: signal.Signals
) -> None:
    storage = tmp_path / "runs"
    command = Command(storage, *interruptible)
    command.wait_for(lambda: "epoch=5/" in command.output.partition("run=2/4")[2])
    status, output = command.interrupt(number)
    assert status == (-number if number == signal.SIGKILL else 130), output
    if number != signal.SIGKILL:
        assert output.splitlines()[-1].startswith("linflab: ") and "linflab compare" in output.splitlines()[-1]
    expected = [1, 1, 2, 3]
    if number == signal.SIGKILL:  # a run that another process trains is left out, and the other runs are trained
        (folder,) = (storage / "checkpoints").iterdir()
        with CheckpointStore(folder).lock():
            command = Command(storage, *interruptible)
            status, output = command.process.wait(300), command.output
        assert status == 1 and "another process is training run" in output and "1 of 4 runs failed" in output
        assert output.splitlines()[-1].endswith("--storage " + str(storage) + "`")
        expected = [3, 1, 0, 1]
    output = Command(storage, *interruptible).finish()
    assert [output.count(f"status={one}") for one in ("reused", "resumed", "started", "finished")] == expected
    resumed_at = int(re.search(r"status=resumed\s+epoch=(\d+)/", output)[1])  # type: ignore[index]
    assert resumed_at > 2
    found = group_outcomes(storage)
    assert found.keys() == uninterrupted.keys()
    for name, (run,) in found.items():
        run.assert_equals(uninterrupted[name][0])
    assert not list((storage / "checkpoints").glob("*"))


@pytest.mark.slow
def test_failed_runs_are_reported_and_left_out(tmp_path: Path, deep_recipe: str, run_cli: RunCli) -> None:
    file = tmp_path / "diverging.yaml"
    settings = yaml.safe_load(Path(deep_recipe).read_text())
    settings["optimizer"]["learning_rate"] = 1e30
    file.write_text(yaml.safe_dump(settings))
    storage = tmp_path / "runs"
    done = run_cli(
        "compare", str(file), RECIPE, "--seeds", "2", "--epochs", "1", *SET, "--storage", str(storage), COLUMNS="160"
    )
    assert_rejected(done, "2 of 4", str(file), "linflab compare", status=1)
    (csv,) = (storage / "reports").glob("compare-*.csv")
    assert len(pd.read_csv(csv)) == 1
    assert done.stdout.count("status=failed") == 2 and done.stdout.count("Failed, ") == 2


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["digits_eps0.1_ibp", "mnist_eps0.3_ibp"], ["dataset=mnist", "mnist_eps0.3_ibp", "digits_eps0.1_ibp"]),
        (["mnist_eps0.1_sort_net", "mnist_eps0.3_sort_net"], ["eps=0.3", "mnist_eps0.1_sort_net"]),
        ([RECIPE, RECIPE], [f"recipe={RECIPE}"]),
        ([RECIPE, "digits_eps0.1_linf_net"], ["recipe=digits_eps0.1_linf_net", RECIPE]),
        ([RECIPE, "--set", "model.widht=3"], [f"recipe={RECIPE}", "model.widht=3", "width"]),
        (["digits_eps0.1_ibp", RECIPE, "--set", "model.depth=3"], ["recipe=digits_eps0.1_ibp", "model.depth=3"]),
        ([RECIPE, "--set", "width"], ["override=width", "model.width=128"]),
        ([RECIPE, "model.width=16"], ["model.width=16", "--set model.width=16"]),
        ([RECIPE, "--epochs", "3", "--set", "training.epochs=4"], ["epochs=3", "--set training.epochs"]),
        ([RECIPE, "--set", "compute.cpus_per_worker=9999"], ["compute.cpus_per_worker=9999"]),
    ],
)
def test_invalid_comparisons_are_rejected(
    run_cli: RunCli, tmp_path: Path, arguments: list[str], expected: list[str]
) -> None:
    assert_rejected(run_cli("compare", *arguments, "--storage", str(tmp_path / "runs")), *expected)
    assert not (tmp_path / "runs").exists()


def test_unusable_output_directory_is_rejected_before_training(run_cli: RunCli, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    # /proc exists, but nobody can write a file to it.
    for out in (tmp_path / "file" / "report", Path("/proc")):
        done = run_cli("compare", RECIPE, "--output-dir", str(out), "--storage", str(tmp_path / "runs"))
        assert_rejected(done, f"output-dir={out}")


@pytest.mark.parametrize("change", ["seed: 1", "method: other", "training: {checkpoint_interval: 7}"])
def test_recipes_that_differ_in_no_result_are_rejected(tmp_path: Path, run_cli: RunCli, change: str) -> None:
    """Both would be trained to the same networks, and shown as two methods."""
    settings = yaml.safe_load(recipe_files()[RECIPE].read_text())
    for name, value in yaml.safe_load(change).items():
        settings[name] = {**settings[name], **value} if isinstance(value, dict) else value
    file = tmp_path / "copy.yaml"
    file.write_text(yaml.safe_dump(settings))
    done = run_cli("compare", RECIPE, str(file), "--storage", str(tmp_path / "runs"))
    assert_rejected(done, f"recipe={file}", RECIPE, "seed")


def test_plan_has_consecutive_seeds_and_equal_epochs() -> None:
    rows = plan_runs([RECIPE, "digits_eps0.1_ibp"], ["seed=7", "training.epochs=5"], 2)
    assert [[run.experiment.seed for run in runs] for runs in rows] == [[7, 8], [7, 8]]
    assert {run.experiment.training.epochs for runs in rows for run in runs} == {5}
    assert rows[1][1].overrides == ("training.epochs=5", "seed=8")
    hashes = {run.experiment.config_hash() for runs in rows for run in runs}
    assert len(hashes) == 4


def test_file_names_have_recipes_and_overrides() -> None:
    recipes = ["mnist_eps0.3_ibp_cpu", "mnist_eps0.3_ibp", "my/own.yaml"]
    assert comparison_name(recipes[:2], []) == "mnist_eps0.3_ibp_cpu_vs_ibp"
    assert comparison_name(recipes, ["seed=3"]) == "mnist_eps0.3_ibp_cpu_vs_mnist_eps0.3_ibp_vs_own_seed-3"
