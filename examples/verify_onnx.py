"""Verification of an ONNX model against a VNN-LIB property.

Run with your files, or without arguments for a small network and the robustness of one of its images:

    python examples/verify_onnx.py MODEL.onnx PROPERTY.vnnlib
"""

import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

import linflab
from linflab.models.robustness import perturbation_box
from linflab.models.robustness.bounds import Box
from linflab.platform.exchange.onnx_writer import build_onnx
from linflab.platform.exchange.vnnlib import format_robustness
from linflab.platform.results.verify import verify_files


def write_example(model: Path, *properties: tuple[Path, float]) -> None:
    """Write a small network, and for each eps the property that one certified image keeps its class."""
    digits = load_digits()
    images, labels = torch.tensor(digits.images / 16).float()[:, None], torch.tensor(digits.target)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    network = linflab.fit(network, (images[:1400], labels[:1400]), eps=0.05, epochs=15, batch_size=32).network
    certified = linflab.certify(network, images[1400:], labels[1400:], eps=0.05).certified
    chosen = 1400 + int(certified.nonzero()[0])
    model.write_bytes(build_onnx(network, (1, 8, 8)).SerializeToString())
    for path, eps in properties:
        box = perturbation_box(images[chosen : chosen + 1], eps)
        path.write_text(format_robustness(Box(box.lower[0], box.upper[0]), int(labels[chosen]), 10, f"eps {eps}"))


def main(arguments: list[str]) -> None:
    """Verify the files of the command line, or those of the example."""
    if arguments:
        model, *properties = map(Path, arguments)
    else:
        model, properties = Path("model.onnx"), [Path("small_eps.vnnlib"), Path("large_eps.vnnlib")]
        write_example(model, *zip(properties, (0.03, 0.4), strict=True))
    for path in properties:
        result = verify_files(model, path, certifier="auto", sound=True, timeout=60)
        print(f"{path.name}: {result.answer} by {result.certifier} in {result.seconds:.2f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
