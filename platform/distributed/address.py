"""Check of a Ray cluster's address before Ray connects: Ray itself would retry for minutes."""

import os
import re
import socket
from contextlib import closing, suppress
from pathlib import Path
from threading import Thread

from linflab.platform.config.experiment import ExperimentConfig
from linflab.platform.errors import InputError

TOKEN = "~/.ray/auth_token"
TIMEOUT_S = 5.0  # for each of name resolution, connection, first response
ADVICE = (
    "set RAY_ADDRESS to HOST:PORT of a running cluster, such as 127.0.0.1:6379, or unset it to start Ray on this "
    "machine"
)


def configured_address() -> str | None:
    """Return RAY_ADDRESS; None if it is empty or `local`, so that Ray starts on this machine."""
    address = os.environ.get("RAY_ADDRESS", "").strip()
    return None if address in ("", "local") else address


def check_address(address: str) -> str:
    """Check the address of a running cluster, and return it as HOST:PORT.

    Args:
        address: HOST:PORT, or `auto` for a cluster on this machine.

    Raises:
        InputError: If the address is not valid, or no cluster responds within about 15 seconds.
    """
    setting = f"RAY_ADDRESS={address}"
    if address.startswith("ray://"):
        raise InputError(f"{setting}: Ray Client is not supported; run on a node of the cluster and {ADVICE}")
    if address == "auto":
        from ray._private.services import canonicalize_bootstrap_address_or_die

        try:
            address = canonicalize_bootstrap_address_or_die("auto")
        except Exception:  # ConnectionError or RuntimeError, depending on Ray's version
            raise InputError(f"{setting}: no Ray cluster found on this machine; {ADVICE}") from None
    match = re.fullmatch(r"\[?([A-Za-z0-9._:-]+?)\]?:(\d{1,5})", address)
    if match is None or not 0 < int(match[2]) < 65536:
        raise InputError(f"{setting}: must be the address of a Ray cluster; {ADVICE}")
    if not _accepts_connections(match[1], int(match[2])):
        raise InputError(f"{setting}: nothing listens at {address}; {ADVICE}")
    if os.environ.get("RAY_USE_TLS", "0") in ("", "0") and not _is_cluster(address):
        raise InputError(f"{setting}: the server at {address} is not the head node of a Ray cluster; {ADVICE}")
    return address


def _accepts_connections(host: str, port: int) -> bool:
    successes: list[bool] = []

    def connect() -> None:
        try:
            with closing(socket.create_connection((host, port), timeout=TIMEOUT_S)):
                successes.append(True)
        except OSError:
            pass

    thread = Thread(target=connect, daemon=True)  # a thread, since name resolution has no timeout
    thread.start()
    thread.join(2 * TIMEOUT_S)
    return bool(successes)


def _is_cluster(address: str) -> bool:
    """Return whether the head node of a cluster responds at this address.

    Raises:
        InputError: If the cluster does not accept this user's token.
    """
    import grpc
    from ray.core.generated.gcs_service_pb2 import CheckAliveRequest
    from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

    def responds(token: str | None) -> bool:
        metadata = [("authorization", f"Bearer {token}")] if token else None
        NodeInfoGcsServiceStub(channel).CheckAlive(CheckAliveRequest(), timeout=TIMEOUT_S, metadata=metadata)
        return True

    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            return responds(None)
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.UNAUTHENTICATED:
                return False
        token = _token()
        with suppress(grpc.RpcError):
            if token and responds(token):
                _show_token()
                return True
    raise InputError(
        f"RAY_ADDRESS={address}: the cluster does not accept this user's token; set the cluster's token in {TOKEN} or "
        "RAY_AUTH_TOKEN"
    )


def _show_token() -> None:
    """Make Ray send the token to this cluster; by default, Ray sends it only to clusters that Ray starts."""
    from ray._raylet import Config  # type: ignore[attr-defined]

    os.environ["RAY_AUTH_MODE"] = "token"
    Config.initialize("")  # read the variable again, since Ray read it on import


def _token() -> str | None:
    """Return the token from the places where Ray searches for it; None if there is no token."""
    with suppress(OSError, UnicodeDecodeError):
        path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or TOKEN).expanduser()
        return (os.environ.get("RAY_AUTH_TOKEN") or path.read_text()).strip() or None
    return None


def needs_ray(experiment: ExperimentConfig) -> bool:
    """Return True if a config is trained on Ray: it has several workers, or RAY_ADDRESS names a cluster."""
    return experiment.compute.workers > 1 or configured_address() is not None
