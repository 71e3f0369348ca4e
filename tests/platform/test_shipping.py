"""Code that is sent to a cluster: it comes before what is installed, and a process that runs other code says so."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from linflab.models.distance import cpu
from linflab.platform.shipping import CODE, COMMIT, code_digest, copy_code, git_commit


def python(code: str, package: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code where this package is sent to."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd="/",
        env={**os.environ, "PYTHONPATH": str(package.parent), **environment},
    )  # fmt: skip


def linflab(package: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.argv[1:] = {list(arguments)}; from linflab.platform.cli import main; main()"
    return python(code, package, **environment)


def test_a_copy_is_what_runs_and_uses_the_installed_kernels(tmp_path: Path) -> None:
    package = copy_code(tmp_path)
    code = "from linflab.platform import shipping; from linflab.models.distance import cpu; "
    code += "shipping.check_code(); print(shipping.__file__, cpu.FOLDER, cpu.KERNELS and cpu.KERNELS.isa)"
    done = python(code, package, **{CODE: code_digest()})
    assert done.returncode == 0, done.stderr
    module, folder, isa = done.stdout.split()
    assert Path(module).is_relative_to(package) and Path(folder).is_relative_to(package)
    assert isa == str(cpu.KERNELS and cpu.KERNELS.isa)


def test_an_edit_runs_or_is_refused(tmp_path: Path) -> None:
    package = copy_code(tmp_path)
    recipe = package / "platform" / "recipes" / "digits_eps0.1_linf_dist_net.yaml"
    recipe.write_text(recipe.read_text().replace("method:", "method: edited #"))
    digest = python("from linflab.platform.shipping import code_digest; print(code_digest())", package).stdout.strip()
    assert digest != code_digest()
    there = linflab(package, "recipes", **{CODE: digest})
    assert there.returncode == 0 and "edited" in there.stdout
    elsewhere = linflab(package, "recipes", **{CODE: code_digest()})  # as if these machines had other code
    assert elsewhere.returncode == 2 and "is other code than was sent" in elsewhere.stderr


def test_what_was_deleted_is_gone(tmp_path: Path) -> None:
    """Python would look for what a package without `__init__.py` lacks in the next one of its name."""
    package = copy_code(tmp_path)
    (package / "platform" / "errors.py").unlink()
    done = python("import linflab.platform.errors", package)
    assert done.returncode == 1 and "No module named 'linflab.platform.errors'" in done.stderr


@pytest.mark.skipif(cpu.KERNELS is None, reason="needs linflab to be installed with a compiler")
def test_edited_kernels_are_refused_until_they_are_compiled(tmp_path: Path) -> None:
    package = copy_code(tmp_path)
    (package / "models" / "distance" / "csrc" / ".sort.h.swp").write_text("an editor's")
    assert linflab(package, "describe", "digits_eps0.1_linf_dist_net").returncode == 0
    with (package / "models" / "distance" / "csrc" / "sort.h").open("a") as file:
        file.write("// edited\n")
    done = linflab(package, "describe", "digits_eps0.1_linf_dist_net")
    assert done.returncode == 2 and "were not compiled from the sources in" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_kernels_of_before_they_said_what_they_are_of_are_refused() -> None:
    with pytest.raises(ImportError, match="were not compiled from the sources in"):
        cpu._check_sources(ModuleType("kernels"))


def test_the_commit_goes_with_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CODE, code_digest())
    monkeypatch.setenv(COMMIT, "f00")
    git_commit.cache_clear()
    try:
        assert git_commit() == "f00"
    finally:
        git_commit.cache_clear()
