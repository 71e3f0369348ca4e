"""The l_inf nearest-neighbor network: agreement with scikit-learn, exact certificates and brute-force attacks."""

import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from torch import Tensor

from linflab.models.networks import LinfNearestConfig
from linflab.models.networks.linf_dist import LinfDistNet
from linflab.models.robustness.certification import lipschitz_radius
from linflab.models.robustness.margins import margin
from linflab.platform.data.datasets import load_dataset


@pytest.fixture(scope="module")
def digits() -> tuple[LinfDistNet, Tensor, Tensor, Tensor, Tensor]:
    """Return the network of all training images of the digits, then training and test images with labels."""
    dataset = load_dataset("digits")
    split = dataset.training_split(include_validation=True)
    train, labels = split.batch(torch.arange(len(split)))
    test, test_labels = dataset.test.batch(torch.arange(len(dataset.test)))
    config, info = LinfNearestConfig(samples=len(train)), dataset.info
    network = config.build(info.input_shape, info.classes, info.mean, info.std)
    config.store_images(network, train, labels)
    return network.eval(), train, labels, test, test_labels


def test_predictions_and_radii_agree_with_scikit_learn(digits: tuple[LinfDistNet, *tuple[Tensor, ...]]) -> None:
    """Images whose nearest neighbors of two classes are equally far have a margin of zero, up to rounding."""
    network, train, labels, test, test_labels = digits
    flat, queries = train.flatten(1).double().numpy(), test.flatten(1).double().numpy()
    expected = KNeighborsClassifier(1, metric="chebyshev", algorithm="brute").fit(flat, labels).predict(queries)
    nearest = []
    for is_kept in [labels == k for k in range(10)]:
        search = NearestNeighbors(n_neighbors=1, metric="chebyshev", algorithm="brute").fit(flat[is_kept])
        nearest.append(torch.from_numpy(search.kneighbors(queries)[0][:, 0]))
    by_class = torch.stack(nearest, dim=1)
    own = by_class.gather(1, test_labels[:, None])[:, 0]
    other = by_class.scatter(1, test_labels[:, None], torch.inf).amin(dim=1)
    with torch.no_grad():
        logits = network(test)
    ties = (other - own).abs() < 1e-6
    assert (logits.argmax(dim=1) == torch.from_numpy(expected))[by_class.sort(dim=1).values.diff()[:, 0] > 1e-6].all()
    radii = lipschitz_radius(network, test, test_labels, sound=False).double()
    is_correct = (own < other) & ~ties
    torch.testing.assert_close(radii[is_correct], ((other - own) / 2)[is_correct], rtol=0, atol=1e-6)
    assert (radii[(own > other) & ~ties] < 0).all() and is_correct.sum() > 300
    sound = lipschitz_radius(network, test, test_labels)
    assert ((radii - sound)[is_correct] > 0).all() and ((radii - sound) < 1e-5).all()


def test_brute_force_attacks_respect_certificates(digits: tuple[LinfDistNet, *tuple[Tensor, ...]]) -> None:
    """Points move towards each training image of another class; half of them succeed at three times the radius."""
    network, train, labels, test, test_labels = digits
    test, test_labels = test[:40], test_labels[:40]
    radii = lipschitz_radius(network, test, test_labels)
    broken = 0
    with torch.no_grad():
        for image, label, radius in zip(test, test_labels, radii, strict=True):
            targets = train[labels != label]
            for factor in (1.0, 3.0) if radius > 0 else ():
                step = (targets - image).clamp(-factor * radius.item(), factor * radius.item())
                margins = margin(network((image + step).clamp(0, 1)), label.expand(len(targets)))
                assert factor > 1 or (margins > 0).all()
                broken += int(factor > 1 and bool((margins <= 0).any()))
    assert (radii > 0).sum() > 30 and broken > 15


def test_unsuitable_images_are_rejected() -> None:
    config = LinfNearestConfig(samples=3)
    network = config.build((1, 2, 2), 3)
    with pytest.raises(ValueError, match=r"^samples=3"):
        config.store_images(network, torch.rand(4, 1, 2, 2), torch.arange(4) % 3)
    with pytest.raises(ValueError, match=r"^samples=3"):
        config.store_images(network, torch.rand(3, 1, 2, 2), torch.tensor([0, 0, 1]))
