"""The shipped recipes: every one is valid, and its cost is that of the published network."""

import json
import re

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


RIVALS = {  # what names say: method, objective and what bounds its worst case
    "ibp": ("IBP", "worst_case_cross_entropy", "interval"),
    "crown_ibp": ("CROWN-IBP", "worst_case_cross_entropy", "crown_ibp"),
    "crown_ibp_fused": ("CROWN-IBP (loss fusion)", "worst_case_cross_entropy", "crown_ibp_fused"),
    "cap": ("CAP", "worst_case_cross_entropy", "dual"),
    "diffai": ("DiffAI", "worst_case_cross_entropy", "hybrid_zonotope"),
    "group_sort": ("Group Sort", "hinge", None),
    "pgd": ("PGD", "adversarial_cross_entropy", None),
    "standard": ("Standard", "cross_entropy", None),
}
# Zhang et al. 2021, Tables 1 and 2, in millions
RIVALS_FLOPS = {
    **{f"{data}_{rival}": 114 for data in ("mnist_eps0.3", "fashion_mnist_eps0.1") for rival in list(RIVALS)[:3]},
    **{f"cifar10_eps8_255_{rival}": 151 for rival in list(RIVALS)[:3]},
    "mnist_eps0.3_group_sort": 2.9,
    "tiny_imagenet_eps1_255_crown_ibp_fused_dense_net": 575,
    "tiny_imagenet_eps1_255_crown_ibp_fused_resnext": 64,
    "tiny_imagenet_eps1_255_crown_ibp_fused_wide_resnet": 5220,
    # the table says 458, the published network, at these strides, comes to 336
    "tiny_imagenet_eps1_255_crown_ibp_fused_cnn7": 336,
}


def rival_of(name: str) -> tuple[str, str] | None:
    """What the name of a recipe calls its method, and the rest behind it; None for l_inf-dist nets and SortNet."""
    rest = re.sub(r"^[a-z0-9_]+_eps[0-9.]+(_255)?_", "", name.removesuffix("_cpu"))
    known = [rival for rival in RIVALS if rest == rival or rest.startswith(f"{rival}_")]
    return (max(known, key=len), rest) if known else None


@pytest.mark.parametrize("name", sorted(RIVALS_FLOPS))
def test_flops_of_rivals_are_the_published_ones(name: str) -> None:
    described = json.loads(CliRunner().invoke(app, ["describe", name, "--json"]).stdout)
    assert described["flops"] / 1e6 == pytest.approx(RIVALS_FLOPS[name], rel=0.03)
    # in TinyImageNet's table published networks differ from the counts; in the other the first three digits are equal
    if "tiny_imagenet" not in name and "group_sort" not in name:
        assert f"{described['flops'] / 1e6:.3g}" == str(RIVALS_FLOPS[name])


@pytest.mark.parametrize("name", [name for name in recipe_names() if rival_of(name)])
def test_rivals_are_what_their_names_say(name: str) -> None:
    experiment = load_experiment(name)
    rival, rest = rival_of(name) or ("", "")
    method, objective, bound = RIVALS[rival]
    assert (experiment.method, experiment.objective.kind) == (method, objective)
    assert bound is None or experiment.objective.bound == bound
    assert rest in (rival, f"{rival}_{experiment.model.kind}")
    of_tables = rest == rival and experiment.dataset != "digits"
    expected = {"group_sort": "group_sort"}.get(rival, "conv_net" if of_tables else experiment.model.kind)
    assert experiment.model.kind == expected
    assert (
        "eps_train" not in type(experiment.objective).model_fields or experiment.objective.eps_train >= experiment.eps
    )
    assert experiment.evaluation.attack.kinds == ("pgd",)  # there are no distances whose gradients are sparse


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
    eps = re.match(r"[0-9.]+(_255)?", rest)[0]
    for part, words in (
        ("_sort_net", "SortNet"),
        ("_linf_dist", "l_inf-dist Net"),
        ("_hybrid", "+MLP"),
        ("_v2", "(v2)"),
    ):
        assert (part in name) == (words in experiment.method) or rival_of(name)
    expected = float(eps) if "_" not in eps else int(eps.split("_")[0]) / int(eps.split("_")[1])
    assert experiment.eps == expected
    assert name.endswith("_cpu") or dataset == "digits" or name in PUBLISHED_FLOPS or rival_of(name)


def test_listing_shows_whole_names() -> None:
    listed = CliRunner().invoke(app, ["recipes"])
    assert listed.exit_code == 0
    for name in recipe_names():
        assert name in listed.stdout


# Zhang et al. 2021 (first seven), ICLR 2022 and NeurIPS 2022, from their published training scripts: threshold or eps
# of training, (lambda, start and end) or worst-case weight or share of the maximum, q, learning rate, epochs at which p
# starts to grow and becomes inf, all epochs
PUBLISHED = {
    "mnist_eps0.3_linf_dist_net": (0.45, 0.75, None, 0.02, (50, 350, 400)),
    "fashion_mnist_eps0.1_linf_dist_net": (0.225, 1, None, 0.02, (50, 350, 400)),
    "cifar10_eps8_255_linf_dist_net": (0.1568, 0.75, None, 0.02, (100, 750, 800)),
    "mnist_eps0.3_linf_dist_hybrid": (0.35, 0.5, None, 0.02, (50, 350, 400)),
    "fashion_mnist_eps0.1_linf_dist_hybrid": (0.11, 0.5, None, 0.02, (50, 350, 400)),
    "cifar10_eps8_255_linf_dist_hybrid": (0.03451, 1, None, 0.02, (100, 750, 800)),
    "tiny_imagenet_eps1_255_linf_dist_hybrid": (0.005, 1, None, 0.04, (100, 450, 500)),
    "mnist_eps0.1_linf_dist_net_v2": (0.3, (0.05, 0.0002), None, 0.03, (25, 400, 450)),
    "mnist_eps0.3_linf_dist_net_v2": (0.45, (0.05, 0.0002), None, 0.03, (25, 400, 450)),
    "cifar10_eps2_255_linf_dist_net_v2": (0.03922, (0.05, 0.002), None, 0.03, (100, 1250, 1300)),
    "cifar10_eps8_255_linf_dist_net_v2": (0.09411, (0.1, 0.0005), None, 0.03, (100, 1250, 1300)),
    "cifar10_eps16_255_linf_dist_net_v2": (0.15685, (0.1, 0.0002), None, 0.03, (100, 1250, 1300)),
    "mnist_eps0.1_sort_net": (0.3, (0.1, 0.001), 0.70, 0.02, (100, 1450, 1500)),
    "mnist_eps0.3_sort_net": (0.45, (0.02, 0.0002), 0.75, 0.02, (100, 1450, 1500)),
    "cifar10_eps2_255_sort_net": (0.03137, (1.0, 0.01), 0.75, 0.02, (200, 2950, 3000)),
    "cifar10_eps8_255_sort_net": (0.09411, (0.2, 0.002), 0.85, 0.02, (200, 2950, 3000)),
    "cifar10_eps2_255_sort_net_hybrid": (0.008627, (1.0, 0.01), 0.70, 0.02, (200, 2950, 3000)),
    "cifar10_eps8_255_sort_net_hybrid": (0.03451, (1.0, 0.01), 0.60, 0.02, (200, 2950, 3000)),
    "tiny_imagenet_eps1_255_sort_net_hybrid": (0.00431, (1.0, 0.01), 0.70, 0.02, (100, 980, 1000)),
}
RAMPS = {"mnist": 50, "fashion_mnist": 50, "cifar10": 100, "tiny_imagenet": 200}  # epochs, of the hybrids of 2021


@pytest.mark.parametrize("name", sorted(PUBLISHED_FLOPS))
def test_settings_are_the_published_ones(name: str) -> None:
    length, weights, q, rate, (start, end, epochs) = PUBLISHED[name]
    settings = load_experiment(name).settings()
    assert settings.get("objective.theta", settings.get("objective.eps_train")) == length
    kept = ("objective.lambda_start", "objective.lambda_end")
    single = settings.get("objective.max_weight", settings.get("objective.worst_case_weight"))
    assert (tuple(settings[key] for key in kept) if kept[0] in settings else single) == weights
    assert settings.get("model.q", settings.get("model.net.q")) == q
    assert settings["optimizer.learning_rate"] == rate and settings["training.epochs"] == epochs
    assert settings["p_schedule.warmup_share"] * epochs == pytest.approx(start)
    assert (1 - settings["p_schedule.infinity_share"]) * epochs == pytest.approx(end)
    assert settings["training.batch_size"] == 512
    of_2021 = not isinstance(weights, tuple)
    assert settings["optimizer.lp_weight_decay"] == (0.005 if of_2021 else 0)
    assert settings["optimizer.weight_decay"] == (0.02 if q else 0)
    assert settings["optimizer.hold_share"] * epochs == pytest.approx(start if of_2021 else 0)
    ramp, shape = settings["eps_ramp.share"] * epochs, settings["eps_ramp.shape"]
    if "hybrid" not in name:
        assert ramp == 0
    elif q:
        assert (ramp, shape) == (pytest.approx(500), "smooth")
    else:
        assert (ramp, shape) == (pytest.approx(RAMPS[settings["dataset"]]), "linear")
