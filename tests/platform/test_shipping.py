"""Source copies sent to a cluster: they precede the installed code, and processes reject code with another hash."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path
from runpy import run_path
from types import ModuleType

import pytest

from linflab.models.distance import cpu
from linflab.platform.source import COMMIT_VAR, SOURCE_HASH_VAR, copy_source, git_commit, source_hash
from tests.conftest import assert_rejected

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.integration


def run_python(code: str, package: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python code with this copy of the package."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd="/",
        env={**os.environ, "PYTHONPATH": str(package.parent), **environment},
    )  # fmt: skip


def run_linflab(package: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.argv[1:] = {list(arguments)}; from linflab.platform.cli.main import main; main()"
    return run_python(code, package, **environment)


@pytest.mark.slow
def test_copy_runs_with_the_installed_kernels(tmp_path: Path) -> None:
    package = copy_source(tmp_path)
    code = "from linflab.platform import source as shipping; from linflab.models.distance import cpu; "
    code += "shipping.verify_source_hash(); print(shipping.__file__, cpu.PACKAGE_DIR, cpu.KERNELS and cpu.KERNELS.isa)"
    done = run_python(code, package, **{SOURCE_HASH_VAR: source_hash()})
    assert done.returncode == 0, done.stderr
    module, folder, isa = done.stdout.split()
    assert Path(module).is_relative_to(package) and Path(folder).is_relative_to(package)
    assert isa == str(cpu.KERNELS and cpu.KERNELS.isa)


@pytest.mark.slow
def test_edited_copy_runs_only_with_its_own_hash(tmp_path: Path) -> None:
    package = copy_source(tmp_path)
    recipe = package / "platform" / "config" / "recipes" / "digits" / "digits_eps0.1_linf_dist_net.yaml"
    recipe.write_text(recipe.read_text().replace("method:", "method: edited #"))
    digest = run_python("from linflab.platform.source import source_hash; print(source_hash())", package).stdout.strip()
    assert digest != source_hash()
    accepted = run_linflab(package, "recipes", **{SOURCE_HASH_VAR: digest})
    assert accepted.returncode == 0 and "edited" in accepted.stdout
    rejected = run_linflab(package, "recipes", **{SOURCE_HASH_VAR: source_hash()})  # as if this machine had other code
    assert_rejected(rejected)


def test_copy_has_the_shipped_networks(tmp_path: Path) -> None:
    package = copy_source(tmp_path / "code")
    find_unreadable_networks = run_path(str(ROOT / ".ci" / "check_wheel.py"))["find_unreadable_networks"]
    environment = {**os.environ, "PYTHONPATH": str(package.parent)}
    assert find_unreadable_networks(tmp_path, environment) == []
    (weights, *_) = sorted((package / "platform" / "exchange" / "pretrained").glob("*/model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    (problem,) = find_unreadable_networks(tmp_path, environment)
    assert "shipped networks" in problem and str(weights) in problem


def test_copy_has_all_package_data(tmp_path: Path) -> None:
    package = copy_source(tmp_path)
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    for name, patterns in data.items():
        folder = Path(*name.split(".")[1:])
        for pattern in patterns if name != "linflab" else ():
            files = {str(path.relative_to(ROOT / folder)) for path in (ROOT / folder).glob(pattern)}
            assert files and files == {
                str(path.relative_to(package / folder)) for path in (package / folder).glob(pattern)
            }


def test_deleted_modules_cannot_be_imported(tmp_path: Path) -> None:
    """Without `__init__.py`, Python would look for the module in the next package of the same name."""
    package = copy_source(tmp_path)
    (package / "platform" / "errors.py").unlink()
    done = run_python("import linflab.platform.errors", package)
    assert done.returncode == 1 and "ModuleNotFoundError" in done.stderr and "linflab.platform.errors" in done.stderr


@pytest.mark.skipif(cpu.KERNELS is None, reason="requires kernels compiled during the installation of linflab")
@pytest.mark.slow
def test_edited_kernels_are_rejected_until_compiled(tmp_path: Path) -> None:
    package = copy_source(tmp_path)
    (package / "models" / "distance" / "csrc" / ".sort.h.swp").write_text("an editor's")
    assert run_linflab(package, "describe", "digits_eps0.1_linf_dist_net").returncode == 0
    with (package / "models" / "distance" / "csrc" / "sort.h").open("a") as file:
        file.write("// edited\n")
    done = run_linflab(package, "describe", "digits_eps0.1_linf_dist_net")
    assert_rejected(done, "`pip install --editable .`")


def test_kernels_without_a_source_hash_are_rejected() -> None:
    with pytest.raises(ImportError, match=r"`pip install --editable \.`"):
        cpu._check_source_hash(ModuleType("kernels"))


def test_commit_of_the_copy_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SOURCE_HASH_VAR, source_hash())
    monkeypatch.setenv(COMMIT_VAR, "f00")
    git_commit.cache_clear()
    try:
        assert git_commit() == "f00"
    finally:
        git_commit.cache_clear()
