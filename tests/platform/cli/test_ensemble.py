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
from linflab.models.networks.ensemble import MAX_WEIGHT_RATIO
from linflab.models.robustness.certification import certify
from linflab.models.robustness.margins import margin
from linflab.platform.data.datasets import load_dataset
from linflab.platform.results.ensemble import log_ensemble, prepare_ensemble
from linflab.platform.results.ensemble_weights import choose_weights, limit_ratios, refine_weights
from linflab.platform.tracking.mlflow import client_of
from linflab.platform.tracking.storage import Storage
from linflab.platform.training.weights import load_weights, save_weights
from linflab.reports import schema
from linflab.reports.records import read_run
from tests.conftest import RECIPE, RunCli, assert_rejected
from tests.platform.interruptions import Command

pytestmark = pytest.mark.integration

SHORT = ["training.epochs=1", "evaluation.attack.steps=3", "evaluation.attack.restarts=1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage with runs of one epoch: distance nets, one with flips, a ReLU network, a net for another eps."""
    folder = tmp_path_factory.mktemp("runs")
    linflab.train(RECIPE, [*SHORT, "seed=0"], folder, "first")
    linflab.train(RECIPE, [*SHORT, "seed=1", "model.width=20", "training.epochs=2"], folder, "second")
    linflab.train(RECIPE, [*SHORT, "augmentation.horizontal_flip=true"], folder, "flipped")
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


def test_members_trained_on_cuda_are_averaged_on_the_cpu(storage: Storage) -> None:
    """The command sees no CUDA device, on any machine."""
    records = linflab.records(storage.root).set_index(schema.NAME)
    for name in ("first", "second"):
        (file,) = (path for path in storage.root.rglob(schema.WEIGHTS_FILE) if records["run_id"][name] in path.parts)
        weights = load_weights(file)
        compute = weights.experiment.compute.model_copy(update={"device": "cuda"})
        experiment = weights.experiment.model_copy(update={"compute": compute})
        save_weights(file, weights.network, experiment, epoch=1)
    arguments = ("ensemble", "first", "second", "--weights", "auto", "--name", "mean")
    assert "Mean of 2 networks" in Command(storage.root, *arguments, CUDA_VISIBLE_DEVICES="").finish()


def test_relu_networks_are_averaged_with_chosen_weights_and_certified_by_ibp(storage: Storage, run_cli: RunCli) -> None:
    folder = ["--storage", str(storage.root)]
    done = run_cli("ensemble", "relu", "first", "--name", "mixed", "--weights", "auto", *folder)
    assert done.returncode == 0, done.stderr
    latest = linflab.records(storage.root).iloc[0]
    assert latest[schema.CERTIFIER] == "ibp-sound" and latest[schema.TEST_VIOLATIONS] == 0
    for attack in ("pgd", "targeted_apgd", "surrogate_pgd"):  # those of both
        assert attack in latest["evaluation.attack.methods"]
    network = linflab.load("mixed", storage.root)
    assert type(network) is Ensemble
    assert latest[schema.SELECTION].endswith("with weights chosen on validation images")
    tags = read_run(client_of(storage), latest["run_id"]).data.tags
    assert "--weights=auto" in shlex.split(tags[schema.COMMAND])
    weights = json.loads(latest["model.weights"])
    assert network.shares == tuple(weight / sum(weights) for weight in weights)
    assert weights[1] > weights[0]  # distances are smaller than logits of ReLU networks

    # A factor of 64 nearly selects one member, so the mean certifies about as many validation images as each of them.
    validation = load_dataset("digits").validation
    images, labels = validation.batch(torch.arange(len(validation)))
    counts = [
        int(certify(linflab.load(run, storage.root), images, labels, 0.1, "ibp").sum())
        for run in ("mixed", "relu", "first")
    ]
    assert counts[0] >= max(counts[1:]) - 2 and latest[schema.BEST_VALIDATION_CERTIFIED] == counts[0] / len(images)


def test_a_single_run_is_averaged_over_mirror_images(storage: Storage, run_cli: RunCli, tmp_path: Path) -> None:
    folder = ["--storage", str(storage.root)]
    done = run_cli("ensemble", "flipped", "--mirror", "--name", "both sides", *folder)
    assert done.returncode == 0, done.stderr
    assert "Mean of 1 network over images and their mirror images." in " ".join(done.stdout.split())
    records = linflab.records(storage.root).set_index(schema.NAME)
    latest, member = records.loc["both sides"], linflab.load("flipped", storage.root)
    assert latest[schema.FLOPS] == 2 * records.loc["flipped"][schema.FLOPS] and latest["model.mirror"] == "[True]"
    assert latest[schema.CERTIFIER] == "lipschitz-sound" and latest[schema.TEST_VIOLATIONS] == 0
    test = load_dataset("digits").test
    images, labels = test.batch(torch.arange(len(test)))
    with torch.no_grad():
        logits = (member(images).double() + member(torch.stack(images.unbind(3)[::-1], dim=3)).double()) / 2
    margins = margin(logits, labels)
    assert latest[schema.TEST_CLEAN] == pytest.approx((margins > 0).double().mean().item(), abs=2 / len(test))
    expected = (margins / (2 * member.lipschitz_constant) > 0.1).double().mean().item()
    assert latest[schema.TEST_CERTIFIED] == pytest.approx(expected, abs=2 / len(test))
    _, *arguments = shlex.split(latest[schema.COMMAND])
    assert "--mirror" in arguments and run_cli(*arguments, *folder).returncode == 0
    assert linflab.records(storage.root).iloc[0][schema.TEST_ROBUST] == latest[schema.TEST_ROBUST]
    exported = run_cli("export", latest["run_id"], "--format", "onnx", "--output-dir", str(tmp_path / "onnx"), *folder)
    assert exported.returncode == 0, exported.stderr
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"))
    (computed,) = session.run(None, {session.get_inputs()[0].name: images[:3].numpy()})
    torch.testing.assert_close(torch.from_numpy(computed).double(), logits[:3], rtol=0, atol=1e-4)


def test_only_runs_with_flips_are_mirrored(storage: Storage, run_cli: RunCli) -> None:
    runs = ["relu", "flipped"]
    chosen = prepare_ensemble(storage, runs, "auto", mirror=True)
    assert isinstance(chosen.network, Ensemble) and chosen.has_chosen_weights
    assert chosen.network.mirror == (False, True)
    validation, members = load_dataset("digits").validation, list(chosen.network.members)
    mean = Ensemble(members[1:], mirror=[True]).eval()
    assert chosen.weights == choose_weights([members[0], mean], runs, validation, chosen.experiment)
    assert chosen.weights != choose_weights(members, runs, validation, chosen.experiment)
    assert prepare_ensemble(storage, ["flipped"], "auto", mirror=True).weights == (1.0,)
    assert prepare_ensemble(storage, runs).network.mirror == (False, False)

    done = run_cli("ensemble", *runs, "--mirror", "--name", "one side", "--storage", str(storage.root))
    assert "Mean of 2 networks, 1 of them over images and their mirror images." in " ".join(done.stdout.split())
    records = linflab.records(storage.root).set_index(schema.NAME)
    latest = records.loc["one side"]
    assert latest[schema.METHOD] == "Ensemble (IBP, mirrored l_inf-dist Net)"
    assert latest[schema.FLOPS] == records.loc["relu"][schema.FLOPS] + 2 * records.loc["flipped"][schema.FLOPS]
    assert latest[schema.SELECTION].endswith("2 runs, 1 of them over images and their mirror images")
    images = torch.rand(4, 1, 8, 8)
    with torch.no_grad():
        relu, flipped = (linflab.load(run, storage.root) for run in runs)
        expected = relu(images) / 2 + (flipped(images) + flipped(images.flip(3))) / 4
        torch.testing.assert_close(linflab.load("one side", storage.root)(images), expected)


def test_given_weights_come_back(storage: Storage) -> None:
    prepared = prepare_ensemble(storage, ["first", "second"], (1.0, 2.5))
    assert prepared.weights == (1.0, 2.5) and not prepared.has_chosen_weights
    assert prepared.experiment.to_flat_dict()["model.weights"] == [1.0, 2.5]
    result = log_ensemble(storage, prepared, "weighted", {})
    network = linflab.load(result.run_id, storage.root)
    assert isinstance(network, LipschitzEnsemble) and network.shares == (1 / 3.5, 2.5 / 3.5)
    images = torch.rand(4, 1, 8, 8)
    with torch.no_grad():
        first, second = (linflab.load(run, storage.root)(images) for run in ("first", "second"))
        torch.testing.assert_close(network(images), (first + 2.5 * second) / 3.5)


def test_search_balances_scales_and_prefers_weights_near_those_given() -> None:
    """Three networks that each certify another image; only together do they certify all, if their sizes are similar."""
    bounds = torch.tensor([[-3.0, 1.0, 1.0], [1.0, -3.0, 1.0], [1.0, 1.0, -3.0]])
    parts = [torch.stack([row, torch.full((3,), -torch.inf)], dim=1) for row in bounds]
    assert refine_weights([1.0, 1.0, 1.0], parts) == [1.0, 1.0, 1.0]
    assert refine_weights([16.0, 1.0, 1.0], parts) == [1.0, 1.0, 1.0]
    assert refine_weights([20.0, 1.0, 1.5], parts) == [1.25, 1.0, 1.5]
    certified = [part - 10 for part in parts]
    assert refine_weights([20.0, 1.0, 1.5], certified) == [20.0, 1.0, 1.5]  # all are certified with any weights


@pytest.mark.parametrize("largest", [1.0, 3e10 / 7, 64e12, 1e300])
def test_ratios_of_chosen_weights_are_accepted(largest: float) -> None:
    small, middle, large = limit_ratios([1e-12, largest / 3, largest])
    assert (middle, large) == (largest / 3, largest)
    assert MAX_WEIGHT_RATIO * (1 - 1e-6) < large / small <= MAX_WEIGHT_RATIO
    assert limit_ratios([1.0, 1000.0]) == [1.0, 1000.0]


def test_weights_are_not_chosen_on_training_images(trained: Path, storage: Storage, run_cli: RunCli) -> None:
    folder = ["--storage", str(storage.root)]
    linflab.train(RECIPE, [*SHORT, "training.include_validation=true"], storage.root, "all images")
    rejection = run_cli("ensemble", "first", "all images", "--name", "x", "--weights", "auto", *folder)
    assert_rejected(rejection, "weights=auto", "all images", "training.include_validation=true", "--weights 1,10")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["first", "--name", "x"], ["runs=first", "2", "--mirror"]),
        (
            ["first", "relu", "--name", "x", "--mirror"],
            ["mirror=true", "first, relu", "augmentation.horizontal_flip=true"],
        ),
        (["first", "first", "--name", "x"], ["first", "twice"]),
        (["first", "other eps", "--name", "x"], ["other eps", "eps=0.05", "eps=0.1"]),
        (["first", "missing", "--name", "x"], ["missing"]),
        (
            ["first", "pretrained:digits_linf_dist_net", "--name", "x"],
            ["pretrained:digits_linf_dist_net", "logged run"],
        ),
        (["first", "hf://owner/name", "--name", "x"], ["hf://owner/name", "logged run"]),
        (["first", "--name", "x", "--mirror"], ["mirror=true", "(first)", "augmentation.horizontal_flip=true"]),
        (["first", "second", "--name", " "], ["name"]),
        (["first", "second", "--name", "x", "--tag", "k"], ["tag=k", "KEY=VALUE"]),
        (["first", "second", "--name", "x", "--weights", "1,x"], ["weights=1,x", "auto"]),
        (["first", "second", "--name", "x", "--weights", "1,0"], ["weights=1,0", "positive"]),
        (["first", "second", "--name", "x", "--weights", "1,inf"], ["weights=1,inf", "positive"]),
        (["first", "second", "--name", "x", "--weights", "1,2,3"], ["model.weights=1,2,3", "2 members"]),
        (["first", "second", "--name", "x", "--weights", "1,1e12"], ["model.weights=1,1e+12", "factor"]),
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
