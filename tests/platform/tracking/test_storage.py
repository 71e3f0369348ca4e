"""Storage folders: creation and checks of the database, and artifacts of moved folders."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from mlflow.entities import Param
from mlflow.exceptions import MlflowException
from mlflow.store.db import utils
from mlflow.tracking import MlflowClient

from linflab.platform import locks
from linflab.platform.errors import InputError, RunLockedError
from linflab.platform.tracking import database
from linflab.platform.tracking.database import State, database_state, ensure_database, mlflow_revisions
from linflab.platform.tracking.mlflow import client_of, get_or_create_experiment, is_transient, retrying_client
from linflab.platform.tracking.storage import Storage
from linflab.reports import schema
from linflab.reports.records import read_runs
from tests.conftest import RECIPE, FinishedTraining, RunCli, assert_rejected

pytestmark = pytest.mark.integration

TINY = ["training.epochs=1", "model.width=8", "evaluation.attack.steps=1", "evaluation.attack.restarts=1"]


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database as linflab creates it; shared, because MLflow's migrations take seconds."""
    path = tmp_path_factory.mktemp("empty") / "mlflow.db"
    ensure_database(path, path.parent / "artifacts")
    return path


@pytest.fixture
def storage(empty_database: Path, tmp_path: Path) -> Storage:
    """A storage without runs."""
    (tmp_path / "runs").mkdir()
    shutil.copy(empty_database, tmp_path / "runs")
    return Storage.open(tmp_path / "runs")


@pytest.fixture
def storage_with_run(storage: Storage) -> Storage:
    """A storage with one run, logged by MLflow 3.99."""
    client = client_of(storage)
    tags = {schema.KIND: "trial", schema.VERSIONS: "python 3.11, mlflow 3.99.0"}
    client.create_run(get_or_create_experiment(client, storage, "digits eps 0.1"), tags=tags)
    return storage


def execute(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        for statement in statements:
            connection.execute(statement)


def list_names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_known_revisions_are_those_of_mlflow() -> None:
    revisions, newest = mlflow_revisions()
    assert newest == utils._get_latest_schema_revision() and newest in revisions and len(revisions) > 50


def test_new_database_is_ready_without_other_files(empty_database: Path) -> None:
    assert database_state(empty_database) is State.READY
    assert list_names(empty_database.parent) == {"mlflow.db", ".mlflow.db.lock"}
    assert MlflowClient(f"sqlite:///{empty_database}").get_experiment("0").name == "Default"


@pytest.mark.parametrize("kind", ["empty", "tables", "older", "no version"])
def test_unfinished_database_is_created_again(
    kind: str, empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_cli: RunCli
) -> None:
    path = tmp_path / "mlflow.db"
    if kind == "empty":
        path.touch()
    elif kind == "tables":
        execute(path, "CREATE TABLE experiments (experiment_id INTEGER)", "CREATE TABLE runs (run_uuid TEXT)")
    else:
        shutil.copy(empty_database, path)
        execute(path, "UPDATE alembic_version SET version_num = '451aebb31d03'")
        if kind == "no version":
            execute(path, "DROP TABLE alembic_version")
    assert database_state(path) is State.UNFINISHED
    assert run_cli("runs", "--storage", str(tmp_path)).returncode == 2  # there is nothing to list
    (tmp_path / f"{database.PARTIAL}killed").mkdir()  # left by a killed process
    (tmp_path / "mlflow.db-journal").write_bytes(b"of the former database")

    def create(target: Path, artifacts: Path) -> None:
        shutil.copy(empty_database, target)

    monkeypatch.setattr(database, "_migrate", create)
    monkeypatch.setattr(database, "QUIET_S", 0.1)
    time.sleep(0.2)
    ensure_database(path, tmp_path / "artifacts")
    assert database_state(path) is State.READY and list_names(tmp_path) == {"mlflow.db", ".mlflow.db.lock"}


def test_creation_by_another_process_is_waited_for(empty_database: Path, tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    path.touch()
    threading.Timer(1, lambda: shutil.copy(empty_database, path)).start()
    ensure_database(path, tmp_path / "artifacts")
    assert path.read_bytes() == empty_database.read_bytes()


def test_copy_by_another_process_is_waited_for(empty_database: Path, tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    content = empty_database.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="malformed"):
        database_state(path)
    threading.Timer(1, lambda: path.write_bytes(content)).start()
    ensure_database(path, tmp_path / "artifacts")
    assert path.read_bytes() == content


def test_damaged_database_is_rejected_unchanged(empty_database: Path, tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    content = empty_database.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="malformed"):
        ensure_database(path, tmp_path / "artifacts")
    assert path.read_bytes() == content[: len(content) // 2]


def test_database_is_created_by_one_of_many_threads(tmp_path: Path) -> None:
    def log_run(number: int) -> str:
        storage = Storage.open(tmp_path)
        client = client_of(storage)
        experiment = get_or_create_experiment(retrying_client(storage), storage, "digits eps 0.1")
        client.log_batch(client.create_run(experiment).info.run_id, params=[Param("seed", str(number))])
        return experiment

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(log_run, range(8)))) == 1
    runs = read_runs(Storage.from_path(tmp_path).tracking_uri, {})
    assert sorted(runs["seed"]) == sorted(map(str, range(8)))
    assert {name for name in list_names(tmp_path) if "mlflow" in name} == {"mlflow.db", ".mlflow.db.lock"}


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGKILL], ids=lambda number: number.name
)
def test_killed_creation_leaves_no_database(number: signal.Signals, tmp_path: Path) -> None:
    code = f"""
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from pathlib import Path
from linflab.platform.tracking.database import ensure_database
ensure_database(Path("{tmp_path}/mlflow.db"), Path("{tmp_path}/artifacts"))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob(f"{database.PARTIAL}*/mlflow.db")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(60) != 0
    assert not (tmp_path / "mlflow.db").exists() and database_state(tmp_path / "mlflow.db") is State.MISSING
    ensure_database(tmp_path / "mlflow.db", tmp_path / "artifacts")
    assert list_names(tmp_path) == {"mlflow.db", ".mlflow.db.lock"}


SUGGESTED_COMMANDS = {"451aebb31d03": "mlflow db upgrade sqlite:///{database}", "abcdef": "mlflow==3.99.0"}


@pytest.mark.parametrize("command", [["runs"], ["train", RECIPE], ["report", "table1"], ["evaluate", "0123"]])
@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE alembic_version SET version_num = '451aebb31d03'",
        "UPDATE alembic_version SET version_num = 'abcdef012345'",
        "DROP TABLE alembic_version",
        "DROP TABLE latest_metrics",
    ],
)
def test_database_of_another_schema_is_rejected_unchanged(
    storage_with_run: Storage, run_cli: RunCli, command: list[str], damage: str
) -> None:
    execute(storage_with_run.database, damage)
    before = storage_with_run.database.read_bytes()
    suggested = [command for sign, command in SUGGESTED_COMMANDS.items() if sign in damage]
    suggested = [command.format(database=storage_with_run.database) for command in suggested]
    assert_rejected(
        run_cli(*command, "--storage", str(storage_with_run.root)),
        f"storage={storage_with_run.root}",
        "mlflow.db",
        *suggested,
    )
    assert storage_with_run.database.read_bytes() == before


@pytest.mark.parametrize("command", [["runs"], ["train", RECIPE], ["report", "run", "0123"]])
def test_databases_of_other_tools_are_rejected(tmp_path: Path, run_cli: RunCli, command: list[str]) -> None:
    execute(tmp_path / "mlflow.db", "CREATE TABLE studies (id INTEGER)")
    assert_rejected(run_cli(*command, "--storage", str(tmp_path)), f"storage={tmp_path}")


@pytest.mark.parametrize("command", [["runs"], ["train", RECIPE], ["sweep", RECIPE, "demo"]])
def test_locked_database_is_rejected_at_the_start(
    storage_with_run: Storage, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    assert database.LOCK_TIMEOUT_S <= 5
    monkeypatch.setattr(database, "LOCK_TIMEOUT_S", 0.2)
    with closing(sqlite3.connect(storage_with_run.database, isolation_level=None)) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        done = run_cli(*command, "--storage", str(storage_with_run.root))
    assert_rejected(done, f"storage={storage_with_run.root}")
    with (
        closing(sqlite3.connect(storage_with_run.database, isolation_level=None)) as holder,
        pytest.raises(RunLockedError),
    ):
        holder.execute("BEGIN EXCLUSIVE")
        database_state(storage_with_run.database)


def test_training_waits_for_a_lock_and_reports_it(
    storage_with_run: Storage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client = retrying_client(storage_with_run)
    (run,) = read_runs(storage_with_run.tracking_uri, {})["run_id"]
    client.set_tag(run, "before", "1")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(locks.announce_wait.__wrapped__, "__defaults__", (2.0,))
    with closing(sqlite3.connect(storage_with_run.database, isolation_level=None, check_same_thread=False)) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        threading.Timer(5.0, lambda: holder.execute("COMMIT")).start()
        client.set_tag(run, "during", "2")
    assert client.get_run(run).data.tags["during"] == "2"
    assert capsys.readouterr().err.count("linflab: ") == 2  # one when it waits, one when it continues


def test_broken_schema_is_not_waited_for(storage_with_run: Storage) -> None:
    client = retrying_client(storage_with_run)
    (run,) = read_runs(storage_with_run.tracking_uri, {})["run_id"]
    execute(storage_with_run.database, "DROP TABLE tags")
    start = time.monotonic()
    with pytest.raises(MlflowException) as raised:
        client.set_tag(run, "a", "b")
    assert not is_transient(raised.value) and time.monotonic() - start < 10


def test_server_other_than_mlflow_is_rejected(run_cli: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>something else</html>")

        def log_message(self, *_: object) -> None:
            """Keep stderr for the command."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{server.server_port}"
        for command in (["runs"], ["train", RECIPE]):
            done = run_cli(*command, "--storage", str(tmp_path), LINFLAB_TRACKING_URI=uri)
            assert_rejected(done, f"LINFLAB_TRACKING_URI={uri}")
        server.shutdown()


def read_artifact_roots(path: Path) -> set[str]:
    """Return the folders that contain artifacts/... according to the database."""
    with closing(sqlite3.connect(path)) as connection:
        queries = ("SELECT artifact_uri FROM runs", "SELECT artifact_location FROM logged_models")
        uris = [uri for query in queries for (uri,) in connection.execute(query)]
    return {uri.split("/artifacts/")[0] for uri in uris}


def read_modification_times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["moved", "50#1 Größe"])
def test_copied_and_moved_storage_works_at_its_new_path(
    name: str, finished_training: FinishedTraining, tmp_path: Path, run_cli: RunCli
) -> None:
    original, before = finished_training.storage, read_modification_times(finished_training.storage)
    shutil.copytree(original, tmp_path / "copy")
    storage = Storage(shutil.move(tmp_path / "copy", tmp_path / name))
    run = finished_training.id
    assert read_artifact_roots(storage.database) == {original.as_uri()}
    # By linflab, for any paths in the database.
    assert client_of(storage).download_artifacts(run, schema.WEIGHTS_FILE).startswith(str(storage.root))
    options = ("--storage", str(storage.root))
    assert run_cli("evaluate", run, "--attacks", "none", *options).returncode == 0
    assert read_artifact_roots(storage.database) == {storage.root.as_uri()}
    assert (storage.artifacts / run / "artifacts" / schema.EVALUATIONS_DIR / "1").is_dir()
    # By other tools, which use the paths in the database.
    client = MlflowClient(storage.tracking_uri)
    assert client.download_artifacts(run, schema.WEIGHTS_FILE, str(tmp_path))
    if name == "moved":
        assert run_cli("train", RECIPE, *TINY, *options).returncode == 0
        done = run_cli("report", "run", run, *options)
        assert done.returncode == 0
    assert read_modification_times(original) == before
    assert read_artifact_roots(storage.database) == {storage.root.as_uri()}


def test_figures_are_found_in_a_moved_storage(
    finished_training: FinishedTraining, tmp_path: Path, run_cli: RunCli
) -> None:
    shutil.copytree(finished_training.storage, tmp_path / "copy")
    storage = Storage(tmp_path / "copy")
    done = run_cli("report", "run", finished_training.id, "--storage", str(storage.root))
    assert done.returncode == 0 and len(list(storage.reports.glob("*.png"))) == 4
    assert "--radii-dir" not in done.stdout


def test_storage_opened_through_a_link_is_unchanged(
    finished_training: FinishedTraining, tmp_path: Path, run_cli: RunCli
) -> None:
    (tmp_path / "link").symlink_to(finished_training.storage)
    before = (finished_training.storage / "mlflow.db").read_bytes()
    assert run_cli("runs", "--storage", str(tmp_path / "link")).returncode == 0
    assert (finished_training.storage / "mlflow.db").read_bytes() == before


def test_artifacts_of_other_tools_keep_their_location(storage_with_run: Storage, tmp_path: Path) -> None:
    client = client_of(storage_with_run)
    other = client.create_experiment("theirs", artifact_location=(tmp_path / "theirs").as_uri())
    run = client.create_run(other).info.run_id
    client.log_text(run, "text", "file.txt")
    moved = Storage.open(Path(shutil.move(storage_with_run.root, tmp_path / "moved")))
    assert (tmp_path / "theirs" / run / "artifacts" / "file.txt").exists()
    client = client_of(moved)
    client.log_text(run, "text", "another.txt")
    assert (tmp_path / "theirs" / run / "artifacts" / "another.txt").exists()
    for uri in ("s3://bucket/artifacts/0/artifacts", "mlflow-artifacts:/1/ab/artifacts", "/x/artifacts/../artifacts"):
        assert moved.locate(uri) == uri


def test_artifacts_of_a_server_move_with_the_storage(tmp_path: Path) -> None:
    """The server of a Slurm job gives each experiment its own folder of artifacts."""
    storage = Storage.open(tmp_path / "before")
    storage.ensure_store()
    client = MlflowClient(storage.tracking_uri)
    experiment = client.create_experiment("digits eps 0.1", artifact_location=f"{storage.artifacts.as_uri()}/7")
    run = client.create_run(experiment, tags={schema.KIND: "trial"}).info.run_id
    client.log_text(run, "text", "file.txt")
    moved = Storage.open(Path(shutil.move(storage.root, tmp_path / "after")))
    client = MlflowClient(moved.tracking_uri)
    assert client.get_experiment(experiment).artifact_location == f"{moved.artifacts.as_uri()}/7"
    assert Path(client.download_artifacts(run, "file.txt", str(tmp_path))).read_text() == "text"


READ_ONLY = """
import sys
from pathlib import Path
from linflab.platform.cli.main import main
from linflab.platform.tracking.database import relocated_copy
from linflab.platform.tracking.storage import Storage

storage, run, out = sys.argv[1:]
for command, arguments in (
    ("runs", []), ("sweeps", []), ("evaluate", [run, "--attacks", "none"]), ("report", ["run", run, "--output-dir",
    out]), ("runs export", [out + "/records.jsonl"]), ("train", ["%s"]),
):
    sys.argv = ["linflab", *command.split(), *arguments, "--storage", storage]
    try:
        main()
    except SystemExit as ended:
        print("STATUS", command, ended.code or 0, sep="\t")
opened = Storage.open_existing(Path(storage))
with relocated_copy(opened.database, opened.artifacts) as copy:
    import mlflow

    print("COPY", mlflow.MlflowClient(f"sqlite:///{copy}").get_run(run).info.artifact_uri)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="requires root to mount")
def test_storage_mounted_read_only_can_be_read(finished_training: FinishedTraining, tmp_path: Path) -> None:
    run = finished_training.id
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    shutil.copytree(finished_training.storage, tmp_path / "copy")
    code = READ_ONLY % RECIPE
    script = 'mount --bind "$1" "$2" && mount -o remount,ro,bind "$2" && exec "$3" -c "$4" "$2" "$5" "$6"'
    arguments = [str(tmp_path / "copy"), str(mounted), sys.executable, code, run, str(tmp_path / "out")]
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", *arguments], capture_output=True, text=True, timeout=300
    )
    statuses = [tuple(line.split("\t")[1:]) for line in done.stdout.splitlines() if line.startswith("STATUS")]
    expected = [
        ("runs", "0"),
        ("sweeps", "0"),
        ("evaluate", "0"),
        ("report", "0"),
        ("runs export", "0"),
        ("train", "2"),
    ]
    assert statuses == expected, done.stdout + done.stderr
    assert f"COPY {(mounted / 'artifacts').as_uri()}/{run}/" in done.stdout
    assert "Traceback" not in done.stderr


def test_commands_tolerate_incomplete_runs(storage: Storage, tmp_path: Path, run_cli: RunCli) -> None:
    """Runs of other tools can have linflab's tags, but no names, settings or times."""
    client = client_of(storage)
    experiment = get_or_create_experiment(client, storage, "digits eps 0.1")
    sweep_tags = {schema.KIND: "trial", schema.SWEEP: "s"}
    incomplete: list[tuple[dict[str, str], dict[str, str]]] = [
        ({schema.KIND: "trial"}, {}),
        (sweep_tags, {}),
        (
            {**sweep_tags, schema.TRIAL: "1", schema.OBJECTIVES: "nonsense", schema.SEARCHED_SETTINGS: "x"},
            {"eps": "0.1"},
        ),
        ({schema.KIND: "trial", schema.METHOD: "m"}, {"dataset": "digits", "eps": "wide"}),
        ({schema.KIND: "trial", schema.METHOD: "m"}, {"dataset": "digits", "eps": "0.1"}),
        ({schema.KIND: "sweep"}, {}),
        ({schema.KIND: "sweep", schema.SWEEP: "s"}, {}),
        ({}, {"dataset": "digits"}),
    ]
    runs = []
    for tags, settings in incomplete:
        runs.append(client.create_run(experiment, tags=tags).info.run_id)
        for name, value in settings.items():
            client.log_param(runs[-1], name, value)
        client.log_metric(runs[-1], schema.TEST_CERTIFIED, 0.5)
        client.set_terminated(runs[-1], "FINISHED")
    execute(storage.database, f"UPDATE runs SET start_time = {10**18} WHERE run_uuid = '{runs[0]}'")
    execute(storage.database, f"UPDATE runs SET start_time = NULL WHERE run_uuid = '{runs[1]}'")
    options = ("--storage", str(storage.root))
    for command in (["runs"], ["sweeps"], ["report", "--all", "--output-dir", str(tmp_path / "out")]):
        assert run_cli(*command, *options).returncode == 0
    for command in (["run", runs[0]], ["run", runs[3]], ["run", runs[4]], ["compare", "s"], ["sweep", "s"]):
        assert_rejected(run_cli("report", *command, *options), command[1])
    assert_rejected(run_cli("evaluate", runs[4], *options), runs[4])
