"""Search for an unsafe output, and proofs that there is none: attacks, bounds, and splits of inputs or neurons."""

import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from linflab.models.robustness.bounds.alpha_crown import tight_boxes
from linflab.models.robustness.bounds.boxes import Box, all_finite
from linflab.models.robustness.bounds.branch_and_bound import BranchAndBound
from linflab.models.robustness.bounds.coefficients import DenseCoefficients
from linflab.models.robustness.bounds.ibp import trace_and_check
from linflab.models.robustness.bounds.reduction import Reduction, ReductionTooLargeError
from linflab.models.robustness.bounds.rounding import strict_float32
from linflab.models.robustness.inputs import check_choice
from linflab.models.robustness.verification.output_bounds import OutputBound
from linflab.models.robustness.verification.properties import OutputSet, Region

Answer = Literal["unsat", "sat", "unknown", "timeout"]
MAX_SPLIT_INPUTS = 20  # input boxes of more dimensions are not split
BOXES_PER_BATCH = 256
MAX_PENDING_BOXES = 2**20  # memory limit of the search
ATTACK_STARTS, ATTACK_STEPS = 8, 40
SLOPE_STEPS, NEURON_STEPS = 30, 10  # optimization steps of slopes for the outputs and for the bounds of neurons
ROUNDING = 2.0**-50  # relative error of a sum with an offset


class Verdict(NamedTuple):
    """The answer to a property.

    Attributes:
        answer: `unsat` (proven), `sat` (a counterexample exists), `unknown`, or `timeout`.
        inputs: (D,) flattened float32 inputs of the counterexample; None if the answer is not `sat`.
        outputs: (K,) float32 outputs of the network for these inputs.
    """

    answer: Answer
    inputs: Tensor | None = None
    outputs: Tensor | None = None


@strict_float32()
def verify(
    network: nn.Module,
    regions: tuple[Region, ...],
    input_shape: tuple[int, ...],
    certifier: str = "auto",
    sound: bool = True,
    is_out_of_time: Callable[[], bool] = lambda: False,
) -> Verdict:
    """Decide whether inputs of some region have unsafe outputs.

    Each region is bounded and attacked. Then its box is split if it has at most 20 dimensions; otherwise, its neurons
    are (see `branch_and_bound`). A counterexample is always checked by a
    forward pass. The answer is `sat` if any region has a counterexample.

    Args:
        network: Network in evaluation mode, in float32, with outputs (B, K).
        regions: Regions of flattened inputs; without any, the answer is `unsat`.
        input_shape: Shape of an input of the network, without the batch.
        certifier: `auto` (the tighter of IBP and CROWN, and splits of neurons), `ibp`, `crown` or another registered
            `OutputBound`.
        sound: If True, `unsat` holds for outputs as computed in float32; if False, in real arithmetic.
        is_out_of_time: Function that is called between computations; the search ends when it returns True.

    Raises:
        TypeError: If a layer or operation of the network has no rule (the message names it), or the certifier does not
            support the network.
        ValueError: If the network is in training mode, or the certifier is not registered.
    """
    check_choice("certifier", certifier, tuple(OutputBound.registry))
    bound = OutputBound.registry[certifier](sound)
    verdicts: set[Answer] = set()
    for region in regions:
        if is_out_of_time():
            return Verdict("timeout")
        verdict = _RegionSearch(network, region, input_shape, bound, is_out_of_time).run()
        if verdict.answer in ("sat", "timeout"):
            return verdict
        verdicts.add(verdict.answer)
    return Verdict("unknown" if "unknown" in verdicts else "unsat")


class _RegionSearch:
    """Search of one region.

    Args:
        network: Network in evaluation mode, in float32, with outputs (B, K).
        region: Region of flattened inputs.
        input_shape: Shape of an input without the batch.
        bound: Lower bounds of linear functions of the outputs.
        is_out_of_time: Function that returns True when the search must end.
    """

    def __init__(
        self,
        network: nn.Module,
        region: Region,
        input_shape: tuple[int, ...],
        bound: OutputBound,
        is_out_of_time: Callable[[], bool],
    ) -> None:
        self.network, self.region, self.shape = network, region, input_shape
        self.bound, self.is_out_of_time = bound, is_out_of_time
        self.inner = region.inner_box()
        outer = region.outer_box()
        self.root = Box(outer.lower, outer.upper)
        self.traced = trace_and_check(network, self._reshape(self.root))
        self.functions = torch.cat([one.coefficients for one in region.unsafe])

    def run(self) -> Verdict:
        """Return the verdict on the region."""
        is_refuted = self._refute(self.root)[0]
        if bool(is_refuted.all()):
            return Verdict("unsat")
        for index in (~is_refuted).nonzero().flatten().tolist():
            if self.is_out_of_time():
                return Verdict("timeout")
            for points in self._attack(self.region.unsafe[index]):
                if (verdict := self._check(points)) is not None:
                    return verdict
        if self.root.lower.shape[1] <= MAX_SPLIT_INPUTS:
            return self._split_until_decided()
        verdict = Verdict("unknown")
        if self.bound.splits_neurons and not self.is_out_of_time():
            is_open = (~is_refuted).tolist()
            verdict = self._split_neurons(
                [one for one, open_ in zip(self.region.unsafe, is_open, strict=True) if open_]
            )
        if verdict.answer == "unknown" and self.is_out_of_time():
            return Verdict("timeout")
        return verdict

    @torch.no_grad()
    def _split_neurons(self, unsafe: list[OutputSet]) -> Verdict:
        """Return the verdict of branch and bound on neurons.

        It proves that one function is positive everywhere, which a set of several rows does not require.

        Args:
            unsafe: Sets that no bound has refuted.
        """
        boxes = tight_boxes(self.traced, self._reshape(self.root), self.bound.sound)
        if any(len(one.offsets) > 1 for one in unsafe) or not bool(all_finite(boxes)):
            return Verdict("unknown")
        try:
            reduction = Reduction(self.traced, boxes, self.bound.sound, NEURON_STEPS, True, self.is_out_of_time)
        except ReductionTooLargeError:
            return Verdict("unknown")
        if reduction.sources != [self.traced.input]:  # some layer is no maximum and has no linear relaxation
            return Verdict("unknown")
        coefficients = torch.cat([one.coefficients for one in unsafe])[None].to(reduction.dtype)
        rows = reduction.rows(self.traced.output, DenseCoefficients(coefficients))
        offsets = torch.cat([one.offsets for one in unsafe]).to(rows.constant)
        constant = rows.constant + offsets
        rows = rows._replace(constant=constant - ROUNDING * (rows.constant.abs() + offsets.abs()))
        found: list[Verdict] = []

        def is_counterexample(points: Tensor) -> Tensor:
            is_found = torch.zeros(len(points), dtype=torch.bool, device=points.device)
            if not found and (verdict := self._check(points.to(self.inner.lower))) is not None:
                found.append(verdict)
                is_found[0] = True  # the search ends, whichever point it is
            return is_found

        search = BranchAndBound(reduction.network, rows, is_counterexample, BOXES_PER_BATCH)
        result = search.run(SLOPE_STEPS, math.inf, self.is_out_of_time)
        if found:
            return found[0]
        return Verdict("unsat" if result.status == "certified" else "unknown")

    def _reshape(self, box: Box) -> Box:
        return Box(*(bound.unflatten(1, self.shape) for bound in box))

    @torch.no_grad()
    def _refute(self, box: Box) -> Tensor:
        """Return which unsafe sets (B, sets) are proven to be out of reach from boxes (B, D)."""
        lower = self.bound.lower(self.traced, self._reshape(box), self.functions)
        rows = lower.split([len(one.coefficients) for one in self.region.unsafe], dim=1)
        return torch.stack([one.is_refuted(part) for one, part in zip(self.region.unsafe, rows, strict=True)], dim=1)

    @torch.no_grad()
    def _check(self, points: Tensor) -> Verdict | None:
        """Return the verdict of the first of the points (B, D) with an unsafe output, if there is one.

        Each candidate is computed by itself, since outputs may depend on the batch size by rounding.
        """
        points = torch.minimum(torch.maximum(points.detach(), self.inner.lower), self.inner.upper)
        outputs = self.network(points.unflatten(1, self.shape))
        is_unsafe = torch.stack([one.contains(outputs) for one in self.region.unsafe]).any(dim=0)
        for point in points[is_unsafe]:
            output = self.network(point[None].unflatten(1, self.shape))
            if any(bool(one.contains(output)) for one in self.region.unsafe):
                return Verdict("sat", point, output[0])
        return None

    def _attack(self, unsafe: OutputSet) -> Iterator[Tensor]:
        """Yield points (B, D): corners, and points of a descent of the violation by gradient signs."""
        lower, upper = self.inner
        generator = torch.Generator().manual_seed(0)
        fractions = torch.rand(ATTACK_STARTS, lower.shape[1], generator=generator)
        fractions[0] = 0.5
        fractions[ATTACK_STARTS // 2 :] = fractions[ATTACK_STARTS // 2 :].round()
        points, width = torch.lerp(lower, upper, fractions), upper - lower
        yield points
        yield torch.where(self._gradient(points, unsafe) > 0, lower, upper)
        for step in range(ATTACK_STEPS):
            if self.is_out_of_time():
                return
            size = 0.25 * width * (1 - step / ATTACK_STEPS)
            points = points - size * self._gradient(points, unsafe).sign()
            points = torch.minimum(torch.maximum(points, lower), upper)
            yield points

    def _gradient(self, points: Tensor, unsafe: OutputSet) -> Tensor:
        """Return the gradients (B, D) of the violations at points (B, D)."""
        with torch.enable_grad():
            leaf = points.detach().clone().requires_grad_()
            violations = unsafe.violations(self.network(leaf.unflatten(1, self.shape)))
            (gradient,) = torch.autograd.grad(violations.sum(), leaf)
        return gradient.nan_to_num()

    def _split_until_decided(self) -> Verdict:
        """Return the verdict after splitting boxes that the bounds do not decide; newer boxes come first."""
        pending, is_unknown = self.root, False
        while len(pending.lower):
            if self.is_out_of_time():
                return Verdict("timeout")
            if len(pending.lower) > MAX_PENDING_BOXES:
                return Verdict("unknown")
            box = Box(*(bound[-BOXES_PER_BATCH:] for bound in pending))
            rest = Box(*(bound[:-BOXES_PER_BATCH] for bound in pending))
            is_refuted = self._refute(box)
            is_open = ~is_refuted.all(dim=1)
            box, is_refuted = Box(box.lower[is_open], box.upper[is_open]), is_refuted[is_open]
            if len(box.lower):
                middle = torch.lerp(box.lower, box.upper, 0.5)
                if (verdict := self._check(middle)) is not None:
                    return verdict
                box, is_whole = self._halve(box, middle, is_refuted)
                is_unknown = is_unknown or is_whole
            pending = Box(*(torch.cat(pair) for pair in zip(rest, box, strict=True)))
        return Verdict("unknown" if is_unknown else "unsat")

    def _halve(self, box: Box, middle: Tensor, is_refuted: Tensor) -> tuple[Box, bool]:
        """Return the halves of boxes (B, D), and whether some box cannot be divided.

        A box is divided along the dimension whose width changes the violation most, by the gradient at its center. The
        widths relative to the region decide where gradients vanish.
        """
        is_divisible = (box.lower < middle) & (middle < box.upper)
        whole = ~is_divisible.any(dim=1)
        if bool(whole.any()):
            box, middle, is_refuted = Box(box.lower[~whole], box.upper[~whole]), middle[~whole], is_refuted[~whole]
            is_divisible = is_divisible[~whole]
        if not len(middle):
            return box, True
        width = box.upper - box.lower
        change = torch.zeros_like(width)
        for index, unsafe in enumerate(self.region.unsafe):
            gradient = self._gradient(middle, unsafe).abs() * width
            change = torch.maximum(change, torch.where(is_refuted[:, index, None], 0.0, gradient))
        change = change / change.amax(dim=1, keepdim=True).clamp_min(torch.finfo(change.dtype).tiny)
        share = width / (self.root.upper - self.root.lower).clamp_min(torch.finfo(width.dtype).tiny)
        score = (change + 0.1 * share).masked_fill(~is_divisible, -1.0)
        chosen = nn.functional.one_hot(score.argmax(dim=1), width.shape[1]).bool()
        lower = torch.cat([box.lower, torch.where(chosen, middle, box.lower)])
        upper = torch.cat([torch.where(chosen, middle, box.upper), box.upper])
        return Box(lower, upper), bool(whole.any())
