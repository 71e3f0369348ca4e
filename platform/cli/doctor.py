"""`linflab doctor`."""

import json
from collections.abc import Iterator
from dataclasses import asdict

import typer
from rich.text import Text

from linflab.platform.cli.options import DEFAULT_STORAGE, AsJson, StorageFolder
from linflab.platform.cli.output import console
from linflab.platform.diagnosis.checks import Check, Status, worst_status
from linflab.reports.plain import one_line

STYLES = {Status.OK: "green", Status.NOTE: "", Status.SLOW: "yellow", Status.FAILED: "red"}


def doctor(storage_dir: StorageFolder = DEFAULT_STORAGE, as_json: AsJson = False) -> None:
    """Check the installation and this machine, and show what fails or is slow, and what to do.

    The status of a check is `ok`, `note` (an optional part is missing), `slow` or `failed`. The exit status is 1 if a
    check failed, else 0. Nothing is created or changed.
    """
    checks = []
    for check in _run_checks(storage_dir):
        checks.append(check)
        if not as_json:
            _print_check(check)
    status = worst_status(checks)
    if as_json:
        typer.echo(json.dumps({"status": status, "checks": [asdict(check) for check in checks]}))
    if status is Status.FAILED:
        raise typer.Exit(1)


def _run_checks(storage_dir: StorageFolder) -> Iterator[Check]:
    from linflab.platform.diagnosis import hardware, installation, storage

    yield installation.check_versions()
    yield from installation.check_packages()
    yield installation.check_kernels()
    yield hardware.check_threads()
    yield hardware.check_shared_memory()
    yield hardware.check_gpu()
    yield hardware.check_triton()
    yield storage.check_datasets()
    yield storage.check_storage(storage_dir)
    yield storage.check_ports()


def _print_check(check: Check) -> None:
    console.print(
        Text(f"{check.status:<6}", STYLES[check.status]), Text(f" {check.name}: {one_line(check.found)}"), sep=""
    )
    if check.advice:
        console.print(Text(f"       {one_line(check.advice)}"))
