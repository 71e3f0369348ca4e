"""Extras of the package: each part imports only packages that its own extra and lower ones install."""

import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from linflab.platform.extras import EXTRAS
from tests.conftest import RECIPE

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[1]
QUICK = ["training.epochs=1", "evaluation.attack.steps=1", "evaluation.attack.restarts=1"]
FIT_CERTIFY_ATTACK = """
import linflab, torch
from torch import nn
images, labels = torch.rand(40, 1, 4, 4), torch.arange(40) % 3
network = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
network = linflab.fit(network, (images, labels), eps=0.01, epochs=1, batch_size=20).network
assert len(linflab.certify(network, images, labels, eps=0.01).status) == 40
assert linflab.attack(network, images, labels, eps=0.01).robust.shape == (40,)
import linflab.models.distance, linflab.models.networks.cost, linflab.models.networks.hybrid
"""


def run_without(extras: tuple[str, ...], code: str) -> subprocess.CompletedProcess[str]:
    """Run Python code as if the modules of these extras were not installed."""
    names = sorted(name for extra in extras for name in EXTRAS[extra])
    # PyTorch itself imports some of them if they are installed.
    block = f"""
import sys
for name in {names!r}:
    sys.modules[name] = None
"""
    return subprocess.run([sys.executable, "-c", block + code], text=True, capture_output=True)


def cli_code(*arguments: str) -> str:
    return f"import sys; from linflab.platform.__main__ import main; sys.argv[1:] = {list(arguments)!r}; main()"


def test_fit_certify_and_attack_need_no_extra() -> None:
    done = run_without(("platform", "cluster"), FIT_CERTIFY_ATTACK)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_one_worker_trains_and_certifies_without_cluster_extra(tmp_path: Path) -> None:
    storage = ["--storage", str(tmp_path / "runs")]
    done = run_without(("cluster",), cli_code("train", RECIPE, *QUICK, *storage))
    assert done.returncode == 0, done.stderr
    assert "could not be" not in done.stdout
    (run,) = tmp_path.glob("runs/artifacts/*/artifacts/figures")
    assert (run / "learning_curves.png").exists()
    (weights,) = tmp_path.glob("runs/artifacts/*/artifacts/weights.pt")
    code = f"""
import numpy; numpy.save({str(tmp_path / "one.npy")!r}, numpy.zeros((1, 8, 8), numpy.uint8))
sys.modules["matplotlib"] = None
"""
    done = run_without(("cluster",), code + cli_code("certify", str(weights), str(tmp_path / "one.npy"), "--json"))
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_training_imports_matplotlib_only_for_final_figures(tmp_path: Path) -> None:
    code = "sys.modules['matplotlib'] = None; " + cli_code("train", RECIPE, *QUICK, "--storage", str(tmp_path))
    done = run_without(("cluster",), code)
    assert done.returncode == 0, done.stderr
    assert "clean " in done.stdout and "could not be" in done.stdout


@pytest.mark.parametrize(
    ("extras", "code", "requirement"),
    [
        (("platform", "cluster"), cli_code("recipes"), "[platform]'`"),
        (("cluster",), cli_code("sweep", RECIPE, "demo", "--storage", "STORAGE"), "[cluster]'`"),
        (("cluster",), cli_code("train", RECIPE, "compute.workers=2", "--storage", "STORAGE"), "[cluster]'`"),
        (
            ("exchange",),
            "from pathlib import Path; Path('STORAGE/m.onnx').write_bytes(b''); "
            + cli_code("certify", "STORAGE/m.onnx", "--vnnlib", "STORAGE/p.vnnlib"),
            "[exchange]'`",
        ),
    ],
)
def test_missing_extra_is_reported_in_one_line(
    tmp_path: Path, extras: tuple[str, ...], code: str, requirement: str
) -> None:
    done = run_without(extras, code.replace("STORAGE", str(tmp_path)))
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("linflab: ") and requirement in line


def test_python_api_names_a_missing_extra() -> None:
    done = run_without(("platform", "cluster"), "import linflab; linflab.records()")
    assert done.stderr.splitlines()[-1].startswith("ModuleNotFoundError") and "[platform]'`" in done.stderr


def test_modules_of_extras_match_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = {
        extra: {entry.split(">")[0].split("[")[0].lower() for entry in project["optional-dependencies"][extra]}
        for extra in EXTRAS
    }
    distributions = packages_distributions()
    installed_by = {"sqlalchemy": "mlflow", "grpc": "ray", "requests": "mlflow"}  # listed packages that require them
    for extra, modules in EXTRAS.items():
        for module in modules:
            found = {name.lower() for name in distributions[module]} | {installed_by.get(module, module)}
            assert found & listed[extra], f"{module} is not installed by the extra {extra}"
