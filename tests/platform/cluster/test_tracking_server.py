"""The MLflow server of a job: it requires the token, writes the storage's database, and ends with the command."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from linflab.platform.cluster.ports import is_listening
from linflab.platform.cluster.tracking_server import MODULE, TOKEN_VAR
from linflab.platform.tracking.mlflow import client_of
from linflab.platform.tracking.storage import Storage

pytestmark = [pytest.mark.slow, pytest.mark.integration]
CLIENT = """
import os, sys, urllib.error, urllib.request
from pathlib import Path
from linflab.platform.tracking.mlflow import client_of
from linflab.platform.tracking.storage import Storage

storage = Storage.open(Path(sys.argv[1]))
client = client_of(storage)
experiment = client.create_experiment("one", artifact_location=storage.artifact_location)
run = client.create_run(experiment)
client.log_metric(run.info.run_id, "value", 3)
client.log_dict(run.info.run_id, {"a": 1}, "a.json")
uri = storage.tracking_server
for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": os.environ["MLFLOW_TRACKING_TOKEN"]}):
    for path in ("/api/2.0/mlflow/runs/get?run_id=" + run.info.run_id, "/", "/ajax-api/2.0/mlflow/experiments/search"):
        try:
            urllib.request.urlopen(urllib.request.Request(uri + path, headers=headers))
        except urllib.error.HTTPError as error:
            assert error.code == 401, error.code
        else:
            raise AssertionError(path)
print(run.info.run_id, uri.rpartition(":")[2])
"""


def test_server_requires_token_and_ends_with_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", MODULE, "run", str(tmp_path), "127.0.0.1", sys.executable, "-c", CLIENT]
    environment = {name: value for name, value in os.environ.items() if name.lower() != "no_proxy"}
    environment |= {TOKEN_VAR: "secret", "http_proxy": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}
    done = subprocess.run(
        [*command, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run, port = done.stdout.split()
    deadline = time.monotonic() + 20
    while is_listening(int(port)):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    client = client_of(Storage(tmp_path))  # reads the database, without a server
    assert client.get_run(run).data.metrics == {"value": 3}
    assert Path(client.download_artifacts(run, "a.json", str(tmp_path))).read_text().split() == ["{", '"a":', "1", "}"]


def test_address_of_another_machine_is_rejected(tmp_path: Path) -> None:
    command = [sys.executable, "-m", MODULE, "run", str(tmp_path), "192.0.2.1", "true"]
    done = subprocess.run(command, env={**os.environ, TOKEN_VAR: "a"}, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "host=192.0.2.1" in done.stderr and "Traceback" not in done.stderr


def test_missing_token_is_rejected(tmp_path: Path) -> None:
    command = [sys.executable, "-m", MODULE, "run", str(tmp_path), "127.0.0.1", "true"]
    environment = {name: value for name, value in os.environ.items() if name != TOKEN_VAR}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and TOKEN_VAR in done.stderr and "\n" not in done.stderr.strip()
