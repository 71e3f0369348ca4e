"""Fuzz tests of all parsers of user files and text: they read mutated valid inputs or raise InputError.

The command reports an InputError in one line with exit status 2. Rejected inputs leave no partial output, no input
takes long, and memory is bounded.

LINFLAB_FUZZ_SECONDS sets the time for each parser (default 10), LINFLAB_FUZZ_SEED the seed of the inputs (default 0).
"""

import copy
import gzip
import io
import json
import math
import os
import random
import resource
import struct
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from linflab.platform.cli.options import read_space
from linflab.platform.cluster import head as cluster
from linflab.platform.config.experiment import ExperimentConfig
from linflab.platform.config.overrides import build_config, load_config, read_recipe, recipe_names
from linflab.platform.config.recipes import recipe_files
from linflab.platform.data.datasets import list_datasets, load_dataset, prepare_dataset
from linflab.platform.data.images import read_images
from linflab.platform.errors import InputError
from linflab.platform.results.report import load_table_definition
from linflab.platform.sweeps.plan import SweepPlan, parse_search_options, plan_sweep
from linflab.platform.tracking.export import HEADER, read_exported_runs, to_dataframe
from linflab.platform.tracking.storage import Storage
from linflab.platform.training.checkpoints import CheckpointStore
from linflab.platform.training.fit import fit
from linflab.platform.training.published_weights import import_weights
from linflab.platform.training.resume import restore
from linflab.platform.training.trainer import Trainer
from linflab.platform.training.weights import build_network, load_network, save_weights
from linflab.reports.papers import list_tables
from linflab.search_spaces.space import SPACES_DIR as SPACES
from linflab.search_spaces.space import space_names
from tests.conftest import RECIPE, time_limit

pytestmark = pytest.mark.slow

SECONDS = float(os.environ.get("LINFLAB_FUZZ_SECONDS", "10"))
SEED = int(os.environ.get("LINFLAB_FUZZ_SEED", "0"))
MAX_INPUT_SECONDS = 60.0  # for one input, on a busy machine
MAX_ADDED_BYTES = 2**30  # of peak memory, by reading inputs

ROOT = Path(__file__).parents[2]
WORDS = [
    "null",
    "~",
    "true",
    "no",
    "-1",
    "0",
    "1",
    "3.5",
    "1e999",
    "-.inf",
    ".nan",
    "nan",
    "8/255",
    "1/0",
    "0x10",
    "0o7",
]
WORDS += [
    "[]",
    "{}",
    "[1, 2]",
    "{a: 1}",
    "''",
    '"\\u202e"',
    "é𝒳☃",
    "\x1b[31m",
    "[/red]",
    "a" * 3000,
    "9" * 90,
    "9" * 5000,
]
WORDS += [
    "!!python/name:os.system",
    "&a",
    "*a",
    "- x",
    "x: y",
    "? [1]",
    "---",
    "...",
    "#",
    "%",
    "@",
    "`",
    "|",
    ">",
    "\t",
]
WORDS += [
    "2020-01-01",
    "1:30",
    "\x00",
    "\ufeff",
    "../../etc/passwd",
    "/dev/zero",
    "/dev/stdin",
    "1_000",
    "1000000000000",
]
VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    7,
    10**6,
    10**12,
    2**63,
    -(2**63),
    10**30,
    0.5,
    -0.5,
    1e-300,
    1e308,
]
VALUES += [math.inf, -math.inf, math.nan, "", "x", "8/255", "1/0", "\x00", "é𝒳", "a" * 5000, "0.1", [], [1], [None]]
VALUES += [{}, {"kind": "hinge"}, {"a": {"b": 1}}, [[1], {"x": 2}], "linf_dist_mlp", "conv_net", "digits", ".."]


def mutate_bytes(rng: random.Random, valid: Sequence[bytes]) -> bytes:
    """Return a valid input with a few parts changed, deleted, duplicated or taken from another one."""
    content = bytearray(rng.choice(valid))
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        position, size = rng.randrange(len(content) + 1), rng.choice([1, 1, 2, 4, 8, 50])
        match rng.randrange(7):
            case 0:
                content[position : position + 1] = bytes([rng.randrange(256)])
            case 1:
                content[position : position + size] = rng.choice([b"\0", b"\xff", b"\x7f"]) * size
            case 2:
                content[position:position] = rng.randbytes(size)
            case 3:
                del content[position : position + size]
            case 4:
                content[position:position] = content[position : position + size]
            case 5:
                other = rng.choice(valid)
                start = rng.randrange(len(other) + 1)
                content[position : position + size] = other[start : start + size]
            case 6 if rng.random() < 0.2:
                del content[position:]
    return bytes(content)


def mutate_text(rng: random.Random, valid: Sequence[bytes]) -> bytes:
    """Return a valid text with words or lines replaced, duplicated or deleted."""
    if rng.random() < 0.3:
        return mutate_bytes(rng, valid)
    lines = rng.choice(valid).decode().split("\n")
    for _ in range(rng.choice([1, 1, 2, 5])):
        index = rng.randrange(len(lines))
        match rng.randrange(5):
            case 0 | 1:
                words = lines[index].split(" ")
                words[rng.randrange(len(words))] = rng.choice(WORDS)
                lines[index] = " ".join(words)
            case 2:
                lines.insert(index, rng.choice(rng.choice(valid).decode().split("\n")))
            case 3:
                lines[index] = "  " * rng.randrange(3) + lines[index].strip()
            case 4 if len(lines) > 1:
                del lines[index]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def mutate_tree(rng: random.Random, tree: Any) -> Any:
    """Return plain data with some of its values replaced, deleted or added."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice([1, 1, 2, 3])):
        node = tree
        while isinstance(node, dict | list) and node:
            key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
            if isinstance(node[key], dict | list) and node[key] and rng.random() < 0.8:
                node = node[key]
                continue
            match rng.randrange(6):
                case 0 if isinstance(node, dict):
                    del node[key]
                case 1 if isinstance(node, dict):
                    node[rng.choice(["", "x", "kind", "\x00", "é", "eps", "width"])] = rng.choice(VALUES)
                case _:
                    node[key] = copy.deepcopy(rng.choice(VALUES))
            break
    return tree


@contextmanager
def limit_memory() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < MAX_ADDED_BYTES


def fuzz(make: Callable[[random.Random], Any], read: Callable[[Any], object], seconds: float = SECONDS) -> None:
    """Make inputs and read them for some time; each must be read, or rejected with a short error."""
    rng, deadline, count, rejected = random.Random(SEED), time.monotonic() + seconds, 0, 0
    with limit_memory():
        while time.monotonic() < deadline or count < 20:
            content = make(rng)
            try:
                with time_limit(MAX_INPUT_SECONDS):
                    read(content)
            except InputError as error:
                rejected += 1
                assert 0 < len(str(error)) < 3000, repr(content)[:2000]
            except (Exception, pytest.fail.Exception) as error:
                raise AssertionError(f"seed {SEED}, input {count}: {content!r:.3000}") from error
            count += 1
    print(f"{count} inputs, {rejected} rejected")
    assert rejected


def make_file_reader(path: Path, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    """Return a function that writes bytes to this file and reads it."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def reader(content: bytes) -> object:
        path.write_bytes(content)
        return read(path)

    return reader


def check_experiment(experiment: ExperimentConfig) -> None:
    """Check that a config survives YAML and can be hashed and flattened."""
    assert build_config(yaml.safe_load(experiment.to_yaml()), {}) == experiment
    assert experiment.config_hash() and experiment.to_flat_dict()


def test_recipes_are_read_or_rejected(tmp_path: Path) -> None:
    valid = [path.read_bytes() for path in recipe_files().values()]
    read = make_file_reader(tmp_path / "own.yaml", lambda path: check_experiment(load_config(str(path))))
    fuzz(lambda rng: mutate_text(rng, valid), read)


def test_setting_trees_are_read_or_rejected(tmp_path: Path) -> None:
    trees = [read_recipe(name) for name in recipe_names()]
    trees += [load_config(name).model_dump(mode="json") for name in recipe_names()]
    fuzz(
        lambda rng: mutate_tree(rng, rng.choice(trees)),
        lambda tree: check_experiment(build_config(tree, {})),
    )


def test_overrides_are_read_or_rejected() -> None:
    names = [
        *load_config(RECIPE).to_flat_dict(),
        "model",
        "objective",
        "training",
        "model.kind",
        "",
        ".",
        "model.",
        "a.b.c",
    ]

    def make(rng: random.Random) -> list[str]:
        texts = []
        for _ in range(rng.choice([1, 1, 2, 4])):
            value = rng.choice(WORDS) if rng.random() < 0.7 else json.dumps(rng.choice(VALUES))
            texts.append(f"{rng.choice(names)}={value}")
        if rng.random() < 0.2:
            texts.append(mutate_bytes(rng, [b"model.width=128", b"eps=8/255"]).decode("utf-8", "replace"))
        return texts

    fuzz(make, lambda texts: check_experiment(load_config(RECIPE, texts)))


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
SETTINGS = [*load_config(RECIPE).to_flat_dict(), "model", "objective", "training"]


@settings(max_examples=max(50, int(20 * SECONDS)), suppress_health_check=list(HealthCheck))
@given(changes=st.dictionaries(st.sampled_from(SETTINGS) | st.text(max_size=10), PLAIN, max_size=3))
def test_any_setting_value_is_read_or_rejected(changes: dict[str, Any]) -> None:
    with suppress(InputError):
        check_experiment(build_config(read_recipe(RECIPE), changes))


@settings(max_examples=max(50, int(20 * SECONDS)), suppress_health_check=list(HealthCheck))
@given(text=st.text(max_size=100))
def test_any_override_text_is_read_or_rejected(text: str) -> None:
    for override in (text, f"model.width={text}", f"objective={text}"):
        with suppress(InputError):
            check_experiment(load_config(RECIPE, [override]))


def test_spaces_are_read_or_rejected(tmp_path: Path) -> None:
    valid = [(SPACES / f"{name}.yaml").read_bytes() for name in space_names()]
    for name in space_names():  # included by other spaces
        (tmp_path / f"{name}.yaml").write_bytes((SPACES / f"{name}.yaml").read_bytes())
    base = load_config(RECIPE)

    def read(path: Path) -> None:
        space = read_space(str(path))
        space.model_dump_json()
        [str(distribution) for distribution in space.parameters.values()]
        search = parse_search_options("20")
        plan_sweep(RECIPE, [], str(path), "name", search, load_dataset(base.dataset))

    fuzz(lambda rng: mutate_text(rng, valid), make_file_reader(tmp_path / "own.yaml", read))


def test_tables_are_read_or_rejected(tmp_path: Path) -> None:
    valid = [(ROOT / "reports" / "papers" / f"{name}.yaml").read_bytes() for name in list_tables()]
    read = make_file_reader(tmp_path / "own.yaml", lambda path: load_table_definition(str(path)))
    fuzz(lambda rng: mutate_text(rng, valid), read)


def test_cluster_files_are_read_or_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINFLAB_CLUSTER", str(tmp_path / "cluster.yaml"))
    valid = [(ROOT / name).read_bytes() for name in ("cluster.yaml", "cluster.local.yaml")]
    read = make_file_reader(tmp_path / "cluster.yaml", lambda path: cluster.cluster_file())
    fuzz(lambda rng: mutate_text(rng, valid), read)


def test_sweep_plans_are_read_or_rejected(tmp_path: Path) -> None:
    storage = Storage.from_path(tmp_path)
    plan = plan_sweep(RECIPE, ["seed=3"], "demo", "one", parse_search_options("20"), load_dataset("digits"))
    plan.save(storage)
    path = storage.sweeps / "one" / "sweep.yaml"
    valid = path.read_bytes()

    def make(rng: random.Random) -> bytes:
        if rng.random() < 0.5:
            return mutate_text(rng, [valid])
        return yaml.safe_dump(mutate_tree(rng, yaml.safe_load(valid))).encode()

    fuzz(make, make_file_reader(path, lambda path: SweepPlan.load(storage, "one")))


def test_exported_runs_are_read_or_rejected(tmp_path: Path) -> None:
    lines = (ROOT / "reports" / "papers" / "measured.jsonl").read_text().splitlines()[1:9]
    trees = [json.loads(line) for line in lines]

    def make(rng: random.Random) -> bytes:
        if rng.random() < 0.4:
            return mutate_text(rng, ["\n".join([HEADER, *lines[:3], ""]).encode()])
        return "\n".join([HEADER, *(json.dumps(mutate_tree(rng, tree)) for tree in rng.sample(trees, 2))]).encode()

    fuzz(make, make_file_reader(tmp_path / "records.jsonl", lambda path: to_dataframe(read_exported_runs(path))))


def save_to_bytes(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def mutate_tensors(rng: random.Random, content: Any) -> Any:
    """Return a tree of plain data and tensors with some of them replaced."""
    content = copy.deepcopy(content)
    for _ in range(rng.choice([1, 1, 2])):
        node = content
        while isinstance(node, dict | list) and node:
            key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
            if isinstance(node[key], dict | list) and node[key] and rng.random() < 0.8:
                node = node[key]
                continue
            node[key] = mutate_leaf(rng, node[key])
            if isinstance(node, dict) and rng.random() < 0.2:
                del node[key]
            break
    return content


def mutate_leaf(rng: random.Random, leaf: Any) -> Any:
    if isinstance(leaf, str) and rng.random() < 0.7:
        return mutate_text(rng, [leaf.encode()]).decode("utf-8", "replace")
    is_plain = isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided and leaf.device.type == "cpu"
    if not is_plain or leaf.numel() > 10**6 or rng.random() < 0.2:
        return copy.deepcopy(rng.choice(VALUES))
    return rng.choice(
        [
            leaf.new_zeros(leaf.shape[1:]),
            leaf[..., None],
            leaf.double(),
            leaf.to(torch.int64),
            leaf.to(torch.complex64),
            torch.full_like(leaf, math.nan if leaf.is_floating_point() else -1),
            torch.full_like(leaf, -1),
            torch.zeros_like(leaf),
            leaf.new_zeros(1).expand(10**6, 10**6),
            leaf.to_sparse() if leaf.ndim else leaf.new_zeros(0),
            leaf.to("meta"),
        ]
    )


def test_weights_are_read_or_rejected(tmp_path: Path) -> None:
    experiment = load_config(RECIPE, ["model.width=8"])
    save_weights(tmp_path / "w.pt", build_network(experiment), experiment, 3)
    valid = (tmp_path / "w.pt").read_bytes()
    content = torch.load(tmp_path / "w.pt", weights_only=True)

    def make(rng: random.Random) -> bytes:
        if rng.random() < 0.4:
            return mutate_bytes(rng, [valid])
        return save_to_bytes(mutate_tensors(rng, content))

    fuzz(make, make_file_reader(tmp_path / "w.pt", load_network))


def test_published_weights_are_read_or_rejected(tmp_path: Path) -> None:
    experiment = load_config(RECIPE, ["model.width=8", "model.depth=2"])
    shapes = {"fc_dist.0.weight": (8, 64), "fc_dist.1.weight": (10, 8), "fc_dist.1.bias": (10,)}
    shapes |= {"fc_dist.0.mean_shift.running_mean": (8,)}
    content = {"state_dict": {name: torch.randn(shape) for name, shape in shapes.items()}}

    def make(rng: random.Random) -> bytes:
        if rng.random() < 0.4:
            return mutate_bytes(rng, [save_to_bytes(content)])
        return save_to_bytes(mutate_tensors(rng, content))

    output = tmp_path / "out" / "weights.pt"

    def read(path: Path) -> None:
        output.unlink(missing_ok=True)
        try:
            import_weights(path, experiment, output)
        except InputError:
            assert not output.parent.exists() or not list(output.parent.iterdir())  # no partial output
            raise

    read_bytes = make_file_reader(tmp_path / "in" / "w.pt", read)
    read_bytes(save_to_bytes(content))
    fuzz(make, read_bytes)


def test_checkpoints_are_resumed_or_rejected(tmp_path: Path) -> None:
    settings = ["model.width=8", "model.depth=2", "training.epochs=2", "training.batch_size=200"]
    experiment = load_config(RECIPE, [*settings, "training.checkpoint_interval=1"])
    dataset, checkpoints = load_dataset("digits"), CheckpointStore(tmp_path / "run")
    fit(experiment, dataset, checkpoints=checkpoints)
    valid = checkpoints.previous.read_bytes()
    content = torch.load(checkpoints.previous, weights_only=True)
    checkpoints.previous.unlink()

    def make(rng: random.Random) -> bytes:
        if rng.random() < 0.3:
            return mutate_bytes(rng, [valid])
        return save_to_bytes(mutate_tensors(rng, content))

    def read(path: Path) -> None:
        trainer = Trainer(experiment, dataset)
        position = restore(checkpoints.load(), trainer)
        trainer.step(min(position.batch, trainer.steps_per_epoch - 1), *trainer.epoch_order(position.epoch))

    fuzz(make, make_file_reader(checkpoints.latest, read))


def encode_image(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_images_are_read_or_rejected(tmp_path: Path) -> None:
    generator = np.random.RandomState(0)
    gray = Image.fromarray(generator.randint(0, 256, (8, 8), np.uint8))
    color = Image.fromarray(generator.randint(0, 256, (8, 8, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    valid = [
        encode_image(image, kind)
        for image in (gray, color)
        for kind in ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
    ]
    valid += [
        encode_image(gray, "PNG", exif=exif),
        encode_image(gray, "TIFF", exif=exif),
        encode_image(color, "JPEG", exif=exif),
    ]
    valid += [
        encode_image(gray, "GIF", save_all=True, append_images=[color]),
        encode_image(color.quantize(4), "PNG", transparency=0),
    ]
    valid += [
        encode_image(gray, "TIFF", compression="tiff_lzw"),
        encode_image(gray, "TIFF", compression="tiff_adobe_deflate"),
    ]
    read = make_file_reader(tmp_path / "image", lambda path: read_images(path, (1, 8, 8)))
    fuzz(lambda rng: mutate_bytes(rng, valid), read)


def make_array_files() -> list[bytes]:
    files = []
    generator = np.random.RandomState(0)
    for array in (
        generator.randint(0, 256, (20, 1, 8, 8), np.uint8),
        np.asfortranarray(generator.randint(0, 256, (3, 1, 8, 8), np.uint8)),
        generator.rand(1, 8, 8),
        np.arange(20) % 3,
    ):
        file = io.BytesIO()
        np.save(file, array)
        files.append(file.getvalue())
    file = io.BytesIO()
    np.savez(file, array)
    return [*files, file.getvalue()]


def test_arrays_are_read_or_rejected(tmp_path: Path) -> None:
    valid = make_array_files()
    read = make_file_reader(tmp_path / "image.npy", lambda path: read_images(path, (1, 8, 8)))
    fuzz(lambda rng: mutate_bytes(rng, valid), read)


@pytest.mark.parametrize("file", ["train_images", "train_labels", "test_images", "test_labels"])
def test_datasets_are_read_or_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    monkeypatch.setenv("LINFLAB_DATA", str(tmp_path))
    images, _, _, labels, archive = make_array_files()
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        make_file_reader(tmp_path / "mine" / f"{name}.npy", lambda path: None)(images if "images" in name else labels)
    load_dataset("mine")

    def read(path: Path) -> None:
        assert "mine" in {entry.name for entry in list_datasets()}
        data = load_dataset("mine")
        data.train.batch(torch.arange(len(data.train)))

    valid = [images if "images" in file else labels, archive]
    fuzz(lambda rng: mutate_bytes(rng, valid), make_file_reader(tmp_path / "mine" / f"{file}.npy", read), SECONDS / 4)


def test_raw_files_are_prepared_or_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rejected files leave nothing in the folder of datasets."""
    monkeypatch.setenv("LINFLAB_DATA", str(tmp_path / "data"))
    source = tmp_path / "source"
    source.mkdir()
    for split in ("train", "t10k"):
        (source / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, 9, 28, 28) + bytes(9 * 784))
        (source / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, 9) + bytes(9))
    images = [(source / "train-images-idx3-ubyte").read_bytes(), gzip.compress(bytes(2000))]
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("t/wnids.txt", "n1\nn2\n")
        file.writestr("t/val/val_annotations.txt", "a.JPEG\tn1\t0\t0\t1\t1\n")
        for name in ("t/val/images/a.JPEG", "t/train/n1/x.JPEG", "t/train/n2/y.JPEG"):
            file.writestr(name, encode_image(Image.new("RGB", (64, 64)), "JPEG"))

    def make(rng: random.Random) -> tuple[str, bytes]:
        if rng.random() < 0.5:
            name = rng.choice(["train-images-idx3-ubyte", "train-images-idx3-ubyte.gz"])
            content = mutate_bytes(rng, images)
            return name, gzip.compress(content) if name.endswith("gz") and rng.random() < 0.5 else content
        return "tiny-imagenet-200.zip", mutate_bytes(rng, [archive.getvalue()])

    def read(named: tuple[str, bytes]) -> None:
        name, content = named
        (source / name).write_bytes(content)
        try:
            prepare_dataset("tiny_imagenet" if "imagenet" in name else "mnist", source)
        except InputError:
            assert not list((tmp_path / "data").iterdir())  # even intact files have too few images
            raise

    fuzz(make, read)
