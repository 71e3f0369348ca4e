"""Ports of the head node, and port utilities."""

import os
import socket
from contextlib import suppress

from linflab.platform.errors import InputError

RAY_PORT = 6379  # of the Ray head, to which workers connect
DASHBOARD_PORT = 8265  # of Ray's dashboard, which accepts jobs
MLFLOW_PORT = 5500  # MLflow's server


def is_listening(port: int, host: str = "127.0.0.1") -> bool:
    """Return whether a process listens on a port."""
    with suppress(OSError), socket.create_connection((host, port), timeout=5):
        return True
    return False


def find_free_port(host: str = "127.0.0.1") -> int:
    """Return a free port at an address of this machine.

    Raises:
        InputError: If this machine does not have the address.
    """
    with socket.socket() as probe:
        try:
            probe.bind((host, 0))
        except OSError as error:
            raise InputError(
                f"host={host}: must be an address of this machine ({error}); use the address at which other machines "
                "reach it"
            ) from None
        return int(probe.getsockname()[1])


def no_proxy_with(host: str) -> str:
    """Return a value for no_proxy and NO_PROXY that adds a host to those that already bypass the HTTP proxy."""
    hosts = [host for name in ("no_proxy", "NO_PROXY") for host in os.environ.get(name, "").split(",")]
    hosts = [name.strip() for name in [*hosts, host] if name.strip()]
    return "*" if "*" in hosts else ",".join(dict.fromkeys(hosts))  # clients recognize * only alone
