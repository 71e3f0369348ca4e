"""The Python API: training, certifying and attacking your own modules, and errors for invalid input."""

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import linflab
from linflab.models.robustness.certification import certified_radius, certify
from linflab.platform.data.datasets import load_dataset
from tests.conftest import QUICK, RECIPE, TrainedOnDigits

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[3]


def read_quickstart_scripts() -> list[str]:
    """Return the Python scripts of the README's quickstart, and of the page on Python."""
    texts = [(ROOT / name).read_text() for name in ("README.md", "docs/how-to/python.md")]
    return [block.split("```")[0] for text in texts for block in text.split("```python\n")[1:]]


def load_digits(first: int, last: int) -> tuple[Tensor, Tensor]:
    return load_dataset("digits").train.batch(torch.arange(first, last))


def make_small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


@pytest.fixture(scope="module")
def fit_result() -> linflab.FitResult:
    return linflab.fit(
        make_small_net(), load_digits(0, 600), eps=0.03, epochs=3, validation=load_digits(600, 700), batch_size=32
    )


@pytest.mark.slow
def test_quickstart_scripts_run_in_at_most_12_lines(tmp_path: Path) -> None:
    first, second = read_quickstart_scripts()
    assert all(len(script.strip().splitlines()) <= 12 for script in (first, second))
    done = subprocess.run([sys.executable, "-c", first], cwd=tmp_path, text=True, capture_output=True, check=True)
    clean, robust, certified = (float(word.split("%")[0]) for word in done.stdout.split()[1::2])
    assert 100 >= clean >= robust >= certified > 30
    linflab.train(RECIPE, QUICK, tmp_path / "runs", name="my_run")
    done = subprocess.run([sys.executable, "-c", second], cwd=tmp_path, text=True, capture_output=True, check=True)
    assert "radius" in done.stdout and "360" in done.stdout


def test_fit_is_deterministic_and_leaves_the_module_unchanged(fit_result: linflab.FitResult) -> None:
    module, untouched = make_small_net(), make_small_net()
    repeated = linflab.fit(
        module, load_digits(0, 600), eps=0.03, epochs=3, validation=load_digits(600, 700), batch_size=32
    )
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, untouched.state_dict()[name])
    for name, tensor in fit_result.network.state_dict().items():
        assert torch.equal(tensor, repeated.network.state_dict()[name])
    assert (
        not fit_result.network.training and fit_result.val_certified == repeated.val_certified and fit_result.epoch <= 3
    )


@pytest.mark.parametrize("objective", ["sabr", "mtl_ibp", "cc_ibp", "exp_ibp"])
def test_fit_trains_by_attack_and_bounds(objective: str) -> None:
    """Standard training certifies 5% of these images."""
    images, labels = load_digits(0, 600)
    result = linflab.fit(
        make_small_net(), (images, labels), eps=0.08, epochs=5, objective=objective, learning_rate=0.01, batch_size=32
    )
    assert linflab.certify(result.network, images, labels, eps=0.08).certified.float().mean() > 0.2


def test_fit_accepts_arrays_bytes_and_loaders(fit_result: linflab.FitResult) -> None:
    images, labels = load_digits(0, 600)
    validation = DataLoader(TensorDataset(*load_digits(600, 700)), batch_size=64)
    inputs = ((images.numpy(), labels.numpy()), DataLoader(TensorDataset(images, labels), batch_size=100))
    for train in inputs:
        same = linflab.fit(make_small_net(), train, eps=0.03, epochs=3, validation=validation, batch_size=32)
        assert torch.equal(same.network[1].weight, fit_result.network[1].weight)
    gray = (images * 255).to(torch.uint8)
    last = linflab.fit(make_small_net(), (gray, labels), eps=0.03, epochs=1, batch_size=32)
    assert last.epoch == 1 and last.val_certified is None


@pytest.mark.parametrize(
    ("certifier", "eps"),
    [
        *((name, eps) for name in ("auto", "ibp", "crown") for eps in (None, 0.02)),
        *((name, 0.02) for name in ("alpha_crown", "complete")),
    ],
)
def test_certify_matches_the_certifiers(fit_result: linflab.FitResult, eps: float | None, certifier: str) -> None:
    images, labels = load_digits(700, 760)
    network, name = fit_result.network, "ibp" if certifier == "auto" else certifier
    result = linflab.certify(network, images, labels, eps=eps, certifier=certifier, batch_size=25)
    wrong = network(images).argmax(dim=1) != labels
    if eps is None:
        assert result.radius is not None
        assert torch.equal(result.radius, certified_radius(network, images, labels, name).double().clamp(min=0))  # type: ignore[arg-type]
    else:
        assert torch.equal(result.certified, certify(network, images, labels, eps, name))  # type: ignore[arg-type]
    assert [one == "forward" for one in result.certifier] == wrong.tolist()
    assert certifier == "complete" or [one == "falsified" for one in result.status] == wrong.tolist()
    assert [one == "certified" for one in result.status] == result.certified.tolist()
    assert list(result.to_frame().columns) == [
        "radius" if eps is None else "certified",
        "status",
        "certifier",
        "seconds",
    ]
    batches = DataLoader(TensorDataset(images, labels), batch_size=25)
    assert linflab.certify(network, batches, eps=eps, certifier=certifier).status == result.status


def test_successfully_attacked_images_are_not_certified(fit_result: linflab.FitResult) -> None:
    images, labels = load_digits(700, 760)
    for attacks in ("default", ["pgd"], "apgd_ce"):
        result = linflab.attack(fit_result.network, images.numpy(), labels.numpy(), eps=0.02, attacks=attacks)
        certified = linflab.certify(fit_result.network, images, labels, eps=0.02).certified
        assert not (certified & ~result.robust).any() and not (result.robust & ~result.clean).any()
        assert result.clean_accuracy >= result.robust_accuracy > 0 and len(result.to_frame()) == 60
    assert result.attacks == ("apgd_ce",)


def test_time_limits_and_seconds_are_per_image(fit_result: linflab.FitResult) -> None:
    images, labels = load_digits(700, 712)
    for eps in (None, 0.05):
        result = linflab.certify(fit_result.network, images, labels, eps=eps, certifier="complete", time_limit=0.2)
        assert len(set(result.seconds.tolist())) > 1, "durations of single images differ"
    found = [k for k, one in enumerate(result.status) if one == "falsified"]
    assert list(result.adversarial) == found and found
    for k in found:
        assert (result.adversarial[k] - images[k]).abs().max() <= 0.05 + 1e-6
        assert fit_result.network(result.adversarial[k][None]).argmax() != labels[k]
    with pytest.raises(ValueError, match=r"time_limit=5\b.*certifier=ibp"):
        linflab.certify(fit_result.network, images, labels, eps=0.05, certifier="ibp", time_limit=5)
    with pytest.raises(ValueError, match=r"time_limit=-1\b"):
        linflab.certify(fit_result.network, images, labels, eps=0.05, certifier="cascade", time_limit=-1)


def test_bytes_are_divided_by_255(fit_result: linflab.FitResult) -> None:
    images, labels = load_digits(700, 730)
    as_bytes = (images * 255).to(torch.uint8)
    as_floats = as_bytes.float() / 255
    certificates, expected = (
        linflab.certify(fit_result.network, one, labels, eps=0.02) for one in (as_bytes.numpy(), as_floats)
    )
    assert certificates.status == expected.status
    loader = DataLoader(TensorDataset(as_bytes, labels), batch_size=9)
    attacked, expected_attacked = (
        linflab.attack(fit_result.network, one, eps=0.02, attacks="pgd", batch_size=9)
        for one in (loader, DataLoader(TensorDataset(as_floats, labels), batch_size=9))
    )
    assert torch.equal(attacked.robust, expected_attacked.robust)
    double = copy.deepcopy(fit_result.network).double()
    assert linflab.certify(double, as_bytes, labels, certifier="ibp").radius is not None


def test_certificates_print_counts_without_tensors() -> None:
    certified = torch.tensor([True, False, False])
    statuses = ("certified", "falsified", "unknown")
    adversarial = {1: torch.zeros(1, 28, 28)}
    result = linflab.Certificates(0.1, certified, None, statuses, ("complete",) * 3, torch.ones(3), adversarial)
    expected = "Certificates(eps=0.1, 3 images: 1 certified, 1 falsified, 1 unknown; certified accuracy 33.33%)"
    assert repr(result) == str(result) == expected


def test_empty_inputs_have_empty_results(fit_result: linflab.FitResult) -> None:
    images, labels = load_digits(0, 0)
    assert linflab.certify(fit_result.network, images, labels).status == ()
    assert len(linflab.attack(fit_result.network, images, labels, eps=0.1).robust) == 0


def test_invalid_input_is_named_in_the_error(fit_result: linflab.FitResult) -> None:
    (images, labels), network = load_digits(0, 60), fit_result.network
    for call, expected in (
        (lambda: linflab.certify(network, images * 2, labels), "images="),
        (lambda: linflab.certify(network, images, labels + 90), "labels="),
        (lambda: linflab.certify(network, images, labels, eps=-1), "eps=-1"),
        (lambda: linflab.certify(network, images, labels, certifier="none"), "certifier=none"),
        (lambda: linflab.certify(network, images), "labels=None"),
        (lambda: linflab.attack(network, images, labels, eps=0.1, attacks="none"), "attacks=none"),
        (lambda: linflab.fit(network, (images * 2, labels), eps=0.1, epochs=1), "images="),
        (lambda: linflab.fit(network, (images[:, 0], labels), eps=0.1, epochs=1), "train="),
        (lambda: linflab.fit(network, (images, labels[1:]), eps=0.1, epochs=1), "labels="),
        (lambda: linflab.fit(network, (images, labels), eps=0.1, epochs=1),
         "batch_size=128: must be at most 60, the number of training images"),
        (lambda: linflab.fit(network, (images, labels), eps=0.1, epochs=1, objective="none"), "objective=none"),
        (lambda: linflab.fit(network, (images, labels), eps=0.1, epochs=1, batch_size=9, objective="ibp"),
         "IBP is worst_case_cross_entropy"),
        (lambda: linflab.fit(nn.Sequential(network, nn.Softmax(1)), (images, labels), eps=0.1, epochs=1, batch_size=9),
         "Softmax"),
    ):  # fmt: skip
        with pytest.raises((ValueError, TypeError)) as error:
            call()
        assert expected in str(error.value), (expected, str(error.value))


def test_train_records_a_run_that_can_be_loaded(tmp_path: Path, digits_net: TrainedOnDigits) -> None:
    result = linflab.train(RECIPE, QUICK, tmp_path)
    frame = linflab.records(tmp_path)
    assert list(frame["run_id"]) == [result.run_id] and result.certificate == "lipschitz-sound"
    assert frame["test/certified_accuracy"].iloc[0] == result.metrics["test/certified_accuracy"]
    images, labels = digits_net.dataset.test.batch(torch.arange(360))
    certificates = linflab.certify(linflab.load(result.run_id, tmp_path), images, labels, eps=0.1)
    assert np.isclose(certificates.certified_accuracy, result.metrics["test/certified_accuracy"])


def test_import_of_linflab_is_lazy() -> None:
    code = "import sys, linflab; print(sorted({'torch', 'ray', 'mlflow', 'pandas', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True)
    assert done.stdout == "[]\n"
    assert set(linflab.__all__) <= set(dir(linflab)) and all(hasattr(linflab, name) for name in linflab.__all__)
