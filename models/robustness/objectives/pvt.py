"""Certified training with a learned verifier, after Dvijotham et al. 2018 (PVT)."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from linflab.models.networks.linf_dist import DistanceNet
from linflab.models.robustness.bounds.boxes import Box, ball_box
from linflab.models.robustness.bounds.dual_bound import dual_bound, relu_steps
from linflab.models.robustness.bounds.ibp import logit_difference_ranges, propagate_bounds
from linflab.models.robustness.bounds.loss_fusion import chord_bound
from linflab.models.robustness.bounds.steps import Trace, TraceStep, run_steps
from linflab.models.robustness.bounds.tracing import evaluation_mode
from linflab.models.robustness.bounds.worst_case import WorstCaseBounds
from linflab.models.robustness.objectives.base import Batch, EpsValue, Objective, ObjectiveConfig, UnitInterval
from linflab.models.robustness.objectives.network_checks import can_trace, trace_network
from linflab.models.robustness.objectives.verifier import ReluInput, Verifier


class PVTConfig(ObjectiveConfig):
    """Settings of `PVT`; the paper does not publish its own."""

    needs_relu: ClassVar[bool] = True

    kind: Literal["pvt"] = Field(
        "pvt",
        description="dual bound of the worst-case cross entropy, with multipliers that a verifier network predicts",
    )
    eps_train: EpsValue = Field(description="radius of the worst case in training, for pixel values in [0, 1]")
    worst_case_weight_start: UnitInterval = Field(
        0.0, description="weight of the worst-case loss while eps is 0, interpolated linearly in eps"
    )
    worst_case_weight: UnitInterval = Field(
        1.0, description="weight of the worst-case loss at `eps_train`; the rest is clean loss"
    )
    verifier_width: int = Field(32, ge=1, le=4096, description="size of the verifier network's state")

    def check_network(self, network: nn.Module, input_shape: Sequence[int]) -> None:
        """Check that the network is a chain of affine layers and ReLUs."""
        if can_trace(network):
            self.list_relu_shapes(network, input_shape)

    @torch.no_grad()
    def list_relu_shapes(self, network: nn.Module, input_shape: Sequence[int]) -> tuple[list[torch.Size], torch.Size]:
        """Return the shapes of the inputs of all ReLUs, in order of computation, and the shape of the logits.

        Args:
            network: The network to train, in any mode.
            input_shape: Shape of an image, (C, H, W).

        Raises:
            TypeError: If the network is not a chain of affine layers and ReLUs (the message names the layer).
            ValueError: If the network fails on images of this shape.
        """
        try:
            if isinstance(network, DistanceNet):
                raise TypeError("it has distance layers")
            traced = trace_network(network, input_shape)
            with evaluation_mode(network):
                values = run_steps(traced.steps, {traced.input: next(network.parameters()).new_zeros(1, *input_shape)})
            shapes = {name: value.shape[1:] for name, value in values.items()}
            steps = relu_steps(traced, shapes)
        except TypeError as error:
            raise TypeError(
                f"objective.kind={self.kind}: requires a chain of affine layers and ReLUs, which the network is not "
                f"({error}); use another network, or objective.kind=worst_case_cross_entropy"
            ) from None
        return [shapes[step.inputs[0]] for step in steps], shapes[traced.output]

    def build(self, lipschitz_constant: float) -> "PVT":
        """Build the objective; its verifier network is created by `prepare`."""
        return PVT(self)


class PVT(Objective):
    """w D + (1 - w) CE(z), with an upper bound D of the cross entropy over the eps-ball by a learned verifier.

    The verifier network is trained together with the network to reduce D. D is valid whatever the verifier predicts,
    since a dual bound holds for any multipliers (see `dual_bound`). Loss fusion bounds the cross entropy by one linear
    function of the logits, so one backward pass suffices for any number of classes. All boxes, also those of the chords
    of loss fusion, are IBP boxes. w grows linearly with eps.

    Source: Dvijotham et al., "Training Verified Learners with Learned Verifiers", 2018 (arXiv 1805.10265). Its layers,
    optimizer and schedules are not published. The verifier, loss fusion and all settings are therefore our own, and
    tables name the method "after PVT".
    """

    def __init__(self, config: PVTConfig) -> None:
        super().__init__()
        self.config = config
        self.verifier: Verifier | None = None
        self._bounds: WorstCaseBounds | None = None

    def prepare(self, network: nn.Module, input_shape: Sequence[int]) -> None:
        """Create the verifier network for the ReLU layers of a network.

        Args:
            network: The network to train.
            input_shape: Shape of an image, (C, H, W).

        Raises:
            TypeError: If the network is not a chain of affine layers and ReLUs (the message names the layer).
            ValueError: If the network fails on images of this shape.
        """
        relu_shapes, logits_shape = self.config.list_relu_shapes(network, input_shape)
        self.verifier = Verifier(relu_shapes, logits_shape[0], self.config.verifier_width)

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of a network in training mode, a scalar."""
        if self._bounds is None or self._bounds.network is not network:
            self._bounds = WorstCaseBounds(network)
        traced, values = self._bounds.trace_batch(batch.images)
        boxes = propagate_bounds(traced, ball_box(batch.images, batch.eps))
        center, spread = logit_difference_ranges(traced, boxes, batch.labels)
        chords = chord_bound(center - spread, center + spread, batch.labels)
        bound = self.bound_functions(traced, values, boxes, chords.functions[:, None])[:, 0]
        worst_loss = chords.loss_bound(chords.constant + bound)
        start, end = self.config.worst_case_weight_start, self.config.worst_case_weight
        weight = start + (end - start) * (batch.eps / self.config.eps_train)
        clean_loss = functional.cross_entropy(values[traced.output], batch.labels)
        return weight * worst_loss.mean() + (1 - weight) * clean_loss

    def bound_functions(
        self, traced: Trace, values: dict[str, Tensor], boxes: dict[str, Box], functions: Tensor
    ) -> Tensor:
        """Return upper bounds (B, R) of linear functions of the logits, with the verifier's multipliers.

        Args:
            traced: Steps of the network.
            values: All its values for the clean images, by name.
            boxes: Boxes of these values over the eps-ball, by name.
            functions: (B, R, K) coefficients of the logits.

        Raises:
            RuntimeError: If `prepare` was not called.
        """
        verifier = self.verifier
        if verifier is None:
            raise RuntimeError("objective.kind=pvt: the verifier network does not exist yet; call `prepare` first")
        relus = [step.output for step in traced.steps if isinstance(step.layer, nn.ReLU)]
        layers = dict(zip(relus, verifier.layers, strict=True))
        state = verifier.start(functions)

        def predict_multipliers(step: TraceStep, a: Tensor) -> Tensor:
            nonlocal state
            relu_input = ReluInput(values[step.inputs[0]], boxes[step.inputs[0]])
            state, negative, positive = layers[step.output](state, relu_input)
            return a * torch.where(a > 0, positive, negative)

        return dual_bound(traced, boxes, functions, predict_multipliers)
