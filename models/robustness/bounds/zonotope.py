"""Zonotopes of a network's values over a box of inputs, without their generators.

A zonotope is the set of all c + sum_i e_i g_i with a center c, error terms (generators) g_i, and coefficients e_i in
[-1, 1]. Affine layers map it exactly. An activation is replaced by its linear relaxation with equal slopes (DeepZ), y =
slope x + offset + radius e, with a new coefficient e per value. Source: Singh et al., "Fast and Effective Robustness
Certification", NeurIPS 2018.

The generators of a convolutional network do not fit into memory. Two computations do without them:

- A point of the zonotope, for given coefficients, takes one forward pass (`ZonotopeEstimate.points`).
- The half-width sum_i |g_i| is estimated by random projections. For independent Cauchy numbers r_i, sum_i r_i g_i is
  Cauchy with the scale sum_i |g_i|, so the median of its magnitudes estimates this sum. The numbers r_i pass through
  the layers like coefficients. Source: Li et al., "Nonlinear Estimators and Tail Bounds for Dimension Reduction in l_1
  Using Cauchy Random Projections", JMLR 2007.

The relative standard error of n projections is about pi / (2 sqrt(n)). Relaxations over estimated bounds may therefore
exclude values that the network takes. They serve training only; certificates never use them.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from linflab.models.robustness.bounds.affine import affine_map
from linflab.models.robustness.bounds.boxes import Box
from linflab.models.robustness.bounds.relaxations import has_relaxation, relax
from linflab.models.robustness.bounds.rules import propagate_layer
from linflab.models.robustness.bounds.steps import VIEW_LAYERS, Add, Concat, Trace, TraceStep

MAX_DRAW = 1e10  # larger Cauchy numbers could overflow in float32


class ErrorTerms(NamedTuple):
    """Values slope x + offset + radius e, each with its own coefficient e in [-1, 1].

    Attributes:
        slope: (B, *shape) slopes; None if the values do not depend on x.
        offset: (B, *shape) offsets.
        radius: (B, *shape) nonnegative radii.
    """

    slope: Tensor | None
    offset: Tensor
    radius: Tensor


class ZonotopeEstimate:
    """Zonotopes of the values of a traced network, with estimated widths.

    A layer with neither an affine map nor a relaxation, such as max pooling, returns a box, whose values have new
    coefficients. Widths are exact up to the first linear or convolutional layer after a box, and estimated elsewhere.

    Args:
        traced: Steps of the network, in evaluation mode.
        box: Lower and upper bounds of inputs, (B, *shape).
        projections: Number of random projections.
        generator: Generator of the random projections, on the device of the box. All samples share the projections.

    Attributes:
        terms: Error terms of the inputs, of activations and of boxes, by the name of their value.
        centers: Centers of the zonotopes, by the name of the value.
    """

    def __init__(self, traced: Trace, box: Box, projections: int, generator: torch.Generator) -> None:
        self.traced, self.projections, self.generator = traced, projections, generator
        self.producers = {step.output: step for step in traced.steps}
        self.uses = [name for step in traced.steps for name in step.inputs]
        self.terms: dict[str, ErrorTerms] = {}
        self.centers: dict[str, Tensor] = {}
        self._exact_widths: dict[str, Tensor] = {}
        self._boxes: set[str] = set()
        self._draws: dict[str, Tensor] = {}
        self._noise: dict[str, Tensor] = {}
        self._add_box(traced.input, box)

    def propagate(self, steps: Sequence[TraceStep]) -> None:
        """Propagate the zonotopes through the next steps of the trace."""
        for step in steps:
            name, first = step.output, step.inputs[0]
            if has_relaxation(step.layer):
                lines = relax(step.layer, self.bounds(first), "parallel")
                assert lines is not None
                low, high = lines.lower_intercept, lines.upper_intercept
                self._add_terms(name, ErrorTerms(lines.upper_slope, (low + high) / 2, (high - low) / 2))
                self.centers[name] = lines.upper_slope * self.centers[first] + (low + high) / 2
            elif self._is_affine(step):
                self.centers[name] = step.layer(*(self.centers[one] for one in step.inputs))
                self._propagate_exact_width(step)
            else:
                self._add_box(name, propagate_layer(step.layer, self.bounds(first)))

    def bounds(self, name: str) -> Box:
        """Return lower and upper bounds (B, *shape) of a value; approximate where widths are estimated."""
        center, width = self.centers[name], self.width(name)
        return Box(center - width, center + width)

    def width(self, name: str) -> Tensor:
        """Return half-widths (B, *shape) of the zonotope of a value, exact or estimated."""
        if name in self._exact_widths:
            return self._exact_widths[name]
        return self._split(self._projected(name)).abs().median(dim=1).values

    def points(self, coefficients: Mapping[str, Tensor], steps: Sequence[TraceStep]) -> dict[str, Tensor]:
        """Return points (B, *shape) of the zonotopes of all values up to the end of these steps, by name.

        Args:
            coefficients: (B, *shape) coefficients in [-1, 1] of the error terms, by the name of their value.
            steps: First steps of the trace, already propagated.
        """
        values: dict[str, Tensor] = {}
        for name, step in [(self.traced.input, None), *((step.output, step) for step in steps)]:
            if name not in self.terms:
                assert step is not None
                values[name] = step.layer(*(values[one] for one in step.inputs))
                continue
            slope, offset, radius = self.terms[name]
            values[name] = offset + radius * coefficients[name]
            if slope is not None:
                assert step is not None
                values[name] = values[name] + slope * values[step.inputs[0]]
        return values

    def _add_terms(self, name: str, terms: ErrorTerms) -> None:
        self.terms[name] = terms
        draws = terms.radius.new_empty(self.projections, *terms.radius.shape[1:])
        self._draws[name] = draws.cauchy_(generator=self.generator).clamp_(-MAX_DRAW, MAX_DRAW)

    def _add_box(self, name: str, box: Box) -> None:
        self.centers[name], radius = (box.lower + box.upper) / 2, (box.upper - box.lower) / 2
        self._add_terms(name, ErrorTerms(None, self.centers[name], radius))
        self._exact_widths[name] = radius
        self._boxes.add(name)

    def _is_affine(self, step: TraceStep) -> bool:
        if isinstance(step.layer, (*VIEW_LAYERS, Add, Concat)):
            return True
        return affine_map(step.layer, self.centers[step.inputs[0]].shape[1:]) is not None

    def _propagate_exact_width(self, step: TraceStep) -> None:
        """Store the exact width of an affine layer's outputs if it follows from that of its inputs."""
        name, first = step.output, step.inputs[0]
        if len(step.inputs) > 1 or first not in self._exact_widths:
            return
        width = self._exact_widths[first]
        affine = None if isinstance(step.layer, VIEW_LAYERS) else affine_map(step.layer, width.shape[1:])
        is_elementwise = affine is None or affine.elementwise
        if is_elementwise or first in self._boxes:
            self._exact_widths[name] = (
                step.layer(width) if affine is None else affine.apply(width, affine.weight.abs().to(width))
            )
        if is_elementwise and first in self._boxes:
            self._boxes.add(name)

    def _split(self, noise: Tensor) -> Tensor:
        return noise.unflatten(0, (-1, self.projections))

    def _projected(self, name: str) -> Tensor:
        """Return random projections (B * projections, *shape) of a value's error terms.

        They are computed when they are first needed. Layers whose centers have no gradients get none here either.
        """
        if name in self._noise:
            return self._noise[name]
        terms, step = self.terms.get(name), self.producers.get(name)
        depends_on_inputs = terms is None or terms.slope is not None
        inputs = step.inputs if step is not None and depends_on_inputs else ()
        noise = [self._projected(one) for one in inputs]
        with torch.set_grad_enabled(self.centers[name].requires_grad):
            if terms is None:
                assert step is not None
                self._noise[name] = self._apply_linear(step, noise)
            else:
                total = terms.radius[:, None] * self._draws[name]
                if terms.slope is not None:
                    total = torch.addcmul(total, terms.slope[:, None], self._split(noise[0]))
                self._noise[name] = total.flatten(0, 1)
        for one in inputs:  # nothing else needs these large tensors
            if self.uses.count(one) == 1:
                del self._noise[one]
        return self._noise[name]

    def _apply_linear(self, step: TraceStep, noise: Sequence[Tensor]) -> Tensor:
        """Return the linear part of an affine layer, without its bias."""
        if isinstance(step.layer, (*VIEW_LAYERS, Add, Concat)):
            return step.layer(*noise)
        affine = affine_map(step.layer, noise[0].shape[1:])
        assert affine is not None
        return affine.apply(noise[0], affine.weight.to(noise[0]))
