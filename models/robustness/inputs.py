"""Input checks of certifiers, bounds and attacks, for all public entry points.

Certificates and attacks apply to images with pixel values in [0, 1]: the l_inf ball is intersected with that box.
Inputs that would change the meaning of a result are rejected with ValueError or TypeError before any computation.
"""

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

FLOATS = (torch.float32, torch.float64)


def check_batch(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Check a network, its images and their labels.

    Args:
        network: Network in evaluation mode, in float32 or float64.
        images: (B, C, H, W) or flat (B, D), in the dtype and on the device of the network, pixel values in [0, 1]; B
            may be 0.
        labels: (B,) true classes, of any integer dtype, on any device. `check_logits` checks the upper limit.

    Returns:
        (B,) labels as int64, on the device of the images.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If the network is in training mode, or images or labels have an invalid shape, device or range.
    """
    check_images(images)
    check_network(network, images)
    return check_labels(labels, images)


def check_network(network: nn.Module, inputs: Tensor) -> None:
    """Check that a network is in evaluation mode, with the dtype and device of its inputs.

    Raises:
        TypeError: If it is not a module, or has another dtype.
        ValueError: If it is in training mode, or on another device.
    """
    check_evaluation_mode(network)
    check_precision(network, inputs)
    tensors = [*network.parameters(), *network.buffers()]
    if tensors and tensors[0].device != inputs.device:
        raise ValueError(
            f"images={inputs.device}: must be on the device of the network, {tensors[0].device}; "
            f"use images.to('{tensors[0].device}')"
        )


def check_precision(network: nn.Module, inputs: Tensor) -> None:
    """Check that a network is in float32 or float64, like its inputs.

    Raises:
        TypeError: If the network has another dtype.
    """
    tensors = [*network.parameters(), *network.buffers()]
    kinds = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    if low := sorted(str(kind) for kind in kinds.difference(FLOATS)):
        raise TypeError(
            f"network={', '.join(low)}: must be in float32 or float64, which certificates require; use network.float()"
        )
    if kinds and kinds != {inputs.dtype}:
        names = ", ".join(sorted(str(kind) for kind in kinds))
        raise TypeError(
            f"images={inputs.dtype}: must have the dtype of the network, {names}; use images.float() and "
            "network.float(), or .double() for both"
        )


def check_evaluation_mode(network: nn.Module) -> None:
    """Check that a network is a module in evaluation mode; in training, outputs depend on the whole batch.

    Raises:
        TypeError: If it is not a module.
        ValueError: If a submodule is in training mode.
    """
    if not isinstance(network, nn.Module):
        raise TypeError(f"network={type(network).__name__}: must be a torch.nn.Module; wrap it in one")
    if any(module.training for module in network.modules()):
        raise ValueError("network.training=True: must be in evaluation mode; use network.eval() first")


def check_images(images: Tensor) -> None:
    """Check that images are (B, C, H, W) or (B, D), in float32 or float64, with pixel values in [0, 1].

    Raises:
        TypeError: If they are not a tensor, or have another dtype.
        ValueError: If they have another shape, or a pixel value is NaN or outside [0, 1].
    """
    check_image_form(images)
    if not len(images):
        return
    low, high = (float(bound) for bound in images.detach().aminmax())  # both NaN if any pixel is NaN
    if math.isnan(low):
        raise ValueError("images=nan: must be finite numbers in [0, 1]; replace the NaN pixels")
    if low >= 0 and 2 <= high <= 255:  # bytes as floats
        raise ValueError(f"images=[{low:.6g}, {high:.6g}]: must have pixel values in [0, 1]; use images / 255")
    if low < 0 or high > 1:
        raise ValueError(
            f"images=[{low:.6g}, {high:.6g}]: must have pixel values in [0, 1], for which certificates hold; use "
            "images without normalization, and a network that normalizes in its first layer, such as "
            "nn.Sequential(Normalize(mean, std), network)"
        )


def to_unit_range(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return images in uint8 as floats, divided by 255; other images are returned unchanged.

    Args:
        images: Images of any shape.
        dtype: Dtype of the result for images in uint8.
    """
    return images.to(dtype) / 255 if images.dtype == torch.uint8 else images


def check_image_form(images: Tensor) -> None:
    """Check type, dtype and shape of images, but not their pixel values.

    Raises:
        TypeError: If they are not a dense tensor with values, or have another dtype.
        ValueError: If they have another shape.
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"images={type(images).__name__}: must be a torch.Tensor; use torch.as_tensor")
    if images.layout != torch.strided or images.is_meta:
        kind = "meta" if images.is_meta else images.layout
        raise TypeError(f"images={kind}: must be a dense tensor with values; use images.to_dense() or load the values")
    if images.dtype not in FLOATS:
        advice = "images.float()" if images.is_floating_point() else "images.float() / 255"
        raise TypeError(
            f"images={images.dtype}: must be in float32 or float64, with pixel values in [0, 1]; use {advice}"
        )
    check_image_shape(images.shape)


def check_image_shape(shape: Sequence[int], name: str = "images", dims: Sequence[int] = (2, 4)) -> None:
    """Check the shape of a batch of images.

    Args:
        shape: Shape of the batch.
        name: Name of the images in the message.
        dims: Accepted numbers of dimensions: 4 for (B, C, H, W), 2 for (B, D).

    Raises:
        ValueError: If the shape has another number of dimensions, or an empty one after the first.
    """
    if len(shape) in dims and 0 not in shape[1:]:
        return
    expected = "(B, C, H, W) or (B, D)" if 2 in dims else "(B, C, H, W)"
    advice = "use images without empty dimensions"
    if len(shape) < 2:
        advice = "use images[None] for one image"
    elif len(shape) == 3:  # one image, or gray images without a channel dimension
        advice = (
            "use images[None] for one image"
            if shape[0] in (1, 3)
            else "use images[:, None] for gray images without a channel dimension, or images[None] for one image"
        )
    elif len(shape) not in dims:
        advice = f"use images of shape {expected}"
    raise ValueError(f"{name}={tuple(shape)}: must have shape {expected}; {advice}")


def check_box(lower: Tensor, upper: Tensor) -> None:
    """Check the bounds of a box of inputs, which may lie outside [0, 1].

    Raises:
        TypeError: If they are not tensors in float32 or float64.
        ValueError: If shapes differ or are not (B, ...), a value is not finite, or lower > upper anywhere.
    """
    for bound in (lower, upper):
        if not isinstance(bound, Tensor) or bound.dtype not in FLOATS or bound.dtype != lower.dtype:
            kind = bound.dtype if isinstance(bound, Tensor) else type(bound).__name__
            raise TypeError(
                f"box={kind}: must be two tensors, both in float32 or both in float64; use perturbation_box"
            )
    if lower.shape != upper.shape or lower.dim() < 2:
        raise ValueError(
            f"box={tuple(lower.shape)}, {tuple(upper.shape)}: must be two tensors of the same shape (B, ...); "
            "use perturbation_box"
        )
    with torch.no_grad():
        if not bool(((lower <= upper) & lower.isfinite() & upper.isfinite()).all()):
            raise ValueError("box: must be finite, with lower <= upper everywhere; use perturbation_box")


def check_labels(labels: Tensor, images: Tensor) -> Tensor:
    """Check labels (B,) of images (B, ...), and return them as int64 on the device of the images.

    Raises:
        TypeError: If they are not a tensor of integers.
        ValueError: If they have another shape, or a label is negative.
    """
    labels = check_label_form(labels, images)
    if len(labels) and (smallest := int(labels.min())) < 0:
        raise ValueError(f"labels={smallest}: must be at least 0; use the index of the class in the logits")
    return labels


def check_label_form(labels: Tensor, images: Tensor) -> Tensor:
    """Check type, dtype and shape of labels, but not their values; return them as `check_labels` does.

    Raises:
        TypeError: If they are not a tensor of integers.
        ValueError: If they have another shape.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels={type(labels).__name__}: must be a torch.Tensor of integers; use torch.as_tensor")
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"labels={labels.dtype}: must be integers; use labels.long()")
    if labels.shape != images.shape[:1]:
        raise ValueError(
            f"labels={tuple(labels.shape)}: must have shape ({len(images)},), one label per image; use class "
            "indices, such as labels.argmax(1) for one-hot labels"
        )
    return labels.to(images.device, torch.int64)


def check_logits(logits: Tensor, labels: Tensor) -> None:
    """Check that a network returns logits (B, K), K >= 2, and that labels (B,) are below K.

    Raises:
        TypeError: If the output is not a tensor.
        ValueError: If it has another shape, or a label is not below K.
    """
    if not isinstance(logits, Tensor):
        raise TypeError(f"network: must return one tensor of logits, not {type(logits).__name__}; use a wrapper")
    check_classes(logits.shape[1:], labels)
    if len(logits) != len(labels):
        raise ValueError(
            f"network: must return logits (B, K), not shape {tuple(logits.shape)} for {len(labels)} images; "
            "use images of the shape that the network expects"
        )


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return True if lack of memory, of the CPU or a GPU, caused an error."""
    while error is not None:
        # PyTorch's CPU allocator raises RuntimeError; causes are lost between processes.
        if isinstance(error, MemoryError) or (
            isinstance(error, RuntimeError) and re.search("can't allocate memory|out of memory", str(error))
        ):
            return True
        error = error.__cause__
    return False


def compute_logits(network: nn.Module, images: Tensor) -> Tensor:
    """Return the outputs of a network; raise a readable error if it fails on the images.

    A single image is doubled, since some networks only accept batches.

    Raises:
        ValueError: If the network fails on the images.
    """
    try:
        return network(images) if len(images) != 1 else network(torch.cat([images, images]))[:1]
    except (RuntimeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"images={tuple(images.shape)}: {type(network).__name__} fails on them ({reason}); use images of the shape "
            "that the network expects"
        ) from error


def check_classes(outputs: Sequence[int], labels: Tensor) -> None:
    """Check that outputs are K >= 2 logits, and that labels (B,) are below K.

    Args:
        outputs: Shape of the outputs for one image.
        labels: (B,) true classes.

    Raises:
        ValueError: If the outputs are not K >= 2 logits, or a label is not below K.
    """
    if len(outputs) != 1 or outputs[0] < 2:
        raise ValueError(
            f"network: must return K >= 2 logits (K,) per image, not shape {tuple(outputs)}; "
            "use a network with one logit per class"
        )
    if len(labels) and (largest := int(labels.max())) >= outputs[0]:
        raise ValueError(
            f"labels={largest}: must be below {outputs[0]}, the number of classes; use class indices from 0"
        )


def check_eps(eps: float | Tensor) -> float:
    """Check the radius of an l_inf ball, for pixel values in [0, 1], and return it as a float.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is NaN, negative or above 1.
    """
    try:
        number = float(eps) if not isinstance(eps, str) else None
    except (TypeError, ValueError, RuntimeError):  # not a number, or several numbers
        number = None
    if number is None:
        raise TypeError(f"eps={type(eps).__name__}: must be one number from 0 to 1; use a float")
    if not 0 <= number <= 1:
        advice = f"{number:g}/255" if 1 < number <= 255 else "a radius for pixel values in [0, 1]"
        raise ValueError(f"eps={number:g}: must be a number from 0 to 1; use {advice}")
    return number


def check_radii(eps: Tensor) -> None:
    """Check a tensor of radii of l_inf balls, for pixel values in [0, 1].

    Raises:
        ValueError: If a radius is NaN, negative or above 1.
    """
    if not bool(((eps >= 0) & (eps <= 1)).all()):
        raise ValueError("eps: must be numbers from 0 to 1; use radii for pixel values in [0, 1]")


def check_choice(setting: str, value: object, choices: Sequence[str]) -> None:
    """Check that a setting has one of its allowed values.

    Raises:
        ValueError: If the value is not one of the choices.
    """
    if value not in choices:
        raise ValueError(f"{setting}={value}: must be {', '.join(choices[:-1])} or {choices[-1]}; use one of these")
