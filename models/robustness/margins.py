"""Logit differences, margins, and the cross entropy as a function of logit differences."""

import torch
from torch import Tensor
from torch.nn import functional


def logit_differences(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the logit differences m_j = z_j - z_y, (B, K), with -inf at the true class y.

    Args:
        logits: (B, K) logits z.
        labels: (B,) true classes y as int64.
    """
    index = labels[:, None]
    return (logits - logits.gather(1, index)).scatter(1, index, -torch.inf)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the margin z_y - max_{j != y} z_j, (B,); positive means correct and not tied.

    Args:
        logits: (B, K) logits z.
        labels: (B,) true classes y as int64.
    """
    return -logit_differences(logits, labels).amax(dim=1)


def cross_entropy_from_differences(margins: Tensor, labels: Tensor) -> Tensor:
    """Return the cross entropy log(1 + sum_{j != y} exp M_j), (B,), of logit differences or their bounds.

    Args:
        margins: (B, K) logit differences M; column y is ignored.
        labels: (B,) true classes y as int64.
    """
    return functional.cross_entropy(margins.scatter(1, labels[:, None], 0.0), labels, reduction="none")


def log_cross_entropy_from_differences(differences: Tensor, labels: Tensor) -> Tensor:
    """Return the logarithm of `cross_entropy_from_differences`, (B,), without underflow.

    With s = log sum_{j != y} exp M_j it is log log(1 + exp s), which is s up to rounding if s is below -40.

    Args:
        differences: (B, K) logit differences M; column y is ignored.
        labels: (B,) true classes y as int64.
    """
    total = differences.scatter(1, labels[:, None], -torch.inf).logsumexp(dim=1)
    is_tiny = total < -40
    return torch.where(is_tiny, total, functional.softplus(torch.where(is_tiny, -40.0, total)).log())
