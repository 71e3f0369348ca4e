"""One trial as an MLflow run: training, one evaluation on the test set, and logging of both."""

import dataclasses
import errno
import math
import os
import platform as machine
import shlex
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from linflab.models.networks.cost import count_flops, count_parameters
from linflab.models.robustness.inputs import is_out_of_memory
from linflab.platform.config.experiment import ExperimentConfig
from linflab.platform.data.datasets import Split, load_dataset
from linflab.platform.errors import InputError, RunInterrupted, TrainingError
from linflab.platform.signals import defer_signal
from linflab.platform.tracking.runs import Run, find_runs
from linflab.platform.tracking.storage import Storage
from linflab.platform.training.checkpoints import CheckpointStore
from linflab.platform.training.evaluation import (
    BatchResult,
    EvaluationSpec,
    ScoringReport,
    evaluate,
    evaluation_spec,
    sort_by_position,
)
from linflab.platform.training.fit import fit
from linflab.platform.training.loop import EpochMetrics, StepMetrics
from linflab.platform.training.weights import save_weights
from linflab.reports import schema
from linflab.reports.outputs import write_columns

Report = EpochMetrics | StepMetrics | ScoringReport
WORKER_EXIT_TIMEOUT_S = 60.0  # time within which Ray ends orphaned processes
MAX_RUN_NAME = 200


def default_run_name(recipe: str, overrides: Sequence[str]) -> str:
    """Return the default name of a run: its recipe and overrides."""
    from linflab.reports.formatting import describe_settings

    stem = Path(recipe).stem if "/" in recipe else recipe
    changes = describe_settings({path: value for path, _, value in (one.partition("=") for one in overrides)})
    return f"{stem} {changes}".strip()[:MAX_RUN_NAME]


def train_command(recipe: str, overrides: Sequence[str]) -> str:
    """Return the command that trains a recipe with these overrides."""
    return shlex.join(["linflab", "train", recipe, *overrides])


def describe_selection(experiment: ExperimentConfig) -> str:
    """Return a description of the model selection, as logged in the tag `schema.SELECTION`."""
    if experiment.training.include_validation:
        return "the last epoch; trained on training and validation images"
    return "the best epoch by certified accuracy on validation images"


def check_local_resources(experiment: ExperimentConfig) -> None:
    """Check that this machine has the CPUs and the device that the config requires, without Ray.

    Raises:
        InputError: If this machine has fewer CPUs than the config requires, or lacks a required CUDA device.
    """
    cpus = os.cpu_count() or 1
    if experiment.compute.cpus_per_worker > cpus:
        raise InputError(
            f"compute.cpus_per_worker={experiment.compute.cpus_per_worker}: must be at most {cpus}, the number of CPUs "
            "of this machine; use fewer"
        )
    if experiment.compute.device == "cuda" and not torch.cuda.is_available():
        raise InputError("compute.device=cuda: no CUDA device found; use cpu or auto")


def select_device(experiment: ExperimentConfig) -> torch.device:
    """Return the device on which this process trains."""
    device = experiment.compute.device
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def select_evaluation_device(experiment: ExperimentConfig) -> torch.device:
    """Return the device for a trained network: the CPU if this machine lacks the CUDA device of the training."""
    return select_device(experiment) if torch.cuda.is_available() else torch.device("cpu")


@contextmanager
def resource_errors(advice: str) -> Iterator[None]:
    """Raise errors for lack of memory or disk space as `TrainingError`.

    Args:
        advice: What to do about lack of memory.
    """
    try:
        yield
    except (TrainingError, RunInterrupted):
        raise
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (" ".join(str(error).split()) or type(error).__name__)[:200]
        raise TrainingError(f"out of memory ({reason}); {advice}") from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise TrainingError(f"disk full ({error}); free disk space, then resume with --resume") from error


@dataclass(frozen=True)
class TrialRequest:
    """Request to train a config as one MLflow run.

    Attributes:
        experiment: All settings.
        storage: Tracking store and checkpoints of the run.
        name: Name of a new run.
        tags: Tags of a new run.
        resume_run_id: Id of the run to resume; None starts a new run. A finished run is only read, not trained.
        max_failures: Maximum number of worker failures without progress; None for no limit. With a number,
            `run_trial` also waits for the lock of a previous process that is about to end.
        evaluate_test: Evaluate on the test set. False during a search, where only validation accuracy is needed.
    """

    experiment: ExperimentConfig
    storage: Storage
    name: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    resume_run_id: str | None = None
    max_failures: int | None = None
    evaluate_test: bool = True


@dataclass(frozen=True)
class TrialResult:
    """Result of a logged run.

    Attributes:
        run_id: MLflow run id.
        metrics: Metrics of the selected network, by their MLflow names.
        certificate: Name of the certifier that gave the certified accuracies, such as `lipschitz-sound`.
    """

    run_id: str
    metrics: Mapping[str, float]
    certificate: str


@dataclass(frozen=True)
class EarlierRun:
    """Existing run of a config, started by `linflab train`.

    Attributes:
        is_finished: True if the run was trained and evaluated; model and figures may be missing.
        result: Result of the run. If the run has not finished, only the run id is guaranteed.
    """

    is_finished: bool
    result: TrialResult


def find_resumable_run(
    storage: Storage, experiment: ExperimentConfig, prefer_finished: bool = False, slurm_job: str = ""
) -> EarlierRun | None:
    """Return the run of this config to resume, or None if there is no run.

    Interrupted runs count only if they are newer than the last finished run. The order of preference is: the latest
    interrupted run with a checkpoint; the latest interrupted run without a checkpoint, which starts over; the last
    finished run. Runs of sweeps and imported runs are ignored.

    Args:
        storage: Storage of the runs.
        experiment: All settings.
        prefer_finished: Return the last finished run, if any, even if interrupted runs are newer.
        slurm_job: If given, ignore runs that this Slurm job did not start.
    """
    finished_run, with_checkpoint, without_checkpoint = None, [], []
    for run in find_runs(storage, experiment):
        metrics, tags = dict(run.data.metrics), run.data.tags
        if slurm_job and tags.get(schema.SLURM_JOB) != slurm_job:
            continue
        result = TrialResult(str(run.info.run_id), metrics, tags.get(schema.CERTIFIER, ""))
        earlier_run = EarlierRun(run.info.status == "FINISHED", result)
        if earlier_run.is_finished and schema.TEST_CERTIFIED in metrics:
            finished_run = earlier_run
            break
        checkpoints = checkpoint_store(storage, result.run_id)
        if checkpoints.exist():
            with_checkpoint.append(earlier_run)
        # Without a checkpoint, a run on an MLflow server may belong to another machine that is training it.
        elif run.info.status in ("RUNNING", "KILLED") and (
            checkpoints.folder.exists() or tags.get(schema.HOST) == machine.node()
        ):
            without_checkpoint.append(earlier_run)
    candidates = [*with_checkpoint, *without_checkpoint]
    return finished_run if prefer_finished and finished_run else next(iter(candidates), finished_run)


def checkpoint_store(storage: Storage, run_id: str) -> CheckpointStore:
    """Return the checkpoint store of a run."""
    return CheckpointStore(storage.checkpoints / run_id)


def run_trial(request: TrialRequest, on_report: Callable[[Report], None] = lambda report: None) -> TrialResult | None:
    """Train and evaluate a config as one MLflow run; a resumed run starts from its checkpoint, if any.

    A signal triggers a final checkpoint. Checkpoints are removed when the run is complete.

    Args:
        request: Config and run to train.
        on_report: Called after each step, epoch and batch of test images.

    Returns:
        The result on the first worker, which logs and evaluates; None on all other workers.

    Raises:
        TrainingError: If training failed, or workers failed too often.
        RunLockedError: If another process is training the run.
        RunInterrupted: If a signal stopped the run.
    """
    size = request.experiment.training.batch_size
    with resource_errors(f"use a smaller training.batch_size than {size}, or a smaller network"):
        return _run_trial(request, on_report)


def _run_trial(request: TrialRequest, on_report: Callable[[Report], None]) -> TrialResult | None:
    experiment, storage, resume = request.experiment, request.storage, request.resume_run_id
    if dist.is_initialized() and dist.get_rank() > 0:
        if _broadcast_decision(experiment):
            dataset = load_dataset(experiment.dataset, experiment.augmentation).to(select_device(experiment))
            fit(experiment, dataset, on_report, checkpoints=checkpoint_store(storage, resume) if resume else None)
        return None
    with ExitStack() as stack:
        if resume is not None:
            timeout = 0 if request.max_failures is None else WORKER_EXIT_TIMEOUT_S
            stack.enter_context(checkpoint_store(storage, resume).lock(timeout))
            run = Run.resume(storage, resume)
            stack.enter_context(run if not run.is_finished else nullcontext())
            if not run.has_config:  # interrupted right after its creation
                run.log_config(experiment)
            num_failures = run.starts[:-1].count(run.last_logged_epoch)
            if request.max_failures is not None and num_failures > request.max_failures:
                raise TrainingError(
                    f"worker process was killed {num_failures} times after epoch {run.last_logged_epoch} without an "
                    "error message; it may be running out of memory"
                )
        else:
            run = stack.enter_context(Run.start(storage, experiment, request.name, request.tags))
            stack.enter_context(checkpoint_store(storage, run.id).lock())
        # The last metrics are logged together, so a run that has one of them lacks only the status FINISHED.
        last_metric = schema.TEST_CERTIFIED if request.evaluate_test else schema.TRAIN_SECONDS
        should_train = not run.is_finished and last_metric not in run.metrics
        if dist.is_initialized():
            _broadcast_decision(experiment, should_train)
        checkpoints = checkpoint_store(storage, run.id)
        if should_train:
            result = _train(request, run, on_report, checkpoints)
        else:
            result = TrialResult(run.id, run.metrics, run.certificate)
    checkpoints.remove()  # only after MLflow has the status FINISHED
    return result


def _broadcast_decision(experiment: ExperimentConfig, should_train: bool = False) -> bool:
    """Return whether the workers train; the first worker broadcasts this once it holds the lock.

    The other workers wait here; otherwise they could read a checkpoint while previous workers still write the next one.
    """
    decision = torch.tensor(int(should_train), device=select_device(experiment))
    dist.broadcast(decision, src=0)
    return bool(decision.item())


def _train(
    request: TrialRequest, run: Run, on_report: Callable[[Report], None], checkpoints: CheckpointStore
) -> TrialResult:
    """Train, evaluate on the test set if requested, and log the results."""
    experiment = request.experiment

    def record(report: EpochMetrics) -> None:
        run.log_epoch(report.epoch, _epoch_metrics(report))
        on_report(report)

    dataset = load_dataset(experiment.dataset, experiment.augmentation).to(select_device(experiment))
    with defer_signal() as should_stop:
        selected = fit(experiment, dataset, record, on_report, checkpoints, should_stop)
        if should_stop():
            raise RunInterrupted("stopped before evaluation on the test set")
    metrics = {
        schema.BEST_EPOCH: selected.epoch,
        schema.FLOPS: count_flops(selected.network, dataset.info.input_shape),
        schema.PARAMETERS: count_parameters(selected.network),
        schema.TRAIN_SECONDS: selected.seconds,
    }
    if selected.validation is not None:
        metrics[schema.BEST_VALIDATION_CLEAN] = selected.validation.clean
        metrics[schema.BEST_VALIDATION_CERTIFIED] = selected.validation.certified
    spec = evaluation_spec(experiment, selected.network, with_attacks=True)
    tags = {schema.CERTIFIER: spec.certificate, schema.SELECTION: describe_selection(experiment)}
    with tempfile.TemporaryDirectory() as folder:
        # First the weights, so that a failing evaluation loses no training.
        save_weights(Path(folder) / schema.WEIGHTS_FILE, selected.network, experiment, selected.epoch)
        run.client.log_artifacts(run.id, folder)
        run.log_tags(tags)
    if request.evaluate_test:
        with tempfile.TemporaryDirectory() as folder:
            images = Path(folder) / schema.FIGURES_DIR / schema.RADII_FILE
            batch_size = f"evaluation.batch_size={max(1, experiment.evaluation.batch_size // 10)}"
            with resource_errors(f"the trained network is kept; use `linflab evaluate {run.id} {batch_size}`"):
                metrics |= evaluate_on_test(selected.network, dataset.test, spec, experiment, on_report, images)
            run.log_tags({schema.ATTACK: experiment.evaluation.attack.describe()})
            run.client.log_artifacts(run.id, folder)
    run.log_metrics({name: value for name, value in metrics.items() if name not in run.metrics})
    return TrialResult(run.id, metrics, spec.certificate)


def evaluate_on_test(
    network: nn.Module,
    test: Split,
    spec: EvaluationSpec,
    experiment: ExperimentConfig,
    on_report: Callable[[ScoringReport], None],
    images: Path,
) -> dict[str, float]:
    """Evaluate on the test set and return the metrics.

    With the certifier `lipschitz`, whose radii have no extra cost, write the results of each image to `images`.
    """
    spec = dataclasses.replace(spec, radii=spec.certifier == "lipschitz")  # other certifiers need a bisection
    parts: list[BatchResult] = []

    def count(part: BatchResult) -> None:
        parts.append(part)
        on_report(ScoringReport(sum(len(part.positions) for part in parts), len(test)))

    on_report(ScoringReport(0, len(test)))
    (result,) = evaluate(network, test, spec, experiment.evaluation.batch_size, count)
    assert result.robust is not None and result.certificate_violations is not None
    if spec.radii:
        write_columns(images, sort_by_position(parts, spec.eps).columns())
    return {
        schema.TEST_CLEAN: result.clean,
        schema.TEST_ROBUST: result.robust,
        schema.TEST_CERTIFIED: result.certified,
        schema.TEST_VIOLATIONS: result.certificate_violations,
        **({} if result.certified_real is None else {schema.TEST_CERTIFIED_REAL: result.certified_real}),
    }


def _epoch_metrics(report: EpochMetrics) -> dict[str, float]:
    validation = {}
    if report.validation is not None:
        validation[schema.VALIDATION_CLEAN] = report.validation.clean
        validation[schema.VALIDATION_CERTIFIED] = report.validation.certified
    return {
        # MLflow does not store infinity, so p = inf is omitted.
        **({schema.P: report.at.p} if math.isfinite(report.at.p) else {}),
        schema.LEARNING_RATE: report.at.learning_rate,
        schema.CROSS_ENTROPY_WEIGHT: report.at.cross_entropy_weight,
        schema.TRAIN_EPS: report.at.eps,
        schema.TRAIN_LOSS: report.train_loss,
        **validation,
        schema.EPOCH_SECONDS: report.seconds,
    }
