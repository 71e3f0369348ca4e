"""`linflab doctor`: each check finds its problem, says what to do, and nothing slow is imported."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import linflab
from linflab.models.distance import cpu
from linflab.platform.data.info import DATASETS
from linflab.platform.diagnosis import hardware, installation, storage
from linflab.platform.diagnosis.checks import Check, Status, worst_status
from linflab.platform.source import copy_source
from tests.conftest import FinishedTraining, RunCli
from tests.models.backends import BACKENDS, use_backend


@pytest.fixture
def clean_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LINFLAB_DATA", str(tmp_path))
    monkeypatch.delenv("LINFLAB_TRACKING_URI", raising=False)
    return tmp_path


def write_metadata(folder: Path, *requirements: str) -> None:
    """Write the metadata of an installed linflab with these requirements."""
    info = folder / "linflab-9.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.4", "Name: linflab", "Version: 9", *(f"Requires-Dist: {one}" for one in requirements)]
    (info / "METADATA").write_text("\n".join(lines) + "\n")


@pytest.mark.skipif(cpu.KERNELS is None, reason="requires kernels compiled during the installation of linflab")
def test_doctor_reports_versions_kernels_and_storage(run_cli: RunCli, finished_training: FinishedTraining) -> None:
    done = run_cli("doctor", "--json", "--storage", str(finished_training.storage))
    report = json.loads(done.stdout)
    checks = {check["name"]: check for check in report["checks"]}
    assert checks["versions"]["values"]["linflab"] == linflab.__version__
    assert checks["versions"]["values"]["torch"] == torch.__version__.partition("+")[0]
    assert checks["CPU kernels"]["values"]["instruction_set"] == BACKENDS[1]
    assert checks["storage"]["values"]["database"] == "ready" and checks["storage"]["status"] == "ok"
    assert done.returncode == (report["status"] == "failed")
    text = run_cli("doctor", "--storage", str(finished_training.storage)).stdout
    assert all(f" {name}: " in text for name in checks)


def test_failed_check_sets_the_exit_status(run_cli: RunCli, clean_data: Path) -> None:
    (clean_data / "mlflow.db").write_text("no database")
    done = run_cli("doctor", "--storage", str(clean_data))
    assert done.returncode == 1 and done.stderr == ""
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("failed storage")]
    assert "mlflow.db" in line


@pytest.mark.integration
def test_doctor_imports_nothing_slow_and_writes_nothing(tmp_path: Path) -> None:
    code = """
import sys
from linflab.platform.cli.main import app
try:
    app(["doctor", "--storage", "runs"])
except SystemExit as error:
    assert error.code == 0, error.code
print(*sorted({"mlflow", "ray", "optuna", "pandas", "sklearn", "matplotlib", "scipy"} & sys.modules.keys()), "imported")
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LINFLAB_")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].split() == ["imported"]
    assert list(tmp_path.iterdir()) == []


def test_worst_status_decides() -> None:
    checks = [Check("a", Status.SLOW, ""), Check("b", Status.OK, ""), Check("c", Status.NOTE, "")]
    assert worst_status(checks) is Status.SLOW and worst_status([]) is Status.OK


def test_missing_kernels_are_slow() -> None:
    with use_backend("reference"):
        check = installation.check_kernels()
    assert check.status is Status.SLOW and check.values["instruction_set"] is None and "pip install" in check.advice


@pytest.mark.skipif(len(BACKENDS) < 3, reason="requires kernels for two instruction sets")
def test_kernels_for_a_narrower_instruction_set_are_slow() -> None:
    with use_backend(BACKENDS[-1]):
        check = installation.check_kernels()
    assert check.status is Status.SLOW and check.values["instruction_set"] == BACKENDS[-1]


@pytest.mark.skipif(cpu.KERNELS is None, reason="requires kernels compiled during the installation of linflab")
@pytest.mark.integration
def test_outdated_kernels_fail(tmp_path: Path) -> None:
    package = copy_source(tmp_path)
    with (package / "models" / "distance" / "csrc" / "sort.h").open("a") as file:
        file.write("// edited\n")
    code = "from linflab.platform.cli.main import app; app(['doctor', '--json'])"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    (check,) = [one for one in json.loads(done.stdout)["checks"] if one["name"] == "CPU kernels"]
    assert check["status"] == "failed" and "pip install --editable" in check["advice"]


def test_requirements_are_compared_per_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_metadata(
        tmp_path, "numpy>=2", "torch>=99", 'absent-a>=1; extra == "platform"', 'linflab[platform]; extra == "cluster"',
        'pydantic>=2; extra == "cluster"', 'pyyaml>=99; extra == "exchange"', 'absent-b; python_version < "3"',
    )  # fmt: skip
    monkeypatch.syspath_prepend(str(tmp_path))
    checks = {check.name: check for check in installation.check_packages()}
    statuses = {name: str(check.status) for name, check in checks.items()}
    expected = {"packages": "failed", "extra platform": "note", "extra cluster": "ok", "extra exchange": "failed"}
    assert statuses == expected | {"extra hub": "ok"}  # without requirements in this metadata
    assert "torch" in checks["packages"].found and ">=99" in checks["packages"].found
    assert checks["packages"].values["missing"] == [] and "numpy" not in checks["packages"].found
    assert checks["extra platform"].values["missing"] == ["absent-a"]
    assert "'linflab[platform]'" in checks["extra platform"].advice
    origin = {"url": "file:///checkout", "dir_info": {"editable": True}}
    (tmp_path / "linflab-9.dist-info" / "direct_url.json").write_text(json.dumps(origin))
    advice = {check.name: check.advice for check in installation.check_packages()}
    assert "pip install -e '.[platform]'" in advice["extra platform"] and "pip install -e '.'" in advice["packages"]


def test_more_threads_than_cores_are_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "cpu.max"
    limit.write_text("50000 100000\n")
    assert hardware.cpu_quota(limit) == 0.5
    monkeypatch.setattr(hardware, "cpu_quota", lambda: 1.5)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    check = hardware.check_threads()
    assert check.status is Status.SLOW and "OMP_NUM_THREADS=1" in check.advice and check.values["quota"] == 1.5


@pytest.mark.parametrize("content", ["max 100000\n", "", None])
def test_container_without_limit_has_no_quota(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "cpu.max").write_text(content)
    assert hardware.cpu_quota(tmp_path / "cpu.max") is None


def test_busy_machine_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (1000.0, 0.0, 0.0))
    assert hardware.check_threads().status is Status.SLOW


@pytest.mark.skipif(torch.cuda.is_available(), reason="requires a machine without CUDA")
def test_unusable_gpu_is_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = tmp_path / "version"
    assert hardware.check_gpu(driver).status is Status.NOTE
    driver.touch()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "without CUDA" in hardware.check_gpu(driver).found
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    check = hardware.check_gpu(driver)
    assert check.status is Status.SLOW and "13.0" in check.advice
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES" in hardware.check_gpu(driver).advice


def test_datasets_are_found_and_checked_as_by_data_list(clean_data: Path, run_cli: RunCli) -> None:
    for folder in ("mine", "mnist"):
        (clean_data / folder).mkdir()
        for split in ("train", "test"):
            np.save(clean_data / folder / f"{split}_images.npy", np.arange(96, dtype=np.uint8).reshape(6, 1, 4, 4))
            np.save(clean_data / folder / f"{split}_labels.npy", np.arange(6, dtype=np.uint8) % 2)
    (clean_data / "partial").mkdir()
    check = storage.check_datasets()
    assert check.values["found"] == ["digits", "mine"] and check.status is Status.FAILED
    assert list(check.values["damaged"]) == ["mnist"] and "(1, 28, 28)" in check.found
    assert check.values["missing"] == [name for name in DATASETS if name not in ("digits", "mnist")]
    listed = {row["name"]: row["state"] for row in json.loads(run_cli("data", "list", "--json").stdout)}
    assert listed["mnist"] == check.values["damaged"]["mnist"] and listed["mine"].startswith("ready")
    shutil.rmtree(clean_data / "mnist")
    assert storage.check_datasets().status is Status.NOTE
    (clean_data / "mine" / "test_labels.npy").write_bytes(b"")
    assert "test_labels.npy" in storage.check_datasets().found


def test_storage_below_a_file_fails(clean_data: Path) -> None:
    (clean_data / "file").touch()
    check = storage.check_storage(clean_data / "file" / "runs")
    assert check.status is Status.FAILED and "LINFLAB_STORAGE" in check.advice


def test_unreachable_tracking_server_fails(clean_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINFLAB_TRACKING_URI", "http://127.0.0.1:9")
    assert storage.check_storage(clean_data).status is Status.FAILED


def test_storage_on_a_network_file_system_is_slow(clean_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = clean_data / "mounts"
    mounts.write_text(f"disk / ext4 rw 0 0\nhost:/x {clean_data.resolve()}/my\\040runs nfs4 rw 0 0\n")
    (clean_data / "my runs").mkdir()
    assert storage.file_system(clean_data.resolve(), mounts) == "ext4"
    kind = storage.file_system((clean_data / "my runs").resolve(), mounts)
    assert kind == "nfs4" and storage.file_system(clean_data, clean_data / "absent") == ""
    monkeypatch.setattr(storage, "file_system", lambda path: kind)
    check = storage.check_storage(clean_data / "my runs")
    assert check.status is Status.SLOW and "LINFLAB_TRACKING_URI" in check.advice


def test_full_disk_fails(clean_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "MIN_FREE_BYTES", 2**62)
    assert storage.check_storage(clean_data).status is Status.FAILED


def test_used_ports_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        monkeypatch.setattr(storage, "PORTS", {port: "linflab ui"})
        check = storage.check_ports()
    assert check.status is Status.NOTE and check.values["used"] == [port]
    assert storage.check_ports().status is Status.OK
