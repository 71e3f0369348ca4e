"""Names and texts from users and from exported runs on the command line, and how to tell runs apart there."""

import json
import os
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

import linflab
from linflab.platform.tracking.export import HEADER
from linflab.platform.tracking.storage import Storage
from linflab.reports import schema
from linflab.reports.pages import page_stem
from linflab.reports.records import read_runs
from tests.conftest import RECIPE, FinishedSweep, FinishedTraining, RunCli, assert_rejected

Command = Callable[..., subprocess.CompletedProcess[str]]
HOSTILE = "[/red] \x1b]0;owned\x07\x1b[2J\u202e<script>alert(1)</script>\\input{/etc/passwd}`id`$x_=1+1"


def make_run(number: int, **changes: object) -> dict[str, object]:
    """Return a finished run as stored in a file of exported runs."""
    parameters = {"dataset": "digits", "eps": "0.1", "seed": "0", "method": "m", "training.epochs": "1",
                  "model.kind": "conv_net", "model.width": str(number),
                  "compute.workers": "1", "compute.cpus_per_worker": "1"}  # fmt: skip
    metrics = {schema.TEST_CLEAN: 0.9, schema.TEST_ROBUST: 0.8, schema.TEST_CERTIFIED: 0.7, schema.TRAIN_SECONDS: 5.0}
    fixed = {
        "run_id": f"{number:032x}", "experiment": "digits eps 0.1", "status": "FINISHED",
        "start_time": 1_700_000_000_000, "end_time": 1_700_000_005_000,
        "tags": {schema.KIND: "trial", schema.METHOD: "m", schema.COMMAND: "linflab train r"},
        "params": parameters, "metrics": metrics,
    }  # fmt: skip
    merged = {name: {**value, **changes.pop(name, {})} if isinstance(value, dict) else value  # type: ignore[dict-item]
              for name, value in fixed.items()}  # fmt: skip
    return {**merged, **changes}


def write_runs(path: Path, *runs: dict[str, object]) -> str:
    path.write_text("\n".join([HEADER, *map(json.dumps, runs), ""]))
    return str(path)


@pytest.fixture(scope="module")
def hostile_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of exported runs in which every text is hostile."""
    tags = {schema.COMMAND: f"linflab train `\n{HOSTILE}", schema.METHOD: HOSTILE, schema.SWEEP: HOSTILE,
            schema.ATTACK: HOSTILE, schema.CERTIFIER: HOSTILE, schema.HARDWARE: HOSTILE, schema.RECIPE: HOSTILE,
            schema.COMMIT: f"1-{HOSTILE}", schema.NAME: HOSTILE, schema.SEARCHED_SETTINGS: "model.size",
            schema.TRIAL: HOSTILE,
            schema.OBJECTIVES: "certified",
            "linflab.tag.mine": HOSTILE}  # fmt: skip
    settings = {"method": HOSTILE, "model.size": HOSTILE, "training.epochs": HOSTILE}
    parent = make_run(9, tags={**tags, schema.KIND: "sweep", schema.BUDGET: HOSTILE, schema.DESCRIPTION: HOSTILE})
    failed = make_run(3, tags={**tags, schema.FAILURE: HOSTILE}, params=settings, status="FAILED")
    file = tmp_path_factory.mktemp("records") / "hostile.jsonl"
    lines = [make_run(k, tags=tags, params={**settings, "model.size": f"{k}{HOSTILE}"}) for k in (1, 2)]
    return Path(write_runs(file, parent, *lines, failed))


def find_controls(text: str) -> list[str]:
    return [one for one in text if unicodedata.category(one) in ("Cc", "Cf", "Cs") and one != "\n"]


def test_hostile_texts_are_shown_without_effect(run_cli: RunCli, hostile_file: Path, tmp_path: Path) -> None:
    storage = ("--storage", str(tmp_path / "runs"))
    assert run_cli("runs", "import", str(hostile_file), *storage).returncode == 0
    ids = read_runs(Storage(tmp_path / "runs").tracking_uri, {schema.KIND: "trial"})["run_id"].tolist()
    out = tmp_path / "out"
    for command in (
        ("runs",), ("sweeps",), ("runs", "--json"), ("report", "sweep", HOSTILE, "--output-dir", str(out)),
        ("report", "compare", HOSTILE, ids[-1], "--output-dir", str(out)),
        ("report", "run", ids[-1], "--output-dir", str(out)),
        ("report", "--all", "--output-dir", str(out)), ("report", "sweep", "[/red]"), ("report", "run", "\x1b[2J"),
    ):  # fmt: skip
        done = run_cli(*command, *storage)
        expected_status = 2 if command[-1] in ("[/red]", "\x1b[2J") else 0
        assert done.returncode == expected_status, (command, done.stderr)
        assert not find_controls(done.stdout) and not find_controls(done.stderr) and "Traceback" not in done.stderr
    for path in out.iterdir():
        if path.suffix in (".html", ".md", ".tex", ".csv"):
            text = path.read_text()
            assert not find_controls(text) and "<script>" not in (text if path.suffix == ".html" else "")
    assert {path.parent for path in tmp_path.rglob("*.html")} == {out}


@pytest.mark.parametrize(
    "changes",
    [
        {"start_time": 1_700_000_000_000_000_000, "end_time": 1_700_000_000_000_000_000},
        {"start_time": -1},
        {"end_time": 5},
        {"start_time": 1.5},
        {"metrics": {schema.TEST_CERTIFIED: 1e308}},
        {"metrics": {schema.TEST_CERTIFIED: float("nan")}},
        {"metrics": {schema.TEST_CLEAN: 1.5}},
        {"metrics": {schema.TRAIN_SECONDS: -1.0}},
        {"metrics": {schema.TRAIN_SECONDS: 1e300}},
        {"metrics": {schema.TRAIN_LOSS: float("inf")}},
        {"params": None},
        {"run_id": None},
    ],
)
def test_absurd_runs_are_rejected_with_their_line(run_cli: RunCli, tmp_path: Path, changes: dict[str, object]) -> None:
    content = json.loads(json.dumps(make_run(2)))
    for name, value in changes.items():
        content[name] = {**content[name], **value} if isinstance(value, dict) else value
    file = write_runs(tmp_path / "r.jsonl", make_run(1), content)
    done = run_cli("runs", "import", file, "--storage", str(tmp_path / "runs"))
    assert_rejected(done, f"file={file}", "line 3")
    assert not Storage(tmp_path / "runs").has_runs or read_runs(Storage(tmp_path / "runs").tracking_uri, {}).empty


def test_runs_are_distinguished_and_filtered(run_cli: RunCli, tmp_path: Path) -> None:
    named = make_run(1, tags={schema.NAME: "first", "linflab.tag.campaign": "a"})
    file = write_runs(
        tmp_path / "r.jsonl", named, make_run(2), make_run(3, status="FAILED", params={"model.width": "2"})
    )
    storage = ("--storage", str(tmp_path / "runs"))
    assert run_cli("runs", "import", file, *storage).returncode == 0
    listed = {
        row["settings"]["model.width"]: row for row in json.loads(run_cli("runs", "--json", *storage).stdout)[::-1]
    }
    assert set(listed) == {"1", "2"} and listed["1"]["name"] == "first" and listed["1"]["tags"] == {"campaign": "a"}
    assert (listed["1"]["clean"], listed["1"]["robust"], listed["1"]["test_certified"]) == (0.9, 0.8, 0.7)
    for filters, count in (
        (["--tag", "campaign=a"], 1), (["--tag", "campaign=b"], 0), (["--where", "model.width=2"], 2),
        (["--where", "model.width=2.0", "--where", "status=finished"], 1), (["--where", "name=first"], 1),
    ):  # fmt: skip
        assert len(json.loads(run_cli("runs", "--json", *filters, *storage).stdout)) == count, filters
    text = run_cli("runs", *storage).stdout
    assert all(word in text for word in ("width=1", "width=2", "first", "campaign=a", "90.00%", "80.00%", "70.00%"))
    for option, value in (("where", "model.widht=1"), ("where", "x"), ("tag", "x"), ("tag", "a b=c")):
        expected = f"{option}={value.removesuffix('=1')}"
        assert_rejected(run_cli("runs", f"--{option}", value, *storage), expected)


def test_training_run_has_its_given_name_and_tags(
    run_cli: RunCli, tmp_path: Path, finished_training: FinishedTraining
) -> None:
    quick = ["training.epochs=1", "evaluation.attack.methods=[pgd]", "evaluation.attack.steps=1", "model.width=8"]
    storage = ("--storage", str(tmp_path))
    done = run_cli(
        "train", RECIPE, *quick, 'method="net [/1] 网络"', "--name", "[/n]", "--tag", "campaign=a=b", *storage
    )
    assert done.returncode == 0, done.stderr
    (run,) = read_runs(Storage(tmp_path).tracking_uri, {schema.KIND: "trial"}).to_dict("records")
    assert run[schema.NAME] == "[/n]" and run["linflab.tag.campaign"] == "a=b"
    resume = ["train", RECIPE, *quick, 'method="net [/1] 网络"', "--resume", "--name", "[/m]", "--tag", "k=c", *storage]
    assert run_cli(*resume).returncode == 0
    (run,) = read_runs(Storage(tmp_path).tracking_uri, {schema.KIND: "trial"}).to_dict("records")
    assert (run[schema.NAME], run["linflab.tag.campaign"], run["linflab.tag.k"]) == ("[/m]", "a=b", "c")
    others = read_runs(Storage(finished_training.storage).tracking_uri, {schema.KIND: "trial"}).set_index("run_id")
    name = others.loc[finished_training.id, schema.NAME]
    assert "epochs=3" in name and RECIPE in name
    text = run_cli("runs", *storage).stdout
    assert "net [/1] 网络" in text and "[/m]" in text
    assert_rejected(run_cli("train", RECIPE, "--tag", "x", *storage), "tag=x")


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment", [{"PYTHONIOENCODING": "ascii"}, {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}]
)
def test_ascii_terminal_shows_other_letters_as_escapes(
    linflab: Command, tmp_path: Path, environment: dict[str, str]
) -> None:
    file = write_runs(tmp_path / "r.jsonl", *(make_run(k, params={"method": "网络", "seed": str(k), "model.width": "1"})
                                           for k in range(3)))  # fmt: skip
    storage = ("--storage", str(tmp_path / "runs"))
    assert linflab("runs", "import", file, *storage, **environment).returncode == 0
    for command in (["runs"], ["report", "--all"], ["report", "table", "网.yaml"]):
        done = linflab(*command, *storage, **environment)
        assert done.returncode == (2 if "table" in command else 0) and "Traceback" not in done.stderr
        assert done.stdout.isascii() and done.stderr.isascii()
    (tmp_path / "t.yaml").write_text("title: 名 ±\ngroups: [{dataset: digits, eps: 0.1}]\n", encoding="utf-8")
    done = linflab("report", "table", str(tmp_path / "t.yaml"), *storage, **environment)
    assert done.returncode == 0 and done.stdout.isascii() and "70.00 +- 0.00" in done.stdout


def test_all_reports_have_own_tables_and_all_datasets(run_cli: RunCli, tmp_path: Path) -> None:
    file = write_runs(tmp_path / "r.jsonl", make_run(1), make_run(2, params={"dataset": "mine", "eps": "0.2"}))
    storage = ("--storage", str(tmp_path / "runs"))
    run_cli("runs", "import", file, *storage)
    (tmp_path / "own.yaml").write_text("title: Own\ngroups: [{dataset: digits, eps: 0.1}]\n")
    assert run_cli("report", "table", str(tmp_path / "own.yaml"), *storage).returncode == 0
    (tmp_path / "own.yaml").unlink()
    assert run_cli("report", "--all", *storage, "--output-dir", str(tmp_path / "out")).returncode == 0
    index = (tmp_path / "out" / "index.html").read_text()
    assert "table-own.html" in index and "recorded.html" in index
    recorded = (tmp_path / "out" / "recorded.csv").read_text()
    assert "digits" in recorded and "mine" in recorded


def test_every_comparison_has_its_own_files(run_cli: RunCli, tmp_path: Path) -> None:
    storage = ("--storage", str(tmp_path / "runs"))
    run_cli("runs", "import", write_runs(tmp_path / "r.jsonl", *map(make_run, (1, 2, 3))), *storage)
    ids = read_runs(Storage(tmp_path / "runs").tracking_uri, {schema.KIND: "trial"})["run_id"].tolist()
    for pair in (ids[:2], ids[1:], ids):
        assert run_cli("report", "compare", *pair, *storage).returncode == 0
    assert len(list((tmp_path / "runs" / "reports").glob("comparison*.csv"))) == 3


def test_page_names_are_unique() -> None:
    names = ["a/b", "a_b", "a b", "../../x", "x" * 200, "x" * 201, "网", "络", "\x1b", "\udc80"]
    pages = [page_stem("sweep", name) for name in names]
    assert len(set(pages)) == len(names)
    assert all(page.isascii() and len(page) < 120 and not set(page) & set("/\x1b ") for page in pages)


def test_sweep_is_not_suggested_for_a_missing_run(run_cli: RunCli, finished_sweep: FinishedSweep) -> None:
    done = run_cli("report", "run", "three", "--storage", str(finished_sweep.storage))
    assert_rejected(done, "three", "`linflab runs`")
    assert done.stderr.count("three") == 1  # the sweep of this name is not suggested


def test_version_is_printed(run_cli: RunCli) -> None:
    done = run_cli("--version")
    assert done.returncode == 0 and linflab.__version__ in done.stdout
    module = subprocess.run([sys.executable, "-m", "linflab", "--version"], capture_output=True, text=True, check=False)
    assert module.returncode == 0 and module.stdout == done.stdout


def test_shell_completes_recipes(linflab: Command) -> None:
    environment = {"_LINFLAB_COMPLETE": "complete_bash", "COMP_WORDS": "linflab train digits", "COMP_CWORD": "2"}
    assert RECIPE in linflab(**environment).stdout.split()


def test_every_setting_is_described(run_cli: RunCli) -> None:
    from linflab.platform.config.overrides import load_config, recipe_names

    for recipe in recipe_names():
        experiment = load_config(recipe)
        assert list(experiment.descriptions()) == list(experiment.to_flat_dict())
        assert all(experiment.descriptions().values()), recipe
    done = run_cli("describe", RECIPE)
    theta = next(line for line in done.stdout.splitlines() if line.strip().startswith("theta:"))
    assert "#" in theta and os.linesep not in theta
