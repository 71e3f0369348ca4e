"""Monitoring of Ray's processes; calls into Ray may block forever once these processes are gone."""

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import ray
from ray._private import ray_logging

from linflab.platform import signals
from linflab.platform.cluster.ports import is_listening

CHECK_INTERVAL_S = 2.0
MAX_MISSES = 4  # failed checks in a row; a busy machine may miss one
ON_GONE_TIMEOUT_S = 10.0


@contextmanager
def watch_ray(hint: str, on_gone: Callable[[], object] = lambda: None, status: int = 1) -> Iterator[None]:
    """Exit the process with one line, within 60 seconds, if a Ray process dies inside the context.

    The monitored processes are the cluster's head process and the raylet, Ray's main process on this machine. The
    raylet exits when its agent processes are gone. The calling process must be connected to Ray.

    Args:
        hint: Text that follows the reason in the line; it states what is kept, and how to resume.
        on_gone: Called before the process exits, for at most 10 seconds.
        status: Exit status.
    """
    addresses = _addresses()
    is_done = threading.Event()
    with suppress(AttributeError):  # no setting stops Ray from printing the log of a dead raylet
        ray_logging.stdout_deduplicator.skip_re = re.compile("")

    def watch() -> None:
        misses = dict.fromkeys(addresses, 0)
        while not is_done.wait(CHECK_INTERVAL_S):
            for name, (host, port) in addresses.items():
                misses[name] = 0 if is_listening(port, host) else misses[name] + 1
                if misses[name] >= MAX_MISSES and not is_done.is_set():
                    last = threading.Thread(target=on_gone, daemon=True)
                    last.start()
                    last.join(ON_GONE_TIMEOUT_S)
                    signals.end_process(
                        f"Ray stopped, since its {name} at {host}:{port} is gone; {hint}", status=status
                    )

    threading.Thread(target=watch, name="ray watch", daemon=True).start()
    try:
        yield
    finally:
        is_done.set()


def _addresses() -> dict[str, tuple[str, int]]:
    """Return host and port of each Ray process that this process depends on."""
    context = ray.get_runtime_context()
    head, _, port = context.gcs_address.rpartition(":")
    addresses = {"head process": (head, int(port))}
    for node in ray.nodes():
        if node["NodeID"] == context.get_node_id():
            addresses["raylet"] = (node["NodeManagerAddress"], int(node["NodeManagerPort"]))
    return addresses
