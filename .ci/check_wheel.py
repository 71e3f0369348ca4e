"""Check an installed wheel: code, kernels and shipped networks come from it, and `linflab doctor` has no failure."""

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from pathlib import Path

LOAD_NETWORKS = """
from pathlib import Path
from linflab.platform.exchange.pretrained import PREFIX, pretrained_names
from linflab.platform.results.load import find_weights
from linflab.platform.training.weights import load_weights

assert pretrained_names(), "there are none"
for name in pretrained_names():
    load_weights(find_weights(PREFIX + name, Path("runs"))[0])
"""


def find_problems(site_packages: Path) -> list[str]:
    """Return what is wrong with the linflab that this interpreter imports; an empty list if nothing is.

    Args:
        site_packages: Directory from which it must be imported.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as folder:  # not in a checkout, whose code would be imported
        code = "import linflab.platform.source as source; print(source.__file__)"
        imported = subprocess.check_output([sys.executable, "-c", code], cwd=folder, env=environment, text=True).strip()
        unreadable = find_unreadable_networks(Path(folder), environment)
        doctor = [sys.executable, "-m", "linflab", "doctor", "--json"]
        done = subprocess.run(doctor, cwd=folder, env=environment, capture_output=True, text=True)
    if not Path(imported).is_relative_to(site_packages):
        return [f"linflab is imported from {imported}, not from {site_packages}"]
    if not done.stdout:
        return [f"linflab doctor fails: {done.stderr}"]
    checks = json.loads(done.stdout)["checks"]
    problems = [f"{check['name']}: {check['found']}" for check in checks if check["status"] == "failed"]
    (kernels,) = [check for check in checks if check["name"] == "CPU kernels"]
    if kernels["status"] != "ok":
        problems.append(f"CPU kernels: {kernels['found']}")
    return problems + unreadable


def find_unreadable_networks(folder: Path, environment: Mapping[str, str]) -> list[str]:
    """Return a problem if this interpreter cannot load the networks that linflab ships; otherwise an empty list.

    Args:
        folder: Current directory of the process that loads them.
        environment: Environment variables of the process.
    """
    done = subprocess.run(
        [sys.executable, "-c", LOAD_NETWORKS], cwd=folder, env=environment, capture_output=True, text=True
    )
    return [f"shipped networks cannot be loaded: {done.stderr}"] if done.returncode else []


if __name__ == "__main__":
    if found := find_problems(Path(sysconfig.get_path("platlib")).resolve()):
        sys.exit("\n".join(found))
