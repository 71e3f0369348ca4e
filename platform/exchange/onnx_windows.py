"""Operators of ONNX with windows: convolution and pooling."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from linflab.models.robustness.bounds.steps import Rearrangement
from linflab.platform.exchange.onnx_nodes import Node, Operation, UnsupportedNode, check_elements


def _window(node: Node, size: Sequence[int], channels: int = 1) -> tuple[list[int], list[int], list[int], list[int]]:
    """Return strides, dilations, and the padding at starts and ends, of a convolution or pooling.

    Args:
        node: The node.
        size: Kernel size.
        channels: Number of output channels.
    """
    dims = len(size)
    strides = list(node.attributes.get("strides", [1] * dims))
    dilations = list(node.attributes.get("dilations", [1] * dims))
    mode = node.attributes.get("auto_pad", b"NOTSET").decode()
    pads = list(node.attributes.get("pads", [0] * 2 * dims))
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        pads = [0] * 2 * dims
        for d, n in enumerate(node.example(0).shape[2:]):
            span = (math.ceil(n / strides[d]) - 1) * strides[d] + dilations[d] * (size[d] - 1) + 1
            total = max(0, span - n)
            small, large = total // 2, total - total // 2
            pads[d], pads[dims + d] = (small, large) if mode == "SAME_UPPER" else (large, small)
    elif mode not in ("NOTSET", "VALID"):
        raise UnsupportedNode(f"auto_pad={mode}")
    if dims not in (1, 2) or min(pads) < 0:
        raise UnsupportedNode(f"kernel_shape={list(size)} and pads={pads}")
    sizes = zip(node.example(0).shape[2:], pads[:dims], pads[dims:], strict=True)
    check_elements(max(channels, node.example(0).shape[1]), *(n + start + end for n, start, end in sizes))
    return strides, dilations, pads[:dims], pads[dims:]


def convert_conv(node: Node) -> Operation:
    """Return a convolution of one or two dimensions; one-hot filters become a rearrangement."""
    weight = node.constant(1)
    strides, dilations, starts, ends = _window(node, weight.shape[2:], len(weight))
    group, channels = node.attributes.get("group", 1), node.example(0).shape[1]
    edges = [edge for pair in reversed(list(zip(starts, ends, strict=True))) for edge in pair]
    is_symmetric = starts == ends
    convolve: Callable[..., Tensor] = functional.conv1d if weight.dim() == 3 else functional.conv2d

    def apply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        x = x if is_symmetric else functional.pad(x, edges)
        return convolve(x, weight, bias, strides, starts if is_symmetric else 0, dilations, group)

    rows = weight.flatten(1)
    if not node.has(2) and bool(((rows == 0) | (rows == 1)).all()) and bool((rows.sum(dim=1) == 1).all()):
        # One-hot filters gather patches, which has no rounding.
        index = torch.arange(1.0, 1 + node.example(0)[0].numel(), dtype=torch.float64).view(node.example(0).shape)
        layer = Rearrangement(apply(index, weight.double())[0].long() - 1)
        return node.operation(layer)
    if group < 1 or channels != weight.shape[1] * group:
        raise UnsupportedNode(f"{channels} channels for a weight of shape {tuple(weight.shape)}")
    return node.operation(apply, weight, *([node.constant(2)] if node.has(2) else []))


def convert_max_pool(node: Node) -> Operation:
    """Return max pooling over one or two dimensions."""
    size = list(node.attributes["kernel_shape"])
    strides, dilations, starts, ends = _window(node, size)
    if len([name for name in node.outputs if name]) > 1 or node.attributes.get("storage_order", 0):
        raise UnsupportedNode("indices as output")
    ceil_mode = bool(node.attributes.get("ceil_mode", 0))
    # The last windows may reach over the end by the padding, as in torch's ceil mode.
    sizes = node.example(0).shape[2:]
    outputs = [
        (n + a + b - d * (k - 1) - 1) // step + 1
        for n, a, b, k, step, d in zip(sizes, starts, ends, size, strides, dilations, strict=True)
    ]
    for mode in (ceil_mode, True, False):
        kind = nn.MaxPool1d if len(size) == 1 else nn.MaxPool2d
        layer = kind(tuple(size), tuple(strides), tuple(starts), tuple(dilations), ceil_mode=mode)
        if (mode == ceil_mode and starts == ends) or list(layer(node.example(0)).shape[2:]) == outputs:
            return node.operation(layer)
    raise UnsupportedNode(f"pads={starts + ends}")


def convert_average_pool(node: Node) -> Operation:
    """Return average pooling over one or two dimensions."""
    size = list(node.attributes["kernel_shape"])
    strides, dilations, starts, ends = _window(node, size)
    counts = bool(node.attributes.get("count_include_pad", 0))
    ceil_mode = bool(node.attributes.get("ceil_mode", 0))
    if set(dilations) != {1} or (ceil_mode and counts and any(starts)):
        raise UnsupportedNode("dilations, or ceil_mode with count_include_pad")
    outputs = [
        (n + a + b - k) // step + 1
        for n, a, b, k, step in zip(node.example(0).shape[2:], starts, ends, size, strides, strict=True)
    ]
    kind: Any = nn.AvgPool1d if len(size) == 1 else nn.AvgPool2d
    for mode in (ceil_mode, True, False):
        layer = kind(tuple(size), tuple(strides), tuple(starts), mode, counts)
        is_same = list(layer(node.example(0)).shape[2:]) == outputs and not (counts and starts != ends)
        if (mode == ceil_mode and starts == ends) or is_same:
            return node.operation(layer)
    raise UnsupportedNode(f"pads={starts + ends}")
