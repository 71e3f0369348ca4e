"""Ports of the head node, and port utilities."""

import socket
from contextlib import suppress

RAY_PORT = 6379  # of the Ray head, to which workers connect
DASHBOARD_PORT = 8265  # of Ray's dashboard, which accepts jobs
MLFLOW_PORT = 5500  # MLflow's server


def is_listening(port: int, host: str = "127.0.0.1") -> bool:
    """Return whether a process listens on a port."""
    with suppress(OSError), socket.create_connection((host, port), timeout=5):
        return True
    return False


def find_free_port() -> int:
    """Return a free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
