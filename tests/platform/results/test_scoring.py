"""`linflab evaluate` and `linflab certify`: their output, the metrics that they record, and rejected input."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.tracking import MlflowClient
from PIL import Image

from linflab.models.robustness.attacks.suite import AttackConfig
from linflab.models.robustness.certification import certified_radius
from linflab.platform.config.overrides import load_config
from linflab.platform.data.datasets import load_dataset
from linflab.platform.tracking.storage import Storage
from linflab.platform.training.evaluation import Accuracies, EvaluationSpec, evaluate
from linflab.platform.training.weights import build_network, load_network, save_weights
from tests.conftest import RECIPE, FinishedTraining, RunCli, TrainedOnDigits, assert_rejected, has_words, time_limit


@pytest.fixture(scope="module")
def run(finished_training: FinishedTraining, tmp_path_factory: pytest.TempPathFactory) -> FinishedTraining:
    """A finished run in a storage for this file's tests, which evaluate it again."""
    folder = shutil.copytree(finished_training.storage, tmp_path_factory.mktemp("runs"), dirs_exist_ok=True)
    return replace(finished_training, storage=Storage.open(Path(folder)).root)


def test_evaluate_repeats_the_metrics_of_training(run: FinishedTraining, run_cli: RunCli) -> None:
    done = run_cli("evaluate", run.id, "--storage", str(run.storage), "--json")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["results"]
    client = MlflowClient(f"sqlite:///{run.storage}/mlflow.db")
    metrics = client.get_run(run.id).data.metrics
    for name in ("clean", "certified", "robust"):
        assert row[name] == metrics[f"test/{name}_accuracy"]
    assert metrics["test/certified_accuracy/lipschitz-sound/eps-0.1"] == row["certified"]
    assert metrics["test/robust_accuracy/pgd-surrogate_pgd/eps-0.1"] == row["robust"]
    (artifact,) = client.list_artifacts(run.id, "evaluations/1")
    assert artifact.path == "evaluations/1/evaluation.json"
    evaluation = json.loads(Path(client.download_artifacts(run.id, artifact.path)).read_text())
    assert evaluation["results"] == [row] and evaluation["experiment"]["evaluation.attack.steps"] == 10


def test_evaluate_accepts_many_eps_and_certifiers(run: FinishedTraining, run_cli: RunCli) -> None:
    results = {}
    for certifier in ("lipschitz", "ibp"):
        for sound, arithmetic in ((True, []), (False, ["--real-arithmetic"])):
            arguments = ["--eps", "0.02,0.1,0.2", "--certifier", certifier, "--attacks", "none", "--json", *arithmetic]
            done = run_cli("evaluate", str(run.weights), *arguments)
            assert done.returncode == 0, done.stderr
            evaluation = json.loads(done.stdout)
            assert (evaluation["certifier"], evaluation["sound"]) == (certifier, sound)
            results[certifier, sound] = [row["certified"] for row in evaluation["results"]]
            certified_real = [row["certified_real"] for row in evaluation["results"]]
            if sound:
                expected_real = certified_real
            else:
                assert expected_real == results[certifier, False] and certified_real == [None] * 3
            assert all(row["robust"] is None for row in evaluation["results"])
    for values in results.values():
        assert values == sorted(values, reverse=True) and values[0] > values[2]
    for plain, sound in zip(results["lipschitz", False], results["lipschitz", True], strict=True):
        assert plain - 0.01 <= sound <= plain
    assert all(a <= b for a, b in zip(results["lipschitz", False], results["ibp", False], strict=True))


def test_certificates_are_sound_by_default(run: FinishedTraining, run_cli: RunCli) -> None:
    """A flag or the setting changes this; the evaluation after training does not."""
    for arguments, sound in (
        ([], True),
        (["--sound"], True),
        (["--real-arithmetic"], False),
        (["evaluation.sound=false"], False),
        (["evaluation.sound=false", "--sound"], True),
    ):
        done = run_cli("evaluate", str(run.weights), "--attacks", "none", "--json", *arguments)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["sound"] == sound, arguments


def test_evaluate_prints_results_and_attack_settings(run: FinishedTraining, run_cli: RunCli) -> None:
    done = run_cli("evaluate", str(run.weights), "--eps", "0.05,0.1")
    assert done.returncode == 0, done.stderr
    for words in ("360", "lipschitz", "PGD", "10 steps", "0.25 eps", "1 restart", "p = 32"):
        assert has_words(done.stdout, words), words
    assert [line.split()[0] for line in done.stdout.splitlines()[:3]] == ["eps", "0.05", "0.1"]


def test_several_eps_give_the_results_of_each_eps(digits_net: TrainedOnDigits) -> None:
    network, split = digits_net.trained.network, digits_net.dataset.test
    attack, seen = AttackConfig(steps=3), []
    spec = EvaluationSpec((0.05, 0.1), "lipschitz", attack=attack, seed=5)
    together = evaluate(network, split, spec, 100, seen.append)
    separate = [evaluate(network, split, replace(spec, eps=(eps,)), 100) for eps in spec.eps]
    assert [[one] for one in together] == separate and together[0].robust > together[1].robust
    assert [len(batch.positions) for batch in seen] == [100, 100, 100, 60]


def test_certificate_violations_end_with_exit_status_1(
    run: FinishedTraining, monkeypatch: pytest.MonkeyPatch, run_cli: RunCli
) -> None:
    accuracies = [Accuracies(0.9, 0.8, robust=0.7, certificate_violations=3)]
    monkeypatch.setattr("linflab.platform.results.evaluate.aggregate_results", lambda *arguments: accuracies)
    done = run_cli("evaluate", str(run.weights))
    assert_rejected(done, "3", "lipschitz", status=1)


def test_certificate_violations_are_counted_by_sample(digits_net: TrainedOnDigits) -> None:
    """All images that an unsound certifier certifies and the attack breaks are counted."""
    network, split = digits_net.trained.network, digits_net.dataset.test
    spec = EvaluationSpec((0.3,), "lipschitz", sound=False, attack=AttackConfig(steps=10))
    (sound,) = evaluate(network, split, spec, 100)
    assert sound.certificate_violations == 0
    std = network.features.normalize.std
    network.features.normalize.std = 10 * std  # changes the Lipschitz constant only
    network.features.normalize.forward = lambda images: (images - network.features.normalize.mean) / std
    try:
        (unsound,) = evaluate(network, split, spec, 100)
    finally:
        network.features.normalize.std = std
        del network.features.normalize.forward
    assert unsound.robust == sound.robust and unsound.certified > sound.certified
    assert unsound.certificate_violations >= round(360 * (unsound.certified - unsound.robust)) > 50


@pytest.mark.slow
def test_workers_do_not_change_the_results(run: FinishedTraining, run_cli: RunCli) -> None:
    arguments = ["evaluate", str(run.weights), "evaluation.batch_size=70", "--eps", "0.05,0.1", "--json"]
    single, parallel = run_cli(*arguments), run_cli(*arguments, "--workers", "2")
    assert single.returncode == parallel.returncode == 0, parallel.stderr
    assert json.loads(single.stdout) == json.loads(parallel.stdout)


def test_radii_are_written_to_files(run: FinishedTraining, run_cli: RunCli, tmp_path: Path) -> None:
    for certifier in ("lipschitz", "ibp"):
        folder = tmp_path / certifier
        arguments = ["--certifier", certifier, "--attacks", "none", "--eps", "0.05,0.1", "--radii-dir", str(folder)]
        done = run_cli("evaluate", run.id, "--storage", str(run.storage), *arguments)
        assert done.returncode == 0, done.stderr
        table = pd.read_csv(folder / "radii.csv")
        assert table["image"].tolist() == list(range(360))
        evaluation = json.loads((folder / "evaluation.json").read_text())
        assert evaluation["images"] == {name: table[name].tolist() for name in table.columns if name != "image"}
        labels = load_dataset("digits").test.labels.numpy()
        assert list(table.columns) == ["image", "certified_radius", "label", "prediction"]
        np.testing.assert_array_equal(table["label"], labels)
        np.testing.assert_array_equal(table["prediction"] == labels, table["certified_radius"] > 0)
        for row in evaluation["results"]:
            certified = (table["certified_radius"] > row["eps"]).mean()
            assert certified == pytest.approx(row["certified"], abs=1 / 360)  # bisection may be off by one image
        for name in ("certified_accuracy", "radius_histogram"):
            assert (folder / f"{name}.pdf").read_bytes().startswith(b"%PDF") and f"{folder / name}.png" in done.stdout
            with Image.open(folder / f"{name}.png") as image:  # tests/reports/test_figures.py checks the content
                image.verify()
        client = MlflowClient(f"sqlite:///{run.storage}/mlflow.db")
        last = max(client.list_artifacts(run.id, "evaluations"), key=lambda found: int(Path(found.path).name))
        logged = {Path(file.path).name for file in client.list_artifacts(run.id, last.path)}
        assert logged == {path.name for path in folder.iterdir()}
        steps = [
            m.step for m in client.get_metric_history(run.id, f"test/certified_accuracy/{certifier}-sound/eps-0.05")
        ]
        assert steps == [int(Path(last.path).name)]


def test_attack_results_of_each_image_are_written(run: FinishedTraining, run_cli: RunCli, tmp_path: Path) -> None:
    arguments = ["--eps", "0.05,8/255", "--radii-dir", str(tmp_path), "--json", "evaluation.attack.steps=3"]
    done = run_cli("evaluate", str(run.weights), "evaluation.batch_size=100", *arguments)
    assert done.returncode == 0, done.stderr
    table, printed = pd.read_csv(tmp_path / "radii.csv"), json.loads(done.stdout)
    assert table.columns[4:].tolist() == ["robust_eps_0.05", f"robust_eps_{8 / 255!r}"]
    for row in printed["results"]:
        robust = table[f"robust_eps_{row['eps']!r}"]
        assert robust.mean() == row["robust"]
        assert (robust >= (table["certified_radius"] > row["eps"])).all()
    assert (table["label"] == table["prediction"]).mean() == printed["results"][0]["clean"]
    assert printed["images"]["robust_eps_0.05"] == table["robust_eps_0.05"].tolist()


def test_own_images_are_certified(run: FinishedTraining, run_cli: RunCli, tmp_path: Path) -> None:
    experiment, network = load_network(run.weights)
    images, _ = load_dataset(experiment.dataset).test.batch(torch.arange(3))
    gray = (255 * images).round().to(torch.uint8)
    for k, image in enumerate(gray):
        Image.fromarray(image[0].numpy()).save(tmp_path / f"{k}.png")
    np.save(tmp_path / "all.npy", gray.numpy())
    np.save(tmp_path / "last.npy", images[2].numpy())
    files = [str(tmp_path / f"{k}.png") for k in range(3)]
    seen = gray.float() / 255
    predictions = network(seen).argmax(dim=1)
    radii = certified_radius(network, seen, predictions, "lipschitz", sound=True).clamp_min(0)
    for inputs, names in (
        ([*files, str(tmp_path / "all.npy")], [*files, *(f"{tmp_path}/all.npy[{k}]" for k in range(3))]),
        ([str(tmp_path)], [*files, *(f"{tmp_path}/all.npy[{k}]" for k in range(3)), f"{tmp_path}/last.npy"]),
    ):
        for weights in ([str(run.weights)], [run.id[:10], "--storage", str(run.storage)]):
            done = run_cli("certify", weights[0], *inputs, *weights[1:], "--json")
            assert done.returncode == 0, done.stderr
            rows = {row["image"]: row for row in json.loads(done.stdout)}
            assert rows.keys() == set(names)
            for name in names:
                k = int(name.rstrip("]").removesuffix(".png")[-1]) if "last" not in name else 2
                assert rows[name]["prediction"] == predictions[k] and rows[name]["certifier"] == "lipschitz"
                assert rows[name]["radius"] == pytest.approx(radii[k].item(), rel=1e-6, abs=2e-3 * ("last" in name))


def test_own_images_are_decided_at_one_eps(run: FinishedTraining, run_cli: RunCli, tmp_path: Path) -> None:
    images, _ = load_dataset("digits").test.batch(torch.arange(3))
    np.save(tmp_path / "some.npy", images.numpy())
    command = ["certify", str(run.weights), str(tmp_path / "some.npy")]
    for certifier in ("complete", "cascade", "ibp"):
        limit = [] if certifier == "ibp" else ["--timeout", "0.5"]
        done = run_cli(*command, "--eps", "0.05", "--certifier", certifier, *limit, "--json")
        assert done.returncode == 0, done.stderr
        rows = json.loads(done.stdout)
        assert all(row["seconds"] > 0 and "radius" not in row for row in rows) and len(rows) == 3
        assert {row["status"] for row in rows} <= {"certified", "falsified", "unknown"}
    done = run_cli(*command, "--certifier", "complete", "--timeout", "0.05")
    assert done.returncode == 0 and "radius" in done.stdout
    done = run_cli(*command, "--eps", "0.05")
    assert done.returncode == 0 and "status" in done.stdout.splitlines()[0]
    assert_rejected(run_cli(*command, "--timeout", "5"), "timeout=5", "certifier=lipschitz", "cascade")
    assert_rejected(run_cli(*command, "--eps", "0.1,0.2"), "eps=0.1,0.2")


def test_arrays_without_channels_or_range_name_their_fix(
    run: FinishedTraining, run_cli: RunCli, tmp_path: Path
) -> None:
    for array, expected in (
        (np.zeros((5, 8, 8), np.uint8), "images[:, None]"),
        (np.zeros((8, 8), np.uint8), "images[None]"),
        (np.full((5, 1, 8, 8), 200.0), "divide them by 255"),
    ):
        np.save(tmp_path / "array.npy", array)
        assert_rejected(run_cli("certify", str(run.weights), str(tmp_path / "array.npy")), expected)


def test_invalid_input_is_rejected(run: FinishedTraining, run_cli: RunCli, tmp_path: Path) -> None:
    (tmp_path / "damaged.pt").write_bytes(b"no weights")
    (tmp_path / "text.png").write_text("no image")
    Image.new("L", (9, 8)).save(tmp_path / "wide.png")
    Image.fromarray(np.full((8, 8), 10000, dtype=np.uint16)).save(tmp_path / "deep.png")
    os.mkfifo(tmp_path / "pipe.pt")
    experiment, network = load_network(run.weights)
    network.features.normalize.std.neg_()
    save_weights(tmp_path / "negative.pt", network, experiment, 0)
    storage = ["--storage", str(run.storage)]
    for arguments, expected in (
        (["evaluate", "nothing", *storage], "nothing"),
        (["evaluate", str(tmp_path / "nothing.pt")], "nothing.pt"),
        (["evaluate", str(tmp_path / "pipe.pt")], "pipe.pt"),
        (["certify", str(tmp_path / "pipe.pt"), str(tmp_path / "wide.png")], "pipe.pt"),
        (["certify", "nothing", str(tmp_path / "wide.png"), *storage], "nothing"),
        (["evaluate", str(run.weights), "--eps", ","], "eps=,"),
        (["evaluate", str(tmp_path / "negative.pt")], "negative.pt"),
        (["certify", str(run.weights), str(tmp_path / "deep.png")], "deep.png"),
        (["evaluate", str(tmp_path / "damaged.pt")], "damaged.pt"),
        (["evaluate", str(run.weights), "--eps", "0.1,x"], "eps=0.1,x"),
        (["evaluate", str(run.weights), "--eps", "1e400"], "eps=1e400"),
        (["evaluate", str(run.weights), "--eps", "1e99999999"], "eps=1e99999999"),
        (["evaluate", str(run.weights), "--eps", "1/1e400"], "eps=1/1e400"),
        (["evaluate", str(run.weights), "--radii-dir", "/proc/self/fdinfo"], "radii-dir=/proc/self/fdinfo"),
        (["evaluate", str(run.weights), "--certifier", "magic"], "certifier=magic"),
        (["evaluate", str(run.weights), "--certifier", "crown"], "certifier=crown"),
        (["evaluate", str(run.weights), "--attacks", "magic"], "attacks=magic"),
        (["evaluate", str(run.weights), "--attacks", "none", "evaluation.attack.steps=3"], "attacks=none"),
        (["evaluate", str(run.weights), "--attacks", "pgd,pgd"], "attack.methods"),
        (["evaluate", str(run.weights), "--radii-dir", str(run.weights)], f"radii-dir={run.weights}"),
        (["evaluate", str(run.weights), "model.width=3"], "model.width=3"),
        (["evaluate", str(run.weights), "evaluation.attack.steps=0"], "evaluation.attack.steps=0"),
        (["evaluate", str(run.weights), "--workers", "99"], "workers=99"),
        (["certify", str(run.weights), str(tmp_path / "text.png")], "text.png"),
        (["certify", str(run.weights), str(tmp_path / "wide.png")], "wide.png"),
        (["certify", str(run.weights), str(tmp_path / "none.png")], "none.png"),
    ):
        with time_limit(60):
            done = run_cli(*arguments)
        assert_rejected(done, expected)


@pytest.mark.slow
def test_hybrids_have_no_lipschitz_certificate(run_cli: RunCli, tmp_path: Path) -> None:
    settings = ["model.kind=linf_dist_hybrid", "model.backbone.kind=linf_dist_mlp", "model.backbone.width=8"]
    settings += ["objective.kind=worst_case_cross_entropy", "objective.eps_train=0.1"]
    experiment = load_config(RECIPE, settings)
    save_weights(tmp_path / "w.pt", build_network(experiment), experiment, 0)
    found = {}
    for certifier in ("ibp", "crown", "alpha_crown"):
        done = run_cli(
            "evaluate", str(tmp_path / "w.pt"), "--eps", "0.001", "--certifier", certifier, "--json", "--sound"
        )
        assert done.returncode == 0, done.stderr
        found[certifier] = json.loads(done.stdout)["results"][0]["certified"]
    assert 0 < found["ibp"] <= found["crown"] <= found["alpha_crown"]
    done = run_cli("evaluate", str(tmp_path / "w.pt"), "--certifier", "lipschitz")
    assert_rejected(done, "certifier=lipschitz", "ibp")


def test_results_are_recorded_when_files_cannot_be_written(
    run: FinishedTraining, run_cli: RunCli, tmp_path: Path
) -> None:
    client = MlflowClient(f"sqlite:///{run.storage}/mlflow.db")
    before = len(client.list_artifacts(run.id, "evaluations"))
    (tmp_path / "evaluation.json").mkdir()
    options = ["--radii-dir", str(tmp_path), "--attacks", "none", "--json", "--storage", str(run.storage)]
    done = run_cli("evaluate", run.id, *options)
    assert_rejected(done, f"radii-dir={tmp_path}", status=1)
    assert json.loads(done.stdout)["results"]
    assert len(client.list_artifacts(run.id, "evaluations")) == before + 1
