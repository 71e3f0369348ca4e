"""Exact robustness radii of small networks by mixed-integer linear programs in float64, independent of the bounds.

The radius of an image is the smallest eps for which a wrong class has a logit that is at least that of the true class.
A ReLU is encoded with one binary variable, a maximum such as an l_inf distance with one for each piece. Big-M constants
come from interval arithmetic in numpy over the largest box.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import nn

from linflab.models.networks.linf_dist import LinfDistNet
from tests.models.affine_maps import extract_affine

BOX_SIZES = (0.01, 0.03, 0.1, 0.3, 1.0)  # radii of boxes, tried one after the other; small ones give small constants


@dataclass(frozen=True)
class ReLULayer:
    """Outputs W x + c, with a ReLU on the first ones."""

    weight: np.ndarray
    bias: np.ndarray
    relus: int


@dataclass(frozen=True)
class DistanceLayer:
    """Outputs sign * max_i |x_i - w_oi| + bias."""

    weight: np.ndarray
    bias: np.ndarray
    sign: float = 1.0


Layer = ReLULayer | DistanceLayer


def describe_sequential(network: nn.Sequential, shape: Sequence[int]) -> list[Layer]:
    """Return the layers of a sequence of affine modules and ReLUs, in float64."""
    layers: list[Layer] = []
    group: list[nn.Module] = []
    for module in [*network, None]:
        if module is not None and not isinstance(module, nn.ReLU):
            group.append(module)
            continue
        affine = nn.Sequential(*group)
        weight, bias = extract_affine(affine, shape)
        with torch.no_grad():
            shape = affine(torch.zeros(1, *shape, dtype=torch.float64)).shape[1:]
        layers.append(ReLULayer(weight, bias, len(bias) if module is not None else 0))
        group = []
    return layers


def describe_distance_net(network: LinfDistNet, shape: Sequence[int]) -> list[Layer]:
    """Return the layers of a net of dense l_inf distances."""
    weight, bias = extract_affine(lambda x: network.features.normalize(x), shape)
    layers: list[Layer] = [ReLULayer(weight, bias, 0)]
    for distance, shift in zip(network.features.distances, network.features.shifts, strict=True):
        layers.append(DistanceLayer(distance.weight.detach().numpy(), -shift.running_mean.numpy()))
    last = network.last.weight.detach().numpy()
    return [*layers, DistanceLayer(last, -network.bias.detach().numpy(), -1.0)]


def evaluate(layers: Sequence[Layer], x: np.ndarray) -> np.ndarray:
    """Return the outputs of layers for one flat image."""
    for layer in layers:
        if isinstance(layer, ReLULayer):
            x = layer.weight @ x + layer.bias
            x[: layer.relus] = np.maximum(x[: layer.relus], 0)
        else:
            x = layer.sign * np.abs(x - layer.weight).max(axis=1) + layer.bias
    return x


def exact_radius(layers: Sequence[Layer], image: np.ndarray, label: int, margin: float = 0.0) -> float:
    """Return the smallest eps at which z_y - z_j is at most `margin` for a wrong class j; inf if it is above 1."""
    classes = len(evaluate(layers, image))
    for size in BOX_SIZES:
        found = min(
            _Program(layers, image, size).smallest_eps(label, other, margin)
            for other in range(classes)
            if other != label
        )
        if found < math.inf:
            return found
    return math.inf


@dataclass
class _Program:
    """Mixed-integer program of a network over the box of an image; variable 0 is eps, then the pixels follow."""

    layers: Sequence[Layer]
    image: np.ndarray
    size: float
    lower: list[float] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)
    binary: list[bool] = field(default_factory=list)
    rows: list[dict[int, float]] = field(default_factory=list)
    limits: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._variables([0.0], [self.size])
        low, high = np.clip(self.image - self.size, 0, 1), np.clip(self.image + self.size, 0, 1)
        values = self._variables(low, high)
        for k, pixel in zip(values, self.image, strict=True):
            self._require({k: 1.0, 0: -1.0}, pixel)
            self._require({k: -1.0, 0: -1.0}, -pixel)
        for layer in self.layers:
            step = self._relu_layer if isinstance(layer, ReLULayer) else self._distance_layer
            values, low, high = step(layer, values, low, high)
        self.outputs = values

    def smallest_eps(self, label: int, other: int, margin: float) -> float:
        matrix = np.zeros((len(self.rows) + 1, len(self.lower)))
        for row, terms in zip(matrix, self.rows, strict=False):
            for k, factor in terms.items():
                row[k] += factor
        matrix[-1, self.outputs[label]], matrix[-1, self.outputs[other]] = 1, -1
        cost = np.zeros(len(self.lower))
        cost[0] = 1
        found = milp(
            cost,
            constraints=LinearConstraint(matrix, -np.inf, [*self.limits, margin]),
            bounds=Bounds(self.lower, self.upper),
            integrality=np.array(self.binary, dtype=int),
            options={"mip_rel_gap": 1e-7, "time_limit": 60},
        )
        assert found.status in (0, 2), found.message  # optimal or infeasible
        return float(found.fun) if found.status == 0 else math.inf

    def _variables(self, lower: Sequence[float], upper: Sequence[float], binary: bool = False) -> list[int]:
        first = len(self.lower)
        self.lower += list(lower)
        self.upper += list(upper)
        self.binary += [binary] * len(lower)
        return list(range(first, len(self.lower)))

    def _require(self, terms: dict[int, float], limit: float) -> None:
        """Require that a sum of factors times variables is at most a limit."""
        self.rows.append(terms)
        self.limits.append(float(limit))

    def _relu_layer(
        self, layer: ReLULayer, values: list[int], low: np.ndarray, high: np.ndarray
    ) -> tuple[list[int], np.ndarray, np.ndarray]:
        positive, negative = np.maximum(layer.weight, 0), np.minimum(layer.weight, 0)
        low, high = positive @ low + negative @ high + layer.bias, positive @ high + negative @ low + layer.bias
        outputs = []
        for k, (row, bias) in enumerate(zip(layer.weight, layer.bias, strict=True)):
            terms = {value: factor for value, factor in zip(values, row, strict=True) if factor}
            is_relu = k < layer.relus
            (y,) = self._variables(
                [max(0.0, low[k]) if is_relu else low[k]], [max(0.0, high[k]) if is_relu else high[k]]
            )
            outputs.append(y)
            if is_relu and high[k] <= 0:
                continue  # y = 0 by its range
            self._require({**terms, y: -1.0}, -bias)  # y >= v
            if not is_relu or low[k] >= 0:
                self._require({**{value: -factor for value, factor in terms.items()}, y: 1.0}, bias)
                continue
            (active,) = self._variables([0], [1], binary=True)
            self._require({y: 1.0, active: -high[k]}, 0.0)
            self._require(
                {**{value: -factor for value, factor in terms.items()}, y: 1.0, active: -low[k]}, bias - low[k]
            )
        is_relu = np.arange(len(low)) < layer.relus
        return outputs, np.where(is_relu, np.maximum(low, 0), low), np.where(is_relu, np.maximum(high, 0), high)

    def _distance_layer(
        self, layer: DistanceLayer, values: list[int], low: np.ndarray, high: np.ndarray
    ) -> tuple[list[int], np.ndarray, np.ndarray]:
        outputs, all_low, all_high = [], [], []
        for weights, bias in zip(layer.weight, layer.bias, strict=True):
            pieces = [
                (sign, value, weight, (a - weight, b - weight) if sign > 0 else (weight - b, weight - a))
                for value, weight, a, b in zip(values, weights, low, high, strict=True)
                for sign in (1.0, -1.0)
            ]
            floor = max(ends[0] for *_, ends in pieces)
            top = max(ends[1] for *_, ends in pieces)
            ends = sorted((layer.sign * floor + bias, layer.sign * top + bias))
            (y,) = self._variables([ends[0]], [ends[1]])
            possible = [piece for piece in pieces if piece[3][1] >= floor]
            chosen = self._variables([0] * len(possible), [1] * len(possible), binary=True)
            for (sign, value, weight, (least, _)), binary in zip(possible, chosen, strict=True):
                # sign (x - w) <= layer.sign (y - bias) <= sign (x - w) + (top - least) (1 - binary)
                self._require({value: sign, y: -layer.sign}, sign * weight - layer.sign * bias)
                gap = top - least
                limit = -sign * weight + layer.sign * bias + gap
                self._require({value: -sign, y: layer.sign, binary: gap}, limit)
            self._require({binary: -1.0 for binary in chosen}, -1.0)
            outputs.append(y)
            all_low.append(ends[0])
            all_high.append(ends[1])
        return outputs, np.array(all_low), np.array(all_high)
