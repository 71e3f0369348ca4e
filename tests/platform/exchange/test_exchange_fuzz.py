"""Fuzz tests of the parsers of ONNX and VNN-LIB files."""

import random
from pathlib import Path

import onnx
import pytest
import torch
from onnx import AttributeProto

from linflab.platform.exchange.onnx_reader import read_onnx
from linflab.platform.exchange.vnnlib import read_property
from tests.platform.exchange.models import format_property
from tests.platform.exchange.test_onnx import MODELS
from tests.platform.exchange.test_vnnlib import FORMULAS, UNIT
from tests.platform.test_fuzz import fuzz, make_file_reader, mutate_bytes, mutate_text

pytestmark = pytest.mark.slow

NUMBERS = [-(2**63), -(10**6), -2, -1, 0, 1, 2, 3, 7, 10**5, 2**31, 2**63 - 1]


def mutate_model(rng: random.Random, content: bytes) -> bytes:
    """Return a model with attributes, constants, inputs or shapes of some nodes changed."""
    model = onnx.load_model_from_string(content)
    for _ in range(rng.choice([1, 1, 2, 4])):
        node = rng.choice(model.graph.node)
        match rng.randrange(6):
            case 0 if node.attribute:
                attribute = rng.choice(node.attribute)
                if attribute.type == AttributeProto.INT:
                    attribute.i = rng.choice(NUMBERS)
                elif attribute.type == AttributeProto.FLOAT:
                    attribute.f = rng.choice([-1.0, 0.0, 1e38, float("nan"), float("inf")])
                elif attribute.type == AttributeProto.INTS and attribute.ints:
                    attribute.ints[rng.randrange(len(attribute.ints))] = rng.choice(NUMBERS)
            case 1 if node.attribute:
                del node.attribute[rng.randrange(len(node.attribute))]
            case 2 if model.graph.initializer:
                tensor = rng.choice(model.graph.initializer)
                if tensor.dims:
                    tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(NUMBERS)
                tensor.raw_data = mutate_bytes(rng, [tensor.raw_data or b"\0"])
            case 3:
                node.op_type = rng.choice([one.op_type for one in rng.choice(list(PROTOS)).graph.node])
            case 4 if node.input:
                names = [name for one in model.graph.node for name in (*one.input, *one.output)]
                node.input[rng.randrange(len(node.input))] = rng.choice([*names, ""])
            case 5:
                dim = rng.choice(model.graph.input[0].type.tensor_type.shape.dim)
                dim.dim_value = rng.choice(NUMBERS)
    return model.SerializeToString()


PROTOS = [onnx.load_model_from_string(content) for content in MODELS.values()]


def test_models_are_read_or_rejected(tmp_path: Path) -> None:
    def make(rng: random.Random) -> bytes:
        content = rng.choice(list(MODELS.values()))
        return mutate_bytes(rng, [content]) if rng.random() < 0.3 else mutate_model(rng, content)

    def read(path: Path) -> None:
        network = read_onnx(path)
        with torch.no_grad():
            assert network(torch.rand(2, *network.input_shape)).shape == (2, *network.output_shape)

    fuzz(make, make_file_reader(tmp_path / "model.onnx", read))


def test_properties_are_read_or_rejected(tmp_path: Path) -> None:
    valid = [format_property(2, 2, *UNIT, formula).encode() for formula in FORMULAS]
    fuzz(lambda rng: mutate_text(rng, valid), make_file_reader(tmp_path / "p.vnnlib", read_property))
