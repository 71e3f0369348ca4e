"""Releases: version, changelog, citation, and the workflows that test and publish."""

import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import linflab

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


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


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_follow_the_schema_of_github(path: Path) -> None:
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", str(path)]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_run_existing_targets_and_files(path: Path) -> None:
    """Each `make` target is in the Makefile, each named file exists, and each job that is waited for exists."""
    targets = set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))
    jobs = yaml.safe_load(path.read_text())["jobs"]
    num_checked = 0
    for job in jobs.values():
        needs = job.get("needs", [])
        assert set([needs] if isinstance(needs, str) else needs) <= jobs.keys()
        assert job["timeout-minutes"] <= 120
        for step in job["steps"]:
            words = step.get("run", "").split()
            if words[:1] == ["make"]:
                assert {word for word in words[1:] if "=" not in word} <= targets
                num_checked += 1
            files = [word for word in words if word.startswith(".ci/")]
            assert all((ROOT / file).is_file() for file in files), files
            num_checked += len(files)
    assert num_checked > 0


def test_ci_and_workflows_run_the_same_commands() -> None:
    ci = (ROOT / ".ci" / "run").read_text()
    workflow = (ROOT / ".github" / "workflows" / "test.yml").read_text()
    assert "run: make lowest\n" in workflow  # only there, since it requires an index of all old versions
    for target in ("check", "test"):
        assert re.search(rf"^(\S+=\S+ )?make {target}$", ci, re.MULTILINE), target
        assert f"run: make {target}\n" in workflow, target
    python_versions = yaml.safe_load(workflow)["jobs"]["test"]["strategy"]["matrix"]["python"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["requires-python"] == f">={python_versions[0]}"
    built = [build.partition("-")[0] for build in project["tool"]["cibuildwheel"]["build"]]
    assert built == [f"cp{version.replace('.', '')}" for version in python_versions]


def test_release_builds_wheels_for_two_architectures() -> None:
    command = [sys.executable, "-m", "cibuildwheel", "--platform", "linux", "--archs", "x86_64,aarch64"]
    done = subprocess.run([*command, "--print-build-identifiers"], cwd=ROOT, capture_output=True, text=True)
    expected = {f"cp3{minor}-manylinux_{arch}" for minor in (11, 12, 13) for arch in ("x86_64", "aarch64")}
    assert set(done.stdout.split()) == expected, done.stderr


@pytest.mark.integration
def test_wheel_check_rejects_other_installations(tmp_path: Path) -> None:
    """The tests run in a checkout, which is not an installed wheel."""
    done = subprocess.run([sys.executable, ROOT / ".ci" / "check_wheel.py"], capture_output=True, text=True)
    assert done.returncode == 1 and "linflab is imported from" in done.stderr
