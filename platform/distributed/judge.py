"""Certification by the cascade on Ray workers; images of workers that die are tried again."""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import ray
import torch
from torch import Tensor, nn

from linflab.models.robustness.certification import CascadeCertifier, Verdict
from linflab.models.robustness.certification.cascade import CascadeSettings
from linflab.platform.config.experiment import ExperimentConfig
from linflab.platform.config.own_parts import import_own_parts
from linflab.platform.data.datasets import SplitName, load_dataset
from linflab.platform.distributed.train import evaluation_resources, max_evaluation_workers, start_ray
from linflab.platform.errors import TrainingError
from linflab.platform.host import configure_process
from linflab.platform.source import verify_source_hash
from linflab.platform.training.weights import build_network
from linflab.platform.trial import select_evaluation_device

MAX_DEATHS = 3  # of workers with the same images; then each image gets an error
Chunk = Sequence[int]


def judge_distributed(
    experiment: ExperimentConfig,
    network: nn.Module,
    split: SplitName,
    eps: float,
    sound: bool,
    settings: CascadeSettings,
    chunks: Sequence[Chunk],
    workers: int,
) -> Iterator[tuple[int, Verdict]]:
    """Judge images on Ray workers, starting Ray if needed.

    Args:
        experiment: Config of the run.
        network: Trained network.
        split: Split of the images.
        eps: Radius for pixel values in [0, 1].
        sound: Whether certificates account for float32 rounding.
        settings: Settings of the cascade.
        chunks: Positions of images in the split, one chunk per task.
        workers: Number of Ray workers.

    Yields:
        Position and verdict of each image, in order of completion of its chunk. If workers die three times with the
        same chunk, its images have the status error.

    Raises:
        InputError: If the cluster is too small.
        TrainingError: If Ray is gone.
    """
    start_ray()
    cpus, gpus = evaluation_resources(experiment, workers)
    state = ray.put({name: tensor.cpu() for name, tensor in network.state_dict().items()})
    actor_class = ray.remote(num_cpus=cpus, num_gpus=gpus)(_JudgeActor)

    def start_actor() -> Any:
        return actor_class.remote(experiment, state, split, eps, sound, settings, cpus)

    waiting = deque((chunk, 0) for chunk in chunks)
    idle = [start_actor() for _ in range(min(workers, len(chunks)))]
    running: dict[Any, tuple[Any, Chunk, int]] = {}
    try:
        while waiting or running:
            while waiting and idle:
                (chunk, deaths), actor = waiting.popleft(), idle.pop()
                running[actor.judge.remote(list(chunk))] = actor, chunk, deaths
            (task,), _ = ray.wait(list(running), num_returns=1)
            actor, chunk, deaths = running.pop(task)
            try:
                verdicts = ray.get(task)
            except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
                if getattr(error, "actor_init_failed", False) and deaths + 1 == MAX_DEATHS:  # no fault of the images
                    raise TrainingError(f"a worker did not start: {_shorten(error)}") from None
                idle.append(start_actor())
                if deaths + 1 < MAX_DEATHS:  # one by one, since one image may be the cause
                    waiting.extendleft(([image], deaths + 1) for image in chunk)
                    continue
                message = f"worker died {MAX_DEATHS} times: {_shorten(error)}"
                verdicts = [Verdict("error", CascadeCertifier.kind, 0.0, None, message)] * len(chunk)
            else:
                idle.append(actor)
            yield from zip(chunk, verdicts, strict=True)
    except ray.exceptions.RayError as error:
        raise TrainingError(f"a worker failed during certification: {_shorten(error)}") from None
    finally:
        for actor in [*idle, *(actor for actor, _, _ in running.values())]:
            ray.kill(actor)


def _shorten(error: Exception) -> str:
    return " ".join(str(error).split())[-500:]


def max_judges(experiment: ExperimentConfig) -> int:
    """Return the largest number of workers of `judge_distributed` that fit on the nodes, at least 1."""
    gpus = evaluation_resources(experiment, 1)[1]
    return max(1, max_evaluation_workers(experiment.compute.cpus_per_worker, gpus))


class _JudgeActor:
    """A Ray worker with the network and the images."""

    def __init__(
        self,
        experiment: ExperimentConfig,
        state: dict[str, Tensor],
        split: SplitName,
        eps: float,
        sound: bool,
        settings: CascadeSettings,
        threads: int,
    ) -> None:
        verify_source_hash()
        import_own_parts()
        torch.set_num_threads(threads)
        configure_process()
        device = select_evaluation_device(experiment)
        network = build_network(experiment)
        network.load_state_dict(state)
        self.certifier, self.eps = CascadeCertifier(network.to(device).eval(), sound, settings), eps
        self.split = load_dataset(experiment.dataset, experiment.augmentation).evaluation_split(split).to(device)

    def judge(self, positions: list[int]) -> list[Verdict]:
        """Return the verdicts on the images at these positions, on the CPU."""
        images, labels = self.split.batch(torch.tensor(positions, device=self.split.indices.device))
        verdicts = self.certifier.judge(images, labels, self.eps)
        return [
            one._replace(adversarial=None if one.adversarial is None else one.adversarial.cpu()) for one in verdicts
        ]
