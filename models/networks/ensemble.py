"""Ensembles: the mean of the logits of several networks.

If logits of member k are L_k-Lipschitz in the l_inf norm of the pixel values, their mean is Lipschitz with the mean of
the L_k, so its margin certifies images like that of a single network.
"""

import statistics
from collections.abc import Sequence
from typing import Annotated, Literal, cast

from pydantic import Field
from torch import Tensor, nn

from linflab.models.networks.base import NetworkConfig
from linflab.models.registry import OtherKinds

MAX_MEMBERS = 100


class EnsembleConfig(NetworkConfig):
    """Settings of the mean of trained networks, which is not trained itself.

    All members have the same input shape and the same kind of normalization. Members cannot be ensembles.
    """

    kind: Literal["ensemble"] = Field("ensemble", description="mean of the logits of trained networks")
    members: Annotated[
        tuple[Annotated[NetworkConfig, OtherKinds(NetworkConfig, "ensemble")], ...],
        Field(min_length=2, max_length=MAX_MEMBERS, description="networks whose logits are averaged"),
    ]
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
        """Check the members, and that they normalize images in the same way.

        Raises:
            ValueError: If settings of a member are incompatible, or only some members normalize each channel by its
                own standard deviation.
        """
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
        return cls([member.build(input_shape, classes, mean, std) for member in self.members])


class Ensemble(nn.Module):
    """Mean of the logits of networks, from images (B, C, H, W) to logits (B, classes).

    Args:
        members: Networks for the same images and classes.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images: Tensor) -> Tensor:
        """Return mean logits (B, classes) of images (B, C, H, W)."""
        first, *others = self.members
        total = first(images)
        for member in others:
            total = total + member(images)
        return total / len(self.members)


class LipschitzEnsemble(Ensemble):
    """Mean of the logits of networks that are Lipschitz by construction, each with a `lipschitz_constant`."""

    @property
    def lipschitz_constant(self) -> float:
        """Lipschitz constant of every logit in the l_inf norm of the pixel values: the mean of the members' ones."""
        return statistics.fmean(cast(float, member.lipschitz_constant) for member in self.members)
