"""Tests of ONNX files: other tools compute the same logits, and so does the network read from the file."""

import io
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto
from torch import Tensor, nn

from linflab.models.networks import NetworkConfig
from linflab.models.networks.layers import LpDistance, LpDistanceConv2d, Normalize, SortDistance
from linflab.models.networks.universal import Form, approximate
from linflab.models.robustness.bounds import Box, crown_bounds, ibp_bounds, perturbation_box
from linflab.models.robustness.certification import certify
from linflab.models.robustness.verification import verify
from linflab.platform.errors import InputError
from linflab.platform.exchange.onnx_reader import import_onnx, read_onnx
from linflab.platform.exchange.onnx_writer import build_onnx
from linflab.platform.exchange.torch_formats import to_torchscript
from linflab.platform.exchange.vnnlib import format_robustness, parse_property
from tests.conftest import assert_rejected
from tests.models.conformance.cases import (
    CLASSES,
    LARGE_KINDS,
    SHAPE,
    build_network,
    fit_briefly,
    list_network_configs,
    make_labeled_images,
)  # fmt: skip
from tests.models.own_networks import BODIES, LAYERS, build_own_network
from tests.platform.exchange.models import make_model


def run_onnxruntime(content: bytes, images: Tensor) -> Tensor:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])


def assert_same(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("form", ["shallow", "deep"])
def test_approximating_nets_make_a_round_trip(form: Form) -> None:
    network = approximate(lambda x: torch.stack([x.mean(dim=1), -x[:, 0]], dim=1), [0, 0], [1, 1], 0.2, form).float()
    content, images = build_onnx(network, (1, 1, 2)).SerializeToString(), torch.rand(7, 1, 1, 2)
    with torch.no_grad():
        assert_same(run_onnxruntime(content, images), network(images))
        assert_same(import_onnx(content, "model.onnx")(images), network(images))


@pytest.mark.parametrize("config", list_network_configs())
def test_every_network_makes_a_round_trip(config: NetworkConfig) -> None:
    """The batch size is dynamic, and the plain network of TorchScript files has the same logits, too."""
    network = build_network(config)
    content = build_onnx(network, SHAPE).SerializeToString()
    read = import_onnx(content, "model.onnx")
    plain = torch.jit.load(io.BytesIO(to_torchscript(content, SHAPE)))
    assert read.input_shape == SHAPE and read.output_shape == (CLASSES,)
    for count in (1, 5):
        images = torch.rand(count, *SHAPE)
        with torch.no_grad():
            logits = network(images)
            assert_same(run_onnxruntime(content, images), logits)
            assert_same(read(images), logits)
            assert_same(plain(images), logits)
    operators = [node.op_type for node in onnx.load_model_from_string(content).graph.node]
    assert "BatchNormalization" not in operators and operators[0] in ("Sub", "Reshape")  # normalization comes first
    own = (LpDistance, LpDistanceConv2d, SortDistance)
    kinds = [{type(layer) for layer in one.modules() if isinstance(layer, own)} for one in (network, read)]
    assert kinds[0] == kinds[1]  # distance layers are read as such


def list_property_configs() -> list[Any]:
    """Return configurations whose properties are quick to verify; those with many convolutions are slow tests."""
    quick = ("linf_dist_mlp", "sort_net", "group_sort", "conv_net", "linf_dist_hybrid-linf_dist_mlp")
    return [
        pytest.param(*case.values, id=case.id, marks=[] if case.id in quick else pytest.mark.slow)
        for case in list_network_configs()
        if case.values[0].kind not in LARGE_KINDS
    ]


@pytest.mark.parametrize("config", list_property_configs())
def test_properties_are_answered_as_by_the_certifier(config: NetworkConfig) -> None:
    """The answers for 20 images at several eps are those of the network itself; counterexamples are real."""
    network = build_network(config)
    fit_briefly(network)
    images, _ = make_labeled_images(20)
    with torch.no_grad():
        labels = network(images).argmax(dim=1)
    labels[3] = (labels[3] + 1) % CLASSES
    read = import_onnx(build_onnx(network, SHAPE).SerializeToString(), "model.onnx")
    has_crown = config.has_relu or (config.has_distances and not config.is_lipschitz)
    answers = []
    for first, eps in enumerate((0.0, 0.005, 0.02, 0.08, 0.3)):
        positions = range(first, 20, 5)
        for certifier in ("crown",) if has_crown else ("ibp", "lipschitz"):
            certificates = certify(network, images[first::5], labels[first::5], eps, certifier).tolist()
            for position, is_certified in zip(positions, certificates, strict=True):
                box = perturbation_box(images[position : position + 1], eps)
                part = Box(box.lower[0], box.upper[0])
                goal = parse_property(format_robustness(part, int(labels[position]), CLASSES, "test"), "test.vnnlib")
                verdict = verify(read, goal.regions, SHAPE, "auto" if certifier == "lipschitz" else certifier)
                # IBP is at least as tight as the Lipschitz constant.
                assert (verdict.answer == "unsat") >= is_certified
                assert certifier == "lipschitz" or (verdict.answer == "unsat") == is_certified
                answers.append(verdict.answer)
                if verdict.answer == "sat":
                    point = verdict.inputs.view(1, *SHAPE)
                    assert (point >= box.lower).all() and (point <= box.upper).all()
                    with torch.no_grad():
                        assert int(network(point).argmax()) != labels[position] or eps == 0
    assert {"sat", "unsat"} <= set(answers)


@pytest.mark.parametrize("name", [*BODIES, *LAYERS], ids=lambda name: name.replace(" ", "_"))
def test_own_networks_make_a_round_trip_or_are_rejected(name: str) -> None:
    """Layers of users are written and read back, with the same bounds; those without ONNX form are named."""
    network = build_own_network(name)
    try:
        content = build_onnx(network, SHAPE).SerializeToString()
    except InputError as error:
        assert name in ("average pooling with a divisor", "averages with ceiled windows") or "uneven" in name
        assert str(error).startswith("layer=A")
        return
    images = torch.rand(3, *SHAPE)
    with torch.no_grad():
        logits = network(images.clone())
        assert_same(run_onnxruntime(content, images), logits)
        if {node.op_type for node in onnx.load_model_from_string(content).graph.node} & {"Erf"} or name == "SiLU":
            with pytest.raises(InputError, match=r"Erf|Mul"):
                import_onnx(content, "model.onnx")
            return
        read = import_onnx(content, "model.onnx")
        assert_same(read(images), logits)
        box = perturbation_box(images, 0.02)
        for bounds in (ibp_bounds, crown_bounds):
            for one, other in zip(bounds(network, box, sound=False), bounds(read, box, sound=False), strict=True):
                assert_same(one, other, 1e-4)


def arrays(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def integers(**values: Any) -> dict[str, np.ndarray]:
    return {name: np.array(value, np.int64) for name, value in values.items()}


MAP = [1, 2, 6, 6]
MODELS: dict[str, bytes] = {
    "ACAS Xu": make_model(
        [("Sub", ["x", "m"], ["a"], {}), ("Flatten", ["a"], ["b"], {"axis": 1}), ("MatMul", ["b", "w"], ["c"], {}),
         ("Add", ["c", "d"], ["e"], {}), ("Relu", ["e"], ["f"], {}), ("MatMul", ["f", "v"], ["y"], {})],
        [1, 1, 1, 5], arrays(m=(1, 1, 1, 5), w=(5, 7), d=(7,), v=(7, 4))),
    "fixed batch in Reshape": make_model(
        [("Reshape", ["x", "s"], ["a"], {}),
         ("Gemm", ["a", "w", "b"], ["y"], {"alpha": 0.5, "beta": 2.0, "transB": 1})],
        MAP, {**arrays(w=(3, 72), b=(3,)), **integers(s=[1, -1])}),
    "shape at run time": make_model(
        [("Shape", ["x"], ["s"], {}), ("Gather", ["s", "i"], ["n"], {"axis": 0}), ("Unsqueeze", ["n", "z"], ["u"], {}),
         ("Concat", ["u", "r"], ["t"], {"axis": 0}), ("Reshape", ["x", "t"], ["a"], {}),
         ("MatMul", ["a", "w"], ["y"], {})],
        ["N", 2, 6, 6], {**arrays(w=(72, 3)), **integers(i=0, z=[0], r=[72])}),
    "pads on one side": make_model(
        [("Conv", ["x", "w"], ["a"], {"auto_pad": "SAME_UPPER", "strides": [1, 2], "group": 2}),
         ("MaxPool", ["a"], ["b"], {"kernel_shape": [3, 2], "strides": [2, 2], "ceil_mode": 1}),
         ("LeakyRelu", ["b"], ["c"], {"alpha": 0.2}), ("Flatten", ["c"], ["y"], {})], MAP, arrays(w=(4, 1, 2, 2))),
    "average pooling": make_model(
        [("AveragePool", ["x"], ["a"], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
         ("AveragePool", ["a"], ["b"], {"kernel_shape": [2, 2], "ceil_mode": 1, "strides": [2, 2]}),
         ("Sigmoid", ["b"], ["c"], {}), ("GlobalAveragePool", ["c"], ["d"], {}), ("Squeeze", ["d", "s"], ["y"], {})],
        MAP, integers(s=[2, 3])),
    "old operators": make_model(
        [("Unsqueeze", ["x"], ["a"], {"axes": [1]}), ("Squeeze", ["a"], ["b"], {"axes": [1]}),
         ("Pad", ["b"], ["c"], {"pads": [0, 0, 1, 0, 0, 0, 0, 2]}), ("Clip", ["c"], ["d"], {"min": 0.1, "max": 0.8}),
         ("Dropout", ["d"], ["e"], {"ratio": 0.3}), ("ReduceMean", ["e"], ["f"], {"axes": [2]}),
         ("Slice", ["f"], ["g"], {"axes": [3], "starts": [1], "ends": [-1]}), ("Flatten", ["g"], ["y"], {})],
        MAP, opset=8),
    "batch normalization": make_model(
        [("BatchNormalization", ["x", "a", "b", "m", "v"], ["c"], {"epsilon": 1e-3}), ("Tanh", ["c"], ["d"], {}),
         ("Transpose", ["d"], ["e"], {"perm": [0, 2, 3, 1]}), ("ReduceMax", ["e"], ["f"], {"axes": [3], "keepdims": 0}),
         ("ReduceMin", ["f"], ["y"], {"axes": [-1], "keepdims": 0})],
        MAP, {**arrays(a=(2,), b=(2,), m=(2,)), "v": np.array([0.3, 2.0], np.float32)}),
    "residual and concatenation": make_model(
        [("Conv", ["x", "w", "b"], ["a"], {"pads": [1, 1, 1, 1]}), ("Relu", ["a"], ["r"], {}),
         ("Add", ["r", "x"], ["c"], {}),
         ("Concat", ["c", "x"], ["d"], {"axis": 1}), ("Neg", ["d"], ["e"], {}), ("Abs", ["e"], ["f"], {}),
         ("Sub", ["f", "d"], ["g"], {}), ("Gather", ["g", "i"], ["h"], {"axis": 1}), ("Flatten", ["h"], ["y"], {})],
        MAP, {**arrays(w=(2, 2, 3, 3), b=(2,)), **integers(i=[2, 0, -1])}),
    "largest values": make_model(
        [("Flatten", ["x"], ["a"], {}), ("TopK", ["a", "k"], ["y", "i"], {"axis": 1})], [1, 3, 2], integers(k=[4])),
    "constants": make_model(
        [("Constant", [], ["c"], {"value_float": 3.0}), ("Mul", ["c", "x"], ["a"], {}), ("Div", ["a", "d"], ["b"], {}),
         ("Sub", ["d", "b"], ["e"], {}), ("Identity", ["e"], ["f"], {}),
         ("Cast", ["f"], ["y"], {"to": TensorProto.FLOAT})],
        [1, 4], arrays(d=(4,))),
    "broadcast values": make_model(
        [("ReduceMax", ["x"], ["a"], {"axes": [1], "keepdims": 1}), ("Sub", ["x", "a"], ["b"], {}),
         ("Unsqueeze", ["b", "u"], ["c"], {}), ("Sub", ["c", "w"], ["d"], {}), ("Flatten", ["d"], ["y"], {})],
        [1, 2, 3], {**arrays(w=(4, 2, 3)), **integers(u=[1])}),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_models_of_other_tools_are_read(name: str) -> None:
    """The network has the outputs of onnxruntime, for any batch size, and sound bounds."""
    content = MODELS[name]
    network = import_onnx(content, "model.onnx")
    images = 2 * torch.rand(4, *network.input_shape) - 1
    expected = torch.cat([run_onnxruntime(content, image[None]) for image in images]).view(4, -1)
    with torch.no_grad():
        outputs = network(images)
        assert_same(outputs.flatten(1), expected)
        box = Box(images - 0.1, images + 0.1)
        lower, upper = ibp_bounds(network, box)
        points = images + 0.2 * torch.rand(50, *images.shape) - 0.1
        for point in points.clamp(box.lower, box.upper):
            assert (network(point) >= lower).all() and (network(point) <= upper).all()


REJECTED: dict[str, tuple[bytes, str]] = {
    "operator": (make_model([("Softmax", ["x"], ["y"], {})], [1, 4]), "Softmax"),
    "domain": (make_model([("Relu", ["x"], ["y"], {"domain": "other"})], [1, 4]), "Relu"),
    "product": (make_model([("Mul", ["x", "x"], ["y"], {})], [1, 4]), "Mul"),
    "product of matrices": (make_model([("MatMul", ["x", "x"], ["y"], {})], [1, 2, 2]), "MatMul"),
    "quotient": (make_model([("Div", ["c", "x"], ["y"], {})], [1, 4], arrays(c=(4,))), "Div"),
    "nonzero padding": (
        make_model([("Pad", ["x", "p", "v"], ["y"], {})], [1, 4], {**integers(p=[0, 1, 0, 1]), **arrays(v=())}), "Pad"),
    "moved batch": (make_model([("Transpose", ["x"], ["y"], {})], [1, 4]), "Transpose"),
    "reduced batch": (make_model([("ReduceMax", ["x"], ["y"], {})], [1, 4]), "ReduceMax"),
    "batch in shape": (make_model([("Reshape", ["x", "s"], ["y"], {})], [1, 4], integers(s=[4, 1])), "Reshape"),
    "wrong sizes": (make_model([("MatMul", ["x", "w"], ["y"], {})], [1, 4], arrays(w=(5, 2))), "MatMul"),
    "double": (make_model([("Relu", ["x"], ["y"], {})], [1, 4], kind=TensorProto.DOUBLE), "float32"),
    "double constant": (make_model([("Add", ["x", "c"], ["y"], {})], [1, 4], {"c": np.ones(4)}), "float64"),
    "no batch": (make_model([("Relu", ["x"], ["y"], {})], [4]), "batch"),
    "unknown size": (make_model([("Relu", ["x"], ["y"], {})], [1, "N"]), "batch"),
    "old": (make_model([("Relu", ["x"], ["y"], {})], [1, 4], opset=6), "opset"),
    "constant output": (make_model([("Identity", ["c"], ["y"], {})], [1, 4], arrays(c=(1, 4))), "output"),
    "indices": (make_model([("TopK", ["x", "k"], ["a", "y"], {})], [1, 4], integers(k=[2])), "model.onnx"),
    "empty": (b"", "ONNX"),
    "text": (b"(declare-const X_0 Real)", "ONNX"),
}  # fmt: skip


@pytest.mark.parametrize("name", REJECTED)
def test_unsupported_models_are_rejected_by_name(name: str) -> None:
    content, expected = REJECTED[name]
    with pytest.raises(InputError) as error:
        network = import_onnx(content, "model.onnx")
        verify(network, (), network.input_shape)  # a value without rules is found in tracing
        ibp_bounds(network, Box(*(torch.zeros(1, *network.input_shape),) * 2))
    assert_rejected(error, "model.onnx", expected)


BASE = MODELS["residual and concatenation"]


@settings(max_examples=60)
@given(position=st.integers(0, len(BASE) - 1), byte=st.integers(0, 255), length=st.integers(0, len(BASE)))
def test_damaged_models_are_rejected_in_one_line(position: int, byte: int, length: int) -> None:
    for content in (BASE[:position] + bytes([byte]) + BASE[position + 1 :], BASE[:length]):
        try:
            network = import_onnx(content, "model.onnx")
        except InputError as error:
            assert str(error).startswith("model.onnx") and "\n" not in str(error)
        else:
            assert network(torch.rand(2, *network.input_shape)).shape == (2, *network.output_shape)


def test_unreadable_files_are_rejected(tmp_path: Any) -> None:
    for path in (tmp_path, tmp_path / "none.onnx"):
        with pytest.raises(InputError) as error:
            read_onnx(path)
        assert_rejected(error, str(path))


def test_networks_without_onnx_form_are_rejected() -> None:
    for layer, name in ((nn.Softmax(dim=1), "Softmax"), (nn.AvgPool2d(2, 2, 1, True), "AvgPool2d")):
        network = nn.Sequential(Normalize((0.5, 0.5), 0.3), layer, nn.Flatten()).eval()
        with pytest.raises(InputError) as error:
            build_onnx(network, (2, 7, 7))
        assert_rejected(error, name)
