"""`linflab node`: internal commands that the cluster YAML files run on each node."""

from pathlib import Path
from typing import Annotated

import typer

from linflab.platform.cluster.ports import MLFLOW_PORT, RAY_PORT
from linflab.platform.tracking.storage import Storage

node_app = typer.Typer(help="Internal commands that the cluster YAML files run on each node.", no_args_is_help=True)


@node_app.command("start-mlflow")
def node_serve(
    storage_dir: Annotated[
        Path, typer.Option("--storage", envvar="LINFLAB_STORAGE", help="Storage directory shared by all nodes")
    ],
    database: Annotated[str, typer.Option(help="URI of MLflow's database, on a disk that outlives the cluster")],
    port: Annotated[
        int, typer.Option(min=1, max=65535, metavar="PORT", help="Port of the MLflow server")
    ] = MLFLOW_PORT,
) -> None:
    """Start the MLflow server on the head node, for as long as Ray runs."""
    from linflab.platform.cluster.node import start_mlflow_server

    start_mlflow_server(Storage.folder(storage_dir), database, port)


@node_app.command("stop-with-head")
def node_end_with_head(
    head: Annotated[str, typer.Argument(help="Address of the head node")],
    port: Annotated[int, typer.Option(min=1, max=65535, metavar="PORT", help="Ray port of the head node")] = RAY_PORT,
) -> None:
    """Stop all Ray processes of this worker node, from the background, once its head node is gone."""
    from linflab.platform.cluster.node import stop_with_head

    stop_with_head(head, port)


@node_app.command("restrict-ports")
def node_close_ports(
    storage_dir: Annotated[
        Path, typer.Option("--storage", envvar="LINFLAB_STORAGE", help="Storage directory shared by all nodes")
    ],
) -> None:
    """Restrict the ports of Ray, PyTorch and MLflow on this on-premise node to nodes of the cluster, with nftables.

    These are TCP ports 5500, 6379, 8265 and 10001 to 65535. Other ports, such as ssh, stay as they are.
    """
    from linflab.platform.cluster.node import restrict_ports

    restrict_ports(Storage.folder(storage_dir))
