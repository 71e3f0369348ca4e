"""What a training would take, from a few of its steps: hours, and memory at its peak."""

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from linflab.models.robustness.attacks.suite import Attack, withstands
from linflab.platform.config import Experiment
from linflab.platform.datasets import Dataset
from linflab.platform.evaluation import evaluate, recompute_means, scoring_of
from linflab.platform.training import Trainer

POINTS = 8  # of the schedule at which steps are timed: what one costs depends on p


@dataclass(frozen=True)
class Estimate:
    """What a training would take on this machine, as things are now.

    Attributes:
        steps: (p, seconds) of a step at points evenly spread over the schedule.
        training_hours: of all steps.
        scoring_hours: of scoring all epochs on the validation images, and the network kept on the test images.
        memory: bytes at the peak: of the device, if it has its own memory, else of the process.
    """

    steps: list[tuple[float, float]]
    training_hours: float
    scoring_hours: float
    memory: int


def estimate(experiment: Experiment, dataset: Dataset) -> Estimate:
    """Time a few steps and batches. Of several workers, one worker's part is timed, without what passes between them.

    Raises:
        SettingError: as `fit`.
    """
    trainer = Trainer(experiment, dataset, 0, experiment.compute.workers)
    shuffled = trainer.shuffle(1)

    def timed(work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        if trainer.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    timed(partial(trainer.step, 0, *shuffled))  # the first one allocates
    steps = []
    for k in range(POINTS):
        step = (2 * k + 1) * trainer.steps // (2 * POINTS)
        steps.append((trainer.scheduled(step).p, timed(partial(trainer.step, step, *shuffled))))
    training = trainer.steps * sum(seconds for _, seconds in steps) / len(steps)

    evaluation, by = experiment.evaluation, scoring_of(experiment, trainer.network, attacked=False)
    scoring = 0.0
    if not experiment.training.include_validation:
        batch = dataset.validation.first(evaluation.batch_size)
        epoch = timed(lambda: evaluate(trainer.network, batch, by, evaluation.batch_size))
        epoch *= len(dataset.validation) / len(batch)
        if trainer.has_sort_layers:
            size = experiment.training.batch_size
            means = timed(lambda: recompute_means(trainer.network, dataset.train, size, size))
            epoch += means * max(1, min(evaluation.mean_images, len(trainer.train)) // size)
        scoring = epoch * experiment.training.epochs
    # the attack goes on only with images that are classified rightly: take what the network says for right
    tested, attack = dataset.test.first(evaluation.batch_size), evaluation.attack
    images, _ = tested.batch(torch.arange(len(tested), device=trainer.device))
    network = trainer.network.eval()
    with torch.no_grad():
        labels = network(images).argmax(dim=1)

    by_gradients = tuple(kind for kind in attack.kinds if kind != "square")
    by_search = tuple(kind for kind in attack.kinds if kind == "square")
    for kinds, amount, restarts in (
        (by_gradients, attack.steps, attack.restarts),
        (by_search, attack.queries, 1),
    ):
        if not kinds:
            continue

        def attacked(amount: int, kinds: tuple[Attack, ...] = kinds) -> float:
            short = attack.model_copy(update={"kinds": kinds, "steps": amount, "queries": amount, "restarts": 1})
            return timed(lambda: withstands(network, images, labels, 1e-9, short, torch.Generator()))

        few, more = attacked(1), attacked(3)
        restart = few + max(0.0, more - few) / 2 * (amount - 1)
        scoring += restart * restarts * len(dataset.test) / len(tested)

    if trainer.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(trainer.device)
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    memory += sum(tensor.nbytes for tensor in trainer.network.state_dict().values())  # the best network yet, kept aside
    return Estimate(steps, training / 3600, scoring / 3600, memory)
