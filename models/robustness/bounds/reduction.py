"""Reduction of a traced network over boxes of inputs (see `reduced`), with optimized bounds of its neurons.

Layer after layer, the neurons whose box allows a nonlinear part get rows: linear functions of the inputs and of earlier
nonlinear neurons. The rows are bounded from below and above with slopes that are optimized for each row separately, as
in Xu et al., ICLR 2021. Neurons that become linear over the improved box are eliminated.

Values that a layer without a linear relaxation computes, such as SortNet's, are inputs of the reduced network, besides
the images.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from linflab.models.robustness.bounds.affine import affine_map
from linflab.models.robustness.bounds.backward_steps import BackwardPropagation, cast_box, round_outward
from linflab.models.robustness.bounds.boxes import Box, max_magnitude
from linflab.models.robustness.bounds.coefficients import DenseCoefficients
from linflab.models.robustness.bounds.ibp import propagate_step
from linflab.models.robustness.bounds.linear_bounds import MAX_COEFFICIENTS
from linflab.models.robustness.bounds.max_pieces import Pieces, max_pieces
from linflab.models.robustness.bounds.reduced import ReducedNetwork
from linflab.models.robustness.bounds.reduced_levels import MaxLevel, RangeLevel, Rows
from linflab.models.robustness.bounds.relaxations import has_relaxation
from linflab.models.robustness.bounds.rounding import UNDERFLOW_SLACK, gamma, unit_roundoff
from linflab.models.robustness.bounds.steps import VIEW_LAYERS, Add, Concat, Masking, Trace, TraceStep

MAX_ROWS_SIZE = 2**27  # memory limit: coefficients in float64 of the rows of one layer, 1 GiB


class ReductionTooLargeError(Exception):
    """The reduced network would need too much memory."""


class Reduction(BackwardPropagation):
    """A network, reduced over boxes of inputs.

    Args:
        traced: Steps of the network.
        boxes: Boxes (B, *shape) of its values, by name, which are refined.
        sound: If True, bound values as computed in float32, rounding included.
        steps: Number of optimization steps for the bounds of neurons.
        split_distances: If True, distances are maxima of pieces; if False, their boxes are inputs.
        is_over: Function that returns True when bounds of neurons must no longer be optimized; None if the sources may
            be boxes of values, otherwise nothing is reduced unless the only source is the input of the network.

    Attributes:
        network: Reduced network.
        sources: Names of values that are inputs of the reduced network.

    Raises:
        ReductionTooLargeError: If the rows of a layer exceed the memory limit.
    """

    def __init__(
        self,
        traced: Trace,
        boxes: dict[str, Box],
        sound: bool,
        steps: int,
        split_distances: bool,
        is_over: Callable[[], bool] | None = None,
    ) -> None:
        super().__init__(traced, dict(boxes), sound, torch.float64)
        self.steps, self._is_over = steps, is_over
        self._passes: dict[str, Tensor] = {}
        self._winners: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self._levels: dict[str, int] = {}
        self._pieces: dict[str, Pieces] = {}
        self.sources, needed = self._find_sources(traced, split_distances)
        self.sources.sort(key=self.order.index)
        if is_over is not None and self.sources != [traced.input]:
            return
        ends = [cast_box(self.dtype, self.boxes[name]) for name in self.sources]
        box = Box(*(torch.cat([end.flatten(1) for end in corner], dim=1) for corner in zip(*ends, strict=True)))
        self.network = ReducedNetwork(box, sound)
        for step in traced.steps:
            if step.output in needed and step.output not in self.sources:
                if has_relaxation(step.layer, sound):
                    self._add_range_level(step)
                elif step.output in self._pieces:
                    self._add_max_level(step, self._pieces[step.output])
            self._intersect(step.output, propagate_step(step, self.boxes, sound))

    def rows(self, name: str, functions: DenseCoefficients) -> Rows:
        """Return linear functions (B, R) of a value as functions of the inputs and of the levels so far."""
        parts = functions.a.split(self._chunk_size(len(functions.a)), dim=1)
        return _concatenate([self._rows(name, DenseCoefficients(part)) for part in parts])

    def _rows_of_elements(self, name: str, index: Tensor, sign: Tensor) -> Rows:
        """Return the elements of a value at flat indices (B, R), times signs, which are zero at padding."""
        self._check_size(index.numel())
        chunk = self._chunk_size(len(index))
        parts = zip(index.split(chunk, dim=1), sign.to(self.dtype).split(chunk, dim=1), strict=True)
        return _concatenate([self._rows(name, _units(self._shape(name), *part)) for part in parts])

    def _chunk_size(self, batch: int) -> int:
        size = max(box.lower[0].numel() for box in self.boxes.values())
        return max(1, MAX_COEFFICIENTS // (size * batch))

    def _check_size(self, count: int) -> None:
        """Check the memory of `count` linear functions of the inputs and of the levels so far."""
        width = self.network.center.shape[1] + sum(level.size for level in self.network.levels)
        if count * width > MAX_ROWS_SIZE:
            raise ReductionTooLargeError(f"{count} functions of {width} values exceed the memory limit")

    def logit_difference_rows(self, labels: Tensor) -> tuple[Rows, Tensor]:
        """Return z_y - z_j (B, K - 1) of the network's outputs z, and the classes j (B, K - 1)."""
        classes = self._shape(self.output)[0]
        others = (labels[:, None] + torch.arange(1, classes, device=labels.device)) % classes
        identity = torch.eye(classes, dtype=self.dtype, device=labels.device)
        return self.rows(self.output, DenseCoefficients(identity[labels][:, None] - identity[others])), others

    def _find_sources(self, traced: Trace, split_distances: bool) -> tuple[list[str], set[str]]:
        """Return the inputs of the reduced network, and all values that depend on them."""
        needed, sources = {traced.output}, [traced.input]
        for step in reversed(traced.steps):
            if step.output not in needed:
                continue
            shape = self._shape(step.inputs[0])
            pieces = max_pieces(step.layer, shape)
            if pieces is not None and (split_distances or not pieces.is_rounded):
                self._pieces[step.output] = pieces.to(self.boxes[step.output].lower.device)
            elif not (
                has_relaxation(step.layer, self.sound)
                or isinstance(step.layer, (*VIEW_LAYERS, Add, Concat, Masking))
                or affine_map(step.layer, shape) is not None
            ):
                sources.append(step.output)
                continue
            needed.update(step.inputs)
        return [name for name in sources if name in needed or name == traced.input], needed

    def _error(self, name: str) -> Tensor:
        """Return the error bound of a value; distances, whose pieces are rounded, are maxima of rounded values."""
        error = super()._error(name)
        if self.sound and name in self._pieces and self._pieces[name].is_rounded:
            error = error + 2 * unit_roundoff(torch.float32) * max_magnitude(cast_box(self.dtype, self.boxes[name]))
        return error

    def _rows(self, name: str, functions: DenseCoefficients) -> Rows:
        batch, count = len(self.network.center), functions.a.shape[1]
        pending = {name: DenseCoefficients(functions.a.expand(batch, *functions.a.shape[1:]))}
        constant = functions.a.new_zeros(batch, count)
        error = torch.zeros_like(constant)
        inputs: dict[str, Tensor] = {}
        outputs = [constant.new_zeros(batch, count, level.size) for level in self.network.levels]

        def add(a: DenseCoefficients, center: Tensor) -> None:
            nonlocal constant, error
            constant = constant + a.dot(center)
            if self.sound:
                share = 2 * gamma(center[0].numel() + 4 * len(self.order) + 8, self.dtype)
                error = error + share * a.abs().dot(center.abs())

        for value in reversed(self.order):
            if value not in pending:
                continue
            a, step = pending.pop(value), self.producers.get(value)
            if self.sound:
                error = error + (1 + 1e-9) * a.abs().dot(self._error(value))
            if value in self.sources:
                inputs[value] = a.a.flatten(2)
                continue
            assert step is not None
            if value in self._levels:
                level = self.network.levels[self._levels[value]]
                places = level.index[:, None].expand(-1, count, -1)
                outputs[self._levels[value]] = a.a.flatten(2).gather(2, places) * level.is_used[:, None]
            if value in self._passes:
                parts = [a.scale(self._passes[value])]
            elif value in self._winners:
                parts = [self._pass_winners(step, a, add)]
            elif value in self._levels:
                continue
            else:
                linear = self._linear_step(step, a, add)
                assert linear is not None
                parts = [part for part in linear if isinstance(part, DenseCoefficients)]
            for input_name, part in zip(step.inputs, parts, strict=True):
                pending[input_name] = pending[input_name].add(part) if input_name in pending else part
        columns = [inputs.get(one, constant.new_zeros(batch, count, self._shape(one).numel())) for one in self.sources]
        return Rows(torch.cat(columns, dim=2), tuple(outputs), constant, error)

    def _pass_winners(self, step: TraceStep, a: DenseCoefficients, add: Callable[..., None]) -> DenseCoefficients:
        """Return the coefficients of the inputs that always attain their maximum."""
        index, sign, offset = self._winners[step.output]
        shape, flat = self._shape(step.inputs[0]), a.a.flatten(2)
        add(DenseCoefficients(flat), offset)
        result = flat.new_zeros(*flat.shape[:2], shape.numel())
        result.scatter_add_(2, index[:, None].expand_as(flat), flat * sign[:, None])
        return DenseCoefficients(result.unflatten(2, shape))

    def _add_range_level(self, step: TraceStep) -> None:
        name, is_relu = step.inputs[0], type(step.layer) is nn.ReLU
        shape = self._shape(name)
        box = cast_box(self.dtype, self.boxes[name])
        lower, upper = box.lower.flatten(1), box.upper.flatten(1)
        selected = (lower < 0) & (upper > 0) if is_relu else torch.ones_like(lower, dtype=torch.bool)
        index, is_used = _padded_indices(selected)
        if index.shape[1]:
            rows = self._rows_of_elements(name, index, is_used)
            range_ = self._optimized_range(rows, Box(lower.gather(1, index), upper.gather(1, index)), is_used)
            self._write(name, index, is_used, range_)
            box = cast_box(self.dtype, self.boxes[name])
            lower, upper = box.lower.flatten(1), box.upper.flatten(1)
            if is_relu:
                kept, is_kept = _padded_indices(is_used & (lower.gather(1, index) < 0) & (upper.gather(1, index) > 0))
                index, is_used, rows = index.gather(1, kept), is_kept, rows.select(kept)
            if index.shape[1]:
                used = [torch.where(is_used, end.gather(1, index), 0.0) for end in (lower, upper)]
                self._levels[step.output] = len(self.network.levels)
                self.network.append(
                    RangeLevel(
                        step.output, index, is_used, _zero_padding(rows, is_used), self.sound, step.layer, Box(*used)
                    )
                )
        if is_relu:
            self._passes[step.output] = (lower >= 0).to(self.dtype).unflatten(1, shape)

    def _add_max_level(self, step: TraceStep, pieces: Pieces) -> None:
        name = step.inputs[0]
        box = cast_box(self.dtype, self.boxes[name])
        lower, upper = self._piece_range(pieces, box.lower.flatten(1), box.upper.flatten(1))
        floor = lower.amax(dim=2, keepdim=True)
        candidates = upper >= floor
        is_open = candidates.sum(dim=2) > 1
        winner = upper.argmax(dim=2)
        index, sign, offset = (x.expand(len(lower), *x.shape).gather(2, winner[..., None])[..., 0] for x in pieces[:3])
        factor = pieces.orientation * ~is_open
        self._winners[step.output] = index.clamp_min(0), sign * factor, torch.where(is_open, 0.0, offset * factor)
        neurons, is_used = _padded_indices(is_open)
        if not neurons.shape[1]:
            return
        candidates = candidates.gather(1, neurons[..., None].expand(-1, -1, candidates.shape[2]))
        order, exists = _padded_indices((candidates & is_used[..., None]).flatten(0, 1))
        order, exists = (x.view(*neurons.shape, -1) for x in (order, exists))

        def pick(x: Tensor) -> Tensor:  # (N, P) or (B, N, P) to (B, used neurons, used pieces)
            x = x.expand(len(neurons), *x.shape) if x.dim() == 2 else x
            return x.gather(1, neurons[..., None].expand(-1, -1, x.shape[2])).gather(2, order)

        signs, offsets = pick(pieces.sign) * exists, torch.where(exists, pick(pieces.offset), 0.0)
        rows = self._rows_of_elements(name, pick(pieces.places).clamp_min(0).flatten(1), signs.flatten(1))
        range_ = Box(*(pick(end).masked_fill(~exists, 0.0) for end in (lower, upper)))
        error = rows.error
        if self.sound and pieces.is_rounded:
            size = torch.maximum(range_.lower.abs(), range_.upper.abs())
            error = error + 2 * unit_roundoff(torch.float32) * size.flatten(1) + UNDERFLOW_SLACK
        rows = Rows(rows.inputs, rows.outputs, rows.constant + offsets.flatten(1), error)
        ends = self._optimized_range(rows, Box(*(end.flatten(1) for end in range_)), exists.flatten(1))
        range_ = Box(*(end.view_as(exists).masked_fill(~exists, -torch.inf) for end in ends))
        self._levels[step.output] = len(self.network.levels)
        orientation = pieces.orientation[neurons]
        level = MaxLevel(
            step.output, neurons, is_used, _zero_padding(rows, exists.flatten(1)), self.sound, orientation, range_
        )
        self.network.append(level)

    def _piece_range(self, pieces: Pieces, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Return bounds (B, N, P) of pieces, as computed if `sound`."""
        index = pieces.places.clamp_min(0)
        low, high = lower[:, index], upper[:, index]
        positive = pieces.sign > 0
        zero = pieces.sign == 0
        low, high = torch.where(positive, low, -high), torch.where(positive, high, -low)
        low, high = torch.where(zero, 0.0, low) + pieces.offset, torch.where(zero, 0.0, high) + pieces.offset
        if self.sound and pieces.is_rounded:
            slack = 2 * unit_roundoff(torch.float32)
            low = low - slack * low.abs() - UNDERFLOW_SLACK
            high = high + slack * high.abs() + UNDERFLOW_SLACK
        return low, high

    def _optimized_range(self, rows: Rows, range_: Box, is_used: Tensor) -> Box:
        """Return the intersection of ranges (B, R) with optimized bounds of the rows."""
        network, count, depth = self.network, rows.constant.shape[1], len(self.network.levels)
        width = network.center.shape[1] + sum(level.rows.constant.shape[1] for level in network.levels)
        chunk = max(1, MAX_COEFFICIENTS // (4 * len(rows.constant) * width))
        found = []
        for functions in (rows, rows.negate()):
            parts = []
            for first in range(0, count, chunk):
                picked = torch.arange(first, min(first + chunk, count), device=is_used.device).expand(len(is_used), -1)
                params = network.start_params(depth, picked.shape[1])
                steps = 0 if self._is_over is not None and self._is_over() else self.steps
                parts.append(network.optimize(functions.select(picked), params, steps, target=None)[0])
            found.append(torch.cat(parts, dim=1))
        lower = torch.maximum(range_.lower, found[0])
        upper = torch.maximum(torch.minimum(range_.upper, -found[1]), lower)
        return Box(
            *(
                torch.where(is_used & lower.isfinite() & upper.isfinite(), *pair)
                for pair in zip((lower, upper), range_, strict=True)
            )
        )

    def _write(self, name: str, index: Tensor, is_used: Tensor, range_: Box) -> None:
        """Store the bounds of some elements of a value."""
        box = self.boxes[name]
        rounded, ends = round_outward(range_, box.lower.dtype), []
        for old, new in zip(box, rounded, strict=True):
            flat = old.flatten(1)
            width = flat.shape[1]
            target = torch.cat([flat, flat[:, :1]], dim=1)  # the last column takes padding
            target = target.scatter(1, torch.where(is_used, index, width), new)
            ends.append(target[:, :width].view_as(old))
        self._intersect(name, Box(*ends))

    def _intersect(self, name: str, box: Box) -> None:
        old = self.boxes[name]
        lower = torch.maximum(old.lower, box.lower)
        self.boxes[name] = Box(lower, torch.maximum(torch.minimum(old.upper, box.upper), lower))
        self.errors.pop(name, None)


def _padded_indices(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the indices (B, N) at which rows of a mask are True, and which of them are not padding."""
    counts = mask.sum(dim=1)
    largest = int(counts.max()) if len(counts) else 0
    index = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :largest]
    return index, torch.arange(largest, device=mask.device) < counts[:, None]


def _units(shape: torch.Size, index: Tensor, sign: Tensor) -> DenseCoefficients:
    """Return the functions (B, R) that select the values at flat indices, times signs."""
    units = torch.zeros(*index.shape, shape.numel(), dtype=sign.dtype, device=index.device)
    units.scatter_(2, index[..., None], sign[..., None])
    return DenseCoefficients(units.unflatten(2, shape))


def _concatenate(parts: list[Rows]) -> Rows:
    outputs = zip(*(part.outputs for part in parts), strict=True)
    return Rows(
        torch.cat([part.inputs for part in parts], dim=1),
        tuple(torch.cat(list(same), dim=1) for same in outputs),
        torch.cat([part.constant for part in parts], dim=1),
        torch.cat([part.error for part in parts], dim=1),
    )


def _zero_padding(rows: Rows, is_used: Tensor) -> Rows:
    """Return rows that are zero at padding."""
    used = is_used.to(rows.constant.dtype)
    outputs = tuple(part * used[..., None] for part in rows.outputs)
    return Rows(rows.inputs * used[..., None], outputs, rows.constant * used, rows.error * used)
