"""Releases: version, changelog, citation, and the workflows that test and publish."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import linflab

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def check_release() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_release", ROOT / ".ci" / "check_release.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def copy_release_files(folder: Path) -> Path:
    for name in ("linflab/__init__.py", "CHANGELOG.md", "CITATION.cff"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def test_version_is_that_of_the_citation() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == linflab.__version__
    assert {"cff-version", "title", "message", "authors", "license"} <= citation.keys()


@pytest.mark.integration
def test_version_needs_no_import_of_torch() -> None:
    code = "import linflab, sys; print(linflab.__version__, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [linflab.__version__, "False"]


def test_changelog_has_the_sections_of_keep_a_changelog() -> None:
    lines = (ROOT / "CHANGELOG.md").read_text().splitlines()
    sections = [line for line in lines if line.startswith("## ")]
    assert sections[0] == "## [Unreleased]"
    assert all(re.fullmatch(r"## \[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", line) for line in sections[1:])
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert {line.removeprefix("### ") for line in lines if line.startswith("### ")} <= kinds


def test_release_needs_its_tag_citation_and_section(tmp_path: Path, check_release: ModuleType) -> None:
    root, tag = copy_release_files(tmp_path), f"v{linflab.__version__}"
    changelog = (root / "CHANGELOG.md").read_text()
    (root / "CHANGELOG.md").write_text(f"{changelog}\n## [{linflab.__version__}] - 2026-12-01\n")
    assert check_release.find_problems(tag, root) == []
    (problem,) = check_release.find_problems("v9.9.9", root)
    assert "v9.9.9" in problem and tag in problem
    (root / "CHANGELOG.md").write_text(changelog.replace(f"[{linflab.__version__}]", "[other]"))
    (root / "CITATION.cff").write_text("version: 9.9.9\n")
    problems = check_release.find_problems(tag, root)
    assert [problem.partition(":")[0] for problem in problems] == ["CITATION.cff", "CHANGELOG.md"]
