"""Fuzz tests of the parsers of ONNX and VNN-LIB files."""

import json
import random
import struct
from pathlib import Path

import onnx
import pytest
import torch
from onnx import AttributeProto

from linflab.platform.config.overrides import load_config
from linflab.platform.data.datasets import dataset_info
from linflab.platform.exchange.manifest import parse_manifest
from linflab.platform.exchange.onnx_reader import read_onnx
from linflab.platform.exchange.torch_formats import to_safetensors
from linflab.platform.exchange.vnnlib import read_property
from linflab.platform.training.weights import build_network, describe_dataset, load_weights
from tests.conftest import RECIPE
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


def test_safetensors_are_read_or_rejected(tmp_path: Path) -> None:
    experiment = load_config(RECIPE, ["model.width=4"])
    info = dataset_info("digits")
    header = {"config": experiment.to_yaml(), "dataset": describe_dataset("digits", info)}
    valid = to_safetensors(build_network(experiment, info), {"linflab": json.dumps(header)})

    (size,) = struct.unpack("<Q", valid[:8])  # of the header, a JSON text

    def make(rng: random.Random) -> bytes:
        if rng.random() < 0.5:
            return mutate_bytes(rng, [valid])
        text = mutate_text(rng, [valid[8 : 8 + size]])
        return struct.pack("<Q", len(text)) + text + valid[8 + size :]

    fuzz(make, make_file_reader(tmp_path / "model.safetensors", load_weights))


def test_manifests_are_read_or_rejected(tmp_path: Path) -> None:
    valid = json.dumps({"files": {"model.safetensors": {"sha256": "0" * 64, "bytes": 5}}, "format": "safetensors"})
    fuzz(
        lambda rng: mutate_text(rng, [valid.encode()]),
        make_file_reader(tmp_path / "manifest.json", lambda path: parse_manifest(path.read_bytes(), str(path))),
    )
