"""Linear relaxation of max pooling: linear bounds of the maximum of a window."""

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from linflab.models.robustness.bounds.affine import ConvGeometry, adaptive_window
from linflab.models.robustness.bounds.boxes import Box, max_magnitude
from linflab.models.robustness.bounds.relaxations import FLOAT64_SLACK, RelaxationKind


class Pooling(NamedTuple):
    """Windows of a pooling layer.

    Attributes:
        size: Height and width of a window.
        window: Stride, padding, dilation and output size.
    """

    size: tuple[int, ...]
    window: ConvGeometry

    def places(self, outputs: Sequence[int]) -> list[tuple[slice, slice]]:
        """Return the rows and columns of inputs at each place of a window, for neighboring windows.

        Args:
            outputs: Number of windows along each dimension.
        """
        rows, columns = (
            [slice(k * dilation, k * dilation + (n - 1) * stride + 1, stride) for k in range(size)]
            for n, size, stride, dilation in zip(
                outputs, self.size, self.window.stride, self.window.dilation, strict=True
            )
        )
        return list(product(rows, columns))


class MaximumLines(NamedTuple):
    """Linear bounds of each maximum: sums of factors times values of a window, plus intercepts.

    At most one place of each window has a nonzero factor.

    Attributes:
        pooling: Windows of the layer.
        lower: (B, places in a window, C, H, W) factors of the lower bounds.
        lower_intercept: (B, C, H, W) intercepts of the lower bounds.
        upper: (B, places in a window, C, H, W) factors of the upper bounds.
        upper_intercept: (B, C, H, W) intercepts of the upper bounds.
    """

    pooling: Pooling
    lower: Tensor
    lower_intercept: Tensor
    upper: Tensor
    upper_intercept: Tensor

    @property
    def same_slope(self) -> bool:
        """True if lower and upper factors are equal by construction."""
        return self.lower is self.upper


def is_max_pooling(layer: nn.Module) -> bool:
    """Return True if a layer may have a relaxation; `get_pooling` decides for given inputs."""
    return isinstance(layer, nn.MaxPool2d | nn.AdaptiveMaxPool2d)


def get_pooling(layer: nn.Module, inputs: torch.Size) -> Pooling | None:
    """Return the windows of max pooling on maps (C, H, W); None for other layers or unequal windows."""
    if isinstance(layer, nn.MaxPool2d):
        size, stride, padding, dilation = (
            (value, value) if isinstance(value, int) else tuple(value)
            for value in (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        )
    elif isinstance(layer, nn.AdaptiveMaxPool2d):
        window_size = adaptive_window(layer.output_size, inputs)
        if window_size is None:
            return None
        size = stride = window_size
        padding, dilation = (0, 0), (1, 1)
    else:
        return None
    with torch.device("meta"):
        outputs = layer(torch.empty(1, *inputs)).shape[2:]
    return Pooling(size, ConvGeometry(stride, padding, dilation, inputs[0], tuple(outputs)))


def maximum_lines(
    pooling: Pooling, box: Box, relaxation: RelaxationKind = "adaptive", sound: bool = False
) -> MaximumLines:
    """Return the linear relaxation of a max pooling layer over a box (B, C, H, W) of its inputs.

    Let j be the place of the largest upper bound in a window. Let m be the largest of the other upper bounds, or the
    lower bound l_j if that is larger. All other values are at most m, so the maximum is at most max(x_j, m). The chord
    from (l_j, m) to (u_j, u_j) bounds max(x_j, m) from above. The chord is x_j itself where x_j is always the largest
    value. `relaxation` selects:

    - adaptive: the lower bound is x_i, where i has the largest lower bound (as in Singh et al., POPL 2019);
    - parallel: the lower bound has the slope of the chord, and bounds max(x_j, largest lower bound) from below;
    - box: both bounds are constant where no value is always the largest.

    Args:
        pooling: Windows of the layer.
        box: Lower and upper bounds l, u of its inputs.
        relaxation: Choice of slopes.
        sound: If True, widen intercepts by the float64 errors of their computation.
    """
    lower, upper = extract_windows(box.lower, pooling), extract_windows(box.upper, pooling)
    highest, argmax = upper.max(dim=1, keepdim=True)
    runner_up = upper.scatter(1, argmax, -torch.inf).amax(dim=1, keepdim=True)
    low, floor = lower.gather(1, argmax), lower.amax(dim=1, keepdim=True)
    runner_up = torch.maximum(runner_up, low)
    width = highest - low
    slope = torch.where(runner_up > low, (highest - runner_up) / torch.where(width > 0, width, 1.0), 1.0)
    if relaxation == "box":
        slope = torch.where(runner_up > low, 0.0, slope)
    upper_intercept = torch.maximum(runner_up - slope * low, highest - slope * highest)
    upper_factors = torch.zeros_like(upper).scatter(1, argmax, slope)
    if relaxation == "adaptive":
        best = lower.argmax(dim=1, keepdim=True)
        lower_factors, lower_intercept = torch.zeros_like(lower).scatter(1, best, 1.0), torch.zeros_like(floor)
    else:  # max(x_j, floor) - slope x_j is least at x_j = floor
        lower_factors, lower_intercept = upper_factors, floor - slope * floor
    if sound:
        slack = FLOAT64_SLACK * (1 + max_magnitude(Box(torch.minimum(low, floor), highest)))
        upper_intercept, lower_intercept = upper_intercept + slack, lower_intercept - slack
    return MaximumLines(pooling, lower_factors, lower_intercept[:, 0], upper_factors, upper_intercept[:, 0])


def extract_windows(values: Tensor, pooling: Pooling) -> Tensor:
    """Return the values (B, places in a window, C, H, W) of each output's window; -inf beyond the edges."""
    window, edges = pooling.window, []
    extents = window.receptive_field(window.outputs, pooling.size)
    for start, length, extent in zip(window.padding[::-1], values.shape[:-3:-1], extents[::-1], strict=True):
        edges += [start, extent - start - length]
    padded = functional.pad(values, edges, value=-torch.inf)
    places = pooling.places(window.outputs)
    return torch.stack([padded[..., row, column] for row, column in places], dim=1)
