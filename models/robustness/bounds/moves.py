"""Functions of a forward pass that only move, repeat or drop values, or pad with zeros."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from linflab.models.robustness.bounds.operations import Recorder, Value
from linflab.models.robustness.bounds.steps import Rearrangement, Reshape

MOVES = {
    *("view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze"),
    *("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "flip", "roll"),
    *("getitem", "narrow", "select", "index_select", "chunk", "split", "tensor_split", "unbind"),
    *(
        "repeat",
        "repeat_interleave",
        "expand",
        "pad",
        "interpolate",
        "pixel_shuffle",
        "pixel_unshuffle",
        "channel_shuffle",
    ),
}


def record_move(
    recorder: Recorder, function: Callable[..., Any], name: str, args: Any, kwargs: Any, values: Mapping[int, Value]
) -> list[Value] | None:
    """Record a function that only moves values, by applying it to the indices of the values.

    Args:
        recorder: Recorder of layers.
        function: Function whose name is in `MOVES`, called as `function(*args, **kwargs)`.
        name: Name of the function.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        values: Values among the tensors of the call, by `id` of the tensor.

    Returns:
        The outputs of the call; None if the function does more than move values within each sample.
    """
    if not args and "input" in kwargs:
        args, kwargs = (kwargs["input"],), {key: value for key, value in kwargs.items() if key != "input"}
    if len(values) != 1 or not args or id(args[0]) not in values:
        return None
    (value,) = values.values()
    if name == "pad":
        arguments = dict(zip(("x", "pad", "mode", "value"), args, strict=False)) | kwargs
        if arguments.get("mode", "constant") == "constant":
            pads = tuple(arguments["pad"])
            if arguments.get("value"):
                return None  # pads with a nonzero constant
            if value.example.dim() == 4 and len(pads) == 4 and min(pads) >= 0:
                return [recorder.record(nn.ZeroPad2d(pads), value)]
    if name == "interpolate":
        arguments = dict(zip(("x", "size", "scale_factor", "mode"), args, strict=False)) | kwargs
        if not str(arguments.get("mode", "nearest")).startswith("nearest"):
            return None
    batch, size = len(value.example), value.shape.numel()
    indices = torch.arange(1, batch * size + 1, dtype=torch.float64, device=value.example.device)
    with torch.no_grad():
        moved_indices = function(indices.view(value.example.shape), *args[1:], **kwargs)
    outputs = []
    for part in tree_leaves(moved_indices):
        if part.dim() == 0 or len(part) != batch or not bool((part == part.round()).all()):
            return None
        index = part.long() - 1
        local_index = index - size * torch.arange(batch, device=index.device).view(-1, *[1] * (part.dim() - 1))
        is_padding = index < 0
        if not bool((is_padding | ((local_index >= 0) & (local_index < size))).all()):
            return None  # mixes samples
        local_index = local_index.masked_fill(is_padding, -1)
        if not bool((local_index == local_index[:1]).all()):
            return None
        index = local_index[0].clone()
        identity = torch.arange(size, device=index.device)
        is_identity = index.numel() == size and torch.equal(index.flatten(), identity)
        outputs.append(recorder.record(Reshape(index.shape) if is_identity else Rearrangement(index), value))
    return outputs
