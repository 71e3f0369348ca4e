"""Export of trained networks, and of robustness properties, for other tools."""

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from linflab.models.robustness.bounds.boxes import Box, perturbation_box
from linflab.models.robustness.bounds.rounding import strict_float32
from linflab.platform.errors import InputError
from linflab.platform.exchange.folder import check_folder, write_folder
from linflab.platform.exchange.manifest import MANIFEST_FILE, WEIGHTS_FILE
from linflab.platform.exchange.onnx_writer import build_onnx
from linflab.platform.exchange.torch_formats import to_safetensors, to_torchscript
from linflab.platform.exchange.vnnlib import format_robustness
from linflab.platform.host import package_versions
from linflab.platform.results.load import find_weights
from linflab.platform.source import git_commit
from linflab.platform.tracking.mlflow import client_of
from linflab.platform.tracking.storage import Storage
from linflab.platform.training.evaluation import evaluate, evaluation_spec
from linflab.platform.training.weights import Weights, describe_dataset, load_matching_dataset, load_weights
from linflab.reports import schema
from linflab.reports.records import read_run

ExportFormat = Literal["onnx", "vnnlib", "torchscript", "safetensors"]
MODEL_FILE = "model.onnx"
EXAMPLES = 4  # images in the example files
INSTANCE_TIMEOUT_S = 300  # per property, in instances.csv


@dataclass(frozen=True)
class PropertyImages:
    """Test images whose robustness is exported.

    Attributes:
        positions: Positions in the test set.
        eps: Radius of the l_inf ball, for pixel values in [0, 1]; None for the eps of the run.
    """

    positions: Sequence[int]
    eps: float | None = None


def export_network(
    run_or_weights: str,
    storage_dir: Path,
    format: ExportFormat,
    output_dir: Path,
    images: PropertyImages,
    float16: bool = False,
) -> list[Path]:
    """Write a trained network to a folder, with an example input and output and a manifest.

    Args:
        run_or_weights: Run id or name, or path of a weights file.
        storage_dir: Storage directory of the run.
        format: `onnx`, `torchscript`, `safetensors`, or `vnnlib`: ONNX with robustness properties.
        output_dir: New or empty folder.
        images: Test images of the properties; ignored by the other formats.
        float16: Round the tensors of a safetensors file to float16. The rounded network, which computes in float32, is
            evaluated on the test set with the settings of its run, and the manifest has its results.

    Returns:
        Paths of the files.

    Raises:
        InputError: If the run, the weights or the test images are not found, the network cannot be exported, or the
            folder has other content.
        ModuleNotFoundError: If a package of the extra `exchange` is not installed.
    """
    check_folder(output_dir)
    path, storage, run = find_weights(run_or_weights, storage_dir)
    weights = load_weights(path)
    results = _round_to_float16(weights) if float16 else {}
    files = _example_files(weights)
    properties: list[dict[str, Any]] = []
    if format == "safetensors":
        files["config.yaml"] = weights.experiment.to_yaml().encode()
        # One text, since the order of several is random.
        metadata = {
            "config": weights.experiment.to_yaml(),
            "input_shape": list(weights.image_shape),
            "dataset": describe_dataset(weights.experiment.dataset, weights.info),
            "modules": list(weights.modules),
        }
        files[WEIGHTS_FILE] = to_safetensors(weights.network, {"linflab": json.dumps(metadata)}, float16)
    else:
        model = build_onnx(weights.network, weights.image_shape).SerializeToString()
        if format == "torchscript":
            files["model.torchscript.pt"] = to_torchscript(model, weights.image_shape)
        else:
            files[MODEL_FILE] = model
        if format == "vnnlib":
            property_files, properties = _property_files(weights, images)
            files |= property_files
    manifest = _manifest(weights, storage, run) | {"format": format, "properties": properties, "float16": float16}
    manifest |= results
    manifest["files"] = {
        name: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)} for name, content in files.items()
    }
    files[MANIFEST_FILE] = (json.dumps(manifest, indent=1) + "\n").encode()
    return write_folder(output_dir, files)


def _round_to_float16(weights: Weights) -> dict[str, Any]:
    """Round the tensors of a network to float16, in place, and return its results on the test set.

    Raises:
        InputError: If the test set is not found, a tensor exceeds float16, or a certified image is attacked
            successfully.
    """
    experiment, network = weights.experiment, weights.network
    test = load_matching_dataset(weights).test
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(tensor.half())
                if not bool(tensor.isfinite().all()):
                    raise InputError(f"float16: {name} has values above 65504; export without --float16")
    spec = evaluation_spec(experiment, network, with_attacks=True)
    (accuracies,) = evaluate(network, test, spec, experiment.evaluation.batch_size)
    if violations := accuracies.certificate_violations:
        raise InputError(f"float16: attacks succeeded on {violations} certified images; export without --float16")
    return {
        "clean": accuracies.clean,
        "robust": accuracies.robust,
        "certified": accuracies.certified,
        "certifier": spec.certificate,
    }


def _example_files(weights: Weights) -> dict[str, bytes]:
    """Return random images and their logits as .npy files."""
    images = torch.rand(EXAMPLES, *weights.image_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), strict_float32():
        logits = weights.network(images)
    return {"example_input.npy": _to_npy(images), "example_output.npy": _to_npy(logits)}


def _to_npy(values: Tensor) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values.numpy())
    return buffer.getvalue()


def _property_files(weights: Weights, images: PropertyImages) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    """Return VNN-LIB files and their list in the format of VNN-COMP, and descriptions of the properties.

    Raises:
        InputError: If the dataset is not found, or has other images than the network expects, or a position is beyond
            its end.
    """
    experiment = weights.experiment
    eps = experiment.eps if images.eps is None else images.eps
    test = load_matching_dataset(weights).test
    if not images.positions or max(images.positions) >= len(test):
        raise InputError(
            f"images={max(images.positions, default='')}: must be positions in the test set of {experiment.dataset}, "
            f"from 0 to {len(test) - 1}; use --images 0,1,2 or a number of images"
        )
    batch, labels = test.batch(torch.tensor(images.positions))
    with torch.no_grad(), strict_float32():
        predictions = weights.network(batch).argmax(dim=1).tolist()
    box = perturbation_box(batch, eps)
    files: dict[str, bytes] = {}
    descriptions = []
    for row, (position, label) in enumerate(zip(images.positions, labels.tolist(), strict=True)):
        name = f"image_{position}.vnnlib"
        comment = f"Test image {position} of {experiment.dataset}, class {label}, l_inf radius {eps!r}"
        part = Box(box.lower[row], box.upper[row])
        files[name] = format_robustness(part, label, weights.info.classes, comment).encode()
        is_correct = predictions[row] == label
        descriptions.append({"file": name, "image": position, "label": label, "eps": eps, "is_correct": is_correct})
    lines = [f"{MODEL_FILE},{one['file']},{INSTANCE_TIMEOUT_S}" for one in descriptions]
    files["instances.csv"] = ("\n".join(lines) + "\n").encode()
    return files, descriptions


def _manifest(weights: Weights, storage: Storage | None, run: str) -> dict[str, Any]:
    """Return a description of the network; results are null for weights without a run."""
    tags: dict[str, str] = {}
    metrics: dict[str, float] = {}
    if storage is not None:
        data = read_run(client_of(storage), run).data
        tags, metrics = data.tags, data.metrics
    return {
        "run": run or None,
        "name": tags.get(schema.NAME),
        "dataset": weights.experiment.dataset,
        "input_shape": list(weights.image_shape),
        "classes": weights.info.classes,
        "eps": weights.experiment.eps,
        "clean": metrics.get(schema.TEST_CLEAN),
        "robust": metrics.get(schema.TEST_ROBUST),
        "certified": metrics.get(schema.TEST_CERTIFIED),
        "certifier": tags.get(schema.CERTIFIER),
        "attacks": tags.get(schema.ATTACK),
        "selection": tags.get(schema.SELECTION),
        "commit": tags.get(schema.COMMIT),
        "versions": tags.get(schema.VERSIONS),
        "exported_by": {"commit": git_commit() or None, "versions": package_versions("onnx", "safetensors")},
    }
