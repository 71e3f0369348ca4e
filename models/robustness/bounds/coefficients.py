"""Coefficients of linear functions of a layer's values, on their way back through the layers.

`Rows` have a coefficient for every value. A convolution's outputs look at few of its inputs, so `Windows` hold, for
every position of a map, the coefficients of the window that its functions look at: what is left of a dense row is
zero. For the outputs of a second convolution on images of 28 x 28 that is a hundredth of the work.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

from linflab.models.robustness.bounds.affine import Affine

Pair = tuple[int, ...]
LARGEST_MATRIX = 2**17  # numbers in the matrix that a convolution is of small windows


@dataclass(frozen=True)
class Coefficients(ABC):
    """Of R linear functions at each place; `a` (..., R, *seen), where the places (...) are samples, or positions too.

    A dimension of size 1 among the places stands for all samples or positions.
    """

    a: Tensor

    @abstractmethod
    def seen(self, values: Tensor) -> Tensor:
        """Values (B or 1, *shape) as the functions see them: broadcasts against `a`; zero beyond the edges."""

    @abstractmethod
    def through(self, affine: Affine, inputs: torch.Size) -> Self:
        """The coefficients of the inputs (*inputs) of a layer whose outputs have these."""

    @abstractmethod
    def plus(self, other: Self) -> Self:
        """Those of the sums of these functions and others at the same places."""

    @abstractmethod
    def split(self, dim: int, sizes: Sequence[int]) -> list[Self]:
        """The coefficients of parts of values (B, ...), of these sizes along a dimension."""

    @abstractmethod
    def dot(self, values: Tensor) -> Tensor:
        """What the functions come to: the sums of coefficients times values, (B, functions at all places)."""

    def abs(self) -> Self:
        return replace(self, a=self.a.abs())

    def negated(self) -> Self:
        return replace(self, a=-self.a)

    def negative(self) -> Self:
        """Negative coefficients; zero in place of the others."""
        return replace(self, a=self.a.clamp_max(0))

    def times(self, factors: Tensor) -> Self:
        """Coefficients times factors (B or 1, *shape), one for each value."""
        return replace(self, a=self.a * self.seen(factors))


@dataclass(frozen=True)
class Rows(Coefficients):
    """Functions of all values: `a` (B or 1, R, *shape)."""

    @staticmethod
    def units(shape: torch.Size, chosen: Tensor, like: Tensor) -> "Rows":
        """The values at these places of (*shape), themselves."""
        units = like.new_zeros(1, len(chosen), shape.numel())
        units[0, torch.arange(len(chosen)), chosen] = 1
        return Rows(units.unflatten(2, shape))

    def seen(self, values: Tensor) -> Tensor:
        return values[:, None]

    def through(self, affine: Affine, inputs: torch.Size) -> "Rows":
        before = affine.transpose(self.a.flatten(0, 1), affine.weight.to(self.a))
        return Rows(before.unflatten(0, self.a.shape[:2]))

    def plus(self, other: "Rows") -> "Rows":
        return Rows(self.a + other.a)

    def split(self, dim: int, sizes: Sequence[int]) -> "list[Rows]":
        return [Rows(part) for part in self.a.split(list(sizes), dim=dim + 1)]

    def dot(self, values: Tensor) -> Tensor:
        a, values = self.a.flatten(2), values.flatten(1)
        if len(a) == 1:
            return functional.linear(values, a[0])
        return torch.matmul(a, values[:, :, None])[:, :, 0]


@dataclass(frozen=True)
class Windows(Coefficients):
    """Functions of windows of an image or map: `a` (B or 1, P or 1, R, C, h, w), for P positions of an output map.

    The window of the position (i, j) begins at (i, j) * stride - padding; what of it is beyond the edges is no value.

    Attributes:
        size: of the output map.
        positions: which of its positions, flattened.
        stride: from one window to the next.
        padding: how far the first window begins before the edge.
        inside: coefficients beyond the edges are zero.
    """

    size: Pair
    positions: slice
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    inside: bool = True

    @staticmethod
    def units(shape: torch.Size, positions: slice, like: Tensor) -> "Windows":
        """The channels (C) of a map (C, H, W) at these positions, themselves."""
        units = torch.eye(shape[0], dtype=like.dtype, device=like.device).view(1, 1, shape[0], shape[0], 1, 1)
        return Windows(units, tuple(shape[1:]), positions)

    def seen(self, values: Tensor) -> Tensor:
        kernel, edges = self.a.shape[-2:], []
        for n, k, step, before, length in zip(
            self.size[::-1], kernel[::-1], self.stride[::-1], self.padding[::-1], values.shape[:-3:-1], strict=True
        ):
            edges += [before, (n - 1) * step + k - before - length]
        padded = functional.pad(values, edges)  # to the last window exactly; a negative number cuts
        windows = padded.unfold(2, kernel[0], self.stride[0]).unfold(3, kernel[1], self.stride[1])
        return windows.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)[:, self.positions, None]

    def through(self, affine: Affine, inputs: torch.Size) -> "Windows":
        window = affine.window
        if window is None:
            assert affine.elementwise  # one factor for each channel
            return replace(self, a=self.a * affine.weight.to(self.a))
        a = self.a if self.inside else self.a * self.seen(self.a.new_ones(1, 1, *window.outputs))
        kernel = window.reach(a.shape[-2:], affine.weight.shape[2:])
        before = (inputs[0], *kernel)
        weight, places, seen = affine.weight.to(a), a.shape[:3], a.shape[3:]

        def passed(x: Tensor) -> Tensor:
            return functional.conv_transpose2d(x, weight, None, window.stride, 0, 0, window.groups, window.dilation)

        if seen.numel() * math.prod(before) <= LARGEST_MATRIX and math.prod(places) > seen.numel():
            # of windows that are small and many, one matrix product is several times as fast
            units = torch.eye(seen.numel(), dtype=a.dtype, device=a.device).unflatten(1, seen)
            a = (a.flatten(0, 2).flatten(1) @ passed(units).flatten(1)).unflatten(1, before)
        else:
            a = passed(a.flatten(0, 2))
        return Windows(
            a.unflatten(0, places),
            self.size,
            self.positions,
            tuple(step * by for step, by in zip(self.stride, window.stride, strict=True)),
            tuple(p * by + more for p, by, more in zip(self.padding, window.stride, window.padding, strict=True)),
            inside=False,
        )

    def times(self, factors: Tensor) -> "Windows":
        return replace(super().times(factors), inside=True)

    def plus(self, other: "Windows") -> "Windows":
        padding = tuple(map(max, self.padding, other.padding))
        ends = [
            tuple(k - p for k, p in zip(one.a.shape[-2:], one.padding, strict=True)) for one in (self, other)
        ]  # how far each window reaches from where its position is
        end = tuple(map(max, *ends))
        a, b = (
            functional.pad(one.a, _edges(one.padding, padding, reach, end))
            for one, reach in zip((self, other), ends, strict=True)
        )
        return replace(self, a=a + b, padding=padding, inside=self.inside and other.inside)

    def split(self, dim: int, sizes: Sequence[int]) -> "list[Windows]":
        return [replace(self, a=part) for part in self.a.split(list(sizes), dim=dim + 2)]  # of channels

    def dot(self, values: Tensor) -> Tensor:
        a, seen = self.a.flatten(3), self.seen(values).flatten(3)[:, :, 0]  # (., ., R, K), (B, P, K)
        if a.shape[:2] == (1, 1):
            found = functional.linear(seen, a[0, 0])
        elif len(a) == 1:
            found = torch.matmul(a[0], seen.permute(1, 2, 0)).permute(2, 0, 1)
        else:
            found = torch.matmul(a, seen[..., None])[..., 0]
        return found.flatten(1)


def _edges(before: Pair, padding: Pair, reach: Pair, end: Pair) -> list[int]:
    """What `functional.pad` adds to windows of this padding and reach, for windows of those."""
    return [more for d in (1, 0) for more in (padding[d] - before[d], end[d] - reach[d])]
