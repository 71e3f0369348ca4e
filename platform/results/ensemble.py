"""Ensemble of trained runs: the weighted mean of their logits, evaluated and logged as one run."""

import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from linflab.models.networks.cost import count_flops, count_parameters
from linflab.models.networks.ensemble import MAX_MEMBERS, Ensemble, EnsembleConfig
from linflab.platform.config.experiment import ExperimentConfig
from linflab.platform.config.overrides import build_config
from linflab.platform.data.datasets import Dataset
from linflab.platform.errors import InputError
from linflab.platform.exchange.pretrained import PREFIX
from linflab.platform.results.ensemble_weights import choose_weights
from linflab.platform.results.load import download_weights, find_run_id
from linflab.platform.results.sharing import is_remote
from linflab.platform.tracking.mlflow import client_of
from linflab.platform.tracking.runs import Run
from linflab.platform.tracking.storage import Storage
from linflab.platform.training.evaluation import ScoringReport, evaluate, evaluation_spec
from linflab.platform.training.weights import Weights, build_network, load_matching_dataset, load_weights, save_weights
from linflab.platform.trial import TrialResult, evaluate_on_test, select_evaluation_device
from linflab.reports import schema
from linflab.reports.methods import describe_method, ensemble_name
from linflab.reports.records import read_run


@dataclass(frozen=True)
class Member:
    """A trained run whose network is averaged.

    Attributes:
        run_id: MLflow run id.
        weights: Config, network and dataset info.
        train_seconds: Training time; None if it was not logged.
    """

    run_id: str
    weights: Weights
    train_seconds: float | None


@dataclass(frozen=True)
class EnsembleOfRuns:
    """Ensemble that is ready to be evaluated.

    Attributes:
        members: The averaged runs.
        experiment: Config of the ensemble.
        network: The network, on the CPU and in evaluation mode.
        dataset: Dataset of all members.
        has_chosen_weights: True if the weights were chosen on validation images.
    """

    members: Sequence[Member]
    experiment: ExperimentConfig
    network: nn.Module
    dataset: Dataset
    has_chosen_weights: bool = False

    @property
    def weights(self) -> tuple[float, ...]:
        """Weights of the members; none if they are equal."""
        assert isinstance(self.experiment.model, EnsembleConfig)
        return self.experiment.model.weights

    @property
    def mirror_note(self) -> str:
        """Which of the networks are averaged over mirror images, as the end of a text; empty if none is."""
        assert isinstance(self.experiment.model, EnsembleConfig)
        count, views = sum(self.experiment.model.mirror), "over images and their mirror images"
        if not count:
            return ""
        return f" {views}" if count == len(self.members) else f", {count} of them {views}"


def prepare_ensemble(
    storage: Storage, runs: Sequence[str], weights: Sequence[float] | Literal["auto"] = (), mirror: bool = False
) -> EnsembleOfRuns:
    """Return the ensemble of trained runs, after all checks of the input.

    Settings of the evaluation are those of the first run, with the attacks of all runs. The certifier is `auto` unless
    all runs have the same. `training.epochs` is the sum over the runs; all other settings of training are those of the
    first run, and have no effect.

    Args:
        storage: Storage of the runs.
        runs: Names of runs, or prefixes of their ids.
        weights: Weight of each run in the mean; none: equal weights; auto: chosen on validation images.
        mirror: Also average logits for mirror images, of the runs that were trained with random flips.

    Raises:
        InputError: If there are fewer than two runs (one with `mirror`) or too many, a run does not exist, is given
            twice, has no weights or is an ensemble, the runs differ in dataset, eps or input shape, or the dataset is
            missing; also if the weights of the mean are invalid, or cannot be chosen, or no run can be mirrored.
    """
    if not 2 - mirror <= len(runs) <= MAX_MEMBERS:
        raise InputError(
            f"runs={' '.join(runs)}: must be 2 to {MAX_MEMBERS} runs, or one with --mirror, trained with flips; add "
            "runs to average, or leave some out"
        )
    for run in runs:
        if run.startswith(PREFIX) or is_remote(run):
            raise InputError(f"{run}: must be a logged run, since only these are averaged; use an id of `linflab runs`")
    ids = [find_run_id(storage, run) for run in runs]
    for position, run_id in enumerate(ids):
        if run_id in ids[:position]:
            raise InputError(f"{runs[position]}: is given twice, as run {run_id}; use each run once")
    members = [_read_member(storage, run, run_id) for run, run_id in zip(runs, ids, strict=True)]
    _check_members(runs, members)
    is_auto = isinstance(weights, str)
    mirrored = tuple(mirror and member.weights.experiment.augmentation.horizontal_flip for member in members)
    if mirror and not any(mirrored):
        raise InputError(
            f"mirror=true: none of the runs was trained with mirror images ({', '.join(runs)}); use at least one with "
            f"augmentation.horizontal_flip=true{', or leave out --mirror' * (len(runs) > 1)}"
        )
    experiment = _ensemble_config(members, () if isinstance(weights, str) else weights, mirrored)
    if is_auto:
        _check_held_out(runs, members)
    dataset = load_matching_dataset(members[0].weights)
    if is_auto:
        device = select_evaluation_device(experiment)
        networks = [
            Ensemble([member.weights.network], mirror=[is_mirrored]).to(device).eval()
            for member, is_mirrored in zip(members, mirrored, strict=True)
        ]
        validation = dataset.to(device).validation
        experiment = _ensemble_config(members, choose_weights(networks, runs, validation, experiment), mirrored)
    network = build_network(experiment, members[0].weights.info)
    assert isinstance(network, Ensemble)
    for part, member in zip(network.members, members, strict=True):
        part.load_state_dict(member.weights.network.state_dict())
    return EnsembleOfRuns(members, experiment, network.eval(), dataset, is_auto)


def _check_held_out(runs: Sequence[str], members: Sequence[Member]) -> None:
    """Check that validation images can choose weights.

    Raises:
        InputError: If a run was trained on them.
    """
    for run, member in zip(runs, members, strict=True):
        if member.weights.experiment.training.include_validation:
            raise InputError(
                f"weights=auto: {run} was trained on validation images (training.include_validation=true), so they "
                "cannot choose weights; give numbers, as in --weights 1,10"
            )


def _read_member(storage: Storage, name: str, run_id: str) -> Member:
    """Return a trained run by its id; messages show its name.

    Raises:
        InputError: If the run has not finished or has no weights.
    """
    run = read_run(client_of(storage), run_id)
    if run.info.status != "FINISHED":
        raise InputError(f"{name}: has not finished (status={run.info.status.lower()}); use a run that has finished")
    weights = load_weights(download_weights(storage, run_id))
    return Member(run_id, weights, run.data.metrics.get(schema.TRAIN_SECONDS))


def _check_members(runs: Sequence[str], members: Sequence[Member]) -> None:
    """Check that networks can be averaged.

    Raises:
        InputError: If a run is an ensemble, or differs from the first one in dataset, eps, input shape or classes.
    """
    for run, member in zip(runs, members, strict=True):
        if isinstance(member.weights.experiment.model, EnsembleConfig):
            raise InputError(f"{run}: is an ensemble, which cannot be averaged again; use its members")
    first, *others = (_compared_values(member) for member in members)
    for run, values in zip(runs[1:], others, strict=True):
        for name, value in values.items():
            if value != first[name]:
                raise InputError(
                    f"{run}: has {name}={value}, but {runs[0]} has {name}={first[name]}; use runs with the same "
                    "dataset, eps and input shape"
                )


def _compared_values(member: Member) -> Mapping[str, object]:
    """Return the values that all members must have in common, by name."""
    weights = member.weights
    return {
        "dataset": weights.experiment.dataset,
        "eps": weights.experiment.eps,
        "input_shape": weights.image_shape,
        "classes": weights.info.classes,
    }


def _ensemble_config(members: Sequence[Member], weights: Sequence[float], mirrored: Sequence[bool]) -> ExperimentConfig:
    """Return the config of an ensemble; see `prepare_ensemble`.

    Raises:
        InputError: If the weights of the mean are invalid.
    """
    experiments = [member.weights.experiment for member in members]
    tree = experiments[0].model_dump(mode="json")
    certifiers = {experiment.evaluation.certifier for experiment in experiments}
    attacks = [method for experiment in experiments for method in experiment.evaluation.attack.methods or ()]
    tree["model"] = {
        "kind": "ensemble",
        "members": [experiment.model.model_dump(mode="json") for experiment in experiments],
        "weights": list(weights),
        "mirror": list(mirrored) if any(mirrored) else [],
        "runs": [member.run_id for member in members],
    }
    methods = [describe_method(experiment.to_flat_dict(), experiment.method) for experiment in experiments]
    tree["method"] = ensemble_name(methods, mirrored)
    tree["training"]["epochs"] = sum(experiment.training.epochs for experiment in experiments)
    tree["training"]["include_validation"] = any(experiment.training.include_validation for experiment in experiments)
    tree["evaluation"]["certifier"] = certifiers.pop() if len(certifiers) == 1 else "auto"
    tree["evaluation"]["sound"] = any(experiment.evaluation.sound for experiment in experiments)
    tree["evaluation"]["attack"]["methods"] = list(dict.fromkeys(attacks))
    tree["compute"]["workers"] = 1
    return build_config(tree, {}, for_evaluation=True)


def log_ensemble(
    storage: Storage,
    ensemble: EnsembleOfRuns,
    name: str,
    tags: Mapping[str, str],
    on_report: Callable[[ScoringReport], None] = lambda report: None,
) -> TrialResult:
    """Evaluate an ensemble on validation and test images, and log it as one run with its weights.

    If a member was also trained on validation images, there is no validation accuracy.

    Args:
        storage: Storage of the new run.
        ensemble: Ensemble to evaluate.
        name: Name of the new run.
        tags: Further tags of the new run.
        on_report: Called after each batch of test images.
    """
    experiment, members = ensemble.experiment, ensemble.members
    all_tags = {
        schema.KIND: "trial",
        schema.INVOCATION_ID: uuid.uuid4().hex,
        schema.MEMBERS: ",".join(member.run_id for member in members),
        schema.MISSING: "model and figures",
        **tags,
    }
    device = select_evaluation_device(experiment)
    network, dataset = ensemble.network.to(device), ensemble.dataset.to(device)
    torch.set_num_threads(experiment.compute.cpus_per_worker)
    with Run.start(storage, experiment, name, all_tags) as run, tempfile.TemporaryDirectory() as folder:
        metrics = {
            schema.FLOPS: float(count_flops(network, dataset.info.input_shape)),
            schema.PARAMETERS: float(count_parameters(network)),
        }
        seconds = [member.train_seconds for member in members if member.train_seconds is not None]
        if len(seconds) == len(members):
            metrics[schema.TRAIN_SECONDS] = sum(seconds)
        if not experiment.training.include_validation:
            spec = evaluation_spec(experiment, network, with_attacks=False)
            (validation,) = evaluate(network, dataset.validation, spec, experiment.evaluation.batch_size)
            metrics[schema.BEST_VALIDATION_CLEAN] = validation.clean
            metrics[schema.BEST_VALIDATION_CERTIFIED] = validation.certified
        plural = "s" * (len(members) > 1)
        selection = f"mean of the selected network{plural} of {len(members)} run{plural}"
        selection += ensemble.mirror_note
        if ensemble.has_chosen_weights:
            selection += f", {schema.CHOSEN_WEIGHTS}"
        spec = evaluation_spec(experiment, network, with_attacks=True)
        images = Path(folder) / schema.FIGURES_DIR / schema.RADII_FILE
        metrics |= evaluate_on_test(network, dataset.test, spec, experiment, on_report, images)
        save_weights(Path(folder) / schema.WEIGHTS_FILE, network, experiment, epoch=None)
        run.log_tags(
            {
                schema.CERTIFIER: spec.certificate,
                schema.SELECTION: selection,
                schema.ATTACK: experiment.evaluation.attack.describe(),
            }
        )
        run.client.log_artifacts(run.id, folder)
        run.log_metrics(metrics)
    return TrialResult(run.id, metrics, spec.certificate)
