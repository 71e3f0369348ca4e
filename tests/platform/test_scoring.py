"""Trained weights scored by the command: what it prints, what it records, and what it refuses."""

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow.tracking import MlflowClient
from PIL import Image

from linflab.models.robustness.attacks import PGDConfig
from linflab.models.robustness.certification import certified_radius
from linflab.platform.config import load_experiment
from linflab.platform.datasets import load_dataset
from linflab.platform.evaluation import Accuracy, evaluate, evaluate_at
from linflab.platform.weights import load_network, network_of, save_weights
from tests.conftest import QUICK, RECIPE, Here, TrainedOnDigits

Command = Callable[..., subprocess.CompletedProcess[str]]


@dataclass(frozen=True)
class FinishedRun:
    storage: Path
    id: str
    weights: Path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, linflab: Command) -> FinishedRun:
    """A short training by the command line."""
    storage = tmp_path_factory.mktemp("runs")
    assert linflab("train", RECIPE, *QUICK, "--storage", str(storage)).returncode == 0
    (found,) = MlflowClient(f"sqlite:///{storage}/mlflow.db").search_runs(["1"])
    (weights,) = storage.glob("artifacts/*/artifacts/weights.pt")
    return FinishedRun(storage, found.info.run_id, weights)


def test_a_run_is_scored_as_it_was_after_training(run: FinishedRun, linflab: Command) -> None:
    done = linflab("evaluate", run.id, "--storage", str(run.storage), "--json")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["rows"]
    client = MlflowClient(f"sqlite:///{run.storage}/mlflow.db")
    metrics = client.get_run(run.id).data.metrics
    for name in ("clean", "certified", "robust"):
        assert row[name] == metrics[f"test/{name}_accuracy"]
    assert metrics["test/certified_accuracy/lipschitz/eps-0.1"] == row["certified"]
    assert metrics["test/robust_accuracy/eps-0.1"] == row["robust"]


def test_many_eps_and_certifiers(run: FinishedRun, here: Here) -> None:
    results = {}
    for certifier in ("lipschitz", "interval"):
        for sound in ([], ["--sound"]):
            arguments = ["--eps", "0.02,0.1,0.2", "--certifier", certifier, "--attack", "none", "--json", *sound]
            done = here("evaluate", str(run.weights), *arguments)
            assert done.returncode == 0, done.stderr
            scores = json.loads(done.stdout)
            assert (scores["certifier"], scores["sound"]) == (certifier, bool(sound))
            results[certifier, bool(sound)] = [row["certified"] for row in scores["rows"]]
            assert all(row["robust"] is None for row in scores["rows"])
    for values in results.values():
        assert values == sorted(values, reverse=True) and values[0] > values[2]
    for plain, sound in zip(results["lipschitz", False], results["lipschitz", True], strict=True):
        assert plain - 0.01 <= sound <= plain
    assert all(a <= b for a, b in zip(results["lipschitz", False], results["interval", False], strict=True))


def test_what_is_printed(run: FinishedRun, here: Here) -> None:
    done = here("evaluate", str(run.weights), "--eps", "0.05,0.1", "--sound")
    assert done.returncode == 0, done.stderr
    assert (
        "In percent. On 360 test images. Certified: by lipschitz, float32 rounding included." in done.stdout
        and "PGD, 10 steps" in done.stdout
    )
    assert [line.split()[0] for line in done.stdout.splitlines()[:3]] == ["eps", "0.05", "0.1"]


def test_several_eps_are_scored_as_one_by_one(digits_net: TrainedOnDigits) -> None:
    network, split = digits_net.trained.network, digits_net.dataset.test
    attack, seen = PGDConfig(steps=3), []
    together = evaluate_at(network, split, [0.05, 0.1], 100, "lipschitz", False, attack, 5, seen.append)
    assert together == [evaluate(network, split, eps, 100, attack, 5) for eps in (0.05, 0.1)]
    assert seen == [100, 200, 300, 360]


def test_certified_samples_that_are_broken_end_it_loudly(
    run: FinishedRun, monkeypatch: pytest.MonkeyPatch, here: Here
) -> None:
    broken = [Accuracy(0.9, 0.8, 0.7, certified_but_broken=3)]
    monkeypatch.setattr("linflab.platform.scoring.evaluate_at", lambda *arguments: broken)
    done = here("evaluate", str(run.weights))
    assert done.returncode == 1 and "broke 3 samples that lipschitz had certified" in done.stderr


def test_images_of_ones_own(run: FinishedRun, here: Here, tmp_path: Path) -> None:
    experiment, network = load_network(run.weights)
    images, _ = load_dataset(experiment.dataset).test.batch(torch.arange(3))
    grey = (255 * images).round().to(torch.uint8)
    for k, image in enumerate(grey):
        Image.fromarray(image[0].numpy()).save(tmp_path / f"{k}.png")
    done = here("certify", str(run.weights), *(str(tmp_path / f"{k}.png") for k in range(3)), "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    seen = grey.float() / 255
    predictions = network(seen).argmax(dim=1)
    radii = certified_radius(network, seen, predictions, "lipschitz", sound=True).clamp_min(0)
    assert [row["prediction"] for row in rows] == predictions.tolist()
    np.testing.assert_allclose([row["radius"] for row in rows], radii.tolist(), rtol=1e-6)
    assert {row["certifier"] for row in rows} == {"lipschitz"}


def test_wrong_input(run: FinishedRun, here: Here, tmp_path: Path) -> None:
    (tmp_path / "damaged.pt").write_bytes(b"no weights")
    (tmp_path / "text.png").write_text("no image")
    Image.new("L", (9, 8)).save(tmp_path / "wide.png")
    Image.fromarray(np.full((8, 8), 10000, dtype=np.uint16)).save(tmp_path / "deep.png")
    experiment, network = load_network(run.weights)
    network.features.normalize.std.neg_()
    save_weights(tmp_path / "negative.pt", network, experiment, 0)
    storage = ["--storage", str(run.storage)]
    for arguments, says in (
        (["evaluate", "nothing", *storage], "neither a file nor a run"),
        (["evaluate", str(tmp_path / "nothing.pt")], "no such file"),
        (["evaluate", str(run.weights), "--eps", ","], "eps=,"),
        (["evaluate", str(tmp_path / "negative.pt")], "standard deviation"),
        (["certify", str(run.weights), str(tmp_path / "deep.png")], "its mode is I;16"),
        (["evaluate", str(tmp_path / "damaged.pt")], "can't be read as weights"),
        (["evaluate", str(run.weights), "--eps", "0.1,x"], "eps=0.1,x"),
        (["evaluate", str(run.weights), "--certifier", "magic"], "certifier=magic"),
        (["evaluate", str(run.weights), "--attack", "magic"], "attack=magic"),
        (["certify", str(run.weights), str(tmp_path / "text.png")], "can't be read as an image"),
        (["certify", str(run.weights), str(tmp_path / "wide.png")], "8 x 9 pixels"),
        (["certify", str(run.weights), str(tmp_path / "none.png")], "none.png"),
    ):
        done = here(*arguments)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert says in done.stderr


def test_hybrids_have_no_lipschitz_certificate(here: Here, tmp_path: Path) -> None:
    settings = ["model.kind=linf_dist_hybrid", "model.net.kind=linf_dist_mlp", "model.net.width=8"]
    settings += ["objective.kind=worst_case_cross_entropy", "objective.eps_train=0.1"]
    experiment = load_experiment(RECIPE, settings)
    save_weights(tmp_path / "w.pt", network_of(experiment), experiment, 0)
    done = here("evaluate", str(tmp_path / "w.pt"), "--certifier", "lipschitz")
    assert done.returncode == 2 and "interval will do" in done.stderr
