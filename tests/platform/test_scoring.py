"""Trained weights scored by the command: what it prints, what it records, and what it refuses."""

import dataclasses
import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.tracking import MlflowClient
from PIL import Image

from linflab.models.robustness.attacks.suite import AttackConfig
from linflab.models.robustness.certification import certified_radius
from linflab.platform.config import load_experiment
from linflab.platform.datasets import load_dataset
from linflab.platform.evaluation import Accuracy, Scoring, evaluate
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
    assert metrics["test/robust_accuracy/pgd-surrogate_pgd/eps-0.1"] == row["robust"]
    (artifact,) = client.list_artifacts(run.id, "scores/1")
    assert artifact.path == "scores/1/scores.json"
    written = json.loads(Path(client.download_artifacts(run.id, artifact.path)).read_text())
    assert written["rows"] == [row] and written["experiment"]["evaluation.attack.steps"] == 10


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
            if sound:
                assert [row["certified_exact"] for row in scores["rows"]] == results[certifier, False]
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
        and "PGD (10 steps of 0.25 eps, 1 restart); PGD by gradients at p = 32" in done.stdout
        and "Accounting for rounding costs 0, 0 certificates." in done.stdout
    )
    assert [line.split()[0] for line in done.stdout.splitlines()[:3]] == ["eps", "0.05", "0.1"]


def test_several_eps_are_scored_as_one_by_one(digits_net: TrainedOnDigits) -> None:
    network, split = digits_net.trained.network, digits_net.dataset.test
    attack, seen = AttackConfig(steps=3), []
    both = Scoring((0.05, 0.1), "lipschitz", attack=attack, seed=5)
    together = evaluate(network, split, both, 100, seen.append)
    alone = [evaluate(network, split, dataclasses.replace(both, eps=(eps,)), 100) for eps in both.eps]
    assert [[one] for one in together] == alone and together[0].robust > together[1].robust
    assert [len(batch.positions) for batch in seen] == [100, 100, 100, 60]


def test_certified_samples_that_are_broken_end_it_loudly(
    run: FinishedRun, monkeypatch: pytest.MonkeyPatch, here: Here
) -> None:
    broken = [Accuracy(0.9, 0.8, robust=0.7, certified_but_broken=3)]
    monkeypatch.setattr("linflab.platform.scoring.accuracies", lambda *arguments: broken)
    done = here("evaluate", str(run.weights))
    assert done.returncode == 1 and "attacks broke 3 samples that lipschitz had certified" in done.stderr


def test_broken_certificates_are_counted_sample_by_sample(digits_net: TrainedOnDigits) -> None:
    """A certifier that lies: all that it certifies at too large an eps, and the attack breaks, is found."""
    network, split = digits_net.trained.network, digits_net.dataset.test
    scoring = Scoring((0.3,), "lipschitz", attack=AttackConfig(steps=10))
    (honest,) = evaluate(network, split, scoring, 100)
    assert honest.certified_but_broken == 0
    std = network.features.normalize.std
    network.features.normalize.std = 10 * std  # what the constant is made of, and nothing else that is computed
    network.features.normalize.forward = lambda images: (images - network.features.normalize.mean) / std
    try:
        (lying,) = evaluate(network, split, scoring, 100)
    finally:
        network.features.normalize.std = std
        del network.features.normalize.forward
    assert lying.robust == honest.robust and lying.certified > honest.certified
    assert lying.certified_but_broken >= round(360 * (lying.certified - lying.robust)) > 50


def test_workers_find_the_same(run: FinishedRun, here: Here) -> None:
    arguments = ["evaluate", str(run.weights), "evaluation.batch_size=70", "--eps", "0.05,0.1", "--json"]
    alone, together = here(*arguments), here(*arguments, "--workers", "2")
    assert alone.returncode == together.returncode == 0, together.stderr
    assert json.loads(alone.stdout) == json.loads(together.stdout)


def test_radii_as_files(run: FinishedRun, here: Here, tmp_path: Path) -> None:
    for certifier in ("lipschitz", "interval"):
        folder = tmp_path / certifier
        arguments = ["--certifier", certifier, "--attack", "none", "--eps", "0.05,0.1", "--radii", str(folder)]
        done = here("evaluate", run.id, "--storage", str(run.storage), *arguments)
        assert done.returncode == 0, done.stderr
        table = pd.read_csv(folder / "radii.csv")
        assert table["image"].tolist() == list(range(360))
        for row in json.loads((folder / "scores.json").read_text())["rows"]:
            share = (table["certified_radius"] > row["eps"]).mean()
            assert share == pytest.approx(row["certified"], abs=1 / 360)  # by bisection, one may be off
        for name in ("certified_accuracy", "radius_histogram"):
            assert (folder / f"{name}.pdf").stat().st_size > 1000 and f"{folder / name}.png" in done.stdout
            with Image.open(folder / f"{name}.png") as image:
                assert len(set(image.convert("L").get_flattened_data())) > 10
        client = MlflowClient(f"sqlite:///{run.storage}/mlflow.db")
        last = max(client.list_artifacts(run.id, "scores"), key=lambda found: int(Path(found.path).name))
        logged = {Path(file.path).name for file in client.list_artifacts(run.id, last.path)}
        assert logged == {path.name for path in folder.iterdir()}
        steps = [m.step for m in client.get_metric_history(run.id, f"test/certified_accuracy/{certifier}/eps-0.05")]
        assert steps == [int(Path(last.path).name)]


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
        (["evaluate", "nothing", *storage], "there is no such run"),
        (["evaluate", str(tmp_path / "nothing.pt")], "no such file"),
        (["evaluate", str(run.weights), "--eps", ","], "eps=,"),
        (["evaluate", str(tmp_path / "negative.pt")], "standard deviation"),
        (["certify", str(run.weights), str(tmp_path / "deep.png")], "its mode is I;16"),
        (["evaluate", str(tmp_path / "damaged.pt")], "can't be read as weights"),
        (["evaluate", str(run.weights), "--eps", "0.1,x"], "eps=0.1,x"),
        (["evaluate", str(run.weights), "--certifier", "magic"], "certifier=magic"),
        (["evaluate", str(run.weights), "--certifier", "crown"], "no ReLU or tanh"),
        (["evaluate", str(run.weights), "--attack", "magic"], "attack=magic: must be none, or of pgd"),
        (["evaluate", str(run.weights), "--attack", "none", "evaluation.attack.steps=3"], "attack=none"),
        (["evaluate", str(run.weights), "--attack", "pgd,pgd"], "each can be named once"),
        (["evaluate", str(run.weights), "--radii", str(run.weights)], "can't be a folder"),
        (["evaluate", str(run.weights), "model.width=3"], "model.width=3: is part of what was trained"),
        (["evaluate", str(run.weights), "evaluation.attack.steps=0"], "evaluation.attack.steps=0"),
        (["evaluate", str(run.weights), "--workers", "99"], "workers=99"),
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
    found = {}
    for certifier in ("interval", "crown"):
        done = here("evaluate", str(tmp_path / "w.pt"), "--eps", "0.001", "--certifier", certifier, "--json", "--sound")
        assert done.returncode == 0, done.stderr
        found[certifier] = json.loads(done.stdout)["rows"][0]["certified"]
    assert 0 < found["interval"] <= found["crown"]
    done = here("evaluate", str(tmp_path / "w.pt"), "--certifier", "lipschitz")
    assert done.returncode == 2 and "interval will do" in done.stderr
