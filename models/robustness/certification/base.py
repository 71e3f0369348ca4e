"""Base classes of certifiers."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from linflab.models.registry import Kind
from linflab.models.robustness.bounds.boxes import Box, ball_box, one_point
from linflab.models.robustness.bounds.ibp import trace_and_check
from linflab.models.robustness.bounds.rounding import strict_float32
from linflab.models.robustness.bounds.steps import Trace
from linflab.models.robustness.inputs import check_batch, check_eps

BISECTION_STEPS = 20  # radii are too small by at most 2^-20


class CertifierSettings(BaseModel):
    """Base of the settings of certifiers; most have none."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def build_settings(kind: str, cls: type[CertifierSettings], values: Mapping[str, Any]) -> CertifierSettings:
    """Return the settings of a certifier.

    Args:
        kind: Kind of the certifier, for messages.
        cls: Class of its settings.
        values: Settings by name.

    Raises:
        ValueError: If a setting does not exist or has an invalid value; the message names it.
    """
    known = cls.model_fields
    if unknown := [name for name in values if name not in known]:
        advice = f"use {', '.join(known)}" if known else "leave it out"
        raise ValueError(f"{unknown[0]}={values[unknown[0]]}: is not a setting of certifier={kind}; {advice}")
    try:
        return cls.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        name, reason = str(first["loc"][0]), first["msg"].lower()
        raise ValueError(
            f"{name}={first['input']}: {reason}; use a valid value for {name} ({known[name].description})"
        ) from None


class Certifier(Kind, ABC):
    """Base class of certifiers; each belongs to one network, and caches data about it across batches.

    A subclass that defines `kind` is accepted wherever a certifier is selected. It defines `_compute_radius`, or
    derives from `BoxCertifier` and defines `verify`. Both methods run without gradients, inside `strict_float32`, on
    checked inputs.

    Args:
        network: Network in evaluation mode, in float32 or float64. Do not change it while its certifiers are in use.
        sound: Account for rounding in the network and in the certificate.
        settings: Settings, of the class `settings_class`; None: the defaults.

    Attributes:
        settings_class: Class of the settings.
        bisects: True if a radius is found by bisection, and so takes much longer than a certificate at one eps.
            Otherwise certificates follow from radii.
    """

    bisects: ClassVar[bool] = False
    settings_class: ClassVar[type[CertifierSettings]] = CertifierSettings

    def __init__(self, network: nn.Module, sound: bool = True, settings: CertifierSettings | None = None) -> None:
        self.network, self.sound = network, sound
        self.settings = self.settings_class() if settings is None else settings

    @classmethod
    def has_time_limit(cls) -> bool:
        """Return True if the settings include a time limit per image; such certifiers decide image by image."""
        return "time_limit" in cls.settings_class.model_fields

    @strict_float32()
    @torch.no_grad()
    def certify(self, images: Tensor, labels: Tensor, eps: float) -> Tensor:
        """Return which images have a certified radius strictly above eps.

        Args:
            images: (B, C, H, W) or flat (B, D), pixel values in [0, 1]; an empty batch gives an empty result.
            labels: (B,) true classes, of any integer dtype.
            eps: Radius of the l_inf ball, for pixel values in [0, 1].

        Returns:
            (B,) bool. Images with NaN or infinite logits are not certified.

        Raises:
            TypeError: If the certifier does not support the network, or an argument has the wrong type or dtype.
            ValueError: If the network is in training mode, or shapes, pixel values, labels or eps are invalid.
        """
        labels, eps = check_batch(self.network, images, labels), check_eps(eps)
        return self._certify(images, labels, eps)

    @strict_float32()
    @torch.no_grad()
    def compute_radius(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the certified l_inf radius of each image; the radius itself is certified.

        Args:
            images: (B, C, H, W) or flat (B, D), pixel values in [0, 1]; an empty batch gives an empty result.
            labels: (B,) true classes, of any integer dtype.

        Returns:
            (B,) radii, for pixel values in [0, 1]. They are zero or negative where the image is misclassified or tied,
            or has NaN or infinite logits.

        Raises:
            TypeError: If the certifier does not support the network, or an argument has the wrong type or dtype.
            ValueError: If the network is in training mode, or shapes, pixel values or labels are invalid.
        """
        return self._compute_radius(images, check_batch(self.network, images, labels))

    def _certify(self, images: Tensor, labels: Tensor, eps: float) -> Tensor:
        return self._compute_radius(images, labels).double() > eps

    @abstractmethod
    def _compute_radius(self, images: Tensor, labels: Tensor) -> Tensor: ...


class BoxCertifier(Certifier):
    """Base class of certifiers that verify boxes of images, and find radii by bisection of [0, 1]."""

    bisects: ClassVar[bool] = True

    @abstractmethod
    def verify(self, box: Box, labels: Tensor) -> Tensor:
        """Return for which boxes (B,) every image is proven to have the true class.

        Args:
            box: Lower and upper bounds of images, (B, C, H, W) or (B, D).
            labels: (B,) true classes as int64.
        """

    def _certify(self, images: Tensor, labels: Tensor, eps: float) -> Tensor:
        return self.verify(ball_box(images, eps), labels)

    def _compute_radius(self, images: Tensor, labels: Tensor) -> Tensor:
        inside = torch.zeros(len(images), dtype=torch.float64, device=images.device)
        outside = torch.ones_like(inside)
        is_correct = self.verify(ball_box(images, 0.0), labels)
        for _ in range(BISECTION_STEPS):
            middle = (inside + outside) / 2
            is_certified = self.verify(ball_box(images, middle.view(-1, *[1] * (images.dim() - 1))), labels)
            inside, outside = torch.where(is_certified, middle, inside), torch.where(is_certified, outside, middle)
        return torch.where(is_correct, inside, -1.0)


class TracingCertifier(BoxCertifier):
    """Base class of certifiers that propagate bounds through the traced layers of a network."""

    def __init__(self, network: nn.Module, sound: bool = True, settings: CertifierSettings | None = None) -> None:
        super().__init__(network, sound, settings)
        self._traces: dict[Any, Trace] = {}

    def share_traces(self, other: "TracingCertifier") -> None:
        """Use the traces of another certifier of the same network, now and later."""
        self._traces = other._traces

    @abstractmethod
    def bound_margins(self, traced: Trace, box: Box, labels: Tensor) -> Tensor:
        """Return upper bounds (B, K) of z_j - z_y over a box of images; column y is unspecified.

        Args:
            traced: Steps of the network.
            box: Lower and upper bounds of images, (B, C, H, W) or (B, D).
            labels: (B,) true classes y as int64.
        """

    def verify(self, box: Box, labels: Tensor) -> Tensor:
        """Return for which boxes (B,) all logit differences are proven negative."""
        if not len(labels):
            return self.verify(one_point(box), labels.new_zeros(1))[:0]
        differences = self.bound_margins(self.trace_network(box), box, labels).scatter(1, labels[:, None], -1.0)
        # Infinite logits make bounds of -inf, which prove nothing. Rounded up, -inf is the least finite number.
        return ((differences < 0) & (differences > torch.finfo(differences.dtype).min)).all(dim=1)

    def trace_network(self, box: Box) -> Trace:
        """Return the trace of the network for inputs like those of a box, checked at its corners."""
        form = (box.lower.shape[1:], box.lower.dtype, box.lower.device)
        traced = self._traces[form] = trace_and_check(self.network, box, self._traces.get(form))
        return traced
