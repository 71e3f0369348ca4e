"""MLflow server of one job, which accepts only requests with the job's token.

The nodes of a batch job share a file system, but SQLite must not be written from several nodes. The first node
therefore runs this server on the storage's database. Artifacts are written to the shared folder directly.
"""

import hmac
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from linflab.platform.cluster.ports import find_free_port, no_proxy_with
from linflab.platform.errors import InputError, TrainingError
from linflab.platform.tracking.storage import Storage

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

MODULE = "linflab.platform.cluster.tracking_server"
TOKEN_VAR = "MLFLOW_TRACKING_TOKEN"  # MLflow's clients send its value
STARTUP_TIMEOUT_S = 180.0
CHECK_INTERVAL_S = 1.0


class RequireToken:
    """ASGI middleware that rejects requests without the token, except those of the health check.

    Args:
        app: Application that handles accepted requests.
        token: Token that clients send in the header `Authorization: Bearer TOKEN`.
    """

    def __init__(self, app: "ASGIApp", token: str) -> None:
        self._app, self._expected = app, f"Bearer {token}".encode()

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Handle a request or event of the server."""
        from starlette.responses import PlainTextResponse

        sent = dict(scope.get("headers", [])).get(b"authorization", b"")
        is_open = scope["type"] == "lifespan" or scope.get("path") == "/health"
        if is_open or hmac.compare_digest(sent, self._expected):
            await self._app(scope, receive, send)
        else:
            await PlainTextResponse("wrong or missing token", status_code=401)(scope, receive, send)


def run_with_server(storage_dir: Path, host: str, command: Sequence[str]) -> NoReturn:
    """Start the server in the background, and replace this process by a command that uses it.

    Args:
        storage_dir: Storage directory with the database; created if it is missing.
        host: Address of this machine at which the other nodes reach it.
        command: Program with arguments; LINFLAB_TRACKING_URI is set for it, and the server bypasses an HTTP proxy.

    Raises:
        InputError: If the token is missing, this machine does not have the address, or the storage cannot be used.
        TrainingError: If the server does not start; the message has the end of its log.
    """
    if not os.environ.get(TOKEN_VAR):
        raise InputError(f"{TOKEN_VAR}: must be set to the job's token; use the script that `linflab slurm` writes")
    storage = Storage.open(storage_dir)
    storage.ensure_store()
    port, log = find_free_port(host), storage.root / "mlflow.log"
    with log.open("ab") as file:
        server = subprocess.Popen(
            [sys.executable, "-m", MODULE, "serve", str(storage.root), host, str(port)],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
        )
    deadline = time.monotonic() + STARTUP_TIMEOUT_S
    while not _is_healthy(f"http://{host}:{port}"):
        if server.poll() is not None or time.monotonic() > deadline:
            server.kill()
            end = " ".join(log.read_text(errors="replace").split())[-500:]
            raise TrainingError(f"MLflow server did not start ({end}); see {log}")
        time.sleep(0.5)
    os.environ["LINFLAB_TRACKING_URI"] = f"http://{host}:{port}"
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = no_proxy_with(host)
    os.execvp(command[0], list(command))  # the server's parent is now the command


def _is_healthy(uri: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # without the proxy in http_proxy
    with suppress(OSError), opener.open(f"{uri}/health", timeout=5) as answer:
        return bool(answer.status == 200)
    return False


def _serve(root: Path, host: str, port: int) -> None:
    """Serve the database of a storage until the parent process ends."""
    parent = os.getppid()
    from mlflow.server.constants import ARTIFACT_ROOT_ENV_VAR, BACKEND_STORE_URI_ENV_VAR

    storage = Storage(root)
    os.environ[BACKEND_STORE_URI_ENV_VAR] = storage.tracking_uri
    os.environ[ARTIFACT_ROOT_ENV_VAR] = storage.artifacts.as_uri()
    os.environ["MLFLOW_SERVER_ALLOWED_HOSTS"] = "*"  # the token protects from requests by web pages
    import uvicorn
    from mlflow.server.fastapi_app import app

    # Slurm sends SIGTERM to all processes of a job. The command still needs the server for its last metrics.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    config = uvicorn.Config(RequireToken(app, os.environ[TOKEN_VAR]), host=host, port=port, log_level="warning")
    server = threading.Thread(target=uvicorn.Server(config).run, daemon=True)  # without handlers of signals
    server.start()
    while server.is_alive() and os.getppid() == parent:
        time.sleep(CHECK_INTERVAL_S)
    os._exit(0)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        _serve(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
    else:
        try:
            run_with_server(Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
        except (InputError, TrainingError) as failure:
            sys.exit(f"linflab: {failure}")
