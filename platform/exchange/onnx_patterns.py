"""Patterns of ONNX nodes that linflab writes for distance layers, read as these layers."""

import torch
from torch import Tensor

from linflab.models.distance.derivatives import sort_coefficients
from linflab.models.networks.layers import LpDistance, LpDistanceConv2d, SortDistance
from linflab.platform.exchange.onnx_nodes import KnownValues, Node, Operation


def match_pattern(node: Node, known: KnownValues) -> Operation | None:
    """Return the layer that a node and the nodes before it represent, or None.

    - Largest over i of |x_i - w_oi|: an l_inf-distance layer, dense or of 1 x 1 patches.
    - Sorted largest values of |x_i - w_oi|, times the coefficients of SortNet: a SortNet layer.
    """
    if node.kind == "ReduceMax" and node.axes() == [2] and not node.attributes.get("keepdims", 1):
        found = _match_distances(node.inputs[0], known)
        if found is None:
            return None
        value, weight = found
        outputs, inputs = weight.shape
        is_dense = known.examples[value].dim() == 2
        layer = LpDistance(inputs, outputs) if is_dense else LpDistanceConv2d(inputs, outputs, 1, 1, 0)
        layer.weight.detach().copy_(weight.view_as(layer.weight))
        return Operation(layer.requires_grad_(False), (value,), (), node.outputs)
    largest = known.producers.get(node.inputs[0]) if node.kind == "MatMul" else None
    if largest is None or largest.kind != "TopK" or not largest.attributes.get("largest", 1):
        return None
    found = _match_distances(largest.inputs[0], known)
    if found is None or known.examples[found[0]].dim() != 2 or node.constant(1).dim() != 1:
        return None
    q = _match_coefficients(node.constant(1), found[1].shape[1])
    if q is None:
        return None
    sort = SortDistance(found[1].shape[1], found[1].shape[0], q)
    sort.weight.detach().copy_(found[1])
    return Operation(sort.eval().requires_grad_(False), (found[0],), (), node.outputs)


def _match_distances(name: str, known: KnownValues) -> tuple[str, Tensor] | None:
    """Return x and w (O, I) of a value |x_i - w_oi|, (1, O, I) or (1, O, I, H, W); None for other values."""
    absolute = known.producers.get(name)
    difference = known.producers.get(absolute.inputs[0]) if absolute is not None and absolute.kind == "Abs" else None
    if difference is None or difference.kind != "Sub" or difference.is_value(0) == difference.is_value(1):
        return None
    position = 0 if difference.is_value(0) else 1
    inner = known.producers.get(difference.inputs[position])
    if inner is None or inner.kind not in ("Unsqueeze", "Reshape"):
        return None
    x, unsqueezed = inner.example(0), difference.example(position)
    weight = difference.constant(1 - position)
    rank = unsqueezed.dim()
    if x.dim() not in (2, 4) or unsqueezed.shape != x.unsqueeze(1).shape or weight.dtype != torch.float32:
        return None
    weight = weight[0] if weight.dim() == rank and len(weight) == 1 else weight
    if weight.shape != (len(weight), x.shape[1], *[1] * (rank - 3)):
        return None
    return inner.inputs[0], weight.flatten(1)


def _match_coefficients(coefficients: Tensor, inputs: int) -> float | None:
    """Return q of a SortNet layer whose coefficients equal the given ones in float32; None if there is none."""
    count = min(10, inputs)
    if coefficients.shape != (count,) or count < 2 or not bool((coefficients > 0).any()):
        return None
    estimate = 1 - float(coefficients[1] / coefficients[0])
    for digits in range(1, 8):
        q = round(estimate, digits)
        if 0 < q <= 1 and torch.equal(torch.tensor(sort_coefficients(q, count, inputs)), coefficients):
            return q
    return None
