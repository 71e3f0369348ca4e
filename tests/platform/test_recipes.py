"""The shipped recipes: every one is valid, and its cost is that of the published network."""

import json

import pytest
from typer.testing import CliRunner

from linflab.platform.cli import app
from linflab.platform.config import load_experiment, recipe_names
from linflab.platform.datasets import FACTS

PUBLISHED_FLOPS = {  # Zhang et al. 2021, Table 1; the successor of 2022 has the same networks
    "mnist_eps0.1_linf_dist_net_v2": "82.7M",
    "mnist_eps0.3_linf_dist_net": "82.7M",
    "mnist_eps0.3_linf_dist_net_v2": "82.7M",
    "fashion_mnist_eps0.1_linf_dist_net": "82.7M",
    "cifar10_eps2_255_linf_dist_net_v2": "121M",
    "cifar10_eps8_255_linf_dist_net": "121M",
    "cifar10_eps8_255_linf_dist_net_v2": "121M",
    "cifar10_eps16_255_linf_dist_net_v2": "121M",
}


@pytest.mark.parametrize("name", sorted(PUBLISHED_FLOPS))
def test_flops_are_the_published_ones(name: str) -> None:
    described = CliRunner().invoke(app, ["describe", name, "--json"])
    assert described.exit_code == 0
    assert f"{json.loads(described.stdout)['flops'] / 1e6:.3g}M" == PUBLISHED_FLOPS[name]


@pytest.mark.parametrize("name", recipe_names())
def test_names_say_what_is_in_them(name: str) -> None:
    experiment = load_experiment(name)
    dataset, _, rest = name.partition("_eps")
    assert experiment.dataset == dataset and dataset in FACTS
    eps = rest.split("_linf_dist")[0]
    expected = float(eps) if "_" not in eps else int(eps.split("_")[0]) / int(eps.split("_")[1])
    assert experiment.eps == expected
    assert name.endswith("_cpu") or dataset == "digits" or name in PUBLISHED_FLOPS


def test_listing_shows_whole_names() -> None:
    listed = CliRunner().invoke(app, ["recipes"])
    assert listed.exit_code == 0
    for name in recipe_names():
        assert name in listed.stdout
