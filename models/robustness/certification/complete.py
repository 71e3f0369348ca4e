"""Complete certifier: attacks, then branch and bound, decide each image or run out of time."""

import math
import time
from contextlib import nullcontext
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from linflab.models.robustness.attacks.linf_ball import LinfBall, linf_ball
from linflab.models.robustness.attacks.pgd import adversarial_images
from linflab.models.robustness.attacks.suite import default_attacks
from linflab.models.robustness.attacks.surrogate import surrogate_gradients
from linflab.models.robustness.bounds.alpha_crown import alpha_crown_margins, has_linear_bounds, tight_boxes
from linflab.models.robustness.bounds.backward_steps import check_sound_dtype
from linflab.models.robustness.bounds.boxes import Box, all_finite, ball_box, one_point
from linflab.models.robustness.bounds.branch_and_bound import BranchAndBound, SearchResult
from linflab.models.robustness.bounds.input_splitting import is_proven, is_undecided, margins_of_box, split_inputs
from linflab.models.robustness.bounds.reduction import Reduction, ReductionTooLargeError
from linflab.models.robustness.bounds.rounding import strict_float32
from linflab.models.robustness.bounds.steps import Trace
from linflab.models.robustness.certification.base import BISECTION_STEPS, CertifierSettings, TracingCertifier
from linflab.models.robustness.certification.crown import CROWNCertifier
from linflab.models.robustness.certification.ibp import IBPCertifier
from linflab.models.robustness.inputs import check_batch, check_eps, check_logits, compute_logits
from linflab.models.robustness.margins import margin

SURROGATE_P = 32.0
STEP_SHARE = 1 / 3  # of the remaining time for one step of the search for a radius
SHARE_WITHOUT_SPLITS = 1 / 2  # of the time limit for steps without splits
FIRST_RADIUS = 2.0**-8  # where the search starts if cheaper certifiers find no radius


class CompleteSettings(CertifierSettings):
    """Settings of the complete certifier."""

    time_limit: float = Field(
        30.0, gt=0, description="seconds per image; images without a decision by then are unknown; inf: none"
    )
    max_subproblems: int | None = Field(
        None, ge=0, description="number of subproblems per image, with the same effect on any machine; null: no limit"
    )
    batch_size: int = Field(256, ge=1, description="number of subproblems that are bounded at once")
    steps: int = Field(30, ge=0, description="optimization steps of the slopes before the first split")
    neuron_steps: int = Field(10, ge=0, description="optimization steps of the slopes for the bounds of neurons")
    attack_steps: int = Field(30, ge=1, description="gradient steps of the attack before branch and bound")
    attack_restarts: int = Field(4, ge=0, description="random starts per wrong class of that attack; 0: no attack")


class Decision(NamedTuple):
    """Decision about one image.

    Attributes:
        status: certified: all images within eps have the true class; falsified: one of them has not; unknown: no
            decision within the limits, or only rounding decides.
        adversarial: (C, H, W) or (D,) misclassified image within eps, if falsified.
        seconds: Duration.
        subproblems: Number of subproblems of branch and bound.
    """

    status: Literal["certified", "falsified", "unknown"]
    adversarial: Tensor | None
    seconds: float
    subproblems: int


class CompleteCertifier(TracingCertifier):
    """Certifier by branch and bound, with an attack first; decides each image unless its time runs out.

    Neurons are split (see `branch_and_bound`) if every layer is affine, an activation, or a maximum such as an l_inf
    distance. Networks with other layers, such as SortNet, or with too many neurons for memory are split at their inputs
    (see `input_splitting`).

    The time limit applies to each image. A certified radius is at least that of IBP and CROWN, whose time is not
    limited. If the limit suffices for its steps, it is also at least that of alpha-CROWN, up to the tolerance of the
    bisection; under a short limit it can be smaller.
    """

    kind: ClassVar[str] = "complete"
    settings_class: ClassVar[type[CertifierSettings]] = CompleteSettings
    settings: CompleteSettings

    @strict_float32()
    @torch.no_grad()
    def decide(self, image: Tensor, label: Tensor, eps: float, deadline: float | None = None) -> Decision:
        """Decide whether all images within eps of one image have the true class.

        Args:
            image: (1, C, H, W) or (1, D), pixel values in [0, 1].
            label: (1,) true class, of any integer dtype.
            eps: Radius of the l_inf ball, for pixel values in [0, 1].
            deadline: Time of `time.monotonic` by which to return; None: after the time limit. Steps that are under way
                are finished.

        Raises:
            TypeError: If a layer has no rule, or an argument has the wrong type or dtype; also if `sound` and the
                network is not in float32.
            ValueError: If the network is in training mode, or shapes, pixel values, label or eps are invalid.
        """
        label, eps = check_batch(self.network, image, label), check_eps(eps)
        if len(image) != 1:
            raise ValueError(f"images={tuple(image.shape)}: must be one image, (1, ...); use certify for several")
        deadline = self._deadline() if deadline is None else deadline
        return self._decide(image, label, eps, deadline, self.settings.max_subproblems)

    @strict_float32()
    @torch.no_grad()
    def find_adversarial(self, image: Tensor, label: Tensor, eps: float) -> Tensor | None:
        """Attack one image before branch and bound, and return a misclassified image within eps, or None.

        Args:
            image: (1, C, H, W) or (1, D), pixel values in [0, 1].
            label: (1,) true class, as int64.
            eps: Radius of the l_inf ball, for pixel values in [0, 1].
        """
        box = ball_box(image, eps)
        margins = self.bound_margins(self.trace_network(box), box, label)
        return self._attack(linf_ball(image, eps), label, margins)

    def bound_margins(self, traced: Trace, box: Box, labels: Tensor) -> Tensor:
        """Return upper bounds (B, K) of z_j - z_y without splits, the best of IBP and CROWN."""
        return margins_of_box(traced, box, labels, self.sound)

    def verify(self, box: Box, labels: Tensor) -> Tensor:
        """Return for which boxes (B,) all logit differences are proven negative."""
        if not len(labels):
            return super().verify(box, labels)
        results = []
        for k in range(len(labels)):
            part = Box(*(end[k : k + 1] for end in box))
            ball = LinfBall((part.lower + part.upper) / 2, *part)
            found = self._search(part, ball, labels[k : k + 1], self._deadline(), self.settings.max_subproblems)
            results.append(found.status == "certified")
        return torch.tensor(results, device=labels.device)

    def _certify(self, images: Tensor, labels: Tensor, eps: float) -> Tensor:
        if not len(images):
            return super()._certify(images, labels, eps)
        pairs = zip(images.split(1), labels.split(1), strict=True)
        limit = self.settings.max_subproblems
        statuses = [self._decide(image, label, eps, self._deadline(), limit).status for image, label in pairs]
        return torch.tensor([status == "certified" for status in statuses], device=images.device)

    def _compute_radius(self, images: Tensor, labels: Tensor) -> Tensor:
        radii = self._radii_without_splits(images, labels)
        for k in (radii >= 0).nonzero()[:, 0].tolist():
            one = slice(k, k + 1)
            radii[k] = self._extend_radius(images[one], labels[one], float(radii[k]))
        return radii

    def _radii_without_splits(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the larger radii (B,) of IBP and CROWN, or those of IBP for networks that CROWN does not support."""
        point = one_point(Box(images, images))
        check_sound_dtype(self.kind, self.sound, point)
        certifiers: list[TracingCertifier] = [IBPCertifier(self.network, self.sound)]
        if has_linear_bounds(self.trace_network(point)):
            certifiers.append(CROWNCertifier(self.network, self.sound))
        for certifier in certifiers:
            certifier.share_traces(self)
        return torch.stack([one.compute_radius(images, labels).double() for one in certifiers]).amax(dim=0)

    def _extend_radius(self, image: Tensor, label: Tensor, inside: float) -> float:
        """Return the largest certified radius that is found within the time limit, at least `inside`.

        Without splits, which is alpha-CROWN for ReLU networks, the radius is narrowed down first. Branch and bound then
        tries larger ones. A radius near the exact one can take all the time, so each step gets a share of what is left.
        """
        start, falsified = time.monotonic(), 1.0
        phases = [(self.settings.max_subproblems, start + self.settings.time_limit)]
        if self.settings.max_subproblems != 0:
            phases.insert(0, (0, start + self.settings.time_limit * SHARE_WITHOUT_SPLITS))
        for max_subproblems, deadline in phases:
            outside = falsified
            while outside - inside > 2.0**-BISECTION_STEPS:
                now = time.monotonic()
                if now >= deadline:
                    break
                # Larger boxes take longer, so the first steps do not start in the middle.
                middle = min((inside + outside) / 2, 2 * inside + FIRST_RADIUS)
                step_deadline = now + (deadline - now) * STEP_SHARE
                decision = self._decide(image, label, middle, step_deadline, max_subproblems)
                if decision.status == "certified":
                    inside = middle
                    continue
                outside = middle
                if decision.adversarial is not None:
                    distance = self._nearest_distance(image, label, decision.adversarial)
                    outside = falsified = max(min(outside, distance), inside)
        return inside

    def _nearest_distance(self, image: Tensor, label: Tensor, adversarial: Tensor) -> float:
        """Return the distance of a misclassified image on the segment to an adversarial image."""
        shares = torch.linspace(0, 1, 65, dtype=image.dtype, device=image.device).view(-1, *[1] * (image.dim() - 1))
        points = image + shares * (adversarial - image)
        is_wrong = ~(margin(compute_logits(self.network, points), label.expand(len(points))) > 0)
        distances = (points.double() - image.double()).abs().flatten(1).amax(dim=1)
        return float(distances[is_wrong].min()) if bool(is_wrong.any()) else math.inf

    def _deadline(self) -> float:
        return time.monotonic() + self.settings.time_limit

    def _decide(
        self, image: Tensor, label: Tensor, eps: float, deadline: float, max_subproblems: int | None
    ) -> Decision:
        start = time.monotonic()
        logits = compute_logits(self.network, image)
        check_logits(logits, label)
        ball, box = linf_ball(image, eps), ball_box(image, eps)
        is_finite = bool(logits.isfinite().all())
        if not is_finite or not bool(margin(logits, label) > 0):
            check_sound_dtype(self.kind, self.sound, box)
            self.trace_network(box)  # rejects unsupported networks, whichever the image
            seconds = time.monotonic() - start
            return Decision("falsified", image[0], seconds, 0) if is_finite else Decision("unknown", None, seconds, 0)
        found = self._search(box, ball, label, deadline, max_subproblems)
        adversarial = None if found.point is None else ball.project(found.point.view_as(image).to(image))[0]
        return Decision(found.status, adversarial, time.monotonic() - start, found.subproblems)

    def _search(
        self, box: Box, ball: LinfBall, label: Tensor, deadline: float, max_subproblems: int | None
    ) -> SearchResult:
        """Return the result for one box; counterexamples are points whose projection to the ball is misclassified."""
        check_sound_dtype(self.kind, self.sound, box)
        traced = self.trace_network(box)

        def is_counterexample(points: Tensor) -> Tensor:
            images = ball.project(points.to(box.lower).view(-1, *box.lower.shape[1:]))
            found = ~(margin(compute_logits(self.network, images), label.expand(len(images))) > 0)
            for k in found.nonzero()[:, 0]:  # alone, since rounding may differ
                found[k] = not bool(margin(compute_logits(self.network, images[k, None]), label) > 0)
            return found

        def is_over() -> bool:
            return time.monotonic() >= deadline

        margins = self.bound_margins(traced, box, label)
        if not bool(is_undecided(margins, label)):
            return SearchResult("certified", None, 0)
        adversarial = self._attack(ball, label, margins)
        if adversarial is not None:
            return SearchResult("falsified", adversarial, 0)
        if is_over():
            return SearchResult("unknown", None, 0)
        limit = math.inf if max_subproblems is None else max_subproblems
        boxes = tight_boxes(traced, box, self.sound)
        if not bool(all_finite(boxes)):
            return SearchResult("unknown", None, 0)
        try:
            reduction = Reduction(traced, boxes, self.sound, self.settings.neuron_steps, True, is_over)
        except ReductionTooLargeError:
            reduction = None
        if reduction is None or reduction.sources != [traced.input]:
            is_too_large = reduction is None  # then alpha-CROWN would fail in the same way
            if not is_too_large and not is_over() and self._is_proven_by_alpha_crown(traced, box, label):
                return SearchResult("certified", None, 0)
            batch_size = self.settings.batch_size
            return split_inputs(traced, box, label, self.sound, is_counterexample, batch_size, limit, is_over)
        functions, others = reduction.logit_difference_rows(label)
        is_open = ~is_proven(margins.gather(1, others))
        functions = functions.select(is_open[0].nonzero().T)
        search = BranchAndBound(reduction.network, functions, is_counterexample, self.settings.batch_size)
        return search.run(self.settings.steps, limit, is_over)

    def _is_proven_by_alpha_crown(self, traced: Trace, box: Box, label: Tensor) -> bool:
        """Return whether slopes optimized for the whole box decide it, since splits of inputs do not optimize any."""
        if not has_linear_bounds(traced):
            return False
        steps = self.settings.steps, self.settings.neuron_steps
        margins = alpha_crown_margins(traced, box, label, *steps, self.sound)
        return not bool(is_undecided(margins, label))

    def _attack(self, ball: LinfBall, label: Tensor, margins: Tensor) -> Tensor | None:
        """Return a misclassified image of the ball, or None; only classes that bounds do not exclude are tried."""
        targets = (
            (~is_proven(margins.scatter(1, label[:, None], -1.0))[0])
            .nonzero()[:, 0]
            .repeat(self.settings.attack_restarts)
        )
        if not len(targets):
            return None
        balls = LinfBall(*(part.expand(len(targets), *part.shape[1:]) for part in ball))
        eps = float((ball.upper - ball.lower).amax()) / 2
        has_distances = "surrogate_pgd" in default_attacks(self.network)
        for follows_surrogate in (False, True) if has_distances else (False,):
            with surrogate_gradients(self.network, SURROGATE_P) if follows_surrogate else nullcontext():
                found, images = adversarial_images(
                    partial(compute_logits, self.network),
                    balls,
                    label.expand(len(targets)),
                    targets,
                    self.settings.attack_steps,
                    eps,
                    torch.Generator().manual_seed(0),
                )
            for k in found.nonzero()[:, 0]:
                logits = compute_logits(self.network, images[k, None])  # alone, since rounding may differ
                if not bool(margin(logits, label) > 0):
                    return images[k]
        return None
