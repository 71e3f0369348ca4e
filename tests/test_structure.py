"""The rules of the house: who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "models": {"models"},
    "search_spaces": {"search_spaces"},
    "reports": {"reports"},
    "platform": {"platform", "models", "search_spaces", "reports"},
}
FILES = sorted(path for folder in MAY_IMPORT for path in (ROOT / folder).rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative imports hide where a name comes from"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}  # of a module, or of a name in it
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_of_import(path: Path) -> None:
    own = path.relative_to(ROOT).parts[0]
    siblings = {name.split(".")[1] for name in imported_modules(path) if name.startswith("linflab.")}
    assert siblings <= MAY_IMPORT[own]


def test_no_cycles_between_files() -> None:
    def module(path: Path) -> str:
        return "linflab." + ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")

    graph = {module(path): imported_modules(path) for path in FILES}
    for name, others in graph.items():
        modules = {other if other in graph else other.rpartition(".")[0] for other in others}
        graph[name] = (modules & graph.keys()) - {name}
    while leaves := [name for name, others in graph.items() if not others & graph.keys()]:
        for leaf in leaves:
            del graph[leaf]
    assert not graph, f"these import each other in a circle: {sorted(graph)}"


def test_platform_does_not_hide_the_standard_library() -> None:
    assert not (ROOT / "platform" / "__init__.py").exists()
    done = subprocess.run(
        [sys.executable, "-c", "import platform; print(platform.system())"], cwd=ROOT, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr


def test_models_need_neither_ray_nor_mlflow() -> None:
    code = """
import sys
for name in ("ray", "mlflow", "optuna", "pandas"):
    sys.modules[name] = None  # an import of it now fails
import linflab.models.distance, linflab.models.networks.cost, linflab.models.networks.hybrid
import linflab.models.robustness.attacks, linflab.models.robustness.certification
import linflab.models.robustness.bounds.worst_case
"""
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
