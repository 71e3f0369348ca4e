"""Certification and attacks for any supported `torch.nn.Module`."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from linflab.models.robustness.attacks import AttackConfig, AttackMethod, default_attacks, robust_under_attack
from linflab.models.robustness.bounds.rounding import strict_float32
from linflab.models.robustness.certification import (
    Certifier,
    default_certifier,
    is_classified_correctly,
    judge_images,
    make_certifier,
)
from linflab.models.robustness.inputs import (
    check_batch,
    check_eps,
    check_image_shape,
    check_label_form,
    check_labels,
    to_unit_range,
)
from linflab.platform.api.inputs import (
    BATCH_SIZE,
    build_with_short_errors,
    check_count,
    check_module,
    iter_pairs,
    module_device,
    module_dtype,
)
from linflab.platform.extras import naming_extras

if TYPE_CHECKING:
    import pandas as pd

    from linflab.platform.api.inputs import Array, Batches


@dataclass(frozen=True, repr=False)
class Certificates:
    """Certificates for N images.

    Attributes:
        eps: The requested radius, for pixel values in [0, 1]; None if certified radii were computed instead.
        certified: (N) bool: True if every image within eps is proven to have the correct class. If eps was not given,
            True if the certified radius is positive.
        radius: (N) float64 certified radii, zero for misclassified images. None if eps was given.
        status: (N) strings: "certified", "falsified" (the image itself is misclassified, or `complete` or `cascade`
            found such an image within eps), "unknown", or, of `cascade`, "error".
        certifier: (N) names of the methods that gave the status; "forward" (a forward pass) for misclassified images.
        seconds: (N) float64: duration of the image's batch in seconds, divided by the number of images in that batch;
            of `complete` and `cascade`, the duration of the image.
        adversarial: Misclassified images (C, H, W) or (D,) within eps, by position; empty for radii.
        message: Errors by position.
    """

    eps: float | None
    certified: Tensor
    radius: Tensor | None
    status: tuple[str, ...]
    certifier: tuple[str, ...]
    seconds: Tensor
    adversarial: Mapping[int, Tensor] = field(default_factory=dict)
    message: Mapping[int, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Return eps, the number of images with each status and the certified accuracy, without the tensors."""
        counts = ", ".join(f"{count} {status}" for status, count in Counter(self.status).items())
        accuracy = f"; certified accuracy {self.certified_accuracy:.2%}" if self.status else ""
        return f"Certificates(eps={self.eps}, {len(self.status)} images{f': {counts}' if counts else ''}{accuracy})"

    @property
    def certified_accuracy(self) -> float:
        """Fraction of certified images; a lower bound on the true robust accuracy."""
        return self.certified.double().mean().item()

    @naming_extras()
    def to_frame(self) -> "pd.DataFrame":
        """Return a DataFrame with one row for each image.

        Returns:
            Columns `certified` (if eps was given) or `radius` (if not), then `status`, `certifier` and `seconds`.

        Raises:
            ModuleNotFoundError: If pandas is not installed.
        """
        import pandas as pd

        columns: dict[str, Any] = {"status": self.status, "certifier": self.certifier, "seconds": self.seconds.numpy()}
        values = self.certified if self.radius is None else self.radius
        return pd.DataFrame({"certified" if self.radius is None else "radius": values.numpy(), **columns})


@dataclass(frozen=True)
class AttackResult:
    """Results of attacks on N images.

    Attributes:
        eps: Radius of the attacks, for pixel values in [0, 1].
        clean: (N) bool: True if the image itself is classified correctly.
        robust: (N) bool: True if the image and every point that the attacks visited are classified correctly.
        attacks: Names of the attacks, in the order in which they ran.
        seconds: Duration of all attacks.
    """

    eps: float
    clean: Tensor
    robust: Tensor
    attacks: tuple[str, ...]
    seconds: float

    @property
    def clean_accuracy(self) -> float:
        """Fraction of images that are classified correctly."""
        return self.clean.double().mean().item()

    @property
    def robust_accuracy(self) -> float:
        """Fraction of images without a successful attack; an upper bound on the true robust accuracy."""
        return self.robust.double().mean().item()

    @naming_extras()
    def to_frame(self) -> "pd.DataFrame":
        """Return a DataFrame with one row for each image and the columns `clean` and `robust`.

        Raises:
            ModuleNotFoundError: If pandas is not installed.
        """
        import pandas as pd

        return pd.DataFrame({"clean": self.clean.numpy(), "robust": self.robust.numpy()})


def certify(
    module: nn.Module,
    images: "Array | Batches",
    labels: "Array | None" = None,
    *,
    eps: float | None = None,
    certifier: str = "auto",
    sound: bool = True,
    time_limit: float | None = None,
    batch_size: int = BATCH_SIZE,
) -> Certificates:
    """Certify images at eps, or compute certified radii.

    Args:
        module: Network in evaluation mode, in float32 or float64, on any device.
        images: (N, C, H, W) or (N, D), a tensor or NumPy array: floats in [0, 1] in the dtype of the module, or
            uint8 (divided by 255); or an iterable of batches of images and labels.
        labels: (N) correct classes. Omit them if `images` is an iterable of batches.
        eps: Radius of the l_inf ball, for pixel values in [0, 1]. If it is None, certified radii are computed.
        certifier: `lipschitz`, `ibp`, `crown`, `alpha_crown`, `complete`, `cascade` or another registered certifier.
            `auto` selects `lipschitz` for networks that are Lipschitz by construction, and `ibp` for all others.
            `complete` and `cascade` decide image by image, up to their time limit.
        sound: If True, the certificates account for all float32 rounding. If False, they hold for real arithmetic only.
        time_limit: Seconds per image of `complete` and `cascade`; None: 30 s. Other certifiers have no limit.
        batch_size: Number of images that are certified at once, by default 128.

    Returns:
        One certificate for each image.

    Raises:
        TypeError: If an argument has the wrong type or dtype, or the certifier does not support the module or `sound`.
        ValueError: If a value, shape or device is invalid, or the module is in training mode.
    """
    check_module(module)
    name = default_certifier(module) if certifier == "auto" else certifier
    instance = make_certifier(module, name, sound, **({} if time_limit is None else {"time_limit": time_limit}))
    batches = _batches(images, labels, module, batch_size)
    if eps is not None:
        return _judge(instance, batches, check_eps(eps))
    radii, seconds = [torch.zeros(0, dtype=torch.float64)], list[float]()
    status, certifiers = list[str](), list[str]()
    for batch, classes in batches:
        size = 1 if instance.has_time_limit() else max(1, len(batch))
        for part, part_classes in zip(batch.split(size), classes.split(size), strict=True):
            start = time.perf_counter()
            is_correct = is_classified_correctly(module, part, part_classes)
            radii.append(instance.compute_radius(part, part_classes).double().clamp(min=0).cpu())
            seconds += [(time.perf_counter() - start) / max(1, len(part))] * len(part)
            for radius, correct in zip(radii[-1].tolist(), is_correct.tolist(), strict=True):
                status.append("certified" if radius > 0 else "unknown" if correct else "falsified")
                certifiers.append("forward" if status[-1] == "falsified" else name)
    radius = torch.cat(radii)
    return Certificates(
        None, radius > 0, radius, tuple(status), tuple(certifiers), torch.tensor(seconds, dtype=torch.float64)
    )


def _judge(certifier: Certifier, batches: Iterator[tuple[Tensor, Tensor]], eps: float) -> Certificates:
    """Return the verdicts of a certifier on batches of images and labels."""
    verdicts = [verdict for batch, classes in batches for verdict in judge_images(certifier, batch, classes, eps)]
    return Certificates(
        eps,
        torch.tensor([one.status == "certified" for one in verdicts], dtype=torch.bool),
        None,
        tuple(one.status for one in verdicts),
        tuple(one.certifier for one in verdicts),
        torch.tensor([one.seconds for one in verdicts], dtype=torch.float64),
        {k: one.adversarial.cpu() for k, one in enumerate(verdicts) if one.adversarial is not None},
        {k: one.message for k, one in enumerate(verdicts) if one.message},
    )


def attack(
    module: nn.Module,
    images: "Array | Batches",
    labels: "Array | None" = None,
    *,
    eps: float,
    attacks: str | Sequence[str] | AttackConfig = "default",
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
) -> AttackResult:
    """Attack images within the l_inf ball of radius eps.

    Args:
        module: Network in evaluation mode, in float32 or float64, on any device.
        images: (N, C, H, W) or (N, D), a tensor or NumPy array: floats in [0, 1] in the dtype of the module, or
            uint8 (divided by 255); or an iterable of batches of images and labels.
        labels: (N) correct classes. Omit them if `images` is an iterable of batches.
        eps: Radius of the l_inf ball, for pixel values in [0, 1].
        attacks: `default` (selected by the kind of network), `autoattack`, names of attacks, or an `AttackConfig`.
        seed: Seed of the attacks' random draws.
        batch_size: Number of images that are attacked at once, by default 128.

    Returns:
        Clean and robust results for each image.

    Raises:
        TypeError: If images, labels or module have the wrong type or dtype.
        ValueError: If an attack name, value, shape or device is invalid, or the module is in training mode.
    """
    check_module(module)
    eps, config = check_eps(eps), _attack_config(attacks)
    start, generator = time.perf_counter(), torch.Generator().manual_seed(seed)
    clean, robust = [torch.zeros(0, dtype=torch.bool)], [torch.zeros(0, dtype=torch.bool)]
    for batch, classes in _batches(images, labels, module, batch_size):
        clean.append(is_classified_correctly(module, batch, classes).cpu())
        with strict_float32():  # certificates hold for the same arithmetic
            robust.append(robust_under_attack(module, batch, classes, eps, config, generator).cpu())
    names = config.methods or default_attacks(module)
    return AttackResult(eps, torch.cat(clean), torch.cat(robust), tuple(names), time.perf_counter() - start)


def _attack_config(attacks: str | Sequence[str] | AttackConfig) -> AttackConfig:
    if isinstance(attacks, AttackConfig):
        return attacks
    if not isinstance(attacks, str | list | tuple):
        raise TypeError(
            f"attacks={type(attacks).__name__}: must be a name, a list of names or an AttackConfig; use 'pgd', for "
            "example"
        )
    if attacks == "default":
        return AttackConfig()
    kinds = (attacks,) if isinstance(attacks, str) else tuple(attacks)
    if unknown := [kind for kind in kinds if kind not in AttackMethod.registry]:
        names = ", ".join(AttackMethod.registry)
        raise ValueError(f"attacks={unknown[0]}: not found; use the string default, or names of {names}")
    return build_with_short_errors("attacks", lambda: AttackConfig(methods=kinds))


def _batches(
    images: "Array | Batches", labels: "Array | None", module: nn.Module, size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield checked batches of images and labels on the module's device."""
    check_count("batch_size", size)
    device, dtype = module_device(module), module_dtype(module)
    if labels is None:
        if hasattr(images, "shape"):
            raise TypeError("labels=None: must be given with images; leave them out for an iterable of batches of both")
        pairs = iter(iter_pairs("images", images))
    elif not hasattr(images, "shape"):
        kind = type(images).__name__
        raise TypeError(
            f"images={kind}: must be an array if labels are given; leave labels out for an iterable of both"
        )
    else:
        all_images, all_labels = torch.as_tensor(images), torch.as_tensor(labels)
        check_image_shape(all_images.shape)
        check_label_form(all_labels, all_images)
        check_batch(module, to_unit_range(all_images[:0].to(device), dtype), all_labels[:0])
        check_labels(all_labels, all_images)
        pairs = ((all_images[k : k + size], all_labels[k : k + size]) for k in range(0, len(all_images), size))
    for batch, classes in pairs:
        batch = to_unit_range(batch.to(device), dtype)
        yield batch, check_batch(module, batch, classes)
