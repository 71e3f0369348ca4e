"""Matrices of affine functions, extracted without the rules of `linflab`, for references of tests."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch


def extract_affine(
    function: Callable[[torch.Tensor], torch.Tensor], shape: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the matrix and constant of an affine function, from its values at unit vectors."""
    inputs = math.prod(shape)
    with torch.no_grad():
        zero = function(torch.zeros(1, *shape, dtype=torch.float64)).flatten(1)
        units = function(torch.eye(inputs, dtype=torch.float64).view(inputs, *shape)).flatten(1)
    return (units - zero).T.numpy(), zero[0].numpy()
