"""Tests of `linflab export`, and of `linflab certify` with ONNX models and VNN-LIB properties."""

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load as load_safetensors

import linflab
from linflab.models.robustness.certification import certify
from linflab.platform.cli import exchange
from linflab.platform.data.datasets import load_dataset
from linflab.platform.exchange.vnnlib import format_counterexample
from linflab.reports.terminal import PlainConsole
from tests.conftest import FinishedTraining, RunCli, assert_rejected
from tests.platform.exchange.models import box_assertions, format_property, make_model

EPS = "0.05"


@pytest.fixture
def exported(finished_training: FinishedTraining, tmp_path: Path, run_cli: RunCli) -> Path:
    done = run_cli("export", finished_training.id[:10], "--format", "vnnlib", "--output-dir", str(tmp_path / "out"),
                   "--images", "5", "--eps", EPS, "--storage", str(finished_training.storage))  # fmt: skip
    assert done.returncode == 0, done.stderr
    return tmp_path / "out"


def test_exported_properties_are_answered(
    finished_training: FinishedTraining, exported: Path, run_cli: RunCli, tmp_path: Path
) -> None:
    """The answers agree with certificates of the run's network; the manifest describes files and results."""
    network = linflab.load(finished_training.id, finished_training.storage)
    images, labels = load_dataset("digits").test.batch(torch.arange(5))
    certificates = certify(network, images, labels, float(EPS), "ibp").tolist()
    manifest = json.loads((exported / "manifest.json").read_text())
    assert manifest["run"] == finished_training.id and manifest["certifier"] == "lipschitz-sound"
    assert 0 < manifest["certified"] <= manifest["clean"] <= 1 and manifest["eps"] == 0.1
    assert "selection" in manifest and "onnx" in manifest["exported_by"]["versions"]
    names = {path.name for path in exported.iterdir()} - {"manifest.json"}
    assert names == set(manifest["files"])
    for name, facts in manifest["files"].items():
        assert hashlib.sha256((exported / name).read_bytes()).hexdigest() == facts["sha256"]
    rows = [line.split(",") for line in (exported / "instances.csv").read_text().splitlines()]
    assert [row[:2] for row in rows] == [["model.onnx", f"image_{k}.vnnlib"] for k in range(5)]
    for number, (goal, is_certified) in enumerate(zip(manifest["properties"], certificates, strict=True)):
        assert goal["label"] == labels[number] and goal["eps"] == 0.05
        arguments = (str(exported / "model.onnx"), "--vnnlib", str(exported / goal["file"]))
        done = run_cli("certify", *arguments, "--output", str(tmp_path / "answer.txt"))
        answer, *_ = (tmp_path / "answer.txt").read_text().splitlines()
        assert done.returncode == 0 and done.stdout == f"{answer}\n"
        assert (answer == "unsat") == is_certified
        if answer == "sat":
            result = json.loads(run_cli("certify", *arguments, "--json").stdout)
            point, outputs = torch.tensor(result["inputs"]), torch.tensor(result["outputs"])
            assert (point - images[number].flatten()).abs().max() <= 0.05 + 1e-6
            with torch.no_grad():
                torch.testing.assert_close(network(point.view(1, 1, 8, 8))[0], outputs, rtol=1e-5, atol=1e-5)
            assert outputs.argmax() != labels[number]
            assert (tmp_path / "answer.txt").read_text() == "sat\n" + format_counterexample(point, outputs)


@pytest.mark.parametrize("format", ["onnx", "torchscript", "safetensors"])
def test_other_tools_read_exported_networks(
    finished_training: FinishedTraining, tmp_path: Path, run_cli: RunCli, format: str
) -> None:
    folder = tmp_path / "out"
    arguments = ("export", str(finished_training.weights), "--format", format, "--output-dir", str(folder))
    assert run_cli(*arguments).returncode == 0
    images, logits = (np.load(folder / f"example_{name}.npy") for name in ("input", "output"))
    assert images.shape == (4, 1, 8, 8) and 0 <= images.min() <= images.max() <= 1
    if format == "onnx":
        session = onnxruntime.InferenceSession(folder / "model.onnx")
        np.testing.assert_allclose(session.run(None, {"images": images})[0], logits, atol=1e-5)
    elif format == "torchscript":
        script = torch.jit.load(io.BytesIO((folder / "model.torchscript.pt").read_bytes()))
        torch.testing.assert_close(script(torch.from_numpy(images)), torch.from_numpy(logits), rtol=0, atol=1e-5)
    else:
        network = linflab.load(finished_training.weights)
        tensors = load_safetensors((folder / "model.safetensors").read_bytes())
        assert tensors.keys() == network.state_dict().keys()
        for name, tensor in network.state_dict().items():
            torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=0)
        assert "eps: 1/10" in (folder / "config.yaml").read_text() or "eps: 0.1" in (folder / "config.yaml").read_text()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["run"] is None and manifest["certified"] is None and manifest["eps"] == 0.1
    if format != "torchscript":  # names in its code count the modules of the process
        assert run_cli(*arguments).returncode == 0  # the same files again


def test_folders_with_other_content_are_kept(
    finished_training: FinishedTraining, tmp_path: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    weights = str(finished_training.weights)
    (tmp_path / "file").write_text("text")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("text")
    (tmp_path / "empty").mkdir()
    for folder in ("file", "full"):
        done = run_cli("export", weights, "--format", "safetensors", "--output-dir", folder)
        assert_rejected(done, f"output-dir={folder}")
    assert run_cli("export", weights, "--format", "safetensors", "--output-dir", "empty").returncode == 0
    assert_rejected(run_cli("export", weights, "--format", "onnx", "--output-dir", "empty"), "output-dir=empty")
    (tmp_path / "empty" / "model.safetensors").write_bytes(b"changed")
    done = run_cli("export", weights, "--format", "safetensors", "--output-dir", "empty")
    assert_rejected(done, "output-dir=empty", "model.safetensors")
    assert (tmp_path / "empty" / "model.safetensors").read_bytes() == b"changed"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "full"]  # no partial folder is left


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--format", "vnnlib", "--images", "x"], "images=x"),
        (["--format", "vnnlib", "--images", "0"], "images=0"),
        (["--format", "vnnlib", "--images", "1,1"], "images=1,1"),
        (["--format", "vnnlib", "--images", "7,100000"], "images=100000"),
        (["--format", "vnnlib", "--eps", "2"], "eps=2"),
        (["--format", "vnnlib", "--eps", "0.1,0.2"], "eps=0.1,0.2"),
        (["--format", "onnx", "--images", "3"], "format=onnx"),
        (["--format", "torchscript", "--eps", "0.1"], "format=torchscript"),
    ],
)
def test_invalid_export_settings_are_rejected(
    finished_training: FinishedTraining, tmp_path: Path, run_cli: RunCli, arguments: list[str], expected: str
) -> None:
    done = run_cli("export", str(finished_training.weights), *arguments, "--output-dir", str(tmp_path / "out"))
    assert_rejected(done, expected)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def small(tmp_path: Path) -> tuple[str, str]:
    """A model of two inputs, y = |x|, and a property of it."""
    model, goal = tmp_path / "small.onnx", tmp_path / "small.vnnlib"
    model.write_bytes(make_model([("Abs", ["x"], ["y"], {})], [1, 2]))
    goal.write_text(format_property(2, 2, *box_assertions([-1.0, 0.5], [1.0, 1.0]), "(<= Y_1 0.4)"))
    return str(model), str(goal)


def test_properties_of_other_models_are_answered(small: tuple[str, str], tmp_path: Path, run_cli: RunCli) -> None:
    model, goal = small
    for certifier in ("auto", "ibp", "crown"):
        done = run_cli("certify", model, "--vnnlib", goal, "--certifier", certifier)
        assert (done.returncode, done.stdout) == (0, "unsat\n")
    text = Path(goal).read_text().replace("(<= Y_1 0.4)", "(or (<= Y_1 0.4) (and (<= Y_0 0.3) (>= Y_1 0.9)))")
    Path(goal).write_text(text)
    lines = run_cli("certify", model, "--vnnlib", goal).stdout.splitlines()
    values = [float(line.strip(" ()").split()[1]) for line in lines[1:]]
    assert lines[0] == "sat" and values[2:] == [abs(value) for value in values[:2]]
    assert values[2] <= 0.3 and values[3] >= 0.9
    assert '"answer": "timeout"' in run_cli("certify", model, "--vnnlib", goal, "--timeout", "1e-9", "--json").stdout


def test_counterexamples_are_short_on_a_terminal(
    tmp_path: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, goal = tmp_path / "wide.onnx", tmp_path / "wide.vnnlib"
    model.write_bytes(make_model([("Abs", ["x"], ["y"], {})], [1, 30]))
    goal.write_text(format_property(30, 30, *box_assertions([0.5] * 30, [1.0] * 30), "(>= Y_1 0.4)"))
    command = ("certify", str(model), "--vnnlib", str(goal))
    assert run_cli(*command).stdout.count("X_") == 30
    monkeypatch.setattr(exchange, "console", PlainConsole(force_terminal=True, soft_wrap=True))
    shown = run_cli(*command).stdout
    assert shown.startswith("sat") and shown.count("X_") == 8 and "22 more inputs" in shown and "--output" in shown


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["{model}"], "images"),
        (["{model}", "image.png"], "--vnnlib"),
        (["{model}", "--vnnlib", "{goal}", "--eps", "0.1"], "eps=0.1"),
        (["{model}", "image.png", "--vnnlib", "{goal}"], "images"),
        (["weights.pt", "--vnnlib", "{goal}"], "weights.pt"),
        (["{model}", "--vnnlib", "none.vnnlib"], "none.vnnlib"),
        (["none.onnx", "--vnnlib", "{goal}"], "none.onnx"),
        (["{goal}.onnx", "--vnnlib", "{goal}"], "small.vnnlib.onnx"),
        (["{model}", "--vnnlib", "{model}"], "small.onnx"),
        (["{model}", "--vnnlib", "{other}"], "3 inputs"),
        (["{model}", "--vnnlib", "{goal}", "--certifier", "lipschitz"], "certifier=lipschitz"),
        (["{model}", "--vnnlib", "{goal}", "--timeout", "0"], "timeout=0"),
        (["{model}", "--vnnlib", "{goal}", "--timeout", "nan"], "timeout=nan"),
        (["{model}", "--vnnlib", "{goal}", "--output", "{folder}"], "output={folder}"),
        (["{weights}", "image.png", "--output", "x"], "output=x"),
    ],
)
def test_invalid_properties_are_rejected(
    small: tuple[str, str],
    tmp_path: Path,
    run_cli: RunCli,
    finished_training: FinishedTraining,
    arguments: list[str],
    expected: str,
) -> None:
    model, goal = small
    (tmp_path / "small.vnnlib.onnx").write_text(Path(goal).read_text())
    (tmp_path / "other.vnnlib").write_text(format_property(3, 2, *box_assertions([0.0] * 3, [1.0] * 3)))
    names = {"model": model, "goal": goal, "other": str(tmp_path / "other.vnnlib"), "folder": str(tmp_path),
             "weights": str(finished_training.weights)}  # fmt: skip
    assert_rejected(run_cli("certify", *(one.format(**names) for one in arguments)), expected.format(**names))
