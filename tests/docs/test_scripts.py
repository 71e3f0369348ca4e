"""Tutorials and examples run as they are; tutorials print what their pages show, apart from numbers."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT

TUTORIALS = ROOT / "docs" / "tutorials"
pytestmark = pytest.mark.slow

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# Studies that take minutes or require datasets, in a size that takes seconds.
STUDIES = {
    "nearest_neighbor": ["digits=0.1"],
    "training_of_distance_nets": [
        *("--dataset", "digits", "--width", "32", "--steps", "8", "--depth", "2", "--small-width", "16"),
        *("--epochs", "1", "--points", "3"),
    ],
    "universal_approximation": [],
}
SCRIPTS = sorted(path for path in TUTORIALS.iterdir() if path.suffix in (".py", ".sh"))


def shape(text: str) -> list[str]:
    """Return the words of an output without numbers, ids, times and widths of columns."""
    return re.findall(r"[^\W\d_]{2,}", re.sub(r"\b(?=\w*\d)[0-9a-f]{8,}\b|\.{3}", " ", text))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_tutorials_print_what_their_pages_show(path: Path, tmp_path: Path) -> None:
    code = (
        f"import sys, json; sys.path.insert(0, {str(ROOT / 'docs' / 'generate')!r}); import tutorials; "
        f"from pathlib import Path; outputs = tutorials.run_script(Path({str(path)!r}), Path({str(tmp_path)!r})); "
        f"Path({str(tmp_path / 'outputs.json')!r}).write_text(json.dumps(outputs))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=without_storage())
    assert done.returncode == 0, done.stdout + done.stderr
    outputs = json.loads((tmp_path / "outputs.json").read_text())
    recorded = json.loads((TUTORIALS / "recorded" / f"{path.stem}.json").read_text())
    assert [shape(one.replace(str(tmp_path), ".")) for one in outputs] == [shape(one) for one in recorded]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(path: Path, tmp_path: Path) -> None:
    is_study = path.stem in STUDIES
    arguments = [*STUDIES[path.stem], "--output-dir", "figures"] if is_study else []
    command = [sys.executable, str(path), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=without_storage())
    assert done.returncode == 0, done.stdout + done.stderr
    if is_study:
        assert list((tmp_path / "figures").iterdir())
        return
    accuracies = [float(number) for number in re.findall(r"([\d.]+)%", done.stdout)]
    assert all(10 < accuracy <= 100 for accuracy in accuracies), done.stdout
    if path.stem == "verify_onnx":
        answers = re.findall(r": (\w+) by", done.stdout)
        assert answers == ["unsat", "sat"]


def without_storage() -> dict[str, str]:
    """Return the environment without settings that would send runs elsewhere."""
    return {name: value for name, value in os.environ.items() if name not in ("LINFLAB_STORAGE", "RAY_ADDRESS")}
