"""One trial from its settings to its record: train, score the kept network on the test set once, record both."""

import os
import shlex
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from types import FrameType

import torch
import torch.distributed as dist

from linflab.models.networks.cost import count_flops, count_parameters
from linflab.platform.checkpoints import Checkpoints
from linflab.platform.config import Experiment
from linflab.platform.datasets import load_dataset
from linflab.platform.errors import Interrupted, SettingError, TrainingError
from linflab.platform.evaluation import evaluate, scoring_of
from linflab.platform.storage import Storage
from linflab.platform.tracking import Run, checkpoints_of
from linflab.platform.training import EpochReport, StepReport, fit
from linflab.reports import schema

SECONDS_TO_DIE = 60.0  # within which Ray ends the processes of a driver or node that is gone


def train_command(recipe: str, overrides: Sequence[str]) -> str:
    """The command that trains a recipe with these overrides."""
    return shlex.join(["linflab", "train", recipe, *overrides])


def selection(experiment: Experiment) -> str:
    """Which network a training keeps, in words."""
    if experiment.training.include_validation:
        return "the last epoch; trained on training and validation images"
    return "the best epoch by certified accuracy on validation images"


def check_machine(experiment: Experiment) -> None:
    """Check that this process can train the experiment alone.

    Raises:
        SettingError: this machine has fewer CPUs, or no CUDA device where one is asked for.
    """
    cpus = os.cpu_count() or 1
    if experiment.compute.cpus_per_worker > cpus:
        raise SettingError(f"compute.cpus_per_worker={experiment.compute.cpus_per_worker}: this machine has {cpus}")
    if experiment.compute.device == "cuda" and not torch.cuda.is_available():
        raise SettingError("compute.device=cuda: there is no CUDA device here; cpu or auto will do")


def device_of(experiment: Experiment) -> torch.device:
    """Where this process trains."""
    wanted = experiment.compute.device
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM, once, as a question to be asked; a second one ends the process as usual."""
    if threading.current_thread() is not threading.main_thread():  # Ray's workers: signals are not theirs
        yield lambda: False
        return
    seen = False

    def notice(number: int, frame: FrameType | None) -> None:
        nonlocal seen
        seen = True
        signal.signal(number, before[signal.Signals(number)])

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: handler for number, handler in handlers.items() if handler != signal.SIG_IGN}  # as by nohup
    for number in before:
        signal.signal(number, notice)
    try:
        yield lambda: seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_trial(
    experiment: Experiment,
    storage: Storage,
    name: str,
    tags: Mapping[str, str],
    on_epoch: Callable[[EpochReport], None] = lambda report: None,
    on_step: Callable[[StepReport], None] = lambda report: None,
    checkpointed: bool = False,
    resume: str | None = None,
    deaths: int | None = None,
    scored: bool = True,
) -> dict[str, float]:
    """Train and score an experiment as one MLflow run; returns the metrics of the network that was kept.

    Of several workers, each calls this; the first records, scores and returns the metrics, the others return {}.

    Args:
        checkpointed: write checkpoints, and on Ctrl-C or SIGTERM one more; they are removed when the run is complete.
        resume: the run to go on with, from its checkpoint where there is one. One that has finished is only read.
        deaths: how often processes may die without that the training comes further; None: any number of times. Where
            it is given, the run is waited for if the process before is still about to end.
        scored: on the test set; not where only the validation images matter, as on the way to a choice.

    Raises:
        TrainingError: training went wrong, or processes died too often.
    """
    if dist.is_initialized() and dist.get_rank() > 0:
        if not _agreed(experiment):
            return {}
        dataset = load_dataset(experiment.dataset, experiment.augmentation).to(device_of(experiment))
        fit(experiment, dataset, on_epoch, checkpoints=checkpoints_of(storage, resume) if resume else None)
        return {}
    with ExitStack() as stack:
        if resume is not None:
            patience = 0 if deaths is None else SECONDS_TO_DIE
            stack.enter_context(checkpoints_of(storage, resume).lock(patience))
            run = Run.resume(storage, resume)
            stack.enter_context(run if not run.finished else nullcontext())
            died = run.starts[:-1].count(run.logged_epoch)
            if deaths is not None and died > deaths:
                raise TrainingError(
                    f"its process died {died} times after epoch {run.logged_epoch} and said nothing; for want of "
                    "memory, perhaps"
                )
        else:
            run = stack.enter_context(Run.start(storage, experiment, name, tags))
            if checkpointed:
                stack.enter_context(checkpoints_of(storage, run.id).lock())
        if dist.is_initialized():
            _agreed(experiment, not run.finished)
        checkpoints = checkpoints_of(storage, run.id) if checkpointed else None
        metrics = run.metrics if run.finished else _train(experiment, run, on_epoch, on_step, checkpoints, scored)
    if checkpoints is not None:  # only now, when the record says that the run has finished
        checkpoints.remove()
    return metrics


def _agreed(experiment: Experiment, trains: bool = False) -> bool:
    """Whether the workers train: the first one says so, once no other process can; the others wait for it here.

    Else they might read the checkpoint while workers of before still write the next one.
    """
    said = torch.tensor(int(trains), device=device_of(experiment))
    dist.broadcast(said, src=0)
    return bool(said.item())


def _train(
    experiment: Experiment,
    run: Run,
    on_epoch: Callable[[EpochReport], None],
    on_step: Callable[[StepReport], None],
    checkpoints: Checkpoints | None,
    scored: bool,
) -> dict[str, float]:
    """Train, score on the test set if `scored`, and log it all; returns the metrics of the network that was kept."""

    def record(report: EpochReport) -> None:
        run.log_epoch(report)
        on_epoch(report)

    dataset = load_dataset(experiment.dataset, experiment.augmentation).to(device_of(experiment))
    with stop_signals() if checkpoints is not None else nullcontext(lambda: False) as should_stop:
        trained = fit(experiment, dataset, record, on_step, checkpoints, should_stop)
        if should_stop():
            raise Interrupted("stopped before the test images were scored")
    metrics = {
        schema.BEST_EPOCH: trained.epoch,
        schema.FLOPS: count_flops(trained.network, dataset.facts.input_shape),
        schema.PARAMETERS: count_parameters(trained.network),
        schema.TRAIN_SECONDS: trained.seconds,
    }
    if trained.validation is not None:
        metrics[schema.BEST_VALIDATION_CLEAN] = trained.validation.clean
        metrics[schema.BEST_VALIDATION_CERTIFIED] = trained.validation.certified
    scoring = scoring_of(experiment, trained.network, attacked=True)
    tags = {schema.CERTIFIER: scoring.certificate, schema.SELECTION: selection(experiment)}
    if scored:
        (test,) = evaluate(trained.network, dataset.test, scoring, experiment.evaluation.batch_size)
        assert test.robust is not None and test.certified_but_broken is not None
        metrics[schema.TEST_CLEAN] = test.clean
        metrics[schema.TEST_ROBUST] = test.robust
        metrics[schema.TEST_CERTIFIED] = test.certified
        metrics[schema.TEST_BROKEN] = test.certified_but_broken
        if test.certified_exact is not None:
            metrics[schema.TEST_CERTIFIED_EXACT] = test.certified_exact
        tags[schema.ATTACK] = experiment.evaluation.attack.describe()
    run.log_tags(tags)
    run.log_weights(trained, experiment)
    run.log_metrics({name: value for name, value in metrics.items() if name not in run.metrics})
    return metrics
