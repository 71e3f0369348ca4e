"""Verified accuracy of a run: only evaluations of at least as many images replace it, with its description."""

import shutil
from pathlib import Path

import pytest

from linflab.platform.results.evaluate import EpsResult, EvaluationResult, log_evaluation
from linflab.platform.tracking.mlflow import client_of
from linflab.platform.tracking.runs import Run
from linflab.platform.tracking.storage import Storage
from linflab.reports import schema
from linflab.reports.records import read_run
from linflab.reports.verification import num_verified_images
from tests.conftest import FinishedTraining

pytestmark = pytest.mark.integration


@pytest.fixture
def storage(finished_training: FinishedTraining, tmp_path: Path) -> Storage:
    return Storage.open(Path(shutil.copytree(finished_training.storage, tmp_path / "runs")))


def log(storage: Storage, run: str, num_images: int, certified: float, sound: bool = True) -> tuple[float, str | None]:
    """Log an evaluation by `complete`, and return the verified accuracy of the run with its description."""
    row = EpsResult(0.1, clean=0.9, certified=certified, certified_real=None, robust=None, certificate_violations=None)
    experiment: dict[str, object] = {"eps": 0.1, "evaluation.time_limit": 2.0}
    result = EvaluationResult([row], "complete", sound, (), "", experiment, num_images, 360)
    log_evaluation(storage, run, result)
    data = read_run(client_of(storage), run).data
    return data.metrics[schema.TEST_VERIFIED], data.tags.get(schema.TEST_VERIFICATION)


def test_smaller_samples_do_not_replace_it(storage: Storage, finished_training: FinishedTraining) -> None:
    run = finished_training.id
    assert log(storage, run, 8, 0.5) == (0.5, "8 of 360 images by complete-sound (time limit 2 s): 50.00% certified")
    large = log(storage, run, 360, 0.25)
    assert large == (0.25, "360 of 360 images by complete-sound (time limit 2 s): 25.00% certified")
    assert log(storage, run, 8, 0.75) == large
    metrics = read_run(client_of(storage), run).data.metrics
    assert metrics["test/certified_accuracy/complete-sound/eps-0.1/images-8"] == 0.75
    accuracy, description = log(storage, run, 360, 0.375, sound=False)
    assert accuracy == 0.375 and description is not None and "real arithmetic" in description


@pytest.mark.parametrize("method", ["log_metrics", "log_tags"])
def test_interruptions_leave_no_description_of_another_accuracy(
    method: str, storage: Storage, finished_training: FinishedTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, original = finished_training.id, getattr(Run, method)
    log(storage, run, 360, 0.25)

    def interrupt(self: Run, values: dict[str, object], **step: int) -> None:
        if {schema.TEST_VERIFIED, schema.TEST_VERIFICATION} & values.keys():
            raise KeyboardInterrupt
        original(self, values, **step)

    with monkeypatch.context() as patch:
        patch.setattr(Run, method, interrupt)
        with pytest.raises(KeyboardInterrupt):
            log(storage, run, 360, 0.5)
    assert schema.TEST_VERIFICATION not in read_run(client_of(storage), run).data.tags
    accuracy, description = log(storage, run, 8, 0.75)
    assert accuracy == 0.75 and num_verified_images(str(description)) == 8
