"""Rules of the code base: import order, file length and packaging."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.conftest import is_unit_test

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "models": {"models"},
    "search_spaces": {"search_spaces"},
    "reports": {"reports"},
    "platform": {"platform", "models", "search_spaces", "reports"},
}
FILES = sorted(path for folder in MAY_IMPORT for path in (ROOT / folder).rglob("*.py"))
# Within platform/, a part may import only itself and later layers, not other parts of its layer.
LAYERS = (
    {"__main__"},
    {"api", "cli"},
    {"results", "sweeps", "diagnosis"},
    {"distributed"},
    {"trial", "cluster"},
    {"tracking"},
    {"training"},
    {"config"},
    {"data", "exchange"},
)
BASE = {"source", "files", "extras", "locks", "signals", "host", "errors"}  # these may import each other
MAX_FILE_LINES = 400


def read_imports(path: Path) -> set[str]:
    return collect_imports(ast.parse(path.read_text()))


def collect_imports(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "relative imports hide where a name comes from"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}  # modules, or names in them
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_packages_import_only_allowed_packages(path: Path) -> None:
    own = path.relative_to(ROOT).parts[0]
    siblings = {name.split(".")[1] for name in read_imports(path) if name.startswith("linflab.")}
    assert siblings <= MAY_IMPORT[own]


def list_allowed_imports(part: str) -> set[str]:
    if part in BASE:
        return BASE
    index = next(number for number, layer in enumerate(LAYERS) if part in layer)
    allowed = BASE.union({part}, *LAYERS[index + 1 :])
    return allowed - {"training"} if part == "tracking" else allowed


@pytest.mark.parametrize(
    "path", sorted((ROOT / "platform").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_platform_layers_import_only_later_layers(path: Path) -> None:
    own = path.relative_to(ROOT / "platform").with_suffix("").parts[0]
    names = (name.split(".") for name in read_imports(path) if name.startswith("linflab.platform."))
    assert {parts[2] for parts in names} <= list_allowed_imports(own)


def test_files_have_at_most_400_lines() -> None:
    files = [path for path in FILES if path.relative_to(ROOT).parts[0] in ("platform", "models")]
    too_long = {str(path.relative_to(ROOT)) for path in files if len(path.read_text().splitlines()) > MAX_FILE_LINES}
    assert not too_long


def test_packages_are_the_folders_with_python_files() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT) for path in FILES}
    assert sorted(packages) == sorted(["linflab", *(".".join(("linflab", *folder.parts)) for folder in folders)])


def test_imports_have_no_cycles() -> None:
    graph = {f"linflab.{module_name(path)}": read_imports(path) for path in FILES}
    for name, others in graph.items():
        modules = {other if other in graph else other.rpartition(".")[0] for other in others}
        graph[name] = (modules & graph.keys()) - {name}
    while leaves := [name for name, others in graph.items() if not others & graph.keys()]:
        for leaf in leaves:
            del graph[leaf]
    assert not graph, f"import cycle among {sorted(graph)}"


def test_platform_folder_does_not_shadow_standard_library() -> None:
    assert not (ROOT / "platform" / "__init__.py").exists()
    done = subprocess.run(
        [sys.executable, "-c", "import platform; print(platform.system())"], cwd=ROOT, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.integration
def test_imports_leave_global_state_unchanged() -> None:
    """Imports change no environment variable, logger, warning filter, signal handler, thread or library setting."""
    modules = ["linflab." + ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES]
    modules = [
        name.removesuffix(".__init__") for name in modules if not name.endswith(("cuda_forward", "cuda_backward"))
    ]
    code = f"""
import importlib, logging, os, signal, threading, warnings
# libraries may change global state when they are imported
import matplotlib.figure, mlflow.pytorch, mlflow.system_metrics.metrics.gpu_monitor, numpy, optuna, pandas
import ray.job_submission, ray.train.torch, ray.tune.integration.ray_train, ray.tune.search, rich.live, sklearn.datasets
import torch, torchvision, typer

def state():
    loggers = [logging.root, *(one for one in logging.root.manager.loggerDict.values() if hasattr(one, "handlers"))]
    cudnn = torch.backends.cudnn
    return {{
        "environment": dict(os.environ),
        **{{f"logger {{one.name}}": (one.level, str(one.handlers), one.disabled) for one in loggers}},
        "warnings": str(warnings.filters),
        "signals": [signal.getsignal(number) for number in signal.valid_signals()],
        "threads": threading.active_count(),
        "numpy": (numpy.geterr(), numpy.get_printoptions()),
        "matplotlib": dict(matplotlib.rcParams),
        "torch": (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), torch.initial_seed()),
        "cuDNN": (cudnn.enabled, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark),
    }}

before = state()
for name in {modules!r}:
    importlib.import_module(name)
    after = state()  # includes loggers of libraries that this import loaded
    changes = [(kind, value, after[kind]) for kind, value in before.items() if after[kind] != value]
    assert not changes, (name, changes)
    before = after
"""
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_unit_tests_do_not_import_ray(request: pytest.FixtureRequest) -> None:
    """Test files and all modules that they import are checked; imports in functions fail when the tests run."""
    modules = {module_name(path): path for folder in ("linflab", "tests") for path in (ROOT / folder).rglob("*.py")}
    modules |= {f"linflab.{module_name(path)}": path for path in FILES}
    pending = {item.path for item in request.session.items if is_unit_test(item)}
    assert pending
    seen: set[Path] = set()
    while pending:
        path = pending.pop()
        seen.add(path)
        for name in read_top_level_imports(path):
            assert name.split(".")[0] != "ray", f"{path}: imports {name}; mark its tests as integration tests"
            parts = name.split(".")
            packages = {modules.get(".".join(parts[:length])) for length in range(1, len(parts) + 1)}
            pending |= {found for found in packages if found is not None} - seen


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def read_top_level_imports(path: Path) -> set[str]:
    """Return the imports that run with the file itself, without those in functions or only for types."""
    tree = ast.parse(path.read_text())
    statements = (ast.Import, ast.ImportFrom, ast.Try, ast.With)
    tree.body = [node for node in tree.body if isinstance(node, statements)]
    return collect_imports(tree)
