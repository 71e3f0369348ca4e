"""`linflab report bound`: a table of all terms next to the measured errors, a figure, and rejected runs."""

from pathlib import Path

import pandas as pd
import pytest
from mlflow.tracking import MlflowClient

from linflab.reports import schema
from tests.conftest import FinishedTraining, RunCli, assert_rejected

pytestmark = pytest.mark.integration


def test_bound_is_reported_with_terms_and_measured_errors(
    run_cli: RunCli, tmp_path: Path, finished_training: FinishedTraining
) -> None:
    storage = ("--storage", str(finished_training.storage))
    done = run_cli("report", "bound", finished_training.id, *storage, "--output-dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    stem = f"bound-{finished_training.id[:8]}"
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"{stem}.{suffix}" for suffix in ("md", "tex", "html", "csv")} | {
        f"{stem}_terms.png",
        f"{stem}_terms.pdf",
    }
    table = pd.read_csv(tmp_path / f"{stem}.csv")
    margin, size, bound, robust, certified, _ = table["Value"].tolist()
    metrics = (
        MlflowClient(f"sqlite:///{finished_training.storage}/mlflow.db").get_run(finished_training.id).data.metrics
    )
    assert robust == pytest.approx(100 * (1 - metrics[schema.TEST_ROBUST]))
    assert certified == pytest.approx(100 * (1 - metrics[schema.TEST_CERTIFIED]))
    assert bound == pytest.approx(min(100, margin + size)) and bound >= certified >= robust
    assert table["Origin"].tolist() == ["measured", "proven", "proven", "measured", "measured", "constant assumed"]
    assert "n = 1,200" in (tmp_path / f"{stem}.md").read_text()
    done = run_cli("report", "bound", finished_training.id, *storage, "--images", "300", "--output-dir", str(tmp_path))
    assert "n = 300" in (tmp_path / f"{stem}.md").read_text()
    assert pd.read_csv(tmp_path / f"{stem}.csv")["Value"][1] > size


def test_unsuitable_options_are_rejected(run_cli: RunCli, finished_training: FinishedTraining) -> None:
    command = ("report", "bound", finished_training.id, "--storage", str(finished_training.storage))
    assert_rejected(run_cli(*command, "--confidence", "1"), "confidence=1")
    assert_rejected(run_cli(*command, "--images", "1201"), "images=1201", "1200")
    assert_rejected(run_cli("report", "bound", "missing", *command[3:]), "missing")
