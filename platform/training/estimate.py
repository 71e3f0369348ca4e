"""Estimates of training time and peak memory on this machine, from a few timed steps.

An estimate takes at most about half a minute for any recipe. If a whole batch takes too long, smaller batches are timed
and the results are extrapolated. Time and memory are close to affine in the number of images: each image adds the same
cost, and the optimizer and weights add a constant.
"""

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch

from linflab.models.robustness.attacks import Attack, default_attacks, robust_under_attack
from linflab.platform.config.experiment import ExperimentConfig
from linflab.platform.data.datasets import Dataset
from linflab.platform.training.evaluation import evaluate, evaluation_spec, recalibrate
from linflab.platform.training.trainer import ScheduledValues, Trainer

NUM_TIMED_STEPS = 8  # at points of the schedule, since cost depends on p and eps
REPEATS = 3  # timings of the same work; their median is used
STEPS_S, EVALUATION_S = 20.0, 8.0  # approximate time limits for steps and for evaluation
MAX_WALL_TIME_FACTOR = 6  # factor on the time limits if the cores are busy
MIN_IMAGES_PER_WORKER = 4  # images per worker in the smallest timed part of a batch


@dataclass(frozen=True)
class StepTime:
    """Time of a step at one point of the schedule.

    Attributes:
        at: Scheduled values of the step.
        seconds: Time of a step on a whole batch.
    """

    at: ScheduledValues
    seconds: float


@dataclass(frozen=True)
class CostEstimate:
    """Estimated cost of a training run on this machine without other processes.

    Attributes:
        steps: Step times at evenly spaced points of the schedule.
        training_hours: Time of all steps, in hours.
        evaluation_hours: Time of all validations and of the evaluation on the test set, in hours.
        memory: Peak memory in bytes, of the GPU for training on CUDA, otherwise of the process.
        timed_images: Number of images of the largest timed step, over all workers.
        batch_images: Number of images of a training step, over all workers. If `timed_images` is smaller, time and
            memory are extrapolated.
    """

    steps: list[StepTime]
    training_hours: float
    evaluation_hours: float
    memory: int
    timed_images: int
    batch_images: int


def estimate_cost(
    experiment: ExperimentConfig, dataset: Dataset, on_step: Callable[[StepTime], None] = lambda step: None
) -> CostEstimate:
    """Estimate the cost of a training run from a few timed steps and batches.

    With several workers, the work of one worker is timed, without the communication between workers.

    Args:
        experiment: Config of the run.
        dataset: Dataset of the run, on the training device.
        on_step: Called with each timed step.

    Raises:
        InputError: If config and dataset are incompatible.
    """
    trainer = Trainer(experiment, dataset, 0, experiment.compute.workers)
    steps, timed_images, memory = _time_steps(trainer, on_step)
    training = trainer.steps * sum(step.seconds for step in steps) / len(steps)
    evaluation = 0.0
    if not experiment.training.include_validation:
        evaluation = experiment.training.num_validations * _validation_seconds(trainer, dataset)
    evaluation += _attack_seconds(trainer, dataset)
    # A training run also keeps a copy of the best network so far, and the average of weights.
    copies = 1 if trainer.average is None else 2
    memory += copies * sum(tensor.nbytes for tensor in trainer.network.state_dict().values())
    batch = experiment.training.batch_size
    return CostEstimate(steps, training / 3600, evaluation / 3600, memory, timed_images, batch)


class _Stopwatch:
    """Stopwatch with a time budget in seconds."""

    def __init__(self, device: torch.device, budget: float) -> None:
        self.device = device
        self.budget = budget
        self.spent_seconds = 0.0
        self.start_time = time.monotonic()

    def time(self, work: Callable[[], object]) -> float:
        """Return the seconds that `work` takes; on the CPU, exclude the time that other processes take."""
        wall_start, cpu_start = time.perf_counter(), time.process_time()
        work()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - wall_start
        if self.device.type == "cpu":  # process time excludes the time of other processes
            seconds = min(seconds, time.process_time() - cpu_start)
        self.spent_seconds += seconds
        return seconds

    def count_affordable(self, seconds: float) -> int:
        """Return how many times work of this duration fits into the remaining budget."""
        elapsed = time.monotonic() - self.start_time
        slowdown = max(1.0, elapsed / max(self.spent_seconds, 1e-3))
        seconds_left = min(self.budget - self.spent_seconds, (MAX_WALL_TIME_FACTOR * self.budget - elapsed) / slowdown)
        return max(0, int(seconds_left / max(seconds, 1e-9)))


def _time_steps(trainer: Trainer, on_step: Callable[[StepTime], None]) -> tuple[list[StepTime], int, int]:
    """Return step times for whole batches, the images of the largest timed step, and peak memory in bytes."""
    batch_size = trainer.experiment.training.batch_size
    order_and_draws, middle = trainer.epoch_order(1), trainer.steps // 2
    watch = _Stopwatch(trainer.device, STEPS_S)

    def seconds(images: int, step: int) -> float:
        _resize_batch(trainer, images)
        try:
            return watch.time(lambda: trainer.step(step, *order_and_draws))
        finally:
            _resize_batch(trainer, batch_size)

    images = min(batch_size, MIN_IMAGES_PER_WORKER * trainer.workers)
    # The first step also allocates memory, so its time is an upper bound until another step is timed.
    first = {images: seconds(images, middle)}
    times: dict[int, float] = {}
    peaks = {images: _peak_memory(trainer)}
    while images < batch_size:
        larger = min(batch_size, 4 * images)
        known_times = {**first, **times}
        constant_seconds = _seconds_without_images(known_times)
        expected = constant_seconds + (known_times[images] - constant_seconds) * larger / images
        if (len(known_times) > 1 and not watch.count_affordable(expected)) or not watch.count_affordable(
            known_times[images]
        ):
            break
        images = larger
        times[images], peaks[images] = seconds(images, middle), _peak_memory(trainer)
    constant_seconds = 0.0
    if images < batch_size:
        if len(times) < 2:
            smaller = next(iter(first)) if times else max(1, images // 2)
            times = {smaller: seconds(smaller, middle), **(times or first)}
        constant_seconds = _seconds_without_images(times)
    elif not times:
        times = first

    def extrapolate(step_seconds: float) -> float:
        # The lower limit ensures that time grows with images despite clock rounding.
        return constant_seconds + max(step_seconds - constant_seconds, 0.05 * step_seconds) * batch_size / images

    count = min(NUM_TIMED_STEPS, watch.count_affordable(times[images]))
    step_times = []
    for point in range(count):
        step = (2 * point + 1) * trainer.steps // (2 * count)
        repeats = min(REPEATS, watch.count_affordable(times[images]) // (count - point))
        point_seconds = median(seconds(images, step) for _ in range(max(1, repeats)))
        step_times.append(StepTime(trainer.scheduled_values(step), extrapolate(point_seconds)))
        on_step(step_times[-1])
    if not step_times:
        step_times = [StepTime(trainer.scheduled_values(middle), extrapolate(times[images]))]
        on_step(step_times[0])
    return step_times, images, _extrapolate_memory(peaks, batch_size)


def _seconds_without_images(times: dict[int, float]) -> float:
    """Return the part of the step time that does not depend on the number of images.

    `times` maps numbers of images, in ascending order, to the seconds of a step.
    """
    if len(times) == 1:
        return 0.0
    (few_images, few_seconds), (images, seconds) = list(times.items())[-2:]
    return min(max(0.0, few_seconds - few_images * (seconds - few_seconds) / (images - few_images)), 0.95 * seconds)


def _resize_batch(trainer: Trainer, images: int) -> None:
    """Set the number of images of the trainer's next step, without a change of its schedules."""
    training = trainer.experiment.training.model_copy(update={"batch_size": images})
    trainer.experiment = trainer.experiment.model_copy(update={"training": training})


def _extrapolate_memory(peaks: dict[int, int], images: int) -> int:
    """Return the peak memory in bytes of a step on `images` images, extrapolated from smaller steps.

    `peaks` maps numbers of images, in ascending order, to the peak memory of a step in bytes.
    """
    (*_, (few_images, few_peak)), (many_images, peak) = [(0, 0), *peaks.items()][:-1], list(peaks.items())[-1]
    per_image = (peak - few_peak) / (many_images - few_images) if few_images else 0.0
    return int(peak + per_image * (images - many_images))


def _peak_memory(trainer: Trainer) -> int:
    if trainer.device.type == "cuda":
        return torch.cuda.max_memory_allocated(trainer.device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _seconds_for_images(trainer: Trainer, work: Callable[[int], object], max_images: int, budget: float) -> float:
    """Return the seconds per image of work on up to `max_images` images, timed for about `budget` seconds."""
    watch, images = _Stopwatch(trainer.device, budget), min(MIN_IMAGES_PER_WORKER, max_images)
    seconds = watch.time(partial(work, images))
    while images < max_images and watch.count_affordable(4 * seconds):
        images = min(max_images, 4 * images)
        seconds = watch.time(partial(work, images))
    repeats = min(REPEATS - 1, watch.count_affordable(seconds))
    return median([seconds, *(watch.time(partial(work, images)) for _ in range(repeats))]) / images


def _validation_seconds(trainer: Trainer, dataset: Dataset) -> float:
    """Return the seconds of one recalibration and validation."""
    experiment, network = trainer.experiment, trainer.network
    size, scoring = experiment.evaluation.batch_size, evaluation_spec(experiment, network, with_attacks=False)
    max_images = min(size, len(dataset.validation))

    def score(images: int) -> None:
        evaluate(network, dataset.validation.take(images), scoring, images)

    total = len(dataset.validation) * _seconds_for_images(trainer, score, max_images, EVALUATION_S / 4)
    if kinds := trainer.recalibrated_kinds(experiment.training.epochs):
        batch = experiment.training.batch_size
        num_images = max(1, min(experiment.evaluation.calibration_images, len(trainer.train)) // batch) * batch
        seconds_per_image = _seconds_for_images(
            trainer, lambda images: recalibrate(network, dataset.train, images, images, kinds), batch, EVALUATION_S / 4
        )
        start = experiment.training.averaging_start or 0.0
        total += num_images * seconds_per_image * (1.0 if trainer.recalibrated_kinds(1) else 1 - start)
    return total


def _attack_seconds(trainer: Trainer, dataset: Dataset) -> float:
    """Return the seconds of the attacks on the test images."""
    experiment, network = trainer.experiment, trainer.network.eval()
    attack = experiment.evaluation.attack
    if attack.methods is None:
        attack = attack.model_copy(update={"methods": default_attacks(network)})
    max_images, total = min(experiment.evaluation.batch_size, len(dataset.test)), 0.0
    parts = attack.attacks()
    for part in parts:

        def attack_images(images: int, count: int, part: Attack = part) -> None:
            short_config = part.config.model_copy(update={part.effort: count, "restarts": 1, "target_classes": 1})
            test_images = dataset.test.take(images)
            pixels, _ = test_images.batch(torch.arange(len(test_images), device=trainer.device))
            with torch.no_grad():
                # Attacks skip misclassified images, so use the predicted classes as labels.
                labels = network(pixels).argmax(dim=1)
            robust_under_attack(network, pixels, labels, 1e-9, short_config, torch.Generator())

        budget = EVALUATION_S / 2 / len(parts)
        seconds_of_1 = _seconds_for_images(trainer, partial(attack_images, count=1), max_images, budget / 3)
        seconds_of_3 = _seconds_for_images(trainer, partial(attack_images, count=3), max_images, 2 * budget / 3)
        seconds_per_image = seconds_of_1 + max(0.0, seconds_of_3 - seconds_of_1) / 2 * (
            getattr(part.config, part.effort) - 1
        )
        total += seconds_per_image * part.count_runs(dataset.info.classes) * len(dataset.test)
    return total
