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
from linflab.platform.config import Experiment
from linflab.platform.datasets import load_dataset
from linflab.platform.errors import Interrupted, SettingError
from linflab.platform.evaluation import evaluate, scoring_of
from linflab.platform.storage import Storage
from linflab.platform.tracking import Run, checkpoints_of
from linflab.platform.training import EpochReport, StepReport, fit
from linflab.reports import schema


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
) -> dict[str, float]:
    """Train and score an experiment as one MLflow run; returns the metrics of the network that was kept.

    Of several workers, each calls this; the first records, scores and returns the metrics, the others return {}.

    Args:
        checkpointed: write checkpoints, and on Ctrl-C or SIGTERM one more; they are removed when the run is complete.
        resume: the run to go on with, from its checkpoint.
    """
    if dist.is_initialized() and dist.get_rank() > 0:
        dataset = load_dataset(experiment.dataset, experiment.augmentation).to(device_of(experiment))
        fit(experiment, dataset, on_epoch, checkpoints=checkpoints_of(storage, resume) if resume else None)
        return {}
    with ExitStack() as stack:
        if resume is not None:
            stack.enter_context(checkpoints_of(storage, resume).lock())
            run = stack.enter_context(Run.resume(storage, resume))
        else:
            run = stack.enter_context(Run.start(storage, experiment, name, tags))
            if checkpointed:
                stack.enter_context(checkpoints_of(storage, run.id).lock())
        checkpoints = checkpoints_of(storage, run.id) if checkpointed else None

        def record(report: EpochReport) -> None:
            run.log_epoch(report)
            on_epoch(report)

        dataset = load_dataset(experiment.dataset, experiment.augmentation).to(device_of(experiment))
        with stop_signals() if checkpointed else nullcontext(lambda: False) as should_stop:
            trained = fit(experiment, dataset, record, on_step, checkpoints, should_stop)
            if should_stop():
                raise Interrupted("stopped before the test images were scored")
        scoring = scoring_of(experiment, trained.network, attacked=True)
        (test,) = evaluate(trained.network, dataset.test, scoring, experiment.evaluation.batch_size)
        assert test.robust is not None and test.certified_but_broken is not None
        metrics = {
            schema.BEST_EPOCH: trained.epoch,
            schema.TEST_CLEAN: test.clean,
            schema.TEST_ROBUST: test.robust,
            schema.TEST_CERTIFIED: test.certified,
            schema.TEST_BROKEN: test.certified_but_broken,
            schema.FLOPS: count_flops(trained.network, dataset.facts.input_shape),
            schema.PARAMETERS: count_parameters(trained.network),
            schema.TRAIN_SECONDS: trained.seconds,
        }
        if trained.validation is not None:
            metrics[schema.BEST_VALIDATION_CLEAN] = trained.validation.clean
            metrics[schema.BEST_VALIDATION_CERTIFIED] = trained.validation.certified
        if test.certified_exact is not None:
            metrics[schema.TEST_CERTIFIED_EXACT] = test.certified_exact
        run.log_tags(
            {
                schema.CERTIFIER: scoring.certificate,
                schema.ATTACK: experiment.evaluation.attack.describe(),
                schema.SELECTION: selection(experiment),
            }
        )
        run.log_metrics(metrics)
        run.log_weights(trained, experiment)
        if checkpoints is not None:
            checkpoints.remove()
        return metrics
