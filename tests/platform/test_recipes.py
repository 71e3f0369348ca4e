"""The shipped recipes: every one is valid, and its cost is that of the published network."""

import json

import pytest
from typer.testing import CliRunner

from linflab.platform.cli import app
from linflab.platform.config import load_experiment, recipe_names
from linflab.platform.datasets import FACTS

PUBLISHED_FLOPS = {  # Zhang et al. 2021, Tables 1 and 2; those of 2022 have the same nets, SortNet as many weights
    "mnist_eps0.1_linf_dist_net_v2": "82.7M",
    "mnist_eps0.3_linf_dist_net": "82.7M",
    "mnist_eps0.3_linf_dist_net_v2": "82.7M",
    "fashion_mnist_eps0.1_linf_dist_net": "82.7M",
    "cifar10_eps2_255_linf_dist_net_v2": "121M",
    "cifar10_eps8_255_linf_dist_net": "121M",
    "cifar10_eps8_255_linf_dist_net_v2": "121M",
    "cifar10_eps16_255_linf_dist_net_v2": "121M",
    "mnist_eps0.3_linf_dist_hybrid": "85.3M",
    "fashion_mnist_eps0.1_linf_dist_hybrid": "85.3M",
    "cifar10_eps8_255_linf_dist_hybrid": "123M",
    "tiny_imagenet_eps1_255_linf_dist_hybrid": "156M",
    "mnist_eps0.1_sort_net": "82.7M",
    "mnist_eps0.3_sort_net": "82.7M",
    "cifar10_eps2_255_sort_net": "121M",
    "cifar10_eps8_255_sort_net": "121M",
    "cifar10_eps2_255_sort_net_hybrid": "123M",
    "cifar10_eps8_255_sort_net_hybrid": "123M",
    "tiny_imagenet_eps1_255_sort_net_hybrid": "170M",  # 64 x 64 pixels
}


@pytest.mark.parametrize("name", sorted(PUBLISHED_FLOPS))
def test_flops_are_the_published_ones(name: str) -> None:
    done = CliRunner().invoke(app, ["describe", name, "--json"])
    assert done.exit_code == 0
    described = json.loads(done.stdout)
    assert f"{described['flops'] / 1e6:.3g}M" == PUBLISHED_FLOPS[name]
    assert sum(layer["flops"] for layer in described["layers"]) == described["flops"]
    assert described["step"]["forward_flops"] == 512 * described["flops"]


@pytest.mark.parametrize("name", recipe_names())
def test_names_say_what_is_in_them(name: str) -> None:
    experiment = load_experiment(name)
    dataset, _, rest = name.partition("_eps")
    assert experiment.dataset == dataset and dataset in FACTS
    eps = rest.split("_linf_dist")[0].split("_sort_net")[0]
    for part, words in (
        ("_sort_net", "SortNet"),
        ("_linf_dist", "l_inf-dist Net"),
        ("_hybrid", "+MLP"),
        ("_v2", "(v2)"),
    ):
        assert (part in name) == (words in experiment.method)
    expected = float(eps) if "_" not in eps else int(eps.split("_")[0]) / int(eps.split("_")[1])
    assert experiment.eps == expected
    assert name.endswith("_cpu") or dataset == "digits" or name in PUBLISHED_FLOPS


def test_listing_shows_whole_names() -> None:
    listed = CliRunner().invoke(app, ["recipes"])
    assert listed.exit_code == 0
    for name in recipe_names():
        assert name in listed.stdout
