"""The ports of a cluster's head, and what is to be known of ports."""

import socket
from contextlib import suppress

RAY_PORT = 6379  # where workers join
DASHBOARD_PORT = 8265  # where jobs are taken
RECORD_PORT = 5500  # MLflow's server


def answers(port: int, host: str = "127.0.0.1") -> bool:
    """Whether something listens there."""
    with suppress(OSError), socket.create_connection((host, port), timeout=5):
        return True
    return False


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
