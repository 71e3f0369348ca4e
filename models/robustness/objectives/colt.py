"""COLT: layerwise adversarial training inside zonotopes of latent values."""

import math
from collections.abc import Collection, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from linflab.models.robustness.attacks.linf_ball import LinfBall
from linflab.models.robustness.attacks.pgd import pgd_examples
from linflab.models.robustness.bounds.boxes import ball_box
from linflab.models.robustness.bounds.relaxations import has_relaxation
from linflab.models.robustness.bounds.steps import VIEW_LAYERS, Trace, run_steps, unwrap
from linflab.models.robustness.bounds.tracing import evaluation_mode
from linflab.models.robustness.bounds.worst_case import WorstCaseBounds
from linflab.models.robustness.bounds.zonotope import ZonotopeEstimate
from linflab.models.robustness.objectives.base import (
    Batch,
    EpsValue,
    Objective,
    ObjectiveConfig,
    PositiveFiniteFloat,
    UnitInterval,
)
from linflab.models.robustness.objectives.network_checks import can_trace, trace_network

Values = dict[str, Tensor]  # by their name in the trace
ROUNDING = 1e-9  # added before rounding down, since fractions such as 0.3 are inexact


class COLTConfig(ObjectiveConfig):
    """Settings of `COLT`; defaults are those of the published CIFAR-10 network at eps 8/255.

    Training has stages of equal length. Stage j freezes the layers up to the j-th activation layer; stage 0 none.
    """

    needs_relu: ClassVar[bool] = True
    attacks: ClassVar[bool] = True
    freezes_layers: ClassVar[bool] = True

    kind: Literal["colt"] = Field(
        "colt", description="COLT: cross entropy of adversarial points in zonotopes, layer by layer"
    )
    eps_train: EpsValue = Field(description="radius of the input ball in the last stage, for pixel values in [0, 1]")
    eps_growth: float = Field(
        1.2, ge=1, le=100, description="radius of the input ball in a stage, as a multiple of that in the next stage"
    )
    stages: int = Field(
        3, ge=1, description="number of stages; the first is adversarial training, the others freeze 1, 2, ... ReLUs"
    )
    mixing_fraction: UnitInterval = Field(
        0.3, description="fraction of a stage during which its loss replaces that of the previous stage, linearly"
    )
    steps: int = Field(8, ge=1, description="number of attack steps from random coefficients")
    rel_step_size: float = Field(
        0.25, gt=0, allow_inf_nan=False, description="step size of the attack, for coefficients in [-1, 1]"
    )
    projections: int = Field(
        50, ge=1, description="number of random projections that estimate widths; memory is proportional to it"
    )
    stability_weight: float = Field(
        0.003, ge=0, allow_inf_nan=False, description="weight of the ReLU-stability loss in the first stage"
    )
    stability_growth: PositiveFiniteFloat = Field(
        1.5, description="weight of the ReLU-stability loss in a stage, as a multiple of that in the previous stage"
    )
    stage_lr_factor: PositiveFiniteFloat = Field(
        0.5, description="learning rate at the start of a stage, as a multiple of that of the previous stage"
    )
    lr_decay_factor: PositiveFiniteFloat = Field(
        0.5, description="factor of each learning-rate decay; decays start after `mixing_fraction` of a stage"
    )
    lr_decay_interval: PositiveFiniteFloat = Field(
        0.05, description="time between learning-rate decays, as a fraction of a stage"
    )

    def check_network(self, network: nn.Module, input_shape: Sequence[int]) -> None:
        """Check that the network has enough activation layers."""
        if can_trace(network):
            self.list_frozen_layers(network, input_shape)

    def list_frozen_layers(self, network: nn.Module, input_shape: Sequence[int]) -> list[set[nn.Module]]:
        """Return the layers that each stage freezes.

        Args:
            network: The network to train, in any mode.
            input_shape: Shape of an image, (C, H, W).

        Raises:
            TypeError: If a layer or operation has no rule (the message names it).
            ValueError: If the network has too few activation layers.
        """
        traced = trace_network(network, input_shape)
        cuts = _find_cuts(traced)
        if self.stages > len(cuts):
            raise ValueError(
                f"stages={self.stages}: requires {self.stages - 1} activation layers before the last layer, but the "
                f"network has {len(cuts) - 1}; use at most {len(cuts)}"
            )
        return [{unwrap(step.layer) for step in traced.steps[:cut]} for cut in cuts[: self.stages]]

    def stage(self, progress: float) -> tuple[int, float]:
        """Return the stage, from 0, and the fraction of it that is done, in [0, 1)."""
        position = self.stages * progress
        stage = min(math.floor(position + ROUNDING), self.stages - 1)
        return stage, max(0.0, position - stage)

    def own_weight(self, progress: float) -> float:
        """Return kappa, the weight of the stage's own loss; the rest is the loss of the previous stage."""
        _, done = self.stage(progress)
        return 1.0 if done >= self.mixing_fraction else done / self.mixing_fraction

    def eps_factor(self, progress: float) -> float:
        """Return the radius of the input ball at this fraction of training, as a multiple of `eps_train`."""
        stage, _ = self.stage(progress)
        return self.eps_growth ** (self.stages - 1 - stage)

    def learning_rate_factor(self, progress: float) -> float:
        """Return the factor of the learning rate: one per stage, and one per decay within the stage."""
        stage, done = self.stage(progress)
        decays = max(0, math.floor((done - self.mixing_fraction) / self.lr_decay_interval + ROUNDING))
        return self.stage_lr_factor**stage * self.lr_decay_factor**decays

    def build(self, lipschitz_constant: float) -> "COLT":
        """Build the objective."""
        return COLT(self)


class COLT(Objective):
    """kappa (CE(z_j) + c S) + (1 - kappa) CE(z_{j-1}) in stage j, with kappa from 0 to 1 at the start of the stage.

    z_j are the logits of an adversarial point in the zonotope after the j-th activation layer, over the input ball.
    z_0 are those of adversarial images, and z_{-1} those of clean images. The attack ascends the cross entropy by
    projected sign steps on the coefficients of the zonotope. The layers before the point are frozen: they have no
    gradients, and compute as in evaluation mode.

    The ReLU-stability loss S is the sum of relu(-l) relu(u) over the inputs of the next activation layer, with their
    bounds l and u, averaged over the batch. The last stage has none. Its weight c grows from stage to stage.

    Zonotopes have estimated widths (see `bounds.zonotope`), so the bounds in training are approximate. Certificates
    never use them. Differences from the published code: random projections are shared by the images of a batch, widths
    of the first layer are exact, one estimate covers all error terms, and the optimizer keeps its state between stages.
    Dropout by torch functions, instead of modules, is not applied.

    Source: Balunovic & Vechev, "Adversarial Training and Provable Defenses: Bridging the Gap", ICLR 2020, Sections 4 to
    6, with the schedules of the authors' published code. S is from Xiao et al., "Training for Faster Adversarial
    Robustness Verification via Inducing ReLU Stability", ICLR 2019.
    """

    def __init__(self, config: COLTConfig) -> None:
        super().__init__()
        self.config = config
        self._traces: _EvaluationTraces | None = None
        self._frozen_layers: list[set[nn.Module]] = []

    def prepare(self, network: nn.Module, input_shape: Sequence[int]) -> None:
        """Find the layers that each stage freezes.

        Raises:
            TypeError: If a layer or operation has no rule (the message names it).
            ValueError: If the network has too few activation layers.
        """
        self._frozen_layers = self.config.list_frozen_layers(network, input_shape)

    def frozen_layers(self, progress: float) -> Collection[nn.Module]:
        """Return the layers of the network that get no gradients at this fraction of training."""
        stage, _ = self.config.stage(progress)
        return self._frozen_layers[stage]

    def draw_starts(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Return uniform random numbers in [0, 1] that select the attack's first coefficients of the images."""
        return torch.rand(*shape, generator=generator)

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of the stage, a scalar; the clean loss of its trained layers if the batch has no starts."""
        if self._traces is None or self._traces.network is not network:
            self._traces = _EvaluationTraces(network)
        with evaluation_mode(network):
            traced = self._traces.at(batch.images)
            zonotope, points = self._find_points(traced, batch)
        stage, _ = self.config.stage(batch.progress)
        loss = batch.images.new_zeros(())
        for weight, values in points:
            logits = run_steps(traced.steps[_find_cuts(traced)[stage] :], values)[traced.output]
            loss = loss + weight * functional.cross_entropy(logits, batch.labels)
        if zonotope is None:
            return loss
        # Last, since the steps above change running statistics, which this loss needs for its gradients.
        with evaluation_mode(network):
            return loss + self._stability(zonotope, batch)

    def _find_points(self, traced: Trace, batch: Batch) -> tuple[ZonotopeEstimate | None, list[tuple[float, Values]]]:
        """Return the zonotope up to the cut, and the weights and values of the points that the stage trains on."""
        (stage, _), kappa = self.config.stage(batch.progress), self.config.own_weight(batch.progress)
        cuts, clean = _find_cuts(traced), {traced.input: batch.images}
        with torch.no_grad():
            if batch.starts is None:
                return None, [(1.0, run_steps(traced.steps[: cuts[stage]], clean))]
            generator = torch.Generator(batch.images.device).manual_seed(batch.seed)
            zonotope = ZonotopeEstimate(traced, ball_box(batch.images, batch.eps), self.config.projections, generator)
            zonotope.propagate(traced.steps[: cuts[stage]])
        points = [(kappa, self._attack(zonotope, cuts[stage], batch))] if kappa > 0 else []
        if kappa < 1:
            earlier_cut = cuts[stage - 1] if stage else 0
            earlier = self._attack(zonotope, earlier_cut, batch) if stage else clean
            with torch.no_grad():
                points.append((1 - kappa, run_steps(traced.steps[earlier_cut : cuts[stage]], earlier)))
        return zonotope, points

    def _stability(self, zonotope: ZonotopeEstimate, batch: Batch) -> Tensor:
        """Return the weighted ReLU-stability loss of the stage, a scalar."""
        (stage, _), steps, cuts = self.config.stage(batch.progress), zonotope.traced.steps, _find_cuts(zonotope.traced)
        weight = self.config.stability_weight * self.config.stability_growth**stage
        weight *= self.config.own_weight(batch.progress)
        if weight == 0 or stage == self.config.stages - 1:
            return batch.images.new_zeros(())
        activation = cuts[stage + 1] - 1
        zonotope.propagate(steps[cuts[stage] : activation])
        lower, upper = zonotope.bounds(steps[activation].inputs[0])
        return weight * (functional.relu(-lower) * functional.relu(upper)).sum() / len(lower)

    def _attack(self, zonotope: ZonotopeEstimate, cut: int, batch: Batch) -> Values:
        """Return the values of adversarial points, up to a number of steps of the trace.

        The coefficients of all error terms form one tensor (B, D).
        """
        traced, config = zonotope.traced, self.config
        first, rest = traced.steps[:cut], traced.steps[cut:]
        names = [name for name in (traced.input, *(step.output for step in first)) if name in zonotope.terms]
        shapes = [zonotope.centers[name].shape[1:] for name in names]
        assert batch.starts is not None
        latent = batch.draw_uniform((sum(shape.numel() for shape in shapes[1:]),))
        start = 2 * torch.cat([batch.starts.flatten(1), latent], dim=1) - 1

        def values_at(coefficients: Tensor) -> Values:
            parts = coefficients.split([shape.numel() for shape in shapes], dim=1)
            by_name = {name: part.unflatten(1, shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
            return zonotope.points(by_name, first)

        cube = LinfBall(torch.zeros_like(start), -torch.ones_like(start), torch.ones_like(start))
        end = pgd_examples(
            lambda coefficients: run_steps(rest, values_at(coefficients))[traced.output],
            cube,
            batch.labels,
            start,
            [config.rel_step_size] * config.steps,
        )
        with torch.no_grad():
            return values_at(end)


class _EvaluationTraces(WorstCaseBounds):
    """Traces of a network in evaluation mode, which are reused if the network allows it."""

    def at(self, images: Tensor) -> Trace:
        """Return the trace for the shape of these images."""
        return self._trace(images)


def _find_cuts(traced: Trace) -> list[int]:
    """Return the number of steps that each stage can freeze: none, or all up to an activation before the last layer."""
    is_last, cuts = True, list[int]()
    for count, step in reversed(list(enumerate(traced.steps, 1))):
        if has_relaxation(step.layer):
            cuts += [] if is_last else [count]
        elif not isinstance(step.layer, VIEW_LAYERS):
            is_last = False
    return [0, *reversed(cuts)]
