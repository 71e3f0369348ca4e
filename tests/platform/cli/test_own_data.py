"""Your own small or unusual datasets: usable from training to certificates, or rejected before training."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from mlflow.tracking import MlflowClient

from tests.conftest import RECIPE, RunCli, assert_rejected

GENERATOR = np.random.RandomState(0)
QUICKEST = [
    "training.epochs=1",
    "training.batch_size=2",
    "model.width=16",
    "model.depth=2",
    "evaluation.attack.steps=2",
]


def write_dataset(folder: Path, shape: tuple[int, ...], train_labels: np.ndarray, test_labels: np.ndarray) -> None:
    """Write a dataset of noise with these labels."""
    folder.mkdir(parents=True)
    for split, labels in (("train", train_labels), ("test", test_labels)):
        images = GENERATOR.randint(0, 256, (len(labels), *shape), np.uint8)
        np.save(folder / f"{split}_images.npy", images)
        np.save(folder / f"{split}_labels.npy", labels)


def cycle(count: int, classes: int) -> np.ndarray:
    return np.arange(count) % classes


UNUSUAL = {
    "test of one image": ((1, 6, 6), cycle(30, 3), cycle(1, 3)),
    "two training images": ((1, 6, 6), cycle(3, 2), cycle(2, 2)),
    "two channels": ((2, 6, 6), cycle(30, 3), cycle(5, 3)),
    "not square": ((3, 4, 9), cycle(30, 3), cycle(5, 3)),
    "one pixel": ((1, 1, 1), cycle(30, 3), cycle(5, 3)),
    "label of the test set alone": ((1, 6, 6), cycle(30, 3), cycle(8, 4)),
    "labels missing in the test set": ((1, 6, 6), cycle(30, 5), cycle(5, 2)),
    "class without images": ((1, 6, 6), 3 * cycle(30, 3), 3 * cycle(5, 3)),
    "more than 256 classes": ((1, 6, 6), cycle(310, 300).astype(np.int16), cycle(5, 300)),
}
QUICK = ("class without images",)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in UNUSUAL]
)
def test_unusual_datasets_work_from_training_to_certificates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_cli: RunCli, name: str
) -> None:
    monkeypatch.setenv("LINFLAB_DATA", str(tmp_path / "data"))
    shape, train_labels, test_labels = UNUSUAL[name]
    write_dataset(tmp_path / "data" / "mine", shape, train_labels, test_labels)
    storage = ["--storage", str(tmp_path / "runs")]
    done = run_cli("train", RECIPE, "dataset=mine", *QUICKEST, *storage)
    assert done.returncode == 0, done.stderr
    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    figures = {Path(file.path).name for file in client.list_artifacts(run.info.run_id, "figures")}
    assert {"learning_curves.png", "training_margins.png", "certified_accuracy.png", "radii.csv"} <= figures
    assert run.outputs.model_outputs
    done = run_cli(
        "evaluate", run.info.run_id, "--radii-dir", str(tmp_path / "radii"), "--eps", "0.01", *storage, "--json"
    )
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "radii" / "radii.csv")
    assert table["label"].tolist() == test_labels.tolist()
    assert table["robust_eps_0.01"].mean() == json.loads(done.stdout)["results"][0]["robust"]
    images = str(tmp_path / "data" / "mine" / "test_images.npy")
    done = run_cli("certify", run.info.run_id, images, *storage, "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [row["prediction"] for row in rows] == table["prediction"].tolist()
    is_correct = table["prediction"] == table["label"]
    np.testing.assert_allclose(
        np.array([row["radius"] for row in rows])[is_correct],
        table["certified_radius"][is_correct],
        rtol=1e-3,
        atol=1e-5,
    )


REJECTED: dict[str, tuple[tuple[int, ...], np.ndarray, np.ndarray, str]] = {
    "one image": ((1, 6, 6), cycle(1, 2), cycle(1, 2), "train_images.npy"),
    "one class": ((1, 6, 6), cycle(30, 1), cycle(5, 1), "train_labels.npy"),
    "channels last": ((8, 8, 3), cycle(30, 3), cycle(5, 3), "train_images.npy"),
    "large batch": ((1, 6, 6), cycle(30, 3), cycle(5, 3), "training.batch_size=64"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_unusable_datasets_are_rejected_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_cli: RunCli, name: str
) -> None:
    monkeypatch.setenv("LINFLAB_DATA", str(tmp_path / "data"))
    *data, expected = REJECTED[name]
    write_dataset(tmp_path / "data" / "mine", *data)
    done = run_cli("train", RECIPE, "dataset=mine", "training.batch_size=64", "--storage", str(tmp_path / "runs"))
    assert_rejected(done, expected)
    assert not (tmp_path / "runs" / "mlflow.db").exists()


@pytest.mark.parametrize("overrides", [["model.width=1000000"], ["model.kind=sort_net", "model.width=100000"]])
def test_networks_beyond_memory_are_rejected_before_training(
    tmp_path: Path, run_cli: RunCli, overrides: list[str]
) -> None:
    done = run_cli("train", RECIPE, *overrides, "--storage", str(tmp_path / "runs"))
    assert_rejected(done, overrides[-1])


@pytest.mark.parametrize(
    "command",
    [
        ["train", RECIPE, "--dry-run", "training.epochs=1"],
        ["describe", RECIPE],
        ["sweep", RECIPE, "width", "--budget", "0", "--storage", "runs"],
    ],
    ids=lambda command: command[0],
)
def test_changed_eps_is_reported_on_stderr(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_cli: RunCli, command: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run_cli(*command, "eps=0.3")
    assert "objective.theta=0.2" in done.stderr and "objective.theta=0.6" in done.stderr
