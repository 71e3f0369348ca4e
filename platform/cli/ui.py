"""`linflab ui`."""

import os
import socket
import subprocess
import sys
import time
from typing import Annotated

import typer

from linflab.platform import signals
from linflab.platform.cli.options import DEFAULT_STORAGE, OnCluster, StorageFolder
from linflab.platform.cli.output import console
from linflab.platform.cluster.ports import is_listening
from linflab.platform.errors import InputError, RunInterrupted
from linflab.platform.tracking.storage import Storage


def ui(
    storage_dir: StorageFolder = DEFAULT_STORAGE,
    port: Annotated[int, typer.Option(min=1, max=65535, metavar="PORT", help="Port on localhost")] = 5000,
    cluster: OnCluster = False,
) -> None:
    """Open the MLflow UI, reachable from this machine only."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise InputError(f"port={port}: cannot be used ({error.strerror}); use another, such as 5050") from None
    if cluster:
        from linflab.platform.cluster.head import tracking_server_tunnel

        with tracking_server_tunnel(port) as uri:
            console.print("MLflow is open through ssh, reachable from this machine only; Ctrl-C closes it. Runs:")
            _print_links(uri, port)
            sys.stdout.flush()
            try:
                while is_listening(port):
                    time.sleep(5)
            except KeyboardInterrupt:
                raise RunInterrupted(
                    "connection to the cluster's tracking store closed; open it again with `linflab ui --cluster`"
                ) from None
        return
    storage = Storage.open_existing(storage_dir)
    if storage.tracking_server is not None:
        console.print(f"MLflow is at {storage.tracking_server} (LINFLAB_TRACKING_URI).")
        return
    console.print(
        "MLflow opens in about 15 seconds, reachable from this machine only; Ctrl-C closes it. Runs by dataset and eps:"
    )
    _print_links(storage.tracking_uri, port)
    sys.stdout.flush()
    if storage.is_writable:
        os.execv(sys.executable, _ui_server(storage.tracking_uri, port))  # MLflow then receives signals directly
    from linflab.platform.tracking.database import relocated_copy

    console.print(f"{storage.root} is not writable: MLflow opens a copy of its tracking store; changes are not kept.")
    with (
        signals.guarded(),
        relocated_copy(storage.database, storage.artifacts) as copy,
        subprocess.Popen(_ui_server(f"sqlite:///{copy}", port)) as server,
        signals.owned(server),
    ):
        try:
            raise SystemExit(server.wait())
        except KeyboardInterrupt:
            server.terminate()
            raise RunInterrupted("MLflow UI closed") from None


def _ui_server(tracking_uri: str, port: int) -> list[str]:
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", tracking_uri]
    return [*command, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]


def _print_links(tracking_uri: str, port: int) -> None:
    from linflab.reports.records import read_experiments

    for name, number in read_experiments(tracking_uri).items():
        # Without the workflow type, MLflow opens its pages for language models.
        console.print(f"  {name}: http://127.0.0.1:{port}/#/experiments/{number}/runs?workflowType=machine_learning")
