"""Coefficients of linear functions in backward bound propagation, dense or as patches.

`DenseCoefficients` have one coefficient per value. A convolution's outputs depend on few of its inputs, so
`PatchCoefficients` store, for each position of a map, only the coefficients of a window; all others are zero. For the
outputs of a second convolution on 28 x 28 images this is a hundredth of the work.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

from linflab.models.robustness.bounds.affine import Affine
from linflab.models.robustness.bounds.pooling import Pooling

Pair = tuple[int, ...]
MAX_MATRIX_ELEMENTS = 2**17  # size limit of a convolution written as a matrix


@dataclass(frozen=True)
class Coefficients(ABC):
    """Coefficients of R linear functions at each place, which is a sample, or a sample and a position.

    If the dimension of samples or positions has size 1, all samples or positions share the coefficients.

    Attributes:
        a: (..., R, *window) coefficients, where (...) are the places.
    """

    a: Tensor

    @abstractmethod
    def gather(self, values: Tensor) -> Tensor:
        """Return values (B or 1, *shape) in the layout of `a`, zero beyond the edges."""

    @abstractmethod
    def backward_through(self, affine: Affine, inputs: torch.Size) -> Self:
        """Return the coefficients of the inputs of an affine layer, from those of its outputs.

        Args:
            affine: Map of the layer.
            inputs: Shape of its inputs without the batch.
        """

    @abstractmethod
    def backward_through_pooling(self, factors: Tensor, pooling: Pooling, inputs: torch.Size) -> Self:
        """Return the coefficients of the inputs of a pooling layer, from those of its outputs.

        Args:
            factors: (B or 1, places in a window, *outputs); each output is the sum of the inputs in its window times
                these factors.
            pooling: Windows of the layer.
            inputs: Shape of its inputs without the batch.
        """

    @abstractmethod
    def add(self, other: Self) -> Self:
        """Return the coefficients of the sums of these and other functions at the same places."""

    @abstractmethod
    def split(self, dim: int, sizes: Sequence[int]) -> list[Self]:
        """Return the coefficients of parts of values (B, ...) with these sizes along a dimension."""

    @abstractmethod
    def dot(self, values: Tensor) -> Tensor:
        """Return the results of the functions, (B, functions at all places), for values (B or 1, *shape)."""

    def abs(self) -> Self:
        """Return the magnitudes of the coefficients."""
        return replace(self, a=self.a.abs())

    def positive(self) -> Self:
        """Return the positive coefficients, with zeros in place of the others."""
        return replace(self, a=self.a.clamp_min(0))

    def neg(self) -> Self:
        """Return the coefficients times -1."""
        return replace(self, a=-self.a)

    def clamp_negative(self) -> Self:
        """Return the negative coefficients, with zeros in place of the others."""
        return replace(self, a=self.a.clamp_max(0))

    def scale(self, factors: Tensor) -> Self:
        """Return the coefficients times factors (B or 1, *shape), one per value."""
        return replace(self, a=self.a * self.gather(factors))


@dataclass(frozen=True)
class DenseCoefficients(Coefficients):
    """Coefficients of functions of all values: `a` is (B or 1, R, *shape)."""

    @staticmethod
    def identity(shape: torch.Size, indices: Tensor, like: Tensor) -> "DenseCoefficients":
        """Return the functions that select the values at these flat indices of (*shape)."""
        units = like.new_zeros(1, len(indices), shape.numel())
        units[0, torch.arange(len(indices), device=indices.device), indices] = 1
        return DenseCoefficients(units.unflatten(2, shape))

    def gather(self, values: Tensor) -> Tensor:
        """Return values (B or 1, 1, *shape)."""
        return values[:, None]

    def backward_through(self, affine: Affine, inputs: torch.Size) -> "DenseCoefficients":
        """Return the coefficients of the inputs of an affine layer, from those of its outputs."""
        result = affine.transpose(self.a.flatten(0, 1), affine.weight.to(self.a))
        return DenseCoefficients(result.unflatten(0, self.a.shape[:2]))

    def backward_through_pooling(self, factors: Tensor, pooling: Pooling, inputs: torch.Size) -> "DenseCoefficients":
        """Return the coefficients of the inputs of a pooling layer, from those of its outputs."""
        a = _add_windows((self.a * factor[:, None] for factor in factors.unbind(1)), pooling)
        edges = []
        for start, length, end in zip(pooling.window.padding[::-1], inputs[:0:-1], a.shape[:-3:-1], strict=True):
            edges += [-start, length + start - end]
        return DenseCoefficients(functional.pad(a, edges))

    def add(self, other: "DenseCoefficients") -> "DenseCoefficients":
        """Return the coefficients of the sums of functions."""
        return DenseCoefficients(self.a + other.a)

    def split(self, dim: int, sizes: Sequence[int]) -> "list[DenseCoefficients]":
        """Return the coefficients of parts of values (B, ...) with these sizes along a dimension."""
        return [DenseCoefficients(part) for part in self.a.split(list(sizes), dim=dim + 1)]

    def dot(self, values: Tensor) -> Tensor:
        """Return the results of the functions, (B, R), for values (B or 1, *shape)."""
        a, values = self.a.flatten(2), values.flatten(1)
        if len(a) == 1:
            return functional.linear(values, a[0])
        return torch.matmul(a, values[:, :, None])[:, :, 0]


@dataclass(frozen=True)
class PatchCoefficients(Coefficients):
    """Coefficients of functions of windows: `a` is (B or 1, P or 1, R, C, h, w) at P output positions.

    The window of position (i, j) begins at (i, j) * stride - padding. Its part beyond the edges has no values.

    Attributes:
        size: Height and width of the output map.
        positions: Selected output positions, flattened.
        stride: Distance between neighboring windows.
        padding: Distance from the start of the first window to the edge.
        padding_is_zero: True if coefficients beyond the edges are zero.
    """

    size: Pair
    positions: slice
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    padding_is_zero: bool = True

    @staticmethod
    def identity(shape: torch.Size, positions: slice, like: Tensor) -> "PatchCoefficients":
        """Return the functions that select the channels of a map (C, H, W) at these positions."""
        units = torch.eye(shape[0], dtype=like.dtype, device=like.device).view(1, 1, shape[0], shape[0], 1, 1)
        return PatchCoefficients(units, tuple(shape[1:]), positions)

    def gather(self, values: Tensor) -> Tensor:
        """Return the windows (B or 1, P, 1, C, h, w) of values, zero beyond the edges."""
        kernel, edges = self.a.shape[-2:], []
        for n, k, step, start, length in zip(
            self.size[::-1], kernel[::-1], self.stride[::-1], self.padding[::-1], values.shape[:-3:-1], strict=True
        ):
            edges += [start, (n - 1) * step + k - start - length]
        padded = functional.pad(values, edges)  # reach to the last window; negative edges crop
        windows = padded.unfold(2, kernel[0], self.stride[0]).unfold(3, kernel[1], self.stride[1])
        return windows.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)[:, self.positions, None]

    def backward_through(self, affine: Affine, inputs: torch.Size) -> "PatchCoefficients":
        """Return the coefficients of the inputs of an affine layer, from those of its outputs."""
        window = affine.window
        if window is None:
            assert affine.elementwise
            if affine.weight.shape[-2:].numel() > 1:  # weights differ between positions
                return self.scale(affine.weight.to(self.a).expand(inputs)[None])
            return replace(self, a=self.a * affine.weight.to(self.a))
        a = self.a if self.padding_is_zero else self.a * self.gather(self.a.new_ones(1, 1, *window.outputs))
        kernel = window.receptive_field(a.shape[-2:], affine.weight.shape[2:])
        patch_shape = (inputs[0], *kernel)
        weight, places, window_shape = affine.weight.to(a), a.shape[:3], a.shape[3:]

        def transpose(x: Tensor) -> Tensor:
            return functional.conv_transpose2d(x, weight, None, window.stride, 0, 0, window.groups, window.dilation)

        if (
            window_shape.numel() * math.prod(patch_shape) <= MAX_MATRIX_ELEMENTS
            and math.prod(places) > window_shape.numel()
        ):
            # For many small windows, one matrix product is several times as fast.
            units = torch.eye(window_shape.numel(), dtype=a.dtype, device=a.device).unflatten(1, window_shape)
            a = (a.flatten(0, 2).flatten(1) @ transpose(units).flatten(1)).unflatten(1, patch_shape)
        else:
            a = transpose(a.flatten(0, 2))
        return PatchCoefficients(
            a.unflatten(0, places),
            self.size,
            self.positions,
            tuple(step * factor for step, factor in zip(self.stride, window.stride, strict=True)),
            tuple(
                p * factor + offset
                for p, factor, offset in zip(self.padding, window.stride, window.padding, strict=True)
            ),
            padding_is_zero=False,
        )

    def backward_through_pooling(self, factors: Tensor, pooling: Pooling, inputs: torch.Size) -> "PatchCoefficients":
        """Return the coefficients of the inputs of a pooling layer, from those of its outputs."""
        window = pooling.window
        return replace(
            self,
            a=_add_windows((self.scale(factor).a for factor in factors.unbind(1)), pooling),
            stride=tuple(step * scale for step, scale in zip(self.stride, window.stride, strict=True)),
            padding=tuple(
                p * scale + offset for p, scale, offset in zip(self.padding, window.stride, window.padding, strict=True)
            ),
            padding_is_zero=False,
        )

    def scale(self, factors: Tensor) -> "PatchCoefficients":
        """Return the coefficients times factors (B or 1, *shape), one per value; zero beyond the edges."""
        return replace(super().scale(factors), padding_is_zero=True)

    def add(self, other: "PatchCoefficients") -> "PatchCoefficients":
        """Return the coefficients of the sums of functions."""
        if self.stride != other.stride:
            raise ValueError(f"windows with strides {self.stride} and {other.stride} lie at different places")
        padding = tuple(map(max, self.padding, other.padding))
        ends = [
            tuple(k - p for k, p in zip(one.a.shape[-2:], one.padding, strict=True)) for one in (self, other)
        ]  # distance from each window's position to its end
        end = tuple(map(max, *ends))
        a, b = (
            functional.pad(one.a, _edges(one.padding, padding, reach, end))
            for one, reach in zip((self, other), ends, strict=True)
        )
        return replace(self, a=a + b, padding=padding, padding_is_zero=self.padding_is_zero and other.padding_is_zero)

    def split(self, dim: int, sizes: Sequence[int]) -> "list[PatchCoefficients]":
        """Return the coefficients of parts of values (B, ...) with these sizes along a dimension."""
        return [replace(self, a=part) for part in self.a.split(list(sizes), dim=dim + 2)]  # C: dim 1 of values, 3 of a

    def dot(self, values: Tensor) -> Tensor:
        """Return the results of the functions, (B, P * R), for values (B or 1, *shape)."""
        a, windows = self.a.flatten(3), self.gather(values).flatten(3)[:, :, 0]  # (., ., R, K), (B, P, K)
        if a.shape[:2] == (1, 1):
            products = functional.linear(windows, a[0, 0])
        elif len(a) == 1:
            products = torch.matmul(a[0], windows.permute(1, 2, 0)).permute(2, 0, 1)
        else:
            products = torch.matmul(a, windows[..., None])[..., 0]
        return products.flatten(1)


def _edges(own_padding: Pair, padding: Pair, own_end: Pair, end: Pair) -> list[int]:
    """Return the widths for `functional.pad` that extend windows to a common padding and end."""
    return [width for d in (1, 0) for width in (padding[d] - own_padding[d], end[d] - own_end[d])]


def _add_windows(parts: Iterator[Tensor], pooling: Pooling) -> Tensor:
    """Return coefficients of the joint receptive field of windows, from one part (..., h, w) per place."""
    first = next(parts)
    part_size = first.shape[-2:]
    total = first.new_zeros(*first.shape[:-2], *pooling.window.receptive_field(part_size, pooling.size))
    for part, (row, column) in zip(chain([first], parts), pooling.places(part_size), strict=True):
        total[..., row, column] += part
    return total
