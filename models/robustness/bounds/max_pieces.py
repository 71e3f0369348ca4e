"""Layers whose outputs are maxima of single inputs with a sign and an offset: distances, max pooling and GroupSort.

An l_inf distance is max_i |x_i - w_i|, the maximum of 2 I such pieces x_i - w_i and w_i - x_i. The smaller of two
values is minus the larger of their negatives.
"""

from functools import singledispatch
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import unfold

from linflab.models.distance.convolution import output_size
from linflab.models.networks.layers import GroupSort, LpDistance, LpDistanceConv2d, SortDistance
from linflab.models.robustness.bounds.pooling import extract_windows, get_pooling
from linflab.models.robustness.bounds.steps import OwnLayer, has_exact_rule

MAX_PIECES = 2**22  # larger layers are not split into pieces


class Pieces(NamedTuple):
    """Outputs y_n = orientation_n max_p (sign_np x[places_np] + offset_np) of N neurons with up to P pieces.

    Attributes:
        places: (N, P) flat indices of inputs; -1 for zero padding.
        sign: (N, P) signs; 0 at padding.
        offset: (N, P) offsets; -inf for pieces that do not exist.
        orientation: (N,) 1, or -1 for minima.
        is_rounded: True if the layer rounds each piece.
    """

    places: Tensor
    sign: Tensor
    offset: Tensor
    orientation: Tensor
    is_rounded: bool

    def to(self, device: torch.device) -> "Pieces":
        """Return the pieces on a device."""
        return Pieces(
            self.places.to(device),
            self.sign.to(device),
            self.offset.to(device),
            self.orientation.to(device),
            self.is_rounded,
        )


@singledispatch
def max_pieces(layer: nn.Module, inputs: torch.Size) -> Pieces | None:
    """Return the pieces of a layer at p = inf; None if its outputs are not maxima of pieces, or too many.

    Args:
        layer: Layer of any type.
        inputs: Shape of its inputs without the batch.
    """
    return None


@max_pieces.register
def _own_layer(layer: OwnLayer, inputs: torch.Size) -> Pieces | None:
    return max_pieces(layer.layer, inputs) if has_exact_rule(max_pieces, layer.layer) else None


@max_pieces.register
def _distance(layer: LpDistance, inputs: torch.Size) -> Pieces | None:
    if isinstance(layer, SortDistance) or 2 * layer.weight.numel() > MAX_PIECES:
        return None
    return _distance_pieces(
        torch.arange(inputs.numel(), device=layer.weight.device).expand_as(layer.weight), layer.weight
    )


@max_pieces.register
def _distance_convolution(layer: LpDistanceConv2d, inputs: torch.Size) -> Pieces | None:
    positions = torch.arange(1, inputs.numel() + 1, dtype=torch.float64, device=layer.weight.device).view(1, *inputs)
    height, width = output_size(positions, layer.weight, layer.stride, layer.padding)
    if 2 * layer.weight.numel() * height * width > MAX_PIECES:
        return None
    patches = unfold(positions, layer.weight.shape[2:], padding=layer.padding, stride=layer.stride)[0].T.long() - 1
    filters = layer.weight.flatten(1)
    index = patches[None].expand(len(filters), -1, -1).flatten(0, 1)
    return _distance_pieces(index, filters[:, None].expand(-1, len(patches), -1).flatten(0, 1))


def _distance_pieces(index: Tensor, weight: Tensor) -> Pieces:
    sign, offset = (index >= 0).double(), weight.detach().double()
    return Pieces(
        torch.cat([index, index], dim=1),
        torch.cat([sign, -sign], dim=1),
        torch.cat([-offset, offset], dim=1),
        torch.ones_like(offset[:, 0]),
        is_rounded=True,
    )


@max_pieces.register(nn.MaxPool2d)
@max_pieces.register(nn.AdaptiveMaxPool2d)
def _max_pooling(layer: nn.MaxPool2d | nn.AdaptiveMaxPool2d, inputs: torch.Size) -> Pieces | None:
    pooling = get_pooling(layer, inputs)
    if pooling is None or inputs.numel() * len(pooling.places(pooling.window.outputs)) > MAX_PIECES:
        return None
    positions = torch.arange(inputs.numel(), dtype=torch.float64).view(1, *inputs)
    windows = extract_windows(positions, pooling)[0].flatten(1).T  # -inf beyond the edges
    exists = windows.isfinite()
    index = torch.where(exists, windows, -1).long()
    offset = torch.zeros_like(windows).masked_fill(~exists, -torch.inf)
    return Pieces(index, exists.double(), offset, torch.ones_like(offset[:, 0]), is_rounded=False)


@max_pieces.register
def _group_sort(layer: GroupSort, inputs: torch.Size) -> Pieces | None:
    if layer.group_size != 2:
        return None
    index = torch.arange(inputs.numel()).view(-1, 2).repeat_interleave(2, dim=0)  # outputs: smaller, larger, ...
    orientation = torch.tensor([-1.0, 1.0], dtype=torch.float64).repeat(inputs.numel() // 2)
    sign = orientation[:, None].expand(-1, 2)
    return Pieces(index, sign, torch.zeros_like(sign), orientation, is_rounded=False)
