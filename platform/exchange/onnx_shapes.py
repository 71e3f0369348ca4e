"""Operators of ONNX that move values: shapes, slices, gathering and sorting."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from linflab.models.networks.layers import GroupSort
from linflab.models.robustness.bounds.steps import Rearrangement
from linflab.platform.exchange.onnx_nodes import Node, Operation, UnsupportedNode, check_elements


def _to_shape(node: Node, shape: Sequence[int]) -> Operation:
    """Return a reshape of each sample to the shape (1, ...) of one sample."""
    if not shape or shape[0] != 1:
        raise UnsupportedNode(f"a result of shape {list(shape)}, which moves the batch")
    sizes = tuple(shape[1:])
    return node.operation(lambda x: x.reshape(x.shape[0], *sizes))


def convert_reshape(node: Node) -> Operation:
    """Return a reshape whose target shape is constant, apart from the batch."""
    x, target = node.example(0), node.constant(1).tolist()
    if not node.attributes.get("allowzero", 0):
        target = [x.shape[k] if size == 0 else size for k, size in enumerate(target)]
    return _to_shape(node, list(x.reshape(target).shape))


def convert_flatten(node: Node) -> Operation:
    """Return a reshape to two dimensions."""
    x, axis = node.example(0), node.attributes.get("axis", 1)
    axis = axis + x.dim() if axis < 0 else axis
    return _to_shape(node, [math.prod(x.shape[:axis]), math.prod(x.shape[axis:])])


def convert_squeeze(node: Node) -> Operation:
    """Return a reshape without dimensions of size 1."""
    x, axes = node.example(0), node.axes()
    axes = [k for k, size in enumerate(x.shape) if size == 1] if axes is None else axes
    if 0 in axes:
        raise UnsupportedNode("axes that include the batch")
    if any(x.shape[axis] != 1 for axis in axes):
        raise UnsupportedNode(f"axes={axes} of a value of shape {list(x.shape)}")
    return _to_shape(node, [size for k, size in enumerate(x.shape) if k not in axes])


def convert_unsqueeze(node: Node) -> Operation:
    """Return a reshape with further dimensions of size 1."""
    x, count = node.example(0), node.option("axes", 1)
    axes = node.axes(rank=x.dim() + len([count] if isinstance(count, int) else count))
    assert axes is not None
    if 0 in axes:
        raise UnsupportedNode("axes that include the batch")
    sizes = iter(x.shape)
    return _to_shape(node, [1 if k in axes else next(sizes) for k in range(x.dim() + len(axes))])


def convert_transpose(node: Node) -> Operation:
    """Return a permutation of the dimensions after the batch."""
    order = list(node.attributes.get("perm", range(node.example(0).dim())[::-1]))
    if order[:1] != [0]:
        raise UnsupportedNode(f"perm={order}, which moves the batch")
    return node.operation(lambda x: x.permute(order))


def convert_concat(node: Node) -> Operation:
    """Return a concatenation along a dimension other than the batch."""
    axis = node.attributes["axis"] % node.example(0).dim()
    if axis == 0:
        raise UnsupportedNode("axis=0, the batch")
    return node.operation(lambda *values: torch.cat(values, axis), inputs=range(len(node.inputs)))


def convert_pad(node: Node) -> Operation:
    """Return padding with zeros."""
    pads, value = node.option("pads", 1), node.option("value", 2, 0.0)
    rank = node.example(0).dim()
    mode = node.attributes.get("mode", b"constant").decode()
    if mode != "constant" or value or node.has(3) or len(pads) != 2 * rank or pads[0] or pads[rank]:
        raise UnsupportedNode(f"mode={mode} and value={value}, or axes")
    check_elements(*(n + a + b for n, a, b in zip(node.example(0).shape, pads[:rank], pads[rank:], strict=True)))
    edges = [edge for axis in range(rank - 1, 0, -1) for edge in (pads[axis], pads[rank + axis])]
    return node.operation(lambda x: functional.pad(x, edges))


def convert_gather(node: Node) -> Operation:
    """Return a selection of positions along one dimension."""
    axis, index = node.attributes.get("axis", 0) % node.example(0).dim(), node.constant(1)
    if axis == 0 or index.dim() > 1:
        raise UnsupportedNode("indices of the batch, or of several dimensions")
    size = node.example(0).shape[axis]
    positions = [int(one) + size if one < 0 else int(one) for one in index.flatten()]
    if not all(0 <= one < size for one in positions):
        raise UnsupportedNode("indices beyond the end")
    indices = torch.arange(node.example(0)[0].numel()).view(node.example(0).shape[1:])
    selected = indices.index_select(axis - 1, torch.tensor(positions, dtype=torch.long))
    return node.operation(Rearrangement(selected if index.dim() else selected.squeeze(axis - 1)))


def convert_slice(node: Node) -> Operation:
    """Return a slice with positive steps."""
    rank = node.example(0).dim()
    starts, ends = node.option("starts", 1), node.option("ends", 2)
    axes = node.axes("axes", 3) or list(range(len(starts)))
    steps = node.option("steps", 4) or [1] * len(starts)
    if 0 in axes or min(steps) < 1 or len(axes) > rank:
        raise UnsupportedNode("a slice of the batch, or negative steps")
    parts = dict(zip(axes, zip(starts, ends, steps, strict=True), strict=True))
    slices = tuple(slice(*parts[axis]) if axis in parts else slice(None) for axis in range(rank))
    return node.operation(lambda x: x[slices])


def convert_top_k(node: Node) -> Operation:
    """Return the largest or smallest values along the last dimension, by sorting it."""
    x = node.example(0)
    (count,) = k if isinstance(k := node.option("k", 1), list) else (k,)
    axis = node.attributes.get("axis", -1) % x.dim()
    size = x.shape[-1]
    if axis != x.dim() - 1 or axis == 0 or not 1 <= count <= size or not node.attributes.get("sorted", 1):
        raise UnsupportedNode(f"axis={axis}, k={count}, or unsorted outputs")
    return node.operation(SortedValues(size, count, bool(node.attributes.get("largest", 1))))


class SortedValues(nn.Module):
    """The largest or smallest values along the last dimension, in order.

    Args:
        size: Size of the last dimension.
        count: Number of values.
        is_descending: True for the largest values, False for the smallest.
    """

    def __init__(self, size: int, count: int, is_descending: bool) -> None:
        super().__init__()
        self.sort, self.count, self.is_descending = GroupSort(size), count, is_descending

    def forward(self, x: Tensor) -> Tensor:
        """Return the values (B, ..., count) of x (B, ..., size)."""
        values = self.sort(x.flatten(1)).reshape(x.shape)
        return (values.flip(-1) if self.is_descending else values)[..., : self.count]
