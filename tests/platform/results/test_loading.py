"""Networks loaded by run or file without their dataset; weights include the dataset info that certification needs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from linflab import load
from linflab.models.robustness.certification import certified_radius
from linflab.platform.config.overrides import load_config
from linflab.platform.data.datasets import load_dataset
from linflab.platform.errors import InputError
from linflab.platform.results.load import find_weights
from linflab.platform.training.weights import build_network, load_weights, save_weights
from tests.conftest import RECIPE, FinishedTraining, RunCli, assert_rejected

SHAPE = (3, 6, 7)
TINY = ["dataset=mine", "training.epochs=1", "model.width=8", "evaluation.attack.steps=1"]


@pytest.fixture
def own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Your own dataset: 60 images of three classes."""
    folder = tmp_path / "data" / "mine"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for split, size in (("train", 60), ("test", 12)):
        np.save(folder / f"{split}_images.npy", generator.integers(0, 256, (size, *SHAPE), dtype=np.uint8))
        np.save(folder / f"{split}_labels.npy", (np.arange(size) % 3).astype(np.uint8))
    monkeypatch.setenv("LINFLAB_DATA", str(folder.parent))
    return folder


def test_networks_of_own_data_certify_without_the_data(own_data: Path, tmp_path: Path, run_cli: RunCli) -> None:
    storage = tmp_path / "runs"
    flips = "augmentation.horizontal_flip=true"
    assert run_cli("train", RECIPE, *TINY, flips, "--name", "exp/1", "--storage", str(storage)).returncode == 0
    (run,) = {path.parents[1].name for path in storage.glob("artifacts/*/artifacts/weights.pt")}
    info = load_weights(find_weights(run, storage)[0]).info
    own_data.rename(tmp_path / "elsewhere")
    weights = load_weights(find_weights(run[:8], storage)[0])
    assert weights.info == info and weights.image_shape == SHAPE and info.classes == 3
    Image.fromarray(np.full((6, 7, 3), 90, dtype=np.uint8)).save(tmp_path / "image.png")
    assert find_weights("exp/1", storage)[2] == run  # the name of a run may look like a path
    for source in (run, str(storage / "artifacts" / run / "artifacts" / "weights.pt")):
        done = run_cli("certify", source, str(tmp_path / "image.png"), "--storage", str(storage), "--json")
        assert done.returncode == 0 and '"certifier": "lipschitz"' in done.stdout
        assert_rejected(run_cli("evaluate", source, "--storage", str(storage)), "dataset=mine")
    own_data.mkdir()
    for file in (tmp_path / "elsewhere").glob("*.npy"):
        np.save(own_data / file.name, np.load(file)[:, :, :5] if "images" in file.name else np.load(file))
    done = run_cli("ensemble", "exp/1", "--mirror", "--name", "mean", "--storage", str(storage))
    assert_rejected(done, "dataset=mine")


def test_evaluate_rejects_other_data_than_in_training(own_data: Path, tmp_path: Path, run_cli: RunCli) -> None:
    experiment = load_config(RECIPE, TINY)
    save_weights(tmp_path / "w.pt", build_network(experiment), experiment, 0)
    for split in ("train", "test"):
        images = np.load(own_data / f"{split}_images.npy")
        np.save(own_data / f"{split}_images.npy", images[:, :, :5])
    assert_rejected(run_cli("evaluate", str(tmp_path / "w.pt")), "dataset=mine")


def test_loaded_network_certifies(finished_training: FinishedTraining) -> None:
    run = finished_training.id
    network = load(run[:10], finished_training.storage)
    assert not network.training
    images, labels = load_dataset("digits").test.batch(torch.arange(5))
    for certifier in ("lipschitz", "ibp"):  # a distance net has no activations for CROWN
        assert certified_radius(network, images, labels, certifier).shape == (5,)
    from_file = load(finished_training.storage / "artifacts" / run / "artifacts" / "weights.pt")
    torch.testing.assert_close(from_file(images), network(images), rtol=0, atol=0)


@pytest.mark.parametrize(
    "source", ["0" * 32, "nothing/weights.pt", "three", "a" * 300, f"{'a' * 300}.pt", "\0", "a/" * 3000]
)
def test_missing_networks_are_rejected(finished_training: FinishedTraining, source: str) -> None:
    with pytest.raises(InputError, match=source):
        load(source, finished_training.storage)


@pytest.mark.parametrize(
    ("recipe", "stds"),
    [
        ("cifar10_eps8_255_ibp", (0.2023, 0.1994, 0.2010)),
        ("tiny_imagenet_eps1_255_crown_ibp_fused_cnn7", (0.2302, 0.2265, 0.2262)),
        ("mnist_eps0.3_ibp_cpu", (0.3081,)),
    ],
)
def test_per_channel_stds_are_published_ones_and_in_weights(
    tmp_path: Path, recipe: str, stds: tuple[float, ...]
) -> None:
    small = ["model.kind=cnn7", "model.width=1", "model.hidden_size=2"]
    experiment = load_config(recipe, [*small, "model.per_channel_std=true"])
    save_weights(tmp_path / "w.pt", build_network(experiment), experiment, 0)
    weights = load_weights(tmp_path / "w.pt")
    assert weights.network[0].std.flatten().tolist() == pytest.approx(stds)
    assert weights.info.select_std(per_channel=True) == stds
    assert build_network(load_config(recipe, small))[0].std.dim() == 0


def test_constant_channels_have_no_std(own_data: Path) -> None:
    images = np.load(own_data / "train_images.npy")
    images[:, 1] = 7
    np.save(own_data / "train_images.npy", images)
    settings = ["dataset=mine", "model.per_channel_std=true"]
    with pytest.raises(InputError, match=r"model\.per_channel_std=true: .*channel 1"):
        build_network(load_config("digits_eps0.1_ibp", settings))


def test_weights_without_dataset_info_are_read(tmp_path: Path) -> None:
    experiment = load_config(RECIPE, [])
    save_weights(tmp_path / "new.pt", build_network(experiment), experiment, 0)
    content = torch.load(tmp_path / "new.pt", weights_only=True)
    del content["dataset"]
    torch.save(content, tmp_path / "old.pt")
    assert load_weights(tmp_path / "old.pt").image_shape == load_weights(tmp_path / "new.pt").image_shape == (1, 8, 8)


@pytest.mark.parametrize(
    "change",
    [
        {"input_shape": [1, 8]}, {"input_shape": [1, 8, 0]}, {"input_shape": [1, 2**16, 2**16]}, {"classes": -1},
        {"classes": 2**40}, {"classes": "10"}, {"mean": [0.1, 0.2]}, {"mean": "x"}, {"std": 0.0}, {"std": float("nan")},
    ],
    ids=str,
)  # fmt: skip
def test_weights_with_invalid_dataset_info_are_rejected(tmp_path: Path, change: dict[str, object]) -> None:
    experiment = load_config(RECIPE, [])
    save_weights(tmp_path / "w.pt", build_network(experiment), experiment, 0)
    content = torch.load(tmp_path / "w.pt", weights_only=True)
    content["dataset"] |= change
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"w\.pt"):
        load_weights(tmp_path / "w.pt")
