"""Networks as TorchScript and safetensors files."""

import io
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from linflab.platform.errors import InputError
from linflab.platform.exchange.onnx_reader import import_onnx
from linflab.platform.extras import naming_extras
from linflab.platform.files import open_regular


@naming_extras()
def to_safetensors(network: nn.Module, metadata: Mapping[str, str], float16: bool = False) -> bytes:
    """Return the parameters and buffers of a network in the safetensors format.

    Args:
        network: The network.
        metadata: Texts by name, stored in the header of the file.
        float16: Store floating-point tensors in float16.

    Raises:
        ModuleNotFoundError: If `safetensors` is not installed; the message has the command that installs it.
    """
    from safetensors.torch import save

    tensors = {}
    for name, tensor in network.state_dict().items():
        dtype = torch.float16 if float16 and tensor.is_floating_point() else tensor.dtype
        tensors[name] = tensor.detach().to("cpu", dtype, copy=True).contiguous()
    return save(tensors, dict(metadata))


@naming_extras()
def read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors of a safetensors file by name, and the texts in its header.

    Raises:
        ModuleNotFoundError: If `safetensors` is not installed; the message has the command that installs it.
    """
    from safetensors import safe_open

    with open_regular(path), safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def to_torchscript(model: bytes, input_shape: tuple[int, ...]) -> bytes:
    """Return a TorchScript file of an ONNX model, with operations of PyTorch only and any batch size.

    Such a file does not require linflab, unlike a trace of the network itself, whose distance layers are operators of
    linflab.

    Args:
        model: Serialized ONNX model that linflab wrote.
        input_shape: Shape of an image without the batch.

    Raises:
        InputError: If the traced network depends on the batch size.
        ModuleNotFoundError: If `onnx` is not installed; the message has the command that installs it.
    """
    network = import_onnx(model, "model.onnx", with_patterns=False)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, *input_shape, generator=generator)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, but other tools read it
        script = torch.jit.trace(network, images[:2], check_trace=False)
        if script(images).shape != network(images).shape:
            raise InputError("format=torchscript: the network depends on the batch size; use --format onnx")
        buffer = io.BytesIO()
        torch.jit.save(script, buffer)
    return buffer.getvalue()
