"""Shipped networks: their files, hashes and results, and the export that makes them."""

import json
from pathlib import Path

import pytest
import torch

import linflab
from linflab.platform.config.overrides import load_config
from linflab.platform.data.datasets import is_prepared
from linflab.platform.errors import InputError
from linflab.platform.exchange.pretrained import PREFIX, PRETRAINED_DIR, pretrained_names
from linflab.platform.results.load import find_weights
from linflab.platform.training.evaluation import EvaluationSpec, evaluate
from linflab.platform.training.weights import build_network, load_matching_dataset, load_weights, save_weights
from tests.conftest import RECIPE, RunCli, assert_rejected

MAX_BYTES = 700_000


def test_shipped_networks_are_small() -> None:
    assert len(pretrained_names()) == 3
    sizes = [path.stat().st_size for path in PRETRAINED_DIR.rglob("*") if path.suffix in (".safetensors", ".npy")]
    assert sum(sizes) < MAX_BYTES


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name.startswith("digits") else pytest.mark.slow)  # slow tests have the datasets
        for name in pretrained_names()
    ],
)
def test_shipped_networks_are_certified_as_in_their_manifest(name: str) -> None:
    path, storage, run = find_weights(PREFIX + name, Path("runs"))
    assert storage is None and not run
    weights, manifest = load_weights(path), json.loads((path.parent / "manifest.json").read_text())
    assert manifest["float16"] and manifest["commit"] and manifest["selection"]
    assert all(torch.equal(tensor, tensor.half().to(tensor)) for tensor in weights.network.state_dict().values())
    if not (weights.experiment.dataset == "digits" or is_prepared(weights.experiment.dataset)):
        pytest.skip(f"needs {weights.experiment.dataset} in $LINFLAB_DATA")
    certifier = manifest["certifier"].removesuffix("-sound")
    spec = EvaluationSpec((weights.experiment.eps,), certifier, sound=manifest["certifier"].endswith("-sound"))
    test = load_matching_dataset(weights).test
    (accuracies,) = evaluate(weights.network, test, spec, 500)
    # The order of sums differs between processors.
    assert accuracies.clean == pytest.approx(manifest["clean"], abs=2.5 / len(test))
    assert accuracies.certified == pytest.approx(manifest["certified"], abs=2.5 / len(test))
    assert manifest["certified"] <= manifest["robust"] <= manifest["clean"]


def test_shipped_networks_load_by_name() -> None:
    (name, *_) = pretrained_names()
    assert not linflab.load(PREFIX + name).training
    with pytest.raises(InputError, match=rf"^pretrained:\.\./x: not found; use {PREFIX}{name}, "):
        linflab.load("pretrained:../x")


def test_float16_exports_have_results_of_the_rounded_network(tmp_path: Path, run_cli: RunCli) -> None:
    experiment = load_config(RECIPE, ["model.width=8", "evaluation.attack.steps=1"])
    torch.manual_seed(0)
    network = build_network(experiment)
    weights = tmp_path / "w.pt"
    save_weights(weights, network, experiment, 0)
    folder = tmp_path / "half"
    export = ("export", str(weights), "--output-dir", str(folder), "--float16", "--format")
    assert_rejected(run_cli(*export, "onnx"), "format=onnx")
    assert not folder.exists()
    assert run_cli(*export, "safetensors").returncode == 0
    manifest = json.loads((folder / "manifest.json").read_text())
    loaded = load_weights(folder / "model.safetensors")
    test = load_matching_dataset(loaded).test
    images, labels = test.batch(torch.arange(len(test)))
    with torch.no_grad():
        clean = (loaded.network(images).argmax(dim=1) == labels).double().mean().item()
    assert manifest["float16"] and manifest["clean"] == pytest.approx(clean, abs=1e-9)
    for rounded, original in zip(loaded.network.parameters(), network.parameters(), strict=True):
        assert torch.equal(rounded, original.half().float())
    assert (folder / "model.safetensors").stat().st_size < 0.7 * weights.stat().st_size
    with torch.no_grad():
        next(network.parameters()).fill_(1e5)
    save_weights(weights, network, experiment, 0)
    done = run_cli(
        "export", str(weights), "--output-dir", str(tmp_path / "big"), "--float16", "--format", "safetensors"
    )
    assert_rejected(done, "float16")
    assert not (tmp_path / "big").exists()
