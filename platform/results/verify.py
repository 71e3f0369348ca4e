"""Verification of VNN-LIB properties of ONNX models."""

import math
import time
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from linflab.models.robustness.verification import Answer, OutputBound, verify
from linflab.platform.errors import InputError
from linflab.platform.exchange.onnx_reader import read_onnx
from linflab.platform.exchange.vnnlib import format_counterexample, read_property


@dataclass(frozen=True)
class VerificationResult:
    """The answer to a property, in the words of VNN-COMP.

    Attributes:
        answer: `unsat` (the property holds), `sat` (a counterexample exists), `unknown` or `timeout`.
        certifier: Name of the certifier.
        seconds: Duration without reading the files.
        inputs: (D,) flattened inputs of the counterexample; None if the answer is not `sat`.
        outputs: (K,) outputs of the network for these inputs.
    """

    answer: Answer
    certifier: str
    seconds: float
    inputs: Tensor | None = None
    outputs: Tensor | None = None

    def to_text(self) -> str:
        """Return the answer, followed by the counterexample if there is one, as in result files of VNN-COMP."""
        if self.inputs is None or self.outputs is None:
            return f"{self.answer}\n"
        return f"{self.answer}\n{format_counterexample(self.inputs, self.outputs)}"

    def to_short_text(self, count: int = 8) -> str:
        """Return the answer, followed by the first inputs and all outputs of the counterexample if there is one."""
        if self.inputs is None or self.outputs is None or len(self.inputs) <= count:
            return self.to_text()
        lines = [f"{name}_{k} {value:.6g}" for name, part in (("X", self.inputs[:count]), ("Y", self.outputs))
                 for k, value in enumerate(part.tolist())]  # fmt: skip
        lines.insert(count, f"... {len(self.inputs) - count} more inputs")
        return "\n  ".join([self.answer, *lines]) + "\n"


def verify_files(model: Path, vnnlib: Path, certifier: str, sound: bool, timeout: float) -> VerificationResult:
    """Verify a VNN-LIB property of an ONNX model.

    Args:
        model: ONNX file.
        vnnlib: VNN-LIB file.
        certifier: Name of the certifier, or auto.
        sound: Whether `unsat` accounts for float32 rounding.
        timeout: Time limit in seconds, checked between computations.

    Raises:
        InputError: If a file cannot be read, model and property do not fit, an operator has no rule, or the certifier
            is not known or does not support the network.
        ModuleNotFoundError: If `onnx` is not installed.
    """
    if certifier not in OutputBound.registry:
        raise InputError(
            f"certifier={certifier}: is not supported for VNN-LIB properties; use {', '.join(OutputBound.registry)}"
        )
    if not 0 < timeout < math.inf:
        raise InputError(f"timeout={timeout:g}: must be a positive number of seconds; use --timeout 60")
    network, goal = read_onnx(model), read_property(vnnlib)
    sizes = math.prod(network.input_shape), math.prod(network.output_shape)
    if sizes != (goal.num_inputs, goal.num_outputs):
        raise InputError(
            f"vnnlib={vnnlib}: declares {goal.num_inputs} inputs and {goal.num_outputs} outputs, but {model} has "
            f"{sizes[0]} and {sizes[1]}; use the property of this model"
        )
    flat = network if len(network.output_shape) == 1 else nn.Sequential(network, nn.Flatten()).eval()
    start = time.monotonic()
    try:
        verdict = verify(
            flat, goal.regions, network.input_shape, certifier, sound, lambda: time.monotonic() - start > timeout
        )
    except (TypeError, ValueError) as error:
        raise InputError(f"{model}: {error}") from None
    return VerificationResult(verdict.answer, certifier, time.monotonic() - start, verdict.inputs, verdict.outputs)
