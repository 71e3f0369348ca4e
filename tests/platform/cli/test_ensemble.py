"""`linflab ensemble`: the mean of trained runs as a run that other commands accept."""

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

import linflab
from linflab.models.networks import Ensemble, LipschitzEnsemble
from linflab.models.robustness.margins import margin
from linflab.platform.data.datasets import load_dataset
from linflab.platform.tracking.mlflow import client_of
from linflab.platform.tracking.storage import Storage
from linflab.reports import schema
from linflab.reports.records import read_run
from tests.conftest import RECIPE, RunCli, assert_rejected

pytestmark = pytest.mark.integration

SHORT = ["training.epochs=1", "evaluation.attack.steps=3", "evaluation.attack.restarts=1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage with runs of one epoch: two distance nets, a ReLU network, and a net for another eps."""
    folder = tmp_path_factory.mktemp("runs")
    linflab.train(RECIPE, [*SHORT, "seed=0"], folder, "first")
    linflab.train(RECIPE, [*SHORT, "seed=1", "model.width=20", "training.epochs=2"], folder, "second")
    linflab.train("digits_eps0.1_ibp", SHORT, folder, "relu")
    linflab.train(RECIPE, [*SHORT, "eps=0.05", "objective.theta=0.05"], folder, "other eps")
    return folder


@pytest.fixture
def storage(trained: Path, tmp_path: Path) -> Storage:
    return Storage.open(Path(shutil.copytree(trained, tmp_path / "runs")))


def test_the_mean_of_runs_is_a_run(storage: Storage, run_cli: RunCli, tmp_path: Path) -> None:
    folder = ["--storage", str(storage.root)]
    done = run_cli("ensemble", "first", "second", "--name", "mean of two", "--tag", "k=v", *folder)
    assert done.returncode == 0, done.stderr
    records = linflab.records(storage.root).set_index(schema.NAME)
    ids = [records["run_id"][name] for name in ("first", "second")]
    run = read_run(client_of(storage), records["run_id"]["mean of two"])
    tags, metrics = run.data.tags, run.data.metrics
    assert tags[schema.MEMBERS].split(",") == ids
    assert tags[schema.CERTIFIER] == "lipschitz-sound" and tags[schema.USER_TAG + "k"] == "v"
    assert run.info.status == "FINISHED" and schema.MISSING not in tags and schema.FAILURE not in tags
    assert run.data.params["model.members.1.width"] == "20" and run.data.params["training.epochs"] == "3"
    assert metrics[schema.TRAIN_SECONDS] == pytest.approx(records[schema.TRAIN_SECONDS][["first", "second"]].sum())
    for count in (schema.PARAMETERS, schema.FLOPS):
        assert metrics[count] == records[count][["first", "second"]].sum()

    network = linflab.load("mean of two", storage.root)
    parts = [linflab.load(one, storage.root) for one in ids]
    data = load_dataset("digits")
    assert isinstance(network, LipschitzEnsemble)
    for split, clean, certified in (
        (data.test, schema.TEST_CLEAN, schema.TEST_CERTIFIED),
        (data.validation, schema.BEST_VALIDATION_CLEAN, schema.BEST_VALIDATION_CERTIFIED),
    ):
        images, labels = split.batch(torch.arange(len(split)))
        with torch.no_grad():
            logits = sum(part(images).double() for part in parts) / 2
        margins, bound = margin(logits, labels), sum(part.lipschitz_constant for part in parts) / 2
        assert metrics[clean] == pytest.approx((margins > 0).double().mean().item(), abs=2 / len(split))
        expected = (margins / (2 * bound) > 0.1).double().mean().item()
        assert metrics[certified] == pytest.approx(expected, abs=2 / len(split))
    assert metrics[schema.TEST_CERTIFIED] <= metrics[schema.TEST_ROBUST] <= metrics[schema.TEST_CLEAN]
    assert metrics[schema.TEST_VIOLATIONS] == 0

    # Its command repeats it.
    program, *arguments = shlex.split(tags[schema.COMMAND])
    assert program == "linflab"
    again = run_cli(*arguments, *folder)
    assert again.returncode == 0, again.stderr
    latest = linflab.records(storage.root).iloc[0]
    assert latest["run_id"] != run.info.run_id
    for name in (schema.TEST_CLEAN, schema.TEST_ROBUST, schema.TEST_CERTIFIED, schema.BEST_VALIDATION_CERTIFIED):
        assert latest[name] == metrics[name]

    # Other commands use it.
    run_id = run.info.run_id
    evaluated = run_cli("evaluate", run_id, "--certifier", "ibp", "--attacks", "none", "--json", *folder)
    assert evaluated.returncode == 0, evaluated.stderr
    assert json.loads(evaluated.stdout)["results"][0]["certified"] >= metrics[schema.TEST_CERTIFIED]
    np.save(tmp_path / "images.npy", images[:3].numpy())
    rows = json.loads(run_cli("certify", run_id, str(tmp_path / "images.npy"), "--json", *folder).stdout)
    assert [row["certifier"] for row in rows] == ["lipschitz"] * 3
    listed = {row["run"]: row["method"] for row in json.loads(run_cli("runs", "--json", *folder).stdout)}
    assert listed[run_id] == "Ensemble (2 l_inf-dist Net)"
    for what in (["run", run_id], ["compare", run_id, "first", "--no-quoted"]):
        report = run_cli("report", *what, "--output-dir", str(tmp_path / what[0]), *folder)
        assert report.returncode == 0 and "Ensemble" in report.stdout, report.stdout + report.stderr
    exported = run_cli("export", run_id, "--format", "onnx", "--output-dir", str(tmp_path / "onnx"), *folder)
    assert exported.returncode == 0, exported.stderr
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"))
    (computed,) = session.run(None, {session.get_inputs()[0].name: images[:3].numpy()})
    torch.testing.assert_close(torch.from_numpy(computed), network(images[:3]).detach(), rtol=0, atol=1e-4)


def test_relu_networks_are_averaged_and_certified_by_ibp(storage: Storage, run_cli: RunCli) -> None:
    done = run_cli("ensemble", "relu", "first", "--name", "mixed", "--storage", str(storage.root))
    assert done.returncode == 0, done.stderr
    latest = linflab.records(storage.root).iloc[0]
    assert latest[schema.CERTIFIER] == "ibp-sound" and latest[schema.TEST_VIOLATIONS] == 0
    for attack in ("pgd", "targeted_apgd", "surrogate_pgd"):  # those of both
        assert attack in latest["evaluation.attack.methods"]
    assert type(linflab.load("mixed", storage.root)) is Ensemble


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["first", "--name", "x"], ["runs=first", "2"]),
        (["first", "first", "--name", "x"], ["first", "twice"]),
        (["first", "other eps", "--name", "x"], ["other eps", "eps=0.05", "eps=0.1"]),
        (["first", "missing", "--name", "x"], ["missing"]),
        (["first", "second", "--name", " "], ["name"]),
        (["first", "second", "--name", "x", "--tag", "k"], ["tag=k", "KEY=VALUE"]),
    ],
)
def test_runs_that_cannot_be_averaged_are_rejected(
    storage: Storage, run_cli: RunCli, arguments: list[str], expected: list[str]
) -> None:
    before = len(linflab.records(storage.root))
    assert_rejected(run_cli("ensemble", *arguments, "--storage", str(storage.root)), *expected)
    assert len(linflab.records(storage.root)) == before


def test_ensembles_are_neither_averaged_nor_trained(storage: Storage, run_cli: RunCli, tmp_path: Path) -> None:
    folder = ["--storage", str(storage.root)]
    assert run_cli("ensemble", "first", "second", "--name", "inner", *folder).returncode == 0
    assert_rejected(run_cli("ensemble", "inner", "first", "--name", "x", *folder), "inner", "members")
    run_id = linflab.records(storage.root).iloc[0]["run_id"]
    config = client_of(storage).download_artifacts(run_id, schema.CONFIG_FILE, str(tmp_path))
    for options in ([], ["--dry-run"], ["--resume"]):
        rejection = run_cli("train", config, *options, *folder)
        assert_rejected(rejection, "model.kind=ensemble", "linflab ensemble")


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ("[{kind: linf_dist_mlp}]", ["model.members", "2"]),
        ("[{kind: linf_dist_mlp}, {kind: ensemble}]", ["model.members.1.kind=ensemble", "linf_dist_mlp"]),
        ("[{kind: linf_dist_mlp, widht: 8}, {kind: cnn7}]", ["model.members.0.widht=8", "width"]),
        ("[{kind: cnn7}, {kind: linf_dist_mlp, width: 0}]", ["model.members.1.width=0"]),
        ("[{kind: cnn7}, {width: 3}]", ["model.members.1.kind"]),
        ("[3, 4]", ["model.members.0=3"]),
    ],
)
def test_invalid_members_in_a_recipe_are_named(
    members: str, expected: list[str], run_cli: RunCli, tmp_path: Path
) -> None:
    recipe = tmp_path / "mean.yaml"
    recipe.write_text(
        f"dataset: digits\neps: 0.1\nmodel: {{kind: ensemble, members: {members}}}\n"
        "objective: {kind: cross_entropy}\ntraining: {epochs: 1, batch_size: 50}\n"
    )
    assert_rejected(run_cli("describe", str(recipe)), *expected)
