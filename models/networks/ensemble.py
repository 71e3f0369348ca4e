"""Ensembles: the weighted mean of the logits of several networks.

If logits of member k are L_k-Lipschitz in the l_inf norm of the pixel values, their mean is Lipschitz with the mean of
the L_k under the same weights, so its margin certifies images like that of a single network. Logits of different kinds
of networks differ in scale: distances are about 0.1, logits of ReLU networks about 10. Weights balance them.

The mirror image of a perturbed image is the mirror image perturbed by the same amount. The mean of a network's logits
for an image and for its mirror image is therefore Lipschitz with the network's constant. Bounds propagate through both.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal, cast

from pydantic import Field
from torch import Tensor, nn

from linflab.models.networks.base import NetworkConfig
from linflab.models.registry import OtherKinds

MAX_MEMBERS = 100
MAX_WEIGHT_RATIO = 1e9  # a smaller weight has next to no effect on logits in float32

Weight = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class EnsembleConfig(NetworkConfig):
    """Settings of the mean of trained networks, which is not trained itself.

    All members have the same input shape and the same kind of normalization. Members cannot be ensembles. There are at
    least two, or one whose logits for mirror images are averaged too.
    """

    kind: Literal["ensemble"] = Field("ensemble", description="mean of the logits of trained networks")
    members: Annotated[
        tuple[Annotated[NetworkConfig, OtherKinds(NetworkConfig, "ensemble")], ...],
        Field(min_length=1, max_length=MAX_MEMBERS, description="networks whose logits are averaged"),
    ]
    weights: tuple[Weight, ...] = Field((), description="weight of each member in the mean; none: equal weights")
    mirror: tuple[bool, ...] = Field(
        (),
        description="for each member, whether logits for the mirror image are averaged too, for networks trained with "
        "horizontal flips; none: false for all",
    )
    runs: tuple[str, ...] = Field((), description="ids of the runs that trained the members, in the same order")

    @property
    def is_lipschitz(self) -> bool:  # type: ignore[override]
        """True if logits of all members are Lipschitz by construction."""
        return all(member.is_lipschitz for member in self.members)

    @property
    def has_relu(self) -> bool:  # type: ignore[override]
        """True if a member has ReLUs."""
        return any(member.has_relu for member in self.members)

    @property
    def parts(self) -> tuple[NetworkConfig, ...]:
        """Networks whose logits are averaged."""
        return self.members

    @property
    def uses_channel_std(self) -> bool:
        """True if `build` takes one standard deviation per channel as `std`, as all members do."""
        return all(member.uses_channel_std for member in self.members)

    def check(self) -> None:
        """Check the members, their weights, and that they normalize images in the same way.

        Raises:
            ValueError: If there is only one member without mirror images, settings of a member are incompatible, only
                some members normalize each channel by its own standard deviation, weights differ too much, or values
                for some members are missing.
        """
        if len(self.members) == 1 and not any(self.mirror):
            raise ValueError(
                "model.members: must be at least 2 networks, but is 1; add one, or use model.mirror=[true]"
            )
        if self.weights and len(self.weights) != len(self.members):
            raise ValueError(
                f"model.weights={_format(self.weights)}: must be one number for each of the {len(self.members)} "
                "members; give one each, or none for equal weights"
            )
        if self.mirror and len(self.mirror) != len(self.members):
            raise ValueError(
                f"model.mirror={str(list(self.mirror)).lower()}: must be true or false for each of the "
                f"{len(self.members)} members; give one value each, or [] for none"
            )
        if self.weights and max(self.weights) / min(self.weights) > MAX_WEIGHT_RATIO:
            raise ValueError(
                f"model.weights={_format(self.weights)}: differ by more than a factor of {MAX_WEIGHT_RATIO:g}; use "
                "weights of similar size, or leave out the member with the smallest one"
            )
        for member in self.members:
            member.check()
        if len({member.uses_channel_std for member in self.members}) > 1:
            raise ValueError(
                "model.members: only some have per_channel_std=true; use networks that normalize images in the same way"
            )

    def build(
        self, input_shape: Sequence[int], classes: int, mean: Sequence[float] = (0.0,), std: float = 1.0
    ) -> "Ensemble":
        """Return the network for images (C, H, W) with pixel values in [0, 1]; see `NetworkConfig.build`."""
        cls = LipschitzEnsemble if self.is_lipschitz else Ensemble
        members = [member.build(input_shape, classes, mean, std) for member in self.members]
        return cls(members, self.weights, self.mirror)


class Ensemble(nn.Module):
    """Weighted mean of the logits of networks, from images (B, C, H, W) to logits (B, classes).

    Args:
        members: Networks for the same images and classes.
        weights: Positive weight of each member, of any sum; none: equal weights.
        mirror: For each member, whether its logits are the mean over the image and the image mirrored left to right;
            none: no member's.

    Attributes:
        shares: Weights, divided by their sum.
        mirror: For each member, whether it is averaged over mirror images.

    Raises:
        ValueError: If there is not one positive weight or one value of `mirror` for each member.
    """

    def __init__(
        self, members: Sequence[nn.Module], weights: Sequence[float] = (), mirror: Sequence[bool] = ()
    ) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.mirror = tuple(bool(one) for one in mirror) or (False,) * len(members)
        if len(self.mirror) != len(members):
            raise ValueError(
                f"mirror={list(self.mirror)}: must be one value for each of the {len(members)} members; give one each"
            )
        weights = weights or [1.0] * len(members)
        if len(weights) != len(members) or not all(0 < weight < math.inf for weight in weights):
            raise ValueError(
                f"weights={list(weights)}: must be one positive number for each of the {len(members)} members; "
                "give one each, or none for equal weights"
            )
        total = math.fsum(weights)
        self.shares = tuple(weight / total for _, weight in zip(members, weights, strict=True))

    def mean_over_members(self, values: Iterable[float]) -> float:
        """Return the weighted mean of one value per member."""
        return math.fsum(share * value for share, value in zip(self.shares, values, strict=True))

    def forward(self, images: Tensor) -> Tensor:
        """Return mean logits (B, classes) of images (B, C, H, W).

        Raises:
            ValueError: If images have another number of dimensions, so that they cannot be mirrored.
        """
        mirrored = images
        if any(self.mirror):
            if images.dim() != 4:
                raise ValueError(
                    f"images: must be (B, C, H, W) to be mirrored, not {tuple(images.shape)}; reshape them"
                )
            mirrored = images.flip(3)
        views = ((images, mirrored) if mirror else (images,) for mirror in self.mirror)
        first, *others = (
            share / len(own_views) * member(view)
            for share, member, own_views in zip(self.shares, self.members, views, strict=True)
            for view in own_views
        )
        total = first
        for part in others:
            total = total + part
        return total


class LipschitzEnsemble(Ensemble):
    """Mean of the logits of networks that are Lipschitz by construction, each with a `lipschitz_constant`."""

    @property
    def lipschitz_constant(self) -> float:
        """Lipschitz constant of every logit in the l_inf norm of the pixel values: the mean of the members' ones."""
        return self.mean_over_members(cast(float, member.lipschitz_constant) for member in self.members)


def _format(weights: Sequence[float]) -> str:
    return ",".join(f"{weight:g}" for weight in weights)
