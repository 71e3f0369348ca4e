"""Base class of certified training objectives: losses on worst-case logit bounds over the eps-ball."""

from torch import Tensor, nn

from linflab.models.robustness.bounds.worst_case import BoundMethod, WorstCaseBounds
from linflab.models.robustness.objectives.base import Batch, Objective


class WorstCaseObjective(Objective):
    """Certified training loss; subclasses define `forward` (worst case, labels, lambda, eps).

    Args:
        bound: Method that bounds the worst case.
        with_regularization: If True, compute the warm-up regularization of Shi et al. 2021.
    """

    def __init__(self, bound: BoundMethod = "ibp", with_regularization: bool = False) -> None:
        super().__init__()
        self.bound, self.with_regularization = bound, with_regularization
        self._bounds: WorstCaseBounds | None = None

    def crown_weight(self, eps: float) -> float:
        """Return the weight of the CROWN bounds in CROWN-IBP; the IBP bounds have the rest."""
        return 1.0

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """Return the certified training loss of a network in training mode, a scalar."""
        if self._bounds is None or self._bounds.network is not network:
            self._bounds = WorstCaseBounds(network, self.bound)
        share = self.crown_weight(batch.eps)
        worst = self._bounds(
            batch.images,
            batch.labels,
            batch.eps,
            batch.p,
            batch.masks,
            share,
            with_regularization=self.with_regularization,
        )
        return self(worst, batch.labels, batch.cross_entropy_weight, batch.eps)
