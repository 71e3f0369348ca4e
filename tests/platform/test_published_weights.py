"""Weights under the authors' names become a network of ours with the same outputs; others are refused by name."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from linflab.models.networks.hybrid import LinfDistHybridConfig
from linflab.platform.cli import app
from linflab.platform.config import Experiment, load_experiment
from linflab.platform.errors import SettingError
from linflab.platform.published_weights import import_weights
from tests.conftest import RECIPE

SIZES = [64, 20, 20, 10]  # digits, width 20, depth 3
NET = ["model.depth=3", "model.width=20"]
HYBRID = [
    "model.kind=linf_dist_hybrid",
    "model.net.kind=linf_dist_mlp",
    "model.net.depth=3",
    "model.net.width=20",
    "model.hidden=7",
    "objective.kind=worst_case_cross_entropy",
    "objective.eps_train=0.1",
]
State = dict[str, torch.Tensor]


def net_of_2022(prefix: str = "") -> State:
    state = {f"fc_dist.{k}.weight": torch.randn(o, i) for k, (i, o) in enumerate(itertools.pairwise(SIZES))}
    state |= {f"fc_dist.{k}.mean_shift.running_mean": torch.randn(20) for k in (0, 1)}
    state |= {"fc_dist.2.bias": torch.randn(10), "scalar": torch.ones(1)}
    return {prefix + name: tensor for name, tensor in state.items()}


def net_of_2021() -> State:
    state = {f"feature.fc.{k}.weight": torch.randn(20, i, 1, 1) for k, i in enumerate(SIZES[:2])}
    state |= {f"feature.fc.{k}.normalize.running_mean": torch.randn(20) for k in (0, 1)}
    return state | {"feature.fc_last.weight": torch.randn(10, 20, 1, 1), "feature.fc_last.bias": torch.randn(10)}


def head(first: str, last: str) -> State:
    shapes = {f"{first}.weight": (7, 20), f"{first}.bias": (7,), f"{last}.weight": (10, 7), f"{last}.bias": (10,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def hybrid_of_2022() -> State:
    kept = {name: tensor for name, tensor in net_of_2022().items() if not name.startswith("fc_dist.2")}
    return kept | head("fc_linear.0", "fc_final")


def hybrid_of_2021() -> State:
    kept = {name: tensor for name, tensor in net_of_2021().items() if "last" not in name}
    return kept | head("predictor.fc1", "predictor.fc2")


def outputs(state: State, images: torch.Tensor) -> torch.Tensor:
    """The authors' networks by their description, in evaluation at p = inf."""
    state = {name.removeprefix("module."): tensor.double() for name, tensor in state.items()}

    def named(end: str) -> torch.Tensor | None:
        return next((t for n, t in state.items() if n in (f"fc_dist.{end}", f"feature.fc.{end}")), None)

    x = ((images.double() - 0.3053) / 0.3761).flatten(1)
    for k in range(2):
        weight, mean = named(f"{k}.weight"), named(f"{k}.mean_shift.running_mean")
        mean = named(f"{k}.normalize.running_mean") if mean is None else mean
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
        (net_of_2022, NET),
        (lambda: {"state_dict": net_of_2022("module."), "epoch": 3}, NET),
        (net_of_2021, NET),
        (hybrid_of_2022, HYBRID),
        (hybrid_of_2021, HYBRID),
    ],
    ids=["net of 2022", "in a checkpoint", "net of 2021", "hybrid of 2022", "hybrid of 2021"],
)
def test_imported_weights_give_the_same_outputs(tmp_path: Path, make: Callable[[], State], settings: list[str]) -> None:
    torch.manual_seed(0)
    state = make()
    torch.save(state, tmp_path / "theirs.pth")
    arguments = [str(tmp_path / "theirs.pth"), "--recipe", RECIPE, "--output", str(tmp_path / "new" / "ours.pt")]
    done = CliRunner().invoke(app, ["import-weights", *arguments, *settings])
    assert done.exit_code == 0, done.output
    written = torch.load(tmp_path / "new" / "ours.pt", weights_only=True)
    experiment = Experiment.model_validate(yaml.safe_load(written["experiment"]))
    network = experiment.model.build((1, 8, 8), 10, (0.3053,), 0.3761).eval()
    network.load_state_dict(written["network"])
    images = torch.rand(9, 1, 8, 8)
    expected = outputs(state.get("state_dict", state), images)
    torch.testing.assert_close(network(images).detach().double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "settings", "says"),
    [
        (lambda state: state, ["model.depth=4", "model.width=20"], ["lacks", "last.weight", "model.depth"]),
        (lambda state: state, ["model.depth=3", "model.width=24"], ["(20, 64)", "(24, 64)"]),
        (lambda state: state, HYBRID, ["head.0.weight"]),
        (lambda state: {**state, "fc_dist.0.weight": torch.full((20, 64), math.nan)}, NET, ["not finite"]),
        (lambda state: [1, 2], NET, ["can't be read"]),
    ],
)
def test_other_weights_are_refused(
    tmp_path: Path, change: Callable[[State], object], settings: list[str], says: list[str]
) -> None:
    torch.save(change(net_of_2022()), tmp_path / "theirs.pth")
    with pytest.raises(SettingError) as caught:
        import_weights(tmp_path / "theirs.pth", load_experiment(RECIPE, settings), tmp_path / "ours.pt")
    assert all(words in str(caught.value) for words in [str(tmp_path / "theirs.pth"), *says])
    assert list(tmp_path.iterdir()) == [tmp_path / "theirs.pth"]


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "theirs.pth").write_bytes(b"no weights")
    with pytest.raises(SettingError, match=r"theirs\.pth: can't be read"):
        import_weights(tmp_path / "theirs.pth", load_experiment(RECIPE, NET), tmp_path / "ours.pt")


def test_published_hybrids_have_the_sizes_of_the_recipes() -> None:
    with torch.device("meta"):
        state = LinfDistHybridConfig().build((1, 28, 28), 10).state_dict()
    assert state["head.0.weight"].shape == (512, 5120) and state["head.2.weight"].shape == (10, 512)
