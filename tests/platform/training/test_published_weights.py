"""Import of the authors' weights: the same outputs; other weights are rejected with the name at fault."""

import itertools
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from linflab.models.networks.hybrid import LinfDistHybridConfig
from linflab.platform.cli.main import app
from linflab.platform.config.experiment import ExperimentConfig
from linflab.platform.config.overrides import load_config
from linflab.platform.errors import InputError
from linflab.platform.training.published_weights import import_weights
from tests.conftest import RECIPE, assert_rejected

SIZES = [64, 20, 20, 10]  # digits, width 20, depth 3
NET = ["model.depth=3", "model.width=20"]
HYBRID = [
    "model.kind=linf_dist_hybrid",
    "model.backbone.kind=linf_dist_mlp",
    "model.backbone.depth=3",
    "model.backbone.width=20",
    "model.hidden_size=7",
    "objective.kind=worst_case_cross_entropy",
    "objective.eps_train=0.1",
]
State = dict[str, torch.Tensor]


def make_net_2022(prefix: str = "") -> State:
    state = {f"fc_dist.{k}.weight": torch.randn(o, i) for k, (i, o) in enumerate(itertools.pairwise(SIZES))}
    state |= {f"fc_dist.{k}.mean_shift.running_mean": torch.randn(20) for k in (0, 1)}
    state |= {"fc_dist.2.bias": torch.randn(10), "scalar": torch.ones(1)}
    return {prefix + name: tensor for name, tensor in state.items()}


def make_net_2021() -> State:
    state = {f"feature.fc.{k}.weight": torch.randn(20, i, 1, 1) for k, i in enumerate(SIZES[:2])}
    state |= {f"feature.fc.{k}.normalize.running_mean": torch.randn(20) for k in (0, 1)}
    return state | {"feature.fc_last.weight": torch.randn(10, 20, 1, 1), "feature.fc_last.bias": torch.randn(10)}


def make_head(first: str, last: str) -> State:
    shapes = {f"{first}.weight": (7, 20), f"{first}.bias": (7,), f"{last}.weight": (10, 7), f"{last}.bias": (10,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def make_hybrid_2022() -> State:
    features = {name: tensor for name, tensor in make_net_2022().items() if not name.startswith("fc_dist.2")}
    return features | make_head("fc_linear.0", "fc_final")


def make_hybrid_2021() -> State:
    features = {name: tensor for name, tensor in make_net_2021().items() if "last" not in name}
    return features | make_head("predictor.fc1", "predictor.fc2")


CONVOLUTIONAL = ["model.kind=linf_dist_conv_net", "model.width=4", "model.hidden_size=20"]
CONVOLUTIONAL_HYBRID = [
    "model.kind=linf_dist_hybrid",
    *(setting.replace("model.", "model.backbone.") for setting in CONVOLUTIONAL),
    *HYBRID[-3:],
]


def make_convolutions_2021(dense: str = "feature.fc") -> State:
    """Return weights of 3 x 3 filters for 8 x 8 images; the third convolution reduces these to 4 x 4 positions."""
    state = {}
    for k, (channels, filters) in enumerate(itertools.pairwise([1, 4, 4, 8, 8, 8])):
        state[f"feature.conv.{k}.weight"] = torch.randn(filters, channels, 3, 3)
        state[f"feature.conv.{k}.normalize.running_mean"] = torch.randn(filters)
    state |= {f"{dense}.weight": torch.randn(20, 8 * 16, 1, 1), f"{dense}.normalize.running_mean": torch.randn(20)}
    return state


def make_conv_net_2021() -> State:
    return make_convolutions_2021() | {k: t for k, t in make_net_2021().items() if "fc_last" in k}


def make_conv_hybrid_2021(dense: str = "feature.fc") -> State:
    return make_convolutions_2021(dense) | make_head("predictor.fc1", "predictor.fc2")


def compute_published_outputs(state: State, images: torch.Tensor) -> torch.Tensor:
    """Return outputs of the authors' networks as published, in evaluation at p = inf."""
    state = {name.removeprefix("module."): tensor.double() for name, tensor in state.items()}

    def find_tensor(suffix: str) -> torch.Tensor | None:
        return next((t for n, t in state.items() if n in (f"fc_dist.{suffix}", f"feature.fc.{suffix}")), None)

    x = (images.double() - 0.3053) / 0.3761
    for k in range(5 if "feature.conv.0.weight" in state else 0):
        weight = state[f"feature.conv.{k}.weight"]
        patches = torch.nn.functional.unfold(x, 3, padding=1, stride=2 if k == 2 else 1)
        y = (patches[:, None] - weight.flatten(1)[..., None]).abs().amax(dim=2) - state[
            f"feature.conv.{k}.normalize.running_mean"
        ][:, None]
        x = y.unflatten(2, (x.shape[2] // (2 if k == 2 else 1), -1))
    x = x.flatten(1)
    numbers = [f"{k}." for k in range(2)]
    if "feature.conv.0.weight" in state:
        numbers = ["" if "feature.fc.weight" in state else "0."]
    for k in numbers:
        weight, mean = find_tensor(f"{k}weight"), find_tensor(f"{k}mean_shift.running_mean")
        mean = find_tensor(f"{k}normalize.running_mean") if mean is None else mean
        x = (x[:, None] - weight.flatten(1)).abs().amax(dim=2) - mean
    for first, last in (("fc_linear.0", "fc_final"), ("predictor.fc1", "predictor.fc2")):
        if f"{last}.weight" in state:
            hidden = torch.tanh(x @ state[f"{first}.weight"].T / math.sqrt(20) + state[f"{first}.bias"])
            return hidden @ state[f"{last}.weight"].T / math.sqrt(7) + state[f"{last}.bias"]
    name = "fc_dist.2" if "fc_dist.2.weight" in state else "feature.fc_last"
    return -((x[:, None] - state[f"{name}.weight"].flatten(1)).abs().amax(dim=2) + state[f"{name}.bias"])


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (make_net_2022, NET),
        (lambda: {"state_dict": make_net_2022("module."), "epoch": 3}, NET),
        (make_net_2021, NET),
        (make_hybrid_2022, HYBRID),
        (make_hybrid_2021, HYBRID),
        (make_conv_net_2021, CONVOLUTIONAL),
        (make_conv_hybrid_2021, CONVOLUTIONAL_HYBRID),
        (lambda: make_conv_hybrid_2021("feature.fc.0"), CONVOLUTIONAL_HYBRID),
    ],
    ids=[
        "net of 2022",
        "in a checkpoint",
        "net of 2021",
        "hybrid of 2022",
        "hybrid of 2021",
        "convolutional net of 2021",
        "convolutional hybrid of 2021",
        "convolutional hybrid with a numbered dense layer",
    ],
)
def test_imported_weights_give_the_same_outputs(tmp_path: Path, make: Callable[[], State], settings: list[str]) -> None:
    torch.manual_seed(0)
    state = make()
    torch.save(state, tmp_path / "theirs.pth")
    arguments = [str(tmp_path / "theirs.pth"), "--recipe", RECIPE, "--output", str(tmp_path / "new" / "ours.pt")]
    done = CliRunner().invoke(app, ["import-weights", *arguments, *settings])
    assert done.exit_code == 0, done.output
    written = torch.load(tmp_path / "new" / "ours.pt", weights_only=True)
    experiment = ExperimentConfig.model_validate(yaml.safe_load(written["experiment"]))
    network = experiment.model.build((1, 8, 8), 10, (0.3053,), 0.3761).eval()
    network.load_state_dict(written["network"])
    images = torch.rand(9, 1, 8, 8)
    expected = compute_published_outputs(state.get("state_dict", state), images)
    torch.testing.assert_close(network(images).detach().double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "settings", "parts"),
    [
        (lambda state: state, ["model.depth=4", "model.width=20"], ["last.weight", "model.depth"]),
        (lambda state: state, ["model.depth=3", "model.width=24"], ["(20, 64)", "(24, 64)"]),
        (lambda state: state, HYBRID, ["head.0.weight"]),
        (
            lambda state: {**state, "fc_dist.0.weight": torch.full((20, 64), math.nan)},
            NET,
            ["features.distances.0.weight"],
        ),
        (lambda state: [1, 2], NET, []),
    ],
)
def test_mismatched_weights_are_rejected(
    tmp_path: Path, change: Callable[[State], object], settings: list[str], parts: list[str]
) -> None:
    torch.save(change(make_net_2022()), tmp_path / "theirs.pth")
    with pytest.raises(InputError) as caught:
        import_weights(tmp_path / "theirs.pth", load_config(RECIPE, settings), tmp_path / "ours.pt")
    assert_rejected(caught, str(tmp_path / "theirs.pth"), *parts)
    assert list(tmp_path.iterdir()) == [tmp_path / "theirs.pth"]


@pytest.mark.parametrize(
    "change",
    [
        lambda state: {**state, "feature.conv.1.weight": state["feature.conv.1.weight"].permute(0, 2, 3, 1)},
        lambda state: {**state, "feature.fc.0.weight": state["feature.fc.weight"]},  # a second dense layer
        lambda state: {**state, f"feature.conv.{'9' * 5000}.weight": torch.ones(1)},
        lambda state: {name: tensor for name, tensor in state.items() if "conv.4" not in name},
    ],
    ids=["channels last", "dense layer twice", "long number", "a layer less"],
)
def test_mismatched_convolutions_are_rejected(tmp_path: Path, change: Callable[[State], State]) -> None:
    torch.save(change(make_conv_net_2021()), tmp_path / "theirs.pth")
    with pytest.raises(InputError):
        import_weights(tmp_path / "theirs.pth", load_config(RECIPE, CONVOLUTIONAL), tmp_path / "ours.pt")
    assert list(tmp_path.iterdir()) == [tmp_path / "theirs.pth"]


def test_damaged_file_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "theirs.pth").write_bytes(b"no weights")
    with pytest.raises(InputError, match=r"theirs\.pth\b"):
        import_weights(tmp_path / "theirs.pth", load_config(RECIPE, NET), tmp_path / "ours.pt")


def test_hybrid_defaults_have_the_published_sizes() -> None:
    with torch.device("meta"):
        state = LinfDistHybridConfig().build((1, 28, 28), 10).state_dict()
    assert state["head.0.weight"].shape == (512, 5120) and state["head.2.weight"].shape == (10, 512)


def test_import_follows_links_and_writes_only_to_files(tmp_path: Path) -> None:
    torch.save(make_net_2022(), tmp_path / "theirs.pth")
    arguments = ["import-weights", str(tmp_path / "theirs.pth"), "--recipe", RECIPE, *NET, "--output"]
    (tmp_path / "link.pt").symlink_to(tmp_path / "target.pt")
    done = CliRunner().invoke(app, [*arguments, str(tmp_path / "link.pt")])
    assert done.exit_code == 0 and (tmp_path / "link.pt").is_symlink() and (tmp_path / "target.pt").is_file()
    os.mkfifo(tmp_path / "pipe.pt")
    done = CliRunner().invoke(app, [*arguments, str(tmp_path / "pipe.pt")])
    assert isinstance(done.exception, InputError) and "pipe.pt" in str(done.exception)
    assert (tmp_path / "pipe.pt").is_fifo() and not list(tmp_path.glob(".*"))
